//! The commands, with the real binary, each from a process of its own: run, fork, ps, stop, console;
//! what users get wrong, and colonies that were killed. Nothing is left
//! behind by any of it.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::Duration;

use salp_tests::procs::{entries, expect_refusal, settled};
use salp_tests::user::{User, signal};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);
/// A guest that prints a line every 10 ms.
const TALKER: &str = "case=idle mib=1 us=10000 say=1";
/// A guest that does nothing until it is told to, which is never.
const SLEEPER: &str = "case=puppet";

/// The rounds that a line `vm V round N` of VM `vm` tells.
fn round(line: &str, vm: u64) -> Option<u64> {
    line.strip_prefix(&format!("vm {vm} round "))?.parse().ok()
}

#[test]
fn a_family_is_run_forked_listed_watched_and_stopped() {
    let Some(user) = User::new("commands-family") else { return };
    user.run("a", TALKER);
    settled(LIMIT, || user.lines("a").len(), |count| *count >= 2);
    let printed = user.succeed(&["fork", "a", "-n", "2"]);
    let lines: Vec<_> = printed.lines().collect();
    assert_eq!(lines.len(), 2, "{printed}");
    for (line, name) in lines.iter().zip(["a-1", "a-2"]) {
        let words: Vec<_> = line.split_whitespace().collect();
        assert_eq!((words[0], words[1], words[3], words[4]), (name, "pause", "us", "call"), "{line}");
        assert!(words[2].parse::<u64>().is_ok_and(|us| us > 0), "{line}");
    }
    user.succeed(&["fork", "a-1", "--name", "kid"]);
    let vms = user.ps();
    let names: Vec<_> = vms.iter().map(|vm| (vm["name"].as_str(), vm["parent"].as_str())).collect();
    let (a, first) = (Some("a"), Some("a-1"));
    assert_eq!(names, [(a, None), (first, a), (Some("a-2"), a), (Some("kid"), first)]);
    for vm in &vms {
        assert_eq!((vm["state"].as_str(), vm["memory_bytes"].as_u64()), (Some("running"), Some(32 << 20)));
        assert!(vm["pid"].as_u64().is_some_and(|pid| entries("/proc").contains(&pid.to_string())));
        expect_own_lines(&user, vm);
    }
    let table = user.succeed(&["ps"]);
    assert_eq!(table.lines().count(), 5, "{table}");
    // One who watches gets everything from the beginning, and ends with the VM.
    let watch = user.command(&["console", "kid"]).stdout(Stdio::piped()).spawn();
    let mut watch = watch.expect("salp starts");
    let mut from = BufReader::new(watch.stdout.take().expect("it is piped"));
    // The first may be its source's rest.
    let lines: Vec<_> = from.by_ref().lines().take(2).map(|line| line.expect("a line")).collect();
    assert!(round(&lines[1], 4).is_some(), "{lines:?}");
    for name in ["a", "kid", "a-2"] {
        user.succeed(&["stop", name]);
        assert_eq!(user.vm(name)["state"], "stopped");
        assert!(user.vm(name)["pid"].is_null());
        user.fail(&["fork", name], 1, &[name, "stopped"]);
        user.fail(&["stop", name], 1, &[name, "stopped"]);
    }
    from.read_to_string(&mut String::new()).expect("the rest");
    assert!(watch.wait().expect("it ends").success());
    expect_own_lines(&user, &user.vm("a-1"));
    user.succeed(&["stop", "a-1"]);
    assert_eq!(user.ps(), Vec::<Value>::new());
    user.end();
}

/// The VM prints three more lines, which say its own number, in order.
fn expect_own_lines(user: &User, vm: &Value) {
    let (name, id) = (vm["name"].as_str().expect("a text"), vm["id"].as_u64().expect("a number"));
    let before = user.lines(name).len();
    let lines = settled(LIMIT, || user.lines(name), |lines| lines.len() >= before + 3);
    assert!(lines.len() >= before + 3, "{name} says no more: {lines:?}");
    let rounds: Vec<_> = lines.iter().map(|line| round(line, id)).collect();
    // A clone may have been cut within a line: its first is its source's rest.
    for pair in rounds[1..].windows(2) {
        assert!(pair[0].is_some() && pair[0].map(|round| round + 1) == pair[1], "{name}: {lines:?}");
    }
}

