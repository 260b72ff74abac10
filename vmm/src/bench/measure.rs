//! Goes through the cells of a plan and collects [`Samples`]: what all benchmarks have in common.
//!
//! Each benchmark is a method of [`Bench`] in the module that is named after what it measures.

use std::collections::BTreeSet;

use serde_json::Value;

use super::baseline::{Baselines, Method};
use super::plain_vm::{Pages, PlainMemory};
use super::report::{Params, Record, SALP, Samples, Unit};
use super::source::{Publishing, Source, SourceConfig};
use super::{BenchError, Benchmark, Plan, Progress};
use crate::keeper::available_memory_bytes;
use crate::space::Keep;
use crate::words::MemoryShape;

/// Up to so many bytes of memory all subjects are measured, in turns. Above, salp and then `fork()`.
const IN_TURNS_BYTES: u64 = 2 << 30;
/// Runs above that.
const LARGE_RUNS: u32 = 5;
/// What `available` memory must be left over, in bytes.
const SPARE_BYTES: u64 = 1 << 30;

/// One size, and kind of pages.
#[derive(Clone, Copy)]
pub(super) struct Cell<'a> {
    pub(super) memory: MemoryShape,
    pub(super) name: &'a str,
    pub(super) is_huge: bool,
}

impl Cell<'_> {
    pub(super) fn params(&self) -> Params {
        let huge = if self.is_huge { "on" } else { "off" };
        [("memory", self.name), ("huge", huge)].map(|(name, is)| (name.to_owned(), Value::from(is))).into()
    }

    fn is_in_turns(&self) -> bool {
        self.memory.ram_bytes() <= IN_TURNS_BYTES
    }

    /// Who is measured together: salp, or not; the baselines, or not.
    pub(super) fn sittings(&self) -> Vec<(bool, bool)> {
        if self.is_in_turns() { vec![(true, true)] } else { vec![(true, false), (false, true)] }
    }
}

/// These parameters and one more.
pub(super) fn with(params: &Params, name: &str, value: impl Into<Value>) -> Params {
    let mut params = params.clone();
    params.insert(name.to_owned(), value.into());
    params
}

/// See the module.
pub struct Bench<'a> {
    pub(super) plan: &'a Plan<'a>,
    pub(super) samples: Samples,
    arenas: BTreeSet<String>,
    skipped: Vec<String>,
    /// Changes with every write, so that no old value passes for a new one.
    value: u64,
}

