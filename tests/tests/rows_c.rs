//! Rows C of the conformance table: read-write pins. The device is the test itself, through the
//! member: it loads and stores where pages are pinned.

use salp::keeper::ColonyError;
use salp::member::messages::{GuestKind, Order, Reply};
use salp::words::Gfn;
use salp_tests::axes::{Forced, LEVEL, LEVEL_AND_PIN, PINNED, Point, Source};
use salp_tests::both_guests;
use salp_tests::row::{DEVICE, EMPTY, FULL, NEW, OLD, OTHER, SPARSE, at, run, write_memory};
use salp_tests::world::{Setup, World};

both_guests! {
    c1_a_store_under_protection_reaches_the_device;
    c2_the_source_writes_what_it_pinned;
    c3_the_clone_writes_what_the_source_pinned;
    c4_the_device_writes_after_the_cut;
    c5_no_pinned_page;
    c5_one_pinned_page;
    c5_a_thousand_adjacent_pages;
    c5_a_thousand_scattered_pages;
    c6_a_pin_that_has_ended_costs_nothing;
    c7_the_source_pins_a_shared_page;
    c8_the_clone_pins_a_shared_page;
    c9_both_pin_the_same_page;
    c10_pins_are_counted;
    c11_what_cannot_be_pinned_changes_nothing;
    c12_a_never_touched_page;
    c13_the_source_ends_with_the_pin_held;
    c14_what_is_pinned_is_not_given_up;
    c15_everything_is_pinned;
    c16_a_pin_on_a_lent_page;
    c16_a_pin_when_the_clone_is_gone;
}

fn c1_a_store_under_protection_reaches_the_device(test: &str, guest: GuestKind) {
    run(test, guest, PINNED, |row| {
        row.pin(row.parent);
        let frame = row.frame(row.parent);
        row.fork();
        row.store(row.parent, NEW);
        row.expect_device(row.parent, NEW);
        assert_eq!(row.frame(row.parent), frame, "the page was moved: {}", row.point);
        let described = row.world.describe(row.parent);
        assert_eq!(described.patches_published, 0, "{}", row.point);
        row.unpin(row.parent);
    });
}

fn c2_the_source_writes_what_it_pinned(test: &str, guest: GuestKind) {
    run(test, guest, PINNED, |row| {
        row.pin(row.parent);
        let child = row.fork_and_publish();
        row.store(row.parent, NEW);
        row.expect_device(row.parent, NEW);
        row.expect(row.parent, NEW);
        row.expect(child, row.old);
        row.unpin(row.parent);
    });
}

fn c3_the_clone_writes_what_the_source_pinned(test: &str, guest: GuestKind) {
    run(test, guest, PINNED, |row| {
        row.pin(row.parent);
        let child = row.fork_and_publish();
        row.store(child, NEW);
        row.expect_device(row.parent, row.old);
        row.expect(row.parent, row.old);
        row.expect(child, NEW);
        row.unpin(row.parent);
    });
}

fn c4_the_device_writes_after_the_cut(test: &str, guest: GuestKind) {
    run(test, guest, PINNED, |row| {
        row.pin(row.parent);
        let child = row.fork();
        row.device_store(row.parent, DEVICE);
        row.publish(row.parent);
        row.expect(row.parent, DEVICE);
        row.expect(child, row.old);
        row.device_store(row.parent, OTHER);
        row.expect(row.parent, OTHER);
        row.expect(child, row.old);
        row.unpin(row.parent);
    });
}

fn c5_no_pinned_page(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| copies_exactly(point, &[]));
}

fn c5_one_pinned_page(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| copies_exactly(point, &[FULL.gfn(77)]));
}

fn c5_a_thousand_adjacent_pages(test: &str, guest: GuestKind) {
    let first = FULL.gfn(100).0;
    at(test, guest, LEVEL, |point| {
        copies_exactly(point, &(first..first + 1000).map(Gfn).collect::<Vec<_>>())
    });
}

fn c5_a_thousand_scattered_pages(test: &str, guest: GuestKind) {
    let first = FULL.first_gfn().0;
    at(test, guest, LEVEL, |point| {
        copies_exactly(point, &(0..1000).map(|page| Gfn(first + page * 3)).collect::<Vec<_>>())
    });
}

