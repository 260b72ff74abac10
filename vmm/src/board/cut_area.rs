//! The area of one cut: what has become of each leaf, and who asks for it.
//!
//! | words | writer | meaning |
//! |---|---|---|
//! | base, table, settled | keeper | [`crate::tables::Entry`] of what was shared before the cut; the cut's own table once settled |
//! | unneeded | keeper | no clone needs what is still pending: final |
//! | source | keeper | the member slot of the cut's source |
//! | protected, one bit a leaf | source, before any clone starts | the leaf had exclusive pages at the cut; a leaf that had none reads as its base |
//! | requests, one bit a leaf | clones set, the source clears | somebody waits for the leaf |
//! | leaf words | source; keeper after the source's death | [`LeafWord`] |
//! | patch records | source, before the leaf word | block, first frame and positions of a leaf published as base with patches |

use std::sync::atomic::Ordering;

use crate::frames::CutId;
use crate::plants::{Plant, is_planted};
use crate::sync::AtomicU32;
use crate::words::{LEAF_PAGES, LeafNumber, PageSet};

const BASE: usize = 0;
const TABLE: usize = 1;
const SETTLED: usize = 2;
const UNNEEDED: usize = 3;
const SOURCE: usize = 4;
const HEADER_WORDS: usize = 16;
const PATCH_SET_WORDS: usize = LEAF_PAGES / 32;
const PATCH_WORDS: usize = 2 + PATCH_SET_WORDS;

/// What a cut says of one leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeafWord {
    /// Not forced yet: its lent pages are in the source's window.
    Pending,
    /// Published: the block of this cut at the leaf's own place.
    Block,
    /// As in the cut's base.
    Base,
    /// All zero.
    Zero,
    /// Published as patches over the block of another cut (or over zeros): see
    /// [`CutArea::patches`].
    Patched,
    /// The source died, or could not write, before the leaf was published.
    Lost,
}

const PENDING: u32 = 0;
const BLOCK: u32 = 1;
const AS_BASE: u32 = 2;
const ZERO: u32 = 3;
const PATCHED: u32 = 4;
const LOST: u32 = 5;

impl LeafWord {
    /// The word's value, for waiting on it.
    #[must_use]
    pub const fn encode(self) -> u32 {
        match self {
            Self::Pending => PENDING,
            Self::Block => BLOCK,
            Self::Base => AS_BASE,
            Self::Zero => ZERO,
            Self::Patched => PATCHED,
            Self::Lost => LOST,
        }
    }

    /// The inverse of [`LeafWord::encode`]. An unknown value is LOST: nothing may be read there.
    #[must_use]
    pub const fn decode(value: u32) -> Self {
        match value {
            PENDING => Self::Pending,
            BLOCK => Self::Block,
            AS_BASE => Self::Base,
            ZERO => Self::Zero,
            PATCHED => Self::Patched,
            _ => Self::Lost,
        }
    }
}

/// The patches of one leaf of a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patches {
    /// The cut whose block lies under the patches; none = zeros.
    pub block: Option<CutId>,
    /// Number of the first frame in the cut's patch file; the others follow in order of position.
    pub first_frame: u32,
    /// Which pages are patched.
    pub pages: PageSet,
}

/// See the module.
#[derive(Clone, Copy)]
pub struct CutArea<'a> {
    words: &'a [AtomicU32],
    leaves: usize,
}

impl<'a> CutArea<'a> {
    pub(super) fn over(words: &'a [AtomicU32], leaves: u32) -> Self {
        Self { words, leaves: leaves as usize }
    }

    pub(super) fn words_for(leaves: u32) -> usize {
        Self::fixed_words(leaves) + leaves as usize * PATCH_WORDS
    }

    /// Words before the patch records.
    pub(super) fn fixed_words(leaves: u32) -> usize {
        HEADER_WORDS + 2 * Self::set_words(leaves as usize) + leaves as usize
    }

    fn set_words(leaves: usize) -> usize {
        leaves.div_ceil(32)
    }

