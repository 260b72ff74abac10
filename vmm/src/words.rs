//! The units of guest memory: addresses, page and leaf numbers, sizes.
//!
//! Every number that names a place or an amount of guest memory has a type of its own here, so that
//! a page number cannot be taken for an address. Conversions are named methods.

use std::fmt;

use salp_protocol::layout;
use serde::{Deserialize, Serialize};

/// Bytes in a page: the unit of copy-on-write.
pub const PAGE_BYTES: usize = 4096;
/// log2 of [`PAGE_BYTES`].
pub const PAGE_SHIFT: u32 = 12;
/// Pages in a leaf.
pub const LEAF_PAGES: usize = 512;
/// Bytes in a leaf and in a block: 2 MiB, one huge page.
pub const LEAF_BYTES: usize = LEAF_PAGES * PAGE_BYTES;
/// log2 of [`LEAF_BYTES`].
pub const LEAF_SHIFT: u32 = 21;

const _: () = assert!(1 << PAGE_SHIFT == PAGE_BYTES && 1 << LEAF_SHIFT == LEAF_BYTES);
// Addresses and sizes convert to each other without loss.
const _: () = assert!(size_of::<usize>() == size_of::<u64>());

/// `usize` to `u64`: lossless on x86-64, which is the only target (see `lib.rs`).
#[must_use]
pub const fn wide(n: usize) -> u64 {
    n as u64
}

/// `u64` to `usize`: lossless on x86-64, which is the only target (see `lib.rs`).
#[must_use]
pub const fn index(n: u64) -> usize {
    n as usize
}

/// A guest-physical address, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gpa(pub u64);

/// A guest page number: a guest-physical address divided by 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gfn(pub u64);

/// The number of a leaf: a guest-physical address divided by 2 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LeafNumber(pub u32);

impl Gpa {
    /// The page that holds this address.
    #[must_use]
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> PAGE_SHIFT)
    }

    /// The leaf that holds this address.
    #[must_use]
    pub const fn leaf(self) -> LeafNumber {
        self.gfn().leaf()
    }
}

impl Gfn {
    /// The address of the page's first byte.
    #[must_use]
    pub const fn gpa(self) -> Gpa {
        Gpa(self.0 << PAGE_SHIFT)
    }

    /// The leaf that holds this page. Guest memory is far below 2^53 bytes, so the number fits.
    #[must_use]
    pub const fn leaf(self) -> LeafNumber {
        LeafNumber((self.0 / LEAF_PAGES as u64) as u32)
    }

    /// The page's position in its leaf, 0 to 511.
    #[must_use]
    pub const fn in_leaf(self) -> usize {
        index(self.0) % LEAF_PAGES
    }
}

impl LeafNumber {
    /// The leaf's first page.
    #[must_use]
    pub const fn first_gfn(self) -> Gfn {
        Gfn(self.0 as u64 * LEAF_PAGES as u64)
    }

    /// The page at `position` (0 to 511) of the leaf.
    #[must_use]
    pub const fn gfn(self, position: usize) -> Gfn {
        Gfn(self.first_gfn().0 + wide(position))
    }

    /// The address of the leaf's first byte.
    #[must_use]
    pub const fn gpa(self) -> Gpa {
        self.first_gfn().gpa()
    }

    /// The leaf's number as an index.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gpa {:#x}", self.0)
    }
}

impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gfn {:#x}", self.0)
    }
}

impl fmt::Display for LeafNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "leaf {}", self.0)
    }
}

/// An address in this process, in memory that a guest or a device may change at any time: a number,
/// with which nothing is done but by raw copies whose callers argue for themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostAddress(usize);

impl HostAddress {
    /// The address of a pointer.
    #[must_use]
    pub fn new(pointer: *mut u8) -> Self {
        Self(pointer.expose_provenance())
    }

    /// The address as a pointer.
    #[must_use]
    pub fn as_ptr(self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.0)
    }

    /// The address as a number.
    #[must_use]
    pub const fn get(self) -> u64 {
        wide(self.0)
    }

    /// The address `offset_bytes` further on.
    #[must_use]
    pub const fn plus(self, offset_bytes: usize) -> Self {
        Self(self.0.wrapping_add(offset_bytes))
    }
}

/// A set of pages of one leaf, by their positions 0 to 511.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct PageSet([u64; LEAF_PAGES / 64]);

impl PageSet {
    /// No page.
    pub const EMPTY: Self = Self([0; LEAF_PAGES / 64]);
    /// All 512 pages.
    pub const ALL: Self = Self([u64::MAX; LEAF_PAGES / 64]);

    /// Adds the page at `position`.
    pub fn insert(&mut self, position: usize) {
        self.0[position / 64] |= 1 << (position % 64);
    }

    /// Takes the page at `position` out.
    pub fn remove(&mut self, position: usize) {
        self.0[position / 64] &= !(1 << (position % 64));
    }

