//! `salp run`: this process, or one in the background, becomes the keeper of a new colony. At a terminal it
//! is one in the background, which is [attended](attend) until the user leaves it.

use std::fs::File;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{ArgGroup, Args};
use thiserror::Error;

use super::memory::{self, BUILTIN_LEAST_BYTES, MemoryError};
use super::{attend, background, interrupt, size};
use crate::control::config::{LimitsConfig, VmConfig};
use crate::control::place::check_name;
use crate::control::service::{Keeper, Outcome, Settings};
use crate::control::{ControlError, VmState, terminal};
use crate::ipc::spawn::SpawnError;
use crate::keeper::limits::Limits;
use crate::kvm::{Kvm, KvmError};
use crate::member::confine::Confinement;
use crate::member::messages::HowEnded;
use crate::words::index;

/// More VMs than a host of today keeps alive.
const MOST_VMS: i64 = 4096;

/// What runs.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("image").args(["kernel", "config"]).multiple(true)))]
pub struct RunArguments {
    /// Memory of each VM of the colony [default: 512M]
    #[arg(long, value_parser = size::parse)]
    memory: Option<u64>,
    /// vCPUs of each VM of the colony [default: 1]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=8))]
    cpus: Option<u8>,
    /// The VM's name; without it one is made up
    #[arg(long)]
    name: Option<String>,
    /// A kernel to run instead of the built-in guest: a static ELF64 image (with a PVH entry or a 64-bit
    /// one) or a bzImage
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The kernel's initial RAM disk
    #[arg(long, value_name = "FILE", requires = "image")]
    initrd: Option<PathBuf>,
    /// What the guest is told; the built-in one its case and options, `case=idle` if nothing is said
    #[arg(long)]
    cmdline: Option<String>,
    /// A file that the DMA engine's storage begins with; it is never written
    #[arg(long, value_name = "FILE")]
    dma_backing: Option<PathBuf>,
    /// The most VMs that the colony may have at one time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MOST_VMS))]
    max_vms: Option<u32>,
    /// The most vCPUs that its VMs may have together
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_cpus: Option<u32>,
    /// The most memory that its VMs may share; without it seven tenths of what the host has free
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    memory_limit: Option<u64>,
    /// What becomes of a VM's process that makes a system call which no VM needs
    #[arg(long, value_enum, default_value_t = Confinement::On, value_name = "MODE")]
    seccomp: Confinement,
    /// A JSON document that says what no option says; `salp schema` describes it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Run in the background: print the name when the VM runs
    #[arg(short, long)]
    detach: bool,
    /// Run nothing: print the JSON Schema of what `--config` takes, as `salp schema` does
    #[arg(long, exclusive = true)]
    pub(super) print_schema: bool,
}

