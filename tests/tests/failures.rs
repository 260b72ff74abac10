//! Row K1 of the conformance table: every fallible step of a fork, a publication, a pin, a reset and
//! an exit fails once, one at a time. Whatever the operation says then, its source's bytes are those of
//! a naive copy, its transfers arrive, nothing leaks, the next fork is right, and the checker agrees.
#![cfg(debug_assertions)]

use std::sync::Arc;
use std::time::Duration;

use salp::family::VmId;
use salp::frames::CutId;
use salp::keeper::ColonyError;
use salp::keeper::member_handle::{MemberHandle, MemberState};
use salp::member::messages::{GuestKind, Order, PinHolder};
use salp::space::{Access, Keep};
use salp::words::{Gfn, Gpa, LeafNumber, PAGE_BYTES};
use salp_protocol::dma::{register, status};
use salp_tests::both_guests;
use salp_tests::dma::{Engine, Submitted, Transfer};
use salp_tests::failures::{
    Failure, Operation, Whose, bytes, check, expect_bytes, fail_everywhere, read_all,
};
use salp_tests::probe::Holdings;
use salp_tests::procs::{Usage, settled};
use salp_tests::row::{ALONE, EMPTY, FULL, NEW, OLD, OTHER, SPARSE};
use salp_tests::world::{LIMIT, Setup, World};

both_guests! {
    k1_fork;
    k1_publication;
    k1_first_touch;
    k1_pin;
    k1_reset;
    k1_exit;
}

const RING: Gfn = LeafNumber(6).gfn(0);
/// A registered buffer: pinned.
const BUFFER: Gfn = FULL.gfn(16);
const BUFFER_PAGES: u64 = 4;
const LENGTH: u32 = 4 * 4096;
const DISK: u64 = 64 << 10;
/// Long enough that the cut falls into it, in microseconds.
const DELAY_US: u64 = 20_000;
/// What a device changes meanwhile.
const BY_DEVICE: [(Gpa, usize); 2] = [(BUFFER.gpa(), 4 * PAGE_BYTES), (RING.gpa(), PAGE_BYTES)];

/// A world, and a root with memory of all kinds and a disk.
fn world(test: &str, guest: GuestKind) -> Option<(World, VmId)> {
    let world = World::alone(test, guest, &Setup::default())?;
    let root = world.root();
    fill(&world, root);
    Some((world, root))
}

fn fill(world: &World, root: VmId) {
    for part in 0..16 {
        world.store_pages(root, FULL.gfn(part * 32), 32, OLD + wide(part));
    }
    world.store(root, ALONE.gpa(), OLD);
    world.store_pages(root, EMPTY.gfn(100), 100, OTHER);
}

fn wide(number: usize) -> u64 {
    u64::try_from(number).expect("few")
}

/// Forks `vm`, and finds in the clone what the source has.
fn fork_and_compare(world: &World, vm: VmId) {
    let clone = world.fork(vm);
    expect_clone(world, clone, &bytes(world, vm), &[]);
    world.store(clone, ALONE.gpa(), NEW);
    world.end(clone);
}

fn expect_clone(world: &World, clone: VmId, expected: &[u8], but: &[(Gpa, usize)]) {
    assert!(is_whole(world, clone), "{clone} has lost pages");
    expect_bytes(world, clone, expected, but);
}

/// A clone reads all that it shares, and loses nothing.
fn is_whole(world: &World, clone: VmId) -> bool {
    read_all(world, clone).expect("it obeys").is_some()
}

/// A clone's vCPU gives in its last result once more; false: its run has ended, because a page is lost.
fn begins(world: &World, clone: VmId) -> bool {
    let has_begun = |state: &mut MemberState| match (state.puppet_results.pop(), &state.ended) {
        (Some(_), _) => Some(true),
        (None, Some(_)) => Some(false),
        (None, None) => None,
    };
    world.guest() == GuestKind::Thread || world.member(clone).wait_for(LIMIT, has_begun).expect("it lives")
}

/// What a store of the device may have published for an earlier cut while a fork failed: the pages of one
/// leaf over a block, each by itself. At the end of the world the arena is empty all the same.
const EARLIER_BYTES: u64 = 8 * 4096;

