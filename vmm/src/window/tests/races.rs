//! Hazards that need two threads: stores while a leaf is published and dropped, and the order of a
//! device's stores across a cut.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::nursery::{Axes, Nursery, Vm};
use super::rows::OLD;
use crate::space::{Access, Keep};
use crate::words::{Gfn, Gpa, LEAF_PAGES, wide};

/// A thread that acts on a VM until it is told to stop; what it counted is returned.
struct Actor {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<u64>,
}

impl Actor {
    fn start(act: impl Fn(u64) + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                let mut count = 0;
                while !stop.load(Ordering::Relaxed) {
                    count += 1;
                    act(count);
                }
                count
            }
        });
        Self { stop, thread }
    }

    fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("an actor")
    }
}

fn touched(nursery: &mut Nursery, leaves: u64) -> Arc<Vm> {
    let vm = nursery.first_vm();
    (0..leaves * wide(LEAF_PAGES)).for_each(|page| vm.store(Gfn(page).gpa(), OLD));
    vm
}

/// One thread stores a counter to a page of each leaf in turn, and looks whether the last one is
/// still there. Every VM drops each leaf once at most, so there are several.
#[test]
fn hazard_p5_stores_while_a_leaf_is_dropped_are_not_lost() {
    const LEAVES: u64 = 8;
    let place = |count: u64| Gfn(count % LEAVES * wide(LEAF_PAGES) + 7).gpa();
    let mut dropped = 0;
    for axes in [Axes::HUGE, Axes::SMALL, Axes::HUGE, Axes::SMALL] {
        let Some(mut nursery) = Nursery::new("hazard_p5", axes, 8) else { return };
        let vm = touched(&mut nursery, LEAVES);
        (0..=LEAVES).for_each(|count| vm.store(place(count), count.saturating_sub(LEAVES)));
        let actor = Actor::start({
            let vm = Arc::clone(&vm);
            move |count| {
                assert_eq!(vm.load(place(count)), count.saturating_sub(LEAVES), "a store was lost");
                vm.store(place(count), count);
            }
        });
        for _ in 0..50 {
            let child = nursery.fork(&vm);
            vm.publish_all(Keep::Shared);
            let at_cut: Vec<u64> = (0..LEAVES).map(|leaf| child.load(place(leaf))).collect();
            let newest = at_cut.iter().max().expect("leaves");
            assert!(at_cut.iter().all(|count| count + LEAVES > *newest), "{at_cut:?} is no instant");
            nursery.exit(child);
        }
        let count = actor.finish();
        assert_eq!(vm.load(place(count)), count);
        dropped += vm.space.counters().leaves_dropped.load(Ordering::Relaxed);
        nursery.check();
    }
    assert!(dropped > 0, "no leaf was ever dropped");
}

/// A page that was never touched does not trap: its first store may come at any moment of a drop.
#[test]
fn hazard_p5_first_stores_to_untouched_pages_while_a_leaf_is_dropped_are_not_lost() {
    const LEAVES: u32 = 24;
    let axes = Axes { is_huge: false, ..Axes::HUGE };
    let Some(mut nursery) = Nursery::new("hazard_p5", axes, LEAVES) else { return };
    let vm = nursery.first_vm();
    let pages = u64::from(LEAVES) * wide(LEAF_PAGES);
    // One touched page in each leaf; the thread comes by all others, leaf after leaf, in turns.
    let place = move |count: u64| {
        let leaf = count % u64::from(LEAVES);
        Gfn(leaf * wide(LEAF_PAGES) + count / u64::from(LEAVES))
    };
    (0..u64::from(LEAVES)).for_each(|count| vm.store(place(count).gpa(), count));
    let progress = Arc::new(AtomicU64::new(0));
    let actor = Actor::start({
        let (vm, progress) = (Arc::clone(&vm), Arc::clone(&progress));
        move |count| {
            let count = count - 1 + u64::from(LEAVES);
            if count < pages {
                vm.store(place(count).gpa(), count);
                progress.store(count, Ordering::Release);
            }
        }
    });
    while progress.load(Ordering::Acquire) < pages - 1 {
        let child = nursery.fork(&vm);
        vm.publish_all(Keep::Shared);
        nursery.exit(child);
    }
    actor.finish();
    for count in 0..pages {
        assert_eq!(vm.load(place(count).gpa()), count, "the store to {} was lost", place(count));
    }
    nursery.check();
}

/// Cuts come while forces are under way: a leaf that was just forced for one cut belongs to the next
/// one before it is opened.
#[test]
fn a_cut_during_a_force_finds_its_pages_protected() {
    for axes in [Axes::HUGE, Axes::SMALL] {
        let Some(mut nursery) = Nursery::new("a_cut_during_a_force", axes, 2) else { return };
        let vm = touched(&mut nursery, 1);
        let actor = Actor::start({
            let vm = Arc::clone(&vm);
            move |count| vm.store(Gfn(9).gpa(), count)
        });
        let forcer = Actor::start({
            let vm = Arc::clone(&vm);
            move |_| {
                if !vm.space.publish_next(Keep::Own).expect("publishing") {
                    std::thread::yield_now();
                }
            }
        });
        for round in 0..150 {
            let (cut, _) = nursery.cut(&vm);
            let one = nursery.clone_of(cut);
            let other = nursery.clone_of(cut);
            let seen = one.load(Gfn(9).gpa());
            if round % 2 == 0 {
                while vm.load(Gfn(9).gpa()) < seen + 2 {
                    std::thread::yield_now();
                }
            }
            assert_eq!(other.load(Gfn(9).gpa()), seen, "two clones of one cut differ");
            assert_eq!(one.load(Gfn(10).gpa()), OLD);
            nursery.exit(one);
            nursery.exit(other);
        }
        forcer.finish();
        actor.finish();
        nursery.check();
    }
}

