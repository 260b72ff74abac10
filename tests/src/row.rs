//! A row of the conformance table, run over points of its axes: a source whose memory is set up, and
//! what a row does with it.
//!
//! [`run`] and [`at`] say for the table how each point ended: see [`record`](crate::record). Without
//! `SALP_CONFORMANCE=all` in the environment they run the first few points only.

use salp::family::VmId;
use salp::member::messages::{Order, PinHolder};
use salp::space::{Access, Keep};
use salp::words::{Gfn, LeafNumber};

use crate::GuestKind;
use crate::axes::{Axis, Forced, Lies, Point, Source, points};
use crate::record::{Outcome, report, report_values, value_of};
use crate::swap::Swap;
use crate::world::{Setup, World, lack};

/// What is in a page that was written before the action.
pub const OLD: u64 = 0x0101_0101;
/// What the row stores.
pub const NEW: u64 = 0x0202_0202;
/// What it stores besides.
pub const OTHER: u64 = 0x0303_0303;
/// What a device stores.
pub const DEVICE: u64 = 0x0404_0404;

/// A leaf all of whose pages were written.
pub const FULL: LeafNumber = LeafNumber(2);
/// A leaf with one written page, [`ALONE`].
pub const SPARSE: LeafNumber = LeafNumber(3);
/// A leaf that nobody has touched.
pub const EMPTY: LeafNumber = LeafNumber(4);
/// The one written page of its leaf.
pub const ALONE: Gfn = SPARSE.gfn(8);
/// A page of [`FULL`] at which a huge page is split.
const SPLIT: Gfn = FULL.gfn(200);

/// Points of a row that are run where not all are asked for.
const USUAL_POINTS: usize = 4;

/// One point: a source whose memory is set up.
pub struct Row {
    /// The world.
    pub world: World,
    /// The source.
    pub parent: VmId,
    /// The page that the row is about.
    pub page: Gfn,
    /// What it holds before the action.
    pub old: u64,
    /// The point.
    pub point: Point,
    // Last: what is in swap goes with the world.
    swap: Option<Swap>,
}

/// Whether all points of all rows are to be run, and stresses for as long as the table asks for.
#[must_use]
pub fn is_complete() -> bool {
    std::env::var("SALP_CONFORMANCE").is_ok_and(|value| value == "all")
}

/// Runs `row` at each point of these axes, with a source whose memory is set up; after each the
/// checker, and the end of everything.
pub fn run(test: &str, guest: GuestKind, axes: &[Axis], row: impl Fn(&Row)) {
    attempt(test, guest, axes, |point| {
        let here = Row::set_up(point)?;
        row(&here);
        here.world.finish();
        drop(here.swap);
        Ok(())
    });
    if axes.contains(&Axis::Backing) {
        // Its image is a file on disk: there is no writer of one yet.
        let values = format!("{} backing=snapshot", value_of(guest));
        report_values(test, &values, &Outcome::Skipped("no snapshots yet".to_owned()));
    }
}

/// Runs `row`, which makes its own world, at each point of these axes.
pub fn at(test: &str, guest: GuestKind, axes: &[Axis], row: impl Fn(&Point)) {
    attempt(test, guest, axes, |point| {
        row(point);
        Ok(())
    });
}

/// As [`at`], where the host may lack something at a point: `row` says what.
pub fn attempt(test: &str, guest: GuestKind, axes: &[Axis], row: impl Fn(&Point) -> Result<(), String>) {
    let lack = lack(guest);
    let limit = if is_complete() { usize::MAX } else { USUAL_POINTS };
    for point in points(axes, guest).into_iter().take(limit) {
        println!("{test}: {point}");
        let result = lack.clone().map_or_else(|| row(&point), Err);
        match result {
            Ok(()) => report(test, &point, &Outcome::Pass),
            Err(reason) => {
                println!("SKIPPED: {test}: {point}: {reason}");
                report(test, &point, &Outcome::Skipped(reason));
            }
        }
    }
}

impl Row {
    fn set_up(point: &Point) -> Result<Self, String> {
        let swap = match point.backing {
            Lies::SwappedOut => Some(Swap::on()?),
            _ => None,
        };
        let world = World::at(point, Setup::default());
        let root = world.root();
        write_memory(&world, root);
        if matches!(point.backing, Lies::SplitByProtection | Lies::SplitByDiscard) {
            split(&world, root, point.backing);
        }
        let parent = match point.source {
            Source::Root => root,
            Source::Clone => world.fork(root),
        };
        let (page, old) = match point.backing {
            Lies::UntouchedLeaf => (EMPTY.gfn(3), 0),
            Lies::UntouchedPage => (SPARSE.gfn(77), 0),
            _ => (FULL.gfn(5), OLD),
        };
        if point.backing == Lies::SwappedOut {
            // A clone has nothing of its own there yet that could go.
            world.store(parent, page.gpa(), OLD);
            let swapped = world.swap_out(parent, page.leaf()).map_err(|error| format!("no swap: {error}"))?;
            assert!(swapped > 0, "nothing was swapped out: {point}");
        }
        Ok(Self { world, parent, page, old, point: point.clone(), swap })
    }