/// Everything that a failed operation could have left behind.
#[derive(Debug)]
struct Base {
    vms: Vec<VmId>,
    usage: ((usize, usize, usize), u64),
    keeper: Usage,
    source: Holdings,
}

impl Base {
    fn of(world: &World, vm: VmId) -> Self {
        world.colony.warm().expect("the pool fills");
        let source = Holdings::of(world.member(vm).process());
        Self { vms: world.colony.vms(), usage: world.usage(), keeper: Usage::now(), source }
    }

    /// Waits until no more is held than then.
    fn expect(&self, world: &World, vm: VmId, may_have_cut: bool) {
        world.colony.settle();
        world.colony.warm().expect("the pool fills again");
        assert_eq!(world.colony.vms(), self.vms);
        if may_have_cut {
            return;
        }
        world.await_usage_within(self.usage, EARLIER_BYTES);
        let keeper = settled(Duration::from_secs(10), Usage::now, |now| now.is_within(&self.keeper));
        assert!(keeper.is_within(&self.keeper), "{keeper:?}, before {:?}", self.keeper);
        let process = world.member(vm).process();
        let is_same = |now: &Holdings| now.is_within(&self.source, 4);
        let source = settled(Duration::from_secs(10), || Holdings::of(process), is_same);
        assert!(is_same(&source), "the source holds {source:?}, before {:?}", self.source);
    }
}

// ---- fork ----

struct Fork {
    root: VmId,
}

struct Forking {
    earlier: VmId,
    in_flight: Submitted,
    before: Vec<u8>,
    base: Base,
    clones: Vec<VmId>,
}

impl Fork {
    fn engine<'a>(&self, world: &'a World) -> Engine<'a> {
        Engine::again(world, RING)
    }
}

impl Operation for Fork {
    type Scene = Forking;
    const IS_LAST_TOO: bool = true;

    fn prepare(&self, world: &World) -> Forking {
        let root = self.root;
        // A block with pages of its own, an anonymous leaf, and an earlier cut on which all is pending.
        world.store_pages(root, BUFFER, BUFFER_PAGES, OTHER);
        world.store(root, FULL.gfn(300).gpa(), OTHER);
        let earlier = world.fork(root);
        world.store(root, SPARSE.gfn(300).gpa(), OTHER);
        let before = bytes(world, root);
        let base = Base::of(world, root);
        let in_flight = self.engine(world).submit(root, &Transfer::read(DISK, BUFFER.gpa(), LENGTH));
        Forking { earlier, in_flight, before, base, clones: Vec::new() }
    }

    fn members(&self, world: &World, _: &Forking) -> Vec<(Whose, Arc<MemberHandle>)> {
        let clone = Arc::clone(&world.colony.pooled()[0]);
        vec![(Whose::Source, world.member(self.root)), (Whose::Clone, clone)]
    }

    fn act(&self, world: &World, scene: &mut Forking) -> Result<(), ColonyError> {
        let forked = world.colony.fork(self.root, 1)?;
        scene.clones = forked.clones.iter().map(|clone| clone.vm).collect();
        Ok(())
    }

    fn judge(
        &self,
        world: &World,
        scene: Forking,
        outcome: &Result<(), ColonyError>,
        failure: Option<&Failure>,
    ) {
        let root = self.root;
        let end = self.engine(world).end(root, scene.in_flight);
        // The device may be the first to meet what was to fail: its guest is told, and tries again.
        let has_device_failed =
            end == status::FAILED && failure.is_some_and(|failure| failure.whose == Whose::Source);
        if has_device_failed {
            self.engine(world).transfer(root, &Transfer::read(DISK, BUFFER.gpa(), LENGTH));
        } else {
            assert_eq!(end, status::OK, "{root}: {:?}", scene.in_flight);
        }
        assert_eq!(world.sum(root, BUFFER.gpa(), BUFFER_PAGES, 4096), NEW * BUFFER_PAGES);
        expect_bytes(world, root, &scene.before, &BY_DEVICE);
        if outcome.is_err() {
            // A cut that the source has taken lies over the earlier one until that is done with.
            let may_have_cut = failure.is_some_and(|failure| failure.whose != Whose::Source);
            scene.base.expect(world, root, may_have_cut);
            fork_and_compare(world, root);
        }
        for clone in scene.clones {
            if begins(world, clone) && is_whole(world, clone) {
                // Its own engine may have been refused what it needs: its guest is told.
                if !has_device_failed && failure.is_none_or(|failure| failure.whose != Whose::Clone) {
                    self.engine(world).complete(clone, scene.in_flight);
                    assert_eq!(world.sum(clone, BUFFER.gpa(), BUFFER_PAGES, 4096), NEW * BUFFER_PAGES);
                }
                expect_bytes(world, clone, &scene.before, &BY_DEVICE);
            } else {
                assert!(failure.is_some(), "a clone loses pages where something failed");
            }
            world.end(clone);
        }
        world.store(root, ALONE.gpa(), OLD + 1);
        world.expect(root, ALONE.gpa(), OLD + 1);
        world.store(root, ALONE.gpa(), OLD);
        check(world);
        world.end(scene.earlier);
    }
}

