//! The control socket: requests of one who may ask, and says anything.
//!
//! The input is a list of steps. Most are requests: an operation of the API or one that there is not, a
//! name, a query, a body, correctly framed and each on a connection of its own. The others are bytes as
//! they are, half-closed after that. Besides what all targets hold:
//! - every answer is HTTP with a status that the API's document has for that operation, or of a path or
//!   method that there is not; nothing fails (500);
//! - an error is `problem+json`, with a code that the document has for that status;
//! - who waits for a VM's end, or for a clone to become ready, has an answer when that is removed;
//! - after the input the colony is as before, or was ended by it: see [`colony`].

mod colony;
mod http;

use std::cell::RefCell;
use std::path::Path;
use std::sync::LazyLock;

use salp::control::error::PROBLEM_TYPE;
use salp::control::routes;
use serde_json::Value;

use self::colony::{FuzzedColony, ROOT, Waiting};
use self::http::{Answer, Connection, shown};
use super::bytes::Bytes;

/// The most steps of one input.
const STEPS: usize = 12;

/// All that can be done, and some that cannot.
const OPERATIONS: [(&str, &str); 24] = [
    ("GET", "/v1/vms"),
    ("POST", "/v1/vms"),
    ("GET", "/v1/vms/{name}"),
    ("PATCH", "/v1/vms/{name}"),
    ("DELETE", "/v1/vms/{name}"),
    ("POST", "/v1/vms/{name}/fork"),
    ("POST", "/v1/vms/{name}/reset"),
    ("POST", "/v1/vms/{name}/stop"),
    ("GET", "/v1/vms/{name}/memory"),
    ("GET", "/v1/vms/{name}/stats"),
    ("GET", "/v1/vms/{name}/wait"),
    ("GET", "/v1/vms/{name}/console"),
    ("POST", "/v1/vms/{name}/console"),
    ("GET", "/v1/events"),
    ("GET", "/v1/colony"),
    ("GET", "/metrics"),
    ("GET", "/v1/openapi.json"),
    ("HEAD", "/v1/vms/{name}"),
    ("PUT", "/v1/vms"),
    ("OPTIONS", "/v1/vms/{name}/fork"),
    ("FORK", "/v1/colony"),
    ("GET", "/"),
    ("GET", "/v1/{name}"),
    ("DELETE", "/v1/vms/{name}/memory/"),
];

const NAMES: [&str; 20] = [
    "a",
    "a-1",
    "a-2",
    "a-3",
    "a-12",
    "b",
    "b-1",
    "a-1-1",
    "kid",
    "nobody",
    "",
    ".",
    "..",
    "-a",
    "%61",
    "%2e%2e%2fa",
    "%ff",
    "a%00",
    "a%20b",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
];

const QUERIES: [&str; 6] =
    ["", "?force=true", "?force=false", "?force=maybe", "?other=1", "?force=true&force=true"];

const BODIES: [&str; 20] = [
    "",
    "{}",
    r#"{"count": 2}"#,
    r#"{"count": 13, "name_prefix": "b"}"#,
    r#"{"count": 64, "parallel": 16}"#,
    r#"{"name": "kid", "wait_ready": true}"#,
    r#"{"name": "kid", "paused": true, "data": {"key": "value"}}"#,
    r#"{"name": "a"}"#,
    r#"{"name": "../a"}"#,
    r#"{"count": 18446744073709551615}"#,
    r#"{"state": "paused"}"#,
    r#"{"state": "running"}"#,
    r#"{"state": "gone"}"#,
    r#"{"name": "b", "cmdline": "case=idle rounds=1 us=1"}"#,
    r#"{"name": "b", "memory_bytes": 16777216, "cpus": 1, "devices": {}, "limits": {"vms": 12}}"#,
    r#"{"kernel": "/dev/null", "initrd": "/dev/null"}"#,
    r#"{"limits": {"vms": 1, "cpus": 0, "memory_bytes": 0}}"#,
    r#"{"devices": {"dma_backing": "/dev/zero"}}"#,
    "[]",
    "{\"name\": \"\u{0}\", \"data\": [[[[[[[[",
];

/// The API's document.
static DOCUMENT: LazyLock<Value> =
    LazyLock::new(|| serde_json::to_value(routes::document()).expect("a document is json"));

thread_local! {
    static COLONY: RefCell<Option<FuzzedColony>> = const { RefCell::new(None) };
}

