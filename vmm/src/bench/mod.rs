//! `salp bench`: what a clone costs, measured against what people would use instead.
//!
//! | module | what |
//! |---|---|
//! | `measure` | goes through sizes and kinds of pages; what all benchmarks have in common |
//! | `latency` | the fork call, the pause, the way to a clone's first answer |
//! | `touches` | first reads and writes of a clone |
//! | `pins`, `chain` | copies of pinned pages; clones of clones |
//! | `scattered` | the pause of a source whose memory lies in the arena |
//! | `throughput` | what the source does after a fork against before |
//! | `publication` | how fast pages are published, and what memory that writes |
//! | `density`, `burst` | memory of one more clone; many clones at once |
//! | [`baseline`] | other ways to a second VM, in processes of their own |
//! | `plain_vm` | the VM that those fork |
//! | `source` | the colony that forks |
//! | [`work`] | the guest work that all subjects do |
//! | [`report`] | records, percentiles, JSON, CSV, table |
//! | [`html`] | the same as a page with plots |
//!
//! # How it measures
//! Before a cell (one size and kind of pages) the memory that it will use is touched and freed: where
//! the host is itself a guest, first touches of memory cost many times more. Then every subject has
//! one run that is not counted. Then runs take turns: salp, each baseline, again. Above 2 GiB salp and
//! `fork()` alone are measured, one after the other: both do not fit. Every figure is in a record,
//! none is dropped. What a clone reads is compared with what the source wrote; a difference ends the
//! benchmark.
//!
//! # Quantities
//! Five are kept apart: the call, the source's pause, the way to the clone's first instruction and to
//! its first answer of use, bursts, and the memory of one more clone.
//!
//! | quantity | from | to |
//! |---|---|---|
//! | `fork_call` | request | the clone's vCPU enters the guest |
//! | `fork_call_memory` | | what of it is memory's: tables, protection, the clone's mapping (subject `host`: such a mapping alone) |
//! | `pause` | first kick | the source's last vCPU enters the guest again |
//! | `first_instruction` | request | the clone's first exit, which is its first instruction |
//! | `first_mib` | request | the clone's sum over 1 MiB is there, and right: publication goes on |
//! | `stage.*` | | parts of the above; of subject `host`: what the host takes for it alone, see `baseline::floor` |
//! | `first_read_page`, `first_write_page` | order | answer, of a clone when all is published, for each page; with `others=N` while so many clones are alive |
//! | `first_write_leaf` | | the first write in each leaf |
//! | `first_read_page_at_once`, `first_write_page_at_once`, ... | | the same right after the call |
//! | `fresh_write_page` | | first write to memory that nobody touched |
//! | `order_trip` | order | answer, of nothing to do: taken off the page figures |
//! | `scattered_pause`, `_call`, `_protect` | | of a running source that is a clone, or has dropped its copies |
//! | `source_throughput` | | rounds in the time after the request, against before |
//! | `publish_rate` | order | the last leaf published |
//! | `published_leaf`, `published_page` | | growth of the arena, for each dirty leaf or page |
//! | `pin_copy_page`, `pin_pause` | | copying in the pause, for each pinned page (subject `host`: as many copies in one process); the pause |
//! | `chain_call`, `chain_pause` | | of the fork that makes a clone of the given depth |
//! | `burst_N` | request | the last of N clones of one fork has answered |
//! | `call_of_many`, `pause_of_many` | | of each of many forks whose clones all stay alive |
//! | `calls_N` | | all of those N calls, without what is between them |
//! | `marginal_idle`, `marginal_active` | | available memory less for one more clone |
//! | `mappings` | | of a clone's process |
//! | `reset_N` | order, or the guest's request | its vCPU enters the guest again at the cut; with N pages written |
//! | `reset_stage.*` | | parts of it, 50 pages |
//!
//! `source=waiting`: the guest waits for an order, in a call. `source=running`: it counts in memory
//! and leaves the guest once in a million rounds; without KVM there is no such source.
//!
//! # Known holes
//! Baselines are measured in `source=waiting` only. With `--guest thread` nothing is saved or set and
//! no VM is made: those figures are of memory alone, and salp's guest stores by checked copies, the
//! baselines' by plain ones. A clone that shares its processors with the keeper, the source and the
//! publisher is disturbed by them: that is in the figures. Available memory is the host's: whoever
//! else works there is in the marginal figures.

pub mod baseline;
mod burst;
mod chain;
mod density;
pub mod html;
mod latency;
pub mod measure;
mod pins;
mod plain_vm;
mod publication;
pub mod report;
mod reset;
mod scattered;
mod source;
mod throughput;
mod touches;
pub mod work;

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use thiserror::Error;

