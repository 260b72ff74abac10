//! The walk: from an entry to what a leaf holds, through tables and cuts. Knows no policy.

use std::sync::atomic::Ordering;

use super::{Entry, LEAF_LEVEL, LeafRecord, ROOT_LEVEL, slot};
use crate::board::{Board, LeafWord};
use crate::frames::CutId;
use crate::plants::{Plant, is_planted};
use crate::words::LeafNumber;

/// What a leaf holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Zeros.
    Zero,
    /// The block of `block` (zeros where none), with the patches that `patches` recorded for the
    /// leaf.
    Shared {
        /// Whose block.
        block: Option<CutId>,
        /// Whose patch record.
        patches: Option<CutId>,
    },
    /// Not published yet: ask the source of that cut.
    Pending(CutId),
    /// The bytes are lost.
    Lost,
}

/// Walks from `root` (a root entry) to `leaf`.
///
/// The walk takes no lock and only reads: in a member it runs inside
/// [`MemberArea::walk`](crate::board::MemberArea::walk), so that nothing it can reach is reused.
#[must_use]
pub fn resolve(board: &Board, root: Entry, leaf: LeafNumber) -> Found {
    let mut entry = root;
    let mut level = ROOT_LEVEL;
    loop {
        entry = match entry {
            Entry::Empty => return Found::Zero,
            Entry::Lost => return Found::Lost,
            Entry::Node(node) => {
                let below = board.node(node)[slot(level, leaf)].load(Ordering::Acquire);
                level -= 1;
                debug_assert!(level >= LEAF_LEVEL - 1, "a node below the last directory");
                Entry::decode(below)
            }
            Entry::Leaf(record) => match LeafRecord::load(board.record(record)) {
                LeafRecord::Shared { block: None, patches: None } => return Found::Zero,
                LeafRecord::Shared { block, patches } => return Found::Shared { block, patches },
                LeafRecord::Private { under, .. } => under,
            },
            Entry::Thunk(cut) => {
                // A cut's content is looked up from its own root, whatever level named it.
                level = ROOT_LEVEL;
                let area = board.cut(cut);
                if let Some(table) = area.table() {
                    Entry::decode(table)
                } else {
                    match area.leaf(leaf) {
                        // Whoever comes through a cut that nobody needs comes from a later cut of the
                        // same source, which had no pages of its own there: what it had dropped for a
                        // block lies below.
                        LeafWord::Pending if area.is_unneeded() => Entry::decode(area.base()),
                        LeafWord::Pending => return Found::Pending(cut),
                        LeafWord::Block => {
                            return Found::Shared { block: Some(cut), patches: None };
                        }
                        LeafWord::Zero => return Found::Zero,
                        LeafWord::Lost if is_planted(Plant::LostIsZero) => return Found::Zero,
                        LeafWord::Lost => return Found::Lost,
                        LeafWord::Patched => {
                            let block = area.patches(leaf).block;
                            return Found::Shared { block, patches: Some(cut) };
                        }
                        LeafWord::Base => Entry::decode(area.base()),
                    }
                }
            }
        };
    }
}
