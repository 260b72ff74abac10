//! Rows G of the conformance table: huge pages, split and made again.

use salp::family::VmId;
use salp::member::messages::{GuestKind, PuppetOrder};
use salp::space::{Backing, Keep};
use salp::words::{Gfn, LeafNumber};
use salp_protocol::order;
use salp_tests::axes::{LEVEL, LEVEL_AND_PIN, Point};
use salp_tests::both_guests;
use salp_tests::row::{DEVICE, FULL, NEW, OLD, OTHER, attempt, write_memory};
use salp_tests::world::{Setup, World};

both_guests! {
    g1_a_store_to_a_lent_huge_page;
    g2_a_split_without_a_write;
    g3_a_leaf_half_shared_is_made_huge;
    g4_a_pin_in_a_huge_page;
    g5_a_block_is_collapsed_under_its_readers;
}

const NO_HUGE_PAGE: &str = "the host had no huge page";
const NOT_SHOWN: &str = "the host does not show frame numbers to this user";

fn pages_of(leaf: LeafNumber) -> Vec<Gfn> {
    (0..512).map(|page| leaf.gfn(page)).collect()
}

/// The frames of a leaf.
fn frames(world: &World, vm: VmId, leaf: LeafNumber) -> Result<Vec<u64>, String> {
    world.frames(vm, &pages_of(leaf)).ok_or_else(|| NOT_SHOWN.to_owned())
}

/// Whether they can be one huge page.
fn is_huge(frames: &[u64]) -> bool {
    frames[0] != 0 && frames[0].is_multiple_of(512) && frames.windows(2).all(|two| two[0] + 1 == two[1])
}

/// A root whose full leaf is a huge page.
fn huge_root(point: &Point) -> Result<(World, VmId, Vec<u64>), String> {
    let world = World::at(point, Setup::default());
    let root = world.root();
    write_memory(&world, root);
    let frames = frames(&world, root, FULL)?;
    if is_huge(&frames) { Ok((world, root, frames)) } else { Err(NO_HUGE_PAGE.to_owned()) }
}

fn g1_a_store_to_a_lent_huge_page(test: &str, guest: GuestKind) {
    attempt(test, guest, LEVEL, |point| {
        let (world, root, before) = huge_root(point)?;
        let child = world.fork(root);
        world.store(root, FULL.gfn(77).gpa(), NEW);
        assert_eq!(frames(&world, root, FULL)?, before, "the source has its huge page still");
        assert_eq!(world.sum(root, FULL.gpa(), 512, 4096), 511 * OLD + NEW);
        assert_eq!(world.sum(child, FULL.gpa(), 512, 4096), 512 * OLD);
        world.finish();
        Ok(())
    });
}

fn g2_a_split_without_a_write(test: &str, guest: GuestKind) {
    attempt(test, guest, LEVEL, |point| {
        let (world, root, before) = huge_root(point)?;
        world.split(root, FULL.gfn(9)).map_err(|error| format!("no split: {error}"))?;
        let report = world.leaf(root, FULL.first_gfn());
        assert_eq!(report.exclusive.len(), 512, "{report:?}");
        world.store_pages(root, FULL.first_gfn(), 512, NEW);
        assert_eq!(frames(&world, root, FULL)?, before, "a page was copied");
        let child = world.fork(root);
        world.store_pages(root, FULL.first_gfn(), 512, OTHER);
        assert_eq!(world.sum(child, FULL.gpa(), 512, 4096), 512 * NEW);
        assert_eq!(frames(&world, root, FULL)?, before, "a page was copied");
        world.finish();
        Ok(())
    });
}

