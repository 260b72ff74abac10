//! Rows E of the conformance table: what a fork and a write cost in tables, counted.
//!
//! A table has 3 levels of nodes above its leaf records, and all leaves of these VMs have their
//! nodes in common: a path is 3 nodes and a record.

use std::collections::BTreeMap;

use salp::family::VmId;
use salp::member::messages::{GuestKind, Order, PinHolder, PuppetOrder};
use salp::space::{Access, Backing, Keep};
use salp::tables::ShareLevel;
use salp::words::{Gpa, LEAF_BYTES, LeafNumber, MemoryShape, PAGE_BYTES, wide};
use salp_protocol::{layout, order};
use salp_tests::axes::LEVEL;
use salp_tests::both_guests;
use salp_tests::row::{ALONE, EMPTY, FULL, NEW, OLD, OTHER, SPARSE, at, write_memory};
use salp_tests::world::{Setup, World};

both_guests! {
    e1_a_fork_takes_one_reference;
    e2_to_e4_a_write_copies_its_path;
    e5_a_hundred_clones_of_one_cut;
    e6_only_the_leaf_with_the_pin_differs;
    e7_two_break_one_table;
    e8_a_vm_ends_while_its_sibling_breaks;
    e9_what_is_discarded_is_zero_for_one;
    e10_two_regions_of_memory;
    e11_memory_is_accounted;
}

/// Nodes of a path.
const PATH: usize = 3;

/// Nodes that each VM has of its own after a fork, for all of these VMs' memory.
fn own_nodes(level: ShareLevel) -> usize {
    match level {
        ShareLevel::Root => 0,
        ShareLevel::Directory => 2,
        ShareLevel::Leaf => 3,
    }
}

fn e1_a_fork_takes_one_reference(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| {
        let world = World::at(point, Setup::default());
        let root = world.root();
        write_memory(&world, root);
        let gfns: Vec<_> = (0..512).map(|page| FULL.gfn(page)).collect();
        let before = world.frames(root, &gfns);
        assert_eq!(world.colony.structure_counts(), (0, 0, 0));
        let forked = world.fork_running(root, 1);
        let nodes = 2 * own_nodes(point.level);
        assert_eq!(world.colony.structure_counts(), (1, nodes, 0), "a cut, no record, no node in common");
        assert_eq!(forked.figures.copied_pages, 0);
        // All of the memory is one run.
        assert_eq!(forked.figures.protect_calls, 1);
        assert_eq!(world.frames(root, &gfns), before, "no frame is touched");
        if guest == GuestKind::Thread {
            assert_eq!(world.describe(root).blocks_published, 0);
            assert_eq!(world.colony.arena_used_bytes().expect("the arena's use"), 0);
        }
        world.await_puppets(forked.clones[0].vm);
        world.finish();
    });
}

/// Leaves with pages of a VM's own, by VM.
fn private_leaves(world: &World) -> BTreeMap<VmId, usize> {
    let count = |vm: &VmId| world.report(*vm).leaves.iter().filter(|leaf| !leaf.exclusive.is_empty()).count();
    world.colony.vms().iter().map(|vm| (*vm, count(vm))).collect()
}

/// Nodes and records after a check, which harvests: each VM that has pages of its own has a path of
/// its own, all others one in common; each leaf with such pages is a record, each of `shared` another.
#[track_caller]
fn expect_counts(world: &World, level: ShareLevel, shared: usize) {
    world.check();
    let private = private_leaves(world);
    let owners = private.values().filter(|leaves| **leaves > 0).count();
    let others = private.len() - owners;
    let in_common = if others > 0 { PATH - own_nodes(level) } else { 0 };
    let (_, nodes, records) = world.colony.structure_counts();
    assert_eq!(nodes, PATH * owners + own_nodes(level) * others + in_common, "nodes: {private:?}");
    assert_eq!(records, shared + private.values().sum::<usize>(), "records: {private:?}");
}

