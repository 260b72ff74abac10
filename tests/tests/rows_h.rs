//! Rows H of the conformance table: what the host does to memory behind everybody's back.

use std::fs;

use salp::family::VmId;
use salp::member::messages::{GuestKind, Order, PinHolder, PuppetOrder};
use salp::space::{Access, Keep};
use salp::words::{Gfn, LeafNumber};
use salp_protocol::order;
use salp_tests::axes::{LEVEL, LEVEL_AND_PIN, MEMORY};
use salp_tests::both_guests;
use salp_tests::record::{Outcome, report_values, value_of};
use salp_tests::row::{ALONE, DEVICE, EMPTY, FULL, NEW, OLD, OTHER, at, attempt, run, write_memory};
use salp_tests::swap::{Swap, compact_memory};
use salp_tests::world::{LIMIT, Setup, World};

both_guests! {
    h1_an_exclusive_page_in_swap;
    h2_a_lent_page_in_swap;
    h3_the_host_compacts_memory;
    h4_equal_pages;
    h5_frames_go_and_come_while_clones_run;
    h6_lost_memory_is_told_to_who_touches_it;
}

/// Sends the full leaf of a VM to swap.
#[track_caller]
fn swap_out(world: &World, vm: VmId) -> Result<(), String> {
    match world.swap_out(vm, FULL).map_err(|error| format!("no swap: {error}"))? {
        0 => Err("no swap: the host keeps the pages".to_owned()),
        _ => Ok(()),
    }
}

fn h1_an_exclusive_page_in_swap(test: &str, guest: GuestKind) {
    attempt(test, guest, LEVEL, |point| {
        let _swap = Swap::on()?;
        for is_source_first in [true, false] {
            let world = World::at(point, Setup::default());
            let root = world.root();
            write_memory(&world, root);
            swap_out(&world, root)?;
            let child = world.fork(root);
            let stores = [(root, NEW, 0), (child, OTHER, 1)];
            let order = if is_source_first { [0, 1] } else { [1, 0] };
            world.expect(stores[order[0]].0, FULL.gfn(9).gpa(), OLD);
            for (vm, value, page) in order.map(|at| stores[at]) {
                world.store(vm, FULL.gfn(page).gpa(), value);
            }
            assert_eq!(world.sum(root, FULL.gpa(), 512, 4096), 511 * OLD + NEW);
            assert_eq!(world.sum(child, FULL.gpa(), 512, 4096), 511 * OLD + OTHER);
            world.finish();
        }
        Ok(())
    });
}

fn h2_a_lent_page_in_swap(test: &str, guest: GuestKind) {
    attempt(test, guest, LEVEL, |point| {
        let _swap = Swap::on()?;
        for keep in [Keep::Own, Keep::Shared] {
            let world = World::at(point, Setup::default());
            let root = world.root();
            write_memory(&world, root);
            let child = world.fork(root);
            swap_out(&world, root)?;
            world.check();
            // And some go while the publication is at work.
            world.tell(root, Order::Publish { keep });
            world.swap_out(root, FULL).map_err(|error| format!("no swap: {error}"))?;
            world.publish_all(root, keep);
            assert_eq!(world.sum(child, FULL.gpa(), 512, 4096), 512 * OLD);
            world.store_pages(root, FULL.first_gfn(), 512, NEW);
            assert_eq!(world.sum(root, FULL.gpa(), 512, 4096), 512 * NEW);
            assert_eq!(world.sum(child, FULL.gpa(), 512, 4096), 512 * OLD);
            world.expect(child, ALONE.gpa(), OLD);
            world.finish();
        }
        Ok(())
    });
}

/// The pages that the host's kernel holds must stay; it could not know of those that only salp holds.
fn h3_the_host_compacts_memory(test: &str, guest: GuestKind) {
    attempt(test, guest, LEVEL_AND_PIN, |point| {
        compact_memory().map_err(|error| error.to_string())?;
        let world = World::at(point, Setup { is_huge: false, ..Setup::default() });
        let root = world.root();
        write_memory(&world, root);
        let held: Vec<Gfn> = (0..64).map(|page| FULL.gfn(page * 8)).collect();
        let (first, pages) = (FULL.gfn(64), 64);
        world.pin_for(root, first, pages, point.pin);
        let pinned: Vec<Gfn> = (first.0..first.0 + pages).map(Gfn).collect();
        let frames = world.frames(root, &pinned);
        for round in 1..=5 {
            let child = world.fork(root);
            compact_memory().map_err(|error| error.to_string())?;
            world.device_store(root, first, DEVICE + round);
            held.iter().for_each(|gfn| world.store(root, gfn.gpa(), NEW + round));
            compact_memory().map_err(|error| error.to_string())?;
            let before = if round == 1 { OLD } else { NEW + round - 1 };
            held.iter().for_each(|gfn| world.expect(child, gfn.gpa(), before));
            held.iter().for_each(|gfn| world.expect(root, gfn.gpa(), NEW + round));
            assert_eq!(world.device_load(root, first), NEW + round);
            world.end(child);
        }
        if point.pin == PinHolder::Kernel {
            assert_eq!(world.frames(root, &pinned), frames, "a page that the kernel holds was moved");
        }
        world.check();
        world.unpin(root, first, pages);
        world.finish();
        Ok(())
    });
}

