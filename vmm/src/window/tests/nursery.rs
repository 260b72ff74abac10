//! A nursery: a colony in one process, each VM with a real window, for tests.
//!
//! It plays the keeper (family, arena, sweeps) and the members (space, resolvers, a thread that
//! answers the doorbell). The guest is whatever thread calls [`Vm::set`] and [`Vm::get`]; threads
//! that play vCPUs hold [`Vm::gate`] for reading while they run, and a cut stops them by it. Threads
//! that play devices do not, and are not stopped.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;

use rustix::fs::FallocateFlags;

use crate::arena_files::{ArenaChoice, ArenaDir};
use crate::board::{Board, BoardShape, HeapWords};
use crate::family::{Family, Sweep, VmId};
use crate::frames::{BlockId, CutId, Frames};
use crate::ipc::futex;
use crate::space::{Backing, CutFigures, Keep, Space, SpaceError};
use crate::window::{CutFiles, OnEnd, OnFailure, Resolvers, Userfault, Window};
use crate::words::{Gfn, Gpa, LEAF_BYTES, LeafNumber, MemoryShape, PAGE_BYTES, wide};

/// Words of 64 bits in a page.
const PAGE_WORDS: usize = PAGE_BYTES / 8;

/// What a test is run over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axes {
    pub(super) arena: ArenaChoice,
    /// Whether windows ask for huge pages.
    pub(super) is_huge: bool,
}

impl Axes {
    pub(super) const HUGE: Self = Self { arena: ArenaChoice::Best, is_huge: true };
    pub(super) const SMALL: Self = Self { arena: ArenaChoice::Memfd, is_huge: false };
    pub(super) const ALL: [Self; 4] = [
        Self::HUGE,
        Self { arena: ArenaChoice::Best, is_huge: false },
        Self { arena: ArenaChoice::Memfd, is_huge: true },
        Self::SMALL,
    ];
}

/// One member: what a process has in a colony.
pub(super) struct Vm {
    pub(super) id: VmId,
    pub(super) slot: u32,
    pub(super) space: Arc<Space<Window>>,
    /// Held for reading by a thread that plays a vCPU, for writing by a cut.
    pub(super) gate: RwLock<()>,
    /// What could not be resolved.
    pub(super) failures: Arc<Mutex<Vec<SpaceError>>>,
    board: Board,
    last_cut: Mutex<Option<CutId>>,
    stop: Arc<AtomicBool>,
    resolvers: Mutex<Option<Resolvers>>,
    server: Mutex<Option<JoinHandle<()>>>,
}

impl Vm {
    fn start(id: VmId, slot: u32, space: Space<Window>, board: &Board) -> Self {
        let space = Arc::new(space);
        let failures = Arc::new(Mutex::new(Vec::new()));
        let list = Arc::clone(&failures);
        let on_failure: OnFailure = Arc::new(move |error| {
            list.lock().unwrap_or_else(PoisonError::into_inner).push(error);
        });
        let resolvers =
            Resolvers::start(&space, 3, &on_failure, &(Arc::new(|| ()) as OnEnd)).expect("resolver threads");
        let stop = Arc::new(AtomicBool::new(false));
        let server = std::thread::spawn({
            let (space, board, stop) = (Arc::clone(&space), board.clone(), Arc::clone(&stop));
            move || serve(&space, &board, slot, &stop)
        });
        Self {
            id,
            slot,
            space,
            gate: RwLock::new(()),
            failures,
            board: board.clone(),
            last_cut: Mutex::new(None),
            stop,
            resolvers: Mutex::new(Some(resolvers)),
            server: Mutex::new(Some(server)),
        }
    }

    pub(super) fn window(&self) -> &Window {
        self.space.host()
    }

    /// Writes a page all of whose words are `value`.
    pub(super) fn set(&self, gfn: Gfn, value: u64) {
        let page: Vec<u8> = std::iter::repeat_n(value.to_ne_bytes(), PAGE_WORDS).flatten().collect();
        self.window().write(gfn.gpa(), &page).expect("nothing is lost");
    }

    /// Reads a page all of whose words must be the same.
    pub(super) fn get(&self, gfn: Gfn) -> u64 {
        let page = self.page(gfn);
        let mut words = page.chunks_exact(8).map(word_of);
        let first = words.next().expect("a page has words");
        assert!(words.all(|word| word == first), "{}: {gfn} is torn", self.id);
        first
    }

