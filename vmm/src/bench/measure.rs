//! The benchmarks: goes through the cells of a plan and collects [`Samples`].

use std::collections::BTreeSet;

use serde_json::Value;

use super::baseline::{Baselines, Method, Outcome, Setup};
use super::plain_vm::{Pages, PlainMemory};
use super::report::{Params, Record, SALP, Samples, Unit};
use super::source::{Publishing, Source, SourceConfig};
use super::work::{PageRun, Work, WorkTimes, free_runs};
use super::{BenchError, Benchmark, Dirty, Plan};
use crate::keeper::available_memory_bytes;
use crate::keeper::fork::ForkTimes;
use crate::kvm::vcpu::monotonic_ns;
use crate::member::messages::{GuestKind, Order};
use crate::space::Keep;
use crate::words::{Gfn, Gpa, MemoryShape, PAGE_SHIFT, index};

/// The largest memory that the baselines get, in bytes.
const BASELINE_LIMIT_BYTES: u64 = 2 << 30;
/// Depths of a chain that are reported.
const DEPTHS: [usize; 5] = [1, 2, 4, 8, 16];
/// Pages that a clone of a chain writes before it is forked: 8 MiB.
const CHAIN_BYTES: u64 = 8 << 20;
/// The most pages that one order of the work goes over: 512 MiB.
const WORK_PAGES: u64 = 1 << 17;
/// Stages that are parts of the pause.
const PAUSE_STAGES: [&str; 6] = ["stop", "hold", "save", "copy", "protect", "resume"];

/// One size, and kind of pages.
#[derive(Clone, Copy)]
struct Cell<'a> {
    memory: MemoryShape,
    name: &'a str,
    is_huge: bool,
}

impl Cell<'_> {
    fn params(&self) -> Params {
        let huge = if self.is_huge { "on" } else { "off" };
        [("memory", self.name), ("huge", huge)].map(|(name, is)| (name.to_owned(), Value::from(is))).into()
    }
}

fn with(params: &Params, name: &str, value: impl Into<Value>) -> Params {
    let mut params = params.clone();
    params.insert(name.to_owned(), value.into());
    params
}

/// See the module.
pub struct Bench<'a> {
    plan: &'a Plan<'a>,
    samples: Samples,
    arenas: BTreeSet<String>,
    /// Changes with every write, so that no old value passes for a new one.
    value: u64,
}

impl<'a> Bench<'a> {
    /// Nothing measured yet.
    #[must_use]
    pub fn new(plan: &'a Plan<'a>) -> Self {
        Self { plan, samples: Samples::default(), arenas: BTreeSet::new(), value: 1 }
    }

    /// All that was measured.
    #[must_use]
    pub fn into_records(self) -> Vec<Record> {
        self.samples.records()
    }

    /// The kinds of arena that there were.
    #[must_use]
    pub fn arenas(&self) -> Vec<String> {
        self.arenas.iter().cloned().collect()
    }

    /// Measures one benchmark in all its cells.
    ///
    /// # Errors
    /// The first thing that failed.
    pub fn run(&mut self, benchmark: Benchmark) -> Result<(), BenchError> {
        let plan = self.plan;
        for (memory, name) in &plan.memory {
            for is_huge in &plan.huge {
                let cell = Cell { memory: *memory, name, is_huge: *is_huge };
                let huge = if *is_huge { "on" } else { "off" };
                (plan.progress)(&format!("{benchmark:?}, memory {name}, huge {huge}"));
                self.warm_up(&cell)?;
                match benchmark {
                    Benchmark::Fork | Benchmark::Pause => {
                        for dirty in &plan.dirty {
                            self.fork(&cell, *dirty, benchmark)?;
                        }
                    }
                    Benchmark::Fault => self.fault(&cell)?,
                    Benchmark::Pins => self.pins(&cell)?,
                    Benchmark::Chain => self.chain(&cell)?,
                    Benchmark::Publish => self.publish(&cell)?,
                }
            }
        }
        Ok(())
    }

    /// Touches and frees as much memory as a cell will use: source, arena, and the baselines' source,
    /// copy or template.
    fn warm_up(&self, cell: &Cell<'_>) -> Result<(), BenchError> {
        let asked_bytes = cell.memory.ram_bytes();
        let needed_bytes = asked_bytes * if has_baselines(cell) { 5 } else { 3 };
        let available_bytes = available_memory_bytes().unwrap_or(u64::MAX);
        if needed_bytes > available_bytes {
            return Err(BenchError::TooMuch { asked_bytes, needed_bytes, available_bytes });
        }
        let pages = if cell.is_huge { Pages::Huge } else { Pages::Small };
        PlainMemory::anonymous(index(needed_bytes), pages)?.touch()
    }

    fn check_interrupt(&self) -> Result<(), BenchError> {
        if (self.plan.is_interrupted)() { Err(BenchError::Interrupted) } else { Ok(()) }
    }

