//! Second-level tables: what is shared, as a tree of reference-counted nodes.
//!
//! Like EPT, a table has 4 levels of 512 entries: level 4 (the root), 3, 2 (directories), and the
//! leaf. salp keeps its own (KVM has private ones per VM), and they name *shared* bytes only; that
//! a page is exclusive stands in a leaf record after a harvest.
//!
//! - [`Entry`]: one word of a node or a root.
//! - [`LeafRecord`]: a leaf = one block plus a sparse set of patches, and the pages that the VM owns
//!   exclusively.
//! - [`Tables`]: the nodes and records of a colony, with their reference counts; sharing at any
//!   level, broken top-down before a private change. Written by the keeper alone.
//! - [`resolve`]: the walk, read-only and lock-free, for every process.
//!
//! Sharing takes one reference on whatever entry stands at the shared place. Before a change, each
//! node on the path with more than one referrer is copied, and the copy takes references on the
//! children; a node with one referrer is edited in place. All stores to an entry go through
//! `Tables::store`, which counts.
//!
//! What is given up may still be under the eyes of another process, which walks without a lock:
//! nodes and records wait in limbo until [`Tables::reclaim`] is told that nobody walks.

mod entry;
mod record;
mod resolve;
mod tree;
#[cfg(test)]
mod tests;

pub use self::entry::{Entry, NUMBER_LIMIT};
pub use self::record::LeafRecord;
pub use self::resolve::{Found, resolve};
pub use self::tree::{Released, TableCounts, Tables, TablesError};

use serde::{Deserialize, Serialize};

use crate::words::LeafNumber;

/// The level of the root.
pub const ROOT_LEVEL: u32 = 4;
/// The level whose entries are leaves.
pub const LEAF_LEVEL: u32 = 2;

/// The level at which a fork shares: what source and clones have in common after it. Above it each
/// has nodes of its own. What anybody sees is the same; what differs is who copies how much, and when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ShareLevel {
    /// All of a VM's memory is one reference.
    #[default]
    Root,
    /// One for each directory of leaves: 1 GiB.
    Directory,
    /// One for each leaf.
    Leaf,
}

impl ShareLevel {
    /// The level of the lowest nodes that are a VM's own after a fork; none: not even the root is.
    const fn lowest_own(self) -> Option<u32> {
        match self {
            Self::Root => None,
            Self::Directory => Some(LEAF_LEVEL + 1),
            Self::Leaf => Some(LEAF_LEVEL),
        }
    }
}

/// The slot in a node of `level` (4 to 2) on the way to `leaf`. Level 2 slots are leaves.
#[must_use]
pub const fn slot(level: u32, leaf: LeafNumber) -> usize {
    (leaf.0 >> (9 * (level - LEAF_LEVEL)) & 511) as usize
}

/// Leaves below one slot of a node of `level`.
#[must_use]
pub const fn leaves_per_slot(level: u32) -> u32 {
    1 << (9 * (level - LEAF_LEVEL))
}