    pub(super) fn page(&self, gfn: Gfn) -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        self.window().read(gfn.gpa(), &mut page).expect("nothing is lost");
        page
    }

    /// Reads a page for the sake of the access.
    pub(super) fn touch(&self, gfn: Gfn) {
        let _bytes = self.page(gfn);
    }

    /// Stores one word at the start of a page.
    pub(super) fn store(&self, gpa: Gpa, value: u64) {
        self.window().write(gpa, &value.to_ne_bytes()).expect("nothing is lost");
    }

    /// Loads one word.
    pub(super) fn load(&self, gpa: Gpa) -> u64 {
        let mut bytes = [0; 8];
        self.window().read(gpa, &mut bytes).expect("nothing is lost");
        u64::from_ne_bytes(bytes)
    }

    /// Publishes all that is pending.
    pub(super) fn publish_all(&self, keep: Keep) {
        while self.space.publish_next(keep).expect("publishing") {}
    }

    pub(super) fn backing(&self, gfn: Gfn) -> Backing {
        self.space.backing(gfn.leaf())
    }

    pub(super) fn frame_number(&self, gfn: Gfn) -> u64 {
        self.window().frame_number(gfn).expect("pagemap")
    }

    pub(super) fn take_failures(&self) -> Vec<SpaceError> {
        std::mem::take(&mut *self.failures.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Ends the threads of the member.
    pub(super) fn stop_threads(&self) {
        drop(self.resolvers.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.stop.store(true, Ordering::Release);
        self.board.member(self.slot).ring();
        futex::wake_all(self.board.member(self.slot).doorbell()).expect("wake");
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner).take();
        server.into_iter().for_each(|server| server.join().expect("the server thread"));
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.stop_threads();
    }
}

fn word_of(bytes: &[u8]) -> u64 {
    u64::from_ne_bytes(bytes.try_into().expect("8 bytes"))
}

/// Answers the doorbell.
fn serve(space: &Space<Window>, board: &Board, slot: u32, stop: &AtomicBool) {
    let doorbell = board.member(slot).doorbell();
    loop {
        let seen = doorbell.load(Ordering::Acquire);
        if stop.load(Ordering::Acquire) {
            return;
        }
        space.serve_requests(Keep::Own).expect("serving requests");
        futex::wait(doorbell, seen, None).expect("waiting for the doorbell");
    }
}

/// See the module.
pub(super) struct Nursery {
    pub(super) board: Board,
    pub(super) family: Family,
    pub(super) arena: Arc<ArenaDir>,
    pub(super) shape: MemoryShape,
    is_huge: bool,
    free_slots: Vec<u32>,
    vms: BTreeMap<VmId, Arc<Vm>>,
    /// Ended VMs whose windows others still need.
    images: BTreeMap<VmId, Arc<Vm>>,
    files: BTreeMap<CutId, (OwnedFd, OwnedFd)>,
}

const SHAPE: BoardShape = BoardShape { leaves: 0, cuts: 64, members: 64, nodes: 2048, records: 8192 };

impl Nursery {
    /// A nursery for VMs of `leaves` leaves, or none where the host does not permit it.
    pub(super) fn new(test: &str, axes: Axes, leaves: u32) -> Option<Self> {
        Self::with_budget(test, axes, leaves, 1 << 30)
    }

    pub(super) fn with_budget(test: &str, axes: Axes, leaves: u32, budget_bytes: u64) -> Option<Self> {
        if let Err(error) = Userfault::open() {
            println!("SKIPPED: {test}: {error}");
            return None;
        }
        let shape = MemoryShape::new(u64::from(leaves) * wide(LEAF_BYTES)).expect("a shape");
        let board_shape = BoardShape { leaves: shape.span_leaves(), ..SHAPE };
        let board = Board::new(board_shape, Arc::new(HeapWords::for_shape(&board_shape)));
        let arena = ArenaDir::create_as(axes.arena, budget_bytes).expect("an arena");
        Some(Self {
            family: Family::new(board.clone()),
            board,
            arena: Arc::new(arena),
            shape,
            is_huge: axes.is_huge,
            free_slots: (0..board_shape.members).rev().collect(),
            vms: BTreeMap::new(),
            images: BTreeMap::new(),
            files: BTreeMap::new(),
        })
    }

    fn take_slot(&mut self) -> u32 {
        let slot = self.free_slots.pop().expect("a free member slot");
        self.board.open_member(slot).expect("a member's words");
        slot
    }

    fn window(&self) -> Window {
        let files = Arc::clone(&self.arena);
        Window::new(self.shape, self.is_huge, files).expect("a window")
    }

    fn root_window(&self) -> Window {
        let window = self.window();
        window.become_root().expect("memory");
        window
    }

    /// A VM that shares nothing.
    pub(super) fn first_vm(&mut self) -> Arc<Vm> {
        let slot = self.take_slot();
        let id = self.family.first_vm(slot);
        let space = Space::new(self.root_window(), self.board.clone(), slot, self.shape);
        self.add(id, slot, space)
    }

    fn add(&mut self, id: VmId, slot: u32, space: Space<Window>) -> Arc<Vm> {
        let vm = Arc::new(Vm::start(id, slot, space, &self.board));
        self.vms.insert(id, Arc::clone(&vm));
        vm
    }

    /// Takes a cut of a running VM.
    pub(super) fn cut(&mut self, source: &Vm) -> (CutId, CutFigures) {
        self.cut_with(source, || {})
    }

    /// As [`Nursery::cut`]; `between` runs between the reservation and the pause.
    pub(super) fn cut_with(&mut self, source: &Vm, between: impl FnOnce()) -> (CutId, CutFigures) {
        let cut = self.family.reserve_cut(source.id).expect("room for a cut");
        let len_bytes = self.shape.span_bytes();
        let blocks = self.arena.create_file(&cut.block_file(), len_bytes).expect("a block file");
        let patches = self.arena.create_small_file(&cut.patch_file(), len_bytes).expect("a patch file");
        let dup = |file: &OwnedFd| file.try_clone().expect("a descriptor");
        let files = CutFiles { blocks: dup(&blocks), patches: dup(&patches) };
        self.files.insert(cut, (blocks, patches));
        source.window().attach_cut(cut, files);
        let reserved = source.space.reserve_cut(cut).expect("reserving a cut");
        between();
        let mut last = source.last_cut.lock().unwrap_or_else(PoisonError::into_inner);
        let stopped = source.gate.write().unwrap_or_else(PoisonError::into_inner);
        let figures = reserved.perform(*last).expect("performing a cut");
        drop(stopped);
        *last = Some(cut);
        self.family.commit_cut(cut);
        (cut, figures)
    }

    /// Reserves a cut and does not perform it.
    pub(super) fn give_up_a_cut(&mut self, source: &Vm) {
        let cut = self.family.reserve_cut(source.id).expect("room for a cut");
        drop(source.space.reserve_cut(cut).expect("reserving a cut"));
        self.family.abort_cut(cut);
        let len_bytes = self.shape.span_bytes();
        for name in [cut.block_file(), cut.patch_file()] {
            // The sweep that closes the cut removes them.
            drop(self.arena.create_file(&name, len_bytes).expect("a file"));
        }
    }

    /// One more clone of a cut.
    pub(super) fn clone_of(&mut self, cut: CutId) -> Arc<Vm> {
        self.make_clone(cut, false)
    }

    /// One more clone of a cut, which can be reset.
    pub(super) fn resettable_clone_of(&mut self, cut: CutId) -> Arc<Vm> {
        self.make_clone(cut, true)
    }

    fn make_clone(&mut self, cut: CutId, is_resettable: bool) -> Arc<Vm> {
        let slot = self.take_slot();
        let id = self.family.clone_vm(cut, slot, is_resettable).expect("the cut is there");
        let window = self.window();
        window.become_clone(cut).expect("a clone's window");
        let space = Space::new_clone(window, self.board.clone(), slot, self.shape, cut);
        self.add(id, slot, space)
    }

    pub(super) fn fork(&mut self, source: &Vm) -> Arc<Vm> {
        let (cut, _) = self.cut(source);
        self.clone_of(cut)
    }

    /// A clone returns to its cut.
    pub(super) fn reset(&mut self, vm: &Vm) {
        if !self.family.is_at_origin(vm.id).expect("a clone") {
            self.family.reset_vm(vm.id).expect("room for tables");
        }
        vm.space.reset().expect("the host does not refuse");
        *vm.last_cut.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Ends a VM. Its window stays as long as others need it.
    pub(super) fn exit(&mut self, vm: Arc<Vm>) {
        self.family.end_vm(vm.id);
        let vm = self.vms.remove(&vm.id).expect("a living VM");
        self.images.insert(vm.id, vm);
        self.settle();
    }

    /// Ends a VM's process: what it had not published is lost.
    pub(super) fn kill(&mut self, vm: Arc<Vm>) {
        self.vms.remove(&vm.id);
        vm.stop_threads();
        for (cut, leaf) in self.family.source_gone(vm.id) {
            futex::wake_all(self.board.cut(cut).raw(leaf)).expect("wake");
        }
    }

    fn find(&self, id: VmId) -> Option<&Arc<Vm>> {
        self.vms.get(&id).or_else(|| self.images.get(&id))
    }

    /// Does what the keeper does from time to time, until nothing is left to do.
    pub(super) fn settle(&mut self) {
        loop {
            for vm in self.vms.values().chain(self.images.values()) {
                for cut in vm.space.finished_cuts() {
                    vm.window().detach_cut(cut);
                }
            }
            let sources: BTreeMap<CutId, VmId> = self.family.cuts().collect();
            let sweep = self.family.sweep().expect("room for tables");
            let is_done = sweep == Sweep::default();
            self.follow(sweep, &sources);
            let gone: Vec<VmId> =
                self.images.keys().copied().filter(|id| !self.family.is_image_needed(*id)).collect();
            for id in &gone {
                // A test may hold the VM still: its threads end here, its slot is another's.
                let image = self.images.remove(id).expect("it is there");
                image.stop_threads();
                self.free_slots.push(image.slot);
                let lost = self.family.source_gone(*id);
                let is_missed = |(cut, _): &(CutId, LeafNumber)| !self.board.cut(*cut).is_unneeded();
                assert!(!lost.iter().any(is_missed), "an image is gone that others need: {lost:?}");
            }
            if is_done && gone.is_empty() {
                return;
            }
        }
    }

    fn follow(&mut self, sweep: Sweep, sources: &BTreeMap<CutId, VmId>) {
        for cut in sweep.unneeded {
            if let Some(vm) = sources.get(&cut).and_then(|id| self.find(*id)) {
                vm.space.release_cut(cut);
                vm.window().detach_cut(cut);
            }
            self.family.cut_released(cut);
        }
        for frames in sweep.freed {
            self.punch(frames);
        }
        for cut in sweep.closed {
            self.files.remove(&cut);
            self.arena.remove(&cut.block_file()).expect("removing a block file");
            self.arena.remove(&cut.patch_file()).expect("removing a patch file");
            self.board.close_cut(cut).expect("closing a cut's words");
        }
    }

    fn punch(&self, frames: Frames) {
        let Some((blocks, patches)) = self.files.get(&frames.cut()) else { return };
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let (file, start, len_bytes) = match frames {
            Frames::Block(BlockId { leaf, .. }) => (blocks, leaf.gpa().0, wide(LEAF_BYTES)),
            Frames::Patches(BlockId { cut, leaf }) => {
                let record = self.board.cut(cut).patches(leaf);
                let start = u64::from(record.first_frame) * wide(PAGE_BYTES);
                (patches, start, wide(record.pages.len() * PAGE_BYTES))
            }
        };
        if len_bytes > 0 {
            rustix::fs::fallocate(file, flags, start, len_bytes).expect("punching");
        }
    }

    /// Publishes everything, of ended VMs too.
    pub(super) fn publish_everything(&mut self, keep: Keep) {
        for vm in self.vms.values().chain(self.images.values()) {
            vm.publish_all(keep);
        }
        self.settle();
    }

    /// The whole-state checker. The guests must be at rest.
    pub(super) fn check(&mut self) {
        self.settle();
        let mut owners: BTreeMap<u64, (VmId, Gfn)> = BTreeMap::new();
        let mut shared: BTreeMap<(CutId, Gfn), BTreeSet<u64>> = BTreeMap::new();
        for vm in self.vms.values().chain(self.images.values()) {
            let failures = vm.take_failures();
            assert!(failures.is_empty(), "{}: {failures:?}", vm.id);
            let report = vm.space.harvest().expect("a harvest");
            for leaf in &report.leaves {
                let own = leaf.exclusive.union(&leaf.lent);
                assert!(leaf.pinned.minus(&leaf.exclusive).is_empty(), "{} {leaf:?}: pinned", vm.id);
                for gfn in own.iter().map(|position| leaf.leaf.gfn(position)) {
                    let frame = vm.frame_number(gfn);
                    if frame != 0
                        && let Some(other) = owners.insert(frame, (vm.id, gfn))
                    {
                        panic!("{} {gfn} and {other:?} are one frame", vm.id);
                    }
                }
                if let Backing::Block(cut) = leaf.backing {
                    let rest = crate::words::PageSet::ALL.minus(&own);
                    for gfn in rest.iter().map(|position| leaf.leaf.gfn(position)) {
                        let frame = vm.frame_number(gfn);
                        if frame != 0 {
                            shared.entry((cut, gfn)).or_default().insert(frame);
                        }
                    }
                }
            }
            if self.vms.contains_key(&vm.id) {
                self.family.harvest(vm.id, &report.owned()).expect("room for tables");
            }
        }
        for (place, frames) in &shared {
            assert!(frames.len() == 1, "{place:?} is shared by different frames {frames:?}");
            let frame = frames.first().expect("one");
            assert!(!owners.contains_key(frame), "{place:?} is shared and exclusive");
        }
        // What the harvest gave up is booked by a sweep.
        self.settle();
        self.family.check().expect("the family's counts");
    }

    pub(super) fn living(&self) -> impl Iterator<Item = &Arc<Vm>> {
        self.vms.values()
    }

    pub(super) fn leaves(&self) -> impl Iterator<Item = LeafNumber> {
        self.shape.leaves()
    }
}
