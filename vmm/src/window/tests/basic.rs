//! Rows A and F of the conformance table: basic copy-on-write, and families.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::nursery::{Axes, Nursery};
use super::rows::{NEW, OLD, OTHER, run, usage};
use crate::space::Keep;
use crate::words::{Gfn, Gpa, PAGE_BYTES, wide};

#[test]
fn a1_the_source_writes() {
    run("a1", |row| {
        let child = row.fork_and_publish();
        row.parent.set(row.gfn, NEW);
        row.expect(&row.parent, NEW);
        row.expect(&child, row.old);
        row.expect_beside(&child);
        if row.beside != row.gfn {
            row.expect_beside(&row.parent);
        }
    });
}

#[test]
fn a2_the_clone_writes() {
    run("a2", |row| {
        let child = row.fork_and_publish();
        child.set(row.gfn, NEW);
        row.expect(&row.parent, row.old);
        row.expect(&child, NEW);
        row.expect_beside(&row.parent);
        if row.beside != row.gfn {
            row.expect_beside(&child);
        }
    });
}

#[test]
fn a3_both_write() {
    run("a3", |row| {
        let child = row.fork_and_publish();
        row.parent.set(row.gfn, NEW);
        child.set(row.gfn, OTHER);
        row.expect(&row.parent, NEW);
        row.expect(&child, OTHER);
    });
}

#[test]
fn a4_both_only_read() {
    run("a4", |row| {
        let child = row.fork_and_publish();
        row.expect(&child, row.old);
        row.expect(&row.parent, row.old);
        let owned = child.space.harvest().expect("a harvest").counts;
        // A patch is a private copy from the start.
        assert!(owned.exclusive <= 8 && owned.lent == 0, "{owned:?} {}", row.point);
        if row.parent.space.counters().patches_published.load(Ordering::Relaxed) == 0 {
            assert_eq!(owned.exclusive, 0, "{}", row.point);
        }
    });
}

#[test]
fn a5_odd_stores_change_only_their_bytes() {
    run("a5", |row| {
        let child = row.fork_and_publish();
        let start = row.gfn.gpa().0;
        let page = wide(PAGE_BYTES);
        let stores: [(u64, usize); 5] = [(0, 1), (2047, 1), (4095, 1), (page - 4, 8), (page + 9, 2 * 4096)];
        let len_bytes = 4 * PAGE_BYTES;
        let mut expected = vec![0; len_bytes];
        row.parent.window().read(Gpa(start), &mut expected).expect("nothing is lost");
        let before = expected.clone();
        for (number, (offset, count)) in (1u8..).zip(stores) {
            let bytes = vec![number; count];
            row.parent.window().write(Gpa(start + offset), &bytes).expect("nothing is lost");
            expected[crate::words::index(offset)..][..count].copy_from_slice(&bytes);
        }
        let word = row.parent.window().word(Gpa(start + 8)).expect("aligned");
        word.fetch_add(1, Ordering::SeqCst);
        let sum = u32::from_ne_bytes(expected[8..12].try_into().expect("4 bytes")) + 1;
        expected[8..12].copy_from_slice(&sum.to_ne_bytes());
        let mut found = vec![0; len_bytes];
        row.parent.window().read(Gpa(start), &mut found).expect("nothing is lost");
        assert!(found == expected, "the source: {}", row.point);
        child.window().read(Gpa(start), &mut found).expect("nothing is lost");
        assert!(found == before, "the clone: {}", row.point);
    });
}

#[test]
fn a6_the_clone_writes_and_ends() {
    run("a6", |row| {
        row.nursery.settle();
        let base = usage(&row.nursery).1;
        let child = row.fork_and_publish();
        child.set(row.gfn, NEW);
        row.nursery.exit(child);
        row.expect(&row.parent, row.old);
        row.parent.set(row.gfn, NEW);
        row.expect(&row.parent, NEW);
        row.nursery.settle();
        // A cut whose blocks the source itself took over is still there.
        assert!(usage(&row.nursery).1 <= base + 1, "{}", row.point);
    });
}

#[test]
fn a7_the_source_ends() {
    run("a7", |row| {
        let child = row.fork_and_publish();
        let (parent, gfn) = (Arc::clone(&row.parent), row.gfn);
        parent.set(gfn, NEW);
        row.nursery.exit(parent);
        row.expect(&child, row.old);
        child.set(gfn, OTHER);
        row.expect(&child, OTHER);
    });
}

