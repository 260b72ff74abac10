//! The area of one member: what its process tells the others without being asked.
//!
//! | words | writer | meaning |
//! |---|---|---|
//! | doorbell | anybody adds 1, then wakes | somebody set a request bit in a cut of this member |
//! | walks | member | odd while one of its threads walks the tables ([`MemberArea::walk`]) |
//! | base | keeper | [`crate::tables::Entry`] of the VM's shared memory |
//! | buffers, four words | member | [`BufferCounts`]: what its devices keep pinned for long |
//! | news | member sets, keeper clears | the buffers have changed, and the keeper was told |
//! | maps, one word a leaf | member | [`LeafMap`]: what the window leaf maps |

use std::sync::atomic::Ordering;

use crate::frames::CutId;
use crate::sync::AtomicU32;
use crate::words::LeafNumber;

const DOORBELL: usize = 0;
const WALKERS: usize = 1;
const BASE: usize = 2;
/// Buffers registered, unregistered; their pages.
const BUFFERS: usize = 3;
const NEWS: usize = 7;
const HEADER_WORDS: usize = 16;

/// How many buffers a VM's devices have pinned at a guest's wish, and let go, since it began. Counts start
/// again at 0 after the greatest: only differences mean something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BufferCounts {
    /// Buffers registered.
    pub registered: u32,
    /// Buffers unregistered.
    pub unregistered: u32,
    /// Pages of all that were registered.
    pub registered_pages: u32,
    /// Pages of all that were unregistered.
    pub unregistered_pages: u32,
}

impl BufferCounts {
    /// Buffers that are registered now, and their pages.
    #[must_use]
    pub fn held(&self) -> (u32, u32) {
        let buffers = self.registered.wrapping_sub(self.unregistered);
        (buffers, self.registered_pages.wrapping_sub(self.unregistered_pages))
    }

    /// Buffers registered and unregistered since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> (u32, u32) {
        let registered = self.registered.wrapping_sub(before.registered);
        (registered, self.unregistered.wrapping_sub(before.unregistered))
    }
}

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

    /// Member: counts a buffer of so many pages that was registered, or unregistered. Returns whether the
    /// keeper is to be told: it has looked since it was told the last time.
    #[must_use]
    pub fn count_buffer(&self, is_registered: bool, pages: u32) -> bool {
        let first = BUFFERS + usize::from(!is_registered);
        self.words[first + 2].fetch_add(pages, Ordering::Relaxed);
        self.words[first].fetch_add(1, Ordering::Relaxed);
        // Pairs with `take_buffers`: whoever clears this sees the counts of all who have set it before.
        self.words[NEWS].swap(1, Ordering::AcqRel) == 0
    }

    /// Keeper: the counts. Each is exact, all of them together only while the VM stands still; of any
    /// later change the keeper is told.
    #[must_use]
    pub fn take_buffers(&self) -> BufferCounts {
        self.words[NEWS].swap(0, Ordering::AcqRel);
        let count = |word: usize| self.words[BUFFERS + word].load(Ordering::Relaxed);
        BufferCounts {
            registered: count(0),
            unregistered: count(1),
            registered_pages: count(2),
            unregistered_pages: count(3),
        }
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
