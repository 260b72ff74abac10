//! `salp fork`: clones of a running VM.

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::Args;

use super::client;
use super::output::Output;
use crate::control::resources::ClonePages;
use crate::control::{CloneView, ControlError, ForkReply, ForkRequest, MOST_CLONES};

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
    /// What the clones' names begin with, also of one alone: `-1`, `-2` and so on follow
    #[arg(long, value_name = "PREFIX", conflicts_with = "name")]
    name_prefix: Option<String>,
    /// Let the clones stand still until `salp resume`
    #[arg(long, conflicts_with = "wait_ready")]
    paused: bool,
    /// Processes that are made at the same time, beyond those that are ready
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=16))]
    parallel: u64,
    /// Wait until each clone's guest has said that it knows who it is, at most 30 s
    #[arg(long)]
    wait_ready: bool,
    /// What the clones can read of their identity device; can be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_datum)]
    data: Vec<(String, String)>,
    /// Print one JSON document instead of lines
    #[arg(long)]
    json: bool,
}

fn parse_datum(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("it is no KEY=VALUE".to_owned()),
    }
}

/// `salp fork`. What is wrong with single clones is said of each, and makes the exit status that of a
/// failure.
///
/// # Errors
/// Nothing was cloned.
pub fn fork(arguments: &ForkArguments, output: Output) -> Result<ExitCode, ControlError> {
    let reply = client().fork(&arguments.source, &request(arguments))?;
    if arguments.json {
        output.print_json(&reply)?;
    } else {
        output.print(&reply.clones.iter().map(|clone| line(clone, output)).collect::<String>())?;
    }
    Ok(if say_what_is_wrong(&reply) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn request(arguments: &ForkArguments) -> ForkRequest {
    ForkRequest {
        count: arguments.count,
        name: arguments.name.clone(),
        name_prefix: arguments.name_prefix.clone(),
        paused: arguments.paused,
        parallel: arguments.parallel,
        wait_ready: arguments.wait_ready,
        data: arguments.data.iter().cloned().collect::<BTreeMap<_, _>>(),
    }
}

fn line(clone: &CloneView, output: Output) -> String {
    if output.is_quiet {
        return format!("{}\n", clone.name);
    }
    let CloneView { name, id, pause_us, call_us, pages, .. } = clone;
    let mut text = format!("{name}  pause {pause_us:.0} us  call {call_us:.0} us  id {id}");
    if let Some(ClonePages { shared, lent, copied }) = pages {
        text += &format!("  pages: {shared} shared, {lent} lent, {copied} copied");
    }
    text + "\n"
}

/// Whether anything is.
fn say_what_is_wrong(reply: &ForkReply) -> bool {
    for clone in &reply.missing {
        eprintln!("salp: {} could not be had: {}", clone.name, clone.problem.detail);
    }
    let unready = || reply.clones.iter().filter_map(|clone| Some((&clone.name, clone.problem.as_ref()?)));
    for (name, problem) in unready() {
        eprintln!("salp: {name}: {}", problem.detail);
    }
    !reply.missing.is_empty() || unready().next().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_figures_unless_names_are_enough() {
        let clone = CloneView {
            name: "a-1".to_owned(),
            id: 2,
            pause_us: 310.4,
            call_us: 1400.6,
            pages: Some(ClonePages { shared: 1, lent: 2, copied: 3 }),
            console: "/c".into(),
            problem: None,
        };
        let expected = "a-1  pause 310 us  call 1401 us  id 2  pages: 1 shared, 2 lent, 3 copied\n";
        assert_eq!(line(&clone, Output { is_quiet: false }), expected);
        assert_eq!(line(&clone, Output { is_quiet: true }), "a-1\n");
    }

    #[test]
    fn data_are_keys_and_values() {
        assert_eq!(parse_datum("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert_eq!(parse_datum("a="), Ok(("a".to_owned(), String::new())));
        assert!(parse_datum("a").is_err() && parse_datum("=a").is_err());
    }
}
