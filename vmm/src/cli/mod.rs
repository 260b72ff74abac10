//! The command line: what each command is called, and how its result becomes an exit status.

pub mod attend;
pub mod background;
pub mod bench;
pub mod console;
pub mod demo;
mod display;
pub mod doctor;
pub mod fork;
pub mod inspect;
pub mod interrupt;
mod logging;
pub mod map;
pub mod memory;
pub mod output;
pub mod papers;
pub mod ps;
pub mod run;
pub mod size;
pub mod top;
pub mod torture;
pub mod vms;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{ArgAction, Args, CommandFactory as _, Parser, Subcommand};

use self::logging::LogFormat;
use self::output::Output;
use crate::bench::baseline::{self, BASELINE_ARGUMENT};
use crate::control::client::Client;
use crate::control::place::Place;
use crate::member::zygote::{self, ZYGOTE_ARGUMENT};
use crate::version;

/// A minimal KVM virtual machine monitor that forks running microVMs with DMA in flight
#[derive(Debug, Parser)]
#[command(name = "salp", version = version::TEXT, about)]
#[command(after_help = "`salp demo` shows the main job; `salp doctor` says whether this host can do it.")]
struct Arguments {
    #[command(flatten)]
    global: GlobalArguments,
    #[command(subcommand)]
    command: Command,
}

/// What every command understands.
#[derive(Debug, Args)]
struct GlobalArguments {
    /// Print no remarks, and names alone instead of tables
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Log more: -v what is done, -vv details, -vvv everything
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    /// The form of the log, which goes to standard error
    #[arg(long, global = true, value_enum, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Fork a running VM with DMA in flight, again and again, and show that every byte is right
    Demo(demo::DemoArguments),
    /// Start a VM; it can then be forked from elsewhere
    ///
    /// In the foreground its console is the terminal: Ctrl-C ends everything, Ctrl-] leaves it running in
    /// the background, and `salp console` comes back. With --kernel it gets standard input too: at a
    /// terminal every key, Ctrl-C included, until Ctrl-] leaves. Exit status: the guest's; 0 if it halts,
    /// resets its machine or is left; 134 if it crashes; 130 after Ctrl-C; 143 after `salp stop`.
    Run(run::RunArguments),
    /// Clone a running VM
    Fork(fork::ForkArguments),
    /// List the VMs of all your colonies, families as trees
    Ps(ps::PsArguments),
    /// Show all that is known of a VM
    Inspect(inspect::InspectArguments),
    /// Show what VMs use: processor time, memory shared and unique, faults, transfers
    Stats(inspect::StatsArguments),
    /// Draw a VM's memory leaf by leaf, or who shares what in its family
    ///
    /// A leaf is 2 MiB of the VM's memory.
    Map(map::MapArguments),
    /// Watch families, figures, memory and events live; fork, pause, reset and stop by a key
    Top,
    /// Show what a VM has written and writes until it ends, and give it standard input
    ///
    /// At a terminal every key goes to the VM, Ctrl-C included, until Ctrl-] leaves; the VM runs on.
    Console(vms::NameArguments),
    /// Stop VMs' vCPUs and let their devices complete nothing, until `salp resume`; they can be forked
    Pause(vms::NamesArguments),
    /// Let paused VMs go on
    Resume(vms::NamesArguments),
    /// Return clones to their cut: memory, vCPUs and devices; they run on from there
    ///
    /// Also those whose guests have crashed or ended by themselves, as long as another VM of their colony
    /// lives.
    Reset(vms::ResetArguments),
    /// Wait until VMs have ended, and print their exit statuses, as `salp run` would have had them
    Wait(vms::NamesArguments),
    /// End VMs; with the last one its colony ends
    Stop(vms::StopArguments),
    /// Remove VMs that have ended from the list, with their consoles
    ///
    /// Their names are free again. What their clones still need of them stays until it is not needed.
    Rm(vms::RmArguments),
    /// Measure what a clone costs, against what people would use instead
    Bench(bench::BenchArguments),
    /// Fork, reset, pause and kill VMs that transfer data, at random and under memory pressure
    ///
    /// Exit status: 0 if everything held, 1 if not, 130 after Ctrl-C.
    Torture(torture::TortureArguments),
    /// Check what this host has of what salp needs and profits from, and say what mends it
    ///
    /// Exit status: 0 if salp works here, be it slower than it could; 1 if something is missing.
    Doctor(doctor::DoctorArguments),
    /// Print the OpenAPI document of the control socket
    ApiSpec,
    /// Print the JSON Schema of what `salp run --config` takes
    Schema,
    /// Print a completion script for a shell
    ///
    /// For bash: salp completions bash > ~/.local/share/bash-completion/completions/salp
    Completions(papers::CompletionsArguments),
    /// Print the manual page, or write all pages into a directory
    Man(papers::ManArguments),
}

