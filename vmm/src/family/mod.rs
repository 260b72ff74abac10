//! The family: which VMs and cuts there are, what each depends on, and when nobody needs it.
//!
//! This is the keeper's knowledge, and the keeper alone changes it. It knows neither processes nor
//! files nor KVM: it is told what happened and says what follows ([`Sweep`]).
//!
//! - A *cut* takes the place of its source's table: after it, source and clones all have
//!   `Thunk(cut)` as their root, and the cut's base is what the source's root was. So a clone takes
//!   one reference, at the root, whatever the size of memory.
//! - A cut is *needed* as long as anybody but its own source may read through it. Who refers to it
//!   is counted exactly; what the source's own line refers to does not matter ([`Family::sweep`]).
//! - When none of its leaves is pending, a cut is *settled*: its leaf words become leaf records of a
//!   table, which shares with its base all that did not change.
//!
//! Every operation decides first and changes nothing if it fails.

mod census;
mod check;
mod sweep;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::board::{Board, LeafWord};
use crate::frames::{CutId, Frames};
use crate::plants::{Plant, is_planted};
use crate::tables::{
    Entry, Found, LeafRecord, NUMBER_LIMIT, ShareLevel, TableCounts, Tables, TablesError, resolve,
};
use crate::words::{LeafNumber, PageSet};

pub use self::census::{Census, TableCensus};
pub use self::check::FamilyFault;

/// Names a VM of a colony. The first is 1; never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VmId(pub u32);

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vm {}", self.0)
    }
}

/// An operation on the family that cannot be done. Nothing has changed.
#[derive(Debug, Error)]
pub enum FamilyError {
    /// There is no such VM, or it has ended.
    #[error("{0} does not exist")]
    NoVm(VmId),
    /// There is no such cut, or nobody needs it any more, so that it cannot have new clones.
    #[error("{0} does not exist or is not needed any more")]
    NoCut(CutId),
    /// All cut numbers are in use.
    #[error("all {0} cuts are in use")]
    Cuts(u32),
    /// The VM keeps no cut to return to.
    #[error("{0} has no cut that it could return to: it is no clone, or was made without")]
    NoOrigin(VmId),
    /// No room for a table.
    #[error("no room for a table")]
    Tables(#[from] TablesError),
    /// The board has no memory for the cut.
    #[error("no memory for the cut's words: {0}")]
    Memory(#[from] io::Error),
}

/// What follows from the changes since the last sweep.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Sweep {
    /// Cuts that no clone needs any more: their sources may let go of what is pending.
    pub unneeded: Vec<CutId>,
    /// Frames that nobody refers to.
    pub freed: Vec<Frames>,
    /// Cuts whose files and board areas are of no use any more.
    pub closed: Vec<CutId>,
}

#[derive(Debug)]
struct Vm {
    /// What the VM shares, and, after a harvest, which pages it owns.
    root: Entry,
    /// What a resettable clone shared when it began, kept as long as it lives.
    origin: Option<Entry>,
    /// Whether the root reaches what the origin does: no cut of the VM has come between.
    is_at_origin: bool,
    slot: u32,
}

#[derive(Debug)]
struct Cut {
    source: VmId,
    base: Entry,
    table: Option<Entry>,
    /// Roots, bases and slots that name the cut.
    references: u32,
    unneeded: bool,
    /// The source has let go of what was pending, or is gone.
    released: bool,
    /// The cut has been performed (before that it is only reserved).
    committed: bool,
    /// Its fork is not over: clones may come yet, and look for its files.
    held: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Family {
    board: Board,
    tables: Tables,
    vms: BTreeMap<VmId, Vm>,
    cuts: BTreeMap<CutId, Cut>,
    /// Cuts that nobody refers to, whose files are still in use.
    files: BTreeSet<CutId>,
    /// The places on the board of all of these.
    places: BTreeSet<u32>,
    /// Frames that no record names and a window may still map.
    parting: BTreeSet<Frames>,
    /// Unneeded cuts whose sources are to be told again.
    untold: Vec<CutId>,
    /// The member slots of all VMs whose processes exist, ended ones included.
    slots: BTreeMap<VmId, u32>,
    next_vm: u32,
    next_cut: u32,
    share_level: ShareLevel,
}

impl Family {
    /// No VM yet.
    #[must_use]
    pub fn new(board: Board) -> Self {
        Self {
            tables: Tables::new(board.clone()),
            board,
            vms: BTreeMap::new(),
            cuts: BTreeMap::new(),
            files: BTreeSet::new(),
            places: BTreeSet::new(),
            parting: BTreeSet::new(),
            untold: Vec::new(),
            slots: BTreeMap::new(),
            next_vm: 1,
            next_cut: 1,
            share_level: ShareLevel::default(),
        }
    }

