//! Control of running colonies: names, consoles, and one socket per colony that answers to other
//! processes of the same user.
//!
//! # Protocol
//! HTTP/1.1 over a Unix stream socket, one request per connection, bodies in JSON, errors as
//! `application/problem+json` with a stable `code`. `curl --unix-socket` speaks it.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/vms` | [`VmList`] |
//! | `GET /v1/vms/{name}` | [`VmView`] |
//! | `POST /v1/vms/{name}/fork` with a [`ForkRequest`] | 201, [`ForkReply`] |
//! | `PATCH /v1/vms/{name}` with a [`StateRequest`] | [`VmView`] |
//! | `POST /v1/vms/{name}/reset` | [`ResetView`] |
//! | `POST /v1/vms/{name}/stop` | [`StopReply`] |
//! | `POST /v1/vms/{name}/console` with input as it is | [`InputReply`]; the rest is to be sent again |
//! | `GET /v1/vms/{name}/console` | the output from its beginning, as it comes, to the VM's end |
//!
//! After a stop that ends the colony the connection stays open until nothing is left of it.
//!
//! A clone whose guest has ended is kept for a reset, [`KEPT_LIMIT`](service::KEPT_LIMIT) of them, as long
//! as another VM of the colony runs or is paused.
//!
//! | module | what |
//! |---|---|
//! | [`place`] | the directory of names and sockets; what killed colonies left |
//! | [`http`] | messages of the protocol |
//! | [`console`] | a console's file and its followers |
//! | [`terminal`] | the user's terminal, and what is typed at it |
//! | [`registry`] | the VMs of this colony, as users know them |
//! | [`service`] | a colony in its keeper's process |
//! | `requests` | its end of the socket |
//! | [`client`] | the other end |
//!
//! # Threads
//! One accepts, one serves each connection, one notes signals; all wait without a timer, so an idle
//! colony uses no processor. The colony's main thread does what follows from events.
//!
//! # Known holes
//! Names and console files of VMs that have ended stay until their colony ends, and a console file has
//! no limit.

pub mod client;
pub mod console;
pub mod http;
pub mod place;
pub mod registry;
mod requests;
pub mod service;
pub mod terminal;

use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::keeper::ColonyError;
use crate::member::messages::HowEnded;
use crate::words::MemoryShapeError;

