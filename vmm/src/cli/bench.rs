//! `salp bench`: what a clone costs, against what people would use instead. See [`bench`](crate::bench).

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use thiserror::Error;

use super::display::Display;
use super::interrupt::{self, Interrupt};
use super::memory::BUILTIN_LEAST_BYTES;
use super::size;
use crate::bench::baseline::Method;
use crate::bench::{self, BenchError, Benchmark, Dirty, Findings, Plan, html, report};
use crate::member::messages::GuestKind;
use crate::words::{MemoryShape, MemoryShapeError};

/// What is measured, and how.
#[derive(Debug, Args)]
pub struct BenchArguments {
    /// What to measure
    #[arg(value_enum)]
    what: What,
    /// Memory of each VM; several with commas
    #[arg(long, default_value = "128M,512M", value_delimiter = ',', value_parser = size::parse)]
    memory: Vec<u64>,
    /// How much of it is written before each fork: `all`, a size, or a percentage; several with commas
    #[arg(long, default_value = "10%,all", value_delimiter = ',', value_parser = parse_dirty)]
    dirty: Vec<Dirty>,
    /// Whether to ask for huge pages; both with a comma
    #[arg(long, value_enum, default_value = "on", value_delimiter = ',')]
    huge: Vec<Switch>,
    /// Pages that a device holds, for `pins`; several with commas
    #[arg(long, default_value = "0,256,4096", value_delimiter = ',',
        value_parser = clap::value_parser!(u64).range(0..=16384))]
    pins: Vec<u64>,
    /// Clones of each fork, for `fork` and `pause`
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    clones: u8,
    /// Clones of one fork that are alive at once, for `burst`; several with commas
    #[arg(long, default_value = "100", value_delimiter = ',',
        value_parser = clap::value_parser!(u16).range(1..=1000))]
    burst: Vec<u16>,
    /// Clones that are alive for `density`, and beside one that works for `fault` (0: none there)
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(0..=1000))]
    alive: u16,
    /// Milliseconds that a source works before and after a fork, for `throughput`
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(10..=60_000))]
    window: u64,
    /// What is measured beside salp; several with commas
    #[arg(long, value_enum, default_value = "all", value_delimiter = ',')]
    baseline: Vec<Baseline>,
    /// Runs that count, after one that does not; at most 3 to 10 of those that take long
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    runs: u32,
    /// What runs in the VMs; threads measure the memory part where there is no KVM
    #[arg(long, value_enum, default_value = "kvm")]
    guest: Guest,
    /// Write the records as JSON to this file
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the records as CSV to this file
    #[arg(long)]
    csv: Option<PathBuf>,
    /// Write a report with plots to this file: HTML, nothing outside of it is needed
    #[arg(long)]
    report: Option<PathBuf>,
    /// Measure nothing: take the records from a file that `--json` has written
    #[arg(long)]
    from: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// Call, pause, first instruction and their stages
    Fork,
    /// The pause and its stages
    Pause,
    /// First reads and writes of a clone
    Fault,
    /// Copies of pinned pages
    Pins,
    /// Memory of one more clone
    Density,
    /// Many clones at once
    Burst,
    /// Clones of clones
    Chain,
    /// A clone's return to its cut
    Reset,
    /// How fast pages are published, and what that writes
    Publish,
    /// The pause of a source whose memory is in the arena
    Scattered,
    /// What the source does after a fork
    Throughput,
    /// All of them
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Guest {
    Kvm,
    Thread,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Baseline {
    /// All memory copied
    FullCopy,
    /// `fork()` of the process
    ProcessFork,
    /// A private mapping of a file that was written once
    StaticTemplate,
    /// A private mapping of a file that is written for it
    Snapshot,
    /// All of these
    All,
    /// salp alone
    None,
}

impl Baseline {
    fn methods(self) -> Vec<Method> {
        match self {
            Self::FullCopy => vec![Method::FullCopy],
            Self::ProcessFork => vec![Method::ProcessFork],
            Self::StaticTemplate => vec![Method::StaticTemplate],
            Self::Snapshot => vec![Method::Snapshot],
            Self::All => Method::ALL.to_vec(),
            Self::None => Vec::new(),
        }
    }
}

/// Why there are no figures.
#[derive(Debug, Error)]
pub enum BenchCommandError {
    /// The memory size.
    #[error("{0}")]
    Shape(#[from] MemoryShapeError),
    /// The guest needs more than that.
    #[error("the built-in guest needs 16M of memory at least, --memory gives {0}")]
    TooSmall(String),
    /// The benchmark.
    #[error("{0}")]
    Bench(#[from] BenchError),
    /// This program's own path, or signals.
    #[error("{0}")]
    Host(std::io::Error),
    /// A file of records.
    #[error("{path} cannot be read: {source}")]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file.
    #[error("{path} cannot be written: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Measures, and reports.
///
/// # Errors
/// What kept it from measuring.
pub fn run(arguments: &BenchArguments) -> Result<ExitCode, BenchCommandError> {
    if let Some(path) = &arguments.from {
        let unreadable = |source| BenchCommandError::Unreadable { path: path.clone(), source };
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        let (records, host) = report::from_json(&text).map_err(|error| unreadable(error.into()))?;
        return publish(arguments, &Findings { records, host }).map(|()| ExitCode::SUCCESS);
    }
    let interrupt = Interrupt::watch().map_err(BenchCommandError::Host)?;
    let mut memory = arguments.memory.iter().map(|bytes| shape(*bytes)).collect::<Result<Vec<_>, _>>()?;
    memory.sort_by_key(|(shape, _)| shape.ram_bytes());
    let mut baselines: Vec<_> = arguments.baseline.iter().flat_map(|one| one.methods()).collect();
    baselines.sort_by_key(|method| Method::ALL.iter().position(|one| one == method));
    baselines.dedup();
    let display = Display::new();
    let plan = Plan {
        benchmarks: benchmarks(arguments.what),
        memory,
        dirty: arguments.dirty.clone(),
        huge: arguments.huge.iter().map(|huge| *huge == Switch::On).collect(),
        pins: arguments.pins.clone(),
        clones: arguments.clones.into(),
        burst: arguments.burst.iter().map(|count| (*count).into()).collect(),
        alive: arguments.alive.into(),
        window: Duration::from_millis(arguments.window),
        runs: arguments.runs,
        baselines,
        guest: match arguments.guest {
            Guest::Kvm => GuestKind::Kvm,
            Guest::Thread => GuestKind::Thread,
        },
        program: std::env::current_exe().map_err(BenchCommandError::Host)?,
        is_interrupted: &|| interrupt.seen().is_some(),
        progress: &|progress| display.show(progress),
    };
    let result = bench::run(&plan);
    display.end();
    match result {
        Ok(findings) => publish(arguments, &findings).map(|()| ExitCode::SUCCESS),
        Err(BenchError::Interrupted) => {
            eprintln!("salp: interrupted, everything is ended");
            Ok(ExitCode::from(interrupt.seen().map_or(1, interrupt::status)))
        }
        Err(error) => Err(error.into()),
    }
}

/// Files first: a table that nobody reads any more must not keep them from being written.
fn publish(arguments: &BenchArguments, findings: &Findings) -> Result<(), BenchCommandError> {
    use std::io::Write as _;
    let write = |path: &PathBuf, text: String| {
        std::fs::write(path, text).map_err(|source| BenchCommandError::File { path: path.clone(), source })
    };
    if let Some(path) = &arguments.json {
        let text = report::json(&findings.records, &findings.host).map_err(std::io::Error::from);
        write(path, text.map_err(BenchCommandError::Host)?)?;
    }
    if let Some(path) = &arguments.csv {
        write(path, report::csv(&findings.records))?;
    }
    if let Some(path) = &arguments.report {
        write(path, html::page(findings))?;
    }
    let mut out = std::io::stdout().lock();
    let text = format!("{}\nhost: {}\n", report::table(&findings.records), findings.host);
    out.write_all(text.as_bytes()).map_err(BenchCommandError::Host)
}

fn benchmarks(what: What) -> Vec<Benchmark> {
    match what {
        What::Fork => vec![Benchmark::Fork],
        What::Pause => vec![Benchmark::Pause],
        What::Fault => vec![Benchmark::Fault],
        What::Pins => vec![Benchmark::Pins],
        What::Chain => vec![Benchmark::Chain],
        What::Publish => vec![Benchmark::Publish],
        What::Density => vec![Benchmark::Density],
        What::Burst => vec![Benchmark::Burst],
        What::Reset => vec![Benchmark::Reset],
        What::Scattered => vec![Benchmark::Scattered],
        What::Throughput => vec![Benchmark::Throughput],
        What::All => Benchmark::ALL.to_vec(),
    }
}

fn shape(bytes: u64) -> Result<(MemoryShape, String), BenchCommandError> {
    if bytes < BUILTIN_LEAST_BYTES {
        return Err(BenchCommandError::TooSmall(size::show(bytes)));
    }
    Ok((MemoryShape::new(bytes)?, size::show(bytes)))
}

fn parse_dirty(text: &str) -> Result<Dirty, String> {
    let wrong = || format!("{text} is neither all, nor a size such as 64M, nor a percentage such as 10%");
    match text.strip_suffix('%') {
        _ if text == "all" => Ok(Dirty::All),
        Some(percent) => {
            let percent = percent.parse().ok().filter(|percent: &u64| *percent <= 100);
            percent.map(Dirty::Percent).ok_or_else(wrong)
        }
        None => size::parse(text).map(Dirty::Bytes).map_err(|_| wrong()),
    }
}
