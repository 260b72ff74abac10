//! `salp doctor`: what this host has of what salp needs, as a list. See [`doctor`](crate::doctor).

use std::io;
use std::process::ExitCode;

use clap::Args;

use super::output::{BAD, FAINT, FAIR, GOOD, Output};
use crate::doctor::{self, Check, Level, Report};

/// How the doctor speaks.
#[derive(Debug, Args)]
pub struct DoctorArguments {
    /// Print one JSON document instead of a list
    #[arg(long)]
    json: bool,
}

/// Looks at this host. The exit status is that of a failure if something is missing.
///
/// # Errors
/// The result cannot be written.
pub fn run(arguments: &DoctorArguments, output: Output) -> io::Result<ExitCode> {
    let report = doctor::examine();
    if arguments.json {
        output.print_json(&report)?;
    } else {
        output.print(&text(&report, output.is_quiet))?;
    }
    Ok(if report.verdict == Level::Missing { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// A line for each check, and how to mend it below; `is_short`: only what is not as it should be.
fn text(report: &Report, is_short: bool) -> String {
    let width = report.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let shown = report.checks.iter().filter(|check| !is_short || check.level > Level::Ok);
    let mut text: String = shown.map(|check| lines(check, width)).collect();
    if !is_short {
        text += &format!("\n{}\n", verdict(report));
    }
    text
}

fn lines(check: &Check, width: usize) -> String {
    let (style, word) = match check.level {
        Level::Ok => (GOOD, "ok"),
        Level::Slower => (FAIR, "slower"),
        Level::Missing => (BAD, "missing"),
    };
    let Check { name, found, purpose, remedy, .. } = check;
    let mut text = format!("{style}{word:<7}{style:#}  {name:<width$}  {found}\n");
    if let Some(remedy) = remedy {
        let indent = " ".repeat(7 + 2 + width + 2);
        text += &format!("{indent}{FAINT}{purpose}{FAINT:#}\n{indent}-> {remedy}\n");
    }
    text
}

fn verdict(report: &Report) -> String {
    let count = |level| report.checks.iter().filter(|check| check.level == level).count();
    let slower = count(Level::Slower);
    match report.verdict {
        Level::Ok => "salp has all that it needs and profits from here".to_owned(),
        Level::Slower => {
            format!("salp works here; without {slower} of these things slower, or with fewer vms")
        }
        Level::Missing => format!("salp does not work here: {} missing", count(Level::Missing)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::HostDescription;

    #[test]
    fn the_list_says_what_is_wrong_and_what_mends_it() {
        let check = |name, level, remedy: Option<&str>| Check {
            name,
            level,
            found: "found".to_owned(),
            purpose: "for something",
            remedy: remedy.map(str::to_owned),
        };
        let checks = vec![check("a", Level::Ok, None), check("long", Level::Missing, Some("mend it"))];
        let report = Report { verdict: Level::Missing, host: HostDescription::read(), checks };
        let plain = |is_short| anstream::adapter::strip_str(&text(&report, is_short)).to_string();
        let wrong = "missing  long  found\n               for something\n               -> mend it\n";
        assert_eq!(plain(true), wrong);
        let all = format!("ok       a     found\n{wrong}\nsalp does not work here: 1 missing\n");
        assert_eq!(plain(false), all);
    }
}
