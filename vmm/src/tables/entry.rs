//! One word of a table: what stands in a slot, and its encoding.

use crate::frames::CutId;

/// What a slot of a table, or a root, holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Entry {
    /// Nothing was ever written below: zeros.
    Empty,
    /// A node of 512 entries, one level down.
    Node(u32),
    /// A leaf record. Only in slots of the last directory.
    Leaf(u32),
    /// As that cut says, at any level: the lazily expanded thunk.
    Thunk(CutId),
    /// The bytes are lost. Only in slots of the last directory.
    Lost,
}

const TAG_BITS: u32 = 3;
const TAG_MASK: u32 = (1 << TAG_BITS) - 1;
const NODE: u32 = 1;
const LEAF: u32 = 2;
const THUNK: u32 = 3;
const LOST: u32 = 4;

/// Numbers of nodes, records and cuts stay below this, so that an entry is one word.
pub const NUMBER_LIMIT: u32 = 1 << (u32::BITS - TAG_BITS);

impl Entry {
    /// The entry as a word; 0 is [`Entry::Empty`].
    #[must_use]
    pub const fn encode(self) -> u32 {
        match self {
            Self::Empty => 0,
            Self::Node(node) => node << TAG_BITS | NODE,
            Self::Leaf(record) => record << TAG_BITS | LEAF,
            Self::Thunk(cut) => cut.get() << TAG_BITS | THUNK,
            Self::Lost => LOST,
        }
    }

    /// The inverse of [`Entry::encode`]. What is no encoding decodes as [`Entry::Lost`]: nothing may
    /// be read there.
    #[must_use]
    pub const fn decode(word: u32) -> Self {
        let number = word >> TAG_BITS;
        match (word & TAG_MASK, CutId::new(number)) {
            (0, _) => Self::Empty,
            (NODE, _) => Self::Node(number),
            (LEAF, _) => Self::Leaf(number),
            (THUNK, Some(cut)) => Self::Thunk(cut),
            _ => Self::Lost,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoding_round_trips() {
        let cut = CutId::new(NUMBER_LIMIT - 1).expect("not zero");
        for entry in [
            Entry::Empty,
            Entry::Node(0),
            Entry::Node(NUMBER_LIMIT - 1),
            Entry::Leaf(0),
            Entry::Leaf(77),
            Entry::Thunk(cut),
            Entry::Lost,
        ] {
            assert_eq!(Entry::decode(entry.encode()), entry);
        }
        assert_eq!(Entry::decode(7), Entry::Lost);
    }
}
