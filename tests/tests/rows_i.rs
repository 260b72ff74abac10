//! Rows I of the conformance table: the DMA engine with transfers in flight at the cut.

use std::time::{Duration, Instant};

use salp::family::VmId;
use salp::member::messages::{GuestKind, Order, PinHolder, PuppetOrder};
use salp::space::Keep;
use salp::words::{Gfn, Gpa, LeafNumber};
use salp_protocol::dma::{flag, register, status};
use salp_protocol::order;
use salp_tests::axes::{LEVEL, LEVEL_AND_PIN, Point};
use salp_tests::both_guests;
use salp_tests::dma::{Engine, Transfer};
use salp_tests::procs::settled;
use salp_tests::row::{ALONE, EMPTY, FULL, NEW, OLD, OTHER, at, attempt, is_complete, write_memory};
use salp_tests::world::{LIMIT, Setup, World};

both_guests! {
    a10_two_pages_in_order;
    a15_a_devices_two_pages_in_order;
    i1_a_disk_read_in_flight;
    i2_a_disk_write_in_flight;
    i3_registered_buffers_across_forks;
    i4_short_pins_and_continuous_forks;
    i5_an_interrupt_at_the_cut;
    i6_a_buffer_unregistered_under_its_transfer;
    i6_what_the_kernel_wrote_after_the_cut;
    i7_data_before_its_completion;
}

/// Bytes of one transfer here: four pages.
const LENGTH: u32 = 4 * 4096;
/// Long enough that a fork falls into it, in microseconds.
const DELAY_US: u64 = 300_000;
const RING: Gfn = EMPTY.gfn(0);
const BUFFER: Gfn = FULL.gfn(16);
const SECOND: Gfn = FULL.gfn(32);
const DISK: u64 = 64 << 10;
/// Three leaves that a device holds where a pause is to take its time.
const HELD: LeafNumber = LeafNumber(5);

/// How a transfer is done: by the engine's threads, or by the host's kernel with a registered buffer.
fn flags_at(point: &Point) -> u16 {
    match point.pin {
        PinHolder::Salp(_) => 0,
        PinHolder::Kernel => flag::KERNEL | flag::REGISTERED,
    }
}

fn by(transfer: Transfer, flags: u16) -> Transfer {
    Transfer { flags, ..transfer }
}

/// A root whose engine has the pages from `BUFFER` registered, and `NEW` on the disk.
fn root_with_disk(world: &World) -> (VmId, Engine<'_>) {
    let root = world.root();
    let engine = Engine::set_up(world, root, RING);
    world.store_pages(root, BUFFER, 4, NEW);
    engine.register(root, 0, BUFFER, 4);
    engine.transfer(root, &Transfer::write(BUFFER.gpa(), DISK, LENGTH));
    (root, engine)
}

fn sum(world: &World, vm: VmId, first: Gfn) -> u64 {
    world.sum(vm, first.gpa(), 4, 4096)
}

fn i1_a_disk_read_in_flight(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL_AND_PIN, |point| {
        let (flags, world) = (flags_at(point), World::at(point, Setup::default()));
        let (root, engine) = root_with_disk(&world);
        world.store_pages(root, BUFFER, 4, OLD);
        engine.configure(root, register::DELAY_US, DELAY_US);
        let read = engine.submit(root, &by(Transfer::read(DISK, BUFFER.gpa(), LENGTH), flags));
        let child = world.fork(root);
        let is_in_flight = world.describe(child).dma_in_flight == 1;
        assert!(is_in_flight, "the clone's own request, to be done again");
        let (buffer, status) = (sum(&world, child, BUFFER), engine.status(child, read));
        // By the host's kernel all comes at the end; in between, a buffer holds what it likes.
        if flags != 0 && status == status::PENDING {
            assert_eq!(buffer, 4 * OLD, "the clone has the buffer of the cut until its own read is done");
        }
        engine.complete(root, read);
        assert_eq!(sum(&world, root, BUFFER), 4 * NEW, "the source has the data");
        engine.complete(child, read);
        assert_eq!(sum(&world, child, BUFFER), 4 * NEW, "the clone has its own");
        for vm in [root, child] {
            assert_eq!(engine.read(vm, register::COMPLETED), 2, "{vm}: the write before, and this once");
        }
        // Each goes on by itself.
        world.store_pages(child, BUFFER, 4, OTHER);
        assert_eq!(sum(&world, root, BUFFER), 4 * NEW);
        world.finish();
    });
}

