//! What the keeper of a simulated colony does: ends VMs, harvests, sweeps; and what is compared.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use super::{Colony, LEAVES, Vm};
use crate::board::LeafWord;
use crate::family::VmId;
use crate::frames::{CutId, Frames};
use crate::space::tests::world::{Call, HostPlant};
use crate::space::{Backing, PageCounts};
use crate::words::{Gfn, LEAF_PAGES, LeafNumber, PageSet, index, wide};

impl Colony {
    /// A VM ends; its window stays as long as others need it.
    pub(in crate::space::tests) fn exit(&mut self, at: usize) {
        if self.reserved != Some(self.vms[at].id) {
            let vm = self.vms.remove(at);
            self.family.end_vm(vm.id);
            self.images.push(vm);
        }
    }

    /// The process of a VM, or of an image, is killed.
    pub(in crate::space::tests) fn kill(&mut self, pick: usize) {
        let at = pick % (self.vms.len() + self.images.len());
        let from_images = at.checked_sub(self.vms.len());
        let victim = from_images.map_or_else(|| self.vms[at].id, |image| self.images[image].id);
        if self.reserved == Some(victim) {
            return;
        }
        match from_images {
            Some(image) => self.images.remove(image),
            None => self.vms.remove(at),
        };
        let lost = self.family.source_gone(victim);
        self.seen_lost.extend(&lost);
        self.lost.extend(lost);
    }

    /// Finds the leaves that have been lost since the last look: each must have a cause.
    pub(super) fn note_losses(&mut self) {
        let fired = self.world.fired();
        let is_cause = |call: &Call| matches!(call, Call::PublishBlock | Call::PublishPatches | Call::Scan);
        let has_cause = fired[self.seen_fired..].iter().any(is_cause);
        self.seen_fired = fired.len();
        for (cut, _) in self.family.cuts() {
            let area = self.board.cut(cut);
            for leaf in area.protected().filter(|leaf| area.leaf(*leaf) == LeafWord::Lost) {
                if self.seen_lost.insert((cut, leaf)) {
                    assert!(has_cause, "{cut} {leaf} is lost without a cause");
                    self.lost.insert((cut, leaf));
                }
            }
        }
    }

    /// Reads what a VM owns from its host, compares it with the truth, and writes it into the tables.
    pub(in crate::space::tests) fn harvest(&mut self, at: usize) {
        let vm = &self.vms[at];
        let report = self.retry(|| vm.space.harvest()).expect("only the host refuses");
        let counts = report.counts;
        assert_eq!(counts, Self::recount(vm), "{}: counts", vm.id);
        assert_eq!(report.pins, vm.pins.values().copied().map(u64::from).sum::<u64>(), "{}: pins", vm.id);
        for one in &report.leaves {
            let (own, _) = vm.space.host().own_pages(one.leaf);
            assert_eq!(one.exclusive.union(&one.lent), own, "{} {}: own pages", vm.id, one.leaf);
            let mut pinned = PageSet::EMPTY;
            vm.pins.keys().filter(|gfn| gfn.leaf() == one.leaf).for_each(|gfn| pinned.insert(gfn.in_leaf()));
            assert_eq!(one.pinned, pinned, "{} {}: pinned pages", vm.id, one.leaf);
            assert_eq!(one.lent, Self::lent_pages(vm, one.leaf), "{} {}: lent pages", vm.id, one.leaf);
        }
        self.family.harvest(vm.id, &report.owned()).expect("room for tables");
    }

    /// The pages of a leaf that wait to be published, as the host has them.
    fn lent_pages(vm: &Vm, leaf: LeafNumber) -> PageSet {
        let mut lent = PageSet::EMPTY;
        if !vm.space.pending_cuts(leaf).is_empty() {
            lent = vm.space.host().own_pages(leaf).1;
        }
        vm.pins.keys().filter(|gfn| gfn.leaf() == leaf).for_each(|gfn| lent.remove(gfn.in_leaf()));
        lent
    }

    /// What a harvest must say of a VM, from what its host has.
    fn recount(vm: &Vm) -> PageCounts {
        let mut counts = PageCounts { pinned: wide(vm.pins.len()), ..PageCounts::default() };
        for leaf in (0..LEAVES).map(LeafNumber) {
            let own = wide(vm.space.host().own_pages(leaf).0.len());
            let lent = wide(Self::lent_pages(vm, leaf).len());
            counts.lent += lent;
            counts.exclusive += own - lent;
            match vm.space.backing(leaf) {
                Backing::Anonymous => counts.zero += wide(LEAF_PAGES) - own,
                Backing::Block(_) | Backing::Trapped => counts.shared += wide(LEAF_PAGES) - own,
                Backing::Lost => counts.poisoned += wide(LEAF_PAGES),
            }
        }
        counts
    }

