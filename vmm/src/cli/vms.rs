//! What is done to VMs that are named: `salp pause`, `resume`, `reset`, `stop`, `rm` and `wait`, over their
//! colony's socket. Of several names each is done; what cannot be done is said of each, and makes the exit
//! status that of a failure.

use std::process::ExitCode;

use clap::Args;

use super::output::Output;
use super::{client, run};
use crate::control::client::Client;
use crate::control::{ControlError, WantedState};

/// Which VM.
#[derive(Debug, Args)]
pub struct NameArguments {
    /// The VM's name
    pub(super) name: String,
}

/// Which VMs.
#[derive(Debug, Args)]
pub struct NamesArguments {
    /// The VMs' names
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

/// Which VMs to stop.
#[derive(Debug, Args)]
pub struct StopArguments {
    /// The VMs' names
    #[arg(required_unless_present = "all", conflicts_with = "all", value_name = "NAME")]
    names: Vec<String>,
    /// All VMs of all your colonies
    #[arg(short, long)]
    all: bool,
}

/// Which VMs to remove.
#[derive(Debug, Args)]
pub struct RmArguments {
    /// The VMs' names
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
    /// Stop those that run or are paused
    #[arg(short, long)]
    force: bool,
}

/// Which clones to reset.
#[derive(Debug, Args)]
pub struct ResetArguments {
    /// The clones' names
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
    /// Print one JSON document for each
    #[arg(long)]
    json: bool,
}

/// Does something to each VM.
fn each(
    names: &[String],
    mut act: impl FnMut(&Client, &str) -> Result<(), ControlError>,
) -> Result<ExitCode, ControlError> {
    let client = client();
    let mut status = ExitCode::SUCCESS;
    for name in names {
        if let Err(error) = act(&client, name) {
            eprintln!("salp: {error}");
            status = ExitCode::FAILURE;
        }
    }
    Ok(status)
}

/// `salp pause`.
///
/// # Errors
/// None but what is said of each VM.
pub fn pause(arguments: &NamesArguments) -> Result<ExitCode, ControlError> {
    each(&arguments.names, |client, name| client.set_state(name, WantedState::Paused).map(|_| ()))
}

/// `salp resume`.
///
/// # Errors
/// None but what is said of each VM.
pub fn resume(arguments: &NamesArguments) -> Result<ExitCode, ControlError> {
    each(&arguments.names, |client, name| client.set_state(name, WantedState::Running).map(|_| ()))
}

/// `salp reset`.
///
/// # Errors
/// None but what is said of each VM.
pub fn reset(arguments: &ResetArguments, output: Output) -> Result<ExitCode, ControlError> {
    each(&arguments.names, |client, name| {
        let reset = client.reset(name)?;
        if arguments.json {
            return Ok(output.print_json(&reset)?);
        }
        let (name, pages, leaves) = (&reset.name, reset.restored_pages, reset.remapped_leaves);
        let us = reset.reset_us;
        let figures = format!("  {pages} pages restored in place  {leaves} leaves mapped afresh  {us:.0} us");
        Ok(output.print(&format!("{name}{}\n", if output.is_quiet { "" } else { figures.as_str() }))?)
    })
}

/// `salp stop`.
///
/// # Errors
/// With `--all`: nobody can say which VMs there are.
pub fn stop(arguments: &StopArguments) -> Result<ExitCode, ControlError> {
    if !arguments.all {
        return each(&arguments.names, |client, name| client.stop(name).map(|_| ()));
    }
    let all = client().list()?;
    let live = all.vms.into_iter().filter(|vm| vm.state.is_live());
    let names: Vec<_> = live.map(|vm| vm.name).collect();
    let status = each(&names, |client, name| match client.stop(name).map(|_| ()) {
        // It has ended by itself meanwhile.
        Err(ControlError::Problem(problem)) if problem.code == "not-running" => Ok(()),
        Err(ControlError::Unknown(_) | ControlError::Ending) => Ok(()),
        result => result,
    })?;
    all.silent.iter().for_each(|error| eprintln!("salp: {error}"));
    Ok(if all.silent.is_empty() { status } else { ExitCode::FAILURE })
}

/// `salp rm`.
///
/// # Errors
/// None but what is said of each VM.
pub fn rm(arguments: &RmArguments) -> Result<ExitCode, ControlError> {
    each(&arguments.names, |client, name| client.remove(name, arguments.force).map(|_| ()))
}

/// `salp wait`.
///
/// # Errors
/// None but what is said of each VM.
pub fn wait(arguments: &NamesArguments, output: Output) -> Result<ExitCode, ControlError> {
    each(&arguments.names, |client, name| {
        let vm = client.wait(name)?;
        Ok(output.print(&format!("{}\n", run::status(&vm.state)))?)
    })
}