fn i2_a_disk_write_in_flight(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL_AND_PIN, |point| {
        let (flags, world) = (flags_at(point), World::at(point, Setup::default()));
        let (root, engine) = root_with_disk(&world);
        world.store_pages(root, BUFFER, 4, OLD);
        engine.configure(root, register::DELAY_US, DELAY_US);
        let write = engine.submit(root, &by(Transfer::write(BUFFER.gpa(), DISK, LENGTH), flags));
        let child = world.fork(root);
        world.store_pages(child, BUFFER, 4, OTHER);
        engine.complete(root, write);
        engine.complete(child, write);
        for vm in [root, child] {
            engine.configure(vm, register::DELAY_US, 0);
        }
        let on_disk = |vm| {
            engine.transfer(vm, &Transfer::read(DISK, SECOND.gpa(), LENGTH));
            (0..4).map(|page| world.load(vm, Gfn(SECOND.0 + page).gpa())).collect::<Vec<_>>()
        };
        assert_eq!(on_disk(root), [OLD; 4], "the source's disk gets the source's bytes");
        let of_child = on_disk(child);
        // A guest that changes a buffer in flight gets either; but nothing of anybody else's.
        assert!(of_child.iter().all(|value| [OLD, OTHER].contains(value)), "{of_child:x?}");
        // What either writes later is on its own disk alone.
        world.store_pages(root, BUFFER, 4, NEW + 1);
        engine.transfer(root, &Transfer::write(BUFFER.gpa(), DISK, LENGTH));
        assert_eq!(on_disk(child), of_child, "the clone's disk never gets the source's later bytes");
        world.store_pages(child, BUFFER, 4, NEW + 2);
        engine.transfer(child, &Transfer::write(BUFFER.gpa(), DISK, LENGTH));
        assert_eq!(on_disk(root), [NEW + 1; 4]);
        assert_eq!(on_disk(child), [NEW + 2; 4]);
        world.finish();
    });
}

/// The registered pages stay where they are for the life of the registration, and the host's kernel
/// goes on writing where the guest reads.
fn i3_registered_buffers_across_forks(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| {
        let world = World::at(point, Setup::default());
        let (root, engine) = root_with_disk(&world);
        let pages: Vec<Gfn> = (BUFFER.0..BUFFER.0 + 4).map(Gfn).collect();
        let frames = world.frames(root, &pages);
        let kernel = flag::KERNEL | flag::REGISTERED;
        for round in 0..100_u64 {
            world.store_pages(root, BUFFER, 4, round);
            engine.transfer(root, &by(Transfer::write(BUFFER.gpa(), DISK, LENGTH), kernel));
            let forked = world.fork_many(root, 1);
            let child = forked.clones[0].vm;
            assert_eq!(forked.figures.copied_pages, 4, "the registered pages, round {round}");
            world.store_pages(root, BUFFER, 4, OTHER);
            engine.transfer(root, &by(Transfer::read(DISK, BUFFER.gpa(), LENGTH), kernel));
            assert_eq!(sum(&world, root, BUFFER), 4 * round, "round {round}");
            if round % 10 == 0 {
                world.store_pages(child, BUFFER, 4, OTHER);
                engine.transfer(child, &by(Transfer::read(DISK, BUFFER.gpa(), LENGTH), kernel));
                assert_eq!(sum(&world, child, BUFFER), 4 * round, "the clone's registration, round {round}");
            }
            assert_eq!(sum(&world, child, BUFFER), 4 * round, "the clone of round {round}");
            world.end(child);
        }
        assert_eq!(world.frames(root, &pages), frames, "the registered pages were moved");
        assert_eq!(world.report(root).counts.pinned, 4);
        world.finish();
    });
}