    fn source(&mut self, cell: &Cell<'_>, publishing: Publishing) -> Result<Source, BenchError> {
        let source = Source::new(SourceConfig {
            memory: cell.memory,
            is_huge: cell.is_huge,
            guest: self.plan.guest,
            publishing,
            clones: self.plan.clones,
            program: &self.plan.program,
        })?;
        self.arenas.insert(format!("{:?}", source.colony.arena_kind()));
        Ok(source)
    }

    fn baselines(&self, cell: &Cell<'_>) -> Result<Option<Baselines>, BenchError> {
        let (memory_bytes, is_huge) = (cell.memory.ram_bytes(), cell.is_huge);
        let setup = Setup { memory_bytes, is_huge, guest: self.plan.guest };
        has_baselines(cell).then(|| Baselines::start(&self.plan.program, setup)).transpose()
    }

    fn next_value(&mut self) -> u64 {
        self.value += 2;
        self.value
    }

    /// The warm-up run, then those that count: says whether this one does.
    fn runs(&self) -> impl Iterator<Item = bool> + use<> {
        (0..=self.plan.runs).map(|run| run > 0)
    }

    fn fork(&mut self, cell: &Cell<'_>, dirty: Dirty, which: Benchmark) -> Result<(), BenchError> {
        let runs = free_runs(cell.memory, dirty.bytes(cell.memory.ram_bytes()));
        let params = with(&cell.params(), "dirty", dirty.name());
        let params = with(&params, "clones", self.plan.clones);
        let waiting = with(&params, "source", "waiting");
        let running = with(&params, "source", "running");
        let source = self.source(cell, Publishing::InBackground)?;
        let mut baselines = self.baselines(cell)?;
        for counts in self.runs() {
            self.check_interrupt()?;
            let times = self.fork_once(&source, &runs, Source::fork)?;
            if counts {
                self.add_fork(which, &waiting, &times, true);
            }
            if self.plan.guest == GuestKind::Kvm {
                let times = self.fork_once(&source, &runs, |source, vm, clones| {
                    source.start_counting()?;
                    let forked = source.fork_as_it_is(vm, clones)?;
                    source.stop_counting()?;
                    Ok(forked)
                })?;
                if counts {
                    // Its first exit comes after many instructions.
                    self.add_fork(which, &running, &times, false);
                }
            }
            for method in Method::ALL {
                let Some(baselines) = &mut baselines else { break };
                baselines.dirty(&runs, self.next_value())?;
                let outcome = baselines.clone_once(method, None)?;
                if counts {
                    self.add_outcome(which, &waiting, method, &outcome);
                }
            }
        }
        Ok(())
    }

    /// Dirties, forks in the given way, ends the clones.
    fn fork_once(
        &mut self,
        source: &Source,
        runs: &[PageRun],
        fork: impl FnOnce(
            &Source,
            crate::family::VmId,
            usize,
        ) -> Result<(crate::keeper::fork::Forked, ForkTimes), BenchError>,
    ) -> Result<ForkTimes, BenchError> {
        source.dirty(source.root, runs, self.next_value())?;
        source.settle()?;
        let (forked, times) = fork(source, source.root, self.plan.clones)?;
        source.end_clones(&forked)?;
        Ok(times)
    }

    fn add_fork(&mut self, which: Benchmark, params: &Params, times: &ForkTimes, has_first: bool) {
        let mut add =
            |quantity: &str, us: f64| self.samples.add(quantity, SALP, params, Unit::Microseconds, us);
        if which == Benchmark::Fork {
            add("fork_call", times.call_us);
            if has_first {
                add("first_instruction", times.first_instruction_us);
            }
        }
        add("pause", times.pause_us);
        for (name, us) in times.stages_us.named() {
            if which == Benchmark::Fork || PAUSE_STAGES.contains(&name) {
                add(&format!("stage.{name}"), us);
            }
        }
    }

    fn add_outcome(&mut self, which: Benchmark, params: &Params, method: Method, outcome: &Outcome) {
        let mut add = |quantity: &str, us: f64| {
            self.samples.add(quantity, method.name(), params, Unit::Microseconds, us)
        };
        add("pause", outcome.pause_us);
        if which == Benchmark::Fork {
            add("fork_call", outcome.call_us);
            add("first_instruction", outcome.first_instruction_us);
            for (name, us) in &outcome.stages_us {
                add(&format!("stage.{name}"), *us);
            }
        }
    }

    fn fault(&mut self, cell: &Cell<'_>) -> Result<(), BenchError> {
        let params = cell.params();
        let source = self.source(cell, Publishing::InBackground)?;
        let mut baselines = self.baselines(cell)?;
        for counts in self.runs() {
            self.check_interrupt()?;
            let value = self.next_value();
            let Some(work) = Work::over(cell.memory, WORK_PAGES, value) else { return Ok(()) };
            for is_published in [true, false] {
                source.dirty(source.root, &work.dirty(), value)?;
                source.settle()?;
                let (forked, _) = source.fork(source.root, 1)?;
                if is_published {
                    source.await_published(&forked)?;
                    source.settle()?;
                }
                let times = source.work(forked.clones[0].vm, &work)?;
                source.end_clones(&forked)?;
                if counts {
                    self.add_work(SALP, &params, is_published, &times);
                }
            }
            for method in Method::ALL {
                let Some(baselines) = &mut baselines else { break };
                for run in work.dirty() {
                    baselines.dirty(&[run], value)?;
                }
                let outcome = baselines.clone_once(method, Some(work))?;
                if let (true, Some(times)) = (counts, outcome.work) {
                    self.add_work(method.name(), &params, true, &times);
                }
            }
        }
        Ok(())
    }

