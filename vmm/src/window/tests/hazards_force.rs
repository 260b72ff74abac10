//! Hazards of publication: blocks, patches, waiters, and what happens when the arena is full or a
//! source dies.
#![expect(unsafe_code, reason = "hands pages to pipes by their raw addresses")]

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::devices::{Device, Engine};
use super::nursery::{Axes, Nursery, Vm};
use super::rows::{DEVICE, NEW, OLD, OTHER};
use crate::space::{Access, Backing, Keep, SpaceError};
use crate::words::{Gfn, Gpa, LEAF_BYTES, LEAF_PAGES, LeafNumber, PAGE_BYTES, wide};

fn fill(vm: &Vm, leaves: u64) {
    (0..leaves * wide(LEAF_PAGES)).for_each(|page| vm.store(Gfn(page).gpa(), OLD));
}

/// Whether the kernel can read a page, where a thread that read it itself would be killed.
fn is_readable(vm: &Vm, gfn: Gfn) -> bool {
    let (_source, sink) = rustix::pipe::pipe().expect("a pipe");
    let address = vm.window().host_address(gfn.gpa()).as_ptr();
    // SAFETY: the page lies in the window; what the kernel cannot read it reports.
    let count = unsafe { libc::write(sink.as_raw_fd(), address.cast(), PAGE_BYTES) };
    count == 4096
}

/// Hands a page to a pipe without copying it.
fn splice(vm: &Vm, gfn: Gfn) -> OwnedFd {
    let (source, sink) = rustix::pipe::pipe().expect("a pipe");
    let address = vm.window().host_address(gfn.gpa()).as_ptr();
    let vector = libc::iovec { iov_base: address.cast(), iov_len: PAGE_BYTES };
    // SAFETY: the page lies in the window, and the kernel takes a reference of its own on its frame.
    let count = unsafe { libc::vmsplice(sink.as_raw_fd(), &raw const vector, 1, 0) };
    assert_eq!(count, 4096, "vmsplice");
    source
}

fn read_word(pipe: &OwnedFd) -> u64 {
    let mut page = [0; PAGE_BYTES];
    assert_eq!(rustix::io::read(pipe, &mut page).expect("a pipe"), PAGE_BYTES);
    u64::from_ne_bytes(page[..8].try_into().expect("8 bytes"))
}

#[test]
fn hazard_p4_a_full_arena_loses_the_leaf_for_the_clone_and_shows_nothing_half() {
    // Room for two blocks and a little.
    let budget_bytes = 5 * wide(LEAF_BYTES) / 2;
    let axes = Axes { is_huge: false, ..Axes::HUGE };
    for arena in [axes.arena, crate::arena_files::ArenaChoice::SmallPages] {
        let axes = Axes { arena, ..axes };
        let Some(mut nursery) = Nursery::with_budget("hazard_p4", axes, 4, budget_bytes) else { return };
        if nursery.arena.kind() == crate::arena_files::ArenaKind::Memfd {
            println!("SKIPPED: hazard_p4: a memfd has no budget");
            return;
        }
        let parent = nursery.first_vm();
        fill(&parent, 4);
        let child = nursery.fork(&parent);
        parent.publish_all(Keep::Own);
        let pages = [0, 1, 2, 3].map(|leaf| LeafNumber(leaf).gfn(500));
        let is_there = pages.map(|gfn| is_readable(&child, gfn));
        assert_eq!(is_there.iter().filter(|is_there| **is_there).count(), 2, "{is_there:?}");
        for (gfn, is_there) in pages.into_iter().zip(is_there) {
            let backing = child.backing(gfn);
            if is_there {
                assert_eq!(child.load(gfn.gpa()), OLD);
            } else {
                assert_eq!(backing, Backing::Lost, "{gfn}");
            }
        }
        // Who waited is freed before the failure is told: all are told once the threads have ended.
        child.stop_threads();
        let failures = child.take_failures();
        assert!(failures.iter().all(|error| matches!(error, SpaceError::Lost { .. })), "{failures:?}");
        assert_eq!(failures.len(), 2);
        // The source goes on, and what could not be written is no part of the arena.
        pages.iter().for_each(|gfn| assert_eq!(parent.load(gfn.gpa()), OLD));
        pages.iter().for_each(|gfn| parent.store(gfn.gpa(), NEW));
        pages.iter().for_each(|gfn| assert_eq!(parent.load(gfn.gpa()), NEW));
        assert!(nursery.arena.used_bytes().expect("use") <= 2 * wide(LEAF_BYTES));
        nursery.exit(child);
        nursery.check();
        nursery.exit(parent);
        assert_eq!(nursery.arena.used_bytes().expect("use"), 0, "the blocks are given back");
    }
}

