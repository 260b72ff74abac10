//! The driver of the DMA engine ([`salp_protocol::dma`]): its registers and its ring.
//!
//! [`Engine::submit`] takes the ring's next entry, [`Engine::ring_doorbell`] hands over all that was
//! submitted, [`Engine::take_completion`] frees an entry. Completions come in any order; an entry
//! that was not taken back yet makes `submit` wait.
#![expect(unsafe_code, reason = "device registers are memory-mapped")]

use core::arch::asm;
use core::mem::offset_of;

use salp_protocol::dma::{Descriptor, MAGIC, register, status};
use salp_protocol::layout;

use crate::memory::{PAGE_BYTES, Supply, load, store};

/// Most entries of the ring here.
const MAX_ENTRIES: usize = 256;
const DESCRIPTOR_BYTES: u64 = size_of::<Descriptor>() as u64;

/// Writes the register at offset `register`.
pub(crate) fn write_register(register: u64, value: u64) {
    // SAFETY: the loader maps the device's page at its own address; nothing of Rust is there. The
    // device may read and write memory (no `nomem`).
    unsafe {
        asm!("mov [{}], {}", in(reg) layout::DMA_REGISTERS.wrapping_add(register), in(reg) value,
            options(nostack));
    }
}

/// Reads the register at offset `register`.
pub(crate) fn read_register(register: u64) -> u64 {
    let value;
    // SAFETY: as for `write_register`.
    unsafe {
        asm!("mov {}, [{}]", out(reg) value,
            in(reg) layout::DMA_REGISTERS.wrapping_add(register), options(nostack));
    }
    value
}

/// What one descriptor asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) operation: u16,
    pub(crate) flags: u16,
    pub(crate) length: u32,
    pub(crate) source: u64,
    pub(crate) destination: u64,
    pub(crate) slot: u32,
    pub(crate) cookie: u64,
}

/// How a request ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Completion {
    pub(crate) status: u32,
    pub(crate) length: u32,
    pub(crate) cookie: u64,
}

/// Why the engine cannot be used: a register write was refused, or there is none.
#[derive(Debug)]
#[expect(dead_code, reason = "the fields are for the printed text")]
pub(crate) enum EngineError {
    Absent { identity: u64 },
    OutOfMemory,
    Refused { register: u64, value: u64, error: u64 },
}

/// The engine with a ring of its own.
#[derive(Debug)]
pub(crate) struct Engine {
    ring: u64,
    entries: u64,
    /// Descriptors written, and those that the engine was told of.
    tail: u64,
    rung: u64,
    taken: [bool; MAX_ENTRIES],
}

impl Engine {
    /// Finds the engine and gives it a ring of `entries`, a power of two up to 256.
    pub(crate) fn set_up(supply: &mut Supply, entries: u64) -> Result<Self, EngineError> {
        assert!(entries <= MAX_ENTRIES as u64 && entries.is_power_of_two(), "{entries} entries");
        let identity = read_register(register::IDENTITY);
        if identity != MAGIC {
            return Err(EngineError::Absent { identity });
        }
        let pages = (entries * DESCRIPTOR_BYTES).div_ceil(PAGE_BYTES);
        let ring = supply.take_contiguous(pages).ok_or(EngineError::OutOfMemory)?;
        configure(register::RING_BASE, ring)?;
        configure(register::RING_ENTRIES, entries)?;
        Ok(Self { ring, entries, tail: 0, rung: 0, taken: [false; MAX_ENTRIES] })
    }

    /// Writes the next descriptor and returns its entry; `None` while that entry is not free.
    pub(crate) fn submit(&mut self, request: &Request) -> Option<usize> {
        let entry = usize::try_from(self.tail % self.entries).ok()?;
        if self.taken[entry] {
            return None;
        }
        let at = self.address(entry);
        let head =
            u64::from(request.operation) | u64::from(request.flags) << 16 | u64::from(request.length) << 32;
        store(at, head);
        store(at + offset_of!(Descriptor, source) as u64, request.source);
        store(at + offset_of!(Descriptor, destination) as u64, request.destination);
        store(at + offset_of!(Descriptor, slot) as u64, u64::from(request.slot));
        store(at + offset_of!(Descriptor, cookie) as u64, request.cookie);
        store(at + OUTCOME, u64::from(status::PENDING) << 32);
        self.taken[entry] = true;
        self.tail += 1;
        Some(entry)
    }

    /// Hands over what was submitted since the last time.
    pub(crate) fn ring_doorbell(&mut self) {
        if self.rung != self.tail {
            write_register(register::DOORBELL, self.tail);
            self.rung = self.tail;
        }
    }

    /// The outcome of `entry` once it is completed; the entry is free then.
    pub(crate) fn take_completion(&mut self, entry: usize) -> Option<Completion> {
        let at = self.address(entry);
        // One load for both: the engine stores the length before the status.
        let outcome = load(at + OUTCOME);
        let (length, status) = (outcome as u32, (outcome >> 32) as u32);
        if status == status::PENDING {
            return None;
        }
        self.taken[entry] = false;
        let cookie = load(at + offset_of!(Descriptor, cookie) as u64);
        Some(Completion { status, length, cookie })
    }

    /// Descriptors submitted since the ring was set.
    pub(crate) fn submitted(&self) -> u64 {
        self.tail
    }

    fn address(&self, entry: usize) -> u64 {
        self.ring + entry as u64 * DESCRIPTOR_BYTES
    }
}

/// Writes a register and asks whether the engine took it.
pub(crate) fn configure(register: u64, value: u64) -> Result<(), EngineError> {
    write_register(register, value);
    match read_register(register::ERROR) {
        salp_protocol::dma::error::NONE => Ok(()),
        error => Err(EngineError::Refused { register, value, error }),
    }
}

/// Offset of the word that holds `result` (low) and `status` (high).
const OUTCOME: u64 = offset_of!(Descriptor, result) as u64;

// The words that `submit` writes.
const _: () = {
    assert!(offset_of!(Descriptor, operation) == 0 && offset_of!(Descriptor, flags) == 2);
    assert!(offset_of!(Descriptor, length) == 4);
    assert!(offset_of!(Descriptor, reserved) == offset_of!(Descriptor, slot) + 4);
    assert!(offset_of!(Descriptor, status) == offset_of!(Descriptor, result) + 4);
    assert!(offset_of!(Descriptor, result) % 8 == 0);
};