/// What the host's kernel writes to a registered buffer passes all protection: the leaf looks as if
/// nobody had stored to it since the cut, and must not be dropped for its block.
fn i6_what_the_kernel_wrote_after_the_cut(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| {
        let kernel = flag::KERNEL | flag::REGISTERED;
        let world = World::at(point, Setup::default());
        let (root, engine) = root_with_disk(&world);
        world.store_pages(root, FULL.first_gfn(), 512, OLD);
        // The host's kernel has the pages from the first transfer on.
        engine.transfer(root, &by(Transfer::write(BUFFER.gpa(), 2 * DISK, LENGTH), kernel));
        let child = world.fork(root);
        engine.transfer(root, &by(Transfer::read(DISK, BUFFER.gpa(), LENGTH), kernel));
        engine.configure(root, register::BUFFER_UNREGISTER, 0);
        world.publish_all(root, Keep::Shared);
        assert_eq!(sum(&world, root, BUFFER), 4 * NEW, "the source has what its device wrote");
        assert_eq!(sum(&world, child, BUFFER), 4 * OLD, "the clone has the cut's buffer");
        engine.configure(child, register::BUFFER_UNREGISTER, 0);
        for vm in [root, child] {
            // The host's kernel lets go of the pages in its own time.
            settled(LIMIT, || world.report(vm).pins, |pins| *pins == 0);
            assert_eq!(world.report(vm).pins, 0, "{vm}");
        }
        world.finish();
    });
}

/// Forks `root` again and again while it works, a different time after each fork.
fn fork_at_random_moments(world: &World, root: VmId, forks: u32, mut look: impl FnMut(VmId)) {
    for round in 0..forks {
        let clone = world.fork_running(root, 1).clones[0].vm;
        // Not a wait for anything: the moment of the next cut.
        let begun = Instant::now();
        while begun.elapsed().as_micros() < u128::from(round * 7919 % 3000) {
            std::hint::spin_loop();
        }
        look(clone);
    }
}

/// A case that verifies itself: forks it at random moments, then has all verify everything.
fn fork_case(point: &Point, command_line: &str, vcpus: u8, forks: u32) {
    let setup = Setup { command_line: command_line.to_owned(), vcpus, memory_mib: 32, ..Setup::default() };
    let world = World::at(point, setup);
    let root = world.root();
    let reports = |vm: VmId, count: u64| {
        let seen = world.member(vm).wait_for(LIMIT, |state| {
            (state.reports >= count || state.ended.is_some()).then(|| state.ended.clone())
        });
        assert_eq!(seen.unwrap_or_else(|error| panic!("{vm}: {error}")), None, "{vm} ended early");
    };
    reports(root, 1);
    let mut clones = Vec::new();
    fork_at_random_moments(&world, root, forks, |clone| clones.push(clone));
    let nested = world.fork_running(clones[0], 1).clones[0].vm;
    clones.extend([nested, root]);
    for vm in &clones {
        reports(*vm, 1);
    }
    world.check();
    for vm in &clones {
        world.tell(*vm, Order::Finish);
    }
    for vm in clones {
        let ended = world.member(vm).wait_for(LIMIT, |state| state.ended.clone());
        let (status, text) = ended.unwrap_or_else(|error| panic!("{vm}: {error}"));
        let progress = world.member(vm).state().progress;
        assert!(
            status == Some(0) && progress.is_finished && progress.errors == 0,
            "{vm}: {text} {progress:?}"
        );
        if command_line.contains("case=dma") {
            assert!(progress.transfers > 0, "{vm}: no transfer was verified");
        }
    }
    world.finish();
}

/// A thread counts in two pages, not stopped at cuts; what its clones have is what it had then.
fn count_and_fork(point: &Point, first: Gfn, second: Gfn) {
    let world = World::at(point, Setup::default());
    let root = world.root();
    // Pages around them, so that the leaves are more than these two.
    world.store_pages(root, FULL.first_gfn(), 512, OLD);
    world.store(root, ALONE.gpa(), OLD);
    world.store(root, first.gpa(), 0);
    world.store(root, second.gpa(), 0);
    let count =
        PuppetOrder { order: order::COUNT, a: first.gpa().0, b: second.gpa().0, c: 64, ..Default::default() };
    world.begin(root, 0, count);
    let counts = world.member(root).wait_for(LIMIT, |state| (state.reports > 0).then_some(()));
    counts.expect("the guest counts");
    let mut newest = 0;
    fork_at_random_moments(&world, root, 40, |clone| {
        let (second, first) = (world.load(clone, second.gpa()), world.load(clone, first.gpa()));
        assert!(first >= second && first - second <= 1, "the first page has {first}, the second {second}");
        assert!(first >= newest, "{first} is of an earlier cut than {newest}");
        newest = first;
        world.end(clone);
    });
    assert!(newest > 0, "the guest had not counted at the last cut");
    world.tell(root, Order::Finish);
    let last = world.result(root, 0);
    world.expect(root, first.gpa(), last);
    world.expect(root, second.gpa(), last);
    world.finish();
}

