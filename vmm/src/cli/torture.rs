//! `salp torture`: see [`torture`](crate::torture). Here: what is asked for, and what is shown of it.

use std::cell::Cell;
use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use thiserror::Error;

use super::interrupt::{self, Interrupt};
use super::memory::{self, BUILTIN_LEAST_BYTES, MemoryError};
use super::size;
use crate::member::messages::GuestKind;
use crate::torture::{self, Plan, Plant, Report, Summary, TortureError};

/// How long, and with what.
#[derive(Debug, Args)]
pub struct TortureArguments {
    /// How long, such as 30s, 10m or 1h
    #[arg(long, default_value = "1m", value_parser = humantime::parse_duration)]
    time: Duration,
    /// Memory of each VM
    #[arg(long, default_value = "128M", value_parser = size::parse)]
    memory: u64,
    /// VMs alive at one time
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u8).range(2..=64))]
    vms: u8,
    /// Decides what happens; chosen by the clock if it is not given
    #[arg(long)]
    seed: Option<u64>,
    /// What runs in the VMs; threads torture the memory manager where there is no KVM
    #[arg(long, value_enum, default_value = "kvm")]
    guest: Guest,
    /// Memory of all of them together; without it, half as much again as one VM's where there is swap
    #[arg(long, value_parser = size::parse)]
    limit: Option<u64>,
    /// Print one JSON document instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Guest {
    Kvm,
    Thread,
}

