//! A colony in one thread: a family, a space for each VM on a simulated host, and beside each VM
//! the naive model: its memory, copied as a whole at each fork.
//!
//! Every byte that a guest or a device sees is compared with the model. A page may be lost only
//! where a source was killed, or a write refused, before it was published, and only to those who
//! read through that cut: [`Colony`] keeps the list.

mod keeping;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::host::{SimHost, Trap};
use super::world::{CutFile, HostPlant, World};
use crate::board::{Board, BoardShape, HeapWords};
use crate::family::{Family, FamilyError, VmId};
use crate::frames::CutId;
use crate::space::{Access, Backing, Keep, ResetFigures, Space, SpaceError};
use crate::words::{Gfn, LEAF_PAGES, LeafNumber, MemoryShape, index, wide};

/// Leaves of each VM.
pub(super) const LEAVES: u32 = 3;
/// VMs at one time.
pub(super) const VMS: usize = 6;
const SLOTS: u32 = 16;

type Lost = BTreeSet<(CutId, LeafNumber)>;

pub(super) struct Vm {
    pub(super) id: VmId,
    slot: u32,
    pub(super) space: Arc<Space<SimHost>>,
    /// The model.
    memory: Vec<u64>,
    /// Through which cuts a leaf may be lost to this VM.
    lost_by: Vec<BTreeSet<CutId>>,
    last_cut: Option<CutId>,
    /// The cut that the VM is a clone of.
    origin: Option<Origin>,
    pub(super) pins: BTreeMap<Gfn, u32>,
}

/// What a clone returns to.
#[derive(Clone)]
struct Origin {
    memory: Vec<u64>,
    lost_by: Vec<BTreeSet<CutId>>,
}

/// What the model says of a cut.
struct Snapshot {
    source: VmId,
    memory: Vec<u64>,
    lost_by: Vec<BTreeSet<CutId>>,
}

pub(super) struct Colony {
    pub(super) world: Arc<World>,
    board: Board,
    pub(super) family: Family,
    pub(super) vms: Vec<Vm>,
    /// VMs that have ended and whose windows others may need.
    images: Vec<Vm>,
    cuts: BTreeMap<CutId, Snapshot>,
    /// Losses that had a cause.
    lost: Lost,
    seen_lost: Lost,
    /// Failures whose losses have been looked at.
    seen_fired: usize,
    shape: MemoryShape,
    /// A VM with a reserved cut: it must not end.
    reserved: Option<VmId>,
    next_value: u64,
    /// Pinned pages that cuts copied.
    copied_pages: u64,
    resets: ResetFigures,
}

impl Colony {
    /// A colony of one VM.
    pub(super) fn new(plant: HostPlant) -> Self {
        let board_shape = BoardShape { leaves: LEAVES, cuts: 64, members: SLOTS, nodes: 512, records: 512 };
        let board = Board::new(board_shape, Arc::new(HeapWords::for_shape(&board_shape)));
        let shape = MemoryShape::new(u64::from(LEAVES) << 21).expect("a few leaves");
        let world = World::new(plant);
        let mut family = Family::new(board.clone());
        let host = SimHost::new(world.clone(), shape);
        let space = Arc::new(Space::new(host, board.clone(), 0, shape));
        world.add_space(&space);
        let first = Vm {
            id: family.first_vm(0),
            slot: 0,
            space,
            memory: vec![0; LEAVES as usize * LEAF_PAGES],
            lost_by: vec![BTreeSet::new(); LEAVES as usize],
            last_cut: None,
            origin: None,
            pins: BTreeMap::new(),
        };
        Self {
            world,
            board,
            family,
            vms: vec![first],
            images: Vec::new(),
            cuts: BTreeMap::new(),
            lost: Lost::new(),
            seen_lost: Lost::new(),
            seen_fired: 0,
            shape,
            reserved: None,
            next_value: 1,
            copied_pages: 0,
            resets: ResetFigures::default(),
        }
    }

    fn fresh_value(&mut self) -> u64 {
        self.next_value += 1;
        self.next_value
    }