fn e2_to_e4_a_write_copies_its_path(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| {
        // What a clone keeps to return to is shared with nobody else here, and would be counted.
        let world = World::at(point, Setup { is_resettable: false, ..Setup::default() });
        let root = world.root();
        write_memory(&world, root);
        let child = world.fork(root);
        // The source's pages are dropped, so that nothing is anybody's own but what is written from now on
        // (and what the built-in guest writes for itself).
        world.publish_all(root, Keep::Shared);
        let (_, nodes, shared) = world.colony.structure_counts();
        assert_eq!(nodes, PATH + own_nodes(point.level), "the cut has become a table");
        expect_counts(&world, point.level, shared);
        let before = world.colony.structure_counts();
        let owned = private_leaves(&world);
        // The built-in guest writes for itself, so that each VM has its own path already.
        let broken = if owned.values().all(|leaves| *leaves == 0) { PATH } else { 0 };
        assert_eq!(broken == PATH, guest == GuestKind::Thread, "{owned:?}");
        // Of two paths what both own already is no new node.
        let broken = broken.saturating_sub(own_nodes(point.level));
        // E2: the source writes one page of a leaf that both share.
        world.store(root, FULL.gfn(1).gpa(), NEW);
        expect_counts(&world, point.level, shared);
        let (_, nodes, records) = world.colony.structure_counts();
        assert_eq!((nodes, records), (before.1 + broken, before.2 + 1), "E2: the path is copied");
        // E3: the clone writes the same page. What is left of the table has one referrer.
        world.store(child, FULL.gfn(1).gpa(), OTHER);
        expect_counts(&world, point.level, shared);
        let (_, nodes, records) = world.colony.structure_counts();
        assert_eq!((nodes, records), (before.1 + broken, before.2 + 2), "E3: reused, not copied");
        // E4: another page, of the same leaf and of another.
        world.store(child, FULL.gfn(2).gpa(), OTHER);
        world.store(child, SPARSE.gfn(1).gpa(), OTHER);
        expect_counts(&world, point.level, shared);
        assert_eq!(world.colony.structure_counts().1, before.1 + broken, "E4");
        world.expect(root, FULL.gfn(2).gpa(), OLD);
        world.expect(root, SPARSE.gfn(1).gpa(), 0);
        world.expect(root, FULL.gfn(1).gpa(), NEW);
        world.expect(child, FULL.gfn(1).gpa(), OTHER);
        world.finish();
    });
}

fn e5_a_hundred_clones_of_one_cut(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| {
        let world = World::at(point, Setup::default());
        let root = world.root();
        write_memory(&world, root);
        let one = world.fork_running(root, 1);
        let counts = world.colony.structure_counts();
        let single = one.clones[0].vm;
        world.await_puppets(single);
        world.end(single);
        let before = world.usage();
        let many = world.fork_running(root, 100);
        assert_eq!(many.clones.len(), 100);
        assert_eq!(many.figures.protected_leaves, one.figures.protected_leaves);
        assert_eq!(many.figures.protect_calls, one.figures.protect_calls);
        assert_eq!(many.figures.copied_pages, 0);
        if guest == GuestKind::Thread {
            // Each clone's own, and those that the source had before: now the cut's base.
            let expected = (counts.0, counts.1 + 100 * own_nodes(point.level), counts.2);
            assert_eq!(world.colony.structure_counts(), expected, "as many as for one clone");
        }
        for clone in &many.clones {
            world.await_puppets(clone.vm);
        }
        for (clone, value) in many.clones.iter().zip(1000..) {
            world.store(clone.vm, ALONE.gpa(), value);
        }
        world.store(root, ALONE.gpa(), NEW);
        for (clone, value) in many.clones.iter().zip(1000..) {
            world.expect(clone.vm, ALONE.gpa(), value);
        }
        world.expect(root, ALONE.gpa(), NEW);
        world.check();
        // One leaf was asked for (and the built-in guest's own two), by a hundred VMs: published once.
        let blocks = world.describe(root).blocks_published;
        assert!(blocks <= if guest == GuestKind::Thread { 1 } else { 5 }, "{blocks} blocks");
        many.clones.iter().for_each(|clone| world.end(clone.vm));
        let after = world.usage();
        assert!(after.0.0 <= before.0.0 + 1, "cuts: {before:?} {after:?}");
        world.finish();
    });
}

