//! What the processes of the baselines do: the source, full copies, and who is asked what.

use std::fs::File;
use std::io::{self, BufRead as _, Write as _};

use rustix::fs::{MemfdFlags, memfd_create};
use salp_protocol::order;

use super::Method;
use super::floor;
use super::forked;
use super::held::Held;
use super::restore::SnapshotFile;
use super::words::{Answer, Outcome, Request, Role, Setup, stages, us};
use crate::bench::BenchError;
use crate::bench::plain_vm::{Guest, Pages, PlainMemory, PlainVm};
use crate::bench::work::{TRIPS, Task, WorkTimes, median};
use crate::kvm::Kvm;
use crate::kvm::vcpu::monotonic_ns;
use crate::member::messages::{GuestKind, PuppetOrder};

/// Runs a process of the baselines until its input ends.
///
/// # Errors
/// Its input makes no sense, or its output is gone.
pub fn run() -> Result<(), BenchError> {
    let mut lines = io::stdin().lock().lines();
    let Some(first) = lines.next() else { return Ok(()) };
    let setup: Setup = serde_json::from_str(&first?).map_err(io::Error::from)?;
    let mut host = match BaselineHost::new(setup) {
        Ok(host) => host,
        Err(error) => return reply(&Answer::Failed(error.to_string())),
    };
    reply(&Answer::Done)?;
    for line in lines {
        let request = serde_json::from_str(&line?).map_err(io::Error::from)?;
        reply(&host.obey(request).unwrap_or_else(|error| Answer::Failed(error.to_string())))?;
    }
    Ok(())
}

fn reply(answer: &Answer) -> Result<(), BenchError> {
    let line = serde_json::to_string(answer).map_err(io::Error::from)?;
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    // A child of fork must not find anything here to write again.
    Ok(out.flush()?)
}

/// One of the processes.
pub(super) struct BaselineHost {
    // In the order in which they must go.
    held: Option<Held>,
    source: Option<PlainVm>,
    snapshot: Option<SnapshotFile>,
    pub(super) kvm: Option<Kvm>,
    pub(super) setup: Setup,
}

impl BaselineHost {
    fn new(setup: Setup) -> Result<Self, BenchError> {
        let kvm = match setup.guest {
            GuestKind::Kvm => Some(Kvm::open()?),
            GuestKind::Thread => None,
        };
        let mut host = Self { held: None, source: None, snapshot: None, kvm, setup };
        if setup.role == Role::Source {
            host.source = Some(PlainVm::boot(host.kvm.as_ref(), host.memory()?)?);
        }
        Ok(host)
    }

    /// New memory for a VM.
    pub(super) fn memory(&self) -> Result<PlainMemory, BenchError> {
        let pages = if self.setup.is_huge { Pages::Huge } else { Pages::Small };
        Ok(PlainMemory::anonymous(self.setup.memory, pages)?)
    }

    fn source(&mut self) -> Result<&mut PlainVm, BenchError> {
        self.source.as_mut().ok_or_else(no_source)
    }

    fn obey(&mut self, request: Request) -> Result<Answer, BenchError> {
        match request {
            Request::Dirty { runs, value } => {
                let source = self.source()?;
                runs.iter().try_for_each(|run| source.order(run.store(value)).map(|_| ()))?;
                Ok(Answer::Done)
            }
            Request::Clone { method, task } => match method {
                Method::FullCopy => self.full_copy(&task).map(Answer::Cloned),
                Method::ProcessFork => match &mut self.source {
                    Some(source) => {
                        forked::process_fork(self.kvm.as_ref(), source, &task).map(Answer::Cloned)
                    }
                    None => Err(no_source()),
                },
                Method::StaticTemplate | Method::Snapshot => {
                    Err(BenchError::Baseline("a snapshot is restored by the other process".to_owned()))
                }
            },
            Request::Snapshot => self.take_snapshot().map(Answer::Snapshotted),
            Request::Restore { path, task } => self.restore(&path, &task).map(Answer::Cloned),
            Request::Hold { crowd, count, path } => {
                let (held, burst) = Held::make(self, crowd, count, path.as_deref())?;
                self.held = Some(held);
                Ok(Answer::Held(burst))
            }
            Request::Activate { order } => match &mut self.held {
                Some(held) => held.activate(order).map(|()| Answer::Done),
                None => Err(BenchError::Baseline("nothing is held".to_owned())),
            },
            Request::Release => {
                self.held = None;
                Ok(Answer::Done)
            }
            Request::Throughput { method, order, window_ns } => {
                self.throughput(method, order, window_ns).map(Answer::Rates)
            }
            Request::Floor => floor::measure(self.source()?).map(Answer::Floor),
            Request::Pwrite { runs } => {
                let file = memfd()?;
                let source = self.source()?;
                let begin = monotonic_ns();
                for run in runs {
                    source.memory.write_to(&file, run.start, run.pages << 12)?;
                }
                Ok(Answer::Took { ns: monotonic_ns() - begin })
            }
        }
    }