    /// Tries again when the host was made to refuse, as a guest that faults again does.
    fn retry<T>(&self, mut work: impl FnMut() -> Result<T, SpaceError>) -> Result<T, SpaceError> {
        loop {
            let before = self.world.fired().len();
            match work() {
                Err(SpaceError::Host(error)) => {
                    assert!(
                        self.world.fired().len() > before,
                        "the host refused what it should not: {error}"
                    );
                }
                other => return other,
            }
        }
    }

    fn assert_may_be_lost(&mut self, at: usize, leaf: LeafNumber) {
        self.note_losses();
        let vm = &self.vms[at];
        let excused = vm.lost_by[leaf.index()].iter().any(|cut| self.lost.contains(&(*cut, leaf)));
        assert!(excused, "{} has lost {leaf} without a cause", vm.id);
    }

    /// Runs a guest's access to its end: the value, or none if the page is lost.
    fn access<T>(&mut self, at: usize, gfn: Gfn, access: impl Fn(&SimHost) -> Result<T, Trap>) -> Option<T> {
        let space = self.vms[at].space.clone();
        for _ in 0..8 {
            match access(space.host()) {
                Ok(value) => return Some(value),
                Err(Trap::Poison) => {
                    self.assert_may_be_lost(at, gfn.leaf());
                    return None;
                }
                Err(Trap::Fault(fault)) => match self.retry(|| space.handle_fault(gfn, fault)) {
                    Ok(()) | Err(SpaceError::Lost { .. }) => self.note_losses(),
                    Err(error) => panic!("a fault at {gfn} cannot be resolved: {error}"),
                },
            }
        }
        panic!("{}: {gfn} faults for ever", self.vms[at].id);
    }

    /// A guest's load, compared with the model.
    pub(super) fn load(&mut self, at: usize, gfn: Gfn) {
        if let Some(value) = self.access(at, gfn, |host| host.load(gfn)) {
            assert_eq!(value, self.vms[at].memory[index(gfn.0)], "{} loads from {gfn}", self.vms[at].id);
        }
    }

    /// A guest's store.
    pub(super) fn store(&mut self, at: usize, gfn: Gfn) {
        let value = self.fresh_value();
        if self.access(at, gfn, |host| host.store(gfn, value)).is_some() {
            self.vms[at].memory[index(gfn.0)] = value;
        }
    }

    pub(super) fn pin(&mut self, at: usize, first: Gfn, pages: u64, access: Access) {
        let space = self.vms[at].space.clone();
        let end = wide(self.vms[at].memory.len());
        match self.retry(|| space.pin(first, pages, access)) {
            Ok(()) => {
                assert!(first.0 + pages <= end, "a pin past the end of memory");
                for gfn in (first.0..first.0 + pages).map(Gfn) {
                    space.host().hold(gfn);
                    *self.vms[at].pins.entry(gfn).or_default() += 1;
                    self.check_device(at, gfn);
                }
            }
            Err(SpaceError::NotMemory { gfn }) => assert_eq!(gfn, Gfn(end)),
            Err(SpaceError::Lost { gfn }) => self.assert_may_be_lost(at, gfn.leaf()),
            Err(error) => panic!("a pin fails: {error}"),
        }
        self.check_pins(at);
        self.note_losses();
    }

    /// Takes a pin off a page; an error if there is none, and nothing changes.
    pub(super) fn unpin(&mut self, at: usize, gfn: Gfn) {
        let vm = &mut self.vms[at];
        match vm.pins.get_mut(&gfn) {
            Some(pins) => {
                *pins -= 1;
                if *pins == 0 {
                    vm.pins.remove(&gfn);
                }
                vm.space.host().let_go(gfn);
                vm.space.unpin(gfn, 1).expect("the model has a pin there");
            }
            None => assert!(matches!(vm.space.unpin(gfn, 1), Err(SpaceError::NotPinned { .. }))),
        }
        self.check_pins(at);
    }