fn e6_only_the_leaf_with_the_pin_differs(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| {
        let world = World::at(point, Setup::default());
        let root = world.root();
        let first = FULL.first_gfn();
        world.store_pages(root, first, 4 * 512, OLD);
        let pinned = LeafNumber(FULL.0 + 1);
        world.pin(root, pinned.gfn(9), 1);
        let forked = world.fork_many(root, 1);
        let child = forked.clones[0].vm;
        assert_eq!(forked.figures.copied_pages, 1);
        world.publish_all(root, Keep::Shared);
        assert_eq!(world.sum(child, first.gpa(), 4 * 512, 4096), 4 * 512 * OLD);
        for leaf in (FULL.0..FULL.0 + 4).map(LeafNumber) {
            let (of_root, of_child) =
                (world.leaf(root, leaf.first_gfn()).backing, world.leaf(child, leaf.first_gfn()).backing);
            assert_eq!(of_child, Backing::Block(forked.cut), "{leaf}");
            let expected = if leaf == pinned { Backing::Anonymous } else { Backing::Block(forked.cut) };
            assert_eq!(of_root, expected, "{leaf}: only the leaf with the pin stays the source's");
        }
        world.check();
        world.unpin(root, pinned.gfn(9), 1);
        world.finish();
    });
}

fn e9_what_is_discarded_is_zero_for_one(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| {
        for pages in [1, 512] {
            let world = World::at(point, Setup::default());
            let root = world.root();
            write_memory(&world, root);
            let child = world.fork(root);
            world.tell(root, Order::Discard { first: FULL.first_gfn(), pages });
            let left = 512 - pages;
            assert_eq!(world.sum(root, FULL.gpa(), 512, 4096), left * OLD);
            assert_eq!(world.sum(child, FULL.gpa(), 512, 4096), 512 * OLD);
            world.tell(child, Order::Discard { first: FULL.first_gfn(), pages });
            assert_eq!(world.sum(child, FULL.gpa(), 512, 4096), left * OLD);
            world.store(root, FULL.gpa(), NEW);
            world.expect(child, FULL.gpa(), 0);
            world.finish();
        }
    });
}

fn e11_memory_is_accounted(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| {
        let world = World::at(point, Setup::default());
        let root = world.root();
        write_memory(&world, root);
        world.pin(root, EMPTY.gfn(1), 3);
        let child = world.fork(root);
        world.store(root, FULL.gpa(), NEW);
        world.store(child, ALONE.gpa(), NEW);
        let memory = world.colony.config().memory.ram_bytes() / wide(PAGE_BYTES);
        let checked = world.check();
        for (vm, counts) in &checked.vms {
            let sum = counts.zero + counts.exclusive + counts.lent + counts.shared + counts.poisoned;
            assert_eq!(sum, memory, "{vm}: {counts:?}");
            assert_eq!(counts.exclusive + counts.lent, world.anonymous_pages(*vm), "{vm}: {counts:?}");
        }
        assert_eq!((checked.vms[&root].pinned, checked.vms[&child].pinned), (3, 0));
        // Every block that was written is in use, and nothing else is in the arena.
        let blocks = world.describe(root).blocks_published;
        assert_eq!(world.describe(root).patches_published, 0);
        let used = world.colony.arena_used_bytes().expect("the arena's use");
        assert_eq!(used, blocks * wide(LEAF_BYTES), "{blocks} blocks");
        world.unpin(root, EMPTY.gfn(1), 3);
        world.finish();
    });
}

/// The keeper breaks tables while guests are at work. A thread is not stopped for it, so that what is
/// found is not exact, and only looked at.
fn harvest_under_way(world: &World, vm: VmId) {
    match world.guest() {
        GuestKind::Kvm => _ = world.colony.check().unwrap_or_else(|error| panic!("{error}")),
        GuestKind::Thread => _ = world.report(vm),
    }
}

