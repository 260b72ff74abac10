//! `salp pause`, `resume` and `reset`, with the real binary and over the control socket: what they do,
//! what they refuse, and what becomes of clones that have ended.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::Duration;

use salp_tests::images::{OBEDIENT, bare_image};
use salp_tests::procs::settled;
use salp_tests::user::User;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);
/// A guest that prints a line every 10 ms.
const TALKER: &str = "case=idle mib=1 us=10000 say=1";

/// What a VM's colony answers to a request: status and body.
fn request(user: &User, keeper: u32, method: &str, path: &str, body: &str) -> (u16, Value) {
    let socket = user.place().join(format!("colony-{keeper}.sock"));
    let mut stream = UnixStream::connect(socket).expect("it listens");
    let head =
        format!("{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all((head + body).as_bytes()).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    let status = answer.split(' ').nth(1).and_then(|word| word.parse().ok()).expect("a status");
    let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
    (status, serde_json::from_str(body).expect("json"))
}

/// The VM prints three more lines.
#[track_caller]
fn expect_more(user: &User, name: &str) {
    let before = user.lines(name).len();
    let lines = settled(LIMIT, || user.lines(name).len(), |count| *count >= before + 3);
    assert!(lines >= before + 3, "{name} says no more");
}

/// Gives a VM input.
fn give(user: &User, name: &str, input: &str) {
    let keeper = user.keeper(name);
    let (status, answer) = request(user, keeper, "POST", &format!("/v1/vms/{name}/console"), input);
    assert_eq!((status, &answer["accepted_bytes"]), (200, &Value::from(input.len())), "{answer}");
}

#[track_caller]
fn await_how(user: &User, name: &str, how: &str) {
    let vm = settled(LIMIT, || user.vm(name), |vm| vm["state"] == "ended");
    assert_eq!(vm["how"], how, "{vm}");
}

/// A line of `salp reset`: pages, leaves.
#[track_caller]
fn reset(user: &User, name: &str) -> (u64, u64) {
    let line = user.succeed(&["reset", name]);
    let (first, rest) = line.trim_end().split_once("  ").expect("a name and more");
    let numbers: Vec<u64> = rest.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [pages, leaves, us] = numbers[..] else { panic!("{line}") };
    assert!(first == name && us > 0, "{line}");
    assert_eq!(rest, format!("{pages} pages restored in place  {leaves} leaves mapped afresh  {us} us"));
    (pages, leaves)
}

#[test]
fn a_vm_is_paused_forked_and_resumed() {
    let Some(user) = User::new("commands-pause") else { return };
    user.run("a", TALKER);
    expect_more(&user, "a");
    user.succeed(&["pause", "a"]);
    // One that stands still already is no error.
    user.succeed(&["pause", "a"]);
    let paused = user.vm("a");
    assert!(paused["state"] == "paused" && paused["pid"].as_u64().is_some(), "{paused}");
    assert!(user.succeed(&["ps"]).contains("paused"));
    let said = user.console("a");
    user.succeed(&["fork", "a", "-n", "2"]);
    for name in ["a-1", "a-2"] {
        assert_eq!(user.vm(name)["state"], "running");
        expect_more(&user, name);
    }
    assert_eq!(user.console("a"), said, "it goes on");
    assert_eq!(user.vm("a")["state"], "paused", "a look lets it go on");
    for _ in 0..2 {
        user.succeed(&["resume", "a"]);
        assert_eq!(user.vm("a")["state"], "running");
    }
    expect_more(&user, "a");
    // The same over the socket, and what it refuses.
    let keeper = user.keeper("a");
    let patch = |name: &str, body: &str| request(&user, keeper, "PATCH", &format!("/v1/vms/{name}"), body);
    let (status, view) = patch("a-1", r#"{"state":"paused"}"#);
    assert!(status == 200 && view["state"] == "paused" && view["name"] == "a-1", "{view}");
    let (status, view) = patch("a-1", r#"{"state":"running"}"#);
    assert!(status == 200 && view["state"] == "running", "{view}");
    user.succeed(&["pause", "a-2"]);
    user.succeed(&["stop", "a-2"]);
    assert_eq!(user.vm("a-2")["state"], "stopped");
    let wrong = [
        ("a", r#"{"state":"stopped"}"#, 422, "bad-fields"),
        ("a", "", 422, "bad-fields"),
        ("a", r#"{"state":"paused","for":1}"#, 422, "bad-fields"),
        ("nobody", r#"{"state":"paused"}"#, 404, "unknown-vm"),
        ("a-2", r#"{"state":"paused"}"#, 409, "not-running"),
        ("a-2", r#"{"state":"running"}"#, 409, "not-running"),
    ];
    for (name, body, status, code) in wrong {
        let (got, problem) = patch(name, body);
        assert!(got == status && problem["code"] == code, "{name} {body}: {problem}");
    }
    for command in ["pause", "resume"] {
        user.fail(&[command, "nobody"], 1, &["no vm is called nobody", "salp ps"]);
        user.fail(&[command, "a-2"], 1, &["a-2 does not run", "stopped"]);
        user.fail(&[command], 2, &["<NAME>"]);
    }
    user.succeed(&["pause", "a"]);
    for name in ["a", "a-1"] {
        user.succeed(&["stop", name]);
    }
    user.end();
}

#[test]
fn a_clone_returns_to_its_cut() {
    let Some(user) = User::new("commands-reset") else { return };
    user.run("a", TALKER);
    expect_more(&user, "a");
    user.succeed(&["pause", "a"]);
    user.succeed(&["fork", "a", "--name", "b"]);
    // The rounds are in the clone's memory: after a reset they are told once more.
    let whole = |line: &String| line.starts_with("vm 2 round ");
    let rounds = || user.lines("b").into_iter().filter(whole).collect::<Vec<_>>();
    for times in 1..=3 {
        expect_more(&user, "b");
        let first = rounds()[1].clone();
        let (pages, leaves) = reset(&user, "b");
        assert!(pages + leaves > 0, "it has written to its memory");
        let told = || rounds().iter().filter(|line| **line == first).count();
        assert_eq!(settled(LIMIT, told, |count| *count > times), times + 1, "{first:?} is not told again");
    }
    // A paused one runs after its reset.
    user.succeed(&["pause", "b"]);
    let keeper = user.keeper("b");
    let (status, view) = request(&user, keeper, "POST", "/v1/vms/b/reset", "");
    assert!(status == 200 && view["name"] == "b" && view["reset_us"].as_f64() > Some(0.0), "{view}");
    let stages = view["stages_us"].as_object().expect("an object").values().filter_map(Value::as_f64);
    let (sum, whole) = (stages.sum::<f64>(), view["reset_us"].as_f64().expect("a number"));
    assert!((sum - whole).abs() < 1.0, "{view}");
    assert_eq!(user.vm("b")["state"], "running");
    expect_more(&user, "b");
    user.fail(&["reset", "a"], 1, &["a cannot be reset", "no clone"]);
    user.fail(&["reset", "nobody"], 1, &["no vm is called nobody", "salp ps"]);
    user.fail(&["reset"], 2, &["<NAME>"]);
    assert_eq!(user.vm("a")["state"], "paused", "what was refused changes nothing");
    let cases = [
        ("POST", "/v1/vms/a/reset", 409, "not-resettable"),
        ("POST", "/v1/vms/nobody/reset", 404, "unknown-vm"),
        ("GET", "/v1/vms/b/reset", 405, "wrong-method"),
    ];
    for (method, path, status, code) in cases {
        let (got, problem) = request(&user, keeper, method, path, "");
        assert!(got == status && problem["code"] == code, "{method} {path}: {problem}");
    }
    user.succeed(&["stop", "b"]);
    user.fail(&["reset", "b"], 1, &["b does not run", "stopped"]);
    user.succeed(&["stop", "a"]);
    user.end();
}

#[test]
fn a_clone_that_has_ended_runs_again() {
    let Some(user) = User::new("commands-again") else { return };
    let kernel = user.file("kernel", &bare_image(OBEDIENT));
    user.run_with("a", &["--kernel", &kernel]);
    user.succeed(&["fork", "a", "-n", "3"]);
    let ends = [("u", "crashed"), ("h", "halted"), ("r", "reset"), ("b", "crashed")];
    for (at, (input, how)) in ends.into_iter().enumerate() {
        give(&user, "a-1", "x");
        user.await_console("a-1", |text| text == "x".repeat(2 * at + 1));
        give(&user, "a-1", input);
        await_how(&user, "a-1", how);
        assert!(user.vm("a-1")["pid"].is_null());
        user.fail(&["fork", "a-1"], 1, &["a-1 does not run", how]);
        user.fail(&["pause", "a-1"], 1, &["a-1 does not run", how]);
        reset(&user, "a-1");
        assert_eq!(user.vm("a-1")["state"], "running");
        give(&user, "a-1", "x");
        // Its output goes on where it was.
        user.await_console("a-1", |text| text == "x".repeat(2 * at + 2));
    }
    // Whoever watches sees all its lives, to the end of this one.
    let mut watch = user.command(&["console", "a-1"]).stdout(Stdio::piped()).spawn().expect("salp starts");
    let mut from = watch.stdout.take().expect("it is piped");
    let mut seen = [0; 8];
    from.read_exact(&mut seen).expect("what it said");
    assert_eq!(&seen, b"xxxxxxxx");
    give(&user, "a-1", "y");
    from.read_exact(&mut seen[..1]).expect("what it says");
    assert_eq!(seen[0], b'y');
    give(&user, "a-1", "u");
    await_how(&user, "a-1", "crashed");
    assert!(watch.wait().expect("it ends with the vm").success());
    // One that is stopped after its end is let go.
    give(&user, "a-2", "h");
    await_how(&user, "a-2", "halted");
    user.succeed(&["stop", "a-2"]);
    user.fail(&["stop", "a-2"], 1, &["a-2 does not run", "halted"]);
    user.fail(&["reset", "a-2"], 1, &["a-2 does not run", "halted"]);
    // A root that has ended is not kept.
    give(&user, "a", "u");
    await_how(&user, "a", "crashed");
    user.fail(&["reset", "a"], 1, &["a "]);
    // Clones that have ended are no reason for their colony to stay.
    reset(&user, "a-1");
    give(&user, "a-1", "u");
    await_how(&user, "a-1", "crashed");
    give(&user, "a-3", "u");
    let left = settled(LIMIT, || user.ps().len(), |count| *count == 0);
    assert_eq!(left, 0, "a colony of clones that have ended does not end");
    std::fs::remove_file(kernel).expect("it is ours");
    user.end();
}
