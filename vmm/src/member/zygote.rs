//! The zygote: the process that a colony's members are copies of.
//!
//! To start, a process maps its binary and has the dynamic linker relocate it: half a megabyte that each
//! process would have for itself, and a millisecond. So the keeper starts one, which then makes members
//! by copying itself ([`copy_beside`]), and they share all that it has.
//!
//! A zygote has one thread, no window, no KVM VM and no userfaultfd: nothing of what a copied process
//! must not have, and nothing that belongs to an `mm`. Members make that for themselves. What it has is
//! what is the same in all of them: the board's and the arena's descriptors, `/dev/kvm`, signal handlers,
//! and what they are [confined](super::confine) to.
//!
//! # Protocol
//! First [`Setup`] with the colony's descriptors, then a [`Hatch`] for each member, with the member's end
//! of its channel. On that channel the member says [`Message::Born`] at once, or its zygote
//! [`Message::Unfit`] where there can be none. The zygote ends with its orders, and with the keeper's
//! thread that started it; so do members, which are children of the keeper. A zygote that has died is
//! replaced by the keeper; its members live on.

use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;

use super::confine::confine;
use super::messages::{GuestKind, Hatch, Message, Setup};
use super::{MemberError, serve};
use crate::ipc::spawn::{Copied, copy_beside};
use crate::ipc::{Channel, spawn};
use crate::kvm::Kvm;
use crate::window::Userfault;

/// The descriptor at which a zygote finds its channel.
pub const CHANNEL_NUMBER: RawFd = 3;

/// The argument that makes `salp` a zygote.
pub const ZYGOTE_ARGUMENT: &str = "__zygote";

/// What members are called where processes are listed.
const MEMBER_NAME: &std::ffi::CStr = c"salp-member";

/// What a member has from its zygote.
pub struct Heritage {
    /// What it is made for.
    pub setup: Setup,
    /// The board's, and the arena's.
    pub descriptors: Vec<OwnedFd>,
    /// KVM, where that is the guest's.
    pub kvm: Option<Kvm>,
}

/// Runs a zygote, and in its copies the members, until the keeper lets them go or is gone.
///
/// # Errors
/// It could not talk to its keeper.
pub fn run() -> Result<(), MemberError> {
    spawn::die_with_parent()?;
    // A terminal's Ctrl-C and timeout(1)'s SIGTERM go to the whole process group: what follows from
    // them is the keeper's to say.
    for signal in spawn::FOR_LATER {
        signal_hook::flag::register(signal, Arc::default()).map_err(MemberError::Window)?;
    }
    spawn::take_signals().map_err(MemberError::Window)?;
    let orders = Channel::from_fd(spawn::adopt(CHANNEL_NUMBER)?)?;
    let Some((setup, descriptors)) = orders.receive::<Setup>()? else { return Ok(()) };
    let heritage = prepare(setup, descriptors);
    loop {
        let Some((hatch, channel)) = orders.receive::<Hatch>()? else { return Ok(()) };
        let [channel] = <[OwnedFd; 1]>::try_from(channel)
            .map_err(|_| MemberError::Protocol("a member is asked for with its channel"))?;
        let keeper = Channel::from_fd(channel)?;
        let copied = match &heritage {
            Ok(_) => copy_beside().map_err(MemberError::from),
            Err(error) => Err(MemberError::Heir(error.to_string())),
        };
        match copied {
            Ok(Copied::Original) => {}
            Ok(Copied::Copy) => {
                drop(orders);
                return begin(heritage?, hatch, keeper);
            }
            // The keeper may have given up.
            Err(error) => drop(keeper.send(&Message::Unfit(error.to_string()), &[])),
        }
    }
}

/// Does what members may not do any more, then confines this process and them.
fn prepare(setup: Setup, descriptors: Vec<OwnedFd>) -> Result<Heritage, MemberError> {
    let kvm = match setup.guest {
        GuestKind::Kvm => Some(Kvm::open()?),
        GuestKind::Thread => None,
    };
    Userfault::open_device_ahead();
    confine(setup.confinement)?;
    Ok(Heritage { setup, descriptors, kvm })
}

/// What a copy does first.
fn begin(heritage: Heritage, hatch: Hatch, keeper: Channel) -> Result<(), MemberError> {
    spawn::die_with_parent()?;
    keeper.send(&Message::Born(rustix::process::getpid().as_raw_pid()), &[])?;
    // For those who look at processes; nothing depends on it.
    let _ = rustix::thread::set_name(MEMBER_NAME);
    serve(heritage, hatch.slot, keeper)
}