/// The input is a list of steps.
///
/// # Panics
/// A property does not hold, see the module; or the host cannot run a VM.
pub fn requests(input: &[u8]) {
    COLONY.with_borrow_mut(|slot| {
        let colony = slot.get_or_insert_with(FuzzedColony::start);
        let mut run = Run { socket: colony.socket(), waiting: Vec::new(), is_input_full: false };
        let mut bytes = Bytes::new(input);
        for _ in 0..STEPS {
            if run.step(&mut bytes).is_none() {
                break;
            }
        }
        let waiting = run.waiting;
        if colony.recover(&waiting) {
            waiting.into_iter().for_each(expect_news);
        } else {
            *slot = None;
        }
    });
}

/// An input's way through the colony.
struct Run<'a> {
    socket: &'a Path,
    /// Who waits for the end of a VM that is not the first one, or for a clone to become ready.
    waiting: Vec<Waiting>,
    /// The guests read no console input: what is full stays so, and each further input waits for room.
    is_input_full: bool,
}

/// A request, taken apart.
struct Request<'a> {
    method: &'static str,
    template: &'static str,
    name: &'static str,
    query: Vec<u8>,
    body: &'a [u8],
    is_chunked: bool,
}

impl Run<'_> {
    /// None: the input is at its end, or the colony at its.
    fn step(&mut self, bytes: &mut Bytes<'_>) -> Option<()> {
        let how = bytes.byte()?;
        if how & 0x80 != 0 {
            return self.raw(bytes.text()?);
        }
        let (method, template) = OPERATIONS[usize::from(how & 0x1f) % OPERATIONS.len()];
        let name = if template.contains("{name}") { *pick(&NAMES, bytes.byte()?) } else { "" };
        let query = match bytes.byte()? {
            0xff => [b"?", &*bytes.text()?.iter().map(|byte| b'!' + byte % 94).collect::<Vec<_>>()].concat(),
            which => pick(&QUERIES, which).as_bytes().to_owned(),
        };
        let body = match bytes.byte()? {
            0xff => bytes.text()?,
            which => pick(&BODIES, which).as_bytes(),
        };
        let request = Request { method, template, name, query, body, is_chunked: how & 0x40 != 0 };
        self.ask(&request, how & 0x20 != 0)
    }

    /// Bytes as they are.
    fn raw(&self, bytes: &[u8]) -> Option<()> {
        let mut connection = Connection::open(self.socket)?;
        connection.send(bytes);
        connection.send_end();
        let read = connection.read_to_end();
        // Which answer is one to HEAD is not to be seen.
        let has_bodies = !bytes.windows(4).any(|four| four == b"HEAD");
        let mut rest = &*read;
        while !rest.is_empty() {
            let answer = Answer::take(&mut rest, has_bodies);
            expect_deserved(&answer, &read);
            if answer.is_stream || !has_bodies {
                break;
            }
        }
        Some(())
    }

    fn ask(&mut self, request: &Request<'_>, leaves_early: bool) -> Option<()> {
        let is_input = (request.method, request.template) == ("POST", "/v1/vms/{name}/console");
        if is_input && self.is_input_full {
            return Some(());
        }
        let mut connection = Connection::open(self.socket)?;
        connection.send(&request.bytes());
        if leaves_early {
            return Some(());
        }
        let is_wait = request.template == "/v1/vms/{name}/wait";
        // Its answer comes when the VM has ended; the first one does not.
        if is_wait && [ROOT, "%61"].contains(&request.name) {
            return Some(());
        }
        let is_fork = request.template == "/v1/vms/{name}/fork";
        if is_wait || is_fork && request.body.windows(10).any(|ten| ten == b"wait_ready") {
            self.waiting.push(Waiting { connection, operation: (request.method, request.template) });
            return Some(());
        }
        match request.template {
            "/v1/vms/{name}/console" | "/v1/events" if request.method == "GET" => {
                let read = connection.read_head();
                if !read.is_empty() {
                    // An error is short, and was read with its head.
                    let answer = Answer::take(&mut &*read, true);
                    request.expect_documented(&answer, &read);
                }
            }
            _ => {
                let read = connection.read_to_end();
                if read.is_empty() {
                    return None;
                }
                let answer = Answer::take(&mut &*read, request.method != "HEAD");
                request.expect_documented(&answer, &read);
                self.is_input_full |= is_input && answer.body.ends_with(b":0}");
            }
        }
        Some(())
    }
}

fn pick<T>(of: &[T], which: u8) -> &T {
    &of[usize::from(which) % of.len()]
}

