//! The leaf record: what stands at a leaf, described sparsely.

use std::sync::atomic::Ordering;

use super::Entry;
use crate::board::RECORD_WORDS;
use crate::frames::{BlockId, CutId, Frames};
use crate::sync::AtomicU32;
use crate::words::{LEAF_PAGES, LeafNumber, PageSet};

const KIND: usize = 0;
const BLOCK: usize = 1;
const PATCHES: usize = 2;
const UNDER: usize = 3;
const EXCLUSIVE: usize = 4;
const EXCLUSIVE_WORDS: usize = LEAF_PAGES / 32;
const _: () = assert!(EXCLUSIVE + EXCLUSIVE_WORDS <= RECORD_WORDS);

const SHARED: u32 = 0;
const PRIVATE: u32 = 1;

/// A leaf of a table: logically 512 entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeafRecord {
    /// Any number of VMs see it.
    Shared {
        /// The cut whose block holds the pages; none = zeros.
        block: Option<CutId>,
        /// The cut whose patch record of this leaf names the pages that stand elsewhere.
        patches: Option<CutId>,
    },
    /// One VM owns pages of it, as last harvested.
    Private {
        /// What the VM shares below its own pages.
        under: Entry,
        /// Its own pages.
        exclusive: PageSet,
    },
}

impl LeafRecord {
    /// The frames that the record refers to, when it stands at `leaf`.
    pub fn frames(&self, leaf: LeafNumber) -> impl Iterator<Item = Frames> {
        let (block, patches) = match *self {
            Self::Shared { block, patches } => (block, patches),
            Self::Private { .. } => (None, None),
        };
        let block = block.map(|cut| Frames::Block(BlockId { cut, leaf }));
        let patches = patches.map(|cut| Frames::Patches(BlockId { cut, leaf }));
        block.into_iter().chain(patches)
    }

    /// Reads a record from its words.
    #[must_use]
    pub fn load(words: &[AtomicU32]) -> Self {
        let word = |index: usize| words[index].load(Ordering::Relaxed);
        // UNDER may be replaced while the record stands: this pairs with the store in `store`.
        let under = || Entry::decode(words[UNDER].load(Ordering::Acquire));
        if word(KIND) == PRIVATE {
            Self::Private {
                under: under(),
                exclusive: PageSet::from_words(std::array::from_fn(|i| word(EXCLUSIVE + i))),
            }
        } else {
            Self::Shared { block: CutId::new(word(BLOCK)), patches: CutId::new(word(PATCHES)) }
        }
    }

    /// Writes a record. It is made reachable by the release store of an entry that names it.
    pub(super) fn store(&self, words: &[AtomicU32]) {
        let store = |index: usize, value: u32| words[index].store(value, Ordering::Relaxed);
        match *self {
            Self::Shared { block, patches } => {
                store(KIND, SHARED);
                store(BLOCK, block.map_or(0, CutId::get));
                store(PATCHES, patches.map_or(0, CutId::get));
            }
            Self::Private { under, exclusive } => {
                store(KIND, PRIVATE);
                words[UNDER].store(under.encode(), Ordering::Release);
                for (index, value) in (EXCLUSIVE..).zip(exclusive.to_words()) {
                    store(index, value);
                }
            }
        }
    }
}
