//! `salp ps`: the VMs of all colonies, families as trees.

use std::collections::BTreeSet;
use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::output::{Output, columns};
use super::{client, size};
use crate::control::client::Everything;
use crate::control::{ControlError, VmView};

/// How often a list that is watched is made anew: colonies come and go without telling anybody.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// To the upper left corner of a terminal, and nothing on it.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// How to list.
#[derive(Debug, Args)]
pub struct PsArguments {
    /// Print one JSON document instead of a table
    #[arg(long)]
    json: bool,
    /// Draw the trees of families also where the output is no terminal
    #[arg(long, conflicts_with = "json")]
    tree: bool,
    /// Go on, and print the list again whenever it has changed
    #[arg(short, long)]
    watch: bool,
}

/// `salp ps`.
///
/// # Errors
/// The directory of sockets cannot be used, or a colony does not answer.
pub fn ps(arguments: &PsArguments, output: Output) -> Result<ExitCode, ControlError> {
    let is_terminal = io::stdout().is_terminal();
    let mut shown = None;
    loop {
        let all = client().list()?;
        say_what_is_wrong(&all, output);
        let text = if arguments.json {
            serde_json::to_string_pretty(&all.vms).map_err(io::Error::from)? + "\n"
        } else if output.is_quiet {
            all.vms.iter().map(|vm| format!("{}\n", vm.name)).collect()
        } else {
            table(&all.vms, arguments.tree || is_terminal)
        };
        if shown.as_ref() != Some(&text) {
            let clear = if arguments.watch && is_terminal { CLEAR } else { "" };
            // Straight, so that the end of whoever reads is noticed.
            write!(io::stdout().lock(), "{clear}{text}").or_else(forgive_broken_pipe)?;
            shown = Some(text);
        }
        if !arguments.watch {
            return Ok(if all.silent.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        std::thread::sleep(WATCH_INTERVAL);
    }
}

/// Whoever reads has seen enough: that ends the list.
fn forgive_broken_pipe(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::BrokenPipe {
        std::process::exit(0);
    }
    Err(error)
}

fn say_what_is_wrong(all: &Everything, output: Output) {
    for socket in &all.stale {
        output.remark(format_args!("the colony of {socket} was killed: what was left of it is cleaned up"));
    }
    for words in &all.last_words {
        output.remark(words);
    }
    for error in &all.silent {
        eprintln!("salp: {error}");
    }
}

fn table(vms: &[VmView], is_tree: bool) -> String {
    let head = ["NAME", "ID", "PARENT", "STATE", "MEMORY", "PID", "CONSOLE"].map(str::to_owned);
    let row = |(prefix, vm): (String, &VmView)| {
        [
            if is_tree { prefix + &vm.name } else { vm.name.clone() },
            vm.id.to_string(),
            vm.parent.clone().unwrap_or_else(|| "-".to_owned()),
            vm.state.describe(),
            size::show(vm.memory_bytes),
            vm.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            vm.console.display().to_string(),
        ]
    };
    let vms = if is_tree { tree(vms) } else { vms.iter().map(|vm| (String::new(), vm)).collect() };
    let rows: Vec<_> = std::iter::once(head).chain(vms.into_iter().map(row)).collect();
    columns(&rows)
}

/// The VMs in the order of a walk through their families, each with the lines that lead to it.
pub(super) fn tree(vms: &[VmView]) -> Vec<(String, &VmView)> {
    let known: BTreeSet<_> = vms.iter().map(|vm| (vm.keeper_pid, vm.id)).collect();
    let is_root = |vm: &&VmView| vm.parent_id.is_none_or(|id| !known.contains(&(vm.keeper_pid, id)));
    let mut walked = Vec::with_capacity(vms.len());
    for root in vms.iter().filter(is_root) {
        walked.push((String::new(), root));
        walk_clones(vms, root, "", &mut walked);
    }
    walked
}

fn walk_clones<'a>(vms: &'a [VmView], source: &VmView, lead: &str, walked: &mut Vec<(String, &'a VmView)>) {
    let is_clone = |vm: &&VmView| vm.keeper_pid == source.keeper_pid && vm.parent_id == Some(source.id);
    let mut clones = vms.iter().filter(is_clone).peekable();
    while let Some(clone) = clones.next() {
        let (branch, rest) = if clones.peek().is_some() { ("├─", "│ ") } else { ("└─", "  ") };
        walked.push((format!("{lead}{branch}"), clone));
        walk_clones(vms, clone, &format!("{lead}{rest}"), walked);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::control::VmState;
    use crate::member::messages::HowEnded;

    /// A VM as the tests of pictures have it.
    pub(in crate::cli) fn vm(name: &str, id: u64, parent: Option<(&str, u64)>) -> VmView {
        VmView {
            name: name.to_owned(),
            id,
            parent: parent.map(|(name, _)| name.to_owned()),
            parent_id: parent.map(|(_, id)| id),
            state: VmState::Running,
            memory_bytes: 512 << 20,
            cpus: 1,
            pid: Some(99),
            keeper_pid: 7,
            socket: "/run/s".into(),
            console: "/run/c".into(),
        }
    }

    #[test]
    fn the_table_has_a_line_for_each_vm() {
        let ended = VmView {
            state: VmState::Ended { how: HowEnded::Exited, status: Some(3), text: String::new() },
            pid: None,
            ..vm("salp-1-1", 2, Some(("salp-1", 1)))
        };
        let expected = "\
NAME      ID  PARENT  STATE         MEMORY  PID  CONSOLE
salp-1-1  2   salp-1  ended with 3  512M    -    /run/c
";
        assert_eq!(table(&[ended], false), expected);
    }

    #[test]
    fn families_are_trees() {
        let (a, kid) = (Some(("a", 1)), Some(("a-1", 2)));
        let vms = [
            vm("a", 1, None),
            vm("a-1", 2, a),
            vm("a-2", 3, a),
            vm("kid", 4, kid),
            vm("orphan", 9, Some(("gone", 8))),
        ];
        let drawn: Vec<_> = tree(&vms).into_iter().map(|(lead, vm)| lead + &vm.name).collect();
        assert_eq!(drawn, ["a", "├─a-1", "│ └─kid", "└─a-2", "orphan"]);
        // Another colony numbers its VMs too.
        let other = VmView { keeper_pid: 8, ..vm("b-1", 5, Some(("b", 1))) };
        let vms = [vm("a", 1, None), other];
        assert!(tree(&vms).iter().all(|(lead, _)| lead.is_empty()));
    }
}