fn a10_two_pages_in_order(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| match guest {
        GuestKind::Kvm => fork_case(point, "case=counter mib=8 every=4096", 2, 12),
        GuestKind::Thread => {
            count_and_fork(point, FULL.gfn(3), FULL.gfn(400));
            count_and_fork(point, EMPTY.gfn(3), FULL.gfn(400));
        }
    });
}

fn a15_a_devices_two_pages_in_order(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| match guest {
        GuestKind::Kvm => fork_case(point, "case=dma mib=4 pins=16 depth=4 delay_us=0 kernel=2", 1, 8),
        // A thread guest is not stopped at a cut: it is held by the protection alone, as a device is.
        GuestKind::Thread => count_and_fork(point, FULL.gfn(400), EMPTY.gfn(3)),
    });
}

fn i7_data_before_its_completion(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| {
        if guest == GuestKind::Kvm {
            // Many pins: between the copy of a buffer and the protection of the ring there is time.
            fork_case(point, "case=dma mib=4 pins=2048 depth=16 delay_us=0 kernel=1", 1, 12);
            return;
        }
        let world = World::at(point, Setup::default());
        let (root, engine) = root_with_disk(&world);
        world.pin(root, HELD.first_gfn(), 3 * 512);
        for round in 1..=60_u64 {
            world.store_pages(root, BUFFER, 4, round);
            engine.transfer(root, &Transfer::write(BUFFER.gpa(), DISK, LENGTH));
            world.store_pages(root, SECOND, 4, OLD);
            // It ends about when the cut comes.
            engine.configure(root, register::DELAY_US, round * 53 % 3000);
            let read = engine.submit(root, &Transfer::read(DISK, SECOND.gpa(), LENGTH));
            let child = world.fork(root);
            // The data is looked at after the status: a completion means that all of it is there.
            if engine.status(child, read) == status::OK {
                assert_eq!(
                    sum(&world, child, SECOND),
                    4 * round,
                    "round {round}: a completion without its data"
                );
            }
            engine.complete(child, read);
            assert_eq!(sum(&world, child, SECOND), 4 * round, "round {round}");
            engine.complete(root, read);
            assert_eq!(sum(&world, root, SECOND), 4 * round, "round {round}");
            engine.configure(root, register::DELAY_US, 0);
            world.end(child);
        }
        world.expect(root, Gpa(SECOND.gpa().0 + 4096), 60);
        world.check();
        world.unpin(root, HELD.first_gfn(), 3 * 512);
        world.finish();
    });
}

/// As fast as the engine goes, forked all the time, each clone until it has verified what it did.
fn i4_short_pins_and_continuous_forks(test: &str, guest: GuestKind) {
    at(test, guest, &[], |point| match guest {
        GuestKind::Kvm => verify_under_forks(point),
        GuestKind::Thread => transfer_under_forks(point),
    });
}

/// How long the table wants it, and how long it takes otherwise.
fn stress_time() -> Duration {
    Duration::from_secs(if is_complete() { 60 } else { 3 })
}

fn verify_under_forks(point: &Point) {
    let command_line = "case=dma mib=4 pins=0 depth=16 delay_us=0 kernel=2".to_owned();
    let world = World::at(point, Setup { command_line, memory_mib: 32, ..Setup::default() });
    let root = world.root();
    let finish = |vm: VmId| {
        world.tell(vm, Order::Finish);
        let ended = world.member(vm).wait_for(LIMIT, |state| state.ended.clone());
        let (status, text) = ended.unwrap_or_else(|error| panic!("{vm}: {error}"));
        let progress = world.member(vm).state().progress;
        let is_good = status == Some(0) && progress.is_finished && progress.errors == 0;
        assert!(is_good && progress.transfers > 0, "{vm}: {text} {progress:?}");
        // A pin ends after its completion was told.
        settled(LIMIT, || world.report(vm).pins, |pins| *pins == 0);
        assert_eq!(world.report(vm).pins, 0, "{vm} has pins left");
    };
    let (begun, mut forks) = (Instant::now(), 0_u32);
    while begun.elapsed() < stress_time() {
        let clone = world.fork_running(root, 1).clones[0].vm;
        let reported = world
            .member(clone)
            .wait_for(LIMIT, |state| (state.reports > 0 || state.ended.is_some()).then_some(()));
        reported.unwrap_or_else(|error| panic!("{clone}: {error}"));
        finish(clone);
        world.end(clone);
        forks += 1;
    }
    finish(root);
    println!("{forks} forks, {} transfers by the source", world.member(root).state().progress.transfers);
    world.finish();
}