#[test]
fn a_run_in_the_foreground_ends_with_its_guests_status() {
    let Some(user) = User::new("commands-status") else { return };
    let good =
        user.output(&["run", "--memory", "32M", "--cmdline", "case=idle mib=1 us=1000 rounds=3 say=1"]);
    assert!(good.status.success(), "{good:?}");
    assert_eq!(String::from_utf8_lossy(&good.stdout), "vm 1 round 1\nvm 1 round 2\nvm 1 round 3\n");
    let bad = user.output(&["run", "--memory", "32M", "--cmdline", "case=nonsense"]);
    assert_eq!(bad.status.code(), Some(126), "{bad:?}");
    assert!(String::from_utf8_lossy(&bad.stdout).contains("unknown case nonsense"));
    assert!(String::from_utf8_lossy(&bad.stderr).contains("salp-1 ended with 126"));
    for (number, status) in [(rustix::process::Signal::INT, 130), (rustix::process::Signal::TERM, 143)] {
        let child = user.start("x", SLEEPER);
        user.succeed(&["fork", "x"]);
        signal(child.id(), number);
        assert_eq!(child.wait_with_output().expect("it ends").status.code(), Some(status));
    }
    let child = user.start("x", SLEEPER);
    user.succeed(&["stop", "x"]);
    assert_eq!(child.wait_with_output().expect("it ends").status.code(), Some(143));
    user.end();
}

#[test]
fn a_colony_lives_until_its_last_vm() {
    let Some(user) = User::new("commands-last") else { return };
    // The root ends by itself while its clone, which was told the same, may still run.
    let child = user.start("root", "case=idle mib=1 us=100000 rounds=20");
    user.succeed(&["fork", "root", "--name", "clone"]);
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{output:?}");
    // A guest that forks itself: its clones have names too.
    user.run("self", "case=fork mib=1 rounds=1");
    let left = settled(LIMIT, || user.ps().len(), |count| *count == 0);
    assert_eq!(left, 0, "a colony of guests that end does not end");
    // A process that is killed takes its VM along, not the others.
    user.run("b", SLEEPER);
    user.succeed(&["fork", "b"]);
    let pid = user.vm("b")["pid"].as_u64().expect("a number");
    signal(u32::try_from(pid).expect("a process's number"), rustix::process::Signal::KILL);
    let state = settled(LIMIT, || user.vm("b")["state"].clone(), |state| state != "running");
    assert_eq!(state, "ended");
    user.fail(&["fork", "b"], 1, &["b does not run", "killed"]);
    user.succeed(&["stop", "b-1"]);
    user.end();
}

#[test]
fn a_clone_says_who_it_is_and_limits_are_told() {
    let Some(user) = User::new("commands-who") else { return };
    let idle = "case=idle mib=1 us=10000 who=1";
    user.run_with("a", &["--cmdline", idle, "--max-vms", "3"]);
    user.await_console("a", |said| said.starts_with("a: clone 0, generation 0, seed 0x"));
    user.succeed(&["fork", "a", "-n", "2"]);
    user.await_console("a-2", |said| said.contains("a-2: clone 1, generation 1, seed 0x"));
    user.succeed(&["reset", "a-2"]);
    user.await_console("a-2", |said| said.contains("a-2: clone 1, generation 2, seed 0x"));
    user.fail(&["fork", "a"], 1, &["has 3 vms, and may have 3", "--max-vms"]);
    user.succeed(&["stop", "a-1"]);
    user.succeed(&["fork", "a", "--name", "late"]);
    user.await_console("late", |said| said.contains("late: clone 0, generation 1, seed 0x"));
    ["a", "a-2", "late"].iter().for_each(|name| drop(user.succeed(&["stop", name])));
    user.fail(&["run", "--memory", "64M", "--memory-limit", "32M"], 1, &["67108864", "--memory-limit"]);
    user.end();
}

#[test]
fn names_belong_to_one_vm_of_all_colonies() {
    let Some(user) = User::new("commands-names") else { return };
    user.run("a", SLEEPER);
    user.run("b", SLEEPER);
    assert_eq!(user.succeed(&["run", "--detach", "--memory", "32M", "--cmdline", SLEEPER]), "salp-1\n");
    user.fail(&["run", "--detach", "--memory", "32M", "--name", "a"], 1, &["a is taken"]);
    user.fail(&["run", "--memory", "32M", "--name", "b"], 1, &["b is taken"]);
    user.fail(&["fork", "a", "--name", "b"], 1, &["b is taken"]);
    user.succeed(&["fork", "b", "--name", "c-2"]);
    user.fail(&["fork", "a", "-n", "3", "--name", "c"], 1, &["c-2 is taken"]);
    user.succeed(&["fork", "a", "--name", "c-1"]);
    for command in ["fork", "stop", "console"] {
        user.fail(&[command, "nobody"], 1, &["no vm is called nobody", "salp ps"]);
        user.fail(&[command, "../a"], 1, &["../a", "cannot be a name"]);
    }
    let names: Vec<_> = user.ps().iter().map(|vm| vm["name"].as_str().map(str::to_owned)).collect();
    assert_eq!(names.len(), 5, "{names:?}");
    for name in names.into_iter().flatten() {
        user.succeed(&["stop", &name]);
    }
    user.end();
}

