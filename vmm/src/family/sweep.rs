//! What follows from the changes: which cuts nobody needs, which are settled, what is free.

use std::collections::{BTreeMap, BTreeSet};

use super::{Cut, Family, FamilyError, Sweep, Vm, VmId, retain_in};
use crate::board::{CutArea, LeafMap, LeafWord};
use crate::frames::{BlockId, CutId, Frames};
use crate::plants::{Plant, is_planted};
use crate::tables::{Entry, LeafRecord, Tables, TablesError};
use crate::words::{LeafNumber, index};

impl Family {
    /// Settles every cut that can be, and says what follows from all changes.
    ///
    /// # Errors
    /// No room for a table: what could not be settled stays as it is, and is right as it is.
    pub fn sweep(&mut self) -> Result<Sweep, FamilyError> {
        let mut sweep = Sweep { unneeded: std::mem::take(&mut self.untold), ..Sweep::default() };
        sweep.unneeded.retain(|cut| self.cuts.get(cut).is_some_and(|cut| !cut.released));
        let mut failed = None;
        loop {
            // What was given up since counts no more.
            self.count_released();
            let before = (self.cuts.len(), sweep.unneeded.len());
            self.declare_unneeded(&mut sweep);
            let settleable: Vec<CutId> =
                self.cuts.keys().copied().filter(|id| self.can_settle(*id)).collect();
            for id in &settleable {
                if let Err(error) = self.settle(*id) {
                    failed = Some(error);
                }
            }
            self.drop_unreferenced();
            self.trim_owned();
            if failed.is_some()
                || (settleable.is_empty() && before == (self.cuts.len(), sweep.unneeded.len()))
            {
                break;
            }
        }
        if let Some(error) = failed {
            // Said the next time. Files stay open until then.
            self.untold = sweep.unneeded;
            return Err(error);
        }
        self.close_files(&mut sweep);
        Ok(sweep)
    }

    /// Books what the tables have given up since the last sweep, and nothing else: counts are exact
    /// afterwards.
    pub fn book_released(&mut self) {
        self.count_released();
    }

    /// A cut is unneeded if nobody refers to it but its own source, or that source's later cuts
    /// that are unneeded themselves.
    fn declare_unneeded(&mut self, sweep: &mut Sweep) {
        // Later cuts first: whether a cut is needed depends on the cuts above it.
        let ids: Vec<CutId> = self.cuts.keys().copied().rev().collect();
        let mut changed = true;
        while changed {
            changed = false;
            for id in &ids {
                let cut = &self.cuts[id];
                if cut.unneeded || cut.held || !cut.committed || cut.table.is_some() {
                    continue;
                }
                if !self.is_needed(*id, cut) {
                    self.board.cut(*id).set_unneeded();
                    if let Some(cut) = self.cuts.get_mut(id) {
                        cut.unneeded = true;
                    }
                    sweep.unneeded.push(*id);
                    changed = true;
                }
            }
        }
    }

    /// Whether anybody else than the cut's own source comes to it.
    fn is_needed(&self, id: CutId, cut: &Cut) -> bool {
        let is_own = |vm: VmId| vm == cut.source;
        let is_own_cut = |other: &Cut| other.source == cut.source && other.unneeded;
        let (own, others): (Vec<Entry>, Vec<Entry>) = {
            let vms = self.held_entries().map(|(vm, entry)| (is_own(vm), entry));
            let cuts = self.cuts.values().flat_map(|other| {
                let entries = [Some(other.base), other.table];
                entries.into_iter().flatten().map(move |entry| (is_own_cut(other), entry))
            });
            let (own, others): (Vec<_>, Vec<_>) = vms.chain(cuts).partition(|(is_own, _)| *is_own);
            let entries = |marked: Vec<(bool, Entry)>| marked.into_iter().map(|(_, entry)| entry).collect();
            (entries(own), entries(others))
        };
        if others.contains(&Entry::Thunk(id)) {
            return true;
        }
        // Mostly roots and bases are all that names a cut: then nobody need look into the tables.
        let direct = own.iter().filter(|entry| **entry == Entry::Thunk(id)).count();
        if index(u64::from(cut.references)) == direct {
            return false;
        }
        // Not by counts: tables are shared, a slot may be reached from several sides.
        !is_planted(Plant::UnneededTooEarly) && others.into_iter().any(|entry| self.reaches_thunk(entry, id))
    }

