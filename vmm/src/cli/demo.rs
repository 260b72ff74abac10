//! `salp demo`: the main job, shown. A microVM whose device transfers data is forked while it runs,
//! again and again; every VM then verifies its memory and its transfers, and the checker the whole.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Serialize;
use thiserror::Error;

use super::interrupt::{self, Interrupt};
use super::memory::{self, BUILTIN_LEAST_BYTES, MemoryError};
use super::size;
use crate::family::VmId;
use crate::keeper::fork::{Cloned, ForkTimes, Forked};
use crate::keeper::{Colony, ColonyConfig, ColonyError};
use crate::kvm::{HostDescription, Kvm, KvmError};
use crate::member::confine::Confinement;
use crate::member::messages::{Order, Progress};

/// How the demo runs.
#[derive(Debug, Args)]
pub struct DemoArguments {
    /// Memory of each VM
    #[arg(long, default_value = "512M", value_parser = size::parse)]
    memory: u64,
    /// Forks of the first VM
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=64))]
    clones: u8,
    /// vCPUs of each VM
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    cpus: u8,
    /// How much of its memory the guest writes before the forks: `all`, a size, or a percentage
    #[arg(long, default_value = "64M")]
    dirty: String,
    /// Pages that the guest keeps registered with its device
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(0..=65536))]
    pins: u32,
    /// Whether to ask for huge pages
    #[arg(long, value_enum, default_value_t = Huge::On)]
    huge: Huge,
    /// What becomes of a VM's process that makes a system call which no VM needs
    #[arg(long, value_enum, default_value_t = Confinement::On, value_name = "MODE")]
    seccomp: Confinement,
    /// Print one JSON document instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Huge {
    On,
    Off,
}