    /// Forks the source.
    #[track_caller]
    pub fn fork(&self) -> VmId {
        self.world.fork(self.parent)
    }

    /// Publishes as much of what `vm` owes as the point says.
    #[track_caller]
    pub fn publish(&self, vm: VmId) {
        match self.point.forced {
            Forced::Nothing => {}
            Forced::Leaf => {
                // Somebody asks for the leaf, at another page of it.
                let beside = self.page.leaf().gfn(511);
                for clone in self.world.clones(vm).into_iter().filter_map(|clones| clones.last().copied()) {
                    self.world.load(clone, beside.gpa());
                }
            }
            Forced::All => self.world.publish_all(vm, Keep::Own),
            Forced::Dropped => self.world.publish_all(vm, Keep::Shared),
        }
    }

    /// Forks the source and publishes.
    #[track_caller]
    pub fn fork_and_publish(&self) -> VmId {
        let child = self.fork();
        self.publish(self.parent);
        child
    }

    /// A VM stores to the row's page.
    #[track_caller]
    pub fn store(&self, vm: VmId, value: u64) {
        self.world.store(vm, self.page.gpa(), value);
    }

    /// What a VM must see in the row's page; and that what lies elsewhere is untouched.
    #[track_caller]
    pub fn expect(&self, vm: VmId, value: u64) {
        let found = self.world.load(vm, self.page.gpa());
        assert!(found == value, "{vm} has {found:#x}, not {value:#x}: {}", self.point);
        let beside = self.world.load(vm, FULL.gfn(6).gpa());
        assert!(beside == OLD, "{vm} has {beside:#x} beside: {}", self.point);
    }

    /// Pins the row's page for the point's device.
    #[track_caller]
    pub fn pin(&self, vm: VmId) {
        self.world.pin_for(vm, self.page, 1, self.point.pin);
    }

    /// The same, for a device that only reads. The host's kernel knows no such pins: to it all are to
    /// be written.
    #[track_caller]
    pub fn pin_to_read(&self, vm: VmId) {
        let holder = match self.point.pin {
            PinHolder::Salp(_) => PinHolder::Salp(Access::Read),
            PinHolder::Kernel => PinHolder::Kernel,
        };
        self.world.pin_for(vm, self.page, 1, holder);
    }

    /// The device's claim ends with the row, so that the checker sees a VM with pins and without.
    #[track_caller]
    pub fn unpin(&self, vm: VmId) {
        self.world.check();
        self.world.unpin(vm, self.page, 1);
    }

    /// Where the host's kernel is the device: it begins a transfer to the row's page, which the next
    /// [`Row::device_store`] ends.
    #[track_caller]
    pub fn device_begin(&self, vm: VmId) {
        if self.point.pin == PinHolder::Kernel {
            self.world.tell(vm, Order::DeviceBegin { gfn: self.page });
        }
    }

    /// A device of a VM stores to the row's page, which is pinned.
    #[track_caller]
    pub fn device_store(&self, vm: VmId, value: u64) {
        self.world.device_store(vm, self.page, value);
    }

    /// What a device of a VM must see in the row's page, which is pinned.
    #[track_caller]
    pub fn expect_device(&self, vm: VmId, value: u64) {
        let found = self.world.device_load(vm, self.page);
        assert!(found == value, "a device of {vm} sees {found:#x}, not {value:#x}: {}", self.point);
    }

    /// The host frame of the row's page, where the host shows it.
    #[must_use]
    pub fn frame(&self, vm: VmId) -> Option<u64> {
        self.world.frames(vm, &[self.page]).map(|frames| frames[0])
    }
}

/// Gives a root the memory that the constants of this module describe.
#[track_caller]
pub fn write_memory(world: &World, root: VmId) {
    world.store_pages(root, FULL.first_gfn(), 512, OLD);
    world.store(root, ALONE.gpa(), OLD);
}

/// Splits the huge page of [`FULL`] without a change to its bytes.
fn split(world: &World, root: VmId, how: Lies) {
    if how == Lies::SplitByDiscard {
        world.tell(root, Order::Discard { first: SPLIT, pages: 1 });
    } else {
        // A pinned page is copied at the cut, and a store takes the protection off it alone.
        world.pin(root, SPLIT, 1);
        let child = world.fork(root);
        world.store(root, SPLIT.gpa(), OLD);
        world.unpin(root, SPLIT, 1);
        world.end(child);
    }
    world.store(root, SPLIT.gpa(), OLD);
}