    fn reaches_thunk(&self, root: Entry, cut: CutId) -> bool {
        let mut found = false;
        self.tables.for_each(root, &mut |_, _, entry| {
            found |= match entry {
                Entry::Thunk(named) => named == cut,
                Entry::Leaf(record) => match self.tables.leaf_record(record) {
                    LeafRecord::Private { under, .. } => under == Entry::Thunk(cut),
                    LeafRecord::Shared { .. } => false,
                },
                _ => false,
            };
        });
        found
    }

    fn can_settle(&self, id: CutId) -> bool {
        let cut = &self.cuts[&id];
        let base_is_open = matches!(cut.base, Entry::Thunk(base) if self.is_open(base));
        let nothing_pending = cut.released || self.board.cut(id).pending().next().is_none();
        cut.committed && cut.table.is_none() && !base_is_open && nothing_pending
    }

    fn is_open(&self, id: CutId) -> bool {
        self.cuts.get(&id).is_some_and(|cut| cut.table.is_none())
    }

    /// Turns a cut's leaf words into a table, and gives that to whoever had the cut as root.
    fn settle(&mut self, id: CutId) -> Result<(), FamilyError> {
        let base = self.cuts[&id].base;
        let mut table = self.share(base);
        let board = self.board.clone();
        let area = board.cut(id);
        for leaf in area.protected() {
            if let Err(error) =
                Self::settle_leaf(&mut self.tables, &mut self.cuts, &area, id, &mut table, leaf)
            {
                self.release(table);
                return Err(error.into());
            }
        }
        area.set_table(table.encode());
        if let Some(cut) = self.cuts.get_mut(&id) {
            cut.table = Some(table);
        }
        let heirs: Vec<VmId> =
            self.vms.iter().filter(|(_, vm)| vm.root == Entry::Thunk(id)).map(|(vm, _)| *vm).collect();
        for vm in heirs {
            let root = self.share(table);
            self.set_root(vm, root);
        }
        self.settle_origins(id, table);
        let above: Vec<CutId> =
            self.cuts.iter().filter(|(_, cut)| cut.base == Entry::Thunk(id)).map(|(cut, _)| *cut).collect();
        for other in above {
            let base = self.share(table);
            self.board.cut(other).set_base(base.encode());
            if let Some(cut) = self.cuts.get_mut(&other) {
                let old = std::mem::replace(&mut cut.base, base);
                self.release(old);
            }
        }
        self.replace_in_tables(id, table);
        Ok(())
    }

    /// Gives a settled cut's table to the clones that can return to the cut.
    fn settle_origins(&mut self, id: CutId, table: Entry) {
        let clones: Vec<VmId> = self
            .vms
            .iter()
            .filter(|(_, known)| known.origin == Some(Entry::Thunk(id)))
            .map(|(vm, _)| *vm)
            .collect();
        for vm in clones {
            let origin = self.share(table);
            if let Some(known) = self.vms.get_mut(&vm)
                && let Some(old) = known.origin.replace(origin)
            {
                self.release(old);
            }
        }
    }

    /// Puts the entries of a settled cut's table where other tables name the cut, so that the cut
    /// does not live as long as they do.
    fn replace_in_tables(&mut self, id: CutId, table: Entry) {
        self.count_released();
        if self.cuts.get(&id).is_none_or(|cut| cut.references == 0) {
            return;
        }
        let of_cuts = self.cuts.values().flat_map(|cut| [Some(cut.base), cut.table]).flatten();
        let roots: Vec<Entry> = self.held_entries().map(|(_, entry)| entry).chain(of_cuts).collect();
        self.tables.replace_thunk(&roots, id, table, &mut retain_in(&mut self.cuts));
        self.count_released();
    }

    fn settle_leaf(
        tables: &mut Tables,
        cuts: &mut BTreeMap<CutId, Cut>,
        area: &CutArea<'_>,
        id: CutId,
        table: &mut Entry,
        leaf: LeafNumber,
    ) -> Result<(), TablesError> {
        let mut retain = retain_in(cuts);
        match area.leaf(leaf) {
            // Pending only where the source has let go: nobody but the source can get here, and the
            // source has the pages.
            LeafWord::Base | LeafWord::Pending => Ok(()),
            LeafWord::Block => tables.set_shared(table, leaf, (Some(id), None), &mut retain),
            LeafWord::Patched => {
                let block = area.patches(leaf).block;
                let patches = (!is_planted(Plant::SettleForgetsPatches)).then_some(id);
                tables.set_shared(table, leaf, (block, patches), &mut retain)
            }
            LeafWord::Zero => tables.set_entry(table, leaf, Entry::Empty, &mut retain),
            LeafWord::Lost => tables.set_entry(table, leaf, Entry::Lost, &mut retain),
        }
    }

