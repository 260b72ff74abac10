//! Hazards of the cut: what a protection does and does not do on a real kernel.

use std::sync::atomic::Ordering;

use super::devices::{Device, Engine};
use super::maps::{Map, maps};
use super::nursery::{Axes, Nursery, Vm};
use super::rows::{DEVICE, NEW, OLD, OTHER};
use crate::arena_files::ArenaKind;
use crate::space::{Backing, Keep};
use crate::words::{Gfn, LEAF_PAGES, LeafNumber, wide};

fn fill(vm: &Vm, leaves: std::ops::Range<u64>) {
    let pages = leaves.start * wide(LEAF_PAGES)..leaves.end * wide(LEAF_PAGES);
    pages.for_each(|page| vm.store(Gfn(page).gpa(), OLD));
}

#[test]
fn hazard_p1_pinned_pages_keep_their_place_and_devices_write_through_a_protection() {
    for axes in Axes::ALL {
        let Some(mut nursery) = Nursery::new("hazard_p1", axes, 8) else { return };
        let parent = nursery.first_vm();
        fill(&parent, 0..8);
        // Neighbours, the two sides of a leaf's border, and single ones.
        let pages = [9, 10, 11, 511, 512, 1300, 2600, 4095].map(Gfn);
        let mut devices: Vec<Device> =
            pages.iter().map(|gfn| Device::pin(&parent, *gfn, Engine::Kernel)).collect();
        pages.iter().for_each(|gfn| parent.set(*gfn, OLD));
        let frames: Vec<u64> = pages.iter().map(|gfn| parent.frame_number(*gfn)).collect();
        let (cut, figures) = nursery.cut(&parent);
        assert_eq!((figures.copied_pages, figures.protected_leaves), (8, 8));
        let child = nursery.clone_of(cut);
        devices.iter_mut().for_each(|device| device.write(DEVICE));
        assert_eq!(parent.space.counters().store_faults.load(Ordering::Relaxed), 0, "a device trapped");
        pages.iter().for_each(|gfn| assert_eq!(parent.get(*gfn), DEVICE));
        pages.iter().for_each(|gfn| parent.set(*gfn, NEW));
        devices.iter_mut().for_each(|device| assert_eq!(device.read(), NEW));
        // Stores to copied pages wait for nothing: not a leaf was forced for them.
        assert_eq!(parent.space.counters().blocks_published.load(Ordering::Relaxed), 0);
        pages.iter().for_each(|gfn| assert_eq!(child.get(*gfn), OLD, "{axes:?}"));
        nursery.publish_everything(Keep::Shared);
        devices.iter_mut().for_each(|device| device.write(OTHER));
        pages.iter().for_each(|gfn| assert_eq!((parent.get(*gfn), child.get(*gfn)), (OTHER, OLD)));
        let later: Vec<u64> = pages.iter().map(|gfn| parent.frame_number(*gfn)).collect();
        assert_eq!(later, frames, "a pinned page has moved: {axes:?}");
        nursery.check();
    }
}

#[test]
fn hazard_p2_a_leaf_taken_back_from_the_arena_is_protected_by_the_next_cut() {
    for axes in Axes::ALL {
        let Some(mut nursery) = Nursery::new("hazard_p2", axes, 6) else { return };
        let parent = nursery.first_vm();
        fill(&parent, 0..6);
        let first = nursery.fork(&parent);
        // Leaf 2 is dropped to the arena, 3 is discarded: the window has three kinds of mappings.
        parent.space.force(LeafNumber(2), Keep::Shared).expect("a force");
        parent.space.discard(LeafNumber(3).first_gfn(), wide(LEAF_PAGES)).expect("a discard");
        assert!(matches!(parent.space.backing(LeafNumber(2)), Backing::Block(_)), "{axes:?}");
        parent.set(LeafNumber(2).gfn(1), NEW);
        let second = nursery.fork(&parent);
        for leaf in (0..6).map(LeafNumber) {
            parent.set(leaf.gfn(1), OTHER);
        }
        for leaf in (0..6).map(LeafNumber) {
            let of_second = match leaf.0 {
                2 => NEW,
                3 => 0,
                _ => OLD,
            };
            assert_eq!(first.load(leaf.gfn(1).gpa()), OLD, "{axes:?} {leaf}");
            assert_eq!(second.load(leaf.gfn(1).gpa()), of_second, "{axes:?} {leaf}");
            assert_eq!(parent.load(leaf.gfn(1).gpa()), OTHER, "{axes:?} {leaf}");
        }
        nursery.publish_everything(Keep::Shared);
        nursery.check();
    }
}

#[test]
fn hazard_p3_untouched_page_written_after_the_cut_stays_zero_in_the_clone() {
    for axes in Axes::ALL {
        let Some(mut nursery) = Nursery::new("hazard_p3", axes, 4) else { return };
        let parent = nursery.first_vm();
        parent.set(Gfn(0), OLD);
        // Reads leave the zero page behind, which is nobody's own.
        assert_eq!((parent.get(Gfn(1)), parent.get(Gfn(512 * 2))), (0, 0));
        let child = nursery.fork(&parent);
        let untouched: Vec<Gfn> = [1, 2, 511, 512, 1024, 1025, 2047].map(Gfn).to_vec();
        untouched.iter().for_each(|gfn| parent.set(*gfn, NEW));
        untouched.iter().for_each(|gfn| assert_eq!(child.get(*gfn), 0, "{axes:?} {gfn}"));
        parent.publish_all(Keep::Shared);
        untouched.iter().for_each(|gfn| assert_eq!((parent.get(*gfn), child.get(*gfn)), (NEW, 0)));
        assert_eq!(child.get(Gfn(0)), OLD);
        nursery.check();
    }
}

