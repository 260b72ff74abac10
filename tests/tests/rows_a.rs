//! Rows A of the conformance table: copy-on-write as the guests see it.

use std::time::Duration;

use salp::family::VmId;
use salp::member::messages::{GuestKind, PuppetOrder};
use salp::words::{Gfn, Gpa, PAGE_BYTES, PageSet};
use salp_protocol::order;
use salp_tests::axes::{Forced, LEVEL, MEMORY, Point};
use salp_tests::both_guests;
use salp_tests::probe::Holdings;
use salp_tests::procs::settled;
use salp_tests::row::{ALONE, EMPTY, FULL, NEW, OLD, OTHER, Row, SPARSE, at, attempt, run, write_memory};
use salp_tests::world::{LIMIT, Setup, World};

both_guests! {
    a1_the_source_writes;
    a2_the_clone_writes;
    a3_both_write;
    a4_both_only_read;
    a5_only_the_written_bytes_differ;
    a6_the_clone_ends;
    a6_the_clone_ends_unused;
    a7_the_source_ends;
    a8_forks_leave_nothing_behind;
    a9_a_page_that_was_never_touched;
    a11_code_in_a_page_that_it_writes;
    a12_the_sources_page_tables_change;
    a13_a_protection_comes_and_goes;
    a14_no_older_frame_shows_through;
}

fn a1_the_source_writes(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let child = row.fork_and_publish();
        row.store(row.parent, NEW);
        row.expect(row.parent, NEW);
        row.expect(child, row.old);
    });
}

fn a2_the_clone_writes(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let child = row.fork_and_publish();
        row.store(child, NEW);
        row.expect(row.parent, row.old);
        row.expect(child, NEW);
    });
}

fn a3_both_write(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let child = row.fork_and_publish();
        row.store(row.parent, NEW);
        row.store(child, OTHER);
        row.expect(row.parent, NEW);
        row.expect(child, OTHER);
    });
}

/// Reading makes nobody's page its own, in leaves that no guest writes for itself.
fn a4_both_only_read(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let child = row.fork_and_publish();
        let written = [FULL.gfn(0), ALONE];
        let before = written.map(|gfn| row.world.leaf(row.parent, gfn).exclusive.len());
        for vm in [row.parent, child] {
            assert_eq!(row.world.sum(vm, FULL.gpa(), 512, 4096), 512 * OLD, "{vm}: {}", row.point);
            row.world.expect(vm, ALONE.gpa(), OLD);
            row.world.expect(vm, SPARSE.gfn(9).gpa(), 0);
        }
        for (gfn, before) in written.into_iter().zip(before) {
            let of_child = row.world.leaf(child, gfn);
            // The first touch of a leaf traps, and KVM asks for that page with the right to write.
            let mut may_be_private = PageSet::EMPTY;
            may_be_private.insert(gfn.in_leaf());
            // A page that was the source's own over a block is a patch: it is copied.
            may_be_private.insert(row.page.in_leaf());
            let copied = of_child.exclusive.minus(&may_be_private);
            assert!(copied.is_empty(), "{gfn} of the clone: {of_child:?} {}", row.point);
            let of_parent = row.world.leaf(row.parent, gfn);
            // What was published on the clone's demand is the source's own again, as before.
            let is_on_demand = matches!(row.point.forced, Forced::Nothing | Forced::Leaf);
            let most = if is_on_demand { 512 } else { before };
            let own = of_parent.exclusive.minus(&may_be_private);
            assert!(own.len() <= most, "{gfn} of the source: {of_parent:?} {}", row.point);
        }
    });
}

/// Four pages of a VM, as bytes.
struct Bytes(Vec<u8>);

impl Bytes {
    const PAGES: u64 = 4;

    /// As the VM has them: the first 8 bytes of each page, zeros behind.
    fn of(row: &Row) -> Self {
        let mut bytes = vec![0; PAGE_BYTES * 4];
        for page in 0..Self::PAGES {
            let value = row.world.load(row.parent, Gfn(row.page.0 + page).gpa());
            let at = usize::try_from(page).expect("a few pages") * PAGE_BYTES;
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        Self(bytes)
    }

    fn word(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + 8].try_into().expect("8 bytes"))
    }

    /// Compares: each word at the given places, and the sum of all.
    #[track_caller]
    fn expect(&self, row: &Row, vm: VmId, places: &[usize]) {
        for at in places {
            let gpa = Gpa(row.page.gpa().0 + u64::try_from(*at).expect("a few pages"));
            let (found, expected) = (row.world.load(vm, gpa), self.word(*at));
            assert!(found == expected, "{vm} has {found:#x} at {at}, not {expected:#x}: {}", row.point);
        }
        let words = self.0.len() / 8;
        let sum = (0..words).fold(0, |sum: u64, word| sum.wrapping_add(self.word(word * 8)));
        let found = row.world.sum(vm, row.page.gpa(), 512 * Self::PAGES, 8);
        assert!(found == sum, "{vm}: some other byte differs: {}", row.point);
    }
}