    /// Takes out of the tables what only a VM reaches that has those pages itself: a source whose
    /// clones are gone needs no frame of what it had published for them.
    fn trim_owned(&mut self) {
        let board = self.board.clone();
        // A clone that returns to its cut by itself looks there through its root: what its window has of
        // its own now it may give up then. Its origin keeps those frames anyway.
        let returns = |known: &Vm| known.origin.is_some() && known.is_at_origin;
        let roots = self.vms.iter().filter(|(_, known)| !returns(known));
        let roots: Vec<(VmId, Entry, u32)> = roots.map(|(vm, known)| (*vm, known.root, known.slot)).collect();
        for (vm, mut root, slot) in roots {
            let mut owned = Vec::new();
            self.tables.for_each_own(root, &mut |leaf, entry| {
                if let Entry::Leaf(record) = entry
                    && matches!(self.tables.leaf_record(record), LeafRecord::Shared { .. })
                    && (board.member(slot).map(leaf) == LeafMap::Own
                        || is_planted(Plant::TrimsWhatIsNotOwned))
                {
                    owned.push(leaf);
                }
            });
            for leaf in owned {
                // The path has one referrer, so that nothing is copied and nothing can fail.
                let set =
                    self.tables.set_entry(&mut root, leaf, Entry::Empty, &mut retain_in(&mut self.cuts));
                debug_assert!(set.is_ok() && self.vms.get(&vm).is_some_and(|known| known.root == root));
            }
        }
        self.count_released();
    }

    fn drop_unreferenced(&mut self) {
        loop {
            self.count_released();
            let unreferenced: Vec<CutId> = self
                .cuts
                .iter()
                .filter(|(_, cut)| {
                    let is_over = cut.committed && !cut.held && (cut.released || cut.table.is_some());
                    is_over && cut.references == 0
                })
                .map(|(id, _)| *id)
                .collect();
            if unreferenced.is_empty() {
                return;
            }
            for id in unreferenced {
                if let Some(cut) = self.cuts.remove(&id) {
                    self.release(cut.base);
                    if let Some(table) = cut.table {
                        self.release(table);
                    }
                    self.files.insert(id);
                }
            }
        }
    }

    /// Books what the tables gave up.
    fn count_released(&mut self) {
        let released = self.tables.take_released();
        self.parting.extend(released.frames);
        for id in released.cuts {
            let cut = self.cuts.get_mut(&id).expect("a cut lives as long as an entry names it");
            cut.references -= 1;
        }
    }

    /// A cut's files go when no record names their frames and no window maps them.
    fn close_files(&mut self, sweep: &mut Sweep) {
        // Pairs with `MemberArea::walk`: what was unlinked before this cannot be reached by a walk
        // that begins after it.
        let is_walked = |slot: &u32| self.board.member(*slot).walkers() != 0;
        if self.slots.values().any(is_walked) && !is_planted(Plant::ReclaimsUnderWalkers) {
            return;
        }
        self.tables.reclaim();
        if self.parting.is_empty() && self.files.is_empty() {
            return;
        }
        let mapped = match is_planted(Plant::MappedBlockFreed) {
            true => BTreeSet::new(),
            false => self.mapped_blocks(),
        };
        let ledger = self.tables.ledger();
        // A record may have come to name again what none named for a while.
        self.parting.retain(|frames| ledger.references(*frames) == 0);
        // The words of a cut that is not settled name its frames too.
        let cuts = &self.cuts;
        let is_open = |id: CutId| cuts.get(&id).is_some_and(|cut| cut.table.is_none());
        let unused = |frames: &Frames| !mapped.contains(frames) && !is_open(frames.cut());
        sweep.freed.extend(self.parting.extract_if(.., |frames| unused(frames)));
        let unused = |id: &CutId| {
            ledger.references_to_cut(*id) == 0 && !mapped.iter().any(|frames| frames.cut() == *id)
        };
        sweep.closed.extend(self.files.extract_if(.., |id| unused(id)));
        for id in &sweep.closed {
            self.places.remove(&self.board.shape().place_of(*id));
        }
    }

    /// The blocks that windows map, as their members say.
    fn mapped_blocks(&self) -> BTreeSet<Frames> {
        let leaves = self.board.shape().leaves;
        let mut mapped = BTreeSet::new();
        for slot in self.slots.values() {
            let area = self.board.member(*slot);
            for leaf in (0..leaves).map(LeafNumber) {
                if let LeafMap::Block(cut) = area.map(leaf) {
                    mapped.insert(Frames::Block(BlockId { cut, leaf }));
                }
            }
        }
        mapped
    }
}
