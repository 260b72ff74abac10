//! Recounts a family from nothing and compares: the whole-state checker of the core.

use std::collections::{BTreeMap, BTreeSet};

use thiserror::Error;

use super::Family;
use crate::board::NODE_ENTRIES;
use crate::frames::{CutId, Frames};
use crate::tables::{Entry, LeafRecord};

/// A count or a rule that does not hold.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FamilyFault {
    /// A node or record is counted wrongly.
    #[error("{entry:?} has {counted} references, {found} were found")]
    References {
        /// What is counted.
        entry: Entry,
        /// The count.
        counted: u32,
        /// The truth.
        found: u32,
    },
    /// A cut is counted wrongly.
    #[error("{cut} has {counted} references, {found} were found")]
    Cut {
        /// Which.
        cut: CutId,
        /// The count.
        counted: u32,
        /// The truth.
        found: u32,
    },
    /// A block or patch set is counted wrongly.
    #[error("{frames:?} has {counted} references, {found} were found")]
    Frames {
        /// Which.
        frames: Frames,
        /// The count.
        counted: u32,
        /// The truth.
        found: u32,
    },
    /// More or fewer nodes and records are in use than can be reached.
    #[error("{counted} nodes and records are in use, {found} can be reached")]
    InUse {
        /// The count.
        counted: usize,
        /// The truth.
        found: usize,
    },
    /// The places of cuts on the board that are taken are not those of the cuts.
    #[error("places {counted:?} of the board are taken, those of cuts are {found:?}")]
    Places {
        /// Said to be taken.
        counted: BTreeSet<u32>,
        /// The truth.
        found: BTreeSet<u32>,
    },
    /// What one VM owns can be reached by another.
    #[error("{entry:?} holds pages of one VM and has {references} references")]
    PrivateShared {
        /// The record.
        entry: Entry,
        /// Its references.
        references: u32,
    },
}

#[derive(Default)]
struct Recount {
    entries: BTreeMap<Entry, u32>,
    cuts: BTreeMap<CutId, u32>,
    frames: BTreeMap<Frames, u32>,
}

impl Family {
    /// Recounts everything. Call between operations, after a sweep.
    ///
    /// # Errors
    /// The first thing that is not as it should be.
    pub fn check(&self) -> Result<(), FamilyFault> {
        let mut recount = Recount::default();
        for (_, entry) in self.held_entries() {
            self.recount(entry, &mut recount);
        }
        for cut in self.cuts.values() {
            self.recount(cut.base, &mut recount);
            if let Some(table) = cut.table {
                self.recount(table, &mut recount);
            }
        }
        for (entry, found) in &recount.entries {
            let counted = self.tables.references(*entry);
            if counted != *found {
                return Err(FamilyFault::References { entry: *entry, counted, found: *found });
            }
        }
        let counts = self.tables.counts();
        let in_use = counts.nodes + counts.records;
        if in_use != recount.entries.len() {
            return Err(FamilyFault::InUse { counted: in_use, found: recount.entries.len() });
        }
        for (cut, known) in &self.cuts {
            let found = recount.cuts.get(cut).copied().unwrap_or(0);
            if known.references != found {
                return Err(FamilyFault::Cut { cut: *cut, counted: known.references, found });
            }
        }
        let shape = self.board.shape();
        let found: BTreeSet<_> = self.cuts.keys().chain(&self.files).map(|id| shape.place_of(*id)).collect();
        if self.places != found {
            return Err(FamilyFault::Places { counted: self.places.clone(), found });
        }
        self.check_frames(&recount)?;
        self.check_private()
    }

    fn check_frames(&self, recount: &Recount) -> Result<(), FamilyFault> {
        for (frames, counted) in self.tables.ledger().iter() {
            let found = recount.frames.get(&frames).copied().unwrap_or(0);
            if counted != found {
                return Err(FamilyFault::Frames { frames, counted, found });
            }
        }
        for (frames, found) in &recount.frames {
            let counted = self.tables.ledger().references(*frames);
            if counted != *found {
                return Err(FamilyFault::Frames { frames: *frames, counted, found: *found });
            }
        }
        Ok(())
    }

    /// What is private must have one referrer all the way up.
    fn check_private(&self) -> Result<(), FamilyFault> {
        for vm in self.vms.values() {
            let mut private = Vec::new();
            self.tables.for_each(vm.root, &mut |_, leaf, entry| {
                if let Entry::Leaf(record) = entry
                    && matches!(self.tables.leaf_record(record), LeafRecord::Private { .. })
                {
                    private.push(leaf);
                }
            });
            for leaf in private {
                for entry in self.tables.path(vm.root, leaf) {
                    let references = self.tables.references(entry);
                    if references != 1 {
                        return Err(FamilyFault::PrivateShared { entry, references });
                    }
                }
            }
        }
        Ok(())
    }

    /// Counts one reference to `entry`, and at the first one all that it refers to.
    fn recount(&self, entry: Entry, recount: &mut Recount) {
        match entry {
            Entry::Empty | Entry::Lost => {}
            Entry::Thunk(cut) => *recount.cuts.entry(cut).or_default() += 1,
            Entry::Node(node) => {
                let count = recount.entries.entry(entry).or_default();
                *count += 1;
                if *count == 1 {
                    for index in 0..NODE_ENTRIES {
                        self.recount(self.tables.entry(node, index), recount);
                    }
                }
            }
            Entry::Leaf(record) => {
                let count = recount.entries.entry(entry).or_default();
                *count += 1;
                if *count == 1 {
                    let content = self.tables.leaf_record(record);
                    for frames in content.frames(self.tables.leaf_of(record)) {
                        *recount.frames.entry(frames).or_default() += 1;
                    }
                    if let LeafRecord::Private { under, .. } = content {
                        self.recount(under, recount);
                    }
                }
            }
        }
    }
}
