//! The control socket, with HTTP clients not written here: curl, and Python's standard library.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use salp::control::client::Client;
use salp::control::place::Place;
use salp::control::{ControlError, ForkRequest};
use salp_tests::procs::{settled, switches};
use salp_tests::user::User;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
/// How long nothing may happen.
const IDLE: Duration = Duration::from_secs(5);
/// A guest that does nothing until it is told to, which is never.
const SLEEPER: &str = "case=puppet";
/// A guest that writes a page every millisecond and prints a line for each.
const TALKER: &str = "case=idle mib=1 us=1000 say=1";

/// Whether the host has a program; says so where it has not.
fn has(program: &str, test: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).status();
    let has = found.is_ok_and(|status| status.success());
    if !has {
        println!("SKIPPED: {test}: this host has no {program}");
    }
    has
}

/// A colony's socket.
struct Api(PathBuf);

impl Api {
    fn of(user: &User, name: &str) -> Self {
        Self(user.place().join(format!("colony-{}.sock", user.keeper(name))))
    }

    fn curl(&self, path: &str, arguments: &[&str]) -> Command {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--max-time", "60", "--unix-socket"]).arg(&self.0);
        curl.arg(format!("http://salp{path}")).args(arguments);
        curl
    }

    /// Status, media type and body of an answer.
    fn ask(&self, path: &str, arguments: &[&str]) -> (u64, String, String) {
        let mut curl = self.curl(path, arguments);
        let output = curl.args(["--write-out", "\n%{http_code} %{content_type}"]).output();
        let output = output.expect("curl starts");
        let text = String::from_utf8(output.stdout).expect("text");
        let (body, last) = text.rsplit_once('\n').expect("curl says the status");
        let (status, kind) = last.split_once(' ').expect("and the media type");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{path} {arguments:?}: {said}");
        (status.parse().expect("a status"), kind.to_owned(), body.to_owned())
    }

    /// The JSON of an answer that has this status.
    #[track_caller]
    fn json(&self, path: &str, arguments: &[&str], status: u64) -> Value {
        let (got, kind, body) = self.ask(path, arguments);
        assert_eq!((got, kind.as_str()), (status, "application/json"), "{path} {arguments:?}: {body}");
        serde_json::from_str(&body).expect("json")
    }

    #[track_caller]
    fn get(&self, path: &str) -> Value {
        self.json(path, &[], 200)
    }

    #[track_caller]
    fn post(&self, path: &str, body: &Value, status: u64) -> Value {
        self.json(path, &["--data", &body.to_string()], status)
    }

    /// The code of a problem that has this status.
    #[track_caller]
    fn problem(&self, path: &str, arguments: &[&str], status: u64) -> String {
        let (got, kind, body) = self.ask(path, arguments);
        assert_eq!(
            (got, kind.as_str()),
            (status, "application/problem+json"),
            "{path} {arguments:?}: {body}"
        );
        let problem: Value = serde_json::from_str(&body).expect("json");
        assert_eq!(problem["status"], status);
        for field in ["title", "detail"] {
            assert!(problem[field].as_str().is_some_and(|text| !text.is_empty()), "{problem}");
        }
        problem["code"].as_str().expect("a code").to_owned()
    }
}

/// One who listens to what happens.
struct Listener(Child, BufReader<ChildStdout>);

impl Listener {
    /// Listens; whatever happens from now on is heard.
    fn new(api: &Api) -> Self {
        let curl = api.curl("/v1/events", &["--no-buffer"]).stdout(Stdio::piped()).spawn();
        let mut curl = curl.expect("curl starts");
        let mut from = BufReader::new(curl.stdout.take().expect("it is piped"));
        let mut line = String::new();
        from.read_line(&mut line).expect("a line");
        assert!(line.contains("\"event\":\"listening\""), "{line}");
        Self(curl, from)
    }

    /// What it has heard when the colony has ended.
    fn end(mut self) -> Vec<Value> {
        let mut text = String::new();
        self.1.read_to_string(&mut text).expect("text");
        assert!(self.0.wait().expect("it ends").success());
        text.lines().map(|line| serde_json::from_str(line).expect("json")).collect()
    }
}

