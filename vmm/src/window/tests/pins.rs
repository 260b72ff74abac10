//! Rows C of the conformance table: pins.

use std::sync::Arc;

use super::devices::{Device, Engine};
use super::rows::{DEVICE, NEW, OTHER, run};
use crate::space::{Access, Keep, SpaceError};
use crate::words::Gfn;

#[test]
fn c1_stores_under_protection_reach_the_device() {
    run("c1", |row| {
        let mut device = Device::pin(&row.parent, row.gfn, row.engine);
        let frame = row.parent.frame_number(row.gfn);
        row.fork();
        row.parent.set(row.gfn, NEW);
        assert_eq!(device.read(), NEW, "{}", row.point);
        assert_eq!(row.parent.frame_number(row.gfn), frame, "{}", row.point);
    });
}

#[test]
fn c2_the_source_writes_what_it_pinned() {
    run("c2", |row| {
        let mut device = Device::pin(&row.parent, row.gfn, row.engine);
        let child = row.fork_and_publish();
        row.parent.set(row.gfn, NEW);
        assert_eq!(device.read(), NEW, "{}", row.point);
        row.expect(&child, row.old);
    });
}

#[test]
fn c3_the_clone_writes_what_the_source_pinned() {
    run("c3", |row| {
        let mut device = Device::pin(&row.parent, row.gfn, row.engine);
        let child = row.fork_and_publish();
        child.set(row.gfn, NEW);
        assert_eq!(device.read(), row.old, "{}", row.point);
        row.expect(&row.parent, row.old);
    });
}

#[test]
fn c4_the_device_writes_after_the_cut() {
    run("c4", |row| {
        let mut device = Device::pin(&row.parent, row.gfn, row.engine);
        let child = row.fork_and_publish();
        device.write(DEVICE);
        row.expect(&row.parent, DEVICE);
        row.expect(&child, row.old);
        assert_eq!(row.parent.space.pinned(), (1, 1));
    });
}

#[test]
fn c5_exactly_the_pinned_pages_are_copied() {
    run("c5", |row| {
        let pages = [Gfn(3), Gfn(4), Gfn(5), Gfn(200), Gfn(512 + 8), Gfn(1024 + 40)];
        let devices: Vec<_> = pages.iter().map(|gfn| Device::pin(&row.parent, *gfn, row.engine)).collect();
        let parent = Arc::clone(&row.parent);
        let (cut, figures) = row.nursery.cut(&parent);
        assert_eq!(figures.copied_pages, 6, "{}", row.point);
        let child = row.nursery.clone_of(cut);
        row.publish(&row.parent);
        for mut device in devices {
            device.write(DEVICE);
        }
        for gfn in pages {
            let old = if gfn.0 < 1024 { super::rows::OLD } else { 0 };
            assert_eq!((row.parent.get(gfn), child.get(gfn)), (DEVICE, old), "{gfn} {}", row.point);
        }
    });
}

#[test]
fn c6_a_pin_that_has_ended_costs_nothing() {
    run("c6", |row| {
        let device = Device::pin(&row.parent, row.gfn, row.engine);
        let first = row.fork_and_publish();
        drop(device);
        let parent = Arc::clone(&row.parent);
        let (cut, figures) = row.nursery.cut(&parent);
        assert_eq!(figures.copied_pages, 0);
        let second = row.nursery.clone_of(cut);
        row.parent.set(row.gfn, NEW);
        row.publish(&row.parent);
        row.expect(&first, row.old);
        row.expect(&second, row.old);
        row.expect(&row.parent, NEW);
    });
}

/// The page was copied for the first cut and then stored to, which takes the protection off that
/// page alone: the second cut must protect it again.
#[test]
fn c6_a_page_stored_to_while_pinned_is_protected_by_the_next_cut() {
    run("c6", |row| {
        let device = Device::pin(&row.parent, row.gfn, row.engine);
        let first = row.fork();
        row.parent.set(row.gfn, NEW);
        drop(device);
        let second = row.fork();
        row.parent.set(row.gfn, OTHER);
        row.publish(&row.parent);
        row.expect(&second, NEW);
        row.expect(&first, row.old);
        row.expect(&row.parent, OTHER);
    });
}

