//! `salp run` at a terminal: shows what a keeper in the background does, until that is over or the user
//! leaves it running.
//!
//! To the user it is as if this process were the keeper: the console is here, the built-in guest's Ctrl-C
//! and all signals end everything, and the exit status is that of the first VM. Only the leave key shows
//! that it is not. If this process is killed, or its terminal goes away, everything ends
//! ([`background`]).
//!
//! # Threads
//! The main thread hears what the keeper says; one each copies the console and the keeper's errors, types,
//! and passes on signals.

use std::io::{self, PipeReader};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use signal_hook::iterator::Signals;

use super::background::{self, Background, Told, Wish};
use super::client;
use super::run::{self, RunError};
use crate::control::client::ConsoleOutput;
use crate::control::service::Settings;
use crate::control::terminal::{self, Input, LEAVE_KEY_NAME, Manner, Over, Source};
use crate::ipc::spawn::Ending;

/// How long a terminal may take for the rest of what is to be shown.
const OUTPUT_LIMIT: Duration = Duration::from_secs(2);
/// The keeper is told of two signals; whoever sends a third one does not want to wait for it.
const PATIENCE: usize = 2;

/// Runs a VM to its end, or until it is left.
pub(super) fn attend(settings: &Settings) -> Result<ExitCode, RunError> {
    let errors = io::pipe()?;
    let mut background = Background::spawn(settings, Some(&errors))?;
    let (errors, theirs) = errors;
    drop(theirs);
    let told_all = show_errors(errors)?;
    let name = background.wait_until_started()?;
    let attended = Visit { name, has_input: settings.kernel.is_some(), told_all }.hold(&mut background);
    // Where something went wrong here, the keeper ends all when it hears no more.
    background.lifeline.shutdown(std::net::Shutdown::Both)?;
    match attended {
        Ok(End::Left) => {
            background.child.leave_running();
            Ok(ExitCode::SUCCESS)
        }
        Ok(End::Over(code)) => {
            background.child.wait()?;
            Ok(code)
        }
        Err(error) => {
            background.child.wait()?;
            Err(error)
        }
    }
}

/// How it ended here.
enum End {
    Left,
    Over(ExitCode),
}

/// A colony that is shown.
struct Visit {
    name: String,
    has_input: bool,
    /// Ends when all errors are shown.
    told_all: Receiver<()>,
}

impl Visit {
    /// From the first line to the last.
    fn hold(&self, background: &mut Background) -> Result<End, RunError> {
        let name = &self.name;
        // The keeper waits for it: whatever the guest says is shown.
        let console = client().follow_console(name)?;
        let manner = if self.has_input { Manner::Raw } else { Manner::Watched };
        let ends = if self.has_input { "" } else { "Ctrl-C ends it, " };
        pass_on_signals(background.lifeline.try_clone()?)?;
        // Before it is said what keys do.
        let input = Input::open(manner)?;
        eprintln!(
            "salp: {name} runs: `salp fork {name}` clones it, {ends}{LEAVE_KEY_NAME} leaves it running"
        );
        let shown = show_console(console)?;
        background::say(&background.lifeline, &Wish::Attend)?;
        type_into(name.clone(), input.source, self.has_input, background.lifeline.try_clone()?)?;
        let mut has_first_ended = false;
        loop {
            match background.heard.next()? {
                Some(Told::FirstEnded(how)) => {
                    wait_for(&shown);
                    // There is nobody to type for.
                    terminal::take(Manner::Watched)?;
                    has_first_ended = true;
                    eprintln!(
                        "salp: {name} {how}; its clones go on (`salp ps` lists them, Ctrl-C ends them, \
                         {LEAVE_KEY_NAME} leaves them running)"
                    );
                }
                Some(Told::Left) => {
                    drop(input);
                    if has_first_ended {
                        eprintln!("salp: the clones of {name} run on: `salp ps` lists them");
                    } else {
                        eprintln!(
                            "salp: {name} runs on: `salp console {name}` comes back to it, \
                             `salp stop {name}` ends it"
                        );
                    }
                    return Ok(End::Left);
                }
                Some(Told::Over(outcome)) => {
                    wait_for(&shown);
                    wait_for(&self.told_all);
                    drop(input);
                    return Ok(End::Over(run::exit_code(name, &outcome)));
                }
                Some(Told::Started(_)) => {}
                None => {
                    drop(input);
                    return self.without_a_word(background);
                }
            }
        }
    }

    /// The keeper has ended and did not say how.
    fn without_a_word(&self, background: &Background) -> Result<End, RunError> {
        let ending = background.child.wait()?;
        wait_for(&self.told_all);
        eprintln!("salp: the keeper of {} {ending}, and its VMs are gone", self.name);
        Ok(End::Over(ExitCode::from(match ending {
            Ending::Exited(code) => u8::try_from(code).unwrap_or(u8::MAX),
            Ending::Killed(_) => run::KILLED,
        })))
    }
}

fn wait_for(shown: &Receiver<()>) {
    // Nothing is ever sent: it ends with the thread that shows.
    if shown.recv_timeout(OUTPUT_LIMIT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
        tracing::debug!("the terminal stands still");
    }
}

/// Copies the console to standard output.
fn show_console(console: ConsoleOutput) -> io::Result<Receiver<()>> {
    in_thread("console", move || {
        if let Err(error) = console.copy_to(&mut io::stdout()) {
            tracing::debug!(%error, "the console is not shown any more");
        }
    })
}

/// Copies the keeper's errors to standard error, until nobody is left who could say something.
fn show_errors(mut errors: PipeReader) -> io::Result<Receiver<()>> {
    in_thread("errors", move || {
        if let Err(error) = io::copy(&mut errors, &mut io::stderr()) {
            tracing::debug!(%error, "the keeper's errors are not shown any more");
        }
    })
}

/// What is returned ends with the thread.
fn in_thread(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<Receiver<()>> {
    let (done, ended) = channel();
    let run = move || {
        run();
        drop(done);
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(run)?;
    Ok(ended)
}

/// Gives the guest what is typed, if it reads; the leave key asks the keeper to go on alone.
fn type_into(name: String, source: Source, has_input: bool, lifeline: UnixStream) -> io::Result<()> {
    let run = move || {
        let client = client();
        let mut is_read = has_input;
        let over = terminal::pump(source, |typed| {
            if is_read {
                let delivered = terminal::deliver(source, typed, |rest| client.input(&name, rest));
                // It has ended; the leave key counts still.
                is_read = delivered.inspect_err(|error| tracing::debug!(%error, "input ends")).is_ok();
            }
            true
        });
        match over {
            Ok(Over::Left) => wish(&lifeline, &Wish::Leave),
            Ok(Over::Ended) => {}
            Err(error) => tracing::warn!(%error, "the terminal cannot be read"),
        }
    };
    in_thread("input", run).map(drop)
}

/// Has the colony end as a signal wants.
fn pass_on_signals(lifeline: UnixStream) -> io::Result<()> {
    let mut signals = Signals::new(terminal::ENDING_SIGNALS)?;
    let run = move || {
        for (seen, signal) in signals.forever().enumerate() {
            if seen >= PATIENCE {
                terminal::restore();
                std::process::exit(128 + signal);
            }
            wish(&lifeline, &Wish::End(signal));
        }
    };
    in_thread("signals", run).map(drop)
}

fn wish(lifeline: &UnixStream, what: &Wish) {
    // A keeper that has gone is noticed where it is listened to.
    let told = background::say(lifeline, what);
    told.unwrap_or_else(|error| tracing::debug!(%error, "the keeper has gone"));
}