#[test]
fn hazard_p9_a_clone_of_a_clone_that_knows_nothing_waits_for_nobody_in_a_circle() {
    for axes in Axes::ALL {
        let Some(mut nursery) = Nursery::new("hazard_p9", axes, 4) else { return };
        let parent = nursery.first_vm();
        fill(&parent, 2);
        let child = nursery.fork(&parent);
        let grandchild = nursery.fork(&child);
        // The clone publishes before it knows its own leaves: it reads nothing through its window.
        child.publish_all(Keep::Shared);
        assert_eq!(child.space.counters().blocks_published.load(Ordering::Relaxed), 0);
        let last = nursery.fork(&grandchild);
        last.set(Gfn(7), NEW);
        assert_eq!((last.load(Gfn(8).gpa()), grandchild.load(Gfn(7).gpa())), (OLD, OLD));
        assert_eq!((child.load(Gfn(7).gpa()), parent.load(Gfn(7).gpa())), (OLD, OLD));
        nursery.check();
    }
}

#[test]
fn hazard_p9_a_pin_on_a_lent_page_and_a_discard_of_one_force_first() {
    for axes in Axes::ALL {
        let Some(mut nursery) = Nursery::new("hazard_p9", axes, 4) else { return };
        let parent = nursery.first_vm();
        fill(&parent, 3);
        let child = nursery.fork(&parent);
        let frame = parent.frame_number(Gfn(5));
        let mut device = Device::pin(&parent, Gfn(5), Engine::Kernel);
        assert_eq!(parent.frame_number(Gfn(5)), frame, "a lent page is pinned where it is");
        device.write(DEVICE);
        parent.space.discard(Gfn(512), wide(LEAF_PAGES)).expect("a discard");
        parent.space.discard(Gfn(1024 + 5), 1).expect("a discard");
        assert_eq!((child.load(Gfn(5).gpa()), parent.get(Gfn(5))), (OLD, DEVICE));
        for gfn in [Gfn(512 + 9), Gfn(1024 + 5)] {
            assert_eq!((child.load(gfn.gpa()), parent.get(gfn)), (OLD, 0), "{axes:?} {gfn}");
        }
        nursery.check();
    }
}

#[test]
fn hazard_p9_a_clone_is_torn_down_with_a_thread_in_a_fault() {
    let Some(mut nursery) = Nursery::new("hazard_p9", Axes::HUGE, 2) else { return };
    let parent = nursery.first_vm();
    fill(&parent, 1);
    let child = nursery.fork(&parent);
    // The source answers no request any more: the clone's thread waits in its fault.
    parent.stop_threads();
    let waiter = std::thread::spawn({
        let child = Arc::clone(&child);
        move || child.load(Gpa(64))
    });
    let doorbell = nursery.board.member(parent.slot).doorbell();
    let rung = doorbell.load(Ordering::Acquire);
    while doorbell.load(Ordering::Acquire) == rung && !waiter.is_finished() {
        std::thread::yield_now();
    }
    child.stop_threads();
    let failures = child.take_failures();
    assert!(failures.iter().all(|error| matches!(error, SpaceError::Stopping)), "{failures:?}");
    // Unregistering wakes: what the thread then reads is no VM's any more.
    let leaves = nursery.shape.span_leaves();
    let window = child.window();
    window.userfault().unregister(window.hosts(LeafNumber(0), leaves)).expect("unregistering");
    waiter.join().expect("the waiter");
}

#[test]
fn hazard_p10_a_punched_block_keeps_its_bytes_in_a_pipe() {
    for axes in Axes::ALL {
        let Some(mut nursery) = Nursery::new("hazard_p10", axes, 2) else { return };
        let parent = nursery.first_vm();
        fill(&parent, 2);
        parent.set(Gfn(5), OLD);
        // B1, and B2 beside it.
        let child = nursery.fork(&parent);
        assert_eq!(child.get(Gfn(5)), OLD);
        let (of_child, of_parent) = (splice(&child, Gfn(5)), splice(&parent, Gfn(6)));
        child.space.discard(Gfn(0), wide(LEAF_PAGES)).expect("a discard");
        parent.set(Gfn(5), NEW);
        child.set(Gfn(6), OTHER);
        nursery.exit(child);
        nursery.check();
        // New cuts: none of them writes where the punched block was.
        for _ in 0..3 {
            let other = nursery.fork(&parent);
            parent.set(Gfn(5), OTHER);
            assert_eq!(other.load(Gfn(7).gpa()), OLD);
            nursery.exit(other);
        }
        assert_eq!((read_word(&of_child), read_word(&of_parent)), (OLD, OLD), "{axes:?}");
        nursery.check();
    }
}