    fn take_snapshot(&mut self) -> Result<super::words::Snapshotted, BenchError> {
        // The one before it first: it may be as large as the memory.
        self.snapshot = None;
        let file = SnapshotFile::new(&self.setup)?;
        let taken = file.write(self.source()?)?;
        self.snapshot = Some(file);
        Ok(taken)
    }

    /// The VM that others are made like; for children of `fork`.
    pub(super) fn source_to_share(&self) -> Result<&PlainVm, BenchError> {
        self.source.as_ref().ok_or_else(no_source)
    }

    fn full_copy(&mut self, task: &Task) -> Result<Outcome, BenchError> {
        let memory = self.memory()?;
        let mut clone = PlainVm::shell(self.kvm.as_ref(), memory)?;
        let source = self.source()?;
        let begin = monotonic_ns();
        let state = source.guest.save()?;
        let saved = monotonic_ns();
        clone.memory.copy_from(&source.memory)?;
        // Here the source could go on.
        let copied = monotonic_ns();
        clone.guest.set(&state)?;
        let entering = monotonic_ns();
        clone.guest.run_to_order()?;
        let first_exit = monotonic_ns();
        let (first_mib_us, work) = do_task(&mut clone.guest, &clone.memory, task, begin)?;
        source.guest.run_to_order()?;
        Ok(Outcome {
            pause_us: us(begin, copied),
            call_us: us(begin, entering),
            first_instruction_us: us(begin, first_exit),
            first_mib_us,
            stages_us: stages(&[("save", begin, saved), ("copy", saved, copied), ("set", copied, entering)]),
            work,
        })
    }

    /// See [`Baselines::throughput`](super::Baselines::throughput).
    fn throughput(
        &mut self,
        method: Method,
        order: PuppetOrder,
        window_ns: u64,
    ) -> Result<[f64; 2], BenchError> {
        let begin = monotonic_ns();
        let before = self.source()?.stores_per_second(order, begin, begin + window_ns)?;
        // What a full copy is made to is there before.
        let clone = match method {
            Method::FullCopy => Some(PlainVm::shell(self.kvm.as_ref(), self.memory()?)?),
            Method::ProcessFork | Method::StaticTemplate | Method::Snapshot => None,
        };
        let begin = monotonic_ns();
        let mut held = None;
        match (method, &clone) {
            (Method::FullCopy, Some(clone)) => {
                let source = self.source()?;
                let state = source.guest.save()?;
                clone.memory.copy_from(&source.memory)?;
                clone.guest.set(&state)?;
            }
            (Method::ProcessFork, _) => {
                held = Some(Held::fork_off(self, super::Crowd::ProcessFork, 1, None)?)
            }
            (Method::Snapshot, _) => drop(self.take_snapshot()?),
            (Method::StaticTemplate | Method::FullCopy, _) => {}
        }
        let after = self.source()?.stores_per_second(order, begin, begin + window_ns)?;
        // The clones live until here.
        drop((held, clone));
        Ok([before, after])
    }
}

fn no_source() -> BenchError {
    BenchError::Baseline("this process has no source".to_owned())
}

/// Has a clone do its task: when its first read was there, in microseconds since `begin`, and what its
/// work took.
pub(super) fn do_task(
    guest: &mut Guest,
    memory: &PlainMemory,
    task: &Task,
    begin: u64,
) -> Result<(Option<f64>, Option<WorkTimes>), BenchError> {
    let mut first_mib_us = None;
    if let Some(first) = &task.first {
        let sum = guest.order(memory, first.order())?;
        first_mib_us = Some(us(begin, monotonic_ns()));
        first.check(sum)?;
    }
    let Some(work) = &task.work else { return Ok((first_mib_us, None)) };
    let mut timed = |order: PuppetOrder| {
        let begin = monotonic_ns();
        let result = guest.order(memory, order)?;
        Ok::<_, BenchError>((result, monotonic_ns() - begin))
    };
    let nothing = PuppetOrder { order: order::NOTHING, ..PuppetOrder::default() };
    let trips = (0..TRIPS).map(|_| timed(nothing).map(|(_, ns)| ns)).collect::<Result<Vec<_>, _>>()?;
    Ok((first_mib_us, Some(work.run(median(trips), timed)?)))
}

/// An empty file of 4 KiB pages in memory.
pub(super) fn memfd() -> Result<File, BenchError> {
    Ok(File::from(memfd_create("salp-bench", MemfdFlags::CLOEXEC).map_err(io::Error::from)?))
}