/// Why a colony could not be started.
#[derive(Debug, Error)]
pub enum RunError {
    /// The memory size.
    #[error("{0}")]
    Memory(#[from] MemoryError),
    /// A file that an option names.
    #[error("{option} {}: {why}", path.display())]
    File {
        /// The option.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// As many vCPUs no VM has.
    #[error("cpus {0} in --config: a vm has 1 to 8")]
    Cpus(u8),
    /// KVM.
    #[error("{0}")]
    Kvm(#[from] KvmError),
    /// The colony and its names.
    #[error("{0}")]
    Control(#[from] ControlError),
    /// The process in the background.
    #[error("{0}")]
    Spawn(#[from] SpawnError),
    /// What the process in the background said.
    #[error("{0}")]
    Background(String),
    /// Standard output, or the host.
    #[error("{0}")]
    Host(#[from] std::io::Error),
}

/// Runs a VM to its end, or starts it in the background. At a terminal its keeper is in the background
/// too, and this process shows what it does, so that it can be left.
///
/// # Errors
/// What kept it from starting; a guest's end is no error but an exit status.
pub fn run(arguments: &RunArguments) -> Result<ExitCode, RunError> {
    let settings = settings(arguments)?;
    if arguments.detach {
        return background::detach(&settings);
    }
    if terminal::is_ours() {
        return attend::attend(&settings);
    }
    // The built-in guest reads nothing.
    let is_fed = settings.kernel.is_some() && !std::io::stdin().is_terminal();
    let keeper = Keeper::start(settings)?;
    let name = keeper.root()?.name;
    eprintln!("salp: {name} runs: `salp fork {name}` clones it, Ctrl-C ends it");
    keeper.show_console()?;
    if is_fed {
        keeper.feed_console()?;
    }
    let outcome = keeper.run(|root| {
        let how = root.state.describe();
        let name = &root.name;
        eprintln!("salp: {name} {how}; its clones go on (`salp ps` lists them, Ctrl-C ends them)");
    })?;
    Ok(exit_code(&name, &outcome))
}

/// Exit status after a guest's crash, as after SIGABRT.
const CRASHED: u8 = 134;
/// Exit status after the end of a VM's process, as after SIGKILL.
pub(super) const KILLED: u8 = 137;

/// The exit status of `salp run` after a VM's end.
pub(super) fn status(state: &VmState) -> u8 {
    verdict("", &Outcome { signal: None, root: state.clone(), last_output: None }).0
}

/// The exit status, and what is to be said.
fn verdict(name: &str, outcome: &Outcome) -> (u8, Option<String>) {
    let (said, status) = match (&outcome.root, outcome.signal) {
        (_, Some(signal)) => {
            return (interrupt::status(signal), Some("interrupted, everything is ended".to_owned()));
        }
        (VmState::Ended { how, status, text }, None) => match how {
            HowEnded::Exited if *status == Some(0) => return (0, None),
            HowEnded::Exited => {
                let status = status.unwrap_or(u32::MAX);
                // What does not fit must not look like success.
                (format!("ended with {status}"), u8::try_from(status).unwrap_or(u8::MAX))
            }
            HowEnded::Reset => ("was reset by its guest".to_owned(), 0),
            HowEnded::Halted => ("has halted".to_owned(), 0),
            HowEnded::Crashed => (format!("crashed: {text}"), CRASHED),
            HowEnded::Killed => (format!("ended: {text}"), KILLED),
        },
        (VmState::Stopped | VmState::Running | VmState::Paused, None) => {
            ("was stopped".to_owned(), interrupt::status(signal_hook::consts::SIGTERM))
        }
    };
    (status, Some(format!("{name} {said}")))
}

/// The exit status after a colony's end, which is said.
pub(super) fn exit_code(name: &str, outcome: &Outcome) -> ExitCode {
    let (status, said) = verdict(name, outcome);
    if let Some(said) = said {
        eprintln!("salp: {said}");
    }
    ExitCode::from(status)
}

/// What a VM in the background leaves that has ended badly, before anybody could have known it.
pub(super) fn last_words(name: &str, outcome: &Outcome) -> Option<String> {
    let is_bad = matches!(&outcome.root, VmState::Ended { .. }) && outcome.signal.is_none();
    let (status, said) = verdict(name, outcome);
    let output = outcome.last_output.as_ref().filter(|_| is_bad && status != 0)?;
    let said = said.unwrap_or_default();
    Some(if output.is_empty() { said } else { format!("{said}\nits last output was:\n{output}") })
}

/// What a VM has where nobody says.
const USUAL_MEMORY_BYTES: u64 = 512 << 20;

/// Looks at everything that can be wrong before anything is started. Options come before the document.
fn settings(arguments: &RunArguments) -> Result<Settings, RunError> {
    let config = arguments.config.as_deref().map(VmConfig::read).transpose()?.unwrap_or_default();
    let file = |option, given: &Option<PathBuf>, said: Option<PathBuf>| {
        given.clone().or(said).map(|path| readable(option, &path)).transpose()
    };
    let kernel = file("--kernel", &arguments.kernel, config.kernel)?;
    let initrd = file("--initrd", &arguments.initrd, config.initrd)?;
    let dma_backing = file("--dma-backing", &arguments.dma_backing, config.devices.dma_backing)?;
    if let (None, Some(path)) = (&kernel, &initrd) {
        let why = "it needs a kernel".to_owned();
        return Err(RunError::File { option: "--initrd", path: path.clone(), why });
    }
    let memory_bytes = arguments.memory.or(config.memory_bytes).unwrap_or(USUAL_MEMORY_BYTES);
    // What another kernel needs its loader says.
    memory::check(memory_bytes, if kernel.is_none() { BUILTIN_LEAST_BYTES } else { 0 })?;
    let name = arguments.name.clone().or(config.name);
    name.as_deref().map_or(Ok(()), check_name)?;
    let cpus = arguments.cpus.or(config.cpus).unwrap_or(1);
    if !(1..=8).contains(&cpus) {
        return Err(RunError::Cpus(cpus));
    }
    let usual = || if kernel.is_some() { String::new() } else { "case=idle".to_owned() };
    let command_line = arguments.cmdline.clone().or(config.cmdline).unwrap_or_else(usual);
    Kvm::open()?;
    Ok(Settings {
        name,
        memory_bytes,
        cpus,
        limits: limits(arguments, &config.limits),
        command_line,
        kernel,
        initrd,
        dma_backing,
        seccomp: arguments.seccomp,
        is_background: arguments.detach,
        place: None,
        program: None,
    })
}

fn limits(arguments: &RunArguments, config: &LimitsConfig) -> Limits {
    let count = |limit: Option<u32>| limit.map(|limit| index(limit.into()));
    Limits {
        vms: count(arguments.max_vms).or(config.vms),
        cpus: count(arguments.max_cpus).or(config.cpus),
        memory_bytes: arguments.memory_limit.or(config.memory_bytes),
    }
}

/// The absolute path of a file that can be read.
fn readable(option: &'static str, path: &Path) -> Result<PathBuf, RunError> {
    let wrong = |why: String| RunError::File { option, path: path.to_owned(), why };
    let file = File::open(path).map_err(|error| wrong(error.to_string()))?;
    let metadata = file.metadata().map_err(|error| wrong(error.to_string()))?;
    if !metadata.is_file() {
        return Err(wrong("it is no regular file".to_owned()));
    }
    std::path::absolute(path).map_err(|error| wrong(error.to_string()))
}
