//! `salp map`: a VM's memory leaf by leaf, or which VMs of its colony share which leaves; in the terminal,
//! or as a picture.

pub(super) mod cell;
mod family;
mod svg;

use std::path::PathBuf;
use std::process::ExitCode;

use anstyle::Ansi256Color;
use clap::Args;

use self::cell::Cell;
use self::family::Row;
use super::output::Output;
use super::{client, ps, size};
use crate::control::ControlError;
use crate::control::client::Client;
use crate::control::resources::{MemoryView, Pages};

/// Leaves in a line.
const LINE_LEAVES: usize = 64;

/// What to draw.
#[derive(Debug, Args)]
pub struct MapArguments {
    /// The VM's name
    name: String,
    /// Show which VMs of its colony share which leaves
    #[arg(long)]
    family: bool,
    /// Write a picture into this file instead
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print one JSON document instead
    #[arg(long, conflicts_with = "svg")]
    json: bool,
}

/// `salp map`.
///
/// # Errors
/// There is no such VM, it has ended, or the picture cannot be written.
pub fn map(arguments: &MapArguments, output: Output) -> Result<ExitCode, ControlError> {
    let client = client();
    let (text, picture) = if arguments.family {
        let rows = family(&client, &arguments.name)?;
        if arguments.json {
            let memories: Vec<_> = rows.iter().map(|row| &row.memory).collect();
            output.print_json(&memories)?;
            return Ok(ExitCode::SUCCESS);
        }
        (family::text(&rows), family::picture(&rows))
    } else {
        let memory = client.memory(&arguments.name)?;
        if arguments.json {
            output.print_json(&memory)?;
            return Ok(ExitCode::SUCCESS);
        }
        (text(&memory), svg::picture(&memory))
    };
    match &arguments.svg {
        Some(path) => std::fs::write(path, picture).map_err(|source| ControlError::Host {
            action: "write",
            path: path.clone(),
            source,
        })?,
        None => output.print(&text)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The VMs of a colony that have not ended, with their memory.
fn family(client: &Client, name: &str) -> Result<Vec<Row>, ControlError> {
    let keeper_pid = client.view(name)?.keeper_pid;
    let mut vms = client.list()?.vms;
    vms.retain(|vm| vm.keeper_pid == keeper_pid);
    let mut rows = Vec::new();
    for (lead, vm) in ps::tree(&vms).into_iter().filter(|(_, vm)| vm.state.is_live()) {
        match client.memory(&vm.name) {
            Ok(memory) => rows.push(Row { label: lead + &vm.name, memory }),
            // It has ended meanwhile.
            Err(ControlError::Problem(problem)) if problem.code == "not-running" => {}
            Err(error) => return Err(error),
        }
    }
    Ok(rows)
}

/// What a VM's pages are, in a line.
fn sums(memory: &MemoryView) -> String {
    let Pages { zero, exclusive, lent, shared, pinned, lost } = memory.pages;
    let show = |name: &str, pages: u64| format!("{name} {}", size::show(pages * memory.page_bytes));
    let parts = [("exclusive", exclusive), ("lent", lent), ("shared", shared), ("zero", zero)];
    let mut text = parts.map(|(name, pages)| show(name, pages)).join("  ");
    text += &format!("  pinned {pinned} pages");
    if lost > 0 {
        text += &format!("  lost {lost} pages");
    }
    text
}

/// For a terminal: lines of 64 leaves.
fn text(memory: &MemoryView) -> String {
    let mut text = format!("{}: {}\n", memory.name, sums(memory));
    for (number, line) in memory.leaves.chunks(LINE_LEAVES).enumerate() {
        text += &format!("{:>6}  ", size::show(crate::words::wide(number * LINE_LEAVES) * memory.leaf_bytes));
        for leaf in line {
            let Cell { glyph, fore, back } = Cell::of(leaf);
            let style = Ansi256Color(fore.index).on(Ansi256Color(back.index));
            text += &format!("{style}{glyph}{style:#}");
        }
        text.push('\n');
    }
    text + LEGEND
}

/// For a terminal.
const LEGEND: &str = "one cell is 2 MiB: ▁ to █ the vm's own pages  ▒ lent  1 to 9, + shared by so many vms  \
                      P pinned  · never touched  X lost\n";

#[cfg(test)]
pub(in crate::cli) mod tests {
    use super::cell::tests::leaf;
    use super::*;
    use crate::control::resources::{LeafView, TablesView};

    /// The memory of a VM with these leaves.
    pub(in crate::cli) fn memory(name: &str, leaves: Vec<LeafView>) -> MemoryView {
        let mut pages = Pages::default();
        for leaf in &leaves {
            pages.zero += leaf.pages.zero;
            pages.exclusive += leaf.pages.exclusive;
            pages.lent += leaf.pages.lent;
            pages.shared += leaf.pages.shared;
            pages.pinned += leaf.pages.pinned;
            pages.lost += leaf.pages.lost;
        }
        let tables = TablesView { levels: Vec::new(), own_records: 0, shared_records: 0 };
        let name = name.to_owned();
        MemoryView { name, id: 1, page_bytes: 4096, leaf_bytes: 2 << 20, pages, tables, leaves }
    }

    #[test]
    fn lines_have_64_leaves_and_say_where_they_begin() {
        let own = Pages { exclusive: 512, ..Pages::default() };
        let leaves = (0..65).map(|number| leaf(number, own, None)).collect();
        let plain = anstream::adapter::strip_str(&text(&memory("a", leaves))).to_string();
        let lines: Vec<_> = plain.lines().collect();
        assert_eq!(lines[0], "a: exclusive 130M  lent 0  shared 0  zero 0  pinned 0 pages");
        assert_eq!(lines[1], format!("     0  {}", "█".repeat(64)));
        assert_eq!(lines[2], "  128M  █");
    }
}
