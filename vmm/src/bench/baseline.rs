//! What people use instead of salp to get a second running VM, measured on the same guest work.
//!
//! | baseline | its way |
//! |---|---|
//! | `full_copy` | a VM made ahead; all memory copied, state set |
//! | `process_fork` | `fork()` of the process, a new KVM VM over the inherited memory in the child |
//! | `static_template` | memory written to a memfd once; each clone maps it privately under a new VM |
//!
//! They run in a process of their own, this binary again ([`BASELINE_ARGUMENT`]), which has one thread:
//! `fork()` copies all that its process is, and a helper has nothing but the VM. [`Baselines`] is the
//! handle; requests and answers are lines of JSON on standard input and output.
//!
//! # What is favourable to them
//! Their vCPU has stopped by itself when the clock starts: no kick, which salp's pause contains. They
//! have no devices and no second process to tell. Making the template is its *pause* and no part of
//! its call. While a clone works, its source waits.
#![expect(unsafe_code, reason = "forks a process with one thread")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use salp_protocol::order;
use serde::{Deserialize, Serialize};

use super::BenchError;
use super::plain_vm::{Guest, Pages, PlainMemory, PlainState, PlainVm};
use super::work::{PageRun, TRIPS, Work, WorkTimes, median};
use crate::kvm::Kvm;
use crate::kvm::vcpu::monotonic_ns;
use crate::member::messages::{GuestKind, PuppetOrder};
use crate::words::index;

/// The argument that makes `salp` the process of the baselines.
pub const BASELINE_ARGUMENT: &str = "__bench_baseline";

/// A way to a second VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Method {
    /// All memory copied.
    FullCopy,
    /// `fork()`.
    ProcessFork,
    /// A private mapping of a memfd.
    StaticTemplate,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::FullCopy, Self::ProcessFork, Self::StaticTemplate];

    /// The subject of its records.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::FullCopy => "full_copy",
            Self::ProcessFork => "process_fork",
            Self::StaticTemplate => "static_template",
        }
    }
}

