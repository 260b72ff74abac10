//! Threads on the spaces of a few VMs, in many orders of their steps: what one thread cannot find.
//!
//! shuttle runs each scenario some hundred times, in other orders each time, on the real [`Space`],
//! [`Board`] and [`Family`] over the simulated host; every operation on a word or a lock, and every call
//! of the host, is a point at which another thread may go on ([`crate::sync`]). Each scenario holds, and
//! with each fault planted that is said beside it, it does not.
//!
//! A *witness* of a cut: a store that begins when the cut has been performed must not be in its clone.
//! A run is the same each time; `SALP_RACE_SEED=N` chooses other orders, `SALP_RACE_ORDERS=N` how many.

use std::cell::Cell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::thread::{JoinHandle, spawn};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};

use super::host::{SimHost, Trap};
use super::world::{CutFile, Waits, World};
use crate::board::{Board, BoardShape, HeapWords};
use crate::family::{Family, Sweep, VmId};
use crate::frames::{CutId, Frames};
use crate::plants::{self, Plant};
use crate::space::{Access, Host as _, Keep, Space};
use crate::sync::AtomicU32;
use crate::tables::Found;
use crate::words::{Gfn, LEAF_PAGES, LeafNumber, MemoryShape, PageSet, wide};

const LEAVES: u32 = 2;
const FIRST: LeafNumber = LeafNumber(0);
const SECOND: LeafNumber = LeafNumber(1);
const A: Gfn = FIRST.gfn(0);
const B: Gfn = FIRST.gfn(70);
/// A page of the other leaf.
const C: Gfn = SECOND.gfn(5);
/// The slot of the VM that all others descend from.
const ROOT: u32 = 0;

/// A root VM and its keeper.
struct Stage {
    world: Arc<World>,
    board: Board,
    family: Family,
    shape: MemoryShape,
    root: Arc<Space<SimHost>>,
    root_id: VmId,
    last_cut: Option<CutId>,
}

impl Stage {
    fn new(waits: Waits) -> Self {
        let board_shape = BoardShape { leaves: LEAVES, cuts: 8, members: 4, nodes: 48, records: 48 };
        let board = Board::new(board_shape, Arc::new(HeapWords::for_shape(&board_shape)));
        let shape = MemoryShape::new(u64::from(LEAVES) << 21).expect("a few leaves");
        let world = World::of_threads(waits);
        let mut family = Family::new(board.clone());
        let root_id = family.first_vm(ROOT);
        let host = SimHost::new(world.clone(), shape);
        let root = Arc::new(Space::new(host, board.clone(), ROOT, shape));
        Self { world, board, family, shape, root, root_id, last_cut: None }
    }

    /// Reserves a cut of the root with the keeper.
    fn reserve(&mut self) -> CutId {
        let cut = self.family.reserve_cut(self.root_id).expect("room for a cut");
        self.world.files().insert(cut, CutFile::default());
        cut
    }

    /// Takes a cut of the root, whatever other threads do meanwhile.
    fn cut(&mut self) -> CutId {
        let cut = self.reserve();
        let reserved = self.root.reserve_cut(cut).expect("the host does not refuse");
        reserved.perform(self.last_cut).expect("the host does not refuse");
        self.last_cut = Some(cut);
        self.family.commit_cut(cut);
        cut
    }

    fn clone_of(&mut self, cut: CutId, slot: u32) -> (VmId, Arc<Space<SimHost>>) {
        self.make_clone(cut, slot, false)
    }

    fn make_clone(&mut self, cut: CutId, slot: u32, is_resettable: bool) -> (VmId, Arc<Space<SimHost>>) {
        let id = self.family.clone_vm(cut, slot, is_resettable).expect("the cut is needed");
        let host = SimHost::new_clone(self.world.clone(), self.shape, cut);
        (id, Arc::new(Space::new_clone(host, self.board.clone(), slot, self.shape, cut)))
    }

    /// A sweep of the keeper, and what follows from it but for cuts that are unneeded.
    fn sweep(&mut self) -> Sweep {
        let sweep = self.family.sweep().expect("room for tables");
        for frames in &sweep.freed {
            match frames {
                Frames::Block(block) => self.world.punch_block(block.cut, block.leaf),
                Frames::Patches(_) => panic!("nobody published patches"),
            }
        }
        for cut in &sweep.closed {
            self.world.files().remove(cut);
            self.board.close_cut(*cut).expect("the heap does not refuse");
        }
        sweep
    }

