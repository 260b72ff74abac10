//! The command line: what each command is called, and how its result becomes an exit status.

pub mod bench;
pub mod demo;
pub mod interrupt;
pub mod size;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use crate::bench::baseline::{self, BASELINE_ARGUMENT};
use crate::member::{self, MEMBER_ARGUMENT};

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
    if std::env::args_os().nth(1).is_some_and(|argument| argument == MEMBER_ARGUMENT) {
        return match member::run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        };
    }
    if std::env::args_os().nth(1).is_some_and(|argument| argument == BASELINE_ARGUMENT) {
        return match baseline::run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        };
    }
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return refuse(&error),
    };
    match arguments.command {
        Command::Demo(arguments) => match demo::run(&arguments) {
            Ok(code) => code,
            Err(error) => fail(&error),
        },
        Command::Bench(arguments) => match bench::run(&arguments) {
            Ok(code) => code,
            Err(error) => fail(&error),
        },
    }
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
