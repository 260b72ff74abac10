//! What people use instead of salp to get a second running VM, measured on the same guest work.
//!
//! | baseline | its way |
//! |---|---|
//! | `full_copy` | a VM made ahead; all memory copied, state set |
//! | `process_fork` | `fork()` of the process, a new KVM VM over the inherited memory in the child |
//! | `static_template` | memory written to a file in memory once; each clone maps it privately under a new VM |
//! | `snapshot` | the same, but the file is written at each fork: the source's present state, as Firecracker |
//!
//! Two processes of their own do this, this binary again ([`BASELINE_ARGUMENT`]), with one thread each:
//! `fork()` copies all that its process is, and these have nothing but the VM. One has the source;
//! the other, ready like a started and empty VMM, restores what the first has written, so that such
//! a clone is in a process without another VM. [`Baselines`] is the handle; requests and answers are
//! lines of JSON on standard input and output.
//!
//! | module | what |
//! |---|---|
//! | `process` | one of the two, as a child |
//! | `host` | what they do |
//! | `forked` | one child of `fork()` |
//! | `restore` | snapshots, and VMs made of them |
//! | `held` | many clones at once, each in a process |
//! | `floor` | what the host takes for the least that a pause can do |
//! | `words` | what is asked and answered |
//!
//! # What is favourable to them
//! Their vCPU has stopped by itself when the clock starts: no kick, which salp's pause contains. They
//! have no devices and no second process to tell: what passes between the two is left out. Making the
//! template is its *pause* and no part of its call. Files lie in the same huge-page arena as salp's
//! where huge pages are asked for. While a clone works, its source waits. Of a burst or a density all
//! clones are children of `fork()` that share what their parent is, its code too.

mod floor;
mod forked;
mod held;
mod host;
mod process;
mod restore;
mod words;

use std::path::Path;

use serde::{Deserialize, Serialize};

use self::process::Process;
use self::words::{Request, Role, Setup, Snapshotted};
use super::BenchError;
use super::work::{PageRun, Task};
use crate::member::messages::{GuestKind, PuppetOrder};
use crate::words::MemoryShape;

pub use self::host::run;
pub use self::words::{Burst, Floor, Outcome};

/// The argument that makes `salp` a process of the baselines.
pub const BASELINE_ARGUMENT: &str = "__bench_baseline";

/// A way to a second VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Method {
    /// All memory copied.
    FullCopy,
    /// `fork()`.
    ProcessFork,
    /// A private mapping of a file that was written once.
    StaticTemplate,
    /// A private mapping of a file that is written for it.
    Snapshot,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::FullCopy, Self::ProcessFork, Self::StaticTemplate, Self::Snapshot];

    /// The subject of its records.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::FullCopy => "full_copy",
            Self::ProcessFork => "process_fork",
            Self::StaticTemplate => "static_template",
            Self::Snapshot => "snapshot",
        }
    }
}

/// Many clones at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Crowd {
    /// Children of `fork()`, each with a VM over the inherited memory.
    ProcessFork,
    /// Processes that each restore the same snapshot.
    StaticTemplate,
    /// Processes with a VM each that has run one instruction, with no memory of use.
    Bare,
}

impl Crowd {
    /// The subject of its records.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ProcessFork => Method::ProcessFork.name(),
            Self::StaticTemplate => Method::StaticTemplate.name(),
            Self::Bare => "bare_vm",
        }
    }
}

/// The processes of the baselines; they end when dropped.
pub struct Baselines {
    source: Process,
    restorer: Process,
}

impl Baselines {
    /// Starts them, with a booted VM.
    ///
    /// # Errors
    /// A process could not be started, or has no VM.
    pub fn start(
        program: &Path,
        memory: MemoryShape,
        is_huge: bool,
        guest: GuestKind,
    ) -> Result<Self, BenchError> {
        let start = |role| Process::start(program, &Setup { memory, is_huge, guest, role });
        Ok(Self { source: start(Role::Source)?, restorer: start(Role::Restorer)? })
    }

