//! `salp inspect` and `salp stats`: one VM in detail, and what VMs use.

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::output::{Output, columns};
use super::{client, size};
use crate::control::resources::{ColonyView, StatsView};
use crate::control::{ControlError, VmView};

/// Which VM, and how.
#[derive(Debug, Args)]
pub struct InspectArguments {
    /// The VM's name
    name: String,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Which VMs, and how.
#[derive(Debug, Args)]
pub struct StatsArguments {
    /// The VMs' names; without any, all that have not ended
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// All that is known of a VM.
#[derive(Debug, Serialize)]
struct Details {
    #[serde(flatten)]
    vm: VmView,
    /// What it uses; none if it has ended.
    stats: Option<StatsView>,
    /// Its colony.
    colony: ColonyView,
}

/// `salp inspect`.
///
/// # Errors
/// There is no such VM, or its colony is ending.
pub fn inspect(arguments: &InspectArguments, output: Output) -> Result<ExitCode, ControlError> {
    let (client, name) = (client(), &arguments.name);
    let vm = client.view(name)?;
    let stats = match vm.state.is_live() {
        true => client.stats(name).map(Some).or_else(none_if_ended)?,
        false => None,
    };
    let details = Details { vm, stats, colony: client.colony(name)? };
    if arguments.json {
        output.print_json(&details)?;
    } else {
        output.print(&lines(&details))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// It has ended between two questions.
fn none_if_ended(error: ControlError) -> Result<Option<StatsView>, ControlError> {
    match error {
        ControlError::Problem(problem) if problem.code == "not-running" => Ok(None),
        error => Err(error),
    }
}

fn lines(details: &Details) -> String {
    let Details { vm, stats, colony } = details;
    let mut rows = vec![
        ("name", vm.name.clone()),
        ("id", vm.id.to_string()),
        ("parent", vm.parent.clone().unwrap_or_else(|| "-".to_owned())),
        ("state", vm.state.describe()),
        ("memory", size::show(vm.memory_bytes)),
        ("vcpus", vm.cpus.to_string()),
        ("process", vm.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string())),
        ("console", vm.console.display().to_string()),
    ];
    if let Some(stats) = stats {
        let pages = stats.pages;
        let (published, faults, dma) = (stats.publication, stats.faults, stats.dma);
        rows.extend([
            ("processor", format!("{} ms", stats.cpu_us / 1000)),
            ("resident", megabytes(stats.resident_bytes)),
            ("shared", format!("{} pages", pages.shared)),
            ("exclusive", format!("{} pages", pages.exclusive)),
            ("lent", format!("{} pages", pages.lent)),
            ("zero", format!("{} pages", pages.zero)),
            ("pinned", format!("{} pages, {} pins", pages.pinned, stats.pins)),
            ("lost", format!("{} pages", pages.lost)),
            ("published", format!("{} blocks, {} single pages", published.blocks, published.patches)),
            (
                "faults",
                format!("{} touches, {} stores, {} of the host", faults.touch, faults.store, faults.host),
            ),
            (
                "dma",
                format!("{} transfers, {} failed, {} in flight", dma.transfers, dma.failed, dma.in_flight),
            ),
        ]);
    }
    rows.extend([
        ("keeper", format!("{}, salp {}", colony.keeper_pid, colony.version)),
        ("socket", colony.socket.display().to_string()),
        ("arena", format!("{}, {} used", colony.arena_kind, megabytes(colony.arena_used_bytes))),
        ("vms", format!("{} live, {} ended, {} at most", colony.live_vms, colony.ended_vms, colony.most_vms)),
        ("pool", format!("{} of {} ready", colony.pool.ready, colony.pool.size)),
    ]);
    let rows: Vec<_> = rows.into_iter().map(|(name, value)| [name.to_owned(), value]).collect();
    columns(&rows)
}

/// `salp stats`.
///
/// # Errors
/// There is no such VM, or a colony does not answer.
pub fn stats(arguments: &StatsArguments, output: Output) -> Result<ExitCode, ControlError> {
    let client = client();
    let mut status = ExitCode::SUCCESS;
    let mut all = Vec::new();
    if arguments.names.is_empty() {
        let list = client.list()?;
        for vm in list.vms.iter().filter(|vm| vm.state.is_live()) {
            all.extend(client.stats(&vm.name).map(Some).or_else(none_if_ended)?);
        }
        list.silent.iter().for_each(|error| eprintln!("salp: {error}"));
        status = if list.silent.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    } else {
        for name in &arguments.names {
            all.push(client.stats(name)?);
        }
    }
    if arguments.json {
        output.print_json(&all)?;
    } else {
        output.print(&table(&all))?;
    }
    Ok(status)
}

fn table(all: &[StatsView]) -> String {
    let head =
        ["NAME", "CPU", "RESIDENT", "SHARED", "UNIQUE", "LENT", "PINNED", "FAULTS", "PUBLISHED", "DMA"]
            .map(str::to_owned);
    let row = |stats: &StatsView| {
        let faults = stats.faults.touch + stats.faults.store;
        [
            stats.name.clone(),
            format!("{} ms", stats.cpu_us / 1000),
            megabytes(stats.resident_bytes),
            megabytes(stats.shared_bytes),
            megabytes(stats.unique_bytes),
            stats.pages.lent.to_string(),
            stats.pages.pinned.to_string(),
            faults.to_string(),
            stats.publication.blocks.to_string(),
            stats.dma.transfers.to_string(),
        ]
    };
    columns(&std::iter::once(head).chain(all.iter().map(row)).collect::<Vec<_>>())
}

/// MiB with a digit.
pub(super) fn megabytes(bytes: u64) -> String {
    format!("{:.1}M", bytes as f64 / f64::from(1 << 20))
}
