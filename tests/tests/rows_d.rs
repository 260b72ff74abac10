//! Rows D of the conformance table: pins to read. The device must see what the VM stores later.

use salp::member::messages::GuestKind;
use salp_tests::axes::PINNED;
use salp_tests::both_guests;
use salp_tests::row::{NEW, OTHER, attempt, run};

both_guests! {
    d1_the_source_pins_a_shared_page;
    d2_the_source_pins_when_the_clone_is_gone;
    d3_a_pinned_page_is_not_copied;
    d4_the_source_is_forked_with_the_pin;
    d5_a_page_restored_from_a_file;
}

fn d1_the_source_pins_a_shared_page(test: &str, guest: GuestKind) {
    run(test, guest, PINNED, |row| {
        let child = row.fork_and_publish();
        row.pin_to_read(row.parent);
        row.expect_device(row.parent, row.old);
        row.store(row.parent, NEW);
        row.expect_device(row.parent, NEW);
        row.expect(child, row.old);
        row.unpin(row.parent);
    });
}

fn d2_the_source_pins_when_the_clone_is_gone(test: &str, guest: GuestKind) {
    run(test, guest, PINNED, |row| {
        let child = row.fork_and_publish();
        row.world.end(child);
        row.pin_to_read(row.parent);
        row.store(row.parent, NEW);
        row.expect_device(row.parent, NEW);
        row.unpin(row.parent);
    });
}

fn d3_a_pinned_page_is_not_copied(test: &str, guest: GuestKind) {
    run(test, guest, PINNED, |row| {
        row.store(row.parent, row.old);
        row.pin_to_read(row.parent);
        let frame = row.frame(row.parent);
        let child = row.fork();
        let blocks = row.world.describe(row.parent).blocks_published;
        row.store(row.parent, NEW);
        row.expect_device(row.parent, NEW);
        assert_eq!(row.frame(row.parent), frame, "the page was moved: {}", row.point);
        let published = row.world.describe(row.parent).blocks_published - blocks;
        if guest == GuestKind::Thread {
            assert_eq!(published, 0, "the store waited for a block: {}", row.point);
        }
        row.expect(child, row.old);
        row.unpin(row.parent);
    });
}

fn d4_the_source_is_forked_with_the_pin(test: &str, guest: GuestKind) {
    run(test, guest, PINNED, |row| {
        row.pin_to_read(row.parent);
        let child = row.fork_and_publish();
        row.store(row.parent, NEW);
        row.expect_device(row.parent, NEW);
        row.expect(child, row.old);
        // Once more, with what the clones have published by now.
        let second = row.fork_and_publish();
        row.store(row.parent, OTHER);
        row.expect_device(row.parent, OTHER);
        row.expect(second, NEW);
        row.expect(child, row.old);
        row.unpin(row.parent);
    });
}

/// There is no file that a VM could be restored from yet.
fn d5_a_page_restored_from_a_file(test: &str, guest: GuestKind) {
    attempt(test, guest, &[], |_| Err("no snapshots yet".to_owned()));
}