/// Exit status after an error that is not the guest's.
const FAILURE: u8 = 1;
/// Exit status of a command line that makes no sense.
const USAGE: u8 = 2;

/// The whole program.
#[must_use]
pub fn main() -> ExitCode {
    if let Some(status) = run_hidden() {
        return status;
    }
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return refuse(&error),
    };
    // What a torture does on purpose is no warning.
    let unless_said = matches!(arguments.command, Command::Torture(_)).then_some("error");
    logging::choose(arguments.global.verbose, arguments.global.log_format, unless_said);
    logging::start();
    let output = Output { is_quiet: arguments.global.quiet };
    match arguments.command {
        Command::Demo(arguments) => end(demo::run(&arguments)),
        Command::Run(arguments) if arguments.print_schema => end(papers::schema(output)),
        Command::Run(arguments) => end(run::run(&arguments)),
        Command::Fork(arguments) => end(fork::fork(&arguments, output)),
        Command::Ps(arguments) => end(ps::ps(&arguments, output)),
        Command::Inspect(arguments) => end(inspect::inspect(&arguments, output)),
        Command::Stats(arguments) => end(inspect::stats(&arguments, output)),
        Command::Map(arguments) => end(map::map(&arguments, output)),
        Command::Top => end(top::top()),
        Command::Console(arguments) => end(console::console(&arguments)),
        Command::Pause(arguments) => end(vms::pause(&arguments)),
        Command::Resume(arguments) => end(vms::resume(&arguments)),
        Command::Reset(arguments) => end(vms::reset(&arguments, output)),
        Command::Wait(arguments) => end(vms::wait(&arguments, output)),
        Command::Stop(arguments) => end(vms::stop(&arguments)),
        Command::Rm(arguments) => end(vms::rm(&arguments)),
        Command::Bench(arguments) => end(bench::run(&arguments)),
        Command::Torture(arguments) => end(torture::run(&arguments)),
        Command::Doctor(arguments) => end(doctor::run(&arguments, output)),
        Command::ApiSpec => end(papers::api_spec(output)),
        Command::Schema => end(papers::schema(output)),
        Command::Completions(arguments) => end(papers::completions(&arguments, Arguments::command(), output)),
        Command::Man(arguments) => end(papers::man(&arguments, Arguments::command(), output)),
    }
}

/// Processes that salp starts of itself are no commands.
fn run_hidden() -> Option<ExitCode> {
    let mut hidden = std::env::args_os().skip(1);
    let argument = hidden.next()?;
    if argument == ZYGOTE_ARGUMENT {
        logging::start();
        Some(end(zygote::run().map(|()| ExitCode::SUCCESS)))
    } else if argument == background::KEEPER_ARGUMENT {
        logging::start();
        Some(end(background::keep(&hidden.next().unwrap_or_default().to_string_lossy())))
    } else if argument == BASELINE_ARGUMENT {
        logging::start();
        Some(end(baseline::run().map(|()| ExitCode::SUCCESS)))
    } else {
        None
    }
}

/// For the colonies of this user.
fn client() -> Client {
    Client::new(Place::of_user())
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
