//! What a cut saves of the engine: registers, the ring's position, what is taken and not completed,
//! which buffers are registered. Pins, plans and progress are not state: a clone makes its own, and
//! does an uncompleted request again from its beginning.

use salp_protocol::dma::{BUFFER_SLOTS, Descriptor};
use serde::{Deserialize, Serialize};

use crate::words::Gpa;

/// The registers, as the guest wrote them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// Guest-physical address of the ring.
    pub ring_base: u64,
    /// Entries of the ring, 0 before it is set.
    pub ring_entries: u64,
    /// The last tail written; everything below it has been taken.
    pub tail: u64,
    /// Descriptors completed.
    pub completed: u64,
    /// Vector and enable bit.
    pub interrupt: u64,
    /// Microseconds.
    pub delay_us: u64,
    /// Bytes per second, 0 = no limit.
    pub rate: u64,
    /// Address of the next buffer to register.
    pub buffer_base: u64,
    /// Length of the next buffer to register, in bytes.
    pub buffer_length: u64,
    /// Last error.
    pub error: u64,
}

/// A registered buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedBuffer {
    /// First byte.
    pub gpa: Gpa,
    /// Length in bytes.
    pub len_bytes: usize,
}

/// A descriptor's request, as it was read at the doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedRequest {
    /// The free-running number of its ring entry.
    pub number: u64,
    /// `operation`, `flags`, `length`, `source`, `destination`, `slot`, `reserved`, `cookie`,
    /// `padding` of the descriptor.
    descriptor: (u16, u16, u32, u64, u64, u32, u32, u64, [u64; 2]),
    /// Its slot was unregistered after the doorbell: it is pinned for itself.
    pub detached: bool,
    /// It was on a pipe: a clone cannot do it again.
    pub lost: bool,
}

impl SavedRequest {
    pub(super) fn new(number: u64, d: &Descriptor, detached: bool, lost: bool) -> Self {
        let descriptor = (
            d.operation,
            d.flags,
            d.length,
            d.source,
            d.destination,
            d.slot,
            d.reserved,
            d.cookie,
            d.padding,
        );
        Self { number, descriptor, detached, lost }
    }

    /// The descriptor, with neither result nor status.
    #[must_use]
    pub fn descriptor(&self) -> Descriptor {
        let (operation, flags, length, source, destination, slot, reserved, cookie, padding) =
            self.descriptor;
        Descriptor {
            operation,
            flags,
            length,
            source,
            destination,
            slot,
            reserved,
            cookie,
            result: 0,
            status: 0,
            padding,
        }
    }
}

/// The engine at a cut.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DmaState {
    /// The registers.
    pub registers: Registers,
    /// Requests taken and not completed, in the order of their numbers.
    pub requests: Vec<SavedRequest>,
    /// Registered buffers by slot.
    pub buffers: [Option<SavedBuffer>; BUFFER_SLOTS],
}
