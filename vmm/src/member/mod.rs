//! A member: the process of one VM, and its life.
//!
//! A member is made ahead as a [`Shell`], gets a role ([`Order::Boot`], [`Order::Become`]), runs,
//! is cut, ends, and stays as the image of what others need until the keeper lets it go. It serves
//! one keeper over one channel; when that closes, it ends at once.
//!
//! | module | what |
//! |---|---|
//! | [`messages`] | what keeper and member say to each other |
//! | [`shell`] | what is made ahead |
//! | [`machine`], [`mailbox`] | exits, devices, calls of the guest |
//! | [`ram`] | memory as the devices see it |
//! | [`extents`] | the files behind the storage |
//! | [`start`] | what a first VM starts with: the built-in guest, or another kernel |
//! | [`services`] | the publishing threads |
//! | [`thread_guest`] | a host thread as the guest |
//! | `watch` | sends parts of console lines on, notices a guest that may have halted |
//! | [`life`], `cutting` | a VM from its role to its end; a cut of it |
//! | `wiring` | interrupt lines and console |
//!
//! A member never forks, and a panic in one of its threads does not abort it: others may depend on
//! its pages.

mod cutting;
mod extents;
pub mod life;
pub mod machine;
pub mod mailbox;
pub mod messages;
pub mod ram;
mod reset;
pub mod services;
pub mod shell;
mod start;
pub mod thread_guest;
mod watch;
mod wiring;

use std::os::fd::{AsFd as _, RawFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::Signal;
use thiserror::Error;

use self::life::Member;
use self::messages::{Message, Order, Reply, Request, Setup};
use self::shell::Shell;
use crate::arena_files::ArenaError;
use crate::ipc::shared::SharedMemoryError;
use crate::ipc::{Channel, IpcError, spawn};
use crate::kvm::KvmError;
use crate::space::SpaceError;

/// The descriptor at which a member finds its channel.
pub const CHANNEL_NUMBER: RawFd = 3;
/// The name in the arena of the extents that a member's process writes: unique in a colony.
#[must_use]
pub fn extents_name(process: u32, slot: u32) -> String {
    format!("extents-{process}-{slot}")
}

/// The argument that makes `salp` a member.
pub const MEMBER_ARGUMENT: &str = "__member";

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
    /// A snapshot could not be coded.
    #[error("a snapshot cannot be coded: {0}")]
    Snapshot(#[from] postcard::Error),
    /// The keeper asked for something that makes no sense now.
    #[error("{0}")]
    Protocol(&'static str),
}

/// Runs a member until its keeper lets it go or is gone.
///
/// # Errors
/// It could not talk to its keeper.
pub fn run() -> Result<(), MemberError> {
    // A terminal's Ctrl-C and timeout(1)'s SIGTERM go to the whole process group: what follows from
    // them is the keeper's to say.
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::default()).map_err(MemberError::Window)?;
    }
    let keeper = Arc::new(Channel::from_fd(spawn::adopt(CHANNEL_NUMBER)?)?);
    end_with(&keeper).map_err(MemberError::Window)?;
    let Some((setup, descriptors)) = keeper.receive::<Setup>()? else { return Ok(()) };
    let shell = match Shell::new(setup, descriptors, Arc::clone(&keeper)) {
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
        member.serve_guest(&keeper)?;
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
        keeper.send(&Message::Answer { number, result }, &files)?;
        member.after();
    }
}

/// Ends this process when the keeper's end of the channel closes, whatever the process is at: it may be
/// waiting for another member, which is gone too, and nobody is left to say so.
fn end_with(keeper: &Arc<Channel>) -> std::io::Result<()> {
    let keeper = Arc::clone(keeper);
    let watch = move || {
        loop {
            // No event is asked for: the end is told all the same.
            let mut ends = [PollFd::from_borrowed_fd(keeper.as_fd(), PollFlags::empty())];
            match poll(&mut ends, None) {
                Ok(_) | Err(Errno::INTR) if ends[0].revents().is_empty() => {}
                Ok(_) => break,
                Err(error) => {
                    tracing::error!(%error, "the keeper's end cannot be watched");
                    return;
                }
            }
        }
        if let Err(error) = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL) {
            tracing::error!(%error, "the end after the keeper's failed");
        }
    };
    std::thread::Builder::new().name("keeper watch".to_owned()).spawn(watch).map(|_| ())
}