/// The VM that the baselines fork.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Setup {
    /// Its memory, in bytes.
    pub memory_bytes: u64,
    /// Whether its pages are huge.
    pub is_huge: bool,
    /// What runs in it.
    pub guest: GuestKind,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Request {
    /// Write `value` to each page of a run.
    Dirty { runs: Vec<PageRun>, value: u64 },
    /// Get a clone, and have it work.
    Clone { method: Method, work: Option<Work> },
    /// Write the pages to a fresh memfd of 4 KiB pages: how long, in nanoseconds.
    Pwrite { runs: Vec<PageRun> },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Answer {
    Done,
    Cloned(Outcome),
    Took { ns: u64 },
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
    /// The parts of the call, by name.
    pub stages_us: BTreeMap<String, f64>,
    /// What its work took.
    pub work: Option<WorkTimes>,
}

/// The process of the baselines; ends when dropped.
pub struct Baselines {
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Baselines {
    /// Starts it, with a booted VM.
    ///
    /// # Errors
    /// The process could not be started, or has no VM.
    pub fn start(program: &Path, setup: Setup) -> Result<Self, BenchError> {
        let mut command = Command::new(program);
        command.arg(BASELINE_ARGUMENT).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let gone = || BenchError::Baseline("the process of the baselines has no pipes".to_owned());
        let requests = child.stdin.take().ok_or_else(gone)?;
        let answers = BufReader::new(child.stdout.take().ok_or_else(gone)?);
        let mut baselines = Self { child, requests: Some(requests), answers };
        baselines.say(&setup)?;
        match baselines.hear()? {
            Answer::Done => Ok(baselines),
            other => Err(unexpected(other)),
        }
    }

    /// Has the source write to pages.
    ///
    /// # Errors
    /// It could not.
    pub fn dirty(&mut self, runs: &[PageRun], value: u64) -> Result<(), BenchError> {
        match self.ask(&Request::Dirty { runs: runs.to_vec(), value })? {
            Answer::Done => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Gets a clone, has it work, and ends it.
    ///
    /// # Errors
    /// It could not, or the clone read something wrong.
    pub fn clone_once(&mut self, method: Method, work: Option<Work>) -> Result<Outcome, BenchError> {
        match self.ask(&Request::Clone { method, work })? {
            Answer::Cloned(outcome) => Ok(outcome),
            other => Err(unexpected(other)),
        }
    }

    /// Writes pages to a fresh memfd of 4 KiB pages; returns how long it took, in nanoseconds.
    ///
    /// # Errors
    /// It could not.
    pub fn pwrite_ns(&mut self, runs: &[PageRun]) -> Result<u64, BenchError> {
        match self.ask(&Request::Pwrite { runs: runs.to_vec() })? {
            Answer::Took { ns } => Ok(ns),
            other => Err(unexpected(other)),
        }
    }

    fn ask(&mut self, request: &Request) -> Result<Answer, BenchError> {
        self.say(request)?;
        self.hear()
    }

    fn say(&mut self, what: &impl Serialize) -> Result<(), BenchError> {
        let line = serde_json::to_string(what).map_err(io::Error::from)?;
        match &mut self.requests {
            Some(requests) => Ok(writeln!(requests, "{line}")?),
            None => Err(BenchError::Baseline("it was ended".to_owned())),
        }
    }

    fn hear(&mut self) -> Result<Answer, BenchError> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            return Err(BenchError::Baseline("the process of the baselines has ended".to_owned()));
        }
        Ok(serde_json::from_str(&line).map_err(io::Error::from)?)
    }
}

fn unexpected(answer: Answer) -> BenchError {
    match answer {
        // As this process would say it, which the error says again.
        Answer::Failed(text) => {
            BenchError::Baseline(text.trim_start_matches("a baseline failed: ").to_owned())
        }
        other => BenchError::Baseline(format!("an answer to something else: {other:?}")),
    }
}

impl Drop for Baselines {
    fn drop(&mut self) {
        // The end of its input is the end of it.
        drop(self.requests.take());
        if let Err(error) = self.child.wait() {
            tracing::error!(%error, "the process of the baselines cannot be reaped");
        }
    }
}

/// Runs the process of the baselines until its input ends.
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

struct BaselineHost {
    source: PlainVm,
    kvm: Option<Kvm>,
    pages: Pages,
}

impl BaselineHost {
    fn new(setup: Setup) -> Result<Self, BenchError> {
        let kvm = match setup.guest {
            GuestKind::Kvm => Some(Kvm::open()?),
            GuestKind::Thread => None,
        };
        let pages = if setup.is_huge { Pages::Huge } else { Pages::Small };
        let memory = PlainMemory::anonymous(index(setup.memory_bytes), pages)?;
        Ok(Self { source: PlainVm::boot(kvm.as_ref(), memory)?, kvm, pages })
    }

    fn obey(&mut self, request: Request) -> Result<Answer, BenchError> {
        match request {
            Request::Dirty { runs, value } => {
                for run in runs {
                    self.source.order(run.store(value))?;
                }
                Ok(Answer::Done)
            }
            Request::Clone { method, work } => {
                let outcome = match method {
                    Method::FullCopy => self.full_copy(work),
                    Method::ProcessFork => self.process_fork(work),
                    Method::StaticTemplate => self.static_template(work),
                };
                outcome.map(Answer::Cloned)
            }
            Request::Pwrite { runs } => {
                let file = memfd()?;
                let begin = monotonic_ns();
                for run in runs {
                    self.source.memory.write_to(&file, run.start, run.pages << 12)?;
                }
                Ok(Answer::Took { ns: monotonic_ns() - begin })
            }
        }
    }

    fn full_copy(&mut self, work: Option<Work>) -> Result<Outcome, BenchError> {
        let memory = PlainMemory::anonymous(self.source.memory.len_bytes(), self.pages)?;
        let mut clone = PlainVm::shell(self.kvm.as_ref(), memory)?;
        let begin = monotonic_ns();
        let state = self.source.guest.save()?;
        let saved = monotonic_ns();
        clone.memory.copy_from(&self.source.memory)?;
        // Here the source could go on.
        let copied = monotonic_ns();
        clone.guest.set(&state)?;
        let entering = monotonic_ns();
        clone.guest.run_to_order()?;
        let first_exit = monotonic_ns();
        self.source.guest.run_to_order()?;
        Ok(Outcome {
            pause_us: us(begin, copied),
            call_us: us(begin, entering),
            first_instruction_us: us(begin, first_exit),
            stages_us: stages(&[("save", begin, saved), ("copy", saved, copied), ("set", copied, entering)]),
            work: work.map(|work| do_work(&mut clone.guest, &clone.memory, &work)).transpose()?,
        })
    }

    fn static_template(&mut self, work: Option<Work>) -> Result<Outcome, BenchError> {
        let len_bytes = self.source.memory.len_bytes();
        let file = memfd()?;
        let begin_template = monotonic_ns();
        let state = self.source.guest.save()?;
        self.source.memory.write_to(&file, 0, crate::words::wide(len_bytes))?;
        let made = monotonic_ns();
        self.source.guest.run_to_order()?;
        let begin = monotonic_ns();
        let memory = PlainMemory::private_of(&file, len_bytes)?;
        let mapped = monotonic_ns();
        let mut clone = PlainVm::shell(self.kvm.as_ref(), memory)?;
        let vm_made = monotonic_ns();
        clone.guest.set(&state)?;
        let entering = monotonic_ns();
        clone.guest.run_to_order()?;
        let first_exit = monotonic_ns();
        Ok(Outcome {
            pause_us: us(begin_template, made),
            call_us: us(begin, entering),
            first_instruction_us: us(begin, first_exit),
            stages_us: stages(&[
                ("map", begin, mapped),
                ("make_vm", mapped, vm_made),
                ("set", vm_made, entering),
            ]),
            work: work.map(|work| do_work(&mut clone.guest, &clone.memory, &work)).transpose()?,
        })
    }

    fn process_fork(&mut self, work: Option<Work>) -> Result<Outcome, BenchError> {
        let board = ResultBoard::new()?;
        let begin = monotonic_ns();
        let state = self.source.guest.save()?;
        let saved = monotonic_ns();
        // SAFETY: this process has one thread, so the child may do whatever the parent could; it never
        // returns from here, and leaves by `_exit` without running the parent's destructors.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let result = self.in_child(&state, work.as_ref());
            let status = board.write(&result);
            // SAFETY: ends the process at once.
            unsafe { libc::_exit(status) };
        }
        let forked = monotonic_ns();
        if child < 0 {
            return Err(io::Error::last_os_error().into());
        }
        self.source.guest.run_to_order()?;
        let mut status = 0;
        // SAFETY: waits for this process's own child, once.
        if unsafe { libc::waitpid(child, &raw mut status, 0) } != child {
            return Err(io::Error::last_os_error().into());
        }
        let in_child = board.read()?;
        let ChildTimes { begun, vm_made, entering, first_exit, work } = in_child;
        Ok(Outcome {
            pause_us: us(begin, forked),
            call_us: us(begin, entering),
            first_instruction_us: us(begin, first_exit),
            stages_us: stages(&[
                ("save", begin, saved),
                ("fork_in_source", saved, forked),
                ("fork_to_child", saved, begun),
                ("make_vm", begun, vm_made),
                ("set", vm_made, entering),
            ]),
            work,
        })
    }

    /// What the child of a fork does.
    fn in_child(&self, state: &PlainState, work: Option<&Work>) -> Result<ChildTimes, BenchError> {
        let begun = monotonic_ns();
        let mut guest = Guest::over(self.kvm.as_ref(), &self.source.memory)?;
        let vm_made = monotonic_ns();
        guest.set(state)?;
        let entering = monotonic_ns();
        guest.run_to_order()?;
        let first_exit = monotonic_ns();
        let work = work.map(|work| do_work(&mut guest, &self.source.memory, work)).transpose()?;
        Ok(ChildTimes { begun, vm_made, entering, first_exit, work })
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct ChildTimes {
    begun: u64,
    vm_made: u64,
    entering: u64,
    first_exit: u64,
    work: Option<WorkTimes>,
}

/// A page that a child of fork leaves its result in, as JSON.
struct ResultBoard(*mut u8);

const BOARD_BYTES: usize = 4096;

impl ResultBoard {
    fn new() -> Result<Self, BenchError> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let page = unsafe { mmap_anonymous(std::ptr::null_mut(), BOARD_BYTES, access, flags) };
        Ok(Self(page.map_err(io::Error::from)?.cast()))
    }

    /// In the child. Returns its exit status.
    fn write(&self, result: &Result<ChildTimes, BenchError>) -> i32 {
        let said = result.as_ref().map_err(ToString::to_string);
        match serde_json::to_vec(&said) {
            Ok(bytes) if bytes.len() < BOARD_BYTES => {
                // SAFETY: fits into the page, which nobody reads before this process has ended.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0, bytes.len()) };
                0
            }
            _ => 1,
        }
    }

    /// In the parent, when the child has ended.
    fn read(&self) -> Result<ChildTimes, BenchError> {
        let mut bytes = vec![0; BOARD_BYTES];
        // SAFETY: the whole page; who wrote it is gone.
        unsafe { std::ptr::copy_nonoverlapping(self.0, bytes.as_mut_ptr(), BOARD_BYTES) };
        bytes.retain(|byte| *byte != 0);
        let said: Result<Result<ChildTimes, String>, _> = serde_json::from_slice(&bytes);
        said.map_err(|error| BenchError::Baseline(format!("the child of fork left nothing: {error}")))?
            .map_err(BenchError::Baseline)
    }
}

impl Drop for ResultBoard {
    fn drop(&mut self) {
        // SAFETY: this page's own mapping, made in `new`.
        if let Err(error) = unsafe { munmap(self.0.cast(), BOARD_BYTES) } {
            tracing::error!(%error, "a page stays mapped");
        }
    }
}

fn do_work(guest: &mut Guest, memory: &PlainMemory, work: &Work) -> Result<WorkTimes, BenchError> {
    let mut timed = |order: PuppetOrder| {
        let begin = monotonic_ns();
        let result = guest.order(memory, order)?;
        Ok::<_, BenchError>((result, monotonic_ns() - begin))
    };
    let nothing = PuppetOrder { order: order::NOTHING, ..PuppetOrder::default() };
    let trips = (0..TRIPS).map(|_| timed(nothing).map(|(_, ns)| ns)).collect::<Result<Vec<_>, _>>()?;
    work.run(median(trips), timed)
}

fn memfd() -> Result<File, BenchError> {
    Ok(File::from(memfd_create("salp-bench", MemfdFlags::CLOEXEC).map_err(io::Error::from)?))
}

fn us(from: u64, to: u64) -> f64 {
    to.saturating_sub(from) as f64 / 1e3
}

fn stages(parts: &[(&str, u64, u64)]) -> BTreeMap<String, f64> {
    parts.iter().map(|(name, from, to)| ((*name).to_owned(), us(*from, *to))).collect()
}