#[test]
fn a8_many_forks_leave_nothing_behind() {
    let Some(mut nursery) = Nursery::new("a8", Axes::HUGE, 4) else { return };
    let parent = nursery.first_vm();
    (0..512).for_each(|page| parent.set(Gfn(page), OLD));
    let mut base = None;
    for round in 0..40 {
        let child = nursery.fork(&parent);
        child.set(Gfn(1), round);
        parent.set(Gfn(2), round);
        if round % 3 == 0 {
            parent.publish_all(Keep::Own);
        }
        assert_eq!(child.get(Gfn(3)), OLD);
        nursery.exit(child);
        nursery.check();
        // After an odd history the same is used as after the first round.
        let used = usage(&nursery);
        assert_eq!(*base.get_or_insert(used), used, "round {round}");
    }
}

#[test]
fn a9_a_page_untouched_at_the_cut_stays_zero_in_the_clone() {
    run("a9", |row| {
        let untouched = [Gfn(512 + 300), Gfn(1024 + 9), Gfn(1536 + 511)];
        let child = row.fork_and_publish();
        for gfn in untouched {
            row.parent.set(gfn, NEW);
            assert_eq!(child.get(gfn), 0, "{}", row.point);
        }
        row.parent.publish_all(Keep::Own);
        for gfn in untouched {
            assert_eq!((child.get(gfn), row.parent.get(gfn)), (0, NEW), "{}", row.point);
        }
    });
}

#[test]
fn a14_each_fork_has_its_own_cut() {
    run("a14", |row| {
        let first = row.fork_and_publish();
        row.expect(&first, row.old);
        row.parent.set(row.gfn, NEW);
        let second = row.fork_and_publish();
        first.set(row.gfn, OTHER);
        let of_first = row.nursery.fork(&first);
        row.publish(&first);
        row.parent.set(row.gfn, 9);
        first.set(row.gfn, 8);
        row.expect(&row.parent, 9);
        row.expect(&first, 8);
        row.expect(&second, NEW);
        row.expect(&of_first, OTHER);
        for vm in [&first, &second, &of_first] {
            if row.beside != row.gfn {
                row.expect_beside(vm);
            }
        }
    });
}

#[test]
fn f1_three_generations_see_their_own() {
    run("f1", |row| {
        let child = row.fork_and_publish();
        let grandchild = row.nursery.fork(&child);
        row.parent.set(row.gfn, 1);
        grandchild.set(row.gfn, 3);
        row.publish(&child);
        child.set(row.gfn, 2);
        row.expect(&row.parent, 1);
        row.expect(&child, 2);
        row.expect(&grandchild, 3);
    });
}

#[test]
fn f5_a_second_fork_before_the_first_is_published() {
    run("f5", |row| {
        let first = row.fork();
        row.parent.set(row.gfn, NEW);
        let second = row.fork();
        row.parent.set(row.beside, 7);
        row.parent.set(row.gfn, OTHER);
        row.publish(&row.parent);
        row.expect(&first, row.old);
        row.expect(&second, NEW);
        row.expect(&row.parent, OTHER);
    });
}

#[test]
fn f5_a_second_fork_with_nothing_forced_in_between() {
    run("f5", |row| {
        let first = row.fork();
        // Untouched at the first cut: no trap.
        row.parent.set(Gfn(512 + 99), NEW);
        let second = row.fork();
        row.parent.set(Gfn(512 + 98), NEW);
        let third = row.fork();
        row.publish(&row.parent);
        let seen = |vm: &super::nursery::Vm| (vm.get(Gfn(512 + 98)), vm.get(Gfn(512 + 99)));
        assert_eq!([seen(&first), seen(&second), seen(&third)], [(0, 0), (0, NEW), (NEW, NEW)]);
        [&first, &second, &third].into_iter().for_each(|vm| row.expect(vm, row.old));
    });
}

#[test]
fn f6_a_clone_forks_before_the_source_has_published() {
    run("f6", |row| {
        let child = row.fork();
        let early = row.nursery.fork(&child);
        child.set(row.gfn, NEW);
        let late = row.nursery.fork(&child);
        row.parent.set(row.gfn, OTHER);
        row.publish(&row.parent);
        row.expect(&early, row.old);
        row.expect(&late, NEW);
        row.expect(&child, NEW);
        row.expect(&row.parent, OTHER);
    });
}
