//! The command line as a new user meets it: help texts, versions, completions, manual pages, and what makes
//! no sense; none of it needs a VM. `tests/cmd/*.trycmd` has what commands print, word by word:
//! `TRYCMD=overwrite` writes it anew.

use std::fs;

use assert_cmd::Command;
use salp_tests::procs::{Scratch, salp_binary};
use serde_json::Value;

fn salp(arguments: &[&str]) -> Command {
    let mut command = Command::new(salp_binary());
    command.args(arguments).env_remove("SALP_LOG").env_remove("SALP_LOG_FORMAT");
    command
}

fn printed(arguments: &[&str]) -> String {
    let output = salp(arguments).assert().success().stderr("").get_output().clone();
    String::from_utf8(output.stdout).expect("text")
}

/// The names of all commands, from the help.
fn commands() -> Vec<String> {
    let help = printed(&["--help"]);
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let lines = lines.take_while(|line| !line.is_empty()).filter(|line| !line.starts_with("   "));
    lines.filter_map(|line| line.split_whitespace().next().map(str::to_owned)).collect()
}

#[test]
fn what_is_printed_is_what_is_written_down() {
    let place = Scratch::new("cli-printed");
    let cases = trycmd::TestCases::new();
    cases.register_bin("salp", salp_binary());
    cases.env("XDG_RUNTIME_DIR", place.path().to_string_lossy().into_owned());
    cases.case("cmd/*.trycmd");
    // A line for each file; it fails here if one differs.
    cases.run();
}

#[test]
fn every_command_is_written_down_with_its_help() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/cmd");
    let files =
        fs::read_dir(dir).expect("the directory of cases").map(|entry| entry.expect("an entry").path());
    let written: String = files.map(|path| fs::read_to_string(path).expect("text")).collect();
    let commands = commands();
    assert!(commands.len() > 12, "{commands:?}");
    for command in commands.iter().filter(|command| *command != "help") {
        assert!(written.contains(&format!("$ salp {command} --help\n")), "{command} is not in {dir}");
    }
}

#[test]
fn the_version_names_the_commit() {
    let version = printed(&["--version"]);
    let number = version.strip_prefix(concat!("salp ", env!("CARGO_PKG_VERSION"))).expect(&version).trim();
    let mut git = std::process::Command::new("git");
    git.args(["-C", env!("CARGO_MANIFEST_DIR"), "log", "-1", "--abbrev=12", "--format=%h"]);
    let commit = git.output().ok().filter(|output| output.status.success());
    let commit = commit.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    let Some(commit) = commit else {
        println!("SKIPPED: the_version_names_the_commit: these sources are in no git tree");
        return;
    };
    assert!(number.starts_with(&format!("({commit}")) && number.ends_with(')'), "{number}, not {commit}");
}

#[test]
fn completions_and_manual_pages_know_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let script = printed(&["completions", shell]);
        for command in commands() {
            assert!(script.contains(&command), "{shell} does not know {command}");
        }
    }
    let place = Scratch::new("cli-man");
    let dir = place.path().join("man/man1");
    salp(&["man", "--out", &dir.to_string_lossy()]).assert().success().stdout("").stderr("");
    for command in commands().iter().filter(|command| *command != "help") {
        let page = fs::read_to_string(dir.join(format!("salp-{command}.1"))).expect(command);
        assert!(page.contains("SYNOPSIS"), "{command}");
    }
    assert!(printed(&["man"]).contains("salp"));
    fs::remove_dir_all(place.path().join("man")).expect("they are ours");
    let file = place.path().join("file");
    fs::write(&file, "").expect("room for a file");
    let refused = salp(&["man", "--out", &file.to_string_lossy()]).assert().code(1).get_output().clone();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("cannot write into"));
    fs::remove_file(file).expect("it is ours");
}

#[test]
fn the_doctor_says_what_there_is_to_people_and_programs() {
    let output = salp(&["doctor", "--json"]).assert().stderr("").get_output().clone();
    let report: Value = serde_json::from_slice(&output.stdout).expect("json");
    let checks = report["checks"].as_array().expect("a list");
    let is_missing = checks.iter().any(|check| check["level"] == "missing");
    assert_eq!(output.status.success(), !is_missing);
    let listed = salp(&["doctor"]).assert().get_output().clone();
    assert_eq!(listed.status, output.status);
    let listed = String::from_utf8(listed.stdout).expect("text");
    for check in checks {
        let (name, level) =
            (check["name"].as_str().expect("a name"), check["level"].as_str().expect("a level"));
        let has = |line: &str| line.starts_with(level) && line.contains(&format!(" {name} "));
        assert!(listed.lines().any(has), "{name} in {listed}");
        assert_eq!(level == "ok", check["remedy"].is_null(), "{check}");
        if let Some(remedy) = check["remedy"].as_str() {
            assert!(listed.contains(&format!("-> {remedy}")), "{remedy} in {listed}");
        }
    }
    // No terminal: no colours.
    assert!(!listed.contains('\x1b'));
    let short = salp(&["doctor", "-q"]).assert().get_output().clone();
    assert!(!String::from_utf8_lossy(&short.stdout).lines().any(|line| line.starts_with("ok")));
}

#[test]
fn the_doctor_is_told_by_an_unprivileged_user_what_is_missing() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: the_doctor_is_told_by_an_unprivileged_user_what_is_missing: this is not root");
        return;
    }
    // Where nobody may look there is no directory of sockets, and without device files no VM.
    let nobody = |command: &mut std::process::Command| {
        use std::os::unix::process::CommandExt as _;
        command.uid(65_534).gid(65_534).env("XDG_RUNTIME_DIR", "/nowhere");
        command.output().expect("salp starts")
    };
    let place = Scratch::new("cli-nobody");
    let copy = place.path().join("salp");
    fs::copy(salp_binary(), &copy).expect("room for a copy");
    let mut command = std::process::Command::new(&copy);
    let output = nobody(command.args(["doctor", "--json"]));
    fs::remove_file(&copy).expect("it is ours");
    let report: Value = serde_json::from_slice(&output.stdout).expect("json");
    assert_eq!((output.status.code(), &report["verdict"]), (Some(1), &Value::from("missing")), "{report}");
    let sockets = report["checks"].as_array().into_iter().flatten().find(|check| check["name"] == "sockets");
    let sockets = sockets.expect("it is looked at");
    assert_eq!(sockets["level"], "missing");
    assert!(sockets["remedy"].as_str().is_some_and(|remedy| remedy.contains("XDG_RUNTIME_DIR")), "{sockets}");
}

#[test]
fn logs_are_for_people_or_programs() {
    for (format, is_json) in [("human", false), ("json", true)] {
        let output = salp(&["-vv", "--log-format", format, "doctor"]).output();
        let said = String::from_utf8(output.expect("salp starts").stderr).expect("text");
        assert!(said.contains("looked at the host"), "{said}");
        for line in said.lines() {
            assert_eq!(serde_json::from_str::<Value>(line).is_ok(), is_json, "{line}");
        }
    }
}