/// A device's thread stores to page A, then to page B; it is not stopped at a cut.
#[test]
fn hazard_p14_in_a_clone_the_second_store_is_never_newer_than_the_first() {
    for axes in [Axes::HUGE, Axes::SMALL] {
        let Some(mut nursery) = Nursery::new("hazard_p14", axes, 8) else { return };
        let vm = touched(&mut nursery, 8);
        let (first, second) = (Gfn(3).gpa(), Gfn(7 * 512 + 511).gpa());
        let pairs = [(first, second), (second, first)];
        for (a, b) in pairs {
            vm.store(a, 0);
            vm.store(b, 0);
            let device = Actor::start({
                let vm = Arc::clone(&vm);
                move |count| {
                    vm.window().word(a).expect("aligned").store(low(count), Ordering::SeqCst);
                    vm.window().word(b).expect("aligned").store(low(count), Ordering::SeqCst);
                }
            });
            let publisher = Actor::start({
                let vm = Arc::clone(&vm);
                move |count| {
                    let keep = if count % 3 == 0 { Keep::Shared } else { Keep::Own };
                    if !vm.space.publish_next(keep).expect("publishing") {
                        std::thread::yield_now();
                    }
                }
            });
            for round in 0..60 {
                let child = nursery.fork(&vm);
                let in_clone = |gpa| child.load(gpa);
                let (b_seen, a_seen) = (in_clone(b), in_clone(a));
                assert!(b_seen <= a_seen, "round {round}: B {b_seen} is newer than A {a_seen}");
                assert!(a_seen <= b_seen + 1, "round {round}: A {a_seen} is too new for B {b_seen}");
                nursery.exit(child);
            }
            publisher.finish();
            device.finish();
        }
        nursery.check();
    }
}

fn low(count: u64) -> u32 {
    u32::try_from(count).expect("fewer stores than that")
}

/// Short pins at the highest rate, stores, forks, publication with drops and exits, all at once. The
/// device writes a number to its page under the pin, and finds it there under the next one.
#[test]
fn short_pins_against_forks_lose_no_transfer() {
    for axes in [Axes::HUGE, Axes::SMALL] {
        let Some(mut nursery) = Nursery::new("short_pins", axes, 4) else { return };
        let vm = touched(&mut nursery, 2);
        (0..3).for_each(|leaf| vm.set(Gfn(leaf * 512 + 20), 0));
        let devices: Vec<Actor> = (0..3)
            .map(|leaf| {
                let (vm, gfn) = (Arc::clone(&vm), Gfn(leaf * 512 + 20));
                Actor::start(move |count| {
                    assert_eq!(vm.get(gfn), count - 1, "a transfer was lost");
                    vm.space.pin(gfn, 1, Access::ReadWrite).expect("a pin");
                    vm.set(gfn, count);
                    vm.space.unpin(gfn, 1).expect("the pin is there");
                })
            })
            .collect();
        for round in 0..60 {
            let child = nursery.fork(&vm);
            let at_cut: Vec<u64> = (0..3).map(|leaf| child.load(Gfn(leaf * 512 + 20).gpa())).collect();
            if round % 2 == 0 {
                vm.publish_all(Keep::Shared);
            }
            for (leaf, seen) in (0..3).zip(at_cut) {
                // The cut may have come in the middle of the device's copy loop, but stays as it is.
                assert_eq!(child.load(Gfn(leaf * 512 + 20).gpa()), seen);
                assert!(seen <= vm.load(Gfn(leaf * 512 + 20).gpa()));
            }
            nursery.exit(child);
        }
        let counts: Vec<u64> = devices.into_iter().map(Actor::finish).collect();
        for (leaf, count) in (0..3).zip(counts) {
            assert_eq!(vm.get(Gfn(leaf * 512 + 20)), count);
        }
        assert_eq!(vm.space.pinned(), (0, 0));
        nursery.check();
    }
}

/// Three threads write their own words of the same leaves of a clone that knows nothing yet, while
/// it is forked itself: a first touch, a copy and a protection meet.
#[test]
fn first_touches_against_forks_of_the_same_clone() {
    for axes in [Axes::HUGE, Axes::SMALL] {
        let Some(mut nursery) = Nursery::new("first_touches", axes, 8) else { return };
        let parent = touched(&mut nursery, 6);
        for _ in 0..6 {
            let clone = nursery.fork(&parent);
            let actors: Vec<Actor> = (0..3)
                .map(|word| {
                    let vm = Arc::clone(&clone);
                    let place =
                        move |count: u64| Gpa(Gfn(count % 8 * 512 + count % 7).gpa().0 + 8 + word * 8);
                    Actor::start(move |count| {
                        vm.store(place(count), count);
                        assert_eq!(vm.load(place(count)), count);
                    })
                })
                .collect();
            for _ in 0..5 {
                let grandchild = nursery.fork(&clone);
                let before: Vec<_> = (0..8).map(|leaf| grandchild.page(Gfn(leaf * 512 + 3))).collect();
                clone.publish_all(Keep::Shared);
                for (leaf, page) in (0..8).zip(before) {
                    assert!(grandchild.page(Gfn(leaf * 512 + 3)) == page, "the clone's memory changes");
                    let first = grandchild.load(Gfn(leaf * 512 + 3).gpa());
                    assert_eq!(first, if leaf < 6 { OLD } else { 0 });
                }
                nursery.exit(grandchild);
            }
            for actor in actors {
                actor.finish();
            }
            nursery.exit(clone);
            nursery.check();
        }
    }
}
