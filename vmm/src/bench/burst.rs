//! Many clones at once, alive and answering.

use super::BenchError;
use super::baseline::Crowd;
use super::measure::{Bench, Cell, with};
use super::report::Unit;
use super::source::{Publishing, Source};
use super::work::free_runs;
use crate::kvm::vcpu::monotonic_ns;
use crate::space::Keep;

/// Each makes all clones anew.
const RUNS: u32 = 3;
/// More than so many clones are made once, after the warm-up with fewer.
const MANY: usize = 200;
/// What the source writes between two of many fork calls: four pages.
const BETWEEN_BYTES: u64 = 4 << 12;

impl Bench<'_> {
    /// The benchmark `burst`.
    pub(super) fn burst(&mut self, cell: &Cell<'_>) -> Result<(), BenchError> {
        crate::keeper::raise_limits();
        let plan = self.plan;
        for count in &plan.burst {
            let runs: Vec<_> = if *count > MANY { vec![true] } else { self.runs(RUNS).collect() };
            for counts in runs {
                self.check_interrupt()?;
                self.burst_of_salp(cell, *count, counts)?;
                self.burst_of_baselines(cell, *count, counts)?;
                self.tick();
            }
        }
        let calls = plan.burst.iter().copied().max().unwrap_or(0);
        if calls > 0 { self.calls_in_a_row(cell, calls) } else { Ok(()) }
    }

    /// One fork of `count` clones, from the request to the last one's answer, members ready.
    fn burst_of_salp(&mut self, cell: &Cell<'_>, count: usize, counts: bool) -> Result<(), BenchError> {
        let runs = free_runs(cell.memory, u64::MAX);
        let source = self.source_with(cell, Publishing::InBackground, Keep::Own, count)?;
        source.dirty(source.root, &runs, self.next_value())?;
        source.settle()?;
        let forked = source.fork_now(source.root, count)?;
        source.await_clones(&forked.clones)?;
        let us = monotonic_ns().saturating_sub(forked.asked_at) as f64 / 1e3;
        if counts {
            self.add(&format!("burst_{count}"), &cell.params(), Unit::Microseconds, us);
        }
        Ok(())
    }

    fn burst_of_baselines(&mut self, cell: &Cell<'_>, count: usize, counts: bool) -> Result<(), BenchError> {
        if self.plan.baselines.is_empty() {
            return Ok(());
        }
        let mut baselines = self.baselines(cell)?;
        baselines.dirty(&free_runs(cell.memory, u64::MAX), self.next_value())?;
        for crowd in [Crowd::ProcessFork, Crowd::StaticTemplate] {
            if !self.has_crowd(crowd) {
                continue;
            }
            let burst = baselines.hold(crowd, count)?;
            baselines.release(crowd)?;
            if counts {
                let quantity = format!("burst_{count}");
                self.samples.add(&quantity, crowd.name(), &cell.params(), Unit::Microseconds, burst.all_us);
            }
        }
        Ok(())
    }

    /// So many fork calls of one clone each; all clones stay alive. What counts is the worst. The source
    /// drops its copies: one that keeps them has all of its memory published again by each fork, for
    /// clones that stay, and no host has room for that.
    fn calls_in_a_row(&mut self, cell: &Cell<'_>, calls: usize) -> Result<(), BenchError> {
        let params = with(&cell.params(), "calls", calls);
        let source: Source = self.source_with(cell, Publishing::InBackground, Keep::Shared, 2)?;
        source.dirty(source.root, &free_runs(cell.memory, u64::MAX), self.next_value())?;
        let mut sum_us = 0.0;
        for _ in 0..calls {
            self.check_interrupt()?;
            source.dirty(source.root, &free_runs(cell.memory, BETWEEN_BYTES), self.next_value())?;
            source.settle()?;
            let (forked, times) = source.fork(source.root, 1)?;
            source.await_nothing_pending(&forked)?;
            self.add("call_of_many", &params, Unit::Microseconds, times.call_us);
            self.add("pause_of_many", &params, Unit::Microseconds, times.pause_us);
            sum_us += times.call_us;
        }
        self.add(&format!("calls_{calls}"), &cell.params(), Unit::Microseconds, sum_us);
        self.tick();
        Ok(())
    }
}