    /// Has the source write to pages.
    ///
    /// # Errors
    /// It could not.
    pub fn dirty(&mut self, runs: &[PageRun], value: u64) -> Result<(), BenchError> {
        self.source.done(&Request::Dirty { runs: runs.to_vec(), value })
    }

    /// Gets a clone, has it do its task, and ends it.
    ///
    /// # Errors
    /// It could not, or the clone read something wrong.
    pub fn clone_once(&mut self, method: Method, task: Task) -> Result<Outcome, BenchError> {
        match method {
            Method::FullCopy | Method::ProcessFork => {
                self.source.ask(&Request::Clone { method, task })?.outcome()
            }
            Method::StaticTemplate => {
                let snapshot = self.snapshot()?;
                let outcome =
                    self.restorer.ask(&Request::Restore { path: snapshot.path, task })?.outcome()?;
                Ok(Outcome { pause_us: snapshot.pause_us, ..outcome })
            }
            Method::Snapshot => {
                let snapshot = self.snapshot()?;
                let restore = Request::Restore { path: snapshot.path.clone(), task };
                let mut outcome = self.restorer.ask(&restore)?.outcome()?;
                let before = snapshot.pause_us;
                outcome.pause_us = before;
                outcome.call_us += before;
                outcome.first_instruction_us += before;
                outcome.first_mib_us = outcome.first_mib_us.map(|us| us + before);
                outcome.stages_us.extend(snapshot.stages_us);
                Ok(outcome)
            }
        }
    }

    /// Has the source do the least that a pause can do, on the memory that it has dirtied, without a
    /// clone: what is left of it then is as before.
    ///
    /// # Errors
    /// It could not.
    pub fn floor(&mut self) -> Result<Floor, BenchError> {
        self.source.ask(&Request::Floor)?.floor()
    }

    fn snapshot(&mut self) -> Result<Snapshotted, BenchError> {
        self.source.ask(&Request::Snapshot)?.snapshotted()
    }

    /// Makes many clones, which stay alive until [`Self::release`]; each has asked for its first order
    /// when this returns.
    ///
    /// # Errors
    /// One of them could not be made.
    pub fn hold(&mut self, crowd: Crowd, count: usize) -> Result<Burst, BenchError> {
        let (process, path) = match crowd {
            Crowd::ProcessFork => (&mut self.source, None),
            Crowd::Bare => (&mut self.restorer, None),
            Crowd::StaticTemplate => {
                let path = self.source.ask(&Request::Snapshot)?.snapshotted()?.path;
                (&mut self.restorer, Some(path))
            }
        };
        process.ask(&Request::Hold { crowd, count, path })?.burst()
    }

    /// Has each of the many do an order; returns when all have.
    ///
    /// # Errors
    /// One of them could not.
    pub fn have_all_do(&mut self, crowd: Crowd, order: PuppetOrder) -> Result<(), BenchError> {
        self.holder(crowd).done(&Request::Activate { order })
    }

    /// Ends the many.
    ///
    /// # Errors
    /// The process that has them is gone.
    pub fn release(&mut self, crowd: Crowd) -> Result<(), BenchError> {
        self.holder(crowd).done(&Request::Release)
    }

    fn holder(&mut self, crowd: Crowd) -> &mut Process {
        match crowd {
            Crowd::ProcessFork => &mut self.source,
            Crowd::StaticTemplate | Crowd::Bare => &mut self.restorer,
        }
    }

    /// Stores a second of `order` that the source makes in `window_ns`, and from the moment on at
    /// which a clone is asked for. Making a clone of a template disturbs nobody: none is made.
    ///
    /// # Errors
    /// There was no clone.
    pub fn throughput(
        &mut self,
        method: Method,
        order: PuppetOrder,
        window_ns: u64,
    ) -> Result<[f64; 2], BenchError> {
        self.source.ask(&Request::Throughput { method, order, window_ns })?.rates()
    }

    /// Writes pages to a fresh file of 4 KiB pages in memory; returns how long it took, in nanoseconds.
    ///
    /// # Errors
    /// It could not.
    pub fn pwrite_ns(&mut self, runs: &[PageRun]) -> Result<u64, BenchError> {
        self.source.ask(&Request::Pwrite { runs: runs.to_vec() })?.took_ns()
    }
}
