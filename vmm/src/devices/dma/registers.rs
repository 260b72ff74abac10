//! The engine's face to the guest: register reads and writes, the doorbell, buffer slots.
//!
//! Everything here runs on a vCPU's thread. A value that is not allowed changes nothing but the
//! error register.

use std::mem::replace;

use salp_protocol::dma::{BUFFER_SLOTS, MAGIC, error, flag, register};

use super::request::{DESCRIPTOR_BYTES, decode};
use super::workers::Job;
use super::{BackingKind, Core, DmaEngine, InFlight, SavedBuffer, Slot, entry};
use crate::devices::memory::Buffer;
use crate::devices::{Access, lock};
use crate::words::{Gpa, index};

const MAX_RING_ENTRIES: u64 = 1024;
const MAX_DELAY_US: u64 = 10_000_000;
const MAX_BUFFER_BYTES: u64 = 16 << 20;
const PAGE: u64 = 4096;
/// Vector and enable bit.
const INTERRUPT_BITS: u64 = 0x1ff;

impl DmaEngine {
    /// A guest's load of `into.len()` bytes at `offset` of the register page. Loads of a size or
    /// alignment that the engine does not know read 0.
    pub fn mmio_read(&self, offset: u64, into: &mut [u8]) {
        into.fill(0);
        let register = offset & !7;
        match (into.len(), offset & 7) {
            (8, 0) => into.copy_from_slice(&self.read_register(register).to_le_bytes()),
            (4, 0) => into.copy_from_slice(&self.read_register(register).to_le_bytes()[..4]),
            // The low half of an error is all of it, and only its reader clears it.
            (4, 4) if register != register::ERROR => {
                into.copy_from_slice(&self.read_register(register).to_le_bytes()[4..]);
            }
            _ => {}
        }
    }

    /// A guest's store of `from` at `offset` of the register page. Stores of a size or alignment
    /// that the engine does not know are ignored.
    pub fn mmio_write(&self, offset: u64, from: &[u8]) {
        if self.shared.stopped() {
            return;
        }
        let register = offset & !7;
        if let Ok(value) = <[u8; 8]>::try_from(from)
            && offset == register
        {
            return self.write_register(register, u64::from_le_bytes(value));
        }
        let Ok(half) = <[u8; 4]>::try_from(from) else {
            return;
        };
        let mut value = self.written(register).to_le_bytes();
        match offset & 7 {
            0 => value[..4].copy_from_slice(&half),
            4 => value[4..].copy_from_slice(&half),
            _ => return,
        }
        self.write_register(register, u64::from_le_bytes(value));
    }

    /// What half a write is merged with.
    fn written(&self, register: u64) -> u64 {
        let registers = lock(&self.shared.core).registers;
        match register {
            register::RING_BASE => registers.ring_base,
            register::DOORBELL => registers.tail,
            register::RATE => registers.rate,
            register::BUFFER_BASE => registers.buffer_base,
            // The others' values fit in the low half.
            _ => 0,
        }
    }

    fn read_register(&self, register: u64) -> u64 {
        let registers = &mut lock(&self.shared.core).registers;
        match register {
            register::IDENTITY => MAGIC,
            register::RING_BASE => registers.ring_base,
            register::RING_ENTRIES => registers.ring_entries,
            register::DOORBELL => registers.tail,
            register::COMPLETED => registers.completed,
            register::INTERRUPT => registers.interrupt,
            register::DELAY_US => registers.delay_us,
            register::RATE => registers.rate,
            register::BUFFER_BASE => registers.buffer_base,
            register::BUFFER_LENGTH => registers.buffer_length,
            register::ERROR => replace(&mut registers.error, error::NONE),
            register::BACKING_BYTES => match &self.shared.backing {
                BackingKind::Storage(backing) => backing.bytes(),
                BackingKind::Pipe(..) | BackingKind::Lost => 0,
            },
            _ => 0,
        }
    }

    fn write_register(&self, register: u64, value: u64) {
        let result = match register {
            register::DOORBELL => self.ring_doorbell(value),
            register::BUFFER_REGISTER => self.register_buffer(value),
            register::BUFFER_UNREGISTER => self.unregister_buffer(value),
            _ => write_plain(&mut lock(&self.shared.core), register, value),
        };
        if let Err(error) = result {
            lock(&self.shared.core).registers.error = error;
        }
    }

    /// Takes the descriptors up to `tail`.
    fn ring_doorbell(&self, tail: u64) -> Result<(), u64> {
        let _ringing = lock(&self.doorbell);
        let (registers, count) = {
            let mut core = lock(&self.shared.core);
            let registers = core.registers;
            // A guest may see a status before it is counted, and use the entry again at once.
            let finished = registers.completed.wrapping_add(core.storing);
            let count = tail.wrapping_sub(registers.tail);
            let outstanding = tail.wrapping_sub(finished);
            if count > registers.ring_entries || outstanding > registers.ring_entries {
                return Err(error::VALUE);
            }
            core.registers.tail = tail;
            (registers, count)
        };
        if count > 0
            && let Err(error) = self.ensure_threads()
        {
            // The requests wait for the next doorbell's attempt.
            tracing::error!(%error, "the DMA engine cannot start its threads");
        }
        let mut result = Ok(());
        for n in 0..count {
            let number = registers.tail.wrapping_add(n);
            let mut bytes = [0; DESCRIPTOR_BYTES];
            let read =
                entry(&registers, number).is_some_and(|gpa| self.shared.ram.read(gpa, &mut bytes).is_ok());
            if read {
                self.take(number, &bytes);
            } else {
                // There is no place for a status; counting it keeps the ring going.
                let mut core = lock(&self.shared.core);
                core.registers.completed = core.registers.completed.wrapping_add(1);
                result = Err(error::VALUE);
            }
        }
        result
    }

