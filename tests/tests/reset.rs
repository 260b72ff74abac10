//! A clone's return to its cut, row F8 of the conformance table and what goes with it.

use salp::family::VmId;
use salp::keeper::ColonyError;
use salp::keeper::member_handle::MemberState;
use salp::member::messages::{GuestKind, Order, PuppetOrder};
use salp::words::Gfn;
use salp_protocol::dma::register;
use salp_protocol::{call, order};
use salp_tests::axes::MEMORY;
use salp_tests::both_guests;
use salp_tests::dma::{Engine, Transfer};
use salp_tests::row::{ALONE, EMPTY, FULL, NEW, OLD, OTHER, run, write_memory};
use salp_tests::world::{LIMIT, Setup, World};

both_guests! {
    f8_a_reset_restores_memory_and_registers;
    f8_a_guest_resets_itself;
    a_reset_of_a_vm_that_was_forked;
    a_reset_drops_and_repeats_transfers;
    a_pin_refuses_a_reset;
    a_root_refuses_a_reset;
    a_whole_leaf_returns;
}

/// What the last order before the cut loaded: in a register of the guest at the cut.
const MARK: u64 = 0x5a17;
const RING: Gfn = Gfn(600);

/// A guest whose last result is [`MARK`] at the cut.
fn fork_marked(world: &World, vm: VmId) -> VmId {
    world.store(vm, ALONE.gpa(), MARK);
    assert_eq!(world.load(vm, ALONE.gpa()), MARK);
    world.fork(vm)
}

/// Resets by order, and has the guest give in its last result once more.
#[track_caller]
fn reset(world: &World, vm: VmId) {
    let reply = world.colony.reset(vm).unwrap_or_else(|error| panic!("a reset of {vm}: {error}"));
    assert!(reply.times.begun > 0 && reply.times.resumed >= reply.times.restored);
    await_mark(world, vm);
}

/// A vCPU at the cut is inside the call that gives in its last result; a thread has no registers.
#[track_caller]
fn await_mark(world: &World, vm: VmId) {
    if world.guest() == GuestKind::Kvm {
        assert_eq!(world.result(vm, 0), MARK, "a register of {vm}");
    }
}

fn resets(world: &World, vm: VmId) -> u64 {
    world.member(vm).state().resets
}

/// Has the guest ask for its reset.
#[track_caller]
fn reset_by_guest(world: &World, vm: VmId) {
    let before = resets(world, vm);
    let order = PuppetOrder { order: order::RESET, ..PuppetOrder::default() };
    world.begin(vm, 0, order);
    let is_done = |state: &mut MemberState| (state.resets > before).then_some(());
    world.member(vm).wait_for(LIMIT, is_done).unwrap_or_else(|error| panic!("{vm}: {error}"));
    await_mark(world, vm);
}

/// 1,000 of them with writes and pins between, over the points of the row.
fn f8_a_reset_restores_memory_and_registers(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let world = &row.world;
        let old = if row.page == ALONE { MARK } else { row.old };
        let child = fork_marked(world, row.parent);
        row.publish(row.parent);
        for round in 0..170 {
            row.store(child, NEW + round);
            world.store_pages(child, Gfn(FULL.first_gfn().0 + 8), 1 + round % 100, NEW);
            world.store(child, EMPTY.gfn(9).gpa(), OTHER);
            if round % 3 == 0 {
                world.pin(child, row.page, 1);
                row.device_store(child, OTHER);
                world.unpin(child, row.page, 1);
            }
            reset(world, child);
            row.expect(child, old);
            world.expect(child, FULL.gfn(8).gpa(), OLD);
            world.expect(child, EMPTY.gfn(9).gpa(), 0);
        }
        row.expect(row.parent, old);
        world.check();
    });
}

fn f8_a_guest_resets_itself(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let world = &row.world;
        let old = if row.page == ALONE { MARK } else { row.old };
        let child = fork_marked(world, row.parent);
        row.publish(row.parent);
        for round in 0..20 {
            row.store(child, NEW + round);
            reset_by_guest(world, child);
            row.expect(child, old);
        }
        row.expect(row.parent, old);
        world.check();
    });
}