    fn add_work(&mut self, subject: &str, params: &Params, is_published: bool, times: &WorkTimes) {
        let mut add = |quantity: &str, unit, us| self.samples.add(quantity, subject, params, unit, us);
        let suffix = if is_published { "" } else { "_at_once" };
        let unit = Unit::MicrosecondsPerPage;
        add(&format!("first_read_page{suffix}"), unit, times.read_us);
        add(&format!("first_write_page{suffix}"), unit, times.write_us);
        if is_published {
            add("fresh_write_page", unit, times.fresh_us);
            add("order_trip", Unit::Microseconds, times.trip_us);
        }
    }

    fn pins(&mut self, cell: &Cell<'_>) -> Result<(), BenchError> {
        let pins = self.plan.pins;
        let Some(run) = free_runs(cell.memory, cell.memory.ram_bytes()).first().copied() else {
            return Ok(());
        };
        // Scattered: one page in four.
        for (step, layout) in [(1, "together"), (4, "scattered")] {
            let source = self.source(cell, Publishing::InBackground)?;
            let params = with(&cell.params(), "pins", pins);
            let params = with(&params, "layout", layout);
            source.dirty(source.root, &[run], self.next_value())?;
            for pin in (0..pins).map(|pin| pin * step).take_while(|page| *page < run.pages) {
                let first = Gfn(Gpa(run.start).gfn().0 + pin);
                source.colony.ask(source.root, Order::Pin { first, pages: 1 })?;
            }
            for counts in self.runs() {
                self.check_interrupt()?;
                source.dirty(source.root, &[run], self.next_value())?;
                source.settle()?;
                let (forked, times) = source.fork(source.root, 1)?;
                source.end_clones(&forked)?;
                let copied = forked.figures.copied_pages;
                if counts && copied > 0 {
                    let per_page = forked.figures.copy.as_secs_f64() * 1e6 / copied as f64;
                    let unit = Unit::MicrosecondsPerPage;
                    self.samples.add("pin_copy_page", SALP, &params, unit, per_page);
                    self.samples.add("pin_pause", SALP, &params, Unit::Microseconds, times.pause_us);
                }
            }
        }
        Ok(())
    }

    fn chain(&mut self, cell: &Cell<'_>) -> Result<(), BenchError> {
        let source = self.source(cell, Publishing::InBackground)?;
        let runs = free_runs(cell.memory, CHAIN_BYTES);
        for counts in self.runs() {
            self.check_interrupt()?;
            let (mut vm, mut chain) = (source.root, Vec::new());
            for depth in 1..=DEPTHS[DEPTHS.len() - 1] {
                source.dirty(vm, &runs, self.next_value())?;
                source.settle()?;
                let (forked, times) = source.fork(vm, 1)?;
                source.await_published(&forked)?;
                if counts && DEPTHS.contains(&depth) {
                    let params = with(&cell.params(), "depth", depth);
                    let unit = Unit::Microseconds;
                    self.samples.add("chain_call", SALP, &params, unit, times.call_us);
                    self.samples.add("chain_pause", SALP, &params, unit, times.pause_us);
                }
                vm = forked.clones[0].vm;
                chain.push(vm);
            }
            for vm in chain.into_iter().rev() {
                source.colony.end(vm)?;
            }
            source.settle()?;
        }
        Ok(())
    }

    fn publish(&mut self, cell: &Cell<'_>) -> Result<(), BenchError> {
        let params = cell.params();
        // Half of the memory: there is room for all subjects' copies.
        let runs = free_runs(cell.memory, cell.memory.ram_bytes() / 2);
        let pages: u64 = runs.iter().map(|run| run.pages).sum();
        let mib = (pages << PAGE_SHIFT) as f64 / f64::from(1 << 20);
        let source = self.source(cell, Publishing::WhenAsked)?;
        let mut baselines = self.baselines(cell)?;
        for counts in self.runs() {
            self.check_interrupt()?;
            source.dirty(source.root, &runs, self.next_value())?;
            source.settle()?;
            let (forked, _) = source.fork(source.root, 1)?;
            let begin = monotonic_ns();
            source.colony.ask(source.root, Order::Publish { keep: Keep::Own })?;
            let ns = source.await_published(&forked)? - begin;
            source.end_clones(&forked)?;
            self.add_rate(counts, SALP, &params, mib, ns);
            if let Some(baselines) = &mut baselines {
                baselines.dirty(&runs, self.next_value())?;
                let ns = baselines.pwrite_ns(&runs)?;
                self.add_rate(counts, "pwrite_memfd", &params, mib, ns);
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
}

fn has_baselines(cell: &Cell<'_>) -> bool {
    cell.memory.ram_bytes() <= BASELINE_LIMIT_BYTES
}
