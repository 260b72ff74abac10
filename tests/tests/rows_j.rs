//! Rows J of the conformance table: whatever can be done to a family at once, two by two, each for a
//! few rounds. The steps of each against each other are run elsewhere, one by one; here they meet as
//! they happen to, in real processes.

use std::sync::Mutex;

use salp::family::VmId;
use salp::member::messages::{GuestKind, Order};
use salp::space::Keep;
use salp::words::{Gfn, LeafNumber};
use salp_tests::axes::{LEVEL_AND_PIN, Point};
use salp_tests::both_guests;
use salp_tests::row::{FULL, OLD, attempt, is_complete, write_memory};
use salp_tests::swap::Swap;
use salp_tests::world::{Setup, World};

both_guests! {
    j1_each_against_each;
}

/// What is done, each to pages of its own, so that what it must see does not depend on the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    /// The source stores and loads.
    Store,
    /// The clone loads what it has from the cut, and stores.
    LoadInClone,
    /// A device of the source's holds a page for a while, and stores.
    Pin,
    /// A fork, a look, an end.
    Fork,
    /// What is pending is published, and mapped by the source.
    Publish,
    /// The source discards pages.
    Discard,
    /// A clone is reset.
    Reset,
    /// Pages of the source go to swap.
    SwapOut,
}

const DEEDS: [Deed; 8] = [
    Deed::Store,
    Deed::LoadInClone,
    Deed::Pin,
    Deed::Fork,
    Deed::Publish,
    Deed::Discard,
    Deed::Reset,
    Deed::SwapOut,
];

/// Where each deed of a pair has its pages: in one leaf for both.
const STEP: usize = 200;

struct Family<'a> {
    world: &'a World,
    point: &'a Point,
    root: VmId,
    child: VmId,
    /// A clone that is reset.
    returning: VmId,
    /// One order at a time for each guest.
    guests: Mutex<()>,
}

impl Family<'_> {
    fn store(&self, vm: VmId, gfn: Gfn, value: u64) {
        let _guest = self.guests.lock().expect("nobody panicked");
        self.world.store(vm, gfn.gpa(), value);
    }

    #[track_caller]
    fn expect(&self, vm: VmId, gfn: Gfn, value: u64) {
        let _guest = self.guests.lock().expect("nobody panicked");
        self.world.expect(vm, gfn.gpa(), value);
    }

    /// Does `deed` once, with pages from `at`.
    fn once(&self, deed: Deed, at: usize, round: u64) {
        let (page, beside, value) = (FULL.gfn(at), FULL.gfn(at + 1), round + 1000);
        match deed {
            Deed::Store => {
                self.store(self.root, page, value);
                self.expect(self.root, page, value);
            }
            Deed::LoadInClone => {
                self.expect(self.child, beside, OLD);
                self.store(self.child, page, value);
                self.expect(self.child, page, value);
            }
            Deed::Pin => {
                self.world.pin_for(self.root, page, 2, self.point.pin);
                self.world.device_store(self.root, page, value);
                self.expect(self.root, page, value);
                self.store(self.root, beside, value);
                assert_eq!(self.world.device_load(self.root, beside), value);
                self.world.unpin(self.root, page, 2);
            }
            Deed::Fork => self.fork(page, value),
            Deed::Publish => self.world.tell(self.root, Order::Publish { keep: Keep::Shared }),
            Deed::Discard => {
                self.world.tell(self.root, Order::Discard { first: page, pages: 2 });
                self.expect(self.root, page, 0);
                self.store(self.root, page, value);
                self.expect(self.root, page, value);
            }
            Deed::Reset => {
                self.store(self.returning, page, value);
                let _guest = self.guests.lock().expect("nobody panicked");
                self.world.colony.reset(self.returning).unwrap_or_else(|error| panic!("a reset: {error}"));
                self.world.await_puppets(self.returning);
                self.world.expect(self.returning, page.gpa(), OLD);
            }
            Deed::SwapOut => {
                self.world.swap_out(self.root, FULL).unwrap_or_else(|error| panic!("to swap: {error}"));
                self.expect(self.root, page, OLD);
            }
        }
    }

    /// The clone has what the source had, then each its own.
    fn fork(&self, page: Gfn, value: u64) {
        let clone = {
            // A clone is at what its source's guest is at: nothing.
            let _guest = self.guests.lock().expect("nobody panicked");
            self.world.store(self.root, page.gpa(), value);
            self.world.fork(self.root)
        };
        self.store(self.root, page, value + 1);
        self.expect(clone, page, value);
        self.store(clone, page, value + 2);
        self.expect(self.root, page, value + 1);
        self.world.end(clone);
    }
}

/// Two deeds at once.
fn pair(world: &World, point: &Point, [one, other]: [Deed; 2], rounds: u64) {
    let root = world.root();
    write_memory(world, root);
    let [child, returning] = [world.fork(root), world.fork(root)];
    let family = Family { world, point, root, child, returning, guests: Mutex::new(()) };
    std::thread::scope(|scope| {
        for (number, deed) in [one, other].into_iter().enumerate() {
            let family = &family;
            scope.spawn(move || (1..=rounds).for_each(|round| family.once(deed, 10 + number * STEP, round)));
        }
    });
    // What neither has touched is as before, in all.
    for vm in [root, child, returning] {
        assert_eq!(world.sum(vm, FULL.gfn(10 + 2 * STEP).gpa(), 100, 4096), 100 * OLD, "{one:?}, {other:?}");
        world.expect(vm, LeafNumber(FULL.0 + 1).gfn(8).gpa(), OLD);
    }
    world.check();
    [returning, child, root].into_iter().for_each(|vm| world.end(vm));
}

fn j1_each_against_each(test: &str, guest: GuestKind) {
    let axes = if is_complete() { LEVEL_AND_PIN } else { &[] };
    attempt(test, guest, axes, |point| {
        let swap = Swap::on();
        if let Err(reason) = &swap {
            println!("{test}: without swap: {reason}");
        }
        let rounds = if is_complete() { 12 } else { 3 };
        let world = World::at(point, Setup::default());
        for (number, one) in DEEDS.into_iter().enumerate() {
            for other in DEEDS.into_iter().skip(number) {
                if swap.is_err() && [one, other].contains(&Deed::SwapOut) {
                    continue;
                }
                pair(&world, point, [one, other], rounds);
            }
        }
        world.finish();
        Ok(())
    });
}
