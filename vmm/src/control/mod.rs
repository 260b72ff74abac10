//! Control of running colonies: names, consoles, and one socket per colony that answers to other
//! processes of the same user.
//!
//! # Protocol
//! HTTP/1.1 over a Unix stream socket, bodies in JSON, errors as `application/problem+json` with a
//! stable `code`. `curl --unix-socket` speaks it. The document of all requests is made from the code
//! ([`routes::document`]): `GET /v1/openapi.json`.
//!
//! A connection may be used again; whoever has stopped a colony's last VM finds its connection closed
//! when nothing of the colony is left.
//!
//! A clone whose guest has ended is kept for a reset, [`KEPT_LIMIT`](service::KEPT_LIMIT) of them, as long
//! as another VM of the colony runs or is paused.
//!
//! | module | what |
//! |---|---|
//! | [`error`] | why something could not be done |
//! | [`resources`] | what goes over the socket |
//! | [`config`] | what a VM is to be, as a document |
//! | [`place`] | the directory of names and sockets; what killed colonies left |
//! | [`console`] | a console's file and its followers |
//! | [`terminal`] | the user's terminal, and what is typed at it |
//! | [`events`] | what happens, for those who listen |
//! | [`registry`] | the VMs of this colony, as users know them |
//! | [`service`] | a colony in its keeper's process |
//! | `memory`, `stats`, `metrics` | the memory map and figures, for users and for Prometheus |
//! | `actions` | what is done for users |
//! | [`routes`] | which request does what |
//! | `extract`, `streams`, `problems` | its parts: what is asked, answers that go on, what can go wrong |
//! | `server` | its end of the socket |
//! | [`client`] | the other end |
//!
//! # Threads
//! One serves all connections; whatever waits for a VM is done by one of a pool, which goes home after a
//! second. One notes signals. All wait without a timer, so an idle colony uses no processor. The colony's
//! main thread does what follows from events.
//!
//! # Known holes
//! Names and console files of VMs that have ended stay until they are removed or their colony ends, and a
//! console file has no limit. What is no HTTP at all is refused by the library, without a description (400,
//! 414, 431).

mod actions;
pub mod client;
pub mod config;
pub mod console;
pub mod error;
pub mod events;
mod extract;
mod memory;
mod metrics;
pub mod place;
mod problems;
pub mod registry;
pub mod resources;
pub mod routes;
mod server;
pub mod service;
mod stats;
mod streams;
pub mod terminal;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use self::error::{ControlError, Problem};
pub use self::resources::{
    ClonePages, CloneView, ForkReply, ForkRequest, InputReply, MissingClone, ResetStages, ResetView,
    StateRequest, StopReply, VmList, VmState, VmView, WantedState,
};

/// The most clones of one request.
pub const MOST_CLONES: u64 = 64;

/// What is behind a lock stays usable after a panic elsewhere: each change of it is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