fn k1_fork(test: &str, guest: GuestKind) {
    let Some((world, root)) = world(test, guest) else { return };
    let engine = Engine::set_up(&world, root, RING);
    world.store_pages(root, BUFFER, BUFFER_PAGES, NEW);
    engine.register(root, 0, BUFFER, BUFFER_PAGES);
    engine.transfer(root, &Transfer::write(BUFFER.gpa(), DISK, LENGTH));
    engine.configure(root, register::DELAY_US, DELAY_US);
    let child = world.fork(root);
    world.publish_all(root, Keep::Shared);
    world.end(child);
    let injected = fail_everywhere(test, &world, &Fork { root });
    assert!(injected >= 20, "{injected} failures only");
    world.finish();
}

// ---- publication ----

/// The source publishes for its clone: by order, or since the clone reads.
struct Publish {
    root: VmId,
    keep: Option<Keep>,
}

struct Publishing {
    cut: CutId,
    child: VmId,
    before: Vec<u8>,
    sum: Option<u64>,
}

impl Operation for Publish {
    type Scene = Publishing;

    fn prepare(&self, world: &World) -> Publishing {
        let root = self.root;
        world.store_pages(root, FULL.gfn(8), 3, OTHER);
        world.store_pages(root, EMPTY.gfn(0), 64, NEW);
        let forked = world.fork_many(root, 1);
        let (cut, child) = (forked.cut, forked.clones[0].vm);
        Publishing { cut, child, before: bytes(world, root), sum: None }
    }

    fn members(&self, world: &World, scene: &Publishing) -> Vec<(Whose, Arc<MemberHandle>)> {
        vec![(Whose::Source, world.member(self.root)), (Whose::Clone, world.member(scene.child))]
    }

    fn act(&self, world: &World, scene: &mut Publishing) -> Result<(), ColonyError> {
        let Some(keep) = self.keep else {
            scene.sum = read_all(world, scene.child)?;
            return Ok(());
        };
        world.colony.ask(self.root, Order::Publish { keep })?;
        let is_finished = |state: &mut MemberState| state.finished_cuts.contains(&scene.cut).then_some(());
        world.member(self.root).wait_for(LIMIT, is_finished)
    }

    fn judge(
        &self,
        world: &World,
        scene: Publishing,
        outcome: &Result<(), ColonyError>,
        failure: Option<&Failure>,
    ) {
        let (root, child) = (self.root, scene.child);
        expect_bytes(world, root, &scene.before, &[]);
        let is_whole = match (self.keep, outcome) {
            (None, Ok(())) => scene.sum.is_some(),
            _ => is_whole(world, child),
        };
        if is_whole {
            expect_bytes(world, child, &scene.before, &[]);
        } else {
            let failure = failure.expect("a clone loses pages where something failed");
            assert!(failure.whose != Whose::Keeper, "{failure} loses pages");
        }
        world.end(child);
        world.store(root, FULL.gfn(9).gpa(), NEW);
        world.expect(root, FULL.gfn(9).gpa(), NEW);
        fork_and_compare(world, root);
        check(world);
    }
}

fn k1_publication(test: &str, guest: GuestKind) {
    let Some((world, root)) = world(test, guest) else { return };
    for keep in [Keep::Own, Keep::Shared] {
        let test = format!("{test} {keep:?}");
        let injected = fail_everywhere(&test, &world, &Publish { root, keep: Some(keep) });
        assert!(injected >= 5, "{injected} failures only");
    }
    world.finish();
}