/// Why the demo could not run.
#[derive(Debug, Error)]
pub enum DemoError {
    /// The memory size.
    #[error("{0}")]
    Memory(#[from] MemoryError),
    /// The registered pages do not fit.
    #[error("--pins {pins} does not fit into --memory {memory}: the guest needs {needed} for that")]
    Pins {
        /// What was asked for.
        pins: u32,
        /// The memory.
        memory: String,
        /// What would do.
        needed: String,
    },
    /// The guest's run has ended before anything could be shown.
    #[error("the guest ended before the first fork: {0}")]
    GuestEnded(String),
    /// What `--dirty` says.
    #[error("--dirty {0} is neither all, nor a size such as 64M, nor a percentage such as 10%")]
    Dirty(String),
    /// KVM.
    #[error("{0}")]
    Kvm(#[from] KvmError),
    /// The colony.
    #[error("{0}")]
    Colony(#[from] ColonyError),
    /// A signal.
    #[error("interrupted by a signal")]
    Interrupted(i32),
    /// Signals cannot be watched.
    #[error("signals cannot be watched: {0}")]
    Signals(std::io::Error),
    /// Standard output.
    #[error("the result cannot be written: {0}")]
    Output(#[from] std::io::Error),
}

/// Pages of one VM.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Pages {
    /// In the arena already, or never written: the clone had them at once.
    shared: u64,
    /// Still in the source's window.
    lent: u64,
    /// Copied while the source was stopped.
    copied_in_pause: u64,
    /// Held by the source's device.
    pinned: u64,
}

#[derive(Clone, Debug, Serialize)]
struct VmLine {
    name: String,
    parent: Option<String>,
    pause_us: Option<f64>,
    call_us: Option<f64>,
    first_instruction_us: Option<f64>,
    stages_us: Option<crate::keeper::fork::Stages>,
    pages: Pages,
    transfers_verified: u64,
    memory_verified: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    host: Host,
    vms: Vec<VmLine>,
    verdict: &'static str,
    /// What was wrong, if anything was.
    problems: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Host {
    #[serde(flatten)]
    description: HostDescription,
    arena: String,
    memory_available_bytes: u64,
}

/// How long one VM may take to verify everything: software KVM, and first touches, are slow.
const VERIFY_LIMIT: Duration = Duration::from_secs(300);
/// How long a clone may take to its first exit.
const FIRST_EXIT_LIMIT: Duration = Duration::from_secs(60);
/// How long the end of everything may take.
const END_LIMIT: Duration = Duration::from_secs(60);

/// Runs the demo.
///
/// # Errors
/// What kept it from running; a wrong result is no error but an exit status.
pub fn run(arguments: &DemoArguments) -> Result<ExitCode, DemoError> {
    let interrupt = Interrupt::watch().map_err(DemoError::Signals)?;
    match Demo::new(arguments, interrupt).and_then(|mut demo| demo.run()) {
        Err(DemoError::Interrupted(signal)) => {
            eprintln!("salp: interrupted, everything is ended");
            Ok(ExitCode::from(interrupt::status(signal)))
        }
        other => other,
    }
}

struct Demo<'a> {
    arguments: &'a DemoArguments,
    interrupt: Interrupt,
    colony: Colony,
    command_line: String,
    host: Host,
    forks: Vec<(Forked, Cloned, Option<ForkTimes>)>,
    problems: Vec<String>,
}

impl<'a> Demo<'a> {
    fn new(arguments: &'a DemoArguments, interrupt: Interrupt) -> Result<Self, DemoError> {
        let (shape, available) = memory::check(arguments.memory, BUILTIN_LEAST_BYTES)?;
        let dirty_mib = dirty_mib(arguments)?;
        // Before any process is started: what is missing is said once, and clearly.
        let kvm = Kvm::open()?;
        let mut config = ColonyConfig::new(shape);
        config.vcpus = arguments.cpus;
        config.confinement = arguments.seccomp;
        config.is_huge = arguments.huge == Huge::On;
        if arguments.huge == Huge::Off {
            config.arena = crate::arena_files::ArenaChoice::SmallPages;
        }
        let colony = Colony::new(config)?;
        let host = Host {
            description: kvm.description().clone(),
            arena: format!("{:?}", colony.arena_kind()),
            memory_available_bytes: available,
        };
        let command_line = format!(
            "case=dma mib={dirty_mib} pins={} depth=8 delay_us=2000 dirty=16 kernel=1",
            arguments.pins
        );
        Ok(Self { arguments, interrupt, colony, command_line, host, forks: Vec::new(), problems: Vec::new() })
    }

    fn run(&mut self) -> Result<ExitCode, DemoError> {
        self.colony.warm()?;
        self.check_interrupt()?;
        let root = self.colony.boot(&self.command_line)?;
        // Its first report says that all of the memory is written and transfers have begun.
        self.await_progress(root, 1)?;
        self.expect_running(root)?;
        for _ in 0..self.arguments.clones {
            let seen = self.progress_count(root)?;
            self.await_progress(root, seen + 1)?;
            self.fork(root)?;
        }
        let last = self.forks.last().map(|(_, clone, _)| clone.vm);
        if let Some(clone) = last {
            self.await_progress(clone, 1)?;
            self.fork(clone)?;
        }
        let checked = self.colony.check();
        if let Err(error) = &checked {
            self.problems.push(error.to_string());
        }
        let results = self.verify()?;
        let report = self.report(root, &results);
        self.print(&report)?;
        for vm in self.colony.vms() {
            self.colony.end(vm)?;
        }
        self.colony.wait_until_gone(END_LIMIT)?;
        Ok(if report.verdict == "ok" { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn check_interrupt(&self) -> Result<(), DemoError> {
        match self.interrupt.seen() {
            Some(signal) => Err(DemoError::Interrupted(signal)),
            None => Ok(()),
        }
    }

    fn progress_count(&self, vm: VmId) -> Result<u64, DemoError> {
        Ok(self.colony.member(vm)?.state().reports)
    }

    /// Waits for a VM's `count`th report.
    fn await_progress(&self, vm: VmId, count: u64) -> Result<(), DemoError> {
        self.wait_for(vm, VERIFY_LIMIT, |state| {
            (state.reports >= count || state.ended.is_some()).then_some(())
        })
    }

    fn expect_running(&self, vm: VmId) -> Result<(), DemoError> {
        let member = self.colony.member(vm)?;
        let state = member.state();
        match &state.ended {
            None => Ok(()),
            Some((_, text)) => {
                let console = String::from_utf8_lossy(&state.console);
                let said: Vec<_> = [text.as_str(), console.as_ref()].iter().flat_map(|s| s.lines()).collect();
                Err(DemoError::GuestEnded(said.join("; ")))
            }
        }
    }

    /// Waits in slices, so that a signal is seen.
    fn wait_for<T>(
        &self,
        vm: VmId,
        limit: Duration,
        mut is: impl FnMut(&mut crate::keeper::member_handle::MemberState) -> Option<T>,
    ) -> Result<T, DemoError> {
        let deadline = std::time::Instant::now() + limit;
        loop {
            self.check_interrupt()?;
            match self.colony.member(vm)?.wait_for(SIGNAL_SLICE, &mut is) {
                Err(ColonyError::Silent { .. }) if std::time::Instant::now() < deadline => {}
                other => return Ok(other?),
            }
        }
    }

    fn fork(&mut self, source: VmId) -> Result<(), DemoError> {
        self.check_interrupt()?;
        let forked = self.colony.fork(source, 1)?;
        let clone = forked.clones[0].clone();
        let times = self.colony.fork_times(&forked, &clone, FIRST_EXIT_LIMIT)?;
        self.forks.push((forked, clone, Some(times)));
        Ok(())
    }

    /// Has every VM verify its memory and transfers, and waits for all.
    fn verify(&mut self) -> Result<Vec<(VmId, Progress)>, DemoError> {
        let vms = self.colony.vms();
        for vm in &vms {
            // One that has ended by itself is looked at below.
            if let Err(error) = self.colony.ask(*vm, Order::Finish) {
                self.problems.push(error.to_string());
            }
        }
        let mut results = Vec::new();
        for vm in vms {
            let ended = self.wait_for(vm, VERIFY_LIMIT, |state| {
                let console = String::from_utf8_lossy(&state.console).into_owned();
                state
                    .ended
                    .clone()
                    .map(|ended| (ended, state.progress, [&state.troubles[..], &[console]].concat()))
            });
            match ended {
                Ok(((Some(0), _), progress, troubles))
                    if progress.is_finished && troubles.concat().is_empty() =>
                {
                    results.push((vm, progress));
                }
                Ok(((status, text), progress, troubles)) => {
                    let status = status.map_or_else(|| "no status".to_owned(), |status| status.to_string());
                    self.problems.push(format!("{vm} ended with {status}: {text} {}", troubles.join("; ")));
                    results.push((vm, Progress { errors: progress.errors.max(1), ..progress }));
                }
                Err(DemoError::Colony(error)) => self.problems.push(error.to_string()),
                Err(error) => return Err(error),
            }
        }
        Ok(results)
    }

    fn report(&mut self, root: VmId, results: &[(VmId, Progress)]) -> Report {
        let progress = |vm: VmId| results.iter().find(|(of, _)| *of == vm).map(|(_, progress)| *progress);
        let verified = |vm: VmId| progress(vm).is_some_and(|p| p.errors == 0 && p.is_finished);
        let transfers = |vm: VmId| progress(vm).map_or(0, |progress| progress.transfers);
        let mut vms = vec![VmLine {
            name: name(root),
            parent: None,
            pause_us: None,
            call_us: None,
            first_instruction_us: None,
            stages_us: None,
            pages: Pages::default(),
            transfers_verified: transfers(root),
            memory_verified: verified(root),
        }];
        for (forked, clone, times) in &self.forks {
            vms.push(VmLine {
                name: name(clone.vm),
                parent: Some(name(forked.source)),
                pause_us: times.map(|times| times.pause_us),
                call_us: times.map(|times| times.call_us),
                first_instruction_us: times.map(|times| times.first_instruction_us),
                stages_us: times.map(|times| times.stages_us),
                pages: self.pages(forked),
                transfers_verified: transfers(clone.vm),
                memory_verified: verified(clone.vm),
            });
        }
        for vm in vms.iter().filter(|vm| vm.transfers_verified == 0) {
            self.problems.push(format!("{} verified no transfer", vm.name));
        }
        let is_ok = self.problems.is_empty() && vms.iter().all(|vm| vm.memory_verified);
        Report {
            host: Host {
                description: self.host.description.clone(),
                arena: self.host.arena.clone(),
                memory_available_bytes: self.host.memory_available_bytes,
            },
            vms,
            verdict: if is_ok { "ok" } else { "failed" },
            problems: std::mem::take(&mut self.problems),
        }
    }

    fn pages(&self, forked: &Forked) -> Pages {
        let pages = self.colony.fork_pages(forked).unwrap_or_default();
        Pages { shared: pages.shared, lent: pages.lent, copied_in_pause: pages.copied, pinned: pages.pinned }
    }

    fn print(&self, report: &Report) -> Result<(), DemoError> {
        use std::io::Write;
        let mut out = std::io::stdout().lock();
        if self.arguments.json {
            let text = serde_json::to_string_pretty(report).map_err(std::io::Error::from)?;
            return Ok(writeln!(out, "{text}")?);
        }
        let host = &report.host.description;
        writeln!(
            out,
            "{}, Linux {}, {:?} KVM, arena {}",
            host.processor, host.kernel_release, host.kind, report.host.arena
        )?;
        writeln!(
            out,
            "{:<6} {:<6} {:>9} {:>9} {:>11} {:>9} {:>8} {:>7} {:>7} {:>10}  memory",
            "vm",
            "parent",
            "pause us",
            "call us",
            "1st instr us",
            "shared",
            "lent",
            "copied",
            "pinned",
            "transfers"
        )?;
        let show = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.0}"));
        for vm in &report.vms {
            writeln!(
                out,
                "{:<6} {:<6} {:>9} {:>9} {:>12} {:>9} {:>8} {:>7} {:>7} {:>10}  {}",
                vm.name,
                vm.parent.as_deref().unwrap_or("-"),
                show(vm.pause_us),
                show(vm.call_us),
                show(vm.first_instruction_us),
                vm.pages.shared,
                vm.pages.lent,
                vm.pages.copied_in_pause,
                vm.pages.pinned,
                vm.transfers_verified,
                if vm.memory_verified { "verified" } else { "WRONG" },
            )?;
        }
        for problem in &report.problems {
            writeln!(out, "problem: {problem}")?;
        }
        let transfers: u64 = report.vms.iter().map(|vm| vm.transfers_verified).sum();
        writeln!(
            out,
            "verdict: {} ({} VMs, {} forks in flight, {transfers} transfers verified)",
            report.verdict,
            report.vms.len(),
            self.forks.len()
        )?;
        Ok(())
    }
}

/// How often a wait looks for signals.
const SIGNAL_SLICE: Duration = Duration::from_millis(100);

fn name(vm: VmId) -> String {
    format!("vm{}", vm.0)
}

/// MiB that the guest writes: a part of what lies above its own image and its registered pages.
fn dirty_mib(arguments: &DemoArguments) -> Result<u64, DemoError> {
    let (text, memory_mib) = (arguments.dirty.as_str(), arguments.memory >> 20);
    let wrong = || DemoError::Dirty(text.to_owned());
    let pinned_mib = (u64::from(arguments.pins) << crate::words::PAGE_SHIFT).div_ceil(1 << 20);
    let overhead_mib = GUEST_OVERHEAD_MIB + pinned_mib;
    let most = memory_mib.saturating_sub(overhead_mib);
    if most == 0 {
        let needed = size::show(((overhead_mib + 1).next_multiple_of(2)) << 20);
        return Err(DemoError::Pins { pins: arguments.pins, memory: size::show(arguments.memory), needed });
    }
    let mib = match text.strip_suffix('%') {
        _ if text == "all" => most,
        Some(percent) => {
            let percent = percent.parse().ok().filter(|percent: &u64| *percent <= 100).ok_or_else(wrong)?;
            memory_mib * percent / 100
        }
        None => size::parse(text).map_err(|_| wrong())? >> 20,
    };
    Ok(mib.clamp(1, most))
}

/// What the built-in guest uses besides the memory that it dirties and its registered pages, in MiB.
const GUEST_OVERHEAD_MIB: u64 = 13;