    /// Lets go of all that nobody needs any more.
    pub(in crate::space::tests) fn sweep(&mut self) {
        for _ in 0..64 {
            for vm in self.vms.iter().chain(&self.images) {
                vm.space.finished_cuts();
            }
            let sweep = self.family.sweep().expect("room for tables");
            for cut in &sweep.unneeded {
                let source = self.cuts[cut].source;
                if let Some(vm) = self.vms.iter().chain(&self.images).find(|vm| vm.id == source) {
                    vm.space.release_cut(*cut);
                }
                self.family.cut_released(*cut);
            }
            self.punch(&sweep.freed);
            for cut in &sweep.closed {
                self.close(*cut);
            }
            let ended = self.images.extract_if(.., |vm| !self.family.is_image_needed(vm.id));
            let ended: Vec<VmId> = ended.map(|vm| vm.id).collect();
            for vm in &ended {
                // What was pending then is of unneeded cuts: nobody can have lost it.
                self.seen_lost.extend(self.family.source_gone(*vm));
            }
            let is_done = sweep.unneeded.is_empty() && sweep.freed.is_empty() && sweep.closed.is_empty();
            if is_done && ended.is_empty() {
                return self.family.check().expect("the family adds up");
            }
        }
        panic!("a sweep finds no end");
    }

    fn punch(&self, freed: &[Frames]) {
        for frames in freed {
            match frames {
                Frames::Block(block) => {
                    for vm in self.vms.iter().chain(&self.images) {
                        let is_shown = vm.space.host().shown_file(block.leaf) == Some(block.cut);
                        assert!(!is_shown, "{block:?} is freed and {} maps it", vm.id);
                    }
                    self.world.punch_block(block.cut, block.leaf);
                }
                Frames::Patches(patches) => {
                    let record = self.board.cut(patches.cut).patches(patches.leaf);
                    self.world.punch_patches(patches.cut, &record);
                }
            }
        }
        if self.world.plant == HostPlant::SweepFreesTooMuch {
            let block =
                self.world.files().iter().find_map(|(cut, file)| Some((*cut, *file.blocks.keys().next()?)));
            if let Some((cut, leaf)) = block {
                self.world.punch_block(cut, leaf);
            }
        }
    }

    fn close(&mut self, cut: CutId) {
        for vm in self.vms.iter().chain(&self.images) {
            for leaf in (0..LEAVES).map(LeafNumber) {
                let is_shown = vm.space.host().shown_file(leaf) == Some(cut);
                assert!(!is_shown, "{cut} is closed and {} maps {leaf} of it", vm.id);
            }
        }
        // Frames that no table ever named go with the file.
        assert!(self.world.files().remove(&cut).is_some(), "{cut} is closed twice");
        self.board.close_cut(cut).expect("the heap does not refuse");
        self.cuts.remove(&cut);
    }

    /// Compares what every VM shows without a trap with the model. Changes nothing.
    pub(in crate::space::tests) fn check_shown(&self) {
        for vm in &self.vms {
            for leaf in (0..LEAVES).map(LeafNumber) {
                let model = &vm.memory[leaf.index() * LEAF_PAGES..][..LEAF_PAGES];
                if let Some(pages) = vm.space.host().peek(leaf) {
                    let wrong = (0..LEAF_PAGES).find(|position| pages[*position] != model[*position]);
                    assert_eq!(wrong, None, "{} shows a wrong page of {leaf}", vm.id);
                }
            }
            for gfn in vm.pins.keys() {
                assert_eq!(
                    vm.space.host().device_load(*gfn),
                    vm.memory[index(gfn.0)],
                    "a device reads {gfn}"
                );
            }
        }
    }

    /// Adds up what the spaces that are still there have done.
    pub(in crate::space::tests) fn count_done(&self, done: &mut BTreeMap<&'static str, u64>) {
        let mut add = |what: &'static str, count: u64| *done.entry(what).or_default() += count;
        for vm in self.vms.iter().chain(&self.images) {
            let counters = vm.space.counters();
            add("resolved", counters.leaves_resolved.load(Ordering::Relaxed));
            add("stores", counters.store_faults.load(Ordering::Relaxed));
            add("blocks", counters.blocks_published.load(Ordering::Relaxed));
            add("patches", counters.patches_published.load(Ordering::Relaxed));
            add("reused", counters.leaves_reused.load(Ordering::Relaxed));
            add("dropped", counters.leaves_dropped.load(Ordering::Relaxed));
        }
        add("pinned copies", self.copied_pages);
        add("restored", self.resets.restored_pages);
        add("returned", self.resets.dropped_leaves);
    }

    /// Loads every page of a VM through the traps.
    pub(in crate::space::tests) fn check_all(&mut self, at: usize) {
        for gfn in (0..wide(self.vms[at].memory.len())).map(Gfn) {
            self.load(at, gfn);
        }
    }

    /// Ends all VMs; nothing may be left.
    pub(in crate::space::tests) fn tear_down(&mut self) {
        self.world.disarm();
        while !self.vms.is_empty() {
            self.exit(0);
            self.sweep();
            self.check_shown();
        }
        assert_eq!(self.family.table_counts(), crate::tables::TableCounts::default(), "tables are left");
        assert_eq!(self.family.open_cuts(), 0, "cuts are left");
        assert!(self.images.is_empty(), "images are left");
        assert!(self.world.files().is_empty(), "files are left");
    }
}