fn k1_first_touch(test: &str, guest: GuestKind) {
    let Some((world, root)) = world(test, guest) else { return };
    // Patches lie over blocks then.
    let child = world.fork(root);
    world.publish_all(root, Keep::Shared);
    world.end(child);
    let injected = fail_everywhere(test, &world, &Publish { root, keep: None });
    assert!(injected >= 8, "{injected} failures only");
    world.finish();
}

// ---- pin ----

struct Pin {
    root: VmId,
    is_clone: bool,
}

struct Pinning {
    child: VmId,
    vm: VmId,
    before: Vec<u8>,
}

/// Of two leaves: what was pinned in the first is let go where the second fails.
const PINNED: (Gfn, u64) = (FULL.gfn(510), 4);

impl Operation for Pin {
    type Scene = Pinning;

    fn prepare(&self, world: &World) -> Pinning {
        let child = world.fork(self.root);
        let vm = if self.is_clone { child } else { self.root };
        Pinning { child, vm, before: bytes(world, self.root) }
    }

    fn members(&self, world: &World, scene: &Pinning) -> Vec<(Whose, Arc<MemberHandle>)> {
        vec![(Whose::Source, world.member(self.root)), (Whose::Clone, world.member(scene.child))]
    }

    fn act(&self, world: &World, scene: &mut Pinning) -> Result<(), ColonyError> {
        let (first, pages) = PINNED;
        world
            .colony
            .ask(scene.vm, Order::Pin { first, pages, holder: PinHolder::Salp(Access::ReadWrite) })
            .map(|_| ())
    }

    fn judge(
        &self,
        world: &World,
        scene: Pinning,
        outcome: &Result<(), ColonyError>,
        failure: Option<&Failure>,
    ) {
        let (first, pages) = PINNED;
        expect_bytes(world, self.root, &scene.before, &[]);
        // An answer that was lost is that of a pin that is held.
        let is_unanswered = failure.is_some_and(|failure| failure.point == "channel.send");
        if outcome.is_ok() || is_unanswered && world.report(scene.vm).pins > 0 {
            world.unpin(scene.vm, first, pages);
        }
        assert_eq!(world.report(scene.vm).pins, 0, "pins are left");
        if is_whole(world, scene.child) {
            expect_bytes(world, scene.child, &scene.before, &[]);
            world.pin(scene.vm, first, pages);
            world.device_store(scene.vm, first, NEW);
            world.expect(scene.vm, first.gpa(), NEW);
            let other = if self.is_clone { self.root } else { scene.child };
            world.expect(other, first.gpa(), OLD + 15);
            world.device_store(scene.vm, first, OLD + 15);
            world.unpin(scene.vm, first, pages);
        } else {
            assert!(failure.is_some(), "a clone loses pages where something failed");
        }
        check(world);
        world.end(scene.child);
        fork_and_compare(world, self.root);
    }
}

fn k1_pin(test: &str, guest: GuestKind) {
    let Some((world, root)) = world(test, guest) else { return };
    for is_clone in [false, true] {
        let test = format!("{test} {}", if is_clone { "of the clone" } else { "of the source" });
        let injected = fail_everywhere(&test, &world, &Pin { root, is_clone });
        assert!(injected >= 3, "{injected} failures only");
    }
    world.finish();
}

// ---- reset ----

struct Reset {
    root: VmId,
    is_forked: bool,
}

struct Resetting {
    child: VmId,
    grandchild: Option<VmId>,
    before: Vec<u8>,
}

impl Operation for Reset {
    type Scene = Resetting;

    fn prepare(&self, world: &World) -> Resetting {
        let child = world.fork(self.root);
        let before = bytes(world, self.root);
        assert!(is_whole(world, child));
        world.store_pages(child, FULL.gfn(30), 10, NEW);
        let grandchild = self.is_forked.then(|| world.fork(child));
        world.store_pages(child, EMPTY.gfn(0), 512, NEW);
        world.store(child, ALONE.gpa(), NEW);
        Resetting { child, grandchild, before }
    }

    fn members(&self, world: &World, scene: &Resetting) -> Vec<(Whose, Arc<MemberHandle>)> {
        vec![(Whose::Source, world.member(scene.child))]
    }