#[test]
fn hazard_p12_and_p15_few_written_pages_become_patches() {
    for axes in Axes::ALL {
        let Some(mut nursery) = Nursery::new("hazard_p15", axes, 4) else { return };
        let parent = nursery.first_vm();
        fill(&parent, 3);
        let child = nursery.fork(&parent);
        [0, 7, 511, 512 + 3].map(Gfn).iter().for_each(|gfn| child.set(*gfn, NEW));
        (1024..1024 + 9).map(Gfn).for_each(|gfn| child.set(gfn, NEW));
        let mut device = Device::pin(&child, Gfn(9), Engine::Kernel);
        let grandchild = nursery.fork(&child);
        device.write(DEVICE);
        child.set(Gfn(7), OTHER);
        child.set(Gfn(100), OTHER);
        child.publish_all(Keep::Shared);
        let counters = child.space.counters();
        let published = counters.patches_published.load(Ordering::Relaxed);
        // Four pages and the pinned one; nine are a block.
        assert_eq!((published, counters.blocks_published.load(Ordering::Relaxed)), (5, 1), "{axes:?}");
        [0, 7, 511, 515, 1024, 1032].map(Gfn).iter().for_each(|gfn| assert_eq!(grandchild.get(*gfn), NEW));
        [1, 9, 100, 512, 1033].map(Gfn).iter().for_each(|gfn| {
            assert_eq!(grandchild.load(gfn.gpa()), OLD, "{axes:?} {gfn}");
        });
        assert_eq!([7, 9, 100].map(|page| child.get(Gfn(page))), [OTHER, DEVICE, OTHER]);
        // One more generation: patches over patches, and the leaf that was not touched again.
        grandchild.set(Gfn(7), DEVICE);
        let last = nursery.fork(&grandchild);
        grandchild.set(Gfn(0), OTHER);
        assert_eq!([0, 7, 511].map(|page| last.get(Gfn(page))), [NEW, DEVICE, NEW], "{axes:?}");
        assert_eq!([512 + 3, 1024].map(|page| last.get(Gfn(page))), [NEW, NEW], "{axes:?}");
        nursery.check();
    }
}

#[test]
fn hazard_p16_a_pin_that_ends_in_the_pause_takes_no_bytes_with_it() {
    for axes in Axes::ALL {
        let Some(mut nursery) = Nursery::new("hazard_p16", axes, 2) else { return };
        let parent = nursery.first_vm();
        fill(&parent, 1);
        parent.set(Gfn(5), OLD);
        let mut device = Device::pin(&parent, Gfn(5), Engine::Kernel);
        let child = nursery.fork(&parent);
        device.write(DEVICE);
        drop(device);
        // Lent to nobody's knowledge: the copy is the cut's, the bytes in place are the source's.
        let second = nursery.fork(&parent);
        parent.space.discard(Gfn(5), 1).expect("a discard");
        assert_eq!([child.get(Gfn(5)), second.get(Gfn(5)), parent.get(Gfn(5))], [OLD, DEVICE, 0], "{axes:?}");
        nursery.check();
    }
}

#[test]
fn hazard_p17_a_second_generation_sees_no_older_frame() {
    for axes in Axes::ALL {
        let Some(mut nursery) = Nursery::new("hazard_p17", axes, 2) else { return };
        let parent = nursery.first_vm();
        fill(&parent, 2);
        let mut line = vec![parent];
        for generation in 0..4 {
            let source = Arc::clone(line.last().expect("a line"));
            // The leaf's older block is in the page cache of every window of the line by now.
            line.iter().for_each(|vm| vm.touch(Gfn(3)));
            (0..20).for_each(|page| source.set(Gfn(page), 0x1000 + generation));
            let child = nursery.fork(&source);
            source.set(Gfn(3), 0x2000 + generation);
            line.push(child);
        }
        for (generation, vm) in (0..).zip(&line) {
            let own = if generation < 4 { 0x2000 + generation } else { 0x1003 };
            assert_eq!(vm.get(Gfn(3)), own, "{axes:?} {generation}");
            assert_eq!(vm.load(Gfn(700).gpa()), OLD);
        }
        nursery.check();
    }
}

#[test]
fn hazard_q1_poison_frees_who_waits_for_a_source_that_was_killed() {
    for axes in Axes::ALL {
        let Some(mut nursery) = Nursery::new("hazard_q1", axes, 4) else { return };
        let parent = nursery.first_vm();
        fill(&parent, 3);
        let child = nursery.fork(&parent);
        assert_eq!(child.load(Gfn(5).gpa()), OLD);
        let grandchild = nursery.fork(&child);
        // The source answers nobody: a reader of the second leaf waits, until it is killed.
        parent.stop_threads();
        let doorbell = nursery.board.member(parent.slot).doorbell();
        let rung = doorbell.load(Ordering::Acquire);
        let waiter = std::thread::spawn({
            let child = Arc::clone(&child);
            move || is_readable(&child, Gfn(600))
        });
        while doorbell.load(Ordering::Acquire) == rung {
            std::thread::yield_now();
        }
        nursery.kill(parent);
        assert!(!waiter.join().expect("the waiter"), "{axes:?}: lost bytes were read");
        assert!(!is_readable(&grandchild, Gfn(600)) && !is_readable(&grandchild, Gfn(1100)));
        // What was published lives on.
        assert_eq!((child.load(Gfn(6).gpa()), grandchild.load(Gfn(6).gpa())), (OLD, OLD));
        let error = child.space.pin(Gfn(600), 1, Access::Read).expect_err("lost");
        assert!(matches!(error, SpaceError::Lost { .. }), "{error}");
        for vm in [&child, &grandchild] {
            vm.stop_threads();
            let failures = vm.take_failures();
            assert!(!failures.is_empty());
            assert!(failures.iter().all(|error| matches!(error, SpaceError::Lost { .. })), "{failures:?}");
        }
        nursery.check();
    }
}
