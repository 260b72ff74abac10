//! Frames: where shared bytes live, and who still refers to them.
//!
//! Shared frames are in the *arena*: one sparse file per cut, as large as the guest-physical space,
//! each leaf's *block* at the leaf's own offset, and beside it a file of 4 KiB *patch* frames. A
//! block is written once, as a whole, before anybody can reach it; it is punched when nobody refers
//! to it any more and never written again.
//!
//! [`Ledger`] counts the references: exactly, per block, by who holds them. It knows no file.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

use crate::words::LeafNumber;

/// Names a cut, and with it the cut's arena files and its area on the board. Never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct CutId(NonZeroU32);

impl CutId {
    /// The cut with this number; none for 0.
    #[must_use]
    pub const fn new(number: u32) -> Option<Self> {
        match NonZeroU32::new(number) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// The cut's number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0.get()
    }

    /// Name of the cut's block file in the arena.
    #[must_use]
    pub fn block_file(self) -> String {
        format!("cut-{}", self.0)
    }

    /// Name of the cut's patch file in the arena.
    #[must_use]
    pub fn patch_file(self) -> String {
        format!("patch-{}", self.0)
    }
}

impl fmt::Display for CutId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cut {}", self.0)
    }
}

/// 2 MiB of shared bytes: the place of a leaf in the file of a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId {
    /// Whose file.
    pub cut: CutId,
    /// Which place in it.
    pub leaf: LeafNumber,
}

/// What a leaf record refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Frames {
    /// The block.
    Block(BlockId),
    /// The patch frames of that leaf of that cut.
    Patches(BlockId),
}

impl Frames {
    /// The cut that holds the frames.
    #[must_use]
    pub const fn cut(self) -> CutId {
        match self {
            Self::Block(id) | Self::Patches(id) => id.cut,
        }
    }
}

/// References to blocks and patches, counted by leaf records.
///
/// Windows that map a block are not counted here: each member says so in its own area of the
/// board, and the keeper asks there before it punches what the ledger gives up.
#[derive(Debug, Default)]
pub struct Ledger {
    references: BTreeMap<Frames, u32>,
    by_cut: BTreeMap<CutId, u32>,
}

impl Ledger {
    /// A leaf record that names `frames` has come to be.
    pub fn retain(&mut self, frames: Frames) {
        *self.references.entry(frames).or_default() += 1;
        *self.by_cut.entry(frames.cut()).or_default() += 1;
    }

    /// A leaf record that named `frames` is gone. True if it was the last one.
    ///
    /// # Panics
    /// Nothing referred to `frames`: the counts are wrong, and reuse decided by them would be too.
    pub fn release(&mut self, frames: Frames) -> bool {
        let last = decrement(&mut self.references, frames);
        decrement(&mut self.by_cut, frames.cut());
        last
    }

    /// References to `frames`.
    #[must_use]
    pub fn references(&self, frames: Frames) -> u32 {
        self.references.get(&frames).copied().unwrap_or(0)
    }

    /// References to anything of `cut`.
    #[must_use]
    pub fn references_to_cut(&self, cut: CutId) -> u32 {
        self.by_cut.get(&cut).copied().unwrap_or(0)
    }

    /// All frames that are referred to, with their counts, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (Frames, u32)> + '_ {
        self.references.iter().map(|(frames, count)| (*frames, *count))
    }
}

/// Takes 1 from a count, and the entry away at 0; true if it was the last.
fn decrement<K: Ord + fmt::Debug>(counts: &mut BTreeMap<K, u32>, key: K) -> bool {
    let count = counts.get_mut(&key).unwrap_or_else(|| panic!("{key:?} released more often than retained"));
    *count -= 1;
    let last = *count == 0;
    if last {
        counts.remove(&key);
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_release_is_told() {
        let cut = CutId::new(3).expect("not zero");
        let block = Frames::Block(BlockId { cut, leaf: LeafNumber(7) });
        let patches = Frames::Patches(BlockId { cut, leaf: LeafNumber(7) });
        let mut ledger = Ledger::default();
        ledger.retain(block);
        ledger.retain(block);
        ledger.retain(patches);
        assert_eq!((ledger.references(block), ledger.references_to_cut(cut)), (2, 3));
        assert!(!ledger.release(block));
        assert!(ledger.release(block));
        assert!(ledger.release(patches));
        assert_eq!((ledger.references_to_cut(cut), ledger.iter().count()), (0, 0));
    }

    #[test]
    #[should_panic(expected = "released more often than retained")]
    fn a_release_too_many_is_a_bug() {
        let cut = CutId::new(1).expect("not zero");
        Ledger::default().release(Frames::Block(BlockId { cut, leaf: LeafNumber(0) }));
    }
}
