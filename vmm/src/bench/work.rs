//! The guest work that is the same for every subject: pages, and orders over them.

use salp_protocol::{layout, order};
use serde::{Deserialize, Serialize};

use super::BenchError;
use crate::member::messages::PuppetOrder;
use crate::words::{LEAF_BYTES, LEAF_PAGES, MemoryShape, PAGE_BYTES, PAGE_SHIFT, wide};

/// The most pages that a [`Work`] writes in each of its parts.
const WRITTEN_PAGES: u64 = 1 << 13;
/// Orders that do nothing, to know what an order costs by itself.
pub(super) const TRIPS: usize = 9;

/// Consecutive pages of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRun {
    /// Guest-physical address of the first.
    pub start: u64,
    /// How many.
    pub pages: u64,
}

impl PageRun {
    /// The order that stores `value` at the start of each page.
    #[must_use]
    pub fn store(&self, value: u64) -> PuppetOrder {
        let (c, d) = (self.pages, wide(PAGE_BYTES));
        PuppetOrder { order: order::STORE_STRIDE, a: self.start, b: value, c, d }
    }

    /// The order that sums up what lies at the start of each page.
    #[must_use]
    pub fn sum(&self) -> PuppetOrder {
        PuppetOrder { order: order::SUM_STRIDE, b: 0, ..self.store(0) }
    }

    /// The order that stores `value` at the start of the first page of each leaf, from the first page on.
    #[must_use]
    pub fn store_once_a_leaf(&self, value: u64) -> PuppetOrder {
        PuppetOrder { c: self.leaves(), d: wide(LEAF_BYTES), ..self.store(value) }
    }

    /// How many stores that order makes.
    #[must_use]
    pub fn leaves(&self) -> u64 {
        self.pages.div_ceil(wide(LEAF_PAGES))
    }

    /// The order that stores `value` in `count` pages, spread evenly.
    #[must_use]
    pub fn store_scattered(&self, count: u64, value: u64) -> PuppetOrder {
        let stride = (self.pages / count.max(1)).max(1) << PAGE_SHIFT;
        PuppetOrder { c: count.min(self.pages), d: stride, ..self.store(value) }
    }

    /// The order that goes over the pages until there is another, looking for it once in `stores`
    /// stores.
    #[must_use]
    pub fn walk(&self, stores: u64) -> PuppetOrder {
        PuppetOrder { order: order::COUNT_STRIDE, b: stores, ..self.store(0) }
    }

    /// The same over one page of each leaf.
    #[must_use]
    pub fn walk_leaves(&self, leaves: u64, stores: u64) -> PuppetOrder {
        PuppetOrder { c: leaves.min(self.leaves()), d: wide(LEAF_BYTES), ..self.walk(stores) }
    }

    /// The pages `[from, to)` of this run.
    #[must_use]
    pub fn part(&self, from: u64, to: u64) -> Self {
        Self { start: self.start + (from << PAGE_SHIFT), pages: to - from }
    }
}

/// The first pages of the memory that the built-in guest itself leaves alone: `bytes` of it at most.
#[must_use]
pub fn free_runs(shape: MemoryShape, bytes: u64) -> Vec<PageRun> {
    let mut left = bytes >> PAGE_SHIFT;
    let mut runs = Vec::new();
    for (first, leaves) in shape.regions() {
        let start = first.gpa().0.max(layout::FREE);
        let end = first.gpa().0 + (u64::from(leaves) << crate::words::LEAF_SHIFT);
        let pages = left.min(end.saturating_sub(start) >> PAGE_SHIFT);
        left -= pages;
        if pages > 0 {
            runs.push(PageRun { start, pages });
        }
    }
    runs
}

/// The most pages of a [`FirstRead`]: 1 MiB.
const FIRST_READ_PAGES: u64 = 256;

/// Up to 1 MiB that a clone reads, every word of it, as its first answer of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirstRead {
    run: PageRun,
    value: u64,
}

impl FirstRead {
    /// Of the first of `runs`, in which the source has stored `value` at the start of each page and
    /// nothing else. None where there are no pages.
    #[must_use]
    pub fn of(runs: &[PageRun], value: u64) -> Option<Self> {
        let run = runs.first()?;
        Some(Self { run: run.part(0, run.pages.min(FIRST_READ_PAGES)), value })
    }

    /// The order that reads it.
    #[must_use]
    pub fn order(&self) -> PuppetOrder {
        let word = wide(size_of::<u64>());
        let words = (self.run.pages << PAGE_SHIFT) / word;
        PuppetOrder { c: words, d: word, ..self.run.sum() }
    }

    /// Compares what was read.
    ///
    /// # Errors
    /// It is not what was written.
    pub fn check(&self, sum: u64) -> Result<(), BenchError> {
        expect("first MiB", sum, self.value.wrapping_mul(self.run.pages))
    }
}

/// What a clone does when it runs, and is timed at.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Task {
    /// Its first answer.
    pub first: Option<FirstRead>,
    /// Then this.
    pub work: Option<Work>,
}

/// What a clone does, one after the other.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Work {
    /// Pages that the source wrote: read for the first time.
    pub read: PageRun,
    /// Pages that the source wrote: written for the first time, one in each leaf, then all.
    pub write: PageRun,
    /// Pages that nobody touched before: written.
    pub fresh: PageRun,
    /// What the source stored in each page.
    pub value: u64,
}

/// What that took in microseconds for each page, the cost of an order itself taken off.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct WorkTimes {
    /// First read of a page of the source.
    pub read_us: f64,
    /// First write to one in a leaf that had none.
    pub leaf_write_us: f64,
    /// First write to one, one after the other, those of `leaf_write_us` done.
    pub write_us: f64,
    /// First write to a page that nobody had touched.
    pub fresh_us: f64,
    /// What an order costs by itself, in microseconds.
    pub trip_us: f64,
}

