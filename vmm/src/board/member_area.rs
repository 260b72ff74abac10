//! The area of one member: what its process tells the others without being asked.
//!
//! | words | writer | meaning |
//! |---|---|---|
//! | doorbell | anybody adds 1, then wakes | somebody set a request bit in a cut of this member |
//! | walks | member | odd while one of its threads walks the tables ([`MemberArea::walk`]) |
//! | base | keeper | [`crate::tables::Entry`] of the VM's shared memory |
//! | maps, one word a leaf | member | [`LeafMap`]: what the window leaf maps |

use std::sync::atomic::Ordering;

use crate::frames::CutId;
use crate::sync::AtomicU32;
use crate::words::LeafNumber;

const DOORBELL: usize = 0;
const WALKERS: usize = 1;
const BASE: usize = 2;
const HEADER_WORDS: usize = 16;

/// See the module.
#[derive(Clone, Copy)]
pub struct MemberArea<'a> {
    words: &'a [AtomicU32],
}

impl<'a> MemberArea<'a> {
    pub(super) fn over(words: &'a [AtomicU32]) -> Self {
        Self { words }
    }

    pub(super) fn words_for(leaves: u32) -> usize {
        HEADER_WORDS + leaves as usize
    }

    /// The doorbell word, for waiting on it.
    #[must_use]
    pub fn doorbell(&self) -> &'a AtomicU32 {
        &self.words[DOORBELL]
    }

    /// Rings the doorbell; the caller then wakes those who wait on it.
    pub fn ring(&self) {
        self.words[DOORBELL].fetch_add(1, Ordering::Release);
    }

    /// Threads of the member that walk the tables now: what the keeper has unlinked is reused only
    /// after it has seen 0 here.
    #[must_use]
    pub fn walkers(&self) -> u32 {
        self.words[WALKERS].load(Ordering::SeqCst)
    }

    /// Runs `walk` with the encoded base entry of the VM, while the keeper reuses nothing that it
    /// may reach.
    pub fn walk<T>(&self, walk: impl FnOnce(u32) -> T) -> T {
        // SeqCst: the count must be visible before the base is read, see `walkers`.
        self.words[WALKERS].fetch_add(1, Ordering::SeqCst);
        let result = walk(self.words[BASE].load(Ordering::SeqCst));
        self.words[WALKERS].fetch_sub(1, Ordering::SeqCst);
        result
    }

    /// Keeper: the VM's shared memory.
    pub fn set_base(&self, base: u32) {
        self.words[BASE].store(base, Ordering::SeqCst);
    }

    /// What the window maps at `leaf`.
    #[must_use]
    pub fn map(&self, leaf: LeafNumber) -> LeafMap {
        LeafMap::decode(self.words[HEADER_WORDS + leaf.index()].load(Ordering::Acquire))
    }

    /// Member: says what the window maps at `leaf`. A block is named before it is mapped, and until
    /// after it is not any more.
    pub fn set_map(&self, leaf: LeafNumber, map: LeafMap) {
        self.words[HEADER_WORDS + leaf.index()].store(map.encode(), Ordering::Release);
    }
}

/// What a member says of a leaf of its window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeafMap {
    /// Nothing: it traps, or is just changing. Its VM may need whatever its table names there.
    Unknown,
    /// Anonymous memory: the VM needs nothing of what its table names there.
    Own,
    /// The block of that cut.
    Block(CutId),
}

impl LeafMap {
    const fn encode(self) -> u32 {
        match self {
            Self::Unknown => 0,
            Self::Own => 1,
            Self::Block(cut) => cut.get() << 1,
        }
    }

    const fn decode(word: u32) -> Self {
        match CutId::new(word >> 1) {
            Some(cut) => Self::Block(cut),
            None if word == 1 => Self::Own,
            None => Self::Unknown,
        }
    }
}