fn transfer_under_forks(point: &Point) {
    let world = World::at(point, Setup::default());
    let root = world.root();
    let engine = Engine::set_up(&world, root, RING);
    let (begun, mut round) = (Instant::now(), 0_u64);
    while begun.elapsed() < stress_time() {
        round += 1;
        let flags = [0, flag::KERNEL][usize::from(round % 2 == 0)];
        world.store_pages(root, BUFFER, 4, round);
        engine.transfer(root, &by(Transfer::write(BUFFER.gpa(), DISK, LENGTH), flags));
        world.store_pages(root, SECOND, 4, OLD);
        let read = engine.submit(root, &by(Transfer::read(DISK, SECOND.gpa(), LENGTH), flags));
        let child = world.fork(root);
        for vm in [root, child] {
            engine.complete(vm, read);
            assert_eq!(sum(&world, vm, SECOND), 4 * round, "{vm}, round {round}");
        }
        world.end(child);
    }
    println!("{round} forks");
    // A pin ends after its completion was told.
    settled(LIMIT, || world.report(root).pins, |pins| *pins == 0);
    assert_eq!(world.report(root).pins, 0, "pins are left");
    world.finish();
}

/// An interrupt that is about to come, pending, or on its way into the guest at the cut: each VM's count
/// of them is that of its completions, in the end.
fn i5_an_interrupt_at_the_cut(test: &str, guest: GuestKind) {
    const VECTOR: u64 = 0x40;
    const ENABLE: u64 = 1 << 8;
    attempt(test, guest, LEVEL, |point| {
        if guest == GuestKind::Thread {
            return Err("a thread guest has no interrupts".to_owned());
        }
        let world = World::at(point, Setup::default());
        let (root, engine) = root_with_disk(&world);
        let arrived = |vm| world.run(vm, order::INTERRUPTS, VECTOR, 0);
        assert_eq!(arrived(root), 0);
        engine.configure(root, register::INTERRUPT, VECTOR | ENABLE);
        for round in 1..=40_u64 {
            engine.configure(root, register::DELAY_US, round * 53 % 2000);
            let read = by(Transfer::read(DISK, SECOND.gpa(), LENGTH), flag::INTERRUPT);
            let read = engine.submit(root, &read);
            let child = world.fork(root);
            for vm in [root, child] {
                engine.complete(vm, read);
                settled(LIMIT, || arrived(vm), |arrived| *arrived == round);
                assert_eq!(arrived(vm), round, "{vm}: interrupts after {round} completions");
            }
            world.end(child);
        }
        world.finish();
        Ok(())
    });
}

/// The kernel has the pages until the last transfer that uses them is over, whatever was unregistered.
fn i6_a_buffer_unregistered_under_its_transfer(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| {
        let world = World::at(point, Setup::default());
        let root = world.root();
        write_memory(&world, root);
        let gfn = FULL.gfn(9);
        for round in 1..=4_u64 {
            world.store(root, gfn.gpa(), OLD);
            world.pin_for(root, gfn, 1, PinHolder::Kernel);
            world.tell(root, Order::DeviceBegin { gfn });
            // Before the cut, or after it.
            let is_early = round % 2 == 0;
            if is_early {
                world.unpin(root, gfn, 1);
            }
            let child = world.fork(root);
            if !is_early {
                world.unpin(root, gfn, 1);
            }
            world.store(root, gfn.gpa(), OTHER);
            if round > 2 {
                world.publish_all(root, Keep::Shared);
            }
            assert_eq!(world.report(root).pins, 1, "a transfer is under way");
            world.device_store(root, gfn, NEW + round);
            world.expect(root, gfn.gpa(), NEW + round);
            world.expect(child, gfn.gpa(), OLD);
            assert_eq!(world.report(root).pins, 0, "it is over");
            world.end(child);
        }
        world.finish();
    });
}