    /// The level at which forks share from now on.
    pub fn share_at(&mut self, level: ShareLevel) {
        self.share_level = level;
    }

    /// A VM that shares nothing, in member slot `slot`.
    pub fn first_vm(&mut self, slot: u32) -> VmId {
        self.add_vm(slot, Entry::Empty, None)
    }

    fn add_vm(&mut self, slot: u32, root: Entry, origin: Option<Entry>) -> VmId {
        let vm = VmId(self.next_vm);
        self.next_vm += 1;
        self.vms.insert(vm, Vm { root, origin, is_at_origin: true, slot });
        self.slots.insert(vm, slot);
        self.board.member(slot).set_base(root.encode());
        vm
    }

    /// Reserves a cut of `source`: after this, performing and committing it cannot fail.
    ///
    /// # Errors
    /// No such VM, or no room.
    pub fn reserve_cut(&mut self, source: VmId) -> Result<CutId, FamilyError> {
        if !is_planted(Plant::OwnedIsShared) {
            self.forget_harvest(source)?;
        }
        let id = self.free_cut_id()?;
        self.board.open_cut(id)?;
        let Some(vm) = self.vms.get(&source) else {
            return Err(FamilyError::NoVm(source));
        };
        let (root, slot) = (vm.root, vm.slot);
        let base = self.share(root);
        self.board.cut(id).set_origin(base.encode(), slot);
        let cut = Cut {
            source,
            base,
            table: None,
            references: 0,
            unneeded: false,
            released: false,
            committed: false,
            held: false,
        };
        self.cuts.insert(id, cut);
        self.places.insert(self.board.shape().place_of(id));
        Ok(id)
    }

    /// A number never used before whose place on the board is free.
    fn free_cut_id(&mut self) -> Result<CutId, FamilyError> {
        let shape = self.board.shape();
        for _ in 0..shape.cuts {
            let id = CutId::new(self.next_cut).filter(|id| id.get() < NUMBER_LIMIT);
            let id = id.ok_or(FamilyError::Cuts(NUMBER_LIMIT))?;
            self.next_cut += 1;
            if !self.places.contains(&shape.place_of(id)) {
                return Ok(id);
            }
        }
        Err(FamilyError::Cuts(shape.cuts))
    }

    /// Gives a reserved cut up.
    pub fn abort_cut(&mut self, cut: CutId) {
        if let Some(Cut { base, .. }) = self.cuts.remove(&cut) {
            self.release(base);
            self.files.insert(cut);
        }
    }

    /// The cut has been performed: source and clones go on from it.
    pub fn commit_cut(&mut self, id: CutId) {
        let Some(cut) = self.cuts.get_mut(&id) else {
            return;
        };
        cut.committed = true;
        let source = cut.source;
        if let Some(vm) = self.vms.get_mut(&source) {
            vm.is_at_origin = false;
            let thunk = self.share_below(Entry::Thunk(id));
            self.set_root(source, thunk);
        }
    }

    /// Keeps a cut that nobody refers to yet: its clones are being started.
    pub fn hold_cut(&mut self, cut: CutId) {
        self.set_held(cut, true);
    }

    /// The clones of a cut run, or never will.
    pub fn let_go_of_cut(&mut self, cut: CutId) {
        self.set_held(cut, false);
    }

    fn set_held(&mut self, cut: CutId, is_held: bool) {
        if let Some(cut) = self.cuts.get_mut(&cut) {
            cut.held = is_held;
        }
    }

    /// A clone of `cut`, in member slot `slot`. One that is resettable keeps what it shares now, all
    /// its life, to return to it.
    ///
    /// # Errors
    /// The cut has been declared unneeded, or does not exist.
    pub fn clone_vm(&mut self, cut: CutId, slot: u32, is_resettable: bool) -> Result<VmId, FamilyError> {
        let known = self
            .cuts
            .get(&cut)
            .filter(|known| known.committed && (!known.unneeded || is_planted(Plant::UnneededTakesClones)));
        let known = known.ok_or(FamilyError::NoCut(cut))?;
        let shared = known.table.unwrap_or(Entry::Thunk(cut));
        let root = self.share_below(shared);
        let origin = is_resettable.then(|| match is_planted(Plant::OriginUncounted) {
            true => shared,
            false => self.share(shared),
        });
        Ok(self.add_vm(slot, root, origin))
    }