/// Why something could not be done for a user.
#[derive(Debug, Error)]
pub enum ControlError {
    /// A name that no VM has.
    #[error("no vm is called {0}: `salp ps` lists all")]
    Unknown(String),
    /// A name that a VM has.
    #[error("{0} is taken: another vm has that name, choose a different one with --name")]
    Taken(String),
    /// A text that cannot be a name.
    #[error("{0:?} cannot be a name: use 1 to 63 letters, digits, '-', '_' or '.', a letter or digit first")]
    BadName(String),
    /// The VM has ended.
    #[error("{name} does not run any more: {how}")]
    NotRunning {
        /// Its name.
        name: String,
        /// How it ended.
        how: String,
    },
    /// The VM cannot be reset.
    #[error("{name} cannot be reset: {reason}")]
    NotResettable {
        /// Its name.
        name: String,
        /// Why not.
        reason: String,
    },
    /// Its colony was killed.
    #[error("the colony of {0} was killed: {0} is gone, what was left of it is cleaned up")]
    Stale(String),
    /// The number of clones makes no sense.
    #[error("{0} clones at once are not possible: give 1 to {MOST_CLONES}")]
    Count(u64),
    /// The colony is ending.
    #[error("the colony is ending")]
    Ending,
    /// The directory of names is not to be trusted.
    #[error("{} is not used for sockets: {why}", path.display())]
    Place {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The host refused something.
    #[error("cannot {action} {}: {source}", path.display())]
    Host {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A keeper does not answer.
    #[error(
        "the keeper {keeper_pid} does not answer within {seconds} s: is it stopped, or the host very busy? \
         (`kill -CONT {keeper_pid}` lets it go on, `kill -KILL {keeper_pid}` ends it and its VMs)"
    )]
    Silent {
        /// Its process.
        keeper_pid: i32,
        /// How long it was waited for.
        seconds: u64,
    },
    /// What came over a socket makes no sense.
    #[error("the colony's socket: {0}")]
    Protocol(String),
    /// The socket.
    #[error("the colony's socket: {0}")]
    Socket(#[from] io::Error),
    /// The colony.
    #[error("{0}")]
    Colony(#[from] ColonyError),
    /// The memory size.
    #[error("{0}")]
    Shape(#[from] MemoryShapeError),
    /// A kernel cannot be started.
    #[error("--kernel {}: {reason}", path.display())]
    Kernel {
        /// Its file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// What a colony answered.
    #[error("{}", .0.detail)]
    Problem(Problem),
}

/// The most clones of one request.
pub const MOST_CLONES: u64 = 64;

impl ControlError {
    /// HTTP status and stable code.
    #[must_use]
    pub fn status(&self) -> (u16, &'static str) {
        match self {
            Self::Unknown(_) => (404, "unknown-vm"),
            Self::Taken(_) => (409, "name-taken"),
            Self::NotRunning { .. } => (409, "not-running"),
            Self::NotResettable { .. } => (409, "not-resettable"),
            Self::BadName(_) => (422, "bad-name"),
            Self::Count(_) => (422, "bad-count"),
            Self::Colony(ColonyError::Limit(_)) => (409, "limit-reached"),
            Self::Colony(ColonyError::Identity(_)) => (422, "bad-identity"),
            Self::Ending => (503, "colony-ending"),
            Self::Protocol(_) => (400, "bad-request"),
            _ => (500, "failed"),
        }
    }
}

/// An error as it goes over the socket (RFC 9457).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What kind it is, for people.
    pub title: String,
    /// HTTP status.
    pub status: u16,
    /// What happened here.
    pub detail: String,
    /// What kind it is, for programs.
    pub code: String,
}

/// Whether a VM runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "state")]
pub enum VmState {
    /// It runs.
    Running,
    /// A user has paused it.
    Paused,
    /// A user has stopped it.
    Stopped,
    /// Its guest has ended, or its process.
    Ended {
        /// In which way.
        how: HowEnded,
        /// The exit status that the guest gave.
        status: Option<u32>,
        /// How it ended.
        text: String,
    },
}

impl VmState {
    /// Whether the VM has not ended: it runs or is paused.
    #[must_use]
    pub fn is_live(&self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }

    /// The state in a few words.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Running => "running".to_owned(),
            Self::Paused => "paused".to_owned(),
            Self::Stopped => "stopped".to_owned(),
            Self::Ended { how, status, text } => match (how, status) {
                (HowEnded::Exited, Some(status)) => format!("ended with {status}"),
                (HowEnded::Reset, _) => "reset".to_owned(),
                (HowEnded::Halted, _) => "halted".to_owned(),
                (HowEnded::Crashed, _) => format!("crashed: {}", first_line(text)),
                (HowEnded::Exited | HowEnded::Killed, _) => format!("ended: {}", first_line(text)),
            },
        }
    }
}

/// The rest describes a vCPU.
fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// A VM as users see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmView {
    /// Its name.
    pub name: String,
    /// Its number in its colony.
    pub id: u64,
    /// The name of the VM that it was cloned from.
    pub parent: Option<String>,
    /// Whether it runs.
    #[serde(flatten)]
    pub state: VmState,
    /// Its memory.
    pub memory_bytes: u64,
    /// Its vCPUs.
    pub cpus: u8,
    /// Its process, while it runs or is paused.
    pub pid: Option<u32>,
    /// The process of its colony.
    pub keeper_pid: u32,
    /// The file that its console output goes to.
    pub console: PathBuf,
}

/// All VMs of a colony, in the order of their numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmList {
    /// Those that have ended too.
    pub vms: Vec<VmView>,
}

/// What to fork.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForkRequest {
    /// How many clones of one cut.
    #[serde(default = "one")]
    pub count: u64,
    /// The clone's name; of several, what their names begin with.
    #[serde(default)]
    pub name: Option<String>,
}

fn one() -> u64 {
    1
}

/// A new clone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CloneView {
    /// Its name.
    pub name: String,
    /// Its number in its colony.
    pub id: u64,
    /// How long the source stood still, in microseconds.
    pub pause_us: f64,
    /// The request to the clone's vCPU entering the guest, in microseconds.
    pub call_us: f64,
    /// The file that its console output goes to.
    pub console: PathBuf,
}

/// All clones of one fork.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ForkReply {
    /// In the order of their names.
    pub clones: Vec<CloneView>,
}

/// What a VM is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateRequest {
    /// Paused, or running.
    pub state: WantedState,
}

/// A state that a VM can be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WantedState {
    /// It goes on.
    Running,
    /// It stands still.
    Paused,
}

/// A clone has returned to its cut.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResetView {
    /// Its name.
    pub name: String,
    /// Pages that got the bytes of the cut in place.
    pub restored_pages: u64,
    /// Leaves (2 MiB) that are mapped afresh.
    pub remapped_leaves: u64,
    /// The order to its process to the order to its vCPUs to run, in microseconds.
    pub reset_us: f64,
    /// The parts.
    pub stages_us: ResetStages,
}

/// The parts of a reset, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResetStages {
    /// Its vCPUs stopped.
    pub stop: f64,
    /// No transfer was under way any more.
    pub drain: f64,
    /// Its memory was that of the cut.
    pub memory: f64,
    /// Its vCPUs and devices were those of the cut.
    pub state: f64,
    /// The order to run was given.
    pub resume: f64,
}

/// A VM was stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopReply {
    /// Its name.
    pub name: String,
    /// It was the last one.
    pub is_colony_ending: bool,
}

/// A VM was given console input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputReply {
    /// How much of it found room.
    pub accepted_bytes: usize,
}

/// What is behind a lock stays usable after a panic elsewhere: each change of it is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
