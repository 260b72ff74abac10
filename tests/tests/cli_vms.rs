//! Commands that act on VMs, with the real binary: several names at once, trees, details, maps and pictures,
//! waiting, removing, and a VM described by a document.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use salp_tests::procs::settled;
use salp_tests::user::User;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
/// A guest that does nothing until it is told to, which is never.
const SLEEPER: &str = "case=puppet";

fn document(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("no json: {error}: {text}"))
}

#[test]
fn several_vms_are_named_at_once() {
    let Some(user) = User::new("cli-names") else { return };
    user.run("a", SLEEPER);
    let forked = document(&user.succeed(&["fork", "a", "-n", "2", "--json"]));
    let clones = forked["clones"].as_array().expect("a list");
    assert_eq!(clones.len(), 2, "{forked}");
    assert!(clones.iter().all(|clone| clone["pause_us"].as_f64().is_some_and(|us| us > 0.0)), "{forked}");
    assert_eq!(user.succeed(&["fork", "a-1", "--name", "kid", "-q"]), "kid\n");
    assert_eq!(user.succeed(&["ps", "-q"]), "a\na-1\na-2\nkid\n");
    let tree = user.succeed(&["ps", "--tree"]);
    let names: Vec<_> = tree.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(names, ["a", "├─a-1", "│", "└─a-2"], "{tree}");
    assert!(tree.contains("│ └─kid"), "{tree}");
    user.succeed(&["pause", "a-1", "a-2"]);
    let states = || user.ps().iter().map(|vm| vm["state"].as_str().map(str::to_owned)).collect::<Vec<_>>();
    let (running, paused) = (Some("running".to_owned()), Some("paused".to_owned()));
    assert_eq!(states(), [running.clone(), paused.clone(), paused, running.clone()]);
    // Those that can be done are done.
    let output = user.output(&["resume", "a-1", "nobody", "a-2"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("no vm is called nobody"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_eq!(states(), vec![running; 4]);
    user.succeed(&["pause", "a-2"]);
    let reset = document(&user.succeed(&["reset", "a-2", "--json"]));
    assert!(reset["name"] == "a-2" && reset["stages_us"]["memory"].is_number(), "{reset}");
    assert_eq!(user.succeed(&["reset", "a-2", "-q"]), "a-2\n");
    // What is paused too.
    user.succeed(&["pause", "kid"]);
    user.succeed(&["stop", "--all"]);
    assert_eq!(user.succeed(&["ps", "-q"]), "");
    assert_eq!(user.succeed(&["stop", "--all"]), "");
    user.end();
}

#[test]
fn who_waits_is_told_how_a_vm_ended() {
    let Some(user) = User::new("cli-wait") else { return };
    user.run("a", SLEEPER);
    user.run("b", "case=idle mib=1 us=20000 rounds=20");
    let wait = user.command(&["wait", "b", "a"]).stdout(Stdio::piped()).spawn().expect("salp starts");
    let is_left = settled(LIMIT, || user.ps().len(), |count| *count == 1);
    assert_eq!(is_left, 1, "b does not end");
    user.succeed(&["fork", "a", "--name", "c"]);
    user.succeed(&["stop", "a"]);
    let output = wait.wait_with_output().expect("it ends");
    assert_eq!(
        (output.status.code(), String::from_utf8_lossy(&output.stdout).as_ref()),
        (Some(0), "0\n143\n")
    );
    // One that has ended need not be waited for.
    assert_eq!(user.succeed(&["wait", "a"]), "143\n");
    user.fail(&["rm", "c"], 1, &["c has not ended"]);
    user.succeed(&["rm", "a"]);
    user.fail(&["inspect", "a"], 1, &["no vm is called a"]);
    user.succeed(&["rm", "--force", "c"]);
    assert_eq!(user.succeed(&["ps", "-q"]), "");
    user.end();
}

#[test]
fn details_and_maps_add_up() {
    let Some(user) = User::new("cli-maps") else { return };
    user.run("a", "case=idle mib=4 us=20000 rounds=100000");
    user.succeed(&["fork", "a"]);
    let details = document(&user.succeed(&["inspect", "a-1", "--json"]));
    assert_eq!((&details["name"], &details["parent"]), (&json!("a-1"), &json!("a")));
    assert!(
        details["stats"]["pages"]["exclusive"].is_u64() && details["colony"]["live_vms"] == 2,
        "{details}"
    );
    let lines = user.succeed(&["inspect", "a-1"]);
    for (name, value) in [("name", "a-1"), ("parent", "a"), ("state", "running"), ("memory", "32M")] {
        let is = |line: &str| line.split_whitespace().eq([name, value]);
        assert!(lines.lines().any(is), "{name} {value} in {lines}");
    }
    let stats = document(&user.succeed(&["stats", "--json"]));
    assert_eq!(stats.as_array().map(Vec::len), Some(2), "{stats}");
    assert_eq!(user.succeed(&["stats", "a-1"]).lines().count(), 2);
    let map = document(&user.succeed(&["map", "a-1", "--json"]));
    let leaves = map["leaves"].as_array().expect("a list");
    let sum = ["zero", "exclusive", "lent", "shared", "lost"].map(|name| map["pages"][name].as_u64());
    assert_eq!((leaves.len(), sum.iter().flatten().sum::<u64>()), (16, 16 * 512), "{map}");
    // 16 leaves are one line of cells, after the sums and before the legend.
    let text = user.succeed(&["map", "a-1"]);
    let cells: Vec<_> = text.lines().map(|line| line.trim_start().chars().count()).collect();
    assert!(text.starts_with("a-1: exclusive") && cells.len() == 3 && cells[1] == 16 + 3, "{text}");
    let picture = user.scratch.path().join("map.svg");
    user.succeed(&["map", "a-1", "--svg", &picture.to_string_lossy()]);
    let svg = fs::read_to_string(&picture).expect("it was written");
    assert!(svg.starts_with("<svg") && svg.matches("<title>leaf").count() == 16);
    user.succeed(&["map", "a", "--family", "--svg", &picture.to_string_lossy()]);
    let svg = fs::read_to_string(&picture).expect("it was written");
    assert!(svg.contains("└─a-1") && svg.contains("since fork"), "{svg}");
    fs::remove_file(picture).expect("it is ours");
    let family = user.succeed(&["map", "a", "--family"]);
    let lines: Vec<_> = family.lines().collect();
    assert!(lines[1].starts_with("a  ") && lines[2].starts_with("└─a-1"), "{family}");
    user.fail(&["map", "a", "--svg", "/nowhere/f.svg"], 1, &["cannot write /nowhere/f.svg"]);
    user.succeed(&["pause", "a-1"]);
    user.succeed(&["stop", "a-1"]);
    user.fail(&["map", "a-1"], 1, &["a-1 does not run"]);
    user.fail(&["stats", "a-1"], 1, &["a-1 does not run"]);
    assert!(document(&user.succeed(&["inspect", "a-1", "--json"]))["stats"].is_null());
    user.succeed(&["stop", "a"]);
    user.end();
}

#[test]
fn a_vm_is_described_by_a_document() {
    let Some(user) = User::new("cli-config") else { return };
    let schema = user.succeed(&["schema"]);
    assert_eq!(user.succeed(&["run", "--print-schema"]), schema);
    user.fail(&["run", "--print-schema", "--memory", "64M"], 2, &["--print-schema", "cannot be used with"]);
    let schema = document(&schema);
    let config = json!({ "name": "docs", "memory_bytes": 32 << 20, "cpus": 2, "cmdline": SLEEPER });
    for name in config.as_object().into_iter().flatten().map(|(name, _)| name) {
        assert!(schema["properties"][name].is_object(), "{name} in {schema}");
    }
    let file = user.file("vm.json", config.to_string().as_bytes());
    assert_eq!(user.succeed(&["run", "-d", "--config", &file]), "docs\n");
    let vm = user.vm("docs");
    assert_eq!((&vm["memory_bytes"], &vm["cpus"]), (&json!(32 << 20), &json!(2)));
    // Options come first.
    assert_eq!(user.succeed(&["run", "-d", "--config", &file, "--name", "b", "--cpus", "1"]), "b\n");
    assert_eq!(user.vm("b")["cpus"], 1);
    user.succeed(&["stop", "docs", "b"]);
    for (text, words) in [
        ("{", &["vm.json"][..]),
        ("{\"memory\": 1}", &["vm.json", "unknown field `memory`"]),
        ("{\"cpus\": 9}", &["cpus 9"]),
        ("{\"memory_bytes\": 4194304}", &["16M"]),
        ("{\"kernel\": \"/nowhere/k\"}", &["/nowhere/k", "No such file"]),
    ] {
        let file = user.file("vm.json", text.as_bytes());
        user.fail(&["run", "--config", &file], 1, words);
    }
    fs::remove_file(file).expect("it is ours");
    user.fail(&["run", "--config", "absent"], 1, &["absent", "No such file"]);
    user.end();
}

#[test]
fn a_colony_answers_no_other_user() {
    let Some(user) = User::new("cli-alone") else { return };
    user.run("a", SLEEPER);
    let socket = user.vm("a")["socket"].as_str().expect("a path").to_owned();
    let permit = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("it is ours");
    };
    // Whoever gets at the socket all the same is not answered.
    permit(&user.place(), 0o711);
    permit(Path::new(&socket), 0o777);
    let mut stranger = Command::new("setpriv");
    stranger.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "curl", "--silent"]);
    stranger.args(["--write-out", " %{http_code}", "--unix-socket", &socket, "http://salp/v1/vms"]);
    match stranger.output() {
        Ok(output) if rustix::process::geteuid().is_root() && output.status.success() => {
            let answer = String::from_utf8(output.stdout).expect("text");
            assert!(answer.contains("\"code\":\"not-yours\"") && answer.ends_with(" 403"), "{answer}");
        }
        why => println!("SKIPPED in part: a_colony_answers_no_other_user: no stranger: {why:?}"),
    }
    permit(&user.place(), 0o700);
    user.succeed(&["stop", "a"]);
    user.end();
}