    /// Whether a clone can return to its cut without [`Family::reset_vm`]: it has not been cut itself.
    ///
    /// # Errors
    /// No such VM, or it is no clone.
    pub fn is_at_origin(&self, vm: VmId) -> Result<bool, FamilyError> {
        let known = self.vms.get(&vm).ok_or(FamilyError::NoVm(vm))?;
        known.origin.map(|_| known.is_at_origin).ok_or(FamilyError::NoOrigin(vm))
    }

    /// A clone returns to its cut: it shares again what it did when it began. Its window must follow.
    ///
    /// # Errors
    /// No such VM, or it is no clone; or no room.
    pub fn reset_vm(&mut self, vm: VmId) -> Result<(), FamilyError> {
        self.forget_harvest(vm)?;
        let known = self.vms.get_mut(&vm).ok_or(FamilyError::NoVm(vm))?;
        let origin = known.origin.ok_or(FamilyError::NoOrigin(vm))?;
        known.is_at_origin = true;
        let root = self.share(origin);
        self.set_root(vm, root);
        Ok(())
    }

    /// A VM has ended: it needs nothing any more. What others need of it stays where it is until
    /// [`Family::source_gone`].
    pub fn end_vm(&mut self, vm: VmId) {
        if let Some(Vm { root, origin, slot, .. }) = self.vms.remove(&vm) {
            // A thread of its process that looks once more must find nothing that is being given up.
            self.board.member(slot).set_base(Entry::Empty.encode());
            self.release(root);
            origin.into_iter().for_each(|origin| self.release(origin));
        }
    }

    /// The process of a VM is gone, and with it what it had not published: those leaves are lost.
    /// Returns the words that others may be waiting on.
    pub fn source_gone(&mut self, vm: VmId) -> Vec<(CutId, LeafNumber)> {
        self.end_vm(vm);
        self.slots.remove(&vm);
        let mut lost = Vec::new();
        for (id, cut) in self.cuts.iter_mut().filter(|(_, cut)| cut.source == vm) {
            cut.released = true;
            if cut.unneeded {
                // Nothing is lost: see `resolve`.
                continue;
            }
            let area = self.board.cut(*id);
            for leaf in area.pending().filter(|_| !is_planted(Plant::DeathIsSilent)) {
                area.publish(leaf, LeafWord::Lost);
                lost.push((*id, leaf));
            }
        }
        lost
    }

    /// The source has let go of what was pending in a cut that was declared unneeded.
    pub fn cut_released(&mut self, cut: CutId) {
        if let Some(cut) = self.cuts.get_mut(&cut) {
            cut.released = true;
        }
    }

    /// The source could not be told that a cut was declared unneeded: the next sweep says so again.
    pub fn cut_not_released(&mut self, cut: CutId) {
        if self.cuts.contains_key(&cut) {
            self.untold.push(cut);
        }
    }

    /// Writes into the tables which pages a VM owns, as its member has found: the leaves that have
    /// any. What was harvested before is forgotten.
    ///
    /// # Errors
    /// No such VM, or no room.
    pub fn harvest(&mut self, vm: VmId, owned: &[(LeafNumber, PageSet)]) -> Result<(), FamilyError> {
        let keep: BTreeSet<LeafNumber> = owned.iter().map(|(leaf, _)| *leaf).collect();
        let gone: Vec<_> = self.private_leaves(vm)?.into_iter().filter(|leaf| !keep.contains(leaf)).collect();
        for leaf in gone {
            self.set_private(vm, leaf, PageSet::EMPTY)?;
        }
        for (leaf, exclusive) in owned {
            self.set_private(vm, *leaf, *exclusive)?;
        }
        Ok(())
    }

    fn forget_harvest(&mut self, vm: VmId) -> Result<(), FamilyError> {
        for leaf in self.private_leaves(vm)? {
            self.set_private(vm, leaf, PageSet::EMPTY)?;
        }
        Ok(())
    }

