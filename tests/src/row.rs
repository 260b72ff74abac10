//! A row of the conformance table, run over points of its axes: where the page lies, how far
//! publication has come at the time of the action, huge pages, and what the source is.

use salp::family::VmId;
use salp::space::Keep;
use salp::words::{Gfn, LeafNumber};

use crate::GuestKind;
use crate::world::{Setup, World};

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

/// How far publication has come at the time of the action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forced {
    /// Only what somebody asked for.
    Nothing,
    /// Everything; the source keeps its own copies.
    All,
    /// Everything; the source maps the blocks.
    Dropped,
}

/// What the source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// A VM that shares nothing.
    Root,
    /// A clone that knows nothing of its memory yet.
    Clone,
}

#[derive(Clone, Copy, Debug)]
struct Point {
    forced: Forced,
    page: Gfn,
    is_huge: bool,
    source: Source,
}

const POINTS: [Point; 6] = [
    Point { forced: Forced::Nothing, page: FULL.gfn(5), is_huge: true, source: Source::Root },
    Point { forced: Forced::All, page: ALONE, is_huge: false, source: Source::Root },
    Point { forced: Forced::Dropped, page: FULL.gfn(5), is_huge: true, source: Source::Root },
    Point { forced: Forced::Nothing, page: SPARSE.gfn(77), is_huge: false, source: Source::Clone },
    Point { forced: Forced::Dropped, page: EMPTY.gfn(3), is_huge: true, source: Source::Root },
    Point { forced: Forced::All, page: FULL.gfn(300), is_huge: true, source: Source::Clone },
];

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
    /// How far publication goes.
    pub forced: Forced,
    /// The point, for messages.
    pub point: String,
}

/// Runs `row` at each point; after each the checker, and the end of everything.
pub fn run(test: &str, guest: GuestKind, row: impl Fn(&Row)) {
    for point in POINTS {
        let setup = Setup { is_huge: point.is_huge, ..Setup::default() };
        let Some(world) = World::new(test, guest, &setup) else { return };
        println!("{test}: {point:?}");
        let row_here = Row::set_up(world, point);
        row(&row_here);
        row_here.world.finish();
    }
}

impl Row {
    fn set_up(world: World, point: Point) -> Self {
        let root = world.root();
        write_memory(&world, root);
        let parent = match point.source {
            Source::Root => root,
            Source::Clone => world.fork(root),
        };
        let old = if point.page.leaf() == FULL || point.page == ALONE { OLD } else { 0 };
        Self { world, parent, page: point.page, old, forced: point.forced, point: format!("{point:?}") }
    }

    /// Forks the source.
    #[track_caller]
    pub fn fork(&self) -> VmId {
        self.world.fork(self.parent)
    }

    /// Publishes as much of what `vm` owes as the point says.
    #[track_caller]
    pub fn publish(&self, vm: VmId) {
        match self.forced {
            Forced::Nothing => {}
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