/// Leaves 2 to 7 of each VM are written, each page with its own number, and then `pinned` of them
/// are pinned.
fn copies_exactly(point: &Point, pinned: &[Gfn]) {
    let world = World::at(point, Setup::default());
    let root = world.root();
    let all: Vec<Gfn> = (FULL.first_gfn().0..8 * 512).map(Gfn).collect();
    world.store_pages(root, all[0], 6 * 512, OLD);
    for gfn in pinned {
        world.store(root, gfn.gpa(), gfn.0);
        world.pin(root, *gfn, 1);
    }
    let before = world.frames(root, &all);
    let forked = world.fork_many(root, 1);
    let child = forked.clones[0].vm;
    assert_eq!(forked.figures.copied_pages, u64::try_from(pinned.len()).expect("a count"));
    assert_eq!(world.frames(root, &all), before, "a page of the source was moved by the cut");
    // Each has what the source had at the cut, whatever the device does since.
    pinned.iter().for_each(|gfn| world.device_store(root, *gfn, DEVICE));
    let numbers = pinned.iter().fold(0, |sum: u64, gfn| sum.wrapping_add(gfn.0));
    let others = u64::try_from(all.len() - pinned.len()).expect("a count");
    let sum = |vm| world.sum(vm, all[0].gpa(), 6 * 512, 4096);
    assert_eq!(sum(child), numbers + others * OLD, "the clone's pages");
    assert_eq!(sum(root), (all.len() as u64 - others) * DEVICE + others * OLD, "the source's pages");
    for gfn in pinned.iter().step_by(61) {
        world.expect(child, gfn.gpa(), gfn.0);
    }
    if let (Some(before), Some(after), Some(of_child)) =
        (before, world.frames(root, &all), world.frames(child, &all))
    {
        assert_eq!(after, before, "a page of the source was moved by a force");
        let shared = after.iter().zip(&of_child).filter(|(one, other)| one == other && **one != 0).count();
        assert_eq!(shared, 0, "pages of the source's window that the clone maps");
    }
    world.check();
    pinned.iter().for_each(|gfn| world.unpin(root, *gfn, 1));
    assert_eq!(world.report(root).pins, 0);
    world.finish();
}

fn c6_a_pin_that_has_ended_costs_nothing(test: &str, guest: GuestKind) {
    run(test, guest, PINNED, |row| {
        row.pin(row.parent);
        let first = row.fork();
        row.device_store(row.parent, DEVICE);
        row.world.unpin(row.parent, row.page, 1);
        row.publish(row.parent);
        let second = row.world.fork_many(row.parent, 1);
        assert_eq!(second.figures.copied_pages, 0, "{}", row.point);
        row.publish(row.parent);
        row.store(row.parent, NEW);
        row.expect(row.parent, NEW);
        row.expect(first, row.old);
        row.expect(second.clones[0].vm, DEVICE);
    });
}

fn c7_the_source_pins_a_shared_page(test: &str, guest: GuestKind) {
    run(test, guest, PINNED, |row| {
        let child = row.fork_and_publish();
        row.pin(row.parent);
        row.device_store(row.parent, DEVICE);
        row.expect(row.parent, DEVICE);
        row.expect(child, row.old);
        row.unpin(row.parent);
    });
}

fn c8_the_clone_pins_a_shared_page(test: &str, guest: GuestKind) {
    run(test, guest, PINNED, |row| {
        let child = row.fork_and_publish();
        row.pin(child);
        row.device_store(child, DEVICE);
        row.expect(row.parent, row.old);
        row.expect(child, DEVICE);
        row.store(child, NEW);
        row.expect_device(child, NEW);
        row.unpin(child);
    });
}

fn c9_both_pin_the_same_page(test: &str, guest: GuestKind) {
    run(test, guest, PINNED, |row| {
        let child = row.fork_and_publish();
        row.pin(child);
        row.pin(row.parent);
        row.device_store(child, DEVICE);
        row.device_store(row.parent, OTHER);
        row.expect_device(child, DEVICE);
        row.expect_device(row.parent, OTHER);
        row.expect(row.parent, OTHER);
        row.expect(child, DEVICE);
        row.unpin(child);
        row.unpin(row.parent);
    });
}

fn c10_pins_are_counted(test: &str, guest: GuestKind) {
    run(test, guest, PINNED, |row| {
        row.pin(row.parent);
        row.pin(row.parent);
        row.world.unpin(row.parent, row.page, 1);
        let forked = row.world.fork_many(row.parent, 1);
        assert_eq!(forked.figures.copied_pages, 1, "{}", row.point);
        row.publish(row.parent);
        row.device_store(row.parent, DEVICE);
        row.expect(row.parent, DEVICE);
        row.expect(forked.clones[0].vm, row.old);
        row.unpin(row.parent);
    });
}

fn c11_what_cannot_be_pinned_changes_nothing(test: &str, guest: GuestKind) {
    run(test, guest, PINNED, |row| {
        let page = row.page;
        let reason = row.world.refusal(row.parent, Order::Unpin { first: page, pages: 1 });
        assert!(reason.contains(&page.to_string()), "{reason}");
        let reason =
            row.world.refusal(row.parent, Order::Pin { first: Gfn(4090), pages: 10, holder: row.point.pin });
        assert!(reason.contains(&Gfn(4096).to_string()), "{reason}");
        assert_eq!(row.world.report(row.parent).pins, 0);
    });
}

fn c16_a_pin_on_a_lent_page(test: &str, guest: GuestKind) {
    run(test, guest, PINNED, |row| {
        let child = row.fork();
        row.pin(row.parent);
        row.device_store(row.parent, DEVICE);
        row.expect(row.parent, DEVICE);
        row.expect(child, row.old);
        row.unpin(row.parent);
    });
}