    fn protected_bits(&self) -> &'a [AtomicU32] {
        &self.words[HEADER_WORDS..HEADER_WORDS + Self::set_words(self.leaves)]
    }

    fn request_bits(&self) -> &'a [AtomicU32] {
        let start = HEADER_WORDS + Self::set_words(self.leaves);
        &self.words[start..start + Self::set_words(self.leaves)]
    }

    /// Where the patch record of a leaf lies in an area.
    pub(super) fn patch_words(leaves: u32, leaf: LeafNumber) -> std::ops::Range<usize> {
        let start = Self::fixed_words(leaves) + leaf.index() * PATCH_WORDS;
        start..start + PATCH_WORDS
    }

    fn patch_record(&self, leaf: LeafNumber) -> &'a [AtomicU32] {
        let leaves = u32::try_from(self.leaves).expect("an area is made for a u32 of leaves");
        &self.words[Self::patch_words(leaves, leaf)]
    }

    /// The leaf's word itself, for waiting on it.
    #[must_use]
    pub fn raw(&self, leaf: LeafNumber) -> &'a AtomicU32 {
        assert!(leaf.index() < self.leaves, "{leaf} beyond the board");
        &self.words[HEADER_WORDS + 2 * Self::set_words(self.leaves) + leaf.index()]
    }

    /// What the cut says of `leaf` now.
    #[must_use]
    pub fn leaf(&self, leaf: LeafNumber) -> LeafWord {
        if !self.is_protected(leaf) {
            return LeafWord::Base;
        }
        // Pairs with the release store in `publish`: the block and the patch record are complete.
        LeafWord::decode(self.raw(leaf).load(Ordering::Acquire))
    }

    /// Says what became of `leaf`: by the source, or by the keeper after the source's death. The
    /// caller wakes those who wait on [`CutArea::raw`].
    pub fn publish(&self, leaf: LeafNumber, word: LeafWord) {
        self.raw(leaf).store(word.encode(), Ordering::Release);
    }

    /// Whether the leaf had exclusive pages at the cut.
    #[must_use]
    pub fn is_protected(&self, leaf: LeafNumber) -> bool {
        bit(self.protected_bits(), leaf, Ordering::Acquire)
    }

    /// Records that the leaf had exclusive pages at the cut. Before any clone starts.
    pub fn set_protected(&self, leaf: LeafNumber) {
        self.protected_bits()[leaf.index() / 32].fetch_or(1 << (leaf.index() % 32), Ordering::Release);
    }

    /// The protected leaves, ascending.
    pub fn protected(&self) -> impl Iterator<Item = LeafNumber> + use<'a> {
        set_bits(self.protected_bits(), |word| word.load(Ordering::Acquire))
    }

    /// The protected leaves that nobody has forced yet, ascending.
    pub fn pending(&self) -> impl Iterator<Item = LeafNumber> + use<'a> {
        let area = *self;
        self.protected().filter(move |leaf| area.leaf(*leaf) == LeafWord::Pending)
    }

    /// Asks for a leaf. The caller then rings the source's doorbell.
    pub fn request(&self, leaf: LeafNumber) {
        // Pairs with `take_requests`.
        self.request_bits()[leaf.index() / 32].fetch_or(1 << (leaf.index() % 32), Ordering::Release);
    }

    /// Takes all requests that have come in: by the source.
    #[must_use]
    pub fn take_requests(&self) -> Vec<LeafNumber> {
        set_bits(self.request_bits(), |word| match word.load(Ordering::Relaxed) {
            0 => 0,
            seen if is_planted(Plant::RequestsTakenTwice) => {
                word.store(0, Ordering::Release);
                seen
            }
            _ => word.swap(0, Ordering::Acquire),
        })
        .collect()
    }

    /// Writes the patch record of a leaf, before its word is published.
    pub fn set_patches(&self, leaf: LeafNumber, patches: &Patches) {
        let record = self.patch_record(leaf);
        record[0].store(patches.block.map_or(0, CutId::get), Ordering::Relaxed);
        record[1].store(patches.first_frame, Ordering::Relaxed);
        for (word, value) in record[2..].iter().zip(patches.pages.to_words()) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// The patch record of a leaf whose word is [`LeafWord::Patched`].
    #[must_use]
    pub fn patches(&self, leaf: LeafNumber) -> Patches {
        let record = self.patch_record(leaf);
        Patches {
            block: CutId::new(record[0].load(Ordering::Relaxed)),
            first_frame: record[1].load(Ordering::Relaxed),
            pages: PageSet::from_words(std::array::from_fn(|i| record[2 + i].load(Ordering::Relaxed))),
        }
    }

    /// The encoded entry that was the source's table at the cut.
    #[must_use]
    pub fn base(&self) -> u32 {
        self.words[BASE].load(Ordering::Acquire)
    }

    /// The encoded entry of the cut's own table, once settled.
    #[must_use]
    pub fn table(&self) -> Option<u32> {
        (self.words[SETTLED].load(Ordering::Acquire) != 0).then(|| self.words[TABLE].load(Ordering::Relaxed))
    }

    /// The member slot of the cut's source.
    #[must_use]
    pub fn source(&self) -> u32 {
        self.words[SOURCE].load(Ordering::Acquire)
    }

    /// Whether the keeper has said that no clone needs what is still pending.
    #[must_use]
    pub fn is_unneeded(&self) -> bool {
        self.words[UNNEEDED].load(Ordering::Acquire) != 0
    }

    /// Keeper: where the cut's content falls through to, and who its source is.
    pub fn set_origin(&self, base: u32, source: u32) {
        self.words[SOURCE].store(source, Ordering::Relaxed);
        self.words[BASE].store(base, Ordering::Release);
    }

    /// Keeper: a base of the same content takes the place of the old one.
    pub fn set_base(&self, base: u32) {
        self.words[BASE].store(base, Ordering::Release);
    }

    /// Keeper: the cut is settled, and this is its table.
    pub fn set_table(&self, table: u32) {
        if is_planted(Plant::SettledBeforeTable) {
            self.words[SETTLED].store(1, Ordering::Release);
        }
        self.words[TABLE].store(table, Ordering::Release);
        self.words[SETTLED].store(1, Ordering::Release);
    }

    /// Keeper: no clone needs what is pending. Final.
    pub fn set_unneeded(&self) {
        self.words[UNNEEDED].store(1, Ordering::Release);
    }
}

fn bit(bits: &[AtomicU32], leaf: LeafNumber, order: Ordering) -> bool {
    bits[leaf.index() / 32].load(order) >> (leaf.index() % 32) & 1 == 1
}

fn set_bits<'a>(
    bits: &'a [AtomicU32],
    take: impl Fn(&AtomicU32) -> u32 + 'a,
) -> impl Iterator<Item = LeafNumber> + 'a {
    (0u32..).zip(bits).flat_map(move |(index, word)| {
        let value = take(word);
        (0..32).filter(move |bit| value >> bit & 1 == 1).map(move |bit| LeafNumber(index * 32 + bit))
    })
}
