//! `salp bench`: what a clone costs, measured against what people would use instead.
//!
//! | module | what |
//! |---|---|
//! | [`measure`] | the benchmarks: colonies, forks, guest work |
//! | [`baseline`] | other ways to a second VM, in a process of their own |
//! | `plain_vm` | the VM that those fork |
//! | `source` | the colony that forks |
//! | [`work`] | the guest work that all subjects do |
//! | [`report`] | records, percentiles, JSON, CSV, table |
//!
//! # How it measures
//! Before a cell (one size, kind of pages and amount of dirty memory) the memory that it will use is
//! touched and freed: where the host is itself a guest, first touches of memory cost many times more.
//! Then every subject has one run that is not counted. Then runs are interleaved: salp, each baseline,
//! again. Every figure is in a record, none is dropped. What a clone reads is compared with what the
//! source wrote; a difference ends the benchmark.
//!
//! # Quantities
//! | quantity | from | to |
//! |---|---|---|
//! | `fork_call` | request | the clone's vCPU enters the guest |
//! | `pause` | first kick | the source's last vCPU enters the guest again |
//! | `first_instruction` | request | the clone's first exit, which is its first instruction |
//! | `stage.*` | | parts of the above |
//! | `first_read_page`, `first_write_page` | order | answer, of a clone when all is published, for each page |
//! | `first_read_page_at_once`, `first_write_page_at_once` | | the same right after the call |
//! | `fresh_write_page` | | first write to memory that nobody touched |
//! | `order_trip` | order | answer, of nothing to do: taken off the page figures |
//! | `publish_rate` | order | the last leaf published |
//! | `pin_copy_page` | | copying in the pause, for each pinned page |
//! | `chain_call`, `chain_pause` | | of the fork that makes a clone of the given depth |
//!
//! `source=waiting`: the guest waits for an order, in a call. `source=running`: it counts in memory
//! and leaves the guest once in a million rounds; without KVM there is no such source.
//!
//! # Known holes
//! Baselines are measured up to 2 GiB, in `source=waiting` only. With `--guest thread` nothing is
//! saved or set and no VM is made: those figures are of memory alone, and salp's guest stores by
//! checked copies, the baselines' by plain ones. A clone that shares its processors with the keeper,
//! the source and the publisher is disturbed by them: that is in the figures.

pub mod baseline;
pub mod measure;
mod plain_vm;
pub mod report;
mod source;
pub mod work;

use std::path::PathBuf;

use serde_json::{Value, json};
use thiserror::Error;

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
    /// A clone of a clone, 16 deep.
    Chain,
    /// How fast lent pages are published.
    Publish,
}

impl Benchmark {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Fork, Self::Fault, Self::Pins, Self::Chain, Self::Publish];
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
    /// Pinned pages.
    pub pins: u64,
    /// Clones of each fork.
    pub clones: usize,
    /// Runs that count, of each subject in each cell.
    pub runs: u32,
    /// What runs in the VMs.
    pub guest: GuestKind,
    /// The salp binary.
    pub program: PathBuf,
    /// Whether somebody wants this to stop.
    pub is_interrupted: &'a dyn Fn() -> bool,
    /// Is told what is measured now, in a line each.
    pub progress: &'a dyn Fn(&str),
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
    let mut bench = measure::Bench::new(plan);
    for benchmark in &plan.benchmarks {
        bench.run(*benchmark)?;
    }
    let arenas = bench.arenas();
    Ok(Findings { records: bench.into_records(), host: describe_host(plan.guest, &arenas) })
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