fn c16_a_pin_when_the_clone_is_gone(test: &str, guest: GuestKind) {
    run(test, guest, PINNED, |row| {
        // The frame is only the page's own once it has been written.
        row.store(row.parent, row.old);
        let frame = row.frame(row.parent);
        let child = row.fork();
        row.world.end(child);
        row.pin(row.parent);
        assert_eq!(row.frame(row.parent), frame, "reused, not copied: {}", row.point);
        row.store(row.parent, NEW);
        row.expect_device(row.parent, NEW);
        let second = row.fork_and_publish();
        row.store(row.parent, OTHER);
        row.expect_device(row.parent, OTHER);
        row.expect(second, NEW);
        row.unpin(row.parent);
        for gfn in [SPARSE.gfn(500), EMPTY.gfn(500)] {
            row.world.expect(second, gfn.gpa(), 0);
        }
    });
}

fn c12_a_never_touched_page(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL_AND_PIN, |point| {
        let world = World::at(point, Setup::default());
        let root = world.root();
        write_memory(&world, root);
        for gfn in [SPARSE.gfn(99), EMPTY.gfn(7)] {
            world.pin_for(root, gfn, 1, point.pin);
            assert_eq!(world.device_load(root, gfn), 0, "{gfn}");
            world.store(root, gfn.gpa(), NEW);
            assert_eq!(world.device_load(root, gfn), NEW, "{gfn}");
            let child = world.fork(root);
            world.store(root, gfn.gpa(), OTHER);
            assert_eq!(world.device_load(root, gfn), OTHER, "{gfn}");
            world.expect(child, gfn.gpa(), NEW);
            world.check();
            world.unpin(root, gfn, 1);
        }
        world.finish();
    });
}

/// The device is one of the source's process, which stays as long as others need its pages.
fn c13_the_source_ends_with_the_pin_held(test: &str, guest: GuestKind) {
    run(test, guest, PINNED, |row| {
        row.pin(row.parent);
        row.device_store(row.parent, DEVICE);
        let child = row.fork_and_publish();
        let process = row.world.member(row.parent);
        row.world.end(row.parent);
        let store = Order::DeviceStore { gfn: row.page, value: OTHER };
        match process.ask(Order::DeviceLoad { gfn: row.page }, &[]) {
            Ok(Reply::Loaded(value)) => assert_eq!(value, DEVICE, "{}", row.point),
            Err(ColonyError::Died(_)) if row.point.forced != Forced::Nothing => {}
            other => panic!("the device: {other:?}: {}", row.point),
        }
        match process.ask(store, &[]) {
            Ok(Reply::Done) | Err(ColonyError::Died(_)) => {}
            other => panic!("the device: {other:?}: {}", row.point),
        }
        row.expect(child, DEVICE);
        row.store(child, NEW);
        row.expect(child, NEW);
    });
}

fn c14_what_is_pinned_is_not_given_up(test: &str, guest: GuestKind) {
    run(test, guest, PINNED, |row| {
        row.pin(row.parent);
        let frame = row.frame(row.parent);
        let whole = Order::Discard { first: row.page.leaf().first_gfn(), pages: 512 };
        let one = Order::Discard { first: row.page, pages: 1 };
        // Before the fork, under the protection of a cut, and after.
        let child = row.fork();
        for order in [&one, &whole] {
            let reason = row.world.refusal(row.parent, order.clone());
            assert!(reason.contains(&row.page.to_string()), "{reason}");
        }
        row.publish(row.parent);
        for order in [one, whole] {
            let reason = row.world.refusal(row.parent, order);
            assert!(reason.contains(&row.page.to_string()), "{reason}");
        }
        match row.world.colony.reset(row.parent) {
            Err(ColonyError::Refused { reason, .. }) if row.point.source == Source::Clone => {
                assert!(reason.contains(&row.page.to_string()), "{reason}");
            }
            Err(_) if row.point.source == Source::Root => {}
            other => panic!("a reset with a pinned page: {other:?}: {}", row.point),
        }
        // Dropped, if the point says so, was everything but this.
        assert_eq!(row.frame(row.parent), frame, "the page was moved: {}", row.point);
        row.device_store(row.parent, DEVICE);
        row.expect(row.parent, DEVICE);
        row.store(row.parent, NEW);
        row.expect_device(row.parent, NEW);
        row.expect(child, row.old);
        row.unpin(row.parent);
    });
}

fn c15_everything_is_pinned(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL_AND_PIN, |point| {
        let world = World::at(point, Setup::default());
        let root = world.root();
        write_memory(&world, root);
        let pages = world.colony.config().memory.ram_bytes() / 4096;
        world.pin_for(root, Gfn(0), pages, point.pin);
        // What a fork will cost is told before it: so many pages.
        assert_eq!(world.report(root).counts.pinned, pages);
        let forked = world.fork_many(root, 1);
        assert_eq!(forked.figures.copied_pages, pages, "and after it");
        let child = forked.clones[0].vm;
        world.store_pages(root, FULL.first_gfn(), 512, NEW);
        assert_eq!(world.sum(child, FULL.gpa(), 512, 4096), 512 * OLD);
        assert_eq!(world.sum(root, FULL.gpa(), 512, 4096), 512 * NEW);
        world.expect(child, EMPTY.gpa(), 0);
        world.check();
        world.unpin(root, Gfn(0), pages);
        world.finish();
    });
}