fn a5_only_the_written_bytes_differ(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let mut model = Bytes::of(row);
        let old = Bytes(model.0.clone());
        let child = row.fork_and_publish();
        let base = row.page.gpa().0;
        let byte = |at: usize| (order::STORE8, base + u64::try_from(at).expect("small"), 0x5a, 0);
        let around_an_edge = 4092;
        for (order, a, b, c) in [
            byte(0),
            byte(2047),
            byte(4095),
            (order::STORE64, base + around_an_edge, 0x1122_3344_5566_7788, 0),
            (order::ATOMIC_ADD, base + 4096 + 64, 77, 0),
            (order::FILL, base + 4096 + 4000, 0xee, 4096 + 200),
        ] {
            row.world.order(row.parent, 0, PuppetOrder { order, a, b, c, d: 0 });
        }
        for at in [0, 2047, 4095] {
            model.0[at] = 0x5a;
        }
        model.0[4092..4100].copy_from_slice(&0x1122_3344_5566_7788_u64.to_le_bytes());
        let added = model.word(4096 + 64).wrapping_add(77).to_le_bytes();
        model.0[4160..4168].copy_from_slice(&added);
        model.0[8096..12392].fill(0xee);
        let places = [0, 2040, 2048, 4088, 4096, 4160, 8088, 8096, 8192, 12288, 12384, 12392];
        model.expect(row, row.parent, &places);
        old.expect(row, child, &places);
    });
}

fn a6_the_clone_ends(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let before = row.world.usage();
        let child = row.fork_and_publish();
        row.store(child, NEW);
        row.expect(child, NEW);
        row.world.end(child);
        row.expect(row.parent, row.old);
        row.store(row.parent, NEW);
        row.expect(row.parent, NEW);
        // Not quite as before: the source's table goes on naming the blocks that it had to publish,
        // beside its own copies, until the next cut of those leaves. It grows no further: A8.
        let (after, bytes) = row.world.usage();
        assert!(after.0 <= before.0.0 + 1, "{before:?} {after:?}: {}", row.point);
        assert!(bytes <= 16 << 20, "{bytes} bytes of the arena: {}", row.point);
    });
}

/// A clone that has asked for nothing leaves nothing: the source has all as it was. (Where forks share
/// lower down, the source has the nodes above for good.)
fn a6_the_clone_ends_unused(test: &str, guest: GuestKind) {
    at(test, guest, &[], |point| {
        let world = World::at(point, Setup::default());
        let root = world.root();
        write_memory(&world, root);
        let before = (world.usage(), world.anonymous_pages(root));
        let unused = world.fork_running(root, 1).clones[0].vm;
        world.end(unused);
        world.store_pages(root, FULL.first_gfn(), 512, NEW);
        if guest == GuestKind::Thread {
            world.await_usage(before.0);
            assert_eq!(world.anonymous_pages(root), before.1);
            assert_eq!(world.describe(root).blocks_published, 0, "the leaves are reused, not copied");
        }
        assert_eq!(world.sum(root, FULL.gpa(), 512, 4096), 512 * NEW);
        world.finish();
    });
}

fn a7_the_source_ends(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let child = row.fork_and_publish();
        row.world.end(row.parent);
        row.expect(child, row.old);
        row.store(child, NEW);
        row.expect(child, NEW);
    });
}

/// How often A8 forks. The row asks for 10,000 once: that is the cheaper guest's; the environment may
/// say more for both.
fn forks(guest: GuestKind) -> usize {
    let usual = match guest {
        GuestKind::Thread => 10_000,
        GuestKind::Kvm => 1_000,
    };
    std::env::var("SALP_A8_FORKS").ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

fn a8_forks_leave_nothing_behind(test: &str, guest: GuestKind) {
    at(test, guest, &[], forks_leave_nothing_behind);
}

fn forks_leave_nothing_behind(point: &Point) {
    let world = World::alone_at(point, Setup::default());
    let root = world.root();
    write_memory(&world, root);
    let source = world.member(root).process();
    let one = |value: u64| {
        let child = world.fork(root);
        world.store(child, ALONE.gpa(), value);
        world.store(root, FULL.gpa(), value);
        world.expect(child, FULL.gpa(), if value == 1 { OLD } else { value - 1 });
        world.end(child);
        world.colony.warm().expect("a full pool");
    };
    // The first ones: caches fill.
    (1..=6).for_each(&one);
    let usage = world.usage();
    let base = (Holdings::of(source), Holdings::own());
    let forks = u64::try_from(forks(point.guest)).expect("a count");
    (7..7 + forks).for_each(&one);
    world.await_usage(usage);
    // Stacks and heaps of this process's threads come and go: mappings may vary a little.
    for (process, before, more_mappings) in [(source, base.0, 0), (std::process::id(), base.1, 8)] {
        let is_no_more =
            |now: &Holdings| now.is_within(&before, more_mappings) && now.threads <= before.threads;
        let now = settled(Duration::from_secs(10), || Holdings::of(process), is_no_more);
        assert!(is_no_more(&now), "process {process} holds {now:?}, before {before:?}");
    }
    world.finish();
}

fn a9_a_page_that_was_never_touched(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| {
        for (is_huge, gfn) in
            [(true, SPARSE.gfn(99)), (false, SPARSE.gfn(99)), (true, EMPTY.gfn(7)), (false, EMPTY.gfn(7))]
        {
            let setup = Setup { is_huge, ..Setup::default() };
            let world = World::at(point, setup);
            let root = world.root();
            write_memory(&world, root);
            let (early, late) = (world.fork(root), world.fork(root));
            world.expect(early, gfn.gpa(), 0);
            world.store(root, gfn.gpa(), NEW);
            world.expect(early, gfn.gpa(), 0);
            world.publish_all(root, salp::space::Keep::Own);
            world.expect(late, gfn.gpa(), 0);
            world.expect(early, gfn.gpa(), 0);
            world.expect(root, gfn.gpa(), NEW);
            world.finish();
        }
    });
}