    fn take(&self, number: u64, bytes: &[u8; DESCRIPTOR_BYTES]) {
        let descriptor = decode(bytes);
        let mut core = lock(&self.shared.core);
        let registered = descriptor.flags & flag::REGISTERED != 0;
        let buffer = match core.slots.get(index(descriptor.slot.into())) {
            Some(Slot::Ready(buffer)) if registered => Some(buffer.clone()),
            _ => None,
        };
        let request = InFlight { descriptor, buffer, detached: false, lost: false };
        core.in_flight.insert(number, request);
        if core.live {
            drop(core);
            self.shared.queue(Job::Prepare(number));
        }
    }

    fn register_buffer(&self, slot: u64) -> Result<(), u64> {
        let (slot, wanted) = {
            let mut core = lock(&self.shared.core);
            let (base, length) = (core.registers.buffer_base, core.registers.buffer_length);
            let slot = slot_number(slot)?;
            if !matches!(core.slots[slot], Slot::Free) {
                return Err(error::SLOT);
            }
            if length == 0 || base.checked_add(length).is_none() {
                return Err(error::VALUE);
            }
            core.slots[slot] = Slot::Registering;
            (slot, SavedBuffer { gpa: Gpa(base), len_bytes: index(length) })
        };
        let (shared, access) = (&self.shared, Access::ReadWrite);
        let ram = shared.ram.as_ref();
        let pinned = Buffer::pin(ram, wanted.gpa, wanted.len_bytes, access, &shared.pins);
        let mut core = lock(&shared.core);
        match pinned {
            Ok(buffer) => {
                shared.ring_buffer_bell(true, &buffer);
                core.slots[slot] = Slot::Ready(buffer);
                Ok(())
            }
            Err(error) => {
                tracing::debug!(slot, %error, "a DMA buffer cannot be pinned");
                core.slots[slot] = Slot::Free;
                Err(error::PIN)
            }
        }
    }

    /// Frees the slot at once; transfers that use its buffer keep it pinned until they are over.
    fn unregister_buffer(&self, slot: u64) -> Result<(), u64> {
        let slot = slot_number(slot)?;
        let mut core = lock(&self.shared.core);
        if matches!(core.slots[slot], Slot::Free | Slot::Registering) {
            return Err(error::SLOT);
        }
        let old = replace(&mut core.slots[slot], Slot::Free);
        if let Slot::Ready(buffer) = &old {
            self.shared.ring_buffer_bell(false, buffer);
        }
        for request in core.in_flight.values_mut() {
            let uses = request.descriptor.flags & flag::REGISTERED != 0
                && index(request.descriptor.slot.into()) == slot;
            request.detached |= uses;
        }
        drop(core);
        drop(old);
        self.shared.close_in_kernel();
        Ok(())
    }
}

fn slot_number(value: u64) -> Result<usize, u64> {
    usize::try_from(value).ok().filter(|slot| *slot < BUFFER_SLOTS).ok_or(error::SLOT)
}

/// Writes a register that only holds a value.
fn write_plain(core: &mut Core, register: u64, value: u64) -> Result<(), u64> {
    let idle = core.registers.tail == core.registers.completed;
    let registers = &mut core.registers;
    let (field, allowed) = match register {
        register::RING_BASE => (&mut registers.ring_base, value.is_multiple_of(64)),
        register::RING_ENTRIES => {
            let allowed = value.is_power_of_two() && value <= MAX_RING_ENTRIES;
            (&mut registers.ring_entries, allowed)
        }
        register::INTERRUPT => (&mut registers.interrupt, value & !INTERRUPT_BITS == 0),
        register::DELAY_US => (&mut registers.delay_us, value <= MAX_DELAY_US),
        register::RATE => (&mut registers.rate, true),
        register::BUFFER_BASE => (&mut registers.buffer_base, value.is_multiple_of(PAGE)),
        register::BUFFER_LENGTH => {
            let allowed = value.is_multiple_of(PAGE) && value <= MAX_BUFFER_BYTES;
            (&mut registers.buffer_length, allowed)
        }
        _ => return Err(error::VALUE),
    };
    if !allowed {
        return Err(error::VALUE);
    }
    if matches!(register, register::RING_BASE | register::RING_ENTRIES) && !idle {
        return Err(error::BUSY);
    }
    *field = value;
    if register == register::RING_ENTRIES {
        (registers.tail, registers.completed) = (0, 0);
    }
    Ok(())
}