    fn check_pins(&self, at: usize) {
        let vm = &self.vms[at];
        assert!(vm.space.pin_table().is_consistent(), "{}: pin counts do not add up", vm.id);
        let pins = vm.pins.values().copied().map(u64::from).sum();
        assert_eq!(vm.space.pinned(), (vm.pins.len(), pins), "{}: pins", vm.id);
    }

    /// A device stores to a page that it holds.
    pub(super) fn device_store(&mut self, at: usize, gfn: Gfn) {
        let value = self.fresh_value();
        let vm = &mut self.vms[at];
        vm.space.host().device_store(gfn, value);
        vm.memory[index(gfn.0)] = value;
    }

    /// What a device reads is what the guest has.
    fn check_device(&self, at: usize, gfn: Gfn) {
        let vm = &self.vms[at];
        assert_eq!(vm.space.host().device_load(gfn), vm.memory[index(gfn.0)], "a device reads {gfn}");
    }

    /// Discards pages of one leaf.
    pub(super) fn discard(&mut self, at: usize, first: Gfn, pages: u64) {
        let vm = &self.vms[at];
        let range = first.0..first.0 + pages;
        let is_pinned = vm.pins.keys().any(|gfn| range.contains(&gfn.0));
        match self.retry(|| vm.space.discard(first, pages)) {
            Ok(()) => {
                assert!(!is_pinned, "pinned pages were discarded");
                let vm = &mut self.vms[at];
                vm.memory[index(range.start)..index(range.end)].fill(0);
                if pages == wide(LEAF_PAGES) {
                    vm.lost_by[first.leaf().index()].clear();
                }
            }
            Err(SpaceError::Pinned { .. }) => assert!(is_pinned, "a discard is refused without a pin"),
            Err(SpaceError::Lost { .. }) => self.assert_may_be_lost(at, first.leaf()),
            Err(error) => panic!("a discard fails: {error}"),
        }
        self.note_losses();
    }

    /// Publishes one leaf of a VM, or of an image.
    pub(super) fn publish(&mut self, pick: usize, keep: Keep) {
        self.world.set_keep(keep);
        let count = self.vms.len() + self.images.len();
        let vm = self.vms.iter().chain(&self.images).nth(pick % count).expect("a number below the count");
        self.retry(|| vm.space.publish_next(keep)).expect("only the host refuses");
        self.note_losses();
    }

    /// Maps all leaves of a VM that it can find out without asking anybody.
    pub(super) fn resolve_known(&mut self, at: usize) {
        let space = self.vms[at].space.clone();
        self.retry(|| space.resolve_known()).expect("only the host refuses");
    }

    /// Forks a VM; `between` happens between reservation and cut. A fork without clones ends there:
    /// it is given up. None: so it was, or it failed, or there is no room.
    pub(super) fn fork(
        &mut self,
        at: usize,
        clones: Option<usize>,
        between: impl FnOnce(&mut Self),
    ) -> Option<CutId> {
        let id = self.vms[at].id;
        let fired = self.world.fired().len();
        let cut = match self.family.reserve_cut(id) {
            Ok(cut) => cut,
            Err(FamilyError::Cuts(_)) => return None,
            Err(error) => panic!("a cut cannot be reserved: {error}"),
        };
        self.world.files().insert(cut, CutFile::default());
        let space = self.vms[at].space.clone();
        let reserved = match space.reserve_cut(cut) {
            Ok(reserved) => reserved,
            Err(error) => return self.give_up(cut, fired, &error),
        };
        let outer = self.reserved.replace(id);
        between(self);
        self.reserved = outer;
        let Some(clones) = clones else {
            drop(reserved);
            self.family.abort_cut(cut);
            return None;
        };
        let at = self.vms.iter().position(|vm| vm.id == id).expect("a vm with a reserved cut does not end");
        let figures = match reserved.perform(self.vms[at].last_cut) {
            Ok(figures) => figures,
            Err(error) => return self.give_up(cut, fired, &error),
        };
        self.family.commit_cut(cut);
        assert_eq!(
            figures.copied_pages,
            wide(self.vms[at].pins.len()),
            "exactly the pinned pages are copied"
        );
        self.copied_pages += figures.copied_pages;
        self.take_snapshot(at, cut);
        for _ in 0..clones {
            self.clone_of(cut);
        }
        self.note_losses();
        Some(cut)
    }

