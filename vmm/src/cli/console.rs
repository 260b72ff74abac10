//! `salp console`: what a VM has written and writes, and what is typed for it.

use std::io;
use std::process::ExitCode;

use super::client;
use super::vms::NameArguments;
use crate::control::ControlError;
use crate::control::terminal::{self, Input, LEAVE_KEY_NAME, Manner, Over, Source};

/// `salp console`.
///
/// # Errors
/// There is no such VM, or its colony was killed meanwhile.
pub fn console(arguments: &NameArguments) -> Result<ExitCode, ControlError> {
    let name = &arguments.name;
    // Before anything is done to the terminal.
    client().view(name)?;
    let input = Input::open(Manner::Raw)?;
    if input.source == Source::Terminal {
        restore_at_signals()?;
        eprintln!("salp: this is the console of {name}; {LEAVE_KEY_NAME} leaves it");
    }
    let (source, for_input) = (input.source, name.clone());
    std::thread::Builder::new().name("input".to_owned()).spawn(move || type_into(&for_input, source))?;
    match client().console(name, &mut io::stdout()) {
        // Whoever reads it has seen enough.
        Err(ControlError::Socket(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            Ok(ExitCode::SUCCESS)
        }
        Ok(()) => {
            drop(input);
            if source == Source::Terminal {
                say_how_it_ended(name);
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => Err(error),
    }
}

/// At a terminal nothing else tells why the console is over.
fn say_how_it_ended(name: &str) {
    match client().view(name) {
        Ok(vm) => eprintln!("salp: {name}: {}", vm.state.describe()),
        // With its last VM the colony is gone.
        Err(error) => {
            tracing::debug!(%error, "nobody knows how it ended");
            eprintln!("salp: {name} has ended");
        }
    }
}

/// Gives a VM what is typed; leaving it ends this process.
fn type_into(name: &str, source: Source) {
    let client = client();
    let over = terminal::pump(source, |typed| {
        let delivered = terminal::deliver(source, typed, |rest| client.input(name, rest));
        // Where it has ended, its output ends too.
        delivered.inspect_err(|error| tracing::debug!(%error, "console input ends")).is_ok()
    });
    match over {
        Ok(Over::Left) => {
            terminal::restore();
            std::process::exit(0);
        }
        Ok(Over::Ended) => {}
        Err(error) => tracing::warn!(%error, "standard input cannot be read"),
    }
}

/// Whatever ends this process makes the terminal what it was.
fn restore_at_signals() -> io::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new(terminal::ENDING_SIGNALS)?;
    let run = move || {
        if let Some(signal) = signals.forever().next() {
            terminal::restore();
            std::process::exit(128 + signal);
        }
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(run).map(|_| ())
}
