//! How fast lent pages are published, and how much memory that writes.

use super::BenchError;
use super::measure::{Bench, Cell, with};
use super::report::{Params, Unit};
use super::source::{Publishing, Source};
use super::work::{PageRun, free_runs};
use crate::family::VmId;
use crate::kvm::vcpu::monotonic_ns;
use crate::member::messages::Order;
use crate::space::Keep;
use crate::words::{LEAF_PAGES, PAGE_SHIFT, wide};

/// Dirty pages in each leaf: one patch, as many patches as there may be, more, and all.
const DIRTY_IN_LEAF: [u64; 4] = [1, 8, 64, 512];
/// Leaves in which there are so many.
const LEAVES: u64 = 16;
/// What is written is counted, not timed.
const COUNTED_RUNS: u32 = 3;

impl Bench<'_> {
    /// The benchmark `publish`.
    pub(super) fn publish(&mut self, cell: &Cell<'_>) -> Result<(), BenchError> {
        self.publish_rate(cell)?;
        for is_clone in [false, true] {
            let params = with(&cell.params(), "source", if is_clone { "clone" } else { "first" });
            self.publish_bytes(cell, is_clone, &params)?;
        }
        Ok(())
    }

    fn publish_rate(&mut self, cell: &Cell<'_>) -> Result<(), BenchError> {
        let params = cell.params();
        // Half of the memory: there is room for all subjects' copies.
        let runs = free_runs(cell.memory, cell.memory.ram_bytes() / 2);
        let pages: u64 = runs.iter().map(|run| run.pages).sum();
        let mib = (pages << PAGE_SHIFT) as f64 / f64::from(1 << 20);
        let has_baselines = !self.plan.baselines.is_empty();
        for (has_salp, is_baseline) in cell.sittings() {
            let source = has_salp.then(|| self.source(cell, Publishing::WhenAsked)).transpose()?;
            let mut baselines = (is_baseline && has_baselines).then(|| self.baselines(cell)).transpose()?;
            for counts in self.runs(u32::MAX) {
                self.check_interrupt()?;
                if let Some(source) = &source {
                    source.dirty(source.root, &runs, self.next_value())?;
                    let (ns, _) = publish_now(source, source.root)?;
                    self.add_rate(counts, super::report::SALP, &params, mib, ns);
                }
                if let Some(baselines) = &mut baselines {
                    baselines.dirty(&runs, self.next_value())?;
                    let ns = baselines.pwrite_ns(&runs)?;
                    self.add_rate(counts, "pwrite_memfd", &params, mib, ns);
                }
                self.tick();
            }
        }
        Ok(())
    }

    fn add_rate(&mut self, counts: bool, subject: &str, params: &Params, mib: f64, ns: u64) {
        if counts {
            let rate = mib / (ns.max(1) as f64 / 1e9);
            self.samples.add("publish_rate", subject, params, Unit::MebibytesPerSecond, rate);
        }
    }

    /// Memory that the arena takes for a few dirty pages in each of some leaves. Nothing here is timed:
    /// no run is left out.
    fn publish_bytes(&mut self, cell: &Cell<'_>, is_clone: bool, params: &Params) -> Result<(), BenchError> {
        let Some(run) = whole_leaves(&free_runs(cell.memory, u64::MAX)) else { return Ok(()) };
        let leaves = run.leaves().min(LEAVES);
        let run = run.part(0, leaves * wide(LEAF_PAGES));
        for _ in 0..self.plan.runs.min(COUNTED_RUNS) {
            // What the guest writes for itself is published too.
            let own = self.bytes_for(cell, is_clone, &run, 0)?;
            for dirty in DIRTY_IN_LEAF {
                self.check_interrupt()?;
                let kib = (self.bytes_for(cell, is_clone, &run, dirty)? - own) / 1024.0;
                let params = with(params, "dirty_in_leaf", dirty);
                self.add("published_leaf", &params, Unit::Kibibytes, kib / leaves as f64);
                self.add("published_page", &params, Unit::Kibibytes, kib / (leaves * dirty) as f64);
            }
            self.tick();
        }
        Ok(())
    }

    /// Bytes by which the arena grows for so many dirty pages in each leaf of `run`, of a source whose
    /// memory is its own, or lies in the arena.
    fn bytes_for(
        &mut self,
        cell: &Cell<'_>,
        is_clone: bool,
        run: &PageRun,
        dirty: u64,
    ) -> Result<f64, BenchError> {
        let source = self.source_with(cell, Publishing::WhenAsked, Keep::Own, 2)?;
        let vm = if is_clone {
            source.dirty(source.root, &[*run], self.next_value())?;
            source.cloned_from_root()?
        } else {
            source.root
        };
        let value = self.next_value();
        let leaf_pages = wide(LEAF_PAGES);
        for leaf in (0..run.leaves()).filter(|_| dirty > 0) {
            let part = run.part(leaf * leaf_pages, (leaf + 1) * leaf_pages);
            source.order_store(vm, part.store_scattered(dirty, value))?;
        }
        Ok(publish_now(&source, vm)?.1)
    }
}

/// Forks, publishes, ends the clone: how long the publication took in nanoseconds, and by how many
/// bytes the arena grew.
fn publish_now(source: &Source, vm: VmId) -> Result<(u64, f64), BenchError> {
    source.settle()?;
    let before = source.colony.arena_used_bytes()?;
    let (forked, _) = source.fork(vm, 1)?;
    let begin = monotonic_ns();
    source.colony.ask(vm, Order::Publish { keep: Keep::Own })?;
    let ns = source.await_published(&forked)? - begin;
    let after = source.colony.arena_used_bytes()?;
    source.end_clones(&forked)?;
    Ok((ns, after.saturating_sub(before) as f64))
}

/// The part of the first of `runs` that is whole leaves.
fn whole_leaves(runs: &[PageRun]) -> Option<PageRun> {
    let run = runs.first()?;
    let leaf_pages = wide(LEAF_PAGES);
    let first = (run.start >> PAGE_SHIFT).next_multiple_of(leaf_pages) - (run.start >> PAGE_SHIFT);
    let pages = run.pages.saturating_sub(first) / leaf_pages * leaf_pages;
    (pages > 0).then(|| run.part(first, first + pages))
}
