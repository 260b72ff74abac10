//! A row of the conformance table, run over pairs of axis values.

use std::sync::Arc;

use super::devices::Engine;
use super::maps::maps;
use super::nursery::{Axes, Nursery, Vm};
use crate::space::Keep;
use crate::words::{Gfn, LeafNumber};

/// What is in a page that was written before the action.
pub(super) const OLD: u64 = 0x0101;
pub(super) const NEW: u64 = 0x0202;
pub(super) const OTHER: u64 = 0x0303;
pub(super) const DEVICE: u64 = 0x0404;

/// How far publication has come at the time of the action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Publication {
    Nothing,
    Leaf,
    All,
    Dropped,
}

/// Where the row's page lies: (page, what it holds).
const PLACES: [(Gfn, u64); 4] = [
    // In a leaf that was written all over.
    (Gfn(5), OLD),
    // The only page of its leaf that was written.
    (Gfn(512 + 8), OLD),
    // Untouched, in a leaf with one written page.
    (Gfn(512 + 77), 0),
    // In an untouched leaf.
    (Gfn(1024 + 3), 0),
];

pub(super) struct Row {
    pub(super) nursery: Nursery,
    pub(super) parent: Arc<Vm>,
    /// The page that the row is about.
    pub(super) gfn: Gfn,
    /// Another page of the same leaf, which holds the same.
    pub(super) beside: Gfn,
    /// What both hold.
    pub(super) old: u64,
    pub(super) engine: Engine,
    publication: Publication,
    /// The point of the axes, for messages.
    pub(super) point: String,
}

impl Row {
    pub(super) fn fork(&mut self) -> Arc<Vm> {
        let parent = Arc::clone(&self.parent);
        self.nursery.fork(&parent)
    }

    /// Publishes as much of what `vm` owes as this point of the axes says.
    pub(super) fn publish(&self, vm: &Vm) {
        match self.publication {
            Publication::Nothing => {}
            Publication::Leaf => vm.space.force(self.gfn.leaf(), Keep::Own).expect("a force"),
            Publication::All => vm.publish_all(Keep::Own),
            Publication::Dropped => vm.publish_all(Keep::Shared),
        }
    }

    /// A fork of the parent, published as far as the axes say.
    pub(super) fn fork_and_publish(&mut self) -> Arc<Vm> {
        let child = self.fork();
        self.publish(&self.parent);
        child
    }

    #[track_caller]
    pub(super) fn expect(&self, vm: &Vm, value: u64) {
        let found = vm.get(self.gfn);
        assert!(found == value, "{} has {found:#x}, not {value:#x}: {}", vm.id, self.point);
    }

    #[track_caller]
    pub(super) fn expect_beside(&self, vm: &Vm) {
        let found = vm.get(self.beside);
        assert!(found == self.old, "{} has {found:#x} beside: {}", vm.id, self.point);
    }
}

/// What the source of the row's fork is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Generation {
    /// A VM that shares nothing: all its memory is anonymous.
    First,
    /// A clone that knows all its leaves and has written none: they are blocks, or zero.
    Second,
    /// A clone that has rewritten what the row is about: pages of its own over blocks.
    SecondOwn,
    /// A clone that knows nothing yet.
    Fresh,
}

/// Runs `row` over pairs of (arena and huge pages, publication, place, generation); after each, the
/// checker, and once all is published and the leaves are known, nothing is registered with
/// userfaultfd any more.
pub(super) fn run(test: &str, row: impl Fn(&mut Row)) {
    use Generation::{First, Fresh, Second, SecondOwn};
    use Publication::{All, Dropped, Leaf, Nothing};
    for (number, axes) in Axes::ALL.into_iter().enumerate() {
        for (step, publication) in [Nothing, Leaf, All, Dropped].into_iter().enumerate() {
            let place = PLACES[(number + step) % PLACES.len()];
            let engine = if (number + step / 2).is_multiple_of(2) { Engine::Kernel } else { Engine::Thread };
            for generation in [First, [Second, SecondOwn, Fresh][(number + 2 * step) % 3]] {
                let Some(mut row_at) = at(test, axes, place, generation) else { return };
                (row_at.publication, row_at.engine) = (publication, engine);
                row_at.point = format!("{axes:?} {publication:?} {} {engine:?} {generation:?}", place.0);
                row(&mut row_at);
                finish(row_at);
            }
        }
    }
}

fn at(test: &str, axes: Axes, (gfn, old): (Gfn, u64), generation: Generation) -> Option<Row> {
    let mut nursery = Nursery::new(test, axes, 4)?;
    let mut parent = nursery.first_vm();
    (0..512).for_each(|page| parent.set(Gfn(page), OLD));
    parent.set(Gfn(512 + 8), OLD);
    let is_alone = gfn == Gfn(512 + 8);
    let beside = Gfn(if is_alone { gfn.0 } else { gfn.0 + 1 });
    if generation != Generation::First {
        parent = nursery.fork(&parent);
    }
    if matches!(generation, Generation::Second | Generation::SecondOwn) {
        nursery.leaves().for_each(|leaf| assert!(parent.get(leaf.gfn(0)) <= OLD));
    }
    if generation == Generation::SecondOwn {
        (0..40).for_each(|page| parent.set(Gfn(page), OLD));
        parent.set(gfn, old);
    }
    let point = String::new();
    let (engine, publication) = (Engine::Thread, Publication::Nothing);
    Some(Row { nursery, parent, gfn, beside, old, engine, publication, point })
}

fn finish(mut row: Row) {
    row.nursery.check();
    for vm in row.nursery.living() {
        for leaf in (0..4).map(LeafNumber) {
            let _ = vm.get(leaf.gfn(511));
        }
    }
    row.nursery.publish_everything(Keep::Own);
    row.nursery.check();
    for vm in row.nursery.living() {
        let watched: Vec<_> = maps(vm.window()).into_iter().filter(|map| map.is_registered()).collect();
        assert!(watched.is_empty(), "{}: {}: {watched:?}", row.point, vm.id);
    }
}

/// Counts of what a colony uses, to compare with a base line: (nodes and records, cuts, bytes of the
/// arena).
pub(super) fn usage(nursery: &Nursery) -> (usize, usize, u64) {
    let counts = nursery.family.table_counts();
    let used_bytes = nursery.arena.used_bytes().expect("the arena's use");
    (counts.nodes + counts.records, nursery.family.open_cuts(), used_bytes)
}