    fn give_up(&mut self, cut: CutId, fired_before: usize, error: &SpaceError) -> Option<CutId> {
        assert!(self.world.fired().len() > fired_before, "a fork fails: {error}");
        self.family.abort_cut(cut);
        self.note_losses();
        None
    }

    fn take_snapshot(&mut self, at: usize, cut: CutId) {
        let vm = &mut self.vms[at];
        vm.last_cut = Some(cut);
        let lost_by = (0..LEAVES).map(LeafNumber).map(|leaf| match vm.space.backing(leaf) {
            // The cut says nothing of such a leaf: what is below it does.
            Backing::Trapped | Backing::Lost => vm.lost_by[leaf.index()].clone(),
            Backing::Anonymous | Backing::Block(_) => BTreeSet::from([cut]),
        });
        let snapshot = Snapshot { source: vm.id, memory: vm.memory.clone(), lost_by: lost_by.collect() };
        self.cuts.insert(cut, snapshot);
    }

    /// One clone more of a cut that is still needed.
    pub(super) fn clone_of(&mut self, cut: CutId) {
        let taken: BTreeSet<u32> = self.vms.iter().chain(&self.images).map(|vm| vm.slot).collect();
        let Some(slot) = (0..SLOTS).find(|slot| !taken.contains(slot)).filter(|_| self.vms.len() < VMS)
        else {
            return;
        };
        self.board.open_member(slot).expect("the heap has room");
        let is_resettable = !slot.is_multiple_of(3);
        let id = match self.family.clone_vm(cut, slot, is_resettable) {
            Ok(id) => id,
            Err(FamilyError::NoCut(_)) => return,
            Err(error) => panic!("a clone cannot be made: {error}"),
        };
        let snapshot = &self.cuts[&cut];
        let host = SimHost::new_clone(self.world.clone(), self.shape, cut);
        let space = Arc::new(Space::new_clone(host, self.board.clone(), slot, self.shape, cut));
        self.world.add_space(&space);
        self.vms.push(Vm {
            id,
            slot,
            space,
            memory: snapshot.memory.clone(),
            lost_by: snapshot.lost_by.clone(),
            last_cut: None,
            origin: is_resettable
                .then(|| Origin { memory: snapshot.memory.clone(), lost_by: snapshot.lost_by.clone() }),
            pins: BTreeMap::new(),
        });
    }

    /// A VM returns to its cut, if it is a clone and nothing of it is pinned.
    pub(super) fn reset(&mut self, at: usize) {
        let id = self.vms[at].id;
        if self.reserved == Some(id) {
            // Resets and cuts of one VM exclude each other.
            return;
        }
        let is_pinned = !self.vms[at].pins.is_empty();
        let Some(origin) = self.vms[at].origin.clone() else {
            assert!(matches!(self.family.reset_vm(id), Err(FamilyError::NoOrigin(_))), "{id} is no clone");
            return;
        };
        let is_at_origin = self.family.is_at_origin(id).expect("it is a clone");
        if !is_at_origin && !is_pinned {
            self.family.reset_vm(id).expect("room for tables");
        }
        let space = self.vms[at].space.clone();
        match self.retry(|| space.reset()) {
            Ok(figures) => {
                assert!(!is_pinned, "a vm was reset under a device");
                self.resets.restored_pages += figures.restored_pages;
                self.resets.dropped_leaves += figures.dropped_leaves;
                let vm = &mut self.vms[at];
                (vm.memory, vm.lost_by) = (origin.memory, origin.lost_by);
                vm.last_cut = None;
            }
            Err(SpaceError::Pinned { .. }) => assert!(is_pinned, "a reset is refused without a pin"),
            Err(error) => panic!("a reset fails: {error}"),
        }
        self.note_losses();
    }

    /// Cuts that were made, needed or not.
    pub(super) fn known_cuts(&self) -> Vec<CutId> {
        self.cuts.keys().copied().collect()
    }
}