    fn publish_all(&self) {
        publish(&self.root, Keep::Own);
    }
}

fn publish(space: &Space<SimHost>, keep: Keep) {
    while space.publish_next(keep).expect("the host does not refuse") {}
}

fn access<T>(space: &Space<SimHost>, gfn: Gfn, access: impl Fn() -> Result<T, Trap>) -> T {
    for _ in 0..100 {
        match access() {
            Ok(value) => return value,
            Err(Trap::Poison) => panic!("{gfn} is lost"),
            Err(Trap::Fault(fault)) => space.handle_fault(gfn, fault).expect("it can be resolved"),
        }
    }
    panic!("{gfn} faults for ever");
}

fn load(space: &Space<SimHost>, gfn: Gfn) -> u64 {
    access(space, gfn, || space.host().load(gfn))
}

fn store(space: &Space<SimHost>, gfn: Gfn, value: u64) {
    access(space, gfn, || space.host().store(gfn, value));
}

/// Values that some thread stores one after another, and which of them came after a cut.
#[derive(Clone)]
struct Witness(Arc<AtomicU32>);

impl Witness {
    fn new() -> Self {
        Self(Arc::new(AtomicU32::new(0)))
    }

    /// The cut has been performed.
    fn cut(&self) {
        self.0.store(1, Ordering::Release);
    }

    /// Stores 2, 3 and 4, and asks right before; returns what must be in the clone: 1 or one of these,
    /// below the first that was stored after the cut.
    fn watch(self, store: impl Fn(u64, &dyn Fn()) + Send + 'static) -> JoinHandle<Range<u64>> {
        spawn(move || {
            let first_after = Cell::new(u64::MAX);
            for value in 2..=4 {
                store(value, &|| {
                    if self.0.load(Ordering::Acquire) == 1 {
                        first_after.set(first_after.get().min(value));
                    }
                });
            }
            1..first_after.get()
        })
    }
}

// ---- scenarios ----

/// Short pins, and a cut: the pin is first and the page is copied, or the cut is first and the pin
/// forces.
fn pin_against_cut() {
    let mut stage = Stage::new(Waits::Looks);
    store(&stage.root, A, 1);
    let witness = Witness::new();
    let device = witness.clone().watch({
        let root = stage.root.clone();
        move |value, ask| {
            root.pin(A, 1, Access::ReadWrite).expect("a pin");
            root.host().hold(A);
            ask();
            root.host().device_store(A, value);
            assert_eq!(root.host().device_load(A), value, "a transfer is lost");
            root.host().let_go(A);
            root.unpin(A, 1).expect("the pin is there");
        }
    });
    let cut = stage.cut();
    witness.cut();
    let at_cut = device.join().expect("the device");
    stage.publish_all();
    let (_, clone) = stage.clone_of(cut, 1);
    let seen = load(&clone, A);
    assert!(at_cut.contains(&seen), "the clone has {seen}, not one of {at_cut:?}");
    assert_eq!(load(&stage.root, A), 4);
}

/// The publisher, the source's own store and a clone's touch want one leaf.
fn force_by_several() {
    let mut stage = Stage::new(Waits::Looks);
    store(&stage.root, A, 1);
    let cut = stage.cut();
    let (_, clone) = stage.clone_of(cut, 1);
    let publisher = spawn({
        let root = stage.root.clone();
        move || publish(&root, Keep::Own)
    });
    let guest = spawn({
        let root = stage.root.clone();
        move || store(&root, A, 2)
    });
    assert_eq!(load(&clone, A), 1, "the clone has what was stored later");
    guest.join().expect("the guest");
    publisher.join().expect("the publisher");
    assert_eq!(load(&stage.root, A), 2, "a store is lost");
}