/// Its clones keep what they have; it returns to its own cut, whoever asks.
fn a_reset_of_a_vm_that_was_forked(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let world = &row.world;
        let old = if row.page == ALONE { MARK } else { row.old };
        let child = fork_marked(world, row.parent);
        for round in 0..4 {
            row.store(child, NEW + round);
            let grandchild = world.fork(child);
            if round % 2 == 0 {
                row.publish(child);
            }
            row.store(child, OTHER);
            if round < 2 {
                reset(world, child)
            } else {
                reset_by_guest(world, child)
            }
            row.expect(child, old);
            row.expect(grandchild, NEW + round);
            // What it is a source of then is its cut's content.
            let other = world.fork(child);
            row.expect(other, old);
            row.publish(row.parent);
            world.check();
            world.end(grandchild);
            row.store(child, OTHER);
            reset(world, child);
            row.expect(child, old);
            row.expect(other, old);
            world.end(other);
        }
    });
}

/// The disk returns too; a transfer in flight at the cut is done again after each reset.
fn a_reset_drops_and_repeats_transfers(test: &str, guest: GuestKind) {
    let Some(world) = World::new(test, guest, &Setup::default()) else { return };
    let root = world.root();
    write_memory(&world, root);
    let engine = Engine::set_up(&world, root, RING);
    // Long enough to be under way at a cut and at a reset.
    engine.configure(root, register::DELAY_US, 20_000);
    let page = FULL.gfn(40);
    world.store(root, page.gpa(), NEW);
    engine.transfer(root, &Transfer::write(page.gpa(), 0, 4096));
    let into = FULL.gfn(41);
    let in_flight = engine.submit(root, &Transfer::read(0, into.gpa(), 4096));
    let child = fork_marked(&world, root);
    for _ in 0..10 {
        engine.complete(child, in_flight);
        world.expect(child, into.gpa(), NEW);
        world.store(child, page.gpa(), OTHER);
        engine.transfer(child, &Transfer::write(page.gpa(), 0, 4096));
        world.store(child, into.gpa(), OTHER);
        // Still under way when it is dropped, or just done: nobody can tell afterwards.
        engine.submit(child, &Transfer::write(into.gpa(), 4096, 4096));
        reset(&world, child);
        let again = engine.submit(child, &Transfer::read(0, EMPTY.gfn(3).gpa(), 4096));
        engine.complete(child, again);
        world.expect(child, EMPTY.gfn(3).gpa(), NEW);
    }
    engine.complete(root, in_flight);
    world.finish();
}

fn a_pin_refuses_a_reset(test: &str, guest: GuestKind) {
    let Some(world) = World::new(test, guest, &Setup::default()) else { return };
    let root = world.root();
    write_memory(&world, root);
    let child = fork_marked(&world, root);
    let page = FULL.gfn(3);
    world.store(child, page.gpa(), NEW);
    world.pin(child, page, 2);
    let refusal = world.refusal(child, Order::Reset);
    assert!(refusal.contains(&page.to_string()) && refusal.contains("pinned"), "{refusal}");
    assert_eq!(world.run(child, order::RESET, 0, 0), call::FAILED);
    world.expect(child, page.gpa(), NEW);
    world.device_store(child, page, OTHER);
    world.expect(child, page.gpa(), OTHER);
    world.unpin(child, page, 2);
    reset(&world, child);
    world.expect(child, page.gpa(), OLD);
    world.finish();
}

fn a_root_refuses_a_reset(test: &str, guest: GuestKind) {
    let Some(world) = World::new(test, guest, &Setup::default()) else { return };
    let root = world.root();
    world.store(root, FULL.gfn(1).gpa(), NEW);
    match world.colony.reset(root) {
        Err(ColonyError::Family(error)) => {
            assert!(error.to_string().contains("no cut that it could return to"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(world.run(root, order::RESET, 0, 0), call::FAILED);
    world.expect(root, FULL.gfn(1).gpa(), NEW);
    world.finish();
}

/// Discarded leaves, and leaves with more private pages than are restored in place.
fn a_whole_leaf_returns(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let world = &row.world;
        let child = fork_marked(world, row.parent);
        for round in 0..6 {
            if round % 2 == 0 {
                // With a page of its own the clone has tables of its own, once that is known.
                world.store(child, ALONE.gpa(), OTHER);
                world.check();
                world.tell(child, Order::Discard { first: FULL.first_gfn(), pages: 512 });
                world.expect(child, FULL.gfn(6).gpa(), 0);
            } else {
                world.store_pages(child, FULL.first_gfn(), 512, OTHER);
                world.store_pages(child, EMPTY.first_gfn(), 512, OTHER);
            }
            row.publish(row.parent);
            reset(world, child);
            world.expect(child, FULL.gfn(6).gpa(), OLD);
            world.expect(child, EMPTY.gfn(6).gpa(), 0);
        }
        world.check();
    });
}