fn huge_kib(vm: &Vm) -> u64 {
    maps(vm.window()).iter().map(|map| map.file_huge_kib).sum()
}

#[test]
fn hazard_p6_pure_arena_leaves_keep_their_huge_mappings_over_a_cut() {
    let Some(mut nursery) = Nursery::new("hazard_p6", Axes::HUGE, 8) else { return };
    if nursery.arena.kind() != ArenaKind::HugeTmpfs {
        println!("SKIPPED: hazard_p6: the arena has no huge pages here");
        return;
    }
    let parent = nursery.first_vm();
    fill(&parent, 0..8);
    let child = nursery.fork(&parent);
    (0..8).for_each(|leaf| assert_eq!(child.load(LeafNumber(leaf).gpa()), OLD));
    assert_eq!(huge_kib(&child), 8 * 2048);
    child.set(Gfn(3), NEW);
    assert_eq!(huge_kib(&child), 7 * 2048);
    let (cut, figures) = nursery.cut(&child);
    assert_eq!((figures.protected_leaves, huge_kib(&child)), (1, 7 * 2048));
    let grandchild = nursery.clone_of(cut);
    (0..8).for_each(|leaf| grandchild.touch(LeafNumber(leaf).gfn(3)));
    assert_eq!((grandchild.get(Gfn(3)), huge_kib(&child)), (NEW, 7 * 2048));
    assert_eq!(huge_kib(&grandchild), 7 * 2048);
    nursery.check();
}

#[test]
fn hazard_p18_and_p19_written_arena_leaves_are_protected_ahead_of_the_pause() {
    for axes in [Axes::HUGE, Axes::SMALL] {
        let Some(mut nursery) = Nursery::new("hazard_p18", axes, 16) else { return };
        let parent = nursery.first_vm();
        fill(&parent, 0..16);
        let child = nursery.fork(&parent);
        (0..16).for_each(|leaf| assert_eq!(child.load(LeafNumber(leaf).gpa()), OLD));
        for leaf in [1, 4, 9] {
            child.set(LeafNumber(leaf).gfn(7), NEW);
        }
        // All three ahead: nothing is left for the pause.
        let (cut, figures) = nursery.cut(&child);
        assert_eq!((figures.protected_leaves, figures.protect_calls), (3, 0), "{axes:?}");
        let grandchild = nursery.clone_of(cut);
        assert_eq!(grandchild.get(LeafNumber(9).gfn(7)), NEW);
        // One of them is opened again between the reservation and the pause, and its neighbour written:
        // one call for both.
        let (_, figures) = nursery.cut_with(&child, || {
            child.set(LeafNumber(4).gfn(7), OTHER);
            child.set(LeafNumber(5).gfn(7), OTHER);
        });
        assert_eq!((figures.protected_leaves, figures.protect_calls), (4, 1), "{axes:?}");
        // Anonymous memory: one call for each run, whatever is in it.
        let (_, figures) = nursery.cut(&parent);
        assert_eq!((figures.protected_leaves, figures.protect_calls), (16, 1), "{axes:?}");
    }
}

#[test]
fn hazard_q2_a_lent_set_is_recorded_ahead_of_the_next_cut() {
    for axes in Axes::ALL {
        let Some(mut nursery) = Nursery::new("hazard_q2", axes, 2) else { return };
        let parent = nursery.first_vm();
        (0..100).for_each(|page| parent.set(Gfn(page), OLD));
        let first = nursery.fork(&parent);
        // Never touched before: no trap, nothing is forced.
        (600..700).for_each(|page| parent.set(Gfn(page), NEW));
        (100..200).for_each(|page| parent.set(Gfn(page), if axes.is_huge { OLD } else { NEW }));
        let second = nursery.fork(&parent);
        (700..800).for_each(|page| parent.set(Gfn(page), OTHER));
        parent.publish_all(Keep::Own);
        let pages = |vm: &Vm| [50, 650, 750].map(|page| vm.get(Gfn(page)));
        assert_eq!(pages(&first), [OLD, 0, 0], "{axes:?}");
        assert_eq!(pages(&second), [OLD, NEW, 0], "{axes:?}");
        assert_eq!(pages(&parent), [OLD, NEW, OTHER], "{axes:?}");
        nursery.check();
    }
}

#[test]
fn hazard_q2_no_mapping_of_a_window_is_for_children() {
    for axes in Axes::ALL {
        let Some(mut nursery) = Nursery::new("hazard_q2", axes, 6) else { return };
        let parent = nursery.first_vm();
        fill(&parent, 0..4);
        let child = nursery.fork(&parent);
        parent.publish_all(Keep::Shared);
        child.set(Gfn(3), NEW);
        child.space.discard(LeafNumber(1).first_gfn(), wide(LEAF_PAGES)).expect("a discard");
        // With patches: a mapping prepared aside and moved in.
        let grandchild = nursery.fork(&child);
        for vm in [&parent, &child, &grandchild] {
            (0..6).for_each(|leaf| vm.touch(LeafNumber(leaf).gfn(3)));
            let kept = Map::is_kept_from_children;
            let given: Vec<Map> = maps(vm.window()).into_iter().filter(|map| !kept(map)).collect();
            assert!(given.is_empty(), "{axes:?}: {given:x?}");
            let covered: u64 = maps(vm.window()).iter().map(|map| map.end - map.start).sum();
            assert_eq!(covered, vm.window().shape().span_bytes(), "the window has holes");
        }
        assert!(child.space.counters().patches_published.load(Ordering::Relaxed) > 0);
        nursery.check();
    }
}