use self::baseline::Method;
use self::report::Record;
use crate::arena_files::ArenaError;
use crate::keeper::{ColonyError, available_memory_bytes};
use crate::kvm::{HostDescription, KvmError};
use crate::member::messages::GuestKind;
use crate::words::{MemoryShape, MemoryShapeError};

/// Why a benchmark has no figures.
#[derive(Debug, Error)]
pub enum BenchError {
    /// The memory size.
    #[error("{0}")]
    Shape(#[from] MemoryShapeError),
    /// KVM.
    #[error("{0}")]
    Kvm(#[from] KvmError),
    /// The colony.
    #[error("{0}")]
    Colony(#[from] ColonyError),
    /// The arena.
    #[error("{0}")]
    Arena(#[from] ArenaError),
    /// The host.
    #[error("{0}")]
    Host(#[from] std::io::Error),
    /// A baseline.
    #[error("a baseline failed: {0}")]
    Baseline(String),
    /// A VM that stood still was cut again.
    #[error("a paused vm was cut again though nothing of it can have changed")]
    CutAgain,
    /// The guest's run ended.
    #[error("the guest ended within the benchmark: {0}")]
    GuestEnded(String),
    /// A VM read something else than what was written.
    #[error("{what} gave the sum {found:#x}, expected {expected:#x}: memory is wrong")]
    Wrong {
        /// What was done.
        what: &'static str,
        /// The sum.
        found: u64,
        /// What it should have been.
        expected: u64,
    },
    /// Too large.
    #[error(
        "{asked_bytes} bytes of memory need {needed_bytes} for all subjects, {available_bytes} are available"
    )]
    TooMuch {
        /// Of each VM.
        asked_bytes: u64,
        /// For all.
        needed_bytes: u64,
        /// What there is.
        available_bytes: u64,
    },
    /// The caller asked to stop.
    #[error("interrupted by a signal")]
    Interrupted,
}

/// One benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Benchmark {
    /// The call, the pause, the first instruction and their stages.
    Fork,
    /// The pause and its stages alone.
    Pause,
    /// First reads and writes in a clone.
    Fault,
    /// The copies of pinned pages.
    Pins,
    /// The pause of a source whose memory lies in the arena.
    Scattered,
    /// What the source does after a fork.
    Throughput,
    /// How fast lent pages are published, and what that writes.
    Publish,
    /// A clone of a clone, 16 deep.
    Chain,
    /// A clone's return to its cut.
    Reset,
    /// Memory of one more clone.
    Density,
    /// Many clones at once.
    Burst,
}

impl Benchmark {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Fork,
        Self::Fault,
        Self::Pins,
        Self::Scattered,
        Self::Throughput,
        Self::Publish,
        Self::Chain,
        Self::Reset,
        Self::Density,
        Self::Burst,
    ];

    /// As its command is called.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fork => "fork",
            Self::Pause => "pause",
            Self::Fault => "fault",
            Self::Pins => "pins",
            Self::Scattered => "scattered",
            Self::Throughput => "throughput",
            Self::Publish => "publish",
            Self::Chain => "chain",
            Self::Reset => "reset",
            Self::Density => "density",
            Self::Burst => "burst",
        }
    }

    /// The sizes that it is measured at, of those that are asked for (ascending): latency at all; what
    /// depends on other things at one, the least where many clones are made, or at both.
    #[must_use]
    fn sizes(self, asked: &[(MemoryShape, String)]) -> Vec<(MemoryShape, String)> {
        let least = asked.first();
        let most = asked.iter().rev().find(|(memory, _)| memory.ram_bytes() <= ONE_SIZE_BYTES).or(least);
        let mut sizes: Vec<_> = match self {
            Self::Fork | Self::Pause => return asked.to_vec(),
            Self::Fault | Self::Reset => least.into_iter().chain(most).cloned().collect(),
            Self::Density | Self::Burst | Self::Chain => least.into_iter().cloned().collect(),
            Self::Pins | Self::Scattered | Self::Throughput | Self::Publish => {
                most.into_iter().cloned().collect()
            }
        };
        sizes.dedup();
        sizes
    }
}

/// The largest memory for what does not depend on it, in bytes.
const ONE_SIZE_BYTES: u64 = 512 << 20;

/// How far a benchmark is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress<'a> {
    /// So many cells (a benchmark with a size and kind of pages) there will be.
    Begin(usize),
    /// A benchmark begins with a size and kind of pages.
    Cell(&'a str),
    /// One run of all its subjects is done.
    Run,
    /// It does not fit into the host's memory beside others that do.
    Skipped(&'a str),
}

/// How much of its memory a source writes before each fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dirty {
    /// All that the guest leaves free.
    All,
    /// Bytes.
    Bytes(u64),
    /// A percentage of the memory.
    Percent(u64),
}