/// A cut comes while the leaf is forced for an earlier one.
fn cut_against_force() {
    let mut stage = Stage::new(Waits::Looks);
    store(&stage.root, A, 1);
    let first = stage.cut();
    let witness = Witness::new();
    let publisher = spawn({
        let root = stage.root.clone();
        move || publish(&root, Keep::Own)
    });
    let guest = witness.clone().watch({
        let root = stage.root.clone();
        move |value, ask| {
            ask();
            store(&root, A, value);
        }
    });
    let second = stage.cut();
    witness.cut();
    let at_cut = guest.join().expect("the guest");
    publisher.join().expect("the publisher");
    stage.publish_all();
    let (_, early) = stage.clone_of(first, 1);
    let (_, late) = stage.clone_of(second, 2);
    assert_eq!(load(&early, A), 1);
    let seen = load(&late, A);
    assert!(at_cut.contains(&seen), "the clone has {seen}, not one of {at_cut:?}");
}

/// Stores make pages of a clone exclusive while their blocks are protected for its own cut.
fn stores_against_protection() {
    let mut stage = Stage::new(Waits::Looks);
    for gfn in [B, C] {
        store(&stage.root, gfn, 1);
    }
    let first = stage.cut();
    stage.publish_all();
    let (clone_id, clone) = stage.clone_of(first, 1);
    // Both leaves are the clone's own in part, so that both are protected.
    for gfn in [A, SECOND.gfn(6)] {
        store(&clone, gfn, 5);
    }
    let stores_done = Arc::new(AtomicU32::new(0));
    let guest = spawn({
        let (clone, stores_done) = (clone.clone(), stores_done.clone());
        move || {
            for gfn in [B, C] {
                store(&clone, gfn, 2);
                stores_done.fetch_add(1, Ordering::Release);
            }
        }
    });
    let second = stage.family.reserve_cut(clone_id).expect("room for a cut");
    stage.world.files().insert(second, CutFile::default());
    let reserved = clone.reserve_cut(second).expect("the host does not refuse");
    let done_before = stores_done.load(Ordering::Acquire);
    reserved.perform(None).expect("the host does not refuse");
    stage.family.commit_cut(second);
    guest.join().expect("the guest");
    publish(&clone, Keep::Own);
    let (_, grandchild) = stage.clone_of(second, 2);
    for (gfn, number) in [(B, 1), (C, 2)] {
        let seen = load(&grandchild, gfn);
        assert!(seen == 2 || seen == 1 && done_before < number, "{gfn}: a store before the cut is lost");
        assert_eq!(load(&clone, gfn), 2, "{gfn}: a store is lost");
    }
    assert_eq!(load(&grandchild, A), 5);
}

/// The last clone of a cut has ended: its source lets go of it, and is cut again.
fn reuse_against_cut() {
    let mut stage = Stage::new(Waits::Looks);
    store(&stage.root, A, 1);
    let first = stage.cut();
    let (clone, _) = stage.clone_of(first, 1);
    stage.family.end_vm(clone);
    assert_eq!(stage.sweep().unneeded, [first]);
    let witness = Witness::new();
    let releaser = spawn({
        let root = stage.root.clone();
        move || root.release_cut(first)
    });
    let guest = witness.clone().watch({
        let root = stage.root.clone();
        move |value, ask| {
            ask();
            store(&root, A, value);
        }
    });
    let second = stage.cut();
    witness.cut();
    let at_cut = guest.join().expect("the guest");
    releaser.join().expect("who lets go");
    stage.publish_all();
    let (_, late) = stage.clone_of(second, 2);
    let seen = load(&late, A);
    assert!(at_cut.contains(&seen), "the clone has {seen}, not one of {at_cut:?}");
    assert_eq!(load(&stage.root, A), 4);
}

/// The last clone ends while its source puts the block in the place of its own pages.
fn drop_against_last_exit() {
    let mut stage = Stage::new(Waits::Looks);
    (0..LEAF_PAGES).for_each(|position| store(&stage.root, FIRST.gfn(position), wide(position) + 1));
    let cut = stage.cut();
    let (clone, _) = stage.clone_of(cut, 1);
    let publisher = spawn({
        let root = stage.root.clone();
        move || publish(&root, Keep::Shared)
    });
    stage.family.end_vm(clone);
    for _ in 0..3 {
        let sweep = stage.sweep();
        for cut in sweep.unneeded {
            stage.root.release_cut(cut);
            stage.family.cut_released(cut);
        }
    }
    publisher.join().expect("the publisher");
    assert_eq!(load(&stage.root, B), 71, "the source has lost a page");
}

