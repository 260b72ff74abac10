//! The fork call, the pause, and the way to a clone's first answer.

use super::baseline::{Baselines, Method, Outcome};
use super::measure::{Bench, Cell, with};
use super::report::{HOST, Params, SALP, Unit};
use super::source::Source;
use super::work::{FirstRead, PageRun, Task, free_runs};
use super::{BenchError, Benchmark, Dirty};
use crate::keeper::fork::ForkTimes;
use crate::member::messages::GuestKind;

/// Stages that are parts of the pause.
const PAUSE_STAGES: [&str; 7] = ["stop", "hold", "save", "copy", "protect", "collect", "resume"];

/// What one fork took, and when its first clone had read its first MiB, if it did.
struct Timed {
    times: ForkTimes,
    first_mib_us: Option<f64>,
}

/// What is written before a fork, and under which parameters it is reported.
struct Case<'a> {
    which: Benchmark,
    runs: &'a [PageRun],
    params: &'a Params,
}

impl Bench<'_> {
    /// The benchmarks `fork` and `pause`.
    pub(super) fn fork(&mut self, cell: &Cell<'_>, dirty: Dirty, which: Benchmark) -> Result<(), BenchError> {
        let runs = free_runs(cell.memory, dirty.bytes(cell.memory.ram_bytes()));
        let params = with(&cell.params(), "dirty", dirty.name());
        let params = with(&params, "clones", self.plan.clones);
        let case = Case { which, runs: &runs, params: &params };
        let methods = self.methods(cell);
        for sitting in cell.sittings() {
            let (source, mut baselines) = self.subjects(cell, sitting, &methods)?;
            for counts in self.runs(Self::most_runs(cell)) {
                self.check_interrupt()?;
                if let Some(source) = &source {
                    self.forks_of_salp(source, &case, counts)?;
                }
                if let Some(baselines) = &mut baselines {
                    for method in &methods {
                        self.clone_of_baseline(baselines, *method, &case, counts)?;
                    }
                    self.floor_of_host(baselines, &case, counts)?;
                }
                self.tick();
            }
        }
        Ok(())
    }

    fn forks_of_salp(&mut self, source: &Source, case: &Case<'_>, counts: bool) -> Result<(), BenchError> {
        let timed = self.fork_waiting(source, case.runs)?;
        if counts {
            self.add_fork(case.which, &with(case.params, "source", "waiting"), &timed, true);
        }
        if self.plan.guest == GuestKind::Kvm {
            let (forked, times) = source.fork_still(self.plan.clones)?;
            source.end_clones(&forked)?;
            if counts && case.which == Benchmark::Fork {
                let params = with(case.params, "source", "still");
                self.add_calls(&params, &times);
            }
            let timed = self.fork_running(source, case.runs)?;
            if counts {
                // Its first exit comes after many instructions.
                self.add_fork(case.which, &with(case.params, "source", "running"), &timed, false);
            }
        }
        Ok(())
    }

    /// Dirties, forks, has the first clone read, ends the clones.
    fn fork_waiting(&mut self, source: &Source, runs: &[PageRun]) -> Result<Timed, BenchError> {
        let value = self.next_value();
        source.dirty(source.root, runs, value)?;
        source.settle()?;
        let forked = source.fork_now(source.root, self.plan.clones)?;
        let first_mib_us = match FirstRead::of(runs, value) {
            Some(first) => Some(source.first_read_us(&forked, &first)?),
            None => None,
        };
        let times = source.times(&forked)?;
        source.end_clones(&forked)?;
        Ok(Timed { times, first_mib_us })
    }

    /// The same while the source counts.
    fn fork_running(&mut self, source: &Source, runs: &[PageRun]) -> Result<Timed, BenchError> {
        source.dirty(source.root, runs, self.next_value())?;
        source.settle()?;
        source.start_counting(source.root)?;
        let (forked, times) = source.fork_as_it_is(source.root, self.plan.clones)?;
        source.stop_counting(source.root)?;
        source.end_clones(&forked)?;
        Ok(Timed { times, first_mib_us: None })
    }

    fn add_fork(&mut self, which: Benchmark, params: &Params, timed: &Timed, has_first: bool) {
        let times = &timed.times;
        if which == Benchmark::Fork {
            self.add_calls(params, times);
        }
        let mut add =
            |quantity: &str, us: f64| self.samples.add(quantity, SALP, params, Unit::Microseconds, us);
        if which == Benchmark::Fork {
            if has_first {
                add("first_instruction", times.first_instruction_us);
            }
            if let Some(us) = timed.first_mib_us {
                add("first_mib", us);
            }
        }
        add("pause", times.pause_us);
        if which == Benchmark::Fork {
            // Beside the source's resume, and so in the call only.
            add("stage.hop_to_keeper", times.stages_us.hop_to_keeper);
        }
        for (name, us) in times.stages_us.named() {
            if which == Benchmark::Fork || PAUSE_STAGES.contains(&name) {
                add(&format!("stage.{name}"), us);
            }
        }
    }

    /// The call, and what of it is memory's.
    fn add_calls(&mut self, params: &Params, times: &ForkTimes) {
        self.add("fork_call", params, Unit::Microseconds, times.call_us);
        self.add("fork_call_memory", params, Unit::Microseconds, times.memory_us);
    }

    fn clone_of_baseline(
        &mut self,
        baselines: &mut Baselines,
        method: Method,
        case: &Case<'_>,
        counts: bool,
    ) -> Result<(), BenchError> {
        let value = self.next_value();
        baselines.dirty(case.runs, value)?;
        let task = Task { first: FirstRead::of(case.runs, value), work: None };
        let outcome = baselines.clone_once(method, task)?;
        if counts {
            self.add_outcome(case, method, &outcome);
        }
        Ok(())
    }

    /// What the host takes for the parts that no fork is without.
    fn floor_of_host(
        &mut self,
        baselines: &mut Baselines,
        case: &Case<'_>,
        counts: bool,
    ) -> Result<(), BenchError> {
        baselines.dirty(case.runs, self.next_value())?;
        let floor = baselines.floor()?;
        if counts {
            let params = with(case.params, "source", "waiting");
            let mut add =
                |stage: &str, us: f64| self.samples.add(stage, HOST, &params, Unit::Microseconds, us);
            add("stage.save", floor.save_us);
            add("stage.protect", floor.protect_us);
            if case.which == Benchmark::Fork {
                let params = with(case.params, "source", "still");
                self.samples.add("fork_call_memory", HOST, &params, Unit::Microseconds, floor.map_us);
            }
        }
        Ok(())
    }

    fn add_outcome(&mut self, case: &Case<'_>, method: Method, outcome: &Outcome) {
        let params = with(case.params, "source", "waiting");
        let mut add = |quantity: &str, us: f64| {
            self.samples.add(quantity, method.name(), &params, Unit::Microseconds, us)
        };
        add("pause", outcome.pause_us);
        if case.which == Benchmark::Fork {
            add("fork_call", outcome.call_us);
            add("first_instruction", outcome.first_instruction_us);
            if let Some(us) = outcome.first_mib_us {
                add("first_mib", us);
            }
            for (name, us) in &outcome.stages_us {
                add(&format!("stage.{name}"), *us);
            }
        }
    }
}
