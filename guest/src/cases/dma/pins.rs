//! The long-lived registered buffers: `pins=` pages in slots of up to 16 MiB, pinned by the engine
//! until the case ends. The first slot's beginning serves lanes; all other pages hold a pattern that
//! nobody touches and that is checked at the end.

use salp_protocol::dma::{BUFFER_SLOTS, register};

use crate::engine::{EngineError, configure};
use crate::memory::{PAGE_BYTES, PAGE_WORDS, Supply};
use crate::options::usage;
use crate::pattern::{self, mix};
use crate::worker::Worker;

/// Pages that one slot can hold.
const SLOT_PAGES: u64 = 4096;
const SALT: u64 = 2;

/// One registered buffer. `used` bytes at its beginning belong to lanes.
#[derive(Clone, Copy, Debug)]
struct Buffer {
    address: u64,
    pages: u64,
    used: u64,
}

/// All registered buffers, by slot.
#[derive(Debug)]
pub(super) struct Pins {
    buffers: [Option<Buffer>; BUFFER_SLOTS],
}

impl Pins {
    /// Registers `pages` pages.
    pub(super) fn register(supply: &mut Supply, pages: u64) -> Result<Self, EngineError> {
        if pages > SLOT_PAGES * BUFFER_SLOTS as u64 {
            usage(format_args!("pins={pages} is more than the slots hold"));
        }
        let mut pins = Self { buffers: [None; BUFFER_SLOTS] };
        let mut left = pages;
        for (slot, place) in (0..).zip(pins.buffers.iter_mut()) {
            let pages = left.min(SLOT_PAGES);
            if pages == 0 {
                break;
            }
            left -= pages;
            let address = supply.take_contiguous(pages).ok_or(EngineError::OutOfMemory)?;
            configure(register::BUFFER_BASE, address)?;
            configure(register::BUFFER_LENGTH, pages * PAGE_BYTES)?;
            configure(register::BUFFER_REGISTER, slot)?;
            *place = Some(Buffer { address, pages, used: 0 });
        }
        Ok(pins)
    }

    /// Two buffers side by side, of `bytes` each or, where the pins are fewer, of half of them:
    /// address, bytes of each, slot.
    pub(super) fn take_buffers(&mut self, bytes: u64) -> Option<(u64, u64, u32)> {
        let buffer = self.buffers[0].as_mut()?;
        let capacity = bytes.min(buffer.pages / 2 * PAGE_BYTES);
        let room = buffer.pages * PAGE_BYTES - buffer.used;
        if capacity == 0 || room < 2 * capacity {
            return None;
        }
        let address = buffer.address + buffer.used;
        buffer.used += 2 * capacity;
        Some((address, capacity, 0))
    }

    /// Gives all pages that no lane has taken their pattern.
    pub(super) fn fill_rest(&self) {
        self.rest().for_each(|page| pattern::fill(page, PAGE_WORDS, mix(SALT, page)));
    }

    /// Checks those pages and lets go of all buffers.
    pub(super) fn check_rest_and_unregister(&self, worker: &Worker) {
        for page in self.rest() {
            worker.check("dma, pinned page", pattern::check(page, PAGE_WORDS, mix(SALT, page)));
        }
        for (slot, _) in (0..).zip(self.buffers.iter().flatten()) {
            if let Err(error) = configure(register::BUFFER_UNREGISTER, slot) {
                worker.error(format_args!("dma: unregister: {error:?}"));
            }
        }
    }

    fn rest(&self) -> impl Iterator<Item = u64> {
        self.buffers.into_iter().flatten().flat_map(|buffer| {
            (buffer.used / PAGE_BYTES..buffer.pages).map(move |i| buffer.address + i * PAGE_BYTES)
        })
    }
}