/// Who breaks tables is the keeper, at a harvest: what vCPUs break at once are the pages under them.
fn e7_two_break_one_table(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| {
        let vcpus = if guest == GuestKind::Kvm { 2 } else { 1 };
        let world = World::at(point, Setup { vcpus, ..Setup::default() });
        let root = world.root();
        write_memory(&world, root);
        for round in 1..=10_u64 {
            world.store_pages(root, FULL.first_gfn(), 512, OLD);
            let child = world.fork(root);
            // Every second page by one vCPU of the source, the others by the other; all by the clone.
            let stores = |first: usize, value: u64, pages: u64, step: u64| PuppetOrder {
                order: order::STORE_STRIDE,
                a: FULL.gfn(first).gpa().0,
                b: value,
                c: pages,
                d: step,
            };
            world.begin(root, 0, stores(0, NEW + round, 256, 8192));
            world.begin(child, 0, stores(0, OTHER + round, 512, 4096));
            if vcpus > 1 {
                world.begin(root, 1, stores(1, NEW - round, 256, 8192));
            }
            harvest_under_way(&world, root);
            world.result(root, 0);
            world.result(child, 0);
            let others = if vcpus > 1 { world.result(root, 1).wrapping_add(NEW - round) } else { OLD };
            assert_eq!(world.sum(root, FULL.gpa(), 512, 4096), 256 * (NEW + round + others));
            assert_eq!(world.sum(child, FULL.gpa(), 512, 4096), 512 * (OTHER + round));
            world.check();
            world.end(child);
        }
        world.finish();
    });
}

fn e8_a_vm_ends_while_its_sibling_breaks(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| {
        let world = World::at(point, Setup::default());
        let root = world.root();
        write_memory(&world, root);
        for round in 1..=20_u64 {
            let forked = world.fork_many(root, 2);
            let [one, other] = [forked.clones[0].vm, forked.clones[1].vm];
            world.store(other, ALONE.gpa(), NEW);
            let stores =
                PuppetOrder { order: order::STORE_STRIDE, a: FULL.gpa().0, b: NEW + round, c: 512, d: 4096 };
            world.begin(one, 0, stores);
            world.end(other);
            harvest_under_way(&world, one);
            world.result(one, 0);
            assert_eq!(world.sum(one, FULL.gpa(), 512, 4096), 512 * (NEW + round));
            assert_eq!(world.sum(root, FULL.gpa(), 512, 4096), 512 * OLD);
            world.expect(one, ALONE.gpa(), OLD);
            world.check();
            world.end(one);
        }
        world.finish();
    });
}

/// Regions of RAM are of whole leaves, so that two never meet inside one: what is left to go wrong are
/// their edges, at the hole for devices.
fn e10_two_regions_of_memory(test: &str, guest: GuestKind) {
    for bytes in [(3 << 20) + 4096, 17 << 20] {
        MemoryShape::new(bytes).expect_err("memory that does not end with a leaf");
    }
    at(test, guest, LEVEL, |point| {
        let world = World::at(point, Setup { memory_mib: 3 * 1024 + 4, ..Setup::default() });
        let root = world.root();
        let edges = [Gpa(layout::DEVICE_HOLE - 4096), Gpa(layout::HIGH_RAM)];
        edges.into_iter().for_each(|gpa| world.store(root, gpa, OLD));
        let child = world.fork(root);
        edges.into_iter().for_each(|gpa| world.store(root, gpa, NEW));
        edges.into_iter().for_each(|gpa| world.expect(child, gpa, OLD));
        edges.into_iter().for_each(|gpa| world.store(child, gpa, OTHER));
        edges.into_iter().for_each(|gpa| world.expect(root, gpa, NEW));
        let holder = PinHolder::Salp(Access::ReadWrite);
        let pin = Order::Pin { first: edges[0].gfn(), pages: 2, holder };
        let reason = world.refusal(root, pin);
        assert!(reason.contains(&Gpa(layout::DEVICE_HOLE).gfn().to_string()), "{reason}");
        let memory = world.colony.config().memory.ram_bytes() / wide(PAGE_BYTES);
        for (vm, counts) in &world.check().vms {
            let sum = counts.zero + counts.exclusive + counts.lent + counts.shared + counts.poisoned;
            assert_eq!(sum, memory, "{vm}: {counts:?}");
        }
        world.finish();
    });
}
