//! A guest that never lets go of its device: it rings the doorbell for ever, its ring is always full, each
//! transfer of the greatest length, all to and from the same pages. Another VM of its colony works on, and
//! so does whoever pauses, forks, resets and ends it.
//!
//! How fast is compared with the same VM, in the same run, before there was such a guest.

use std::time::{Duration, Instant};

use salp::family::VmId;
use salp::member::messages::{GuestKind, Publication};
use salp::space::Keep;
use salp::words::{Gfn, LeafNumber};
use salp_protocol::dma::{MAX_TRANSFER_BYTES, flag, operation};
use salp_tests::both_guests;
use salp_tests::dma::{Engine, Transfer};
use salp_tests::procs::settled;
use salp_tests::world::{LIMIT, Setup, World};

both_guests! {
    a_flood_of_transfers_starves_nobody;
}

/// The ring of each VM's engine.
const RING: Gfn = LeafNumber(3).gfn(0);
/// What the hostile one moves.
const FROM: Gfn = LeafNumber(4).gfn(0);
const INTO: Gfn = LeafNumber(5).gfn(0);
/// What the good one works with.
const SOURCE: Gfn = LeafNumber(6).gfn(0);
const TARGET: Gfn = LeafNumber(6).gfn(256);
const WORK_PAGES: u64 = 16;
const STEPS: u64 = 10;
/// The best of so many runs counts: there are others on this host.
const RUNS: usize = 3;
/// How much longer the good one may take for the same.
const MOST_TIMES: u32 = 10;

/// Stores, transfers to the disk and back, and what came back: each step checked.
fn work(world: &World, vm: VmId, steps: u64) -> Duration {
    let engine = Engine::again(world, RING);
    let begun = Instant::now();
    let length = u32::try_from(WORK_PAGES * 4096).expect("some pages");
    for step in 1..=steps {
        let value = u64::from(vm.0) << 32 | step;
        world.store_pages(vm, SOURCE, WORK_PAGES, value);
        engine.transfer(vm, &Transfer::write(SOURCE.gpa(), 0, length));
        engine.transfer(vm, &Transfer::read(0, TARGET.gpa(), length));
        assert_eq!(world.sum(vm, TARGET.gpa(), WORK_PAGES, 4096), WORK_PAGES * value, "{vm}, step {step}");
    }
    begun.elapsed()
}

fn best(world: &World, vm: VmId) -> Duration {
    (0..RUNS).map(|_| work(world, vm, STEPS)).min().expect("there was a run")
}

/// All that an engine can do, as much of it as one descriptor can ask for.
fn transfers() -> [Transfer; 5] {
    let (from, into) = (FROM.gpa(), INTO.gpa());
    let read = Transfer::read(0, into, MAX_TRANSFER_BYTES);
    let write = Transfer::write(from, 0, MAX_TRANSFER_BYTES);
    let copy = Transfer { operation: operation::COPY, source: from.0, ..read };
    let by_kernel = |transfer| Transfer { flags: flag::KERNEL, ..transfer };
    [copy, write, read, by_kernel(write), by_kernel(read)]
}

/// Waits until a VM has completed as many transfers again as its ring has: it is at it.
#[track_caller]
fn expect_busy(world: &World, vm: VmId) {
    let before = world.describe(vm).dma_transfers;
    let is_busy = |done: &u64| *done >= before + 64;
    let done = settled(LIMIT, || world.describe(vm).dma_transfers, is_busy);
    assert!(is_busy(&done), "{vm} does nothing: {done} transfers, {before} before");
    assert_eq!(world.describe(vm).dma_failed, 0, "{vm}");
}

fn a_flood_of_transfers_starves_nobody(test: &str, guest: GuestKind) {
    let publication = Publication { in_background: true, keep: Keep::Own, keep_later: Keep::Own };
    let Some(world) = World::new(test, guest, &Setup { publication, ..Setup::default() }) else { return };
    let good = world.root();
    Engine::set_up(&world, good, RING);
    world.store_pages(good, FROM, 256, 1);
    world.store_pages(good, INTO, 256, 2);
    let hostile = world.fork(good);
    let alone = best(&world, good);

    let engine = Engine::again(&world, RING);
    engine.flood(hostile, &transfers());
    expect_busy(&world, hostile);
    let beside = best(&world, good);
    expect_busy(&world, hostile);
    println!("{test}: {STEPS} steps alone {alone:?}, beside a flood {beside:?}");
    assert!(beside < alone * MOST_TIMES, "{STEPS} steps take {beside:?}, alone {alone:?}");

    let clone = world.fork(good);
    work(&world, clone, STEPS);
    world.end(clone);
    // The flood itself is in nobody's hands but its keeper's.
    if guest == GuestKind::Kvm {
        world.colony.pause(hostile).expect("it stops");
        world.colony.resume(hostile).expect("it goes on");
        expect_busy(&world, hostile);
    }
    let twin = world.fork_running(hostile, 1).clones[0].vm;
    if guest == GuestKind::Thread {
        // A thread is no part of a cut.
        engine.flood_on(twin);
    }
    for vm in [twin, hostile] {
        expect_busy(&world, vm);
    }
    work(&world, good, 1);
    world.colony.reset(twin).expect("it returns to where it was: in the flood");
    if guest == GuestKind::Thread {
        engine.flood_on(twin);
    }
    expect_busy(&world, twin);
    world.end(twin);
    world.colony.reset(hostile).expect("it returns to where it was: before the flood");
    world.await_puppets(hostile);
    work(&world, hostile, 1);
    engine.flood(hostile, &transfers());
    expect_busy(&world, hostile);
    world.end(hostile);
    work(&world, good, 1);
    world.finish();
}