/// Why there was no torture.
#[derive(Debug, Error)]
pub enum TortureCommandError {
    /// The memory size.
    #[error("{0}")]
    Memory(#[from] MemoryError),
    /// The rest.
    #[error("{0}")]
    Torture(#[from] TortureError),
    /// Signals cannot be watched.
    #[error("signals cannot be watched: {0}")]
    Signals(std::io::Error),
    /// Standard output.
    #[error("the result cannot be written: {0}")]
    Output(#[from] std::io::Error),
    /// The variable [`PLANT_VARIABLE`].
    #[error("{PLANT_VARIABLE} is {0:?}, not bit")]
    Plant(String),
}

/// Environment variable that plants a fault in builds with debug assertions: `bit`.
const PLANT_VARIABLE: &str = "SALP_TORTURE_PLANT";

/// Tortures, and says how it went.
///
/// # Errors
/// What kept it from beginning; something that does not hold is no error but an exit status.
pub fn run(arguments: &TortureArguments) -> Result<ExitCode, TortureCommandError> {
    let interrupt = Interrupt::watch().map_err(TortureCommandError::Signals)?;
    let (shape, _) = memory::check(arguments.memory, BUILTIN_LEAST_BYTES)?;
    let seed = arguments.seed.unwrap_or_else(seed_of_clock);
    let plant = planted()?;
    let display = Display::new(arguments.time);
    let plan = Plan {
        time: arguments.time,
        memory: shape,
        vms: arguments.vms.into(),
        guest: match arguments.guest {
            Guest::Kvm => GuestKind::Kvm,
            Guest::Thread => GuestKind::Thread,
        },
        seed,
        limit: arguments.limit,
        program: None,
        plant,
        is_interrupted: &|| interrupt.seen().is_some(),
        progress: &|summary| display.show(summary),
    };
    let pressure = torture::press(&plan)?;
    display.say(&format!("seed {seed}: --seed {seed} repeats this run's decisions"));
    pressure.notes().iter().for_each(|note| display.say(note));
    let result = torture::run(&plan, &pressure);
    display.end();
    let report = result?;
    // What is shown is shown of a host that is as it was before.
    drop(pressure);
    print(arguments, &report)?;
    Ok(match (&report.finding, interrupt.seen()) {
        (Some(_), _) => ExitCode::FAILURE,
        (None, Some(signal)) => ExitCode::from(interrupt::status(signal)),
        (None, None) => ExitCode::SUCCESS,
    })
}

fn seed_of_clock() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(1, |since| since.as_secs() << 20 ^ u64::from(since.subsec_nanos()))
}

/// The fault that a build for tests is asked to plant.
fn planted() -> Result<Option<Plant>, TortureCommandError> {
    match std::env::var(PLANT_VARIABLE) {
        Ok(text) if cfg!(debug_assertions) => match text.as_str() {
            "bit" => Ok(Some(Plant::Bit)),
            _ => Err(TortureCommandError::Plant(text)),
        },
        _ => Ok(None),
    }
}

fn print(arguments: &TortureArguments, report: &Report) -> Result<(), TortureCommandError> {
    let mut out = std::io::stdout().lock();
    if arguments.json {
        let text = serde_json::to_string_pretty(report).map_err(std::io::Error::from)?;
        return Ok(writeln!(out, "{text}")?);
    }
    for (name, value) in lines(&report.summary) {
        writeln!(out, "{name:<34}{value:>16}")?;
    }
    let verdict = match (&report.finding, report.is_interrupted) {
        (Some(finding), _) => format!("FAILED: {finding}"),
        (None, true) => "interrupted; everything held so far, everything is ended".to_owned(),
        (None, false) => "everything held, nothing is left".to_owned(),
    };
    Ok(writeln!(out, "after {:.0} s, seed {}: {verdict}", report.seconds, report.seed)?)
}

fn lines(summary: &Summary) -> [(&'static str, String); 19] {
    let Summary { forks, clones, failed_forks, .. } = summary;
    [
        ("rounds", summary.rounds.to_string()),
        ("families begun", summary.boots.to_string()),
        ("forks", forks.to_string()),
        ("clones", clones.to_string()),
        ("forks of vms killed or with losses", failed_forks.to_string()),
        ("deepest chain of clones", summary.deepest_chain.to_string()),
        ("resets", summary.resets.to_string()),
        ("pauses", summary.pauses.to_string()),
        ("vms killed", summary.kills.to_string()),
        ("vms killed by the host", summary.host_kills.to_string()),
        ("images of ended vms killed", summary.image_kills.to_string()),
        ("vms told of lost pages", summary.told_of_loss.to_string()),
        ("vms that verified everything", summary.verified_vms.to_string()),
        ("dma transfers verified", summary.transfers.to_string()),
        ("dma MiB verified", (summary.transferred_bytes >> 20).to_string()),
        ("checks, host pages compared", format!("{}, {}", summary.checks, summary.pages_compared)),
        (
            "host pages moved, leaves changed meanwhile",
            format!("{}, {}", summary.pages_moved, summary.leaves_changed),
        ),
        ("most MiB in swap", (summary.most_swapped_bytes >> 20).to_string()),
        ("memory limit met", summary.limit_hits.to_string()),
    ]
}

/// How far it is: a line that moves on a terminal, else a line now and then.
struct Display {
    bar: Option<ProgressBar>,
    begun: Instant,
    pause: Duration,
    /// When the next line is due.
    next: Cell<Duration>,
}

/// The shortest and the longest time between two lines where there is no terminal.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];

impl Display {
    fn new(time: Duration) -> Self {
        let style = ProgressStyle::with_template("{spinner} {elapsed_precise} {bar:20} {msg}");
        // The template is a constant: without it there is a plainer line.
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = std::io::stderr().is_terminal();
        let bar = bar.then(|| ProgressBar::new(time.as_secs().max(1)).with_style(style));
        let pause = (time / 20).clamp(PAUSES[0], PAUSES[1]);
        Self { bar, begun: Instant::now(), pause, next: Cell::new(pause) }
    }

    fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(format!("salp: {text}")),
            None => eprintln!("salp: {text}"),
        }
    }

    fn show(&self, summary: &Summary) {
        let elapsed = self.begun.elapsed();
        if self.bar.is_none() && elapsed < self.next.get() {
            return;
        }
        let text = format!(
            "{} rounds, {} forks, {} resets, {} kills, {} transfers, {} checks, {} told of losses",
            summary.rounds,
            summary.forks,
            summary.resets,
            summary.kills,
            summary.transfers,
            summary.checks,
            summary.told_of_loss
        );
        match &self.bar {
            Some(bar) => {
                bar.set_position(elapsed.as_secs());
                bar.set_message(text);
            }
            None => {
                self.next.set(elapsed + self.pause);
                eprintln!("salp: {:.0} s: {text}", elapsed.as_secs_f64());
            }
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
