//! `salp fork`, `ps`, `pause`, `resume`, `reset`, `stop` and `console`: what is done to running VMs, over
//! their colony's socket.

use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::Args;

use super::output::{Output, columns};
use super::size;
use crate::control::client::Client;
use crate::control::place::Place;
use crate::control::terminal::{self, Input, LEAVE_KEY_NAME, Over, Source};
use crate::control::{ControlError, ForkRequest, MOST_CLONES, VmView, WantedState};

/// What to fork.
#[derive(Debug, Args)]
pub struct ForkArguments {
    /// The VM to clone
    source: String,
    /// How many clones
    #[arg(short = 'n', value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=MOST_CLONES))]
    count: u64,
    /// The clone's name; of several, what their names begin with
    #[arg(long)]
    name: Option<String>,
}

/// How to list.
#[derive(Debug, Args)]
pub struct PsArguments {
    /// Print one JSON document instead of a table
    #[arg(long)]
    json: bool,
}

/// Which VM.
#[derive(Debug, Args)]
pub struct NameArguments {
    /// The VM's name
    name: String,
}

fn client() -> Client {
    Client::new(Place::of_user())
}

/// `salp fork`.
///
/// # Errors
/// Nothing was cloned.
pub fn fork(arguments: &ForkArguments) -> Result<ExitCode, ControlError> {
    let (count, name) = (arguments.count, arguments.name.clone());
    let request = ForkRequest { count, name, ..ForkRequest::default() };
    let reply = client().fork(&arguments.source, &request)?;
    let mut out = io::stdout().lock();
    for clone in &reply.clones {
        writeln!(out, "{}  pause {:.0} us  call {:.0} us", clone.name, clone.pause_us, clone.call_us)?;
    }
    for clone in &reply.missing {
        eprintln!("salp: {} could not be had: {}", clone.name, clone.problem.detail);
    }
    Ok(if reply.missing.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `salp ps`.
///
/// # Errors
/// The directory of sockets cannot be used, or a colony does not answer.
pub fn ps(arguments: &PsArguments, output: Output) -> Result<ExitCode, ControlError> {
    let all = client().list()?;
    for socket in &all.stale {
        output.remark(format_args!("the colony of {socket} was killed: what was left of it is cleaned up"));
    }
    for words in &all.last_words {
        output.remark(words);
    }
    for error in &all.silent {
        eprintln!("salp: {error}");
    }
    if arguments.json {
        output.print_json(&all.vms)?;
    } else if output.is_quiet {
        output.print(&all.vms.iter().map(|vm| format!("{}\n", vm.name)).collect::<String>())?;
    } else {
        output.print(&table(&all.vms))?;
    }
    Ok(if all.silent.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Columns as wide as what is in them.
fn table(vms: &[VmView]) -> String {
    let head = ["NAME", "ID", "PARENT", "STATE", "MEMORY", "PID", "CONSOLE"].map(str::to_owned);
    let row = |vm: &VmView| {
        [
            vm.name.clone(),
            vm.id.to_string(),
            vm.parent.clone().unwrap_or_else(|| "-".to_owned()),
            vm.state.describe(),
            size::show(vm.memory_bytes),
            vm.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            vm.console.display().to_string(),
        ]
    };
    let rows: Vec<_> = std::iter::once(head).chain(vms.iter().map(row)).collect();
    columns(&rows)
}

/// `salp pause`.
///
/// # Errors
/// There is no such VM, it has ended, or it does not stop.
pub fn pause(arguments: &NameArguments) -> Result<ExitCode, ControlError> {
    client().set_state(&arguments.name, WantedState::Paused)?;
    Ok(ExitCode::SUCCESS)
}

/// `salp resume`.
///
/// # Errors
/// There is no such VM, or it has ended.
pub fn resume(arguments: &NameArguments) -> Result<ExitCode, ControlError> {
    client().set_state(&arguments.name, WantedState::Running)?;
    Ok(ExitCode::SUCCESS)
}

/// `salp reset`.
///
/// # Errors
/// There is no such VM, or it cannot be reset.
pub fn reset(arguments: &NameArguments) -> Result<ExitCode, ControlError> {
    let reset = client().reset(&arguments.name)?;
    let (name, pages, leaves) = (&reset.name, reset.restored_pages, reset.remapped_leaves);
    let us = reset.reset_us;
    let mut out = io::stdout().lock();
    writeln!(out, "{name}  {pages} pages restored in place  {leaves} leaves mapped afresh  {us:.0} us")?;
    Ok(ExitCode::SUCCESS)
}

/// `salp stop`.
///
/// # Errors
/// Nothing was stopped.
pub fn stop(arguments: &NameArguments) -> Result<ExitCode, ControlError> {
    client().stop(&arguments.name)?;
    Ok(ExitCode::SUCCESS)
}

/// `salp console`.
///
/// # Errors
/// There is no such VM, or its colony was killed meanwhile.
pub fn console(arguments: &NameArguments) -> Result<ExitCode, ControlError> {
    let name = &arguments.name;
    // Before anything is done to the terminal.
    client().view(name)?;
    let input = Input::open()?;
    if input.source == Source::Raw {
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
            if source == Source::Raw {
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
    use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT])?;
    let run = move || {
        if let Some(signal) = signals.forever().next() {
            terminal::restore();
            std::process::exit(128 + signal);
        }
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(run).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::VmState;
    use crate::member::messages::HowEnded;

    #[test]
    fn the_table_has_a_line_for_each_vm() {
        let vm = VmView {
            name: "salp-1-1".to_owned(),
            id: 2,
            parent: Some("salp-1".to_owned()),
            parent_id: Some(1),
            state: VmState::Ended { how: HowEnded::Exited, status: Some(3), text: String::new() },
            memory_bytes: 512 << 20,
            cpus: 1,
            pid: None,
            keeper_pid: 7,
            socket: "/run/s".into(),
            console: "/run/c".into(),
        };
        let expected = "\
NAME      ID  PARENT  STATE         MEMORY  PID  CONSOLE
salp-1-1  2   salp-1  ended with 3  512M    -    /run/c
";
        assert_eq!(table(&[vm]), expected);
    }
}
