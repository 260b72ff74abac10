//! The devices of a microVM, and what they need from the rest of salp.
//!
//! Nothing here knows KVM or the memory manager: a device sees guest memory as a [`GuestRam`], the
//! processor as an [`InterruptLine`], and a cut as somebody who holds the [`gate::CompletionGate`].
//!
//! | module | what |
//! |---|---|
//! | [`gate`] | holds back completions while a cut is taken |
//! | [`memory`] | pinned guest memory, and every move of bytes to or from it |
//! | [`backing`] | layered storage: a clone sees what its source had at the cut, never more |
//! | [`dma`] | the DMA engine |
//! | [`identity`] | who this VM is |
//! | [`serial`], [`exit`] | the 16550 and the exit port |
//! | [`bus`] | which port or address belongs to whom |
//!
//! # Locks
//! Order: gate -> a device's own lock; gate -> backing. A device's own lock is never held while
//! guest memory is touched, a page is pinned, or the gate is entered: each of these may wait.

pub mod backing;
pub mod bus;
pub mod dma;
pub mod exit;
pub mod gate;
pub mod identity;
pub mod memory;
pub mod serial;
#[cfg(test)]
mod testing;

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::words::{Gfn, Gpa};

pub use memory::PinnedRange;

/// What a device will do with the memory that it pins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The device reads guest memory.
    Read,
    /// The device reads and writes guest memory.
    ReadWrite,
}

/// Why guest memory could not be used.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// Some of the range is not guest memory: the guest's fault.
    #[error("{gpa}, {len_bytes} bytes: {gfn} is not guest memory")]
    OutOfRange {
        /// First byte of the range.
        gpa: Gpa,
        /// Length of the range.
        len_bytes: usize,
        /// The first page that is not guest memory.
        gfn: Gfn,
    },
    /// The host could not provide the page.
    #[error("{gfn}: {reason}")]
    Host {
        /// The page.
        gfn: Gfn,
        /// What went wrong.
        reason: String,
    },
}

/// Guest memory as a device sees it. May be called from any thread; all of it may wait for pages.
pub trait GuestRam: Send + Sync {
    /// Pins the pages of `[gpa, gpa + len_bytes)`: they become exclusive to this VM and keep their
    /// physical place until the pin is dropped.
    ///
    /// # Errors
    /// [`RamError`], naming the page.
    fn pin(&self, gpa: Gpa, len_bytes: usize, access: Access) -> Result<Box<dyn PinnedRange>, RamError>;

    /// Reads a few bytes without a pin (a descriptor); the guest may be writing them.
    ///
    /// # Errors
    /// [`RamError`], naming the page.
    fn read(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), RamError>;

    /// Writes a few bytes without a pin.
    ///
    /// # Errors
    /// [`RamError`], naming the page.
    fn write(&self, gpa: Gpa, from: &[u8]) -> Result<(), RamError>;

    /// Stores 4 bytes with release order (a completion's status): a guest that sees them sees all
    /// that was stored before. `gpa` is a multiple of 4.
    ///
    /// # Errors
    /// [`RamError`], naming the page.
    fn store_u32(&self, gpa: Gpa, value: u32) -> Result<(), RamError>;
}

/// How a device interrupts the guest.
pub trait InterruptLine: Send + Sync {
    /// Raises `vector`. It is called inside the [`gate::CompletionGate`], so it must not wait for a
    /// vCPU (one that is stopped for a cut never comes).
    fn raise(&self, vector: u8);
}

/// Locks a mutex whose data no panic can leave half-changed (its holders do not panic).
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