    fn act(&self, world: &World, scene: &mut Resetting) -> Result<(), ColonyError> {
        world.colony.reset(scene.child).map(|_| ())
    }

    fn judge(
        &self,
        world: &World,
        scene: Resetting,
        outcome: &Result<(), ColonyError>,
        failure: Option<&Failure>,
    ) {
        let child = scene.child;
        expect_bytes(world, self.root, &scene.before, &[]);
        if let Err(error) = outcome {
            println!("{child}, {failure:?}: {error}");
            world.colony.reset(child).unwrap_or_else(|error| panic!("a second reset: {error}"));
        }
        world.await_puppets(child);
        expect_clone(world, child, &scene.before, &[]);
        if let Some(grandchild) = scene.grandchild {
            if is_whole(world, grandchild) {
                world.expect(grandchild, FULL.gfn(31).gpa(), NEW);
                world.expect(grandchild, ALONE.gpa(), OLD);
            } else {
                assert!(failure.is_some(), "a clone loses pages where something failed");
            }
            world.end(grandchild);
        }
        fork_and_compare(world, child);
        world.end(child);
        fork_and_compare(world, self.root);
        check(world);
    }
}

fn k1_reset(test: &str, guest: GuestKind) {
    let Some((world, root)) = world(test, guest) else { return };
    for is_forked in [false, true] {
        let test = format!("{test} {}", if is_forked { "of a clone with a clone" } else { "of a clone" });
        let injected = fail_everywhere(&test, &world, &Reset { root, is_forked });
        assert!(injected >= 5, "{injected} failures only");
    }
    world.finish();
}

// ---- exit ----

/// A source ends with everything pending, and its clone reads on; or the clone ends, then the source.
struct Exit {
    is_clone_first: bool,
}

struct Exiting {
    root: VmId,
    child: VmId,
    before: Vec<u8>,
    sum: Option<u64>,
}

impl Operation for Exit {
    type Scene = Exiting;

    fn prepare(&self, world: &World) -> Exiting {
        let root = world.root();
        fill(world, root);
        let child = world.fork(root);
        // Some of it is published: there are frames to be given back.
        world.store_pages(root, EMPTY.gfn(0), 64, OTHER);
        world.load(child, EMPTY.gfn(100).gpa());
        Exiting { root, child, before: bytes(world, root), sum: None }
    }

    fn members(&self, world: &World, scene: &Exiting) -> Vec<(Whose, Arc<MemberHandle>)> {
        vec![(Whose::Source, world.member(scene.root)), (Whose::Clone, world.member(scene.child))]
    }

    fn act(&self, world: &World, scene: &mut Exiting) -> Result<(), ColonyError> {
        let ends: &[VmId] = if self.is_clone_first { &[scene.child, scene.root] } else { &[scene.root] };
        for vm in ends {
            world.colony.end(*vm).unwrap_or_else(|error| panic!("the end of {vm} is refused: {error}"));
            world.colony.settle();
        }
        if !self.is_clone_first {
            scene.sum = read_all(world, scene.child)?;
        }
        Ok(())
    }

    fn judge(
        &self,
        world: &World,
        scene: Exiting,
        outcome: &Result<(), ColonyError>,
        failure: Option<&Failure>,
    ) {
        if !self.is_clone_first {
            assert_eq!(world.colony.vms(), [scene.child]);
            if scene.sum.is_some() {
                let after_cut = (EMPTY.first_gfn().gpa(), 64 * PAGE_BYTES);
                expect_bytes(world, scene.child, &scene.before, &[after_cut]);
            } else {
                assert!(failure.is_some(), "a clone loses pages where something failed: {outcome:?}");
            }
            check(world);
            world.end(scene.child);
        }
        world.colony.wait_until_gone(LIMIT).unwrap_or_else(|error| panic!("the end: {error}"));
        world.await_usage(((0, 0, 0), 0));
    }
}

fn k1_exit(test: &str, guest: GuestKind) {
    let Some(world) = World::alone(test, guest, &Setup::default()) else { return };
    for is_clone_first in [false, true] {
        let test = format!("{test} of {}", if is_clone_first { "both" } else { "the source" });
        let injected = fail_everywhere(&test, &world, &Exit { is_clone_first });
        assert!(injected >= 5, "{injected} failures only");
    }
}