/// The host may refuse to make it one page: then all is as before, too.
fn g3_a_leaf_half_shared_is_made_huge(test: &str, guest: GuestKind) {
    attempt(test, guest, LEVEL, |point| {
        let (world, root, _) = huge_root(point)?;
        let child = world.fork(root);
        world.publish_all(root, Keep::Own);
        world.store_pages(child, FULL.first_gfn(), 256, NEW);
        // Half of the source's leaf is lent, half its own.
        let second = world.fork(root);
        for vm in [root, child] {
            if let Err(error) = world.collapse(vm, FULL) {
                println!("{test}: {vm}: the host does not collapse: {error}");
            }
        }
        let report = world.leaf(child, FULL.first_gfn());
        let own = report.exclusive.len();
        assert!(own == 512 || (own == 256 && !report.exclusive.contains(256)), "{report:?}");
        assert_eq!(world.sum(root, FULL.gpa(), 512, 4096), 512 * OLD);
        assert_eq!(world.sum(child, FULL.gpa(), 512, 4096), 256 * (NEW + OLD));
        world.store_pages(root, FULL.gfn(256), 256, OTHER);
        world.store_pages(child, FULL.gfn(128), 256, DEVICE);
        assert_eq!(world.sum(root, FULL.gpa(), 512, 4096), 256 * (OLD + OTHER));
        assert_eq!(world.sum(child, FULL.gpa(), 512, 4096), 128 * (NEW + OLD) + 256 * DEVICE);
        assert_eq!(world.sum(second, FULL.gpa(), 512, 4096), 512 * OLD);
        world.finish();
        Ok(())
    });
}

fn g4_a_pin_in_a_huge_page(test: &str, guest: GuestKind) {
    attempt(test, guest, LEVEL_AND_PIN, |point| {
        let (world, root, before) = huge_root(point)?;
        world.pin_for(root, FULL.gfn(100), 1, point.pin);
        let forked = world.fork_many(root, 1);
        assert_eq!(forked.figures.copied_pages, 1);
        let child = forked.clones[0].vm;
        world.device_store(root, FULL.gfn(100), DEVICE);
        world.store(root, FULL.gfn(101).gpa(), NEW);
        world.publish_all(root, Keep::Shared);
        assert_eq!(frames(&world, root, FULL)?, before, "a page of the source was moved");
        assert_eq!(world.sum(child, FULL.gpa(), 512, 4096), 512 * OLD);
        assert_eq!(world.sum(root, FULL.gpa(), 512, 4096), 510 * OLD + DEVICE + NEW);
        // All others are one page for all who share them.
        let twin = world.fork(child);
        assert_eq!(world.sum(twin, FULL.gpa(), 512, 4096), 512 * OLD);
        assert_eq!(world.leaf(child, FULL.first_gfn()).backing, Backing::Block(forked.cut));
        world.check();
        world.unpin(root, FULL.gfn(100), 1);
        world.finish();
        Ok(())
    });
}

/// An arena of small pages: each block is one huge page only after somebody has asked for it.
fn g5_a_block_is_collapsed_under_its_readers(test: &str, guest: GuestKind) {
    attempt(test, guest, LEVEL, |point| {
        let world = World::at(point, Setup { is_huge: false, ..Setup::default() });
        let root = world.root();
        write_memory(&world, root);
        let forked = world.fork_many(root, 2);
        let [reader, collapser] = [forked.clones[0].vm, forked.clones[1].vm];
        world.publish_all(root, Keep::Shared);
        let sum = |vm| world.sum(vm, FULL.gpa(), 512, 4096);
        assert_eq!(sum(collapser), 512 * OLD);
        let read = PuppetOrder { order: order::SUM_STRIDE, a: FULL.gpa().0, b: 0, c: 512, d: 4096 };
        let mut collapsed = Ok(());
        for _ in 0..20 {
            world.begin(reader, 0, read);
            collapsed = world.collapse(collapser, FULL);
            assert_eq!(world.result(reader, 0), 512 * OLD, "while the block was collapsed");
            assert_eq!(sum(collapser), 512 * OLD);
        }
        collapsed.map_err(|error| format!("the host does not collapse: {error}"))?;
        assert_eq!(sum(reader), 512 * OLD);
        assert!(is_huge(&frames(&world, reader, FULL)?), "the block is one huge page for its readers");
        world.store(reader, FULL.gpa(), NEW);
        assert_eq!((sum(reader), sum(collapser), sum(root)), (511 * OLD + NEW, 512 * OLD, 512 * OLD));
        world.finish();
        Ok(())
    });
}