/// Two vCPUs touch a leaf of a clone for the first time, and store.
fn first_touches_by_two() {
    let mut stage = Stage::new(Waits::Looks);
    store(&stage.root, A, 1);
    let cut = stage.cut();
    stage.publish_all();
    let (_, clone) = stage.clone_of(cut, 1);
    let vcpus = [SECOND.gfn(1), SECOND.gfn(2)].map(|gfn| {
        let clone = clone.clone();
        spawn(move || {
            store(&clone, gfn, gfn.0);
            assert_eq!(load(&clone, gfn), gfn.0, "a store is lost");
        })
    });
    vcpus.into_iter().for_each(|vcpu| vcpu.join().expect("a vcpu"));
    assert_eq!((load(&clone, SECOND.gfn(1)), load(&clone, SECOND.gfn(2))), (513, 514));
}

/// A member's thread that walks to both leaves, which hold what the cut published.
fn walker(space: Arc<Space<SimHost>>, cut: CutId, walks: usize) -> JoinHandle<()> {
    spawn(move || {
        let expected = Found::Shared { block: Some(cut), patches: None };
        for leaf in [FIRST, SECOND].into_iter().cycle().take(walks) {
            assert_eq!(space.look_up(leaf), expected, "a walk goes astray");
        }
    })
}

/// A stage whose root has published a cut with pages in both leaves.
fn published_stage() -> (Stage, CutId) {
    let mut stage = Stage::new(Waits::Looks);
    store(&stage.root, A, 1);
    store(&stage.root, C, 1);
    let cut = stage.cut();
    // Somebody needs it.
    stage.clone_of(cut, 3);
    stage.publish_all();
    (stage, cut)
}

/// Members walk while the keeper makes a table of the cut's words, breaks it for one VM, and ends
/// another.
fn walk_against_settling() {
    let (mut stage, cut) = published_stage();
    let (one, one_space) = stage.clone_of(cut, 1);
    let (_, other_space) = stage.clone_of(cut, 2);
    let walkers = [one_space, other_space].map(|space| walker(space, cut, 4));
    stage.sweep();
    let mut pages = PageSet::EMPTY;
    pages.insert(3);
    stage.family.harvest(one, &[(FIRST, pages)]).expect("room for tables");
    stage.family.end_vm(VmId(2));
    stage.sweep();
    walkers.into_iter().for_each(|walker| walker.join().expect("a walker"));
    stage.family.check().expect("the family adds up");
}

/// A member walks while the keeper breaks the path for its VM, gives it up, and uses its nodes again:
/// the last one given up is the first of the next path, at another level.
fn walk_against_reuse() {
    let (mut stage, cut) = published_stage();
    let (one, space) = stage.make_clone(cut, 1, true);
    stage.sweep();
    let mut pages = PageSet::EMPTY;
    pages.insert(3);
    stage.family.harvest(one, &[(FIRST, pages)]).expect("room for tables");
    let walker = walker(space, cut, 6);
    for _ in 0..2 {
        stage.family.reset_vm(one).expect("it is a clone");
        stage.sweep();
        stage.family.harvest(one, &[(FIRST, pages)]).expect("room for tables");
    }
    walker.join().expect("the walker");
    stage.family.check().expect("the family adds up");
}

/// The thread that answers the doorbell, as a member's does.
fn serve(space: Arc<Space<SimHost>>, board: Board, stop: Arc<AtomicU32>) -> JoinHandle<()> {
    spawn(move || {
        let doorbell = board.member(ROOT).doorbell();
        loop {
            let seen = doorbell.load(Ordering::Acquire);
            if stop.load(Ordering::Acquire) == 1 {
                return;
            }
            space.serve_requests(Keep::Own).expect("the host does not refuse");
            space.finished_cuts();
            space.host().wait_word(doorbell, seen, std::time::Duration::MAX);
        }
    })
}

