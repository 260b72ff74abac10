//! Memory that one more clone takes: what the host has available less for many, page tables and the
//! kernel's objects included, idle and after work. A bare process with a KVM VM that has run one
//! instruction is the measure of what no memory manager can save.

use std::time::{Duration, Instant};

use super::BenchError;
use super::baseline::{Baselines, Crowd};
use super::measure::{Bench, Cell, with};
use super::report::{Params, SALP, Unit};
use super::source::{Publishing, Source};
use super::work::{PageRun, free_runs};
use crate::keeper::available_memory_bytes;
use crate::member::messages::PuppetOrder;
use crate::space::Keep;

/// Pages that an active clone writes, spread evenly: 1 MiB.
const ACTIVE_PAGES: u64 = 256;
/// Each makes all clones anew.
const RUNS: u32 = 3;
/// Memory is settled when it changes by less than this in [`PAUSE`].
const STEADY_BYTES: u64 = 1 << 20;
const PAUSE: Duration = Duration::from_millis(100);
/// On a busy host it never is: it is waited for so long for each clone, and so long at most.
const LIMIT_A_CLONE: Duration = Duration::from_millis(30);
const LIMIT: Duration = Duration::from_secs(3);

/// Available memory before, with the clones idle, and after their work.
struct Levels([u64; 3]);

impl Bench<'_> {
    /// The benchmark `density`.
    pub(super) fn density(&mut self, cell: &Cell<'_>) -> Result<(), BenchError> {
        let count = self.plan.alive.max(1);
        let params = with(&cell.params(), "clones", count);
        let Some(run) = free_runs(cell.memory, u64::MAX).first().copied() else { return Ok(()) };
        let order = run.store_scattered(ACTIVE_PAGES, 5);
        for counts in self.runs(RUNS) {
            self.check_interrupt()?;
            let value = self.next_value();
            // As VMs are that are forked again and again: a source that keeps its own copies would be
            // published as a whole once more, for the clones' account.
            let source = self.source_with(cell, Publishing::InBackground, Keep::Shared, 0)?;
            let (levels, mappings) = density_of_salp(&source, run, value, count, order)?;
            drop(source);
            self.add_density(counts, SALP, &params, count, &levels, &mappings);
            let mut baselines = self.baselines(cell)?;
            baselines.dirty(&[run], value)?;
            for crowd in [Crowd::Bare, Crowd::ProcessFork, Crowd::StaticTemplate] {
                if !self.has_crowd(crowd) {
                    continue;
                }
                let (levels, mappings) = density_of(&mut baselines, crowd, count, order)?;
                self.add_density(counts, crowd.name(), &params, count, &levels, &mappings);
            }
            self.tick();
        }
        Ok(())
    }

    /// Whether the plan has the baseline; the bare VM is always there.
    pub(super) fn has_crowd(&self, crowd: Crowd) -> bool {
        crowd == Crowd::Bare || self.plan.baselines.iter().any(|method| method.name() == crowd.name())
    }

    fn add_density(
        &mut self,
        counts: bool,
        subject: &str,
        params: &Params,
        count: usize,
        Levels([before, idle, active]): &Levels,
        mappings: &[usize],
    ) {
        if !counts {
            return;
        }
        let each = |from: u64, to: u64| (from as f64 - to as f64) / 1024.0 / count as f64;
        self.samples.add("marginal_idle", subject, params, Unit::Kibibytes, each(*before, *idle));
        if subject != Crowd::Bare.name() {
            let params = with(params, "written", "1M");
            self.samples.add("marginal_active", subject, &params, Unit::Kibibytes, each(*before, *active));
        }
        // All clones are alike: the most is no outlier.
        let most = mappings.iter().max().map_or(0.0, |count| *count as f64);
        self.samples.add("mappings", subject, params, Unit::Count, most);
    }
}

fn density_of_salp(
    source: &Source,
    run: PageRun,
    value: u64,
    count: usize,
    order: PuppetOrder,
) -> Result<(Levels, Vec<usize>), BenchError> {
    source.dirty(source.root, &[run], value)?;
    // What the first fork costs, all of the memory once more, is not of the others.
    let first = source.cloned_from_root()?;
    let before = steady_available_bytes(count);
    let (forked, _) = source.fork(source.root, count)?;
    source.await_nothing_pending(&forked)?;
    let idle = steady_available_bytes(count);
    let mut mappings = Vec::new();
    for clone in &forked.clones {
        source.order_store(clone.vm, order)?;
        mappings.push(mappings_of(source.colony.member(clone.vm)?.process()));
    }
    source.settle()?;
    let active = steady_available_bytes(count);
    source.end_clones(&forked)?;
    source.colony.end(first)?;
    source.settle()?;
    Ok((Levels([before, idle, active]), mappings))
}

fn density_of(
    baselines: &mut Baselines,
    crowd: Crowd,
    count: usize,
    order: PuppetOrder,
) -> Result<(Levels, Vec<usize>), BenchError> {
    // As with salp, what the first costs (the snapshot) is not of the others.
    baselines.hold(crowd, 1)?;
    baselines.release(crowd)?;
    let before = steady_available_bytes(count);
    let burst = baselines.hold(crowd, count)?;
    let idle = steady_available_bytes(count);
    let mappings = burst.processes.iter().map(|process| mappings_of(*process)).collect();
    let mut active = idle;
    if crowd != Crowd::Bare {
        baselines.have_all_do(crowd, order)?;
        active = steady_available_bytes(count);
    }
    baselines.release(crowd)?;
    Ok((Levels([before, idle, active]), mappings))
}

/// Mappings of a process.
fn mappings_of(process: u32) -> usize {
    std::fs::read_to_string(format!("/proc/{process}/maps")).map_or(0, |maps| maps.lines().count())
}

/// The host's available memory once it no longer moves, or after a while.
fn steady_available_bytes(clones: usize) -> u64 {
    let limit = LIMIT_A_CLONE.saturating_mul(u32::try_from(clones).unwrap_or(u32::MAX));
    let deadline = Instant::now() + limit.min(LIMIT);
    let available = || {
        // The counters of all processors are added up: else some lag behind by a second (proc(5)). Only
        // root may, and without it the figures are a little less exact.
        let _ = std::fs::write("/proc/sys/vm/stat_refresh", "1");
        available_memory_bytes().unwrap_or(0)
    };
    let mut last = available();
    loop {
        std::thread::sleep(PAUSE.min(limit));
        let now = available();
        if now.abs_diff(last) < STEADY_BYTES || Instant::now() >= deadline {
            return now;
        }
        last = now;
    }
}