impl Request<'_> {
    /// As it goes out.
    fn bytes(&self) -> Vec<u8> {
        let path = self.template.replace("{name}", self.name);
        let mut bytes = [self.method.as_bytes(), b" ", path.as_bytes(), &self.query].concat();
        bytes.extend(b" HTTP/1.1\r\nhost: salp\r\nconnection: close\r\n");
        if self.is_chunked {
            bytes.extend(b"transfer-encoding: chunked\r\n\r\n");
            for chunk in self.body.chunks(100) {
                bytes.extend(format!("{:x}\r\n", chunk.len()).as_bytes());
                bytes.extend([chunk, b"\r\n"].concat());
            }
            bytes.extend(b"0\r\n\r\n");
        } else {
            bytes.extend(format!("content-length: {}\r\n\r\n", self.body.len()).as_bytes());
            bytes.extend(self.body);
        }
        bytes
    }

    /// The answer is one that the document has for this.
    fn expect_documented(&self, answer: &Answer, read: &[u8]) {
        let (method, path) = (self.method, self.template.replace("{name}", self.name));
        if self.method == "HEAD" {
            assert!(answer.status < 500 && answer.body.is_empty(), "{method} {path}: {}", shown(read));
            return;
        }
        expect_deserved(answer, read);
        let method_key = method.to_lowercase();
        let operation = &DOCUMENT["paths"][self.template][&method_key]["responses"];
        let documented = &operation[answer.status.to_string()];
        let code = serde_json::from_slice::<Value>(&answer.body).unwrap_or(Value::Null)["code"].take();
        let is_known = match code.as_str() {
            // No such path, or nothing that is done with it.
            Some("unknown-path") => answer.status == 404,
            Some("wrong-method") => answer.status == 405 && operation.is_null(),
            Some(code) => {
                documented["description"].as_str().is_some_and(|text| text.contains(&format!("`{code}`")))
            }
            None if answer.status < 400 => documented.is_object(),
            // A query need not be one: then it is no HTTP, and refused by the library.
            None => !self.query.is_empty(),
        };
        assert!(is_known, "no document says so of {method} {path}: {}", shown(read));
    }
}

/// The answer is whole, nothing has failed, and an error is a problem.
fn expect_deserved(answer: &Answer, read: &[u8]) {
    assert!(answer.status < 500 || answer.status == 503, "something failed: {}", shown(read));
    if answer.is_stream {
        return;
    }
    let is_json = [PROBLEM_TYPE, "application/json"].contains(&answer.kind.as_str());
    let said = is_json.then(|| serde_json::from_slice::<Value>(&answer.body));
    match said {
        Some(Ok(said)) if answer.status >= 400 => {
            let is_problem = answer.kind == PROBLEM_TYPE && said["status"] == answer.status;
            assert!(is_problem && said["code"].is_string(), "no problem: {}", shown(read));
        }
        Some(Ok(said)) => {
            let missing = said["missing"].as_array().into_iter().flatten();
            let all = missing.chain(said["clones"].as_array().into_iter().flatten());
            let has_failed = all.into_iter().any(|one| one["problem"]["code"] == "failed");
            assert!(!has_failed, "a clone failed: {}", shown(read));
        }
        Some(Err(error)) => panic!("{error}: {}", shown(read)),
        // The library refuses what is no HTTP.
        None if answer.status >= 400 => {
            let is_bare = [400, 414, 431].contains(&answer.status) && answer.body.is_empty();
            assert!(is_bare, "an error without a problem: {}", shown(read));
        }
        None => {}
    }
}

/// Who has waited for a VM that is gone by now is told that.
fn expect_news(waiting: Waiting) {
    let read = waiting.connection.read_to_end();
    let answer = Answer::take(&mut &*read, true);
    let (method, template) = waiting.operation;
    let asked = Request { method, template, name: "", query: Vec::new(), body: &[], is_chunked: false };
    asked.expect_documented(&answer, &read);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_of_the_document_is_asked_for() {
        let paths = DOCUMENT["paths"].as_object().expect("an object");
        let methods = |item: &Value| item.as_object().expect("an object").keys().cloned().collect::<Vec<_>>();
        for (path, item) in paths {
            for method in methods(item) {
                let is_asked =
                    |(asked, template): &(&str, &str)| asked.to_lowercase() == method && template == path;
                assert!(OPERATIONS.iter().any(is_asked), "{method} {path}");
            }
        }
    }
}