    /// Adds the pages `from..to`.
    pub fn insert_range(&mut self, from: usize, to: usize) {
        for (number, word) in self.0.iter_mut().enumerate() {
            let (low, high) = (number * 64, number * 64 + 64);
            let (from, to) = (from.max(low), to.min(high));
            if from < to {
                *word |= u64::MAX >> (64 - (to - from)) << (from - low);
            }
        }
    }

    /// Whether the page at `position` is in the set.
    #[must_use]
    pub const fn contains(&self, position: usize) -> bool {
        self.0[position / 64] >> (position % 64) & 1 == 1
    }

    /// Number of pages in the set, 0 to 512.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether the set has no page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// The positions in the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        (0..LEAF_PAGES).filter(|position| self.contains(*position))
    }

    /// Pages in this set or in `other`.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] | other.0[i]))
    }

    /// Pages in this set and not in `other`.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] & !other.0[i]))
    }

    /// Pages in this set and in `other`.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] & other.0[i]))
    }

    /// The set as 16 words of 32 bits, for shared memory.
    #[must_use]
    pub fn to_words(&self) -> [u32; LEAF_PAGES / 32] {
        std::array::from_fn(|i| (self.0[i / 2] >> (32 * (i % 2))) as u32)
    }

    /// The inverse of [`PageSet::to_words`].
    #[must_use]
    pub fn from_words(words: [u32; LEAF_PAGES / 32]) -> Self {
        Self(std::array::from_fn(|i| u64::from(words[2 * i]) | u64::from(words[2 * i + 1]) << 32))
    }
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSet({} pages)", self.len())
    }
}

/// The shape of a VM's memory: how much RAM there is, and where the hole for devices lies.
///
/// RAM begins at guest-physical 0; what does not fit below [`layout::DEVICE_HOLE`] goes on at
/// [`layout::HIGH_RAM`]. A window is laid out like the guest-physical space, hole included, so
/// that a host address is the window's base plus the guest-physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryShape {
    ram_bytes: u64,
}

impl MemoryShape {
    /// The shape of a VM with `ram_bytes` of memory.
    ///
    /// # Errors
    /// The size is 0, not a multiple of 2 MiB, or above 64 GiB.
    pub fn new(ram_bytes: u64) -> Result<Self, MemoryShapeError> {
        if ram_bytes == 0 || !ram_bytes.is_multiple_of(wide(LEAF_BYTES)) || ram_bytes > MAX_RAM_BYTES {
            return Err(MemoryShapeError { ram_bytes });
        }
        Ok(Self { ram_bytes })
    }

    /// Bytes of RAM.
    #[must_use]
    pub const fn ram_bytes(self) -> u64 {
        self.ram_bytes
    }

    /// The runs of RAM as (first leaf, leaves), ascending: one, or two around the device hole.
    #[must_use]
    pub fn regions(self) -> Vec<(LeafNumber, u32)> {
        let leaves = (self.ram_bytes >> LEAF_SHIFT) as u32;
        let below_hole = (layout::DEVICE_HOLE >> LEAF_SHIFT) as u32;
        let high = LeafNumber((layout::HIGH_RAM >> LEAF_SHIFT) as u32);
        if leaves <= below_hole {
            vec![(LeafNumber(0), leaves)]
        } else {
            vec![(LeafNumber(0), below_hole), (high, leaves - below_hole)]
        }
    }

    /// Leaves from guest-physical 0 to the end of RAM, the hole included: the length of every
    /// array that is indexed by leaf number.
    #[must_use]
    pub fn span_leaves(self) -> u32 {
        self.regions().last().map_or(0, |(first, count)| first.0 + count)
    }

    /// Bytes from guest-physical 0 to the end of RAM: the length of a window.
    #[must_use]
    pub fn span_bytes(self) -> u64 {
        u64::from(self.span_leaves()) << LEAF_SHIFT
    }

    /// The leaves that hold RAM, ascending.
    pub fn leaves(self) -> impl Iterator<Item = LeafNumber> {
        self.regions().into_iter().flat_map(|(first, count)| (first.0..first.0 + count).map(LeafNumber))
    }

    /// Whether `[gpa, gpa + len_bytes)` is RAM all the way, in one region.
    #[must_use]
    pub fn contains(self, gpa: Gpa, len_bytes: usize) -> bool {
        gpa.0.checked_add(wide(len_bytes)).is_some_and(|end| {
            self.regions()
                .iter()
                .any(|(first, count)| gpa.0 >= first.gpa().0 && end <= LeafNumber(first.0 + count).gpa().0)
        })
    }
}

/// The largest memory of a VM, in bytes.
pub const MAX_RAM_BYTES: u64 = 64 << 30;

/// A memory size that no VM can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("memory of {ram_bytes} bytes is not possible: give a multiple of 2M, from 2M to 64G")]
pub struct MemoryShapeError {
    /// The size asked for.
    pub ram_bytes: u64,
}
