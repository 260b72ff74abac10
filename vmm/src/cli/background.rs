//! A keeper in the background: how `salp run` starts it, what the two say to each other, and its life.
//!
//! # The lifeline
//! A socket pair connects them; each line is one JSON value.
//!
//! | who | says | when |
//! |---|---|---|
//! | keeper | [`Told::Started`] | its colony answers, or could not be started |
//! | run | [`Wish::Leave`] | `--detach`, at once: the keeper is nobody's |
//! | run | [`Wish::Attend`] | it follows the console: only now may the colony end, so that no output is missed |
//! | run | [`Wish::End`] | a signal came, which is to end the colony; at the second one the keeper exits at once |
//! | keeper | [`Told::FirstEnded`] | the first VM has ended, and others go on |
//! | run | [`Wish::Leave`] | the user leaves; the keeper says [`Told::Left`], unless its colony is ending |
//! | keeper | [`Told::Over`] | nothing is left of the colony |
//!
//! Where the lifeline ends before `Leave`, whoever started the colony was killed. Then it ends, as by SIGHUP:
//! nobody has a VM that runs on without having left it. (One that is not attended yet, too: Ctrl-C came
//! before the name was printed, and nobody would know of it.)
//!
//! # Errors
//! With `--detach` the keeper's standard error, which its members inherit, is a file from the start on. At a
//! terminal it is a pipe, that the terminal's process reads until it leaves, and then the keeper itself, into
//! such a file. So what was left has nothing of the terminal.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, PipeReader, PipeWriter, Write as _};
use std::os::fd::{AsFd as _, RawFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use signal_hook::consts::SIGHUP;

use super::client;
use super::run::{self, RunError};
use crate::control::ControlError;
use crate::control::place::Place;
use crate::control::registry::Entry;
use crate::control::service::{Keeper, Outcome, Settings};
use crate::ipc::spawn::{self, Child};

/// The argument that makes `salp` a keeper in the background.
pub const KEEPER_ARGUMENT: &str = "__keeper";
/// The keeper's end of the lifeline.
const LIFELINE_NUMBER: RawFd = 3;
/// The pipe that is the standard error of a keeper that is attended: where it is read, and written.
const ERRORS_READ_NUMBER: RawFd = 4;
const ERRORS_WRITE_NUMBER: RawFd = 5;

/// What a keeper says.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Told {
    /// The first VM's name; or why there is none.
    Started(Result<String, String>),
    /// How the first VM ended; others go on.
    FirstEnded(String),
    /// It is nobody's from now on.
    Left,
    /// The colony's end.
    Over(Outcome),
}

/// What it is asked for.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Wish {
    /// The console is followed.
    Attend,
    /// The colony is to end as by this signal.
    End(i32),
    /// It is to go on alone.
    Leave,
}

/// Says one thing.
pub(super) fn say(mut lifeline: &UnixStream, what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    lifeline.write_all(&line)
}

/// What the other side says.
pub(super) struct Heard(BufReader<UnixStream>);

impl Heard {
    /// The next thing that is said; none: the other side has gone.
    pub(super) fn next<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => Ok(None),
            // It went without having read all that it was told.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            Ok(_) => Ok(Some(serde_json::from_str(&line)?)),
            Err(error) => Err(error),
        }
    }
}

/// A keeper that was started.
pub(super) struct Background {
    /// Its process; dropping it kills that.
    pub(super) child: Child,
    /// This end of the lifeline.
    pub(super) lifeline: UnixStream,
    /// What the keeper says.
    pub(super) heard: Heard,
}

impl Background {
    /// Starts it; `errors` become its standard error.
    pub(super) fn spawn(
        settings: &Settings,
        errors: Option<&(PipeReader, PipeWriter)>,
    ) -> Result<Self, RunError> {
        let (lifeline, theirs) = UnixStream::pair()?;
        let text = serde_json::to_string(settings).map_err(io::Error::from)?;
        let mut descriptors = vec![(theirs.as_fd(), LIFELINE_NUMBER)];
        if let Some((reader, writer)) = errors {
            descriptors.push((reader.as_fd(), ERRORS_READ_NUMBER));
            descriptors.push((writer.as_fd(), ERRORS_WRITE_NUMBER));
        }
        let child = spawn::spawn_self(&[KEEPER_ARGUMENT.as_ref(), text.as_ref()], &[], &descriptors)?;
        let heard = Heard(BufReader::new(lifeline.try_clone()?));
        Ok(Self { child, lifeline, heard })
    }

    /// Waits until its colony answers. Returns the first VM's name.
    pub(super) fn wait_until_started(&mut self) -> Result<String, RunError> {
        match self.heard.next()? {
            Some(Told::Started(started)) => started.map_err(RunError::Background),
            _ => {
                let how = self.child.wait()?;
                Err(RunError::Background(format!("the keeper in the background {how}")))
            }
        }
    }
}

