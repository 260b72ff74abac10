//! What passes between the benchmark and the processes of its baselines: lines of JSON.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Crowd, Method};
use crate::bench::BenchError;
use crate::bench::work::{PageRun, Task, WorkTimes};
use crate::member::messages::{GuestKind, PuppetOrder};
use crate::words::MemoryShape;

/// What a process of the baselines is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Role {
    /// It has the VM that is cloned.
    Source,
    /// It has none until it restores one.
    Restorer,
}

/// What a process is told first.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Setup {
    /// Memory of a VM.
    pub(super) memory: MemoryShape,
    /// Whether its pages are huge.
    pub(super) is_huge: bool,
    /// What runs in it.
    pub(super) guest: GuestKind,
    /// Which process it is.
    pub(super) role: Role,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// Write `value` to each page of a run.
    Dirty { runs: Vec<PageRun>, value: u64 },
    /// Get a clone, and have it do its task.
    Clone { method: Method, task: Task },
    /// Write memory and state to a file.
    Snapshot,
    /// Make a VM of such a file, and have it do its task.
    Restore { path: String, task: Task },
    /// Make many clones, and keep them.
    Hold { crowd: Crowd, count: usize, path: Option<String> },
    /// Have them do something.
    Activate { order: PuppetOrder },
    /// Let them go.
    Release,
    /// Count stores before and after a fork.
    Throughput { method: Method, order: PuppetOrder, window_ns: u64 },
    /// Write the pages to a fresh memfd of 4 KiB pages.
    Pwrite { runs: Vec<PageRun> },
    /// Save the vCPU, write-protect all memory, map as much elsewhere, and nothing else.
    Floor,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Done,
    Cloned(Outcome),
    Snapshotted(Snapshotted),
    Held(Burst),
    Rates([f64; 2]),
    Took { ns: u64 },
    Floor(Floor),
    Failed(String),
}

/// What getting one clone took, in microseconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// The source stopped, to its way back into the guest. Of a template: the making of it.
    pub pause_us: f64,
    /// Begin, to the clone's vCPU entering the guest.
    pub call_us: f64,
    /// Begin, to the clone's first exit.
    pub first_instruction_us: f64,
    /// Begin, to the sum of the clone's first read.
    pub first_mib_us: Option<f64>,
    /// The parts of the call, by name.
    pub stages_us: BTreeMap<String, f64>,
    /// What its work took.
    pub work: Option<WorkTimes>,
}

/// A snapshot that was written.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Snapshotted {
    /// Where it can be opened as long as the source's process has it.
    pub(super) path: String,
    /// How long the source was stopped for it.
    pub(super) pause_us: f64,
    /// Of that: saving its state, writing.
    pub(super) stages_us: BTreeMap<String, f64>,
}

/// What the host takes for the things that no fork can do without, in microseconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Floor {
    /// Saving one vCPU and the VM.
    pub save_us: f64,
    /// Write-protecting all memory: one call of the kernel for each run of it.
    pub protect_us: f64,
    /// Mapping a file for a clone's memory, all of which traps: two calls for each run of it.
    pub map_us: f64,
}

/// Many clones that are alive.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Burst {
    /// Begin, to the last clone's first order, in microseconds.
    pub all_us: f64,
    /// Their processes.
    pub processes: Vec<u32>,
}

impl Answer {
    pub(super) fn done(self) -> Result<(), BenchError> {
        match self {
            Self::Done => Ok(()),
            other => Err(other.unexpected()),
        }
    }

    pub(super) fn outcome(self) -> Result<Outcome, BenchError> {
        match self {
            Self::Cloned(outcome) => Ok(outcome),
            other => Err(other.unexpected()),
        }
    }

    pub(super) fn snapshotted(self) -> Result<Snapshotted, BenchError> {
        match self {
            Self::Snapshotted(snapshot) => Ok(snapshot),
            other => Err(other.unexpected()),
        }
    }

    pub(super) fn burst(self) -> Result<Burst, BenchError> {
        match self {
            Self::Held(burst) => Ok(burst),
            other => Err(other.unexpected()),
        }
    }

    pub(super) fn rates(self) -> Result<[f64; 2], BenchError> {
        match self {
            Self::Rates(rates) => Ok(rates),
            other => Err(other.unexpected()),
        }
    }

    pub(super) fn took_ns(self) -> Result<u64, BenchError> {
        match self {
            Self::Took { ns } => Ok(ns),
            other => Err(other.unexpected()),
        }
    }

    pub(super) fn floor(self) -> Result<Floor, BenchError> {
        match self {
            Self::Floor(floor) => Ok(floor),
            other => Err(other.unexpected()),
        }
    }

    fn unexpected(self) -> BenchError {
        match self {
            // As that process would say it, which the error says again.
            Self::Failed(text) => {
                BenchError::Baseline(text.trim_start_matches("a baseline failed: ").to_owned())
            }
            other => BenchError::Baseline(format!("an answer to something else: {other:?}")),
        }
    }
}

/// Microseconds between two moments in nanoseconds.
pub(super) fn us(from: u64, to: u64) -> f64 {
    to.saturating_sub(from) as f64 / 1e3
}

/// Parts of something: name, begin and end in nanoseconds.
pub(super) fn stages(parts: &[(&str, u64, u64)]) -> BTreeMap<String, f64> {
    parts.iter().map(|(name, from, to)| ((*name).to_owned(), us(*from, *to))).collect()
}