impl Dirty {
    /// In bytes, of `memory_bytes`.
    #[must_use]
    pub const fn bytes(self, memory_bytes: u64) -> u64 {
        match self {
            Self::All => memory_bytes,
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => memory_bytes / 100 * percent,
        }
    }

    /// As it was asked for.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::All => "all".to_owned(),
            Self::Bytes(bytes) => bytes.to_string(),
            Self::Percent(percent) => format!("{percent}%"),
        }
    }
}

/// What to measure.
pub struct Plan<'a> {
    /// Which benchmarks.
    pub benchmarks: Vec<Benchmark>,
    /// Memory of a VM, in bytes, with its name in the records.
    pub memory: Vec<(MemoryShape, String)>,
    /// How much of it is dirty.
    pub dirty: Vec<Dirty>,
    /// Whether pages are huge.
    pub huge: Vec<bool>,
    /// Pinned pages, one after the other.
    pub pins: Vec<u64>,
    /// Clones of each fork.
    pub clones: usize,
    /// Clones of a burst, one after the other.
    pub burst: Vec<usize>,
    /// Clones that are alive at one time for their memory, or beside one that works.
    pub alive: usize,
    /// How long a source works before and after a fork.
    pub window: Duration,
    /// Runs that count, of each subject in each cell; fewer of those that take long.
    pub runs: u32,
    /// What is measured beside salp.
    pub baselines: Vec<Method>,
    /// What runs in the VMs.
    pub guest: GuestKind,
    /// The salp binary.
    pub program: PathBuf,
    /// Whether somebody wants this to stop.
    pub is_interrupted: &'a dyn Fn() -> bool,
    /// Is told what is measured now.
    pub progress: &'a dyn Fn(Progress<'_>),
}

/// What was measured, and where.
#[derive(Clone, Debug)]
pub struct Findings {
    /// The figures.
    pub records: Vec<Record>,
    /// The host.
    pub host: Value,
}

/// Measures.
///
/// # Errors
/// The first thing that failed: there are no partial findings.
pub fn run(plan: &Plan<'_>) -> Result<Findings, BenchError> {
    let cells = plan.benchmarks.iter().map(|benchmark| benchmark.sizes(&plan.memory).len() * plan.huge.len());
    (plan.progress)(Progress::Begin(cells.sum()));
    // As a colony does for itself: the host's scheduler is to know no difference between subjects.
    crate::keeper::shorten_slices();
    let mut bench = measure::Bench::new(plan);
    for benchmark in &plan.benchmarks {
        bench.run(*benchmark).map_err(|error| {
            // The signal may have ended processes of the baselines too.
            if (plan.is_interrupted)() { BenchError::Interrupted } else { error }
        })?;
    }
    let arenas = bench.arenas();
    let mut host = describe_host(plan.guest, &arenas);
    host["skipped"] = json!(bench.skipped());
    Ok(Findings { records: bench.into_records(), host })
}

/// What a reader must know of the host to make something of the figures.
fn describe_host(guest: GuestKind, arenas: &[String]) -> Value {
    let read = |path: &str| std::fs::read_to_string(path).map_or_else(|_| "unknown".to_owned(), trimmed);
    let thp = "/sys/kernel/mm/transparent_hugepage";
    json!({
        "host": HostDescription::read(),
        "guest": format!("{guest:?}").to_lowercase(),
        "huge_pages": read(&format!("{thp}/enabled")),
        "shmem_huge_pages": read(&format!("{thp}/shmem_enabled")),
        "arenas": arenas,
        "cgroup": read("/proc/self/cgroup"),
        "memory_available_bytes": available_memory_bytes(),
        // Who else is at work: figures of a busy host are figures of its scheduler too.
        "load_average": read("/proc/loadavg"),
        "build": if cfg!(debug_assertions) { "not optimised" } else { "optimised" },
        "command": std::env::args().collect::<Vec<_>>().join(" "),
        "version": env!("CARGO_PKG_VERSION"),
    })
}

fn trimmed(text: String) -> String {
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latency_is_measured_at_all_sizes_and_the_rest_at_few() {
        let asked = [128_u64, 512, 1024, 8192].map(|mib| {
            let shape = MemoryShape::new(mib << 20).expect("whole leaves");
            (shape, format!("{mib}M"))
        });
        let names = |benchmark: Benchmark, asked: &[(MemoryShape, String)]| {
            benchmark.sizes(asked).into_iter().map(|(_, name)| name).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(names(Benchmark::Fork, &asked), "128M 512M 1024M 8192M");
        assert_eq!(names(Benchmark::Fault, &asked), "128M 512M");
        assert_eq!(names(Benchmark::Scattered, &asked), "512M");
        assert_eq!(names(Benchmark::Burst, &asked), "128M");
        for benchmark in Benchmark::ALL {
            assert_eq!(names(benchmark, &asked[3..]), "8192M", "there is no other");
        }
    }
}