/// What a device wrote after the cut passed the protection: the leaf looks untouched, and must not be
/// dropped for the block, which has the copy made at the cut.
#[test]
fn c6_what_a_device_wrote_after_the_cut_survives_a_drop() {
    run("c6", |row| {
        let mut device = Device::pin(&row.parent, row.gfn, Engine::Kernel);
        let child = row.fork();
        device.write(DEVICE);
        drop(device);
        row.parent.publish_all(Keep::Shared);
        row.expect(&row.parent, DEVICE);
        row.expect(&child, row.old);
    });
}

#[test]
fn c7_the_source_pins_a_shared_page() {
    run("c7", |row| {
        let child = row.fork_and_publish();
        let mut device = Device::pin(&row.parent, row.gfn, row.engine);
        device.write(DEVICE);
        row.expect(&row.parent, DEVICE);
        row.expect(&child, row.old);
    });
}

#[test]
fn c8_the_clone_pins_a_shared_page() {
    run("c8", |row| {
        let child = row.fork_and_publish();
        let mut device = Device::pin(&child, row.gfn, row.engine);
        device.write(DEVICE);
        row.expect(&row.parent, row.old);
        row.expect(&child, DEVICE);
    });
}

#[test]
fn c9_both_pin_the_same_page() {
    run("c9", |row| {
        let child = row.fork_and_publish();
        let mut of_child = Device::pin(&child, row.gfn, row.engine);
        let mut of_parent = Device::pin(&row.parent, row.gfn, row.engine);
        of_child.write(DEVICE);
        of_parent.write(OTHER);
        assert_eq!((of_child.read(), of_parent.read()), (DEVICE, OTHER), "{}", row.point);
        row.expect(&row.parent, OTHER);
        row.expect(&child, DEVICE);
    });
}

#[test]
fn c10_pins_are_counted() {
    run("c10", |row| {
        let mut first = Device::pin(&row.parent, row.gfn, row.engine);
        let second = Device::pin(&row.parent, row.gfn, row.engine);
        drop(second);
        let child = row.fork_and_publish();
        first.write(DEVICE);
        row.expect(&row.parent, DEVICE);
        row.expect(&child, row.old);
    });
}

#[test]
fn c11_what_cannot_be_pinned_changes_nothing() {
    run("c11", |row| {
        let space = &row.parent.space;
        let error = space.unpin(row.gfn, 1).expect_err("not pinned");
        assert!(matches!(error, SpaceError::NotPinned { gfn } if gfn == row.gfn), "{error}");
        let error = space.pin(Gfn(2040), 9, Access::Read).expect_err("beyond the end");
        assert!(matches!(error, SpaceError::NotMemory { gfn: Gfn(2048) }), "{error}");
        assert_eq!(space.pinned(), (0, 0));
    });
}

#[test]
fn c14_a_pinned_page_is_not_discarded() {
    run("c14", |row| {
        let mut device = Device::pin(&row.parent, row.gfn, row.engine);
        let error = row.parent.space.discard(row.gfn, 1).expect_err("pinned");
        assert!(matches!(error, SpaceError::Pinned { gfn } if gfn == row.gfn), "{error}");
        device.write(DEVICE);
        row.expect(&row.parent, DEVICE);
    });
}

#[test]
fn c16_a_pin_on_a_lent_page() {
    run("c16", |row| {
        let child = row.fork();
        let mut device = Device::pin(&row.parent, row.gfn, row.engine);
        device.write(DEVICE);
        row.expect(&row.parent, DEVICE);
        row.expect(&child, row.old);
        let (grandchild, gone) = (row.nursery.fork(&child), row.nursery.fork(&child));
        row.nursery.exit(gone);
        row.nursery.exit(grandchild);
        let mut late = Device::pin(&child, row.gfn, row.engine);
        late.write(OTHER);
        row.expect(&child, OTHER);
        row.expect(&row.parent, DEVICE);
    });
}

#[test]
fn f4_a_pinned_page_of_a_clone_is_copied_for_its_clone() {
    run("f4", |row| {
        let child = row.fork_and_publish();
        let mut device = Device::pin(&child, row.gfn, row.engine);
        device.write(DEVICE);
        let grandchild = row.nursery.fork(&child);
        row.publish(&child);
        device.write(OTHER);
        row.expect(&row.parent, row.old);
        row.expect(&child, OTHER);
        row.expect(&grandchild, DEVICE);
    });
}