/// Starts a keeper in the background, and waits until its colony answers.
pub(super) fn detach(settings: &Settings) -> Result<ExitCode, RunError> {
    let mut background = Background::spawn(settings, None)?;
    let name = background.wait_until_started()?;
    // From here on the colony is nobody's child, even if it has ended already.
    let is_left = say(&background.lifeline, &Wish::Leave);
    background.child.leave_running();
    is_left?;
    match client().view(&name) {
        Ok(_) | Err(ControlError::Unknown(_)) => {}
        Err(error) => return Err(error.into()),
    }
    writeln!(io::stdout(), "{name}")?;
    Ok(ExitCode::SUCCESS)
}

/// The whole life of a keeper in the background.
///
/// # Errors
/// It was not started by `salp run`, which is told everything else.
pub fn keep(settings: &str) -> Result<ExitCode, RunError> {
    spawn::take_signals()?;
    let lifeline = UnixStream::from(spawn::adopt(LIFELINE_NUMBER)?);
    let mut heard = Heard(BufReader::new(lifeline.try_clone()?));
    let started = start(settings);
    let told = started.as_ref().map(|(_, root, _)| root.name.clone()).map_err(RunError::to_string);
    // Where nobody is there, that is heard next.
    let is_told = say(&lifeline, &Told::Started(told));
    is_told.unwrap_or_else(|error| tracing::debug!(%error, "nobody is told of this colony"));
    // It was told, and says it.
    let Ok((keeper, root, errors)) = started else { return Ok(ExitCode::FAILURE) };
    let end = keeper.ender();
    let is_left = Arc::new(AtomicBool::new(false));
    match (heard.next()?, errors) {
        (Some(Wish::Leave), _) => is_left.store(true, Ordering::Relaxed),
        (Some(Wish::Attend), Some(errors)) => {
            let attended = Attended {
                lifeline: lifeline.try_clone()?,
                heard,
                errors,
                log: keeper.log()?,
                is_left: Arc::clone(&is_left),
            };
            std::thread::Builder::new().name("lifeline".to_owned()).spawn(|| attended.obey(end))?;
        }
        (Some(Wish::End(signal)), _) => end(signal),
        (Some(Wish::Attend), None) | (None, _) => end(SIGHUP),
    }
    // Whoever has gone is told nothing more.
    let tell = |what| {
        let told = say(&lifeline, &what);
        told.unwrap_or_else(|error| tracing::debug!(%error, "nobody attends this colony"));
    };
    let outcome = keeper.run(|root| tell(Told::FirstEnded(root.state.describe())))?;
    if !is_left.load(Ordering::Relaxed) {
        tell(Told::Over(outcome));
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(words) = run::last_words(&root.name, &outcome) {
        Place::of_user().leave_last_words(&root.name, &words)?;
    }
    Ok(run::exit_code(&root.name, &outcome))
}

/// What a keeper has of whoever attends it.
struct Attended {
    lifeline: UnixStream,
    heard: Heard,
    errors: PipeReader,
    log: File,
    is_left: Arc<AtomicBool>,
}

impl Attended {
    /// Does what is wished, until it is left or whoever attends has gone.
    fn obey(mut self, end: impl Fn(i32)) {
        let mut is_ending = false;
        loop {
            match self.heard.next() {
                Ok(Some(Wish::End(signal))) if is_ending => std::process::exit(128 + signal),
                Ok(Some(Wish::End(signal))) => {
                    is_ending = true;
                    end(signal);
                }
                Ok(Some(Wish::Leave)) => {
                    self.is_left.store(true, Ordering::Relaxed);
                    let told = say(&self.lifeline, &Told::Left);
                    told.unwrap_or_else(|error| tracing::debug!(%error, "it was left in a hurry"));
                    break;
                }
                Ok(Some(Wish::Attend)) => {}
                Ok(None) | Err(_) => {
                    end(SIGHUP);
                    break;
                }
            }
        }
        // Until this process ends: nobody else reads them, and nobody is to wait for room.
        if let Err(error) = io::copy(&mut self.errors, &mut self.log) {
            tracing::debug!(%error, "errors are lost");
        }
    }
}

/// Starts the colony. With the errors that are to be read, if it is attended.
fn start(settings: &str) -> Result<(Keeper, Entry, Option<PipeReader>), RunError> {
    let settings: Settings = serde_json::from_str(settings).map_err(io::Error::from)?;
    // A session of its own: no terminal's signals.
    rustix::process::setsid().map_err(io::Error::from)?;
    let nothing = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&nothing).map_err(io::Error::from)?;
    rustix::stdio::dup2_stdout(&nothing).map_err(io::Error::from)?;
    let errors = if settings.is_background {
        None
    } else {
        let writer = spawn::adopt(ERRORS_WRITE_NUMBER)?;
        rustix::stdio::dup2_stderr(&writer).map_err(io::Error::from)?;
        Some(PipeReader::from(spawn::adopt(ERRORS_READ_NUMBER)?))
    };
    // Whatever directory this was started in may go.
    std::env::set_current_dir("/")?;
    let keeper = Keeper::start(settings)?;
    let root = keeper.root()?;
    Ok((keeper, root, errors))
}
