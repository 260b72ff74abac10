//! The built-in guest's page tables: every byte of RAM at its own address, for ring 3.
//!
//! 2 MiB pages, but 4 KiB ones for the first 2 MiB, where page 0 is left out. Accessed and dirty
//! bits are set in advance, so that walks write nothing. Device pages (DMA engine and identity
//! device, the local APIC) are mapped uncached, as the 2 MiB around them.

use salp_protocol::layout;

use super::MAX_RAM_BYTES;
use crate::words::{LEAF_BYTES, PAGE_BYTES, index, wide};

/// Where the tables lie: the top one first.
pub(super) const TABLES: u64 = 0x3_0000;
/// Where the room for them ends.
pub(super) const TABLES_END: u64 = 0xa_0000;

const ENTRIES: usize = 512;
const GIB: u64 = 1 << 30;
const LEAF: u64 = wide(LEAF_BYTES);
/// Two tables at the top, one of 4 KiB pages, a directory for each GiB of RAM and of the hole.
const MAX_PAGES: u64 = 2 + 1 + MAX_RAM_BYTES / GIB + (layout::HIGH_RAM - layout::DEVICE_HOLE) / GIB;

const _: () = assert!(TABLES + MAX_PAGES * wide(PAGE_BYTES) <= TABLES_END);

// The devices' pages are in one large page.
const _: () = assert!(layout::DMA_REGISTERS / LEAF == layout::IDENTITY_REGISTERS / LEAF);

/// Bits of an entry (SDM vol. 3, table 4-15 and following).
mod bit {
    const PRESENT: u64 = 1;
    const WRITABLE: u64 = 1 << 1;
    const USER: u64 = 1 << 2;
    const WRITE_THROUGH: u64 = 1 << 3;
    const CACHE_DISABLED: u64 = 1 << 4;
    const ACCESSED: u64 = 1 << 5;
    const DIRTY: u64 = 1 << 6;
    const LARGE: u64 = 1 << 7;

    pub(super) const TABLE: u64 = PRESENT | WRITABLE | USER | ACCESSED;
    pub(super) const SMALL_PAGE: u64 = TABLE | DIRTY;
    pub(super) const LARGE_PAGE: u64 = SMALL_PAGE | LARGE;
    pub(super) const DEVICE: u64 = LARGE_PAGE | WRITE_THROUGH | CACHE_DISABLED;
}

/// The tables' pages, the first of which belongs at [`TABLES`].
pub(super) struct PageTables {
    pages: Vec<[u64; ENTRIES]>,
}

impl PageTables {
    /// Maps RAM from 0 to `low_end` and from [`layout::HIGH_RAM`] to `high_end` (equal where there
    /// is none). The ends are multiples of 2 MiB, checked by the caller.
    pub(super) fn identity(low_end: u64, high_end: u64) -> Self {
        let mut tables = Self { pages: vec![[0; ENTRIES]; 2] };
        tables.pages[0][0] = address_of(1) | bit::TABLE;
        for ram in [0..low_end, layout::HIGH_RAM..high_end] {
            for page in ram.step_by(LEAF_BYTES) {
                tables.map_large(page, bit::LARGE_PAGE);
            }
        }
        tables.map_large(layout::DMA_REGISTERS, bit::DEVICE);
        tables.map_large(layout::LOCAL_APIC, bit::DEVICE);
        tables.split_first();
        tables
    }

    /// The tables as bytes, in one piece from [`TABLES`] on.
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.pages.iter().flatten().flat_map(|entry| entry.to_le_bytes()).collect()
    }

    fn map_large(&mut self, page: u64, bits: u64) {
        let gib = index(page / GIB);
        let directory = match self.pages[1][gib] {
            0 => {
                let directory = self.add_page();
                self.pages[1][gib] = address_of(directory) | bit::TABLE;
                directory
            }
            entry => (index(entry & !0xfff) - index(TABLES)) / PAGE_BYTES,
        };
        self.pages[directory][index(page % GIB / LEAF)] = page | bits;
    }

    /// Maps the first 2 MiB by 4 KiB pages, without page 0.
    fn split_first(&mut self) {
        let small = self.add_page();
        for (number, entry) in self.pages[small].iter_mut().enumerate().skip(1) {
            *entry = wide(number * PAGE_BYTES) | bit::SMALL_PAGE;
        }
        let first_directory = (index(self.pages[1][0] & !0xfff) - index(TABLES)) / PAGE_BYTES;
        self.pages[first_directory][0] = address_of(small) | bit::TABLE;
    }

    fn add_page(&mut self) -> usize {
        self.pages.push([0; ENTRIES]);
        self.pages.len() - 1
    }
}

fn address_of(page: usize) -> u64 {
    TABLES + wide(page * PAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the processor's walk finds for `address`: the physical address and the entry's low bits
    /// (those of all levels that matter for rights together).
    fn walk(tables: &PageTables, address: u64) -> Option<(u64, u64)> {
        let mut page = 0;
        let mut rights = u64::MAX;
        for shift in [39, 30, 21, 12] {
            let entry = tables.pages[page][index(address >> shift) % ENTRIES];
            if entry & 1 == 0 {
                return None;
            }
            rights &= entry & 0x7;
            if shift == 12 || entry & 0x80 != 0 {
                let offset = address & ((1 << shift) - 1);
                return Some(((entry & !0xfff) + offset, rights | entry & 0x78));
            }
            page = index(((entry & !0xfff) - TABLES) / wide(PAGE_BYTES));
        }
        unreachable!("the last level returns")
    }

    /// A page of RAM: present, writable, user, accessed, dirty.
    const RAM: u64 = 0x67;

    #[test]
    fn every_page_of_ram_decodes_to_itself() {
        let tables = PageTables::identity(24 << 20, layout::HIGH_RAM);
        for page in (PAGE_BYTES..24 << 20).step_by(PAGE_BYTES).map(wide) {
            assert_eq!(walk(&tables, page + 5), Some((page + 5, RAM)));
        }
        assert_eq!(walk(&tables, 8), None, "null pointers fault");
        assert_eq!(walk(&tables, 24 << 20), None);
        assert_eq!(walk(&tables, layout::HIGH_RAM), None);
    }

    #[test]
    fn device_pages_are_uncached_and_open_to_ring_3() {
        let tables = PageTables::identity(8 << 20, layout::HIGH_RAM);
        for page in [layout::DMA_REGISTERS, layout::LOCAL_APIC] {
            assert_eq!(walk(&tables, page), Some((page, RAM | 0x18)));
        }
    }

    #[test]
    fn the_largest_ram_fits_its_room() {
        let high_end = layout::HIGH_RAM + MAX_RAM_BYTES - layout::DEVICE_HOLE;
        let tables = PageTables::identity(layout::DEVICE_HOLE, high_end);
        assert!(TABLES + wide(tables.bytes().len()) <= TABLES_END);
        for page in [layout::DEVICE_HOLE - 1, layout::HIGH_RAM, high_end - 1] {
            assert_eq!(walk(&tables, page), Some((page, RAM)));
        }
        assert_eq!(walk(&tables, layout::DEVICE_HOLE), None);
        assert_eq!(walk(&tables, high_end), None);
    }
}
