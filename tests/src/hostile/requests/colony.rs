//! The colony that is asked: in this process, its members processes of the salp binary.
//!
//! It serves many inputs. After each the clones are removed and the first VM runs; then there must be no
//! more threads and descriptors than at first. An input may end the colony, which is then another one.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::thread::JoinHandle;

use salp::control::ControlError;
use salp::control::place::Place;
use salp::control::service::{Keeper, Outcome, Settings};
use salp::keeper::limits::Limits;
use salp::member::confine::Confinement;
use serde_json::Value;

use super::http::{Answer, Connection, LIMIT, shown};
use crate::procs::{Scratch, entries, salp_binary, settled};

/// The first VM's name.
pub(super) const ROOT: &str = "a";
/// It says who it is, its clones too, and sleeps.
const COMMAND_LINE: &str = "case=idle mib=1 us=10000 who=1";
/// The least memory that the built-in guest does with.
const MEMORY_BYTES: u64 = 16 << 20;
const MOST_VMS: usize = 12;
/// Threads that waited for a VM stay a second for the next request: of some inputs, that many.
const SPARE_THREADS: usize = 48;
/// What a pool, and a connection that was just dropped, may have besides.
const SPARE_DESCRIPTORS: usize = 24;

/// What panicked, in whatever thread.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// See the module.
pub(super) struct FuzzedColony {
    keeper: Option<JoinHandle<Result<Outcome, ControlError>>>,
    socket: PathBuf,
    base: Held,
    // Last: its files are gone before it.
    _scratch: Scratch,
}

/// One who waits for what a VM does.
pub(super) struct Waiting {
    pub(super) connection: Connection,
    /// What was asked for.
    pub(super) operation: (&'static str, &'static str),
}

/// What a colony holds of its host.
#[derive(Clone, Copy, Debug)]
struct Held {
    vms: usize,
    unanswered: usize,
    threads: usize,
    descriptors: usize,
}

impl Held {
    fn now(vms: usize) -> Self {
        let count = |path| entries(path).len();
        Self { vms, unanswered: 0, threads: count("/proc/self/task"), descriptors: count("/proc/self/fd") }
    }

    fn is_within(&self, base: &Self) -> bool {
        self.vms <= base.vms
            && self.unanswered == 0
            && self.threads <= base.threads + SPARE_THREADS
            && self.descriptors <= base.descriptors + SPARE_DESCRIPTORS
    }
}

impl FuzzedColony {
    /// A colony with its first VM, in a directory that nobody else has.
    pub(super) fn start() -> Self {
        watch_panics();
        // As every salp does: whoever hangs up ends no process. A fuzzer's own main leaves it as it was.
        signal_hook::flag::register(signal_hook::consts::SIGPIPE, Arc::new(AtomicBool::new(false)))
            .expect("a signal that can be caught");
        let scratch = Scratch::new("requests");
        let place = Place::at(scratch.path().join("names"));
        let socket = place.path().join(Place::socket_name(std::process::id()));
        let settings = Settings {
            name: Some(ROOT.to_owned()),
            memory_bytes: MEMORY_BYTES,
            cpus: 1,
            command_line: COMMAND_LINE.to_owned(),
            kernel: None,
            initrd: None,
            limits: Limits { vms: Some(MOST_VMS), ..Limits::default() },
            dma_backing: None,
            seccomp: Confinement::On,
            is_background: false,
            place: Some(place),
            program: Some(salp_binary()),
        };
        let keeper = Keeper::start(settings).expect("a colony");
        let keeper = std::thread::spawn(move || keeper.run(|_| ()));
        let mut colony = Self { keeper: Some(keeper), socket, base: Held::now(1), _scratch: scratch };
        let is_warm = |colony: &Option<Value>| {
            colony.as_ref().is_some_and(|colony| colony["pool"]["ready"] == colony["pool"]["size"])
        };
        let warm = settled(LIMIT, || colony.ask("GET", "/v1/colony", "", &[200]), is_warm);
        assert!(is_warm(&warm), "the pool does not fill: {warm:?}");
        colony.base = Held::now(1);
        colony
    }