    fn private_leaves(&self, vm: VmId) -> Result<Vec<LeafNumber>, FamilyError> {
        let root = self.root(vm)?;
        let mut leaves = Vec::new();
        self.tables.for_each(root, &mut |_, leaf, entry| {
            if let Entry::Leaf(record) = entry
                && matches!(self.tables.leaf_record(record), LeafRecord::Private { .. })
            {
                leaves.push(leaf);
            }
        });
        Ok(leaves)
    }

    fn set_private(&mut self, vm: VmId, leaf: LeafNumber, exclusive: PageSet) -> Result<(), FamilyError> {
        let entry = self.vms.get_mut(&vm).ok_or(FamilyError::NoVm(vm))?;
        let cuts = &mut self.cuts;
        let result = self.tables.set_private(&mut entry.root, leaf, exclusive, &mut retain_in(cuts));
        self.board.member(entry.slot).set_base(entry.root.encode());
        Ok(result?)
    }

    fn set_root(&mut self, vm: VmId, root: Entry) {
        if let Some(entry) = self.vms.get_mut(&vm) {
            let old = std::mem::replace(&mut entry.root, root);
            self.board.member(entry.slot).set_base(root.encode());
            self.release(old);
        }
    }

    /// The entries that VMs hold: roots and origins, with whose they are.
    fn held_entries(&self) -> impl Iterator<Item = (VmId, Entry)> + '_ {
        self.vms.iter().flat_map(|(vm, known)| {
            [Some(known.root), known.origin].into_iter().flatten().map(move |entry| (*vm, entry))
        })
    }

    /// Takes a reference, on a cut too.
    fn share(&mut self, entry: Entry) -> Entry {
        if let Entry::Thunk(id) = entry {
            retain_in(&mut self.cuts)(id);
        }
        self.tables.share(entry)
    }

    /// As [`Family::share`], with nodes of the caller's own above the level at which forks share. Where
    /// there is no room for them, more is shared: that is right as well, and cannot fail.
    fn share_below(&mut self, entry: Entry) -> Entry {
        let mut root = self.share(entry);
        let cuts = &mut self.cuts;
        if let Err(error) = self.tables.break_down_to(&mut root, self.share_level, &mut retain_in(cuts)) {
            tracing::debug!(%error, "a fork shares higher up");
        }
        root
    }

    /// Gives a reference up. What falls to 0 is seen to at the next sweep.
    fn release(&mut self, entry: Entry) {
        self.tables.release(entry);
    }

    /// The root entry of a VM.
    ///
    /// # Errors
    /// No such VM.
    pub fn root(&self, vm: VmId) -> Result<Entry, FamilyError> {
        self.vms.get(&vm).map(|vm| vm.root).ok_or(FamilyError::NoVm(vm))
    }

    /// What `leaf` of a VM shares.
    ///
    /// # Errors
    /// No such VM.
    pub fn resolve(&self, vm: VmId, leaf: LeafNumber) -> Result<Found, FamilyError> {
        Ok(resolve(&self.board, self.root(vm)?, leaf))
    }

    /// The tables, to look at.
    #[must_use]
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Nodes and records in use.
    #[must_use]
    pub fn table_counts(&self) -> TableCounts {
        self.tables.counts()
    }

    /// The living VMs.
    pub fn vms(&self) -> impl Iterator<Item = VmId> + '_ {
        self.vms.keys().copied()
    }

    /// The cuts that are referred to, with their sources.
    pub fn cuts(&self) -> impl Iterator<Item = (CutId, VmId)> + '_ {
        self.cuts.iter().map(|(id, cut)| (*id, cut.source))
    }

    /// References to a cut from roots, bases and slots; 0 for a cut that does not exist.
    #[must_use]
    pub fn references_to(&self, cut: CutId) -> u32 {
        self.cuts.get(&cut).map_or(0, |cut| cut.references)
    }

    /// Cuts whose words or files still exist.
    #[must_use]
    pub fn open_cuts(&self) -> usize {
        self.cuts.len() + self.files.len()
    }

    /// Whether a VM's process still holds pages that others need: its window must stay.
    #[must_use]
    pub fn is_image_needed(&self, vm: VmId) -> bool {
        self.cuts.iter().any(|(id, cut)| {
            cut.source == vm && !cut.unneeded && self.board.cut(*id).pending().next().is_some()
        })
    }
}

fn retain_in(cuts: &mut BTreeMap<CutId, Cut>) -> impl FnMut(CutId) {
    |id| {
        let cut = cuts.get_mut(&id).expect("a cut lives as long as an entry names it");
        cut.references += 1;
    }
}