/// salp stores equal pages as often as they come, but zeros that nobody wrote. Whoever merges them
/// elsewhere must not be noticed.
fn h4_equal_pages(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let world = &row.world;
        // Zeros that somebody wrote, beside zeros that nobody did; and two leaves with the same in each
        // page.
        world.store_pages(row.parent, EMPTY.first_gfn(), 256, 0);
        let twin = LeafNumber(EMPTY.0 + 1);
        world.store_pages(row.parent, twin.first_gfn(), 512, OLD);
        let child = row.fork_and_publish();
        let places = [EMPTY.gfn(0), EMPTY.gfn(400), twin.gfn(0), twin.gfn(1)];
        for (gfn, value) in places.into_iter().zip(1..) {
            world.store(row.parent, gfn.gpa(), NEW + value);
            world.store(child, gfn.gpa(), OTHER + value);
        }
        for (gfn, value) in places.into_iter().zip(1..) {
            world.expect(row.parent, gfn.gpa(), NEW + value);
            world.expect(child, gfn.gpa(), OTHER + value);
        }
        assert_eq!(world.sum(row.parent, EMPTY.gfn(1).gpa(), 399, 4096), 0);
        assert_eq!(world.sum(child, twin.gfn(2).gpa(), 510, 4096), 510 * OLD);
    });
}

/// Patches and blocks are let go of and written anew, under a clone that reads all the time and one
/// that only holds them.
fn h5_frames_go_and_come_while_clones_run(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| {
        let world = World::at(point, Setup::default());
        let root = world.root();
        write_memory(&world, root);
        let forked = world.fork_many(root, 2);
        let [reader, holder] = [forked.clones[0].vm, forked.clones[1].vm];
        let read = PuppetOrder { order: order::SUM_STRIDE, a: FULL.gpa().0, b: 0, c: 512, d: 4096 };
        for round in 1..=20 {
            world.begin(reader, 0, read);
            // A few pages: patches. All: a block of its own.
            let pages = if round % 2 == 0 { 4 } else { 512 };
            world.store_pages(root, FULL.first_gfn(), pages, NEW + round);
            let passing = world.fork(root);
            world.publish_all(root, if round % 3 == 0 { Keep::Own } else { Keep::Shared });
            world.expect(passing, FULL.gfn(3).gpa(), NEW + round);
            world.end(passing);
            assert_eq!(world.result(reader, 0), 512 * OLD, "round {round}");
        }
        assert_eq!(world.sum(holder, FULL.gpa(), 512, 4096), 512 * OLD);
        world.finish();
    });
}

/// Injected by the death of a process that has not published all: what only it had is poisoned where
/// somebody needs it.
fn h6_lost_memory_is_told_to_who_touches_it(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| {
        let world = World::at(point, Setup::default());
        let root = world.root();
        write_memory(&world, root);
        let forked = world.fork_many(root, 2);
        let [victim, bystander] = [forked.clones[0].vm, forked.clones[1].vm];
        // Both have what they run on and one leaf; another nobody has asked for.
        for vm in [victim, bystander] {
            world.expect(vm, FULL.gpa(), OLD);
        }
        let process = world.member(root);
        world.colony.kill(root).expect("it is there");
        process.wait_end();
        world.colony.settle();
        world.begin(victim, 0, PuppetOrder { order: order::LOAD64, a: ALONE.gpa().0, ..Default::default() });
        let ended = world.member(victim).wait_for(LIMIT, |state| state.ended.clone());
        let (status, text) = ended.unwrap_or_else(|error| panic!("{victim}: {error}"));
        assert_eq!(status, None, "{text}");
        assert!(
            text.contains(&ALONE.leaf().first_gfn().to_string()) || text.contains(&ALONE.to_string()),
            "{text}"
        );
        // Nobody else is told, and the family goes on with what it has.
        world.store(bystander, FULL.gpa(), NEW);
        let clone = world.fork(bystander);
        world.expect(clone, FULL.gpa(), NEW);
        world.expect(clone, FULL.gfn(1).gpa(), OLD);
        assert!(world.member(bystander).state().ended.is_none());
        let pin = Order::Pin { first: ALONE, pages: 1, holder: PinHolder::Salp(Access::ReadWrite) };
        let reason = world.refusal(bystander, pin);
        assert!(reason.contains("lost"), "a pin of lost memory: {reason}");
        // A whole leaf that is lost can be used again.
        world.tell(bystander, Order::Discard { first: ALONE.leaf().first_gfn(), pages: 512 });
        world.expect(bystander, ALONE.gpa(), 0);
        world.end(victim);
        world.finish();
    });
    report_values(test, &value_of(guest), &Outcome::Skipped(hardware_poison()));
}

/// Why memory is not poisoned with `MADV_HWPOISON`.
fn hardware_poison() -> String {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    match meminfo.contains("HardwareCorrupted") {
        false => "no MADV_HWPOISON: the host's kernel is without memory-failure handling",
        true => "no MADV_HWPOISON: it takes a page from the host for good",
    }
    .to_owned()
}