#[test]
fn what_makes_no_sense_is_refused_in_one_line() {
    let Some(user) = User::new("commands-wrong") else { return };
    let long = "x".repeat(5000);
    let cases: [(&[&str], i32, &[&str]); 14] = [
        (&["run", "--memory", "3M"], 1, &["multiple of 2M"]),
        (&["run", "--memory", "4M"], 1, &["16M"]),
        (&["run", "--memory", "100T"], 1, &["64G"]),
        (&["run", "--memory", "lots"], 2, &["lots"]),
        (&["run", "--cpus", "0"], 2, &["--cpus"]),
        (&["run", "--cpus", "9"], 2, &["--cpus"]),
        (&["run", "--name", "a/b"], 1, &["a/b", "cannot be a name"]),
        (&["run", "--dma-backing", "absent"], 1, &["--dma-backing absent", "No such file"]),
        (&["run", "--dma-backing", "/"], 1, &["--dma-backing /", "no regular file"]),
        (&["run", "--detach", "--memory", "32M", "--cmdline", &long], 1, &["5000 bytes"]),
        (&["fork"], 2, &["<SOURCE>"]),
        (&["fork", "a", "-n", "0"], 2, &["1..=64"]),
        (&["fork", "a", "-n", "65"], 2, &["1..=64"]),
        (&["stop"], 2, &["<NAME>"]),
    ];
    for (arguments, status, words) in cases {
        user.fail(arguments, status, words);
    }
    fs::create_dir(user.place()).expect("a new directory");
    fs::set_permissions(user.place(), PermissionsExt::from_mode(0o755)).expect("it is ours");
    for arguments in [&["run", "--memory", "32M"][..], &["ps"], &["stop", "a"]] {
        user.fail(arguments, 1, &["others may enter it", "chmod 700"]);
    }
    fs::remove_dir(user.place()).expect("it is empty");
    let deep = user.scratch.path().join("d".repeat(120));
    fs::create_dir(&deep).expect("a new directory");
    let output = user.command(&["run", "--memory", "32M"]).env("XDG_RUNTIME_DIR", &deep).output();
    expect_refusal(&output.expect("salp starts"), 1, &["cannot listen at", "SUN_LEN"]);
    assert_eq!(entries(&deep.to_string_lossy()), Vec::<String>::new());
    fs::remove_dir(&deep).expect("it is empty");
    user.end();
}

#[test]
fn what_a_killed_colony_left_is_cleaned_up_and_said() {
    let Some(user) = User::new("commands-stale") else { return };
    let kill = |name: &str| {
        let pid = user.keeper(name);
        signal(pid, rustix::process::Signal::KILL);
        let gone = settled(LIMIT, || entries("/proc").contains(&pid.to_string()), |is_there| !is_there);
        assert!(!gone, "the keeper stays");
    };
    user.run("a", SLEEPER);
    user.succeed(&["fork", "a"]);
    kill("a");
    user.fail(&["fork", "a"], 1, &["the colony of a was killed", "cleaned up"]);
    user.fail(&["fork", "a-1"], 1, &["no vm is called a-1"]);
    user.run("a", SLEEPER);
    kill("a");
    // The name is free again at once.
    user.run("a", SLEEPER);
    kill("a");
    let listed = user.output(&["ps", "--json"]);
    assert!(listed.status.success() && listed.stdout == b"[]\n", "{listed:?}");
    assert!(String::from_utf8_lossy(&listed.stderr).contains("was killed"), "{listed:?}");
    user.end();
}

#[test]
fn clones_have_the_dma_backing_and_its_file_is_not_written() {
    let Some(user) = User::new("commands-backing") else { return };
    let file = user.scratch.path().join("base");
    let bytes: Vec<u8> = (0..4_u32 << 20).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
    fs::write(&file, &bytes).expect("room for it");
    let command_line = "case=dma mib=2 dirty=4";
    let path = file.to_string_lossy();
    let arguments = ["run", "--detach", "--memory", "32M", "--dma-backing", &path, "--cmdline", command_line];
    assert_eq!(user.succeed(&arguments), "salp-1\n");
    user.succeed(&["fork", "salp-1", "--name", "a"]);
    user.succeed(&["fork", "a", "--name", "b"]);
    for vm in user.ps() {
        assert_eq!(vm["state"], "running", "{vm}");
        assert_eq!(user.lines(vm["name"].as_str().expect("a text")), Vec::<String>::new());
    }
    for name in ["b", "salp-1", "a"] {
        user.succeed(&["stop", name]);
    }
    assert!(fs::read(&file).expect("it is there") == bytes, "the file was written");
    fs::remove_file(&file).expect("it is ours");
    user.end();
}
