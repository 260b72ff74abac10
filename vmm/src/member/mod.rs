//! A member: the process of one VM, and its life.
//!
//! A member is a copy of its colony's [`zygote`]. It is made ahead as a [`Shell`], gets a role
//! ([`Order::Boot`], [`Order::Become`]), runs, is cut, ends, and stays as the image of what others need
//! until the keeper lets it go. It serves one keeper over one channel; when that closes, it ends at once.
//!
//! | module | what |
//! |---|---|
//! | [`messages`] | what keeper and member say to each other |
//! | [`zygote`] | the process that members are copies of |
//! | [`confine`] | the system calls that they may make |
//! | [`shell`] | what is made ahead |
//! | [`machine`], [`mailbox`] | exits, devices, calls of the guest |
//! | [`ram`] | memory as the devices see it |
//! | `outside` | devices outside, by order: their pins, loads and stores |
//! | [`extents`] | the files behind the storage |
//! | [`start`] | what a first VM starts with: the built-in guest, or another kernel |
//! | [`services`] | the publishing threads |
//! | [`thread_guest`] | a host thread as the guest |
//! | `watch` | what follows from nothing happening: parts of console lines, a guest that may have halted |
//! | [`life`], `cutting` | a VM from its role to its end; a cut of it |
//! | `wiring` | interrupt lines and console |
//!
//! # Threads
//! An idle VM has three: this module's loop, which is also the watch, a vCPU, and one that resolves
//! faults. The others start when they are first needed: who answers clones with the first cut, who
//! publishes when there is something to publish, the DMA engine's with its first transfer.
//!
//! A member never forks, and a panic in one of its threads does not abort it: others may depend on
//! its pages.

pub mod confine;
mod cutting;
mod extents;
pub mod life;
pub mod machine;
pub mod mailbox;
pub mod messages;
mod outside;
pub mod ram;
mod reset;
pub mod services;
pub mod shell;
mod start;
pub mod thread_guest;
mod watch;
mod wiring;
pub mod zygote;

use std::sync::Arc;

use thiserror::Error;

use self::life::Member;
use self::messages::{Message, Order, Reply, Request};
use self::shell::Shell;
use self::zygote::Heritage;
use crate::arena_files::ArenaError;
use crate::failure::Injected;
use crate::ipc::shared::SharedMemoryError;
use crate::ipc::{Channel, IpcError, spawn};
use crate::kvm::KvmError;
use crate::space::SpaceError;

/// The name in the arena of the extents that a member's process writes: unique in a colony.
#[must_use]
pub fn extents_name(process: u32, slot: u32) -> String {
    format!("extents-{process}-{slot}")
}

/// Why a member could not do something.
#[derive(Debug, Error)]
pub enum MemberError {
    /// The channel.
    #[error("{0}")]
    Ipc(#[from] IpcError),
    /// Shared memory.
    #[error("{0}")]
    Shared(#[from] SharedMemoryError),
    /// Descriptors that were handed over.
    #[error("{0}")]
    Spawn(#[from] spawn::SpawnError),
    /// The arena.
    #[error("{0}")]
    Arena(#[from] ArenaError),
    /// The window.
    #[error("{0}")]
    Window(std::io::Error),
    /// KVM.
    #[error("{0}")]
    Kvm(#[from] KvmError),
    /// The space.
    #[error("{0}")]
    Space(#[from] SpaceError),
    /// The guest cannot be loaded.
    #[error("{0}")]
    Boot(#[from] crate::boot::BootError),
    /// The image cannot be loaded.
    #[error("{0}")]
    Image(#[from] crate::boot::ImageError),
    /// The DMA engine's backing.
    #[error("{0}")]
    Backing(#[from] crate::devices::backing::BackingError),
    /// The serial port.
    #[error("{0}")]
    Serial(#[from] crate::devices::serial::SerialStateError),
    /// The identity device.
    #[error("{0}")]
    Identity(#[from] crate::devices::identity::IdentityError),
    /// A snapshot could not be coded.
    #[error("a snapshot cannot be coded: {0}")]
    Snapshot(#[from] postcard::Error),
    /// The system calls that are allowed cannot be limited.
    #[error("a vm's process cannot be confined (`--seccomp off` does without): {0}")]
    Confinement(String),
    /// What members have from their zygote could not be had.
    #[error("{0}")]
    Heir(String),
    /// The keeper asked for something that makes no sense now.
    #[error("{0}")]
    Protocol(&'static str),
}

impl From<Injected> for MemberError {
    fn from(injected: Injected) -> Self {
        Self::Window(injected.into())
    }
}

/// Runs a member until its keeper lets it go. The end of the keeper is the end of the process, whatever it
/// is at: it may be waiting for another member, which is gone too.
fn serve(heritage: Heritage, slot: u32, keeper: Channel) -> Result<(), MemberError> {
    let keeper = Arc::new(keeper);
    let shell = match Shell::new(heritage, slot, Arc::clone(&keeper)) {
        Ok(shell) => shell,
        Err(error) => {
            keeper.send(&Message::Unfit(error.to_string()), &[])?;
            return Ok(());
        }
    };
    keeper.send(&Message::Ready, &[])?;
    // Never taken apart here: closing a KVM VM waits for whoever waits in a fault, and nobody might
    // resolve that any more. The kernel takes a process apart in the right order.
    let member = Box::leak(Box::new(Member::new(shell)));
    loop {
        member.await_order(&keeper)?;
        let Some((Request { number, order }, descriptors)) = keeper.receive::<Request>()? else {
            return Ok(());
        };
        if matches!(order, Order::Exit) {
            keeper.send(&Message::Answer { number, result: Ok(Reply::Done) }, &[])?;
            // Nothing of this process is needed.
            std::process::exit(0);
        }
        let (result, files) = match member.obey(order, descriptors) {
            Ok((reply, files)) => (Ok(reply), files),
            Err(error) => (Err(error.to_string()), Vec::new()),
        };
        let files: Vec<_> = files.iter().map(std::os::fd::AsFd::as_fd).collect();
        if let Err(error) = keeper.send_patiently(&Message::Answer { number, result }, &files) {
            // The keeper must not take for undone what was done, nor wait.
            member.take_back();
            let result = Err(format!("its answer could not be sent: {error}"));
            keeper.send(&Message::Answer { number, result }, &[])?;
        }
        member.after();
    }
}
