//! The command line: what each command is called, and how its result becomes an exit status.

pub mod bench;
pub mod demo;
mod display;
pub mod interrupt;
pub mod memory;
pub mod run;
pub mod size;
pub mod vms;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use crate::bench::baseline::{self, BASELINE_ARGUMENT};
use crate::member::zygote::{self, ZYGOTE_ARGUMENT};

/// A minimal KVM virtual machine monitor that forks running microVMs with DMA in flight.
#[derive(Debug, Parser)]
#[command(name = "salp", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Fork a running VM with DMA in flight, again and again, and show that every byte is right
    Demo(demo::DemoArguments),
    /// Start a VM; it can then be forked from elsewhere
    ///
    /// In the foreground its console is the terminal. With --kernel it gets standard input too: at a
    /// terminal every key, Ctrl-C included, until Ctrl-] ends everything. Exit status: the guest's; 0 if it
    /// halts or resets its machine; 134 if it crashes; 130 after Ctrl-C or Ctrl-]; 143 after `salp stop`.
    Run(run::RunArguments),
    /// Clone a running VM
    Fork(vms::ForkArguments),
    /// List the VMs of all your colonies
    Ps(vms::PsArguments),
    /// Stop a VM's vCPUs and let its devices complete nothing, until `salp resume`; it can be forked
    Pause(vms::NameArguments),
    /// Let a paused VM go on
    Resume(vms::NameArguments),
    /// Return a clone to its cut: memory, vCPUs and devices; it runs on from there
    ///
    /// Also one whose guest has crashed or ended by itself, as long as another VM of its colony lives.
    Reset(vms::NameArguments),
    /// End a VM; with the last one its colony ends
    Stop(vms::NameArguments),
    /// Show what a VM has written and writes until it ends, and give it standard input
    ///
    /// At a terminal every key goes to the VM, Ctrl-C included, until Ctrl-] leaves; the VM runs on.
    Console(vms::NameArguments),
    /// Measure what a clone costs, against what people would use instead
    Bench(bench::BenchArguments),
}

/// Exit status after an error that is not the guest's.
const FAILURE: u8 = 1;
/// Exit status of a command line that makes no sense.
const USAGE: u8 = 2;

/// The whole program.
#[must_use]
pub fn main() -> ExitCode {
    start_logging();
    // Processes that salp starts of itself are no commands.
    let mut hidden = std::env::args_os().skip(1);
    match hidden.next() {
        Some(argument) if argument == ZYGOTE_ARGUMENT => {
            return end(zygote::run().map(|()| ExitCode::SUCCESS));
        }
        Some(argument) if argument == run::KEEPER_ARGUMENT => {
            return end(run::keep(&hidden.next().unwrap_or_default().to_string_lossy()));
        }
        Some(argument) if argument == BASELINE_ARGUMENT => {
            return end(baseline::run().map(|()| ExitCode::SUCCESS));
        }
        _ => {}
    }
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return refuse(&error),
    };
    match arguments.command {
        Command::Demo(arguments) => end(demo::run(&arguments)),
        Command::Run(arguments) => end(run::run(&arguments)),
        Command::Fork(arguments) => end(vms::fork(&arguments)),
        Command::Ps(arguments) => end(vms::ps(&arguments)),
        Command::Pause(arguments) => end(vms::pause(&arguments)),
        Command::Resume(arguments) => end(vms::resume(&arguments)),
        Command::Reset(arguments) => end(vms::reset(&arguments)),
        Command::Stop(arguments) => end(vms::stop(&arguments)),
        Command::Console(arguments) => end(vms::console(&arguments)),
        Command::Bench(arguments) => end(bench::run(&arguments)),
    }
}

fn end<E: std::fmt::Display>(result: Result<ExitCode, E>) -> ExitCode {
    result.unwrap_or_else(|error| fail(&error))
}

/// Says in one line what is wrong with the command line; help and version are what was asked for.
fn refuse(error: &clap::Error) -> ExitCode {
    let text = match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            return match error.print() {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&error),
            };
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
            "no command given: `salp demo` shows the main job".to_owned()
        }
        _ => {
            let rendered = error.render().to_string();
            // The rest is the usage and where to find help.
            let said = rendered.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:"));
            let said: Vec<_> =
                said.filter(|line| !line.is_empty() && !line.starts_with("For more information")).collect();
            said.join(" ").trim_start_matches("error: ").to_owned()
        }
    };
    eprintln!("salp: {text} (`salp --help` lists all)");
    ExitCode::from(USAGE)
}

fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("salp: {error}");
    ExitCode::from(FAILURE)
}

/// Logs go to standard error, warnings and worse unless `SALP_LOG` says otherwise.
fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("SALP_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    let result = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
    if let Err(error) = result {
        eprintln!("salp: no log: {error}");
    }
}