fn a14_no_older_frame_shows_through(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let child = row.fork_and_publish();
        row.store(row.parent, NEW);
        let second = row.fork_and_publish();
        let grandchild = row.world.fork(child);
        row.publish(child);
        row.store(row.parent, OTHER);
        row.store(child, NEW + 1);
        row.expect(row.parent, OTHER);
        row.expect(child, NEW + 1);
        row.expect(second, NEW);
        row.expect(grandchild, row.old);
    });
}

/// A vCPU is in the middle of it at the cut; its clones go on from there.
fn a11_code_in_a_page_that_it_writes(test: &str, guest: GuestKind) {
    const TIMES: u64 = 100_000_000;
    attempt(test, guest, LEVEL, |point| {
        if guest == GuestKind::Thread {
            return Err(NO_VCPU.to_owned());
        }
        let world = World::at(point, Setup { vcpus: 2, ..Setup::default() });
        let root = world.root();
        write_memory(&world, root);
        let run = PuppetOrder { order: order::RUN_AND_WRITE, a: FULL.gpa().0, b: TIMES, c: 0, d: 0 };
        world.begin(root, 0, run);
        // The other vCPU sees it count.
        let word = Gpa(FULL.gpa().0 + 256);
        let look = PuppetOrder { order: order::LOAD64, a: word.0, ..PuppetOrder::default() };
        settled(LIMIT, || world.order(root, 1, look), |count| *count > 0);
        let early = world.fork_running(root, 1).clones[0].vm;
        let is_at_it = world.member(root).state().puppet_results.is_empty();
        assert!(is_at_it, "the source was done before the fork");
        for vm in [early, root] {
            assert_eq!(world.result(vm, 0), TIMES, "{vm}");
            assert_eq!(world.load(vm, word), TIMES, "{vm}: the word in the page");
        }
        // The last result of the other vCPU, once more.
        world.result(early, 1);
        world.finish();
        Ok(())
    });
}

/// A thread guest runs nothing of what is in its memory, and has no page tables there.
const NO_VCPU: &str = "a thread guest has neither code nor page tables in its memory";

/// Where the loader puts the guest's page tables: the root's entry for the lowest 512 GiB comes first.
const PAGE_TABLES: std::ops::Range<u64> = 0x3_0000..0xa_0000;
/// A bit of a page table's entry that is software's: SDM volume 3, 5.5.4.
const SOFTWARE_BIT: u64 = 1 << 9;

fn a12_the_sources_page_tables_change(test: &str, guest: GuestKind) {
    attempt(test, guest, LEVEL, |point| {
        if guest == GuestKind::Thread {
            return Err(NO_VCPU.to_owned());
        }
        let world = World::at(point, Setup::default());
        let root = world.root();
        write_memory(&world, root);
        let words = (PAGE_TABLES.end - PAGE_TABLES.start) / 8;
        let sum = |vm| world.sum(vm, Gpa(PAGE_TABLES.start), words, 8);
        let early = world.fork(root);
        let late = world.fork(root);
        let before = sum(early);
        // The walker marks what it goes through and what is written; software marks more.
        world.store_pages(root, EMPTY.first_gfn(), 512, NEW);
        assert_eq!(world.sum(root, EMPTY.gpa(), 512, 4096), 512 * NEW);
        let entry = world.load(root, Gpa(PAGE_TABLES.start));
        assert_ne!(entry, 0, "the root table begins with an entry");
        world.store(root, Gpa(PAGE_TABLES.start), entry ^ SOFTWARE_BIT);
        assert_ne!(sum(root), before, "the source's tables have changed");
        for clone in [early, late] {
            assert_eq!(sum(clone), before, "{clone} has the tables of the cut");
            world.expect(clone, EMPTY.gpa(), 0);
            world.store_pages(clone, EMPTY.first_gfn(), 512, OTHER);
            world.expect(clone, FULL.gpa(), OLD);
        }
        world.finish();
        Ok(())
    });
}

fn a13_a_protection_comes_and_goes(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let child = row.fork_and_publish();
        // Laid by one cut, and taken off since nobody needs that.
        let unused = row.world.fork(row.parent);
        row.world.end(unused);
        let second = row.fork();
        row.store(row.parent, NEW);
        row.expect(row.parent, NEW);
        row.expect(child, row.old);
        row.expect(second, row.old);
    });
}
