//! VMs that are forked again and again: while they stand still, without another cut; and while they go
//! on, without publishing again what has been published.

use salp::keeper::member_handle::MemberState;
use salp::member::messages::{GuestKind, Order, Publication};
use salp::space::Keep;
use salp::words::Gfn;
use salp_tests::row::{EMPTY, FULL, NEW, OLD, OTHER, write_memory};
use salp_tests::world::{LIMIT, Setup, World};

// KVM alone: a thread guest is not stopped by anything, so that it never stands still.

#[test]
fn a_paused_vm_is_cut_once() {
    let Some(world) = World::new("a_paused_vm_is_cut_once", GuestKind::Kvm, &Setup::default()) else {
        return;
    };
    let root = world.root();
    write_memory(&world, root);
    world.colony.pause(root).expect("it stops");
    assert!(world.colony.is_paused(root).expect("it is there"));
    let first = world.fork_many(root, 2);
    let second = world.fork_many(root, 1);
    assert_eq!(first.cut, second.cut, "the cut is used again");
    world.publish_all(root, Keep::Own);
    // Settled by now, and held.
    let third = world.fork_many(root, 1);
    assert_eq!(first.cut, third.cut, "the cut is used again");
    for clone in first.clones.iter().chain(&second.clones).chain(&third.clones) {
        world.expect(clone.vm, FULL.gfn(7).gpa(), OLD);
        world.store(clone.vm, FULL.gfn(7).gpa(), NEW + u64::from(clone.vm.0));
        world.expect(clone.vm, EMPTY.gfn(7).gpa(), 0);
    }
    for clone in first.clones.iter().chain(&second.clones).chain(&third.clones) {
        world.expect(clone.vm, FULL.gfn(7).gpa(), NEW + u64::from(clone.vm.0));
    }
    // The checker stops and resumes those that run, not those that stand still.
    world.check();
    assert_eq!(world.fork_many(root, 1).cut, first.cut);
    world.colony.resume(root).expect("it goes on");
    world.expect(root, FULL.gfn(7).gpa(), OLD);
    world.finish();
}

#[test]
fn what_may_change_a_vm_ends_its_stillness() {
    let Some(world) =
        World::new("what_may_change_a_vm_ends_its_stillness", GuestKind::Kvm, &Setup::default())
    else {
        return;
    };
    let root = world.root();
    write_memory(&world, root);
    world.colony.pause(root).expect("it stops");
    let first = world.fork_many(root, 1);
    world.tell(root, Order::Discard { first: FULL.gfn(9), pages: 1 });
    let second = world.fork_many(root, 1);
    assert_ne!(first.cut, second.cut);
    world.expect(first.clones[0].vm, FULL.gfn(9).gpa(), OLD);
    world.expect(second.clones[0].vm, FULL.gfn(9).gpa(), 0);
    world.colony.resume(root).expect("it goes on");
    world.store(root, FULL.gfn(9).gpa(), OTHER);
    let third = world.fork_many(root, 1);
    assert_ne!(second.cut, third.cut);
    // It ran: the next is another one too.
    let fourth = world.fork_many(root, 1);
    assert_ne!(third.cut, fourth.cut);
    world.expect(fourth.clones[0].vm, FULL.gfn(9).gpa(), OTHER);
    world.finish();
}

/// The cut that is held for further clones goes with its source, and with the source's process.
#[test]
fn a_paused_vm_ends_with_its_cut() {
    let Some(world) = World::new("a_paused_vm_ends_with_its_cut", GuestKind::Kvm, &Setup::default()) else {
        return;
    };
    let root = world.root();
    write_memory(&world, root);
    world.colony.pause(root).expect("it stops");
    let clone = world.fork(root);
    world.publish_all(root, Keep::Own);
    world.end(root);
    world.expect(clone, FULL.gfn(3).gpa(), OLD);
    world.colony.pause(clone).expect("it stops");
    let other = world.fork(clone);
    world.publish_all(clone, Keep::Own);
    let gone = world.member(clone);
    world.colony.kill(clone).expect("it is there");
    gone.wait_end();
    world.colony.settle();
    world.expect(other, FULL.gfn(3).gpa(), OLD);
    world.finish();
}

/// From its second cut on a source shares: each further fork costs the arena what was written since.
#[test]
fn a_vm_that_is_forked_again_and_again_is_not_published_again() {
    const MIB: u64 = 1 << 20;
    const WRITTEN_PAGES: u64 = 12 * 512;
    let test = "a_vm_that_is_forked_again_and_again_is_not_published_again";
    let publication = Publication { in_background: true, keep: Keep::Own, keep_later: Keep::Shared };
    let setup = Setup { memory_mib: 32, publication, ..Setup::default() };
    let Some(world) = World::alone(test, GuestKind::Kvm, &setup) else { return };
    let root = world.root();
    let first = Gfn(1024);
    world.store_pages(root, first, WRITTEN_PAGES, OLD);
    let mut used = Vec::new();
    for round in 0..5 {
        world.store(root, first.gpa(), NEW + round);
        let forked = world.fork_many(root, 1);
        let is_finished = |state: &mut MemberState| state.finished_cuts.contains(&forked.cut).then_some(());
        world.member(root).wait_for(LIMIT, is_finished).expect("it publishes all");
        used.push(world.usage().1);
        let clone = forked.clones[0].vm;
        world.expect(clone, first.gpa(), NEW + round);
        world.expect(clone, Gfn(first.0 + WRITTEN_PAGES - 1).gpa(), OLD);
    }
    // The second cut is the one that takes the source's own copies into the arena.
    for pair in used[1..].windows(2) {
        // Patches, and the leaves that the built-in guest writes for itself.
        assert!(pair[1] - pair[0] <= 8 * MIB, "bytes in the arena after each fork: {used:?}");
    }
    world.finish();
}