/// Two clones ask for a leaf each and sleep until they have it. Nobody looks after a time.
fn requests_against_answers(is_publishing: bool) {
    let mut stage = Stage::new(Waits::Sleeps(Box::default()));
    store(&stage.root, A, 1);
    store(&stage.root, C, 2);
    let cut = stage.cut();
    let stop = Arc::new(AtomicU32::new(0));
    let server = serve(stage.root.clone(), stage.board.clone(), stop.clone());
    let publisher = is_publishing.then(|| {
        let root = stage.root.clone();
        spawn(move || publish(&root, Keep::Own))
    });
    let clones = [(1, A, 1), (2, C, 2)].map(|(slot, gfn, value)| {
        let (_, clone) = stage.clone_of(cut, slot);
        spawn(move || assert_eq!(load(&clone, gfn), value))
    });
    clones.into_iter().for_each(|clone| clone.join().expect("a clone"));
    stop.store(1, Ordering::Release);
    stage.board.member(ROOT).ring();
    stage.root.host().wake_word(stage.board.member(ROOT).doorbell());
    server.join().expect("the server");
    publisher.into_iter().for_each(|publisher| publisher.join().expect("the publisher"));
}

fn requests_alone() {
    requests_against_answers(false);
}

fn requests_against_publisher() {
    requests_against_answers(true);
}

// ---- how they are run ----

fn number(name: &str, default: u64) -> u64 {
    let text = std::env::var(name);
    text.map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Orders that each scheduler tries.
fn orders() -> usize {
    crate::words::index(number("SALP_RACE_ORDERS", 100))
}

thread_local! {
    static TRIED: Cell<u32> = const { Cell::new(0) };
}

fn run(scheduler: impl Scheduler + 'static, scenario: fn(), persistence: FailurePersistence) {
    let mut config = Config::new();
    config.stack_size = 1 << 18;
    config.max_steps = MaxSteps::FailAfter(400_000);
    config.failure_persistence = persistence;
    config.silence_warnings = true;
    Runner::new(scheduler, config).run(move || {
        TRIED.set(TRIED.get() + 1);
        scenario();
    });
}

/// Runs a scenario in many orders: few changes at telling places, then changes anywhere.
fn explore(scenario: fn(), orders: usize, persistence: &FailurePersistence) {
    let seed = number("SALP_RACE_SEED", 1);
    run(PctScheduler::new_from_seed(seed, 3, orders), scenario, persistence.clone());
    run(RandomScheduler::new_from_seed(seed, orders), scenario, persistence.clone());
}

/// The scenario holds; with each of the faults it does not, in some order.
pub(crate) fn holds_but_with(scenario: fn(), faults: &[Plant]) {
    explore(scenario, orders(), &FailurePersistence::Print);
    for fault in faults {
        let _planted = plants::plant(Some(*fault));
        TRIED.set(0);
        let result = catch_unwind(AssertUnwindSafe(|| explore(scenario, 2_000, &FailurePersistence::None)));
        assert!(result.is_err(), "{fault:?} went unseen in {} orders", TRIED.get());
        println!("{fault:?}: order {}", TRIED.get());
    }
}

/// A test of each scenario, with the faults that it does not hold with; all of these are `PLANTED`.
macro_rules! races {
    ($($name:ident: $scenario:ident, [$($fault:ident),*];)*) => {
        $(
            #[test]
            fn $name() {
                $crate::space::tests::races::holds_but_with($scenario, &[$(Plant::$fault),*]);
            }
        )*

        const PLANTED: &[Plant] = &[$($(Plant::$fault),*),*];
    };
}
pub(crate) use races;

races! {
    a_pin_against_a_cut: pin_against_cut, [PinOutsideRemap, PinnedNotCopied];
    a_leaf_forced_by_several: force_by_several, [ForceWithoutLock];
    stores_while_blocks_are_protected: stores_against_protection, [StoresMeanwhileUnseen];
    a_cut_against_a_force: cut_against_force, [OpensWithoutALook];
    a_reuse_against_a_cut: reuse_against_cut, [OpensWithoutALook];
    a_drop_against_the_last_exit: drop_against_last_exit, [DropsBeforeItSays];
    first_touches_of_two_vcpus: first_touches_by_two, [MapsTwice];
    a_walk_against_settling: walk_against_settling, [SettledBeforeTable];
    a_walk_against_reuse: walk_against_reuse, [ReclaimsUnderWalkers];
    requests_against_their_answers: requests_alone, [WakesNobody, RequestsTakenTwice];
    requests_against_the_publisher: requests_against_publisher, [WakesNobody];
}

#[test]
fn every_fault_between_threads_is_planted() {
    for fault in Plant::OF_THREADS {
        assert!(PLANTED.contains(&fault), "{fault:?} is planted nowhere");
    }
}
