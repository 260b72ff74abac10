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
//! | [`services`] | the publishing threads |
//! | [`thread_guest`] | a host thread as the guest |
//! | [`life`] | a VM from its role to its end |
//!
//! A member never forks, and a panic in one of its threads does not abort it: others may depend on
//! its pages.

pub mod life;
pub mod machine;
pub mod mailbox;
pub mod messages;
pub mod ram;
pub mod services;
pub mod shell;
pub mod thread_guest;

use std::os::fd::RawFd;
use std::sync::Arc;

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
    /// The DMA engine's backing.
    #[error("{0}")]
    Backing(#[from] crate::devices::backing::BackingError),
    /// The serial port.
    #[error("{0}")]
    Serial(#[from] crate::devices::serial::SerialStateError),
    /// The keeper asked for something that makes no sense now.
    #[error("{0}")]
    Protocol(&'static str),
}

/// Runs a member until its keeper lets it go or is gone.
///
/// # Errors
/// It could not talk to its keeper.
pub fn run() -> Result<(), MemberError> {
    // A terminal's Ctrl-C goes to the whole process group: what follows from it is the keeper's to say.
    let ignored = signal_hook::flag::register(signal_hook::consts::SIGINT, Arc::default());
    ignored.map_err(MemberError::Window)?;
    let keeper = Arc::new(Channel::from_fd(spawn::adopt(CHANNEL_NUMBER)?)?);
    let Some((setup, descriptors)) = keeper.receive::<Setup>()? else { return Ok(()) };
    let shell = match Shell::new(setup, descriptors, Arc::clone(&keeper)) {
        Ok(shell) => shell,
        Err(error) => {
            keeper.send(&Message::Unfit(error.to_string()), &[])?;
            return Ok(());
        }
    };
    keeper.send(&Message::Ready, &[])?;
    let mut member = Member::new(shell);
    while let Some((Request { number, order }, descriptors)) = keeper.receive::<Request>()? {
        if matches!(order, Order::Exit) {
            keeper.send(&Message::Answer { number, result: Ok(Reply::Done) }, &[])?;
            break;
        }
        let (result, files) = match member.obey(order, descriptors) {
            Ok((reply, files)) => (Ok(reply), files),
            Err(error) => (Err(error.to_string()), Vec::new()),
        };
        let files: Vec<_> = files.iter().map(std::os::fd::AsFd::as_fd).collect();
        keeper.send(&Message::Answer { number, result }, &files)?;
        member.after();
    }
    Ok(())
}