impl<'a> Bench<'a> {
    /// Nothing measured yet.
    #[must_use]
    pub fn new(plan: &'a Plan<'a>) -> Self {
        Self { plan, samples: Samples::default(), arenas: BTreeSet::new(), skipped: Vec::new(), value: 1 }
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

    /// What did not fit into the host's memory.
    #[must_use]
    pub fn skipped(&self) -> &[String] {
        &self.skipped
    }

    /// Measures one benchmark in all its cells.
    ///
    /// # Errors
    /// The first thing that failed.
    pub fn run(&mut self, benchmark: Benchmark) -> Result<(), BenchError> {
        let plan = self.plan;
        for (memory, name) in benchmark.sizes(&plan.memory) {
            for is_huge in &plan.huge {
                let cell = Cell { memory, name: &name, is_huge: *is_huge };
                let huge = if *is_huge { "on" } else { "off" };
                let title = format!("{}, memory {name}, huge {huge}", benchmark.name());
                (plan.progress)(Progress::Cell(&title));
                match self.warm_up(&cell) {
                    Err(error @ BenchError::TooMuch { .. }) if plan.memory.len() > 1 => {
                        let text = format!("{title}: {error}");
                        (plan.progress)(Progress::Skipped(&text));
                        self.skipped.push(text);
                        continue;
                    }
                    other => other?,
                }
                match benchmark {
                    Benchmark::Fork | Benchmark::Pause => {
                        plan.dirty.iter().try_for_each(|dirty| self.fork(&cell, *dirty, benchmark))?;
                    }
                    Benchmark::Fault => self.fault(&cell)?,
                    Benchmark::Pins => self.pins(&cell)?,
                    Benchmark::Reset => self.reset(&cell)?,
                    Benchmark::Scattered => self.scattered(&cell)?,
                    Benchmark::Throughput => self.throughput(&cell)?,
                    Benchmark::Publish => self.publish(&cell)?,
                    Benchmark::Chain => self.chain(&cell)?,
                    Benchmark::Density => self.density(&cell)?,
                    Benchmark::Burst => self.burst(&cell)?,
                }
            }
        }
        Ok(())
    }

    /// Touches and frees as much memory as a cell will use: of salp source and arena; of the baselines
    /// source, copy or snapshot, and what a clone of that writes.
    fn warm_up(&self, cell: &Cell<'_>) -> Result<(), BenchError> {
        let asked_bytes = cell.memory.ram_bytes();
        let needed_bytes = asked_bytes * if cell.is_in_turns() { 5 } else { 2 };
        let available_bytes = available_memory_bytes().unwrap_or(u64::MAX);
        if needed_bytes + SPARE_BYTES > available_bytes {
            return Err(BenchError::TooMuch { asked_bytes, needed_bytes, available_bytes });
        }
        let pages = if cell.is_huge { Pages::Huge } else { Pages::Small };
        PlainMemory::anonymous(MemoryShape::new(needed_bytes)?, pages)?.touch()
    }

    pub(super) fn check_interrupt(&self) -> Result<(), BenchError> {
        if (self.plan.is_interrupted)() { Err(BenchError::Interrupted) } else { Ok(()) }
    }

    /// A source with as many members ready as the plan has clones.
    pub(super) fn source(&mut self, cell: &Cell<'_>, publishing: Publishing) -> Result<Source, BenchError> {
        self.source_with(cell, publishing, Keep::Own, self.plan.clones + 1)
    }

    /// A source with `pool` members ready.
    pub(super) fn source_with(
        &mut self,
        cell: &Cell<'_>,
        publishing: Publishing,
        keep: Keep,
        pool: usize,
    ) -> Result<Source, BenchError> {
        let source = Source::new(SourceConfig {
            memory: cell.memory,
            is_huge: cell.is_huge,
            guest: self.plan.guest,
            publishing,
            keep,
            pool,
            program: &self.plan.program,
        })?;
        self.arenas.insert(format!("{:?}", source.colony.arena_kind()));
        Ok(source)
    }

    /// Those who are measured together in one of the cell's sittings.
    pub(super) fn subjects(
        &mut self,
        cell: &Cell<'_>,
        (has_salp, has_baselines): (bool, bool),
        methods: &[Method],
    ) -> Result<(Option<Source>, Option<Baselines>), BenchError> {
        let source = has_salp.then(|| self.source(cell, Publishing::InBackground)).transpose()?;
        let has_baselines = has_baselines && !methods.is_empty();
        Ok((source, has_baselines.then(|| self.baselines(cell)).transpose()?))
    }

    /// The processes of the baselines.
    pub(super) fn baselines(&self, cell: &Cell<'_>) -> Result<Baselines, BenchError> {
        Baselines::start(&self.plan.program, cell.memory, cell.is_huge, self.plan.guest)
    }

    /// The baselines that are measured in a cell.
    pub(super) fn methods(&self, cell: &Cell<'_>) -> Vec<Method> {
        let is_for = |method: &&Method| cell.is_in_turns() || **method == Method::ProcessFork;
        self.plan.baselines.iter().filter(is_for).copied().collect()
    }

    pub(super) fn next_value(&mut self) -> u64 {
        self.value += 2;
        self.value
    }

    /// Runs that count at most: large memories take long.
    pub(super) fn most_runs(cell: &Cell<'_>) -> u32 {
        if cell.is_in_turns() { u32::MAX } else { LARGE_RUNS }
    }

    /// The warm-up run, then those that count, at most `limit`: says whether this one does.
    pub(super) fn runs(&self, limit: u32) -> impl Iterator<Item = bool> + use<> {
        (0..=self.plan.runs.min(limit)).map(|run| run > 0)
    }

    /// Adds a figure of salp's.
    pub(super) fn add(&mut self, quantity: &str, params: &Params, unit: Unit, value: f64) {
        self.samples.add(quantity, SALP, params, unit, value);
    }

    /// Says how far a cell is.
    pub(super) fn tick(&self) {
        (self.plan.progress)(Progress::Run);
    }
}
