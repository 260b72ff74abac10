//! The zygote: the process that a colony's members are copies of.
//!
//! To start, a process maps its binary and has the dynamic linker relocate it: half a megabyte that each
//! process would have for itself, and a millisecond. So the keeper starts one, which then makes members
//! by copying itself ([`copy_beside`]), and they share all that it has.
//!
//! A zygote has one thread, no window, no KVM VM and no userfaultfd: nothing of what a copied process
//! must not have, and nothing that belongs to an `mm`. Members make that for themselves. What it may have
//! is what is the same in all of them: the board's and the arena's descriptors, KVM's, signal handlers.
//!
//! # Protocol
//! First [`Setup`] with the colony's descriptors, then a [`Hatch`] for each member, with the member's end
//! of its channel. On that channel the member says [`Message::Born`] at once, or its zygote
//! [`Message::Unfit`] where there can be none. The zygote ends with its orders, and with the keeper's
//! thread that started it; so do members, which are children of the keeper. A zygote that has died is
//! replaced by the keeper; its members live on.

use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;

use super::messages::{Hatch, Message, Setup};
use super::{MemberError, serve};
use crate::ipc::spawn::{Copied, copy_beside};
use crate::ipc::{Channel, spawn};

/// The descriptor at which a zygote finds its channel.
pub const CHANNEL_NUMBER: RawFd = 3;

/// The argument that makes `salp` a zygote.
pub const ZYGOTE_ARGUMENT: &str = "__zygote";

/// What members are called where processes are listed.
const MEMBER_NAME: &std::ffi::CStr = c"salp-member";

/// Runs a zygote, and in its copies the members, until the keeper lets them go or is gone.
///
/// # Errors
/// It could not talk to its keeper.
pub fn run() -> Result<(), MemberError> {
    spawn::die_with_parent()?;
    // A terminal's Ctrl-C and timeout(1)'s SIGTERM go to the whole process group: what follows from
    // them is the keeper's to say.
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::default()).map_err(MemberError::Window)?;
    }
    let orders = Channel::from_fd(spawn::adopt(CHANNEL_NUMBER)?)?;
    let Some((setup, descriptors)) = orders.receive::<Setup>()? else { return Ok(()) };
    loop {
        let Some((hatch, channel)) = orders.receive::<Hatch>()? else { return Ok(()) };
        let [channel] = <[OwnedFd; 1]>::try_from(channel)
            .map_err(|_| MemberError::Protocol("a member is asked for with its channel"))?;
        let keeper = Channel::from_fd(channel)?;
        match copy_beside() {
            Ok(Copied::Original) => {}
            Ok(Copied::Copy) => {
                drop(orders);
                return begin(setup, hatch, descriptors, keeper);
            }
            // The keeper may have given up.
            Err(error) => drop(keeper.send(&Message::Unfit(error.to_string()), &[])),
        }
    }
}

/// What a copy does first.
fn begin(setup: Setup, hatch: Hatch, descriptors: Vec<OwnedFd>, keeper: Channel) -> Result<(), MemberError> {
    spawn::die_with_parent()?;
    keeper.send(&Message::Born(rustix::process::getpid().as_raw_pid()), &[])?;
    // For those who look at processes; nothing depends on it.
    let _ = rustix::thread::set_name(MEMBER_NAME);
    serve(setup, hatch.slot, descriptors, keeper)
}
