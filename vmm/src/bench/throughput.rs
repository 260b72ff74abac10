//! What a fork costs its source afterwards: guest work done in a window of time that begins with the
//! fork, against the window before. The work is a walk over all memory that stores to each page: after
//! a fork the first store to each is the dear one.

use std::time::{Duration, Instant};

use super::BenchError;
use super::baseline::Method;
use super::measure::{Bench, Cell, with};
use super::report::Unit;
use super::source::Source;
use super::work::{PageRun, free_runs};
use crate::family::VmId;
use crate::member::messages::PuppetOrder;

/// Stores between two exits: some 100 us of a walk that nothing traps.
const STORES: u64 = 1 << 13;
/// Each takes two windows for each subject.
const RUNS: u32 = 5;

impl Bench<'_> {
    /// The benchmark `throughput`.
    pub(super) fn throughput(&mut self, cell: &Cell<'_>) -> Result<(), BenchError> {
        let window = self.plan.window;
        let window_ms = u64::try_from(window.as_millis()).unwrap_or(u64::MAX);
        let params = with(&cell.params(), "window_ms", window_ms);
        let Some(run) = free_runs(cell.memory, u64::MAX).first().copied() else { return Ok(()) };
        let mut methods = self.methods(cell);
        // A clone of a template does not disturb the VM that the template was made of.
        methods.retain(|method| *method != Method::StaticTemplate);
        for sitting in cell.sittings() {
            let (source, mut baselines) = self.subjects(cell, sitting, &methods)?;
            for counts in self.runs(RUNS) {
                self.check_interrupt()?;
                if let Some(source) = &source {
                    let share = throughput_of_salp(source, run, window)?;
                    if counts {
                        self.add("source_throughput", &params, Unit::Percent, share);
                    }
                }
                if let Some(baselines) = &mut baselines {
                    let window_ns = u64::try_from(window.as_nanos()).unwrap_or(u64::MAX);
                    for method in &methods {
                        let rates = baselines.throughput(*method, run.walk(STORES), window_ns)?;
                        if counts {
                            let (name, share) = (method.name(), percent(rates));
                            self.samples.add("source_throughput", name, &params, Unit::Percent, share);
                        }
                    }
                }
                self.tick();
            }
        }
        Ok(())
    }
}

fn throughput_of_salp(source: &Source, run: PageRun, window: Duration) -> Result<f64, BenchError> {
    source.settle()?;
    source.start_walking(source.root, run.walk(STORES))?;
    let before = {
        let (begin, stores) = (Instant::now(), source.rounds(source.root)?);
        std::thread::sleep(window);
        rate(begin, source.rounds(source.root)? - stores)
    };
    let (begin, stores) = (Instant::now(), source.rounds(source.root)?);
    let forked = source.fork_now(source.root, 1)?;
    // It walks as its source does: the baselines' clones wait, and so shall this one.
    still(source, forked.clones[0].vm)?;
    std::thread::sleep(window.saturating_sub(begin.elapsed()));
    let after = rate(begin, source.rounds(source.root)? - stores);
    source.stop_counting(source.root)?;
    source.end_clones(&forked)?;
    Ok(percent([before, after]))
}

/// For each second since `begin`.
fn rate(begin: Instant, stores: u64) -> f64 {
    stores as f64 / begin.elapsed().as_secs_f64()
}

/// Has a VM end its walk.
fn still(source: &Source, vm: VmId) -> Result<(), BenchError> {
    let order = crate::member::messages::Order::Puppet { vcpu: 0, order: PuppetOrder::default() };
    source.colony.ask(vm, order)?;
    Ok(())
}

/// Of the second to the first.
fn percent([before, after]: [f64; 2]) -> f64 {
    if before > 0.0 { after * 100.0 / before } else { 0.0 }
}
