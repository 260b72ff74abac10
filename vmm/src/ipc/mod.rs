//! How salp's processes reach each other: messages, shared words, and the processes themselves.
//!
//! - [`Channel`]: whole messages with descriptors, over a socket pair.
//! - [`SharedMemory`]: words that several processes see, and [`futex`] to wait for one to change.
//! - [`bus_error`]: `SIGBUS`, which whoever touches lost memory gets.
//! - [`heap`]: that an idle process does not keep memory that it once needed.
//! - [`slices`]: that whoever is woken does not wait long for a processor.
//! - [`spawn`]: another process of the same binary, without ever forking a multi-threaded one.
//!
//! A process can be killed at any instruction, so nothing here is a lock between processes: a shared
//! word has one writer, a channel ends when its peer does, and a [`Child`](spawn::Child) has a
//! descriptor that becomes readable when the process is gone.

pub mod bus_error;
pub mod channel;
pub mod futex;
pub mod heap;
pub mod shared;
pub mod slices;
pub mod spawn;

pub use channel::Channel;
pub use shared::SharedMemory;

use std::io;
use std::time::Duration;

use crate::failure::Injected;

/// Why plumbing between processes failed.
#[derive(Debug, thiserror::Error)]
pub enum IpcError {
    /// The host refused a call.
    #[error("cannot {action}: {source}")]
    Host {
        /// What was being done.
        action: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The other end of a channel is closed, so a message cannot be delivered.
    #[error("the peer has closed its end of the channel")]
    Closed,
    /// Nothing happened within the time the caller allowed.
    #[error("cannot {action} within {} ms", .waited.as_millis())]
    TimedOut {
        /// What was being done.
        action: &'static str,
        /// The time allowed.
        waited: Duration,
    },
    /// A message cannot be turned into bytes, or bytes into the message expected.
    #[error("a message of type {kind} ({len_bytes} bytes) does not encode or decode: {source}")]
    Encoding {
        /// The Rust type sent or expected.
        kind: &'static str,
        /// Length of the encoded message; 0 while encoding.
        len_bytes: usize,
        /// What the codec said.
        source: postcard::Error,
    },
    /// More descriptors or bytes than one message can carry.
    #[error("a message with {count} {what} is above the limit of {limit}")]
    TooMuch {
        /// "descriptors" or "bytes".
        what: &'static str,
        /// How many.
        count: usize,
        /// How many are possible.
        limit: usize,
    },
    /// The peer does not keep to the protocol of [`channel`], or a descriptor is not what it should be.
    #[error("the peer's message or descriptor is malformed: {reason}")]
    Malformed {
        /// What is wrong with it.
        reason: &'static str,
    },
}

impl From<Injected> for IpcError {
    fn from(injected: Injected) -> Self {
        Self::host("go on", injected)
    }
}

impl IpcError {
    /// A refused call, from whatever the call returned.
    fn host(action: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Host { action, source: source.into() }
    }
}
