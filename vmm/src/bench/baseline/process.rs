//! A process of the baselines, from outside.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde::Serialize;

use super::BASELINE_ARGUMENT;
use super::words::{Answer, Request, Setup};
use crate::bench::BenchError;

/// Ends when dropped.
pub(super) struct Process {
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Process {
    /// Starts it, and waits until it is ready.
    pub(super) fn start(program: &Path, setup: &Setup) -> Result<Self, BenchError> {
        let mut command = Command::new(program);
        command.arg(BASELINE_ARGUMENT).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let gone = || BenchError::Baseline("the process of the baselines has no pipes".to_owned());
        let requests = child.stdin.take().ok_or_else(gone)?;
        let answers = BufReader::new(child.stdout.take().ok_or_else(gone)?);
        let mut process = Self { child, requests: Some(requests), answers };
        process.say(setup)?;
        process.hear()?.done()?;
        Ok(process)
    }

    /// Asks, and waits for the answer.
    pub(super) fn ask(&mut self, request: &Request) -> Result<Answer, BenchError> {
        self.say(request)?;
        self.hear()
    }

    /// Asks for something that has no answer but that it is done.
    pub(super) fn done(&mut self, request: &Request) -> Result<(), BenchError> {
        self.ask(request)?.done()
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

impl Drop for Process {
    fn drop(&mut self) {
        // The end of its input is the end of it.
        drop(self.requests.take());
        if let Err(error) = self.child.wait() {
            tracing::error!(%error, "the process of the baselines cannot be reaped");
        }
    }
}