#[test]
fn a_family_is_forked_paused_reset_watched_and_stopped_with_curl() {
    const TEST: &str = "a_family_is_forked_paused_reset_watched_and_stopped_with_curl";
    let Some(user) = User::new("api-family") else { return };
    if !has("curl", TEST) {
        return;
    }
    user.run("a", TALKER);
    let api = Api::of(&user, "a");
    let events = Listener::new(&api);
    let console = api.curl("/v1/vms/a/console", &[]).stdout(Stdio::piped()).spawn().expect("curl starts");
    let reply = api.post("/v1/vms/a/fork", &json!({"count": 2}), 201);
    let names: Vec<_> = reply["clones"].as_array().expect("a list").iter().map(|one| &one["name"]).collect();
    assert_eq!(names, ["a-1", "a-2"]);
    assert!(reply["clones"][0]["pause_us"].as_f64().is_some_and(|us| us > 0.0), "{reply}");
    assert_eq!(api.get("/v1/vms")["vms"].as_array().map(Vec::len), Some(3));
    assert_eq!(api.get("/v1/vms/a-1")["parent"], "a");
    for (state, body) in [("paused", r#"{"state": "paused"}"#), ("running", r#"{"state": "running"}"#)] {
        let vm = api.json("/v1/vms/a-1", &["--request", "PATCH", "--data", body], 200);
        assert_eq!(vm["state"], state);
    }
    let reset = api.post("/v1/vms/a-1/reset", &json!({}), 200);
    assert_eq!(reset["name"], "a-1");
    for name in ["a", "a-2", "a-1"] {
        let reply = api.post(&format!("/v1/vms/{name}/stop"), &json!({}), 200);
        assert_eq!(reply["is_colony_ending"], name == "a-1");
    }
    let output = console.wait_with_output().expect("it ends");
    assert!(output.status.success() && output.stdout.starts_with(b"vm 1 round 1\n"), "{output:?}");
    expect_story(&events.end());
    user.end();
}

/// What happened in the test above, in its order.
fn expect_story(events: &[Value]) {
    let told: Vec<_> = events.iter().filter(|event| event["event"] != "publishing").collect();
    let what = |event: &&Value| {
        let name = event["vm"]["name"].as_str().expect("a vm").to_owned();
        (event["event"].as_str().expect("a kind").to_owned(), name)
    };
    let mut story: Vec<_> = told.iter().map(what).collect();
    // When it comes depends on the processor.
    story.retain(|(event, _)| event != "published");
    let expected = [
        ("forked", "a"),
        ("paused", "a-1"),
        ("resumed", "a-1"),
        ("reset", "a-1"),
        ("ended", "a"),
        ("ended", "a-2"),
        ("ended", "a-1"),
    ];
    assert_eq!(story, expected.map(|(event, name)| (event.to_owned(), name.to_owned())), "{events:#?}");
    let numbers: Vec<_> = told.iter().map(|event| event["number"].as_u64().expect("a number")).collect();
    assert!(numbers.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{numbers:?}");
    let published = told.iter().find(|event| event["event"] == "published").expect("it was published");
    let forked = told.iter().find(|event| event["event"] == "forked").expect("it was forked");
    assert_eq!(published["fork"], forked["fork"]);
    assert_eq!(forked["clones"][1], json!({"name": "a-2", "id": 3}));
}

#[test]
fn what_is_wrong_is_told_as_a_problem() {
    const TEST: &str = "what_is_wrong_is_told_as_a_problem";
    let Some(user) = User::new("api-problems") else { return };
    if !has("curl", TEST) {
        return;
    }
    user.run("a", SLEEPER);
    let api = Api::of(&user, "a");
    let large = user.file("large", &vec![b' '; 2 << 20]);
    let (fork, large) = ("/v1/vms/a/fork", format!("@{large}"));
    let cases: [(&str, &[&str], u64, &str); 17] = [
        ("/nowhere", &[], 404, "unknown-path"),
        ("/v1/vms/b", &[], 404, "unknown-vm"),
        ("/v1/vms/b/memory", &[], 404, "unknown-vm"),
        ("/v1/vms/%ff", &[], 400, "bad-request"),
        ("/v1/vms", &["--request", "DELETE"], 405, "wrong-method"),
        ("/v1/vms/a/fork", &[], 405, "wrong-method"),
        (fork, &["--data", r#"{"count":"#], 400, "bad-request"),
        (fork, &["--data", r#"{"counts": 1}"#], 422, "bad-fields"),
        (fork, &["--data", r#"{"count": "many"}"#], 422, "bad-fields"),
        (fork, &["--data", "[2, null]"], 422, "bad-fields"),
        (fork, &["--data", r#"{"count": 0}"#], 422, "bad-count"),
        (fork, &["--data", r#"{"count": 65}"#], 422, "bad-count"),
        (fork, &["--data", r#"{"name": "a b"}"#], 422, "bad-name"),
        (fork, &["--data", r#"{"name": "a"}"#], 409, "name-taken"),
        (fork, &["--data-binary", &large], 413, "too-large"),
        ("/v1/vms/a/reset", &["--request", "POST"], 409, "not-resettable"),
        ("/v1/vms/a", &["--request", "PATCH", "--data", "{}"], 422, "bad-fields"),
    ];
    for (path, arguments, status, code) in cases {
        assert_eq!(api.problem(path, arguments, status), code, "{path} {arguments:?}");
    }
    assert_eq!(api.json(fork, &["--request", "POST"], 201)["clones"][0]["name"], "a-1", "no body at all");
    let stop = ["--request", "POST"];
    assert_eq!(api.json("/v1/vms/a/stop", &stop, 200)["is_colony_ending"], false);
    for path in ["/v1/vms/a/stop", fork] {
        assert_eq!(api.problem(path, &stop, 409), "not-running");
    }
    assert_eq!(api.problem("/v1/vms/a/memory", &[], 409), "not-running");
    // What is no HTTP is refused too.
    let mut stream = UnixStream::connect(&api.0).expect("it listens");
    stream.write_all(b"nonsense\r\n\r\n").expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    user.succeed(&["stop", "a-1"]);
    std::fs::remove_file(large.trim_start_matches('@')).expect("it is ours");
    user.end();
}

#[test]
fn the_memory_map_says_what_two_clones_share() {
    const TEST: &str = "the_memory_map_says_what_two_clones_share";
    let Some(user) = User::new("api-memory") else { return };
    if !has("curl", TEST) {
        return;
    }
    user.run("a", SLEEPER);
    let api = Api::of(&user, "a");
    api.post("/v1/vms/a/fork", &json!({"count": 2}), 201);
    for name in ["a", "a-1", "a-2"] {
        let map =
            settled(LIMIT, || api.get(&format!("/v1/vms/{name}/memory")), |map| map["pages"]["lent"] == 0);
        let leaves = map["leaves"].as_array().expect("a list");
        assert_eq!(leaves.len(), 16, "32 MiB");
        for kind in ["zero", "exclusive", "lent", "shared", "pinned", "lost"] {
            let sum: u64 = leaves.iter().map(|leaf| leaf[kind].as_u64().expect("a number")).sum();
            assert_eq!(map["pages"][kind], sum, "{kind}");
        }
        let pages = |of: &Value| -> u64 {
            let kinds = ["zero", "exclusive", "lent", "shared", "lost"];
            kinds.iter().map(|kind| of[kind].as_u64().expect("a number")).sum()
        };
        assert!(leaves.iter().all(|leaf| pages(leaf) == 512), "{map}");
        let shared: Vec<_> = leaves.iter().filter(|leaf| !leaf["block"].is_null()).collect();
        if name == "a" {
            // A source keeps its own pages, at its first fork.
            assert!(shared.is_empty() && map["pages"]["shared"] == 0, "{map}");
        } else {
            assert!(!shared.is_empty() && map["pages"]["shared"] != 0, "{map}");
            let block = json!({"fork": 1, "is_published": true, "vms": 2});
            assert!(shared.iter().all(|leaf| leaf["block"] == block), "{map}");
        }
        assert!(map["tables"]["levels"].as_array().is_some_and(|levels| levels.len() == 3), "{map}");
    }
    for name in ["a", "a-1", "a-2"] {
        api.post(&format!("/v1/vms/{name}/stop"), &json!({}), 200);
    }
    user.end();
}

#[test]
fn the_document_names_every_request() {
    const TEST: &str = "the_document_names_every_request";
    let Some(user) = User::new("api-document") else { return };
    if !has("curl", TEST) {
        return;
    }
    user.run("a", SLEEPER);
    let api = Api::of(&user, "a");
    let document = api.get("/v1/openapi.json");
    let known = serde_json::to_value(salp::control::routes::document()).expect("json");
    assert!(document == known, "it is another document");
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    for reference in document.to_string().split("\"$ref\":\"#").skip(1) {
        let pointer = reference.split('"').next().expect("a first part");
        assert!(document.pointer(pointer).is_some(), "there is no {pointer}");
    }
    let paths = document["paths"].as_object().expect("an object");
    assert!(paths.len() >= 8, "{:?}", paths.keys());
    for (path, item) in paths {
        let path = path.replace("{name}", "nobody");
        for (method, operation) in item.as_object().expect("an object") {
            assert!(operation["summary"].as_str().is_some_and(|text| !text.is_empty()), "{method} {path}");
            assert!(operation["responses"]["503"].is_object() || path.ends_with(".json"), "{method} {path}");
            if path.contains("nobody") {
                let method = method.to_uppercase();
                let body = ["--request", &method, "--data", r#"{"state": "paused"}"#];
                let arguments = if method == "GET" { &body[..2] } else { &body[..] };
                let (status, _, answer) = api.ask(&path, arguments);
                // The request is known, the VM is not; or its body says something else.
                assert!(
                    status == 404 && answer.contains("unknown-vm") || status == 422,
                    "{method} {path}: {answer}"
                );
            }
        }
    }
    api.post("/v1/vms/a/stop", &json!({}), 200);
    user.end();
}

/// How long the clients go on: 5 s, or what `SALP_API_SECONDS` says.
fn crowd_time() -> Duration {
    let seconds = std::env::var("SALP_API_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(5))
}

#[test]
fn fifty_clients_fork_inspect_and_stop_at_once() {
    let Some(user) = User::new("api-crowd") else { return };
    user.run("a", TALKER);
    let (until, place) = (Instant::now() + crowd_time(), user.place());
    let rounds: Vec<_> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..50)
            .map(|client| {
                scope.spawn({
                    let place = Place::at(place.clone());
                    move || visit(&Client::new(place), client, until)
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().expect("no panic")).collect()
    });
    let rounds: Vec<_> =
        rounds.into_iter().map(|rounds| rounds.expect("no error that is not deserved")).collect();
    println!("{} clones of 50 clients in {:?}", rounds.iter().sum::<u64>(), crowd_time());
    assert!(rounds.iter().all(|rounds| *rounds > 0), "{rounds:?}");
    let live: Vec<_> = user.ps().into_iter().filter(|vm| !vm["pid"].is_null()).collect();
    assert_eq!(live.len(), 1, "{live:?}");
    user.succeed(&["stop", "a"]);
    user.end();
}

/// Forks, looks and stops again and again, and says how often.
fn visit(client: &Client, number: usize, until: Instant) -> Result<u64, ControlError> {
    let mut rounds = 0;
    while Instant::now() < until {
        let name = format!("c{number}-{rounds}");
        let request = ForkRequest { name: Some(name.clone()), ..ForkRequest::default() };
        let reply = client.fork("a", &request)?;
        assert_eq!(reply.clones[0].name, name);
        assert_eq!(client.view(&name)?.parent.as_deref(), Some("a"));
        let map = client.memory(&name)?;
        assert_eq!(map.leaves.len(), 16);
        assert!(!client.stop(&name)?.is_colony_ending);
        assert!(!client.view(&name)?.state.is_live());
        rounds += 1;
    }
    Ok(rounds)
}

/// The blocks of this language in the README's section on the API.
fn examples(language: &str) -> Vec<String> {
    let readme =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).expect("it is there");
    let section = readme.split("\n## ").find(|section| section.starts_with("The API\n")).expect("a section");
    let fence = format!("\n```{language}\n");
    let blocks = section.split(&fence).skip(1);
    blocks.map(|block| block.split("\n```").next().expect("a first part").to_owned()).collect()
}

#[test]
fn the_readmes_examples_work() {
    const TEST: &str = "the_readmes_examples_work";
    let Some(user) = User::new("api-readme") else { return };
    if !has("curl", TEST) || !has("python3", TEST) {
        return;
    }
    user.run("a", TALKER);
    let api = Api::of(&user, "a");
    let run = |program: &str, option: &str, text: &str| {
        let output = Command::new(program).args([option, text]).env("socket", &api.0).output();
        let output = output.expect("it starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{program}: {said}{text}");
        String::from_utf8(output.stdout).expect("text")
    };
    let (sh, python) = (examples("sh"), examples("python"));
    assert_eq!((sh.len(), python.len()), (1, 1));
    let said = run("sh", "-ec", &sh[0]);
    assert!(said.contains("\"name\":\"a-2\"") && said.contains("# EOF"), "{said}");
    let said = run("python3", "-c", &python[0]);
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines.len(), 3, "{said}");
    assert!(
        lines.iter().all(|line| line.contains("a stood still for ") && line.contains("pages shared")),
        "{said}"
    );
    user.succeed(&["stop", "a"]);
    user.end();
}

#[test]
fn what_has_ended_can_be_awaited_and_removed_and_names_are_free_again() {
    const TEST: &str = "what_has_ended_can_be_awaited_and_removed_and_names_are_free_again";
    let Some(user) = User::new("api-remove") else { return };
    if !has("curl", TEST) {
        return;
    }
    user.run("a", SLEEPER);
    let api = Api::of(&user, "a");
    let events = Listener::new(&api);
    api.post("/v1/vms/a/fork", &json!({"name": "kid"}), 201);
    let waiting = api.curl("/v1/vms/kid/wait", &[]).stdout(Stdio::piped()).spawn().expect("curl starts");
    let delete = ["--request", "DELETE"];
    assert_eq!(api.problem("/v1/vms/kid", &delete, 409), "still-runs");
    let console = api.get("/v1/vms/kid")["console"].as_str().expect("a path").to_owned();
    let removed = api.json("/v1/vms/kid?force=true", &delete, 200);
    assert_eq!(removed, json!({"name": "kid", "is_colony_ending": false}));
    assert_eq!(api.problem("/v1/vms/kid", &delete, 404), "unknown-vm");
    assert!(!std::path::Path::new(&console).exists());
    // It was asked for before it was removed: it is told, or that nobody knows it any more.
    let output = waiting.wait_with_output().expect("it ends");
    let told: Value = serde_json::from_slice(&output.stdout).expect("json");
    assert!(told["state"] == "stopped" || told["code"] == "unknown-vm", "{told}");
    // The first VM too, from under a clone of it; what that needs stays.
    api.post("/v1/vms/a/fork", &json!({"name": "kid"}), 201);
    api.json("/v1/vms/a?force=true", &delete, 200);
    let kid = api.get("/v1/vms/kid");
    assert_eq!((kid["parent"].as_str(), kid["parent_id"].as_u64()), (Some("a"), Some(1)));
    api.post("/v1/vms/kid/fork", &json!({"name": "a"}), 201);
    // Another that is no clone.
    let other = api.post("/v1/vms", &json!({"name": "other", "cmdline": "case=idle mib=1 rounds=1"}), 201);
    assert_eq!((other["parent"].is_null(), other["memory_bytes"].as_u64()), (true, Some(32 << 20)));
    assert_eq!(api.get("/v1/vms/other/wait")["status"], 0);
    for (body, code) in [
        (json!({"memory_bytes": 64 << 20}), "unlike-colony"),
        (json!({"kernel": "/nowhere"}), "unlike-colony"),
        (json!({"memory": 1}), "bad-fields"),
        (json!({"cmdline": "x".repeat(5000)}), "refused"),
    ] {
        let data = body.to_string();
        assert_eq!(api.problem("/v1/vms", &["--data", &data], 422), code, "{body}");
    }
    for name in ["kid", "a"] {
        api.post(&format!("/v1/vms/{name}/stop"), &json!({}), 200);
    }
    let told = events.end().into_iter().filter(|event| event["event"] == "removed");
    assert_eq!(told.map(|event| event["vm"]["name"].clone()).collect::<Vec<_>>(), ["kid", "a"]);
    user.end();
}

#[test]
fn figures_are_told_for_users_and_for_prometheus() {
    const TEST: &str = "figures_are_told_for_users_and_for_prometheus";
    let Some(user) = User::new("api-figures") else { return };
    if !has("curl", TEST) {
        return;
    }
    user.run("a", TALKER);
    let api = Api::of(&user, "a");
    api.post("/v1/vms/a/fork", &json!({"count": 2}), 201);
    let stats = api.get("/v1/vms/a-1/stats");
    let pages = stats["pages"].as_object().expect("an object");
    let sum: u64 =
        pages.iter().filter(|(kind, _)| *kind != "pinned").filter_map(|(_, count)| count.as_u64()).sum();
    assert_eq!(sum, 32 << 8, "{stats}");
    let bytes = |kinds: &[&str]| kinds.iter().filter_map(|kind| pages[*kind].as_u64()).sum::<u64>() << 12;
    let expected = [bytes(&["shared"]), bytes(&["exclusive", "lent"])];
    assert_eq!(
        ["shared_bytes", "unique_bytes"].map(|kind| stats[kind].as_u64()),
        expected.map(Some),
        "{stats}"
    );
    assert_eq!(stats["vcpus"].as_array().map(Vec::len), Some(1), "{stats}");
    assert!(stats["faults"]["touch"].as_u64().is_some_and(|count| count > 0), "{stats}");
    let colony = api.get("/v1/colony");
    assert_eq!((colony["live_vms"].as_u64(), colony["most_vms"].as_u64()), (Some(3), Some(256)), "{colony}");
    let (status, kind, text) = api.ask("/metrics", &[]);
    assert!(status == 200 && kind.starts_with("application/openmetrics-text"), "{kind}");
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.parse::<f64>().ok()).unwrap_or_else(|| panic!("no {name} in {text}"))
    };
    assert_eq!(value("salp_forks_total"), 1.0);
    assert_eq!(value("salp_clones_total"), 2.0);
    assert_eq!(value("salp_pause_seconds_count"), 1.0);
    assert_eq!(value("salp_fork_stage_seconds_count{stage=\"protect\"}"), 1.0);
    assert_eq!(value("salp_fork_stage_seconds_count{stage=\"clone\"}"), 2.0);
    assert_eq!(value("salp_vms{state=\"running\"}"), 3.0);
    let state = |state| value(&format!("salp_vm_pages{{vm=\"a-2\",id=\"3\",state=\"{state}\"}}"));
    let sum: f64 = ["zero", "exclusive", "lent", "shared", "lost"].into_iter().map(state).sum();
    assert_eq!(sum, f64::from(32 << 8));
    api.json("/v1/vms/a-1", &["--request", "PATCH", "--data", r#"{"state": "paused"}"#], 200);
    api.post("/v1/vms/a-2/stop", &json!({}), 200);
    let colony = api.get("/v1/colony");
    let counts = ["live_vms", "paused_vms", "ended_vms"].map(|state| colony[state].as_u64());
    assert_eq!(counts, [2, 1, 1].map(Some), "{colony}");
    for name in ["a", "a-1"] {
        api.post(&format!("/v1/vms/{name}/stop"), &json!({}), 200);
    }
    user.end();
}

#[test]
fn an_idle_colony_uses_no_processor_whoever_listens() {
    const TEST: &str = "an_idle_colony_uses_no_processor_whoever_listens";
    let Some(user) = User::new("api-idle") else { return };
    user.run("a", SLEEPER);
    user.succeed(&["fork", "a", "-n", "2"]);
    let api = Api::of(&user, "a");
    let listens = |path: &str| {
        let mut curl = api.curl(path, &["--no-buffer"]);
        curl.stdout(Stdio::null()).spawn().expect("curl starts")
    };
    let paths = ["/v1/events", "/v1/vms/a/console", "/v1/vms/a-1/wait"];
    // Without one who listens it is half a test.
    let listeners: Vec<_> = paths.into_iter().filter(|_| has("curl", TEST)).map(listens).collect();
    let vms = user.ps();
    let members = vms.iter().filter_map(|vm| u32::try_from(vm["pid"].as_u64()?).ok());
    let pids: Vec<_> = members.chain([user.keeper("a")]).collect();
    assert_eq!(pids.len(), 4);
    let sum = || pids.iter().map(|pid| switches(*pid)).sum::<u64>();
    // Memory is published after a fork, and the pool is filled: that ends.
    let still = || {
        let before = sum();
        std::thread::sleep(IDLE);
        // A thread that ends takes its count along.
        sum().abs_diff(before)
    };
    let switched = settled(LIMIT, still, |switched| *switched == 0);
    assert_eq!(switched, 0, "threads of an idle colony wake");
    for name in ["a-1", "a", "a-2"] {
        user.succeed(&["stop", name]);
    }
    for mut listener in listeners {
        assert!(listener.wait().expect("it ends").success());
    }
    user.end();
}

#[test]
fn a_fork_says_of_each_clone_what_came_of_it() {
    const TEST: &str = "a_fork_says_of_each_clone_what_came_of_it";
    let Some(user) = User::new("api-fork") else { return };
    if !has("curl", TEST) {
        return;
    }
    let command_line = format!("{TALKER} who=1");
    user.run_with("a", &["--cmdline", &command_line, "--max-vms", "3"]);
    let api = Api::of(&user, "a");
    let request = json!({
        "count": 4, "name_prefix": "k", "parallel": 2, "wait_ready": true, "data": {"role": "worker"},
    });
    let reply = api.post("/v1/vms/a/fork", &request, 207);
    let names = |of: &Value| -> Vec<String> {
        let all = of.as_array().expect("a list").iter();
        all.map(|one| one["name"].as_str().expect("a text").to_owned()).collect()
    };
    assert_eq!(
        (names(&reply["clones"]), names(&reply["missing"])),
        (vec!["k-1".into(), "k-2".into()], vec!["k-3".into(), "k-4".into()])
    );
    for clone in reply["clones"].as_array().expect("a list") {
        let pages = &clone["pages"];
        let sum: u64 = ["shared", "lent", "copied"].iter().filter_map(|kind| pages[kind].as_u64()).sum();
        assert_eq!((sum, &clone["problem"]), (32 << 8, &Value::Null), "{clone}");
    }
    user.await_console("k-2", |text| text.contains("role=worker"));
    assert_eq!(reply["missing"][1]["problem"]["code"], "limit-reached");
    assert!(!user.place().join("k-3.vm").exists() && !user.place().join("k-3.console").exists());
    let fork = |body: Value, status| api.problem("/v1/vms/a/fork", &["--data", &body.to_string()], status);
    assert_eq!(fork(json!({}), 409), "limit-reached");
    api.post("/v1/vms/k-1/stop", &json!({}), 200);
    let reply = api.post("/v1/vms/a/fork", &json!({"name": "p", "paused": true}), 201);
    assert_eq!(
        (names(&reply["clones"]), api.get("/v1/vms/p")["state"].as_str()),
        (vec!["p".into()], Some("paused"))
    );
    let running = ["--request", "PATCH", "--data", r#"{"state": "running"}"#];
    assert_eq!(api.json("/v1/vms/p", &running, 200)["state"], "running");
    for (body, code) in [
        (json!({"name": "x", "name_prefix": "y"}), "bad-fields"),
        (json!({"paused": true, "wait_ready": true}), "bad-fields"),
        (json!({"parallel": 0}), "bad-fields"),
        (json!({"data": {"a=b": "c"}}), "bad-identity"),
        (json!({"data": {"a": "x".repeat(4000)}}), "bad-identity"),
    ] {
        assert_eq!(fork(body.clone(), 422), code, "{body}");
    }
    for name in ["p", "k-2", "a"] {
        api.post(&format!("/v1/vms/{name}/stop"), &json!({}), 200);
    }
    user.end();
}