impl Work {
    /// Three parts of `memory` that leave room for the guest itself: half of it read, a quarter
    /// written, the most of the last quarter fresh. `limit_pages` bounds each; of those that are written
    /// there are 32 MiB at most, for they are slow.
    #[must_use]
    pub fn over(shape: MemoryShape, limit_pages: u64, value: u64) -> Option<Self> {
        let run = free_runs(shape, u64::MAX).first().copied()?;
        let [half, three_quarters] = [run.pages / 2, run.pages * 3 / 4];
        let part = |from: u64, to: u64, limit: u64| run.part(from, to.min(from + limit));
        let written = limit_pages.min(WRITTEN_PAGES);
        Some(Self {
            read: part(0, half, limit_pages),
            write: part(half, three_quarters, written),
            fresh: part(three_quarters, run.pages, written),
            value,
        })
    }

    /// The pages that the source must have written before.
    #[must_use]
    pub fn dirty(&self) -> [PageRun; 2] {
        [self.read, self.write]
    }

    /// Does it: `timed` has the clone do an order and says its result and its nanoseconds.
    pub(super) fn run<E: From<BenchError>>(
        &self,
        trip_ns: u64,
        mut timed: impl FnMut(PuppetOrder) -> Result<(u64, u64), E>,
    ) -> Result<WorkTimes, E> {
        let each = |count: u64, ns: u64| ns.saturating_sub(trip_ns) as f64 / 1e3 / count.max(1) as f64;
        let (sum, read_ns) = timed(self.read.sum())?;
        expect("first read", sum, self.value.wrapping_mul(self.read.pages))?;
        let (_, leaf_write_ns) = timed(self.write.store_once_a_leaf(self.value + 1))?;
        let (_, write_ns) = timed(self.write.store(self.value + 1))?;
        let (_, fresh_ns) = timed(self.fresh.store(self.value + 1))?;
        let (sum, _) = timed(self.write.sum())?;
        expect("read after write", sum, (self.value + 1).wrapping_mul(self.write.pages))?;
        Ok(WorkTimes {
            read_us: each(self.read.pages, read_ns),
            leaf_write_us: each(self.write.leaves(), leaf_write_ns),
            write_us: each(self.write.pages - self.write.leaves().min(self.write.pages), write_ns),
            fresh_us: each(self.fresh.pages, fresh_ns),
            trip_us: trip_ns as f64 / 1e3,
        })
    }
}

fn expect(what: &'static str, found: u64, expected: u64) -> Result<(), BenchError> {
    if found == expected { Ok(()) } else { Err(BenchError::Wrong { what, found, expected }) }
}

/// The middle one of `values`; 0 of none.
pub(super) fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_the_work_do_not_overlap_and_stay_inside() {
        let shape = MemoryShape::new(64 << 20).expect("whole leaves");
        let end = |run: PageRun| run.start + (run.pages << PAGE_SHIFT);
        for limit_pages in [16, 1 << 20] {
            let work = Work::over(shape, limit_pages, 7).expect("there is memory");
            assert!(work.read.start >= layout::FREE && end(work.read) <= work.write.start);
            assert!(end(work.write) <= work.fresh.start && end(work.fresh) <= 64 << 20);
            let parts = [work.read, work.write, work.fresh];
            assert!(parts.iter().all(|run| (1..=limit_pages).contains(&run.pages)));
        }
    }

    #[test]
    fn runs_leave_the_hole_and_the_guest_alone() {
        let shape = MemoryShape::new(4 << 30).expect("whole leaves");
        let runs = free_runs(shape, u64::MAX);
        let pages: u64 = runs.iter().map(|run| run.pages).sum();
        assert_eq!((runs.len(), pages), (2, ((4 << 30) - layout::FREE) >> PAGE_SHIFT));
        assert_eq!(free_runs(shape, 8192), [PageRun { start: layout::FREE, pages: 2 }]);
        assert!(free_runs(shape, 0).is_empty());
    }

    #[test]
    fn orders_stay_in_their_pages() {
        let run = PageRun { start: layout::FREE, pages: 1300 };
        let last = |order: PuppetOrder| order.a + (order.c - 1) * order.d;
        let end = run.start + (run.pages << PAGE_SHIFT);
        for count in [1, 7, 1000, 1300, 4000] {
            let scattered = run.store_scattered(count, 1);
            assert!(scattered.c == count.min(1300) && last(scattered) < end, "{scattered:?}");
        }
        let first = FirstRead::of(&[run], 3).expect("there are pages");
        assert_eq!(last(first.order()) + 8, run.start + (1 << 20));
        assert!(first.check(3 * 256).is_ok() && first.check(3).is_err());
        assert_eq!((run.leaves(), last(run.store_once_a_leaf(1)) < end), (3, true));
        assert_eq!((run.walk(3000).c, run.walk_leaves(64, 3000).c), (1300, 3));
        assert!(last(run.walk(9)) < end && last(run.walk_leaves(64, 9)) < end);
        assert_eq!(FirstRead::of(&[], 3), None);
    }

    #[test]
    fn wrong_sums_are_no_figures() {
        let shape = MemoryShape::new(64 << 20).expect("whole leaves");
        let work = Work::over(shape, 16, 7).expect("there is memory");
        let right = |order: PuppetOrder| {
            let value = if order.a == work.read.start { 7 } else { 8 };
            Ok::<_, BenchError>((order.c * value, 1000))
        };
        assert!(work.run(0, right).is_ok());
        assert!(matches!(work.run(0, |_| Ok((1, 1000))), Err(BenchError::Wrong { .. })));
    }
}
