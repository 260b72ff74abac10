//! Logs: to standard error, warnings and worse unless `-v` or `SALP_LOG` say otherwise, for people or as
//! JSON. What a command was told holds for the processes that it starts too.
#![expect(unsafe_code, reason = "the environment is changed, before there is a second thread")]

use std::env;

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// What is logged, in the words of `tracing_subscriber::EnvFilter`.
const FILTER_VARIABLE: &str = "SALP_LOG";
/// In which form: `human` or `json`.
const FORMAT_VARIABLE: &str = "SALP_LOG_FORMAT";

/// The form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    /// Lines for people
    Human,
    /// One JSON object a line
    Json,
}

/// Notes what the command line says for this process and those that it starts, and what else than the
/// usual the command logs if nobody says anything. To be called first of all.
pub(super) fn choose(verbosity: u8, format: Option<LogFormat>, unless_said: Option<&'static str>) {
    let filter = match verbosity {
        0 => unless_said.filter(|_| env::var_os(FILTER_VARIABLE).is_none()),
        1 => Some("info"),
        2 => Some("debug"),
        _ => Some("trace"),
    };
    let format = format.map(|format| match format {
        LogFormat::Human => "human",
        LogFormat::Json => "json",
    });
    for (variable, value) in [(FILTER_VARIABLE, filter), (FORMAT_VARIABLE, format)] {
        if let Some(value) = value {
            // SAFETY: this process has one thread, that of `main`: nobody else reads the environment.
            unsafe { env::set_var(variable, value) };
        }
    }
}

/// Starts the log that the environment describes.
pub(super) fn start() {
    let filter = EnvFilter::try_from_env(FILTER_VARIABLE).unwrap_or_else(|_| EnvFilter::new("warn"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let result = match env::var(FORMAT_VARIABLE).as_deref() {
        Ok("json") => log.json().try_init(),
        _ => log.with_ansi(colours()).try_init(),
    };
    if let Err(error) = result {
        eprintln!("salp: no log: {error}");
    }
}

fn colours() -> bool {
    anstream::AutoStream::choice(&std::io::stderr()) != anstream::ColorChoice::Never
}
