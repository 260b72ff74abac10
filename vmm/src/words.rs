//! The units of guest memory: addresses, page and leaf numbers, sizes.
//!
//! Every number that names a place or an amount of guest memory has a type of its own here, so that
//! a page number cannot be taken for an address. Conversions are named methods.

use std::fmt;

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
