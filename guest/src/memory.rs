//! The guest's memory as the cases see it: pages numbered from [`layout::FREE`], without the hole.
//!
//! Every access is one volatile instruction: another vCPU, a device or the host may look at any
//! moment. Nothing of Rust lives at or above [`layout::FREE`].
#![expect(unsafe_code, reason = "the cases own raw memory above the image")]

use salp_protocol::layout;

/// Bytes in a page.
pub(crate) const PAGE_BYTES: u64 = 4096;
/// 8-byte words in a page.
pub(crate) const PAGE_WORDS: u64 = PAGE_BYTES / 8;
/// Pages in a MiB.
pub(crate) const MIB_PAGES: u64 = 256;

/// A run of the cases' pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pages {
    pub(crate) first: u64,
    pub(crate) count: u64,
}

impl Pages {
    /// Share `index` of `shares` equal ones.
    pub(crate) fn share(self, index: u64, shares: u64) -> Self {
        let count = self.count / shares;
        Self { first: self.first + index * count, count }
    }

    /// The guest-physical address of page `index` of the run.
    pub(crate) fn address(self, index: u64) -> u64 {
        assert!(index < self.count, "page {index} of {}", self.count);
        let low = layout::FREE + (self.first + index) * PAGE_BYTES;
        if low < layout::DEVICE_HOLE { low } else { low - layout::DEVICE_HOLE + layout::HIGH_RAM }
    }

    /// The address of the run's first byte if the run lies in one piece.
    pub(crate) fn contiguous(self) -> Option<u64> {
        let first = self.address(0);
        (self.address(self.count - 1) - first == (self.count - 1) * PAGE_BYTES).then_some(first)
    }
}

/// Hands out the cases' pages from the first one up.
#[derive(Debug)]
pub(crate) struct Supply {
    rest: Pages,
}

impl Supply {
    /// All that a machine of `ram_bytes` has for the cases.
    pub(crate) fn new(ram_bytes: u64) -> Self {
        let count = ram_bytes.saturating_sub(layout::FREE) / PAGE_BYTES;
        Self { rest: Pages { first: 0, count } }
    }

    /// The next `count` pages, if there are as many.
    pub(crate) fn take(&mut self, count: u64) -> Option<Pages> {
        let rest = self.rest.count.checked_sub(count)?;
        let taken = Pages { first: self.rest.first, count };
        self.rest = Pages { first: taken.first + count, count: rest };
        Some(taken)
    }

    /// The address of the next `count` (at least 1) pages in one piece; what lies before the
    /// device hole is skipped if they do not fit there.
    pub(crate) fn take_contiguous(&mut self, count: u64) -> Option<u64> {
        let taken = self.take(count)?;
        taken.contiguous().or_else(|| {
            let above_hole = (layout::DEVICE_HOLE - layout::FREE) / PAGE_BYTES;
            let wasted = above_hole - taken.first;
            self.rest.count = self.rest.count.checked_sub(wasted)?;
            self.rest.first += wasted;
            Pages { first: above_hole, count }.contiguous()
        })
    }
}

/// Loads the 8 bytes at `address`, which lies in the cases' memory.
pub(crate) fn load(address: u64) -> u64 {
    debug_assert!(address >= layout::FREE);
    // SAFETY: the cases' memory is mapped to itself, belongs to no Rust object, and any bytes are a
    // valid u64; all callers pass multiples of 8.
    unsafe { core::ptr::with_exposed_provenance::<u64>(address as usize).read_volatile() }
}

/// Stores 8 bytes at `address`, which lies in the cases' memory.
pub(crate) fn store(address: u64, value: u64) {
    debug_assert!(address >= layout::FREE);
    // SAFETY: as for `load`; no Rust object is changed.
    unsafe { core::ptr::with_exposed_provenance_mut::<u64>(address as usize).write_volatile(value) }
}