    /// Where it answers.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Asks what must be answered with one of these statuses. None: the colony is gone, or going.
    fn ask(&self, method: &str, path: &str, body: &str, statuses: &[u16]) -> Option<Value> {
        let mut connection = Connection::open(&self.socket)?;
        let (len, close) = (body.len(), "connection: close");
        let head =
            format!("{method} {path} HTTP/1.1\r\nhost: salp\r\n{close}\r\ncontent-length: {len}\r\n\r\n");
        connection.send(format!("{head}{body}").as_bytes());
        let read = connection.read_to_end();
        if read.is_empty() {
            return None;
        }
        let answer = Answer::take(&mut &*read, true);
        let said = serde_json::from_slice(&answer.body).unwrap_or(Value::Null);
        if answer.status == 503 && said["code"] == "colony-ending" {
            return None;
        }
        assert!(statuses.contains(&answer.status), "{method} {path}: {}", shown(&read));
        Some(said)
    }

    /// Removes what an input has made. None: the first VM is no more, and now nothing is.
    fn tidy(&self) -> Option<Held> {
        let list = self.ask("GET", "/v1/vms", "", &[200])?;
        let vms = list["vms"].as_array().expect("a list of VMs");
        let is_root = |vm: &Value| vm["id"] == 1;
        let has_root = vms.iter().any(|vm| is_root(vm) && !vm["pid"].is_null());
        for vm in vms.iter().filter(|vm| !(has_root && is_root(vm))) {
            let name = vm["name"].as_str().expect("a name");
            // A request that is on its way still may have done so.
            self.ask("DELETE", &format!("/v1/vms/{name}?force=true"), "", &[200, 404])?;
        }
        if !has_root {
            // A clone that was on its way may have come after the list.
            return Some(Held { vms: usize::MAX, ..Held::now(0) });
        }
        if vms.iter().any(|vm| is_root(vm) && vm["state"] == "paused") {
            self.ask("PATCH", &format!("/v1/vms/{ROOT}"), r#"{"state": "running"}"#, &[200])?;
        }
        Some(Held::now(vms.len()))
    }

    /// Makes it as it was before an input. False: the input has ended it. Who is in `waiting` waits for
    /// what VMs do that are removed, and has an answer then.
    ///
    /// # Panics
    /// It is not as it was, or a thread has panicked.
    pub(super) fn recover(&mut self, waiting: &[Waiting]) -> bool {
        let base = self.base;
        let look = || {
            let held = self.tidy()?;
            let is_left = |waiting: &&Waiting| !waiting.connection.has_answer();
            Some(Held { unanswered: waiting.iter().filter(is_left).count(), ..held })
        };
        let is_well = |found: &Option<Held>| found.is_none_or(|found| found.is_within(&base));
        let found = settled(LIMIT, look, is_well);
        if found.is_none() {
            self.join();
        }
        let panics = std::mem::take(&mut *PANICS.lock().unwrap_or_else(PoisonError::into_inner));
        assert!(panics.is_empty(), "{panics:?}");
        assert!(is_well(&found), "{found:?}, at first {base:?}");
        found.is_some()
    }

    /// Waits for the end that has begun.
    fn join(&mut self) {
        let Some(keeper) = self.keeper.take() else { return };
        let has_ended = settled(LIMIT, || keeper.is_finished(), |is_finished| *is_finished);
        assert!(has_ended, "a colony that does not answer does not end");
        let outcome = keeper.join().expect("a keeper does not panic");
        outcome.expect("a colony ends in order");
        let left = entries(&self.socket.parent().expect("a directory").to_string_lossy());
        assert_eq!(left, Vec::<String>::new(), "a colony leaves names");
    }
}

impl Drop for FuzzedColony {
    fn drop(&mut self) {
        // After a failure there are enough words already.
        if std::thread::panicking() {
            return;
        }
        // Until the end has begun.
        let end = || self.ask("DELETE", &format!("/v1/vms/{ROOT}?force=true"), "", &[200, 404]);
        if self.keeper.is_some() {
            settled(LIMIT, end, Option::is_none);
            self.join();
        }
    }
}

/// A panic in any thread is found after the input, whoever catches it.
fn watch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICS.lock().unwrap_or_else(PoisonError::into_inner).push(panic.to_string());
            before(panic);
        }));
    });
}
