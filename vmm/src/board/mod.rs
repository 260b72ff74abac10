//! The board: the words that the processes of a colony share.
//!
//! There are no locks between processes, only words with a single writer each. The *keeper* writes
//! structure (table nodes, leaf records, who a cut's base is); a *member* writes its own
//! [`MemberArea`] and the leaf words of the cuts that it is the source of; a clone only sets request
//! bits. A process can be killed at any instruction, so no counter is changed by two processes.
//!
//! The board is an array of 32-bit atomics over a [`WordMemory`]: a shared mapping in a colony, a
//! box in tests of the core (which run under Miri and need no operating system).
//!
//! Every word of a fresh area is 0, and 0 is the value that promises nothing: leaf words are
//! PENDING, entries are empty.

mod cut_area;
mod member_area;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::sync::AtomicU32;
use crate::words::LeafNumber;

pub use self::cut_area::{CutArea, LeafWord, Patches};
pub use self::member_area::{BufferCounts, LeafMap, MemberArea};

/// Entries of a table node.
pub const NODE_ENTRIES: usize = 512;
/// Words of a leaf record, see [`crate::tables`].
pub const RECORD_WORDS: usize = 32;
/// Words in a page: areas begin on pages so that each can be reserved and punched alone.
const PAGE_WORDS: usize = crate::words::PAGE_BYTES / 4;

/// The memory under a board.
pub trait WordMemory: Send + Sync {
    /// All words, zero where never written.
    fn words(&self) -> &[AtomicU32];
    /// Makes sure that stores to these words cannot fail for lack of memory.
    ///
    /// # Errors
    /// There is not enough memory.
    fn reserve(&self, words: Range<usize>) -> io::Result<()>;
    /// Makes these words 0 and gives their memory back.
    ///
    /// # Errors
    /// The host refused.
    fn punch(&self, words: Range<usize>) -> io::Result<()>;
    /// Makes these words 0, whole pages of them: a fork waits for it.
    ///
    /// # Errors
    /// The host refused.
    fn clear(&self, words: Range<usize>) -> io::Result<()> {
        self.punch(words)
    }
}

/// How many of each thing a board has room for. Memory is used only for what is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardShape {
    /// Leaves of a VM, the device hole included.
    pub leaves: u32,
    /// Cuts at one time.
    pub cuts: u32,
    /// Members at one time.
    pub members: u32,
    /// Table nodes.
    pub nodes: u32,
    /// Leaf records.
    pub records: u32,
}

impl BoardShape {
    /// Where a cut's area lies. Numbers of cuts are never used again, places are: the keeper sees to it
    /// that no two cuts share one.
    #[must_use]
    pub fn place_of(&self, cut: crate::frames::CutId) -> u32 {
        cut.get() % self.cuts
    }

    fn cut_words(&self) -> usize {
        CutArea::words_for(self.leaves).next_multiple_of(PAGE_WORDS)
    }

    fn member_words(&self) -> usize {
        MemberArea::words_for(self.leaves).next_multiple_of(PAGE_WORDS)
    }

    fn nodes_start(&self) -> usize {
        0
    }

    fn records_start(&self) -> usize {
        self.nodes_start() + (self.nodes as usize * NODE_ENTRIES).next_multiple_of(PAGE_WORDS)
    }

    fn members_start(&self) -> usize {
        self.records_start() + (self.records as usize * RECORD_WORDS).next_multiple_of(PAGE_WORDS)
    }

    fn cuts_start(&self) -> usize {
        self.members_start() + self.members as usize * self.member_words()
    }

    /// Words of the whole board.
    #[must_use]
    pub fn total_words(&self) -> usize {
        self.cuts_start() + self.cuts as usize * self.cut_words()
    }
}

/// A colony's shared words, see the module.
#[derive(Clone)]
pub struct Board {
    shape: BoardShape,
    memory: Arc<dyn WordMemory>,
}

impl std::fmt::Debug for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Board").field("shape", &self.shape).finish_non_exhaustive()
    }
}

impl Board {
    /// A board over `memory`, which must hold `shape.total_words()` words.
    ///
    /// # Panics
    /// The memory is too small: it was made for another shape.
    #[must_use]
    pub fn new(shape: BoardShape, memory: Arc<dyn WordMemory>) -> Self {
        assert!(memory.words().len() >= shape.total_words(), "board memory made for another shape");
        Self { shape, memory }
    }

    /// The shape given at creation.
    #[must_use]
    pub fn shape(&self) -> BoardShape {
        self.shape
    }

    /// The entries of table node `node`.
    #[must_use]
    pub fn node(&self, node: u32) -> &[AtomicU32] {
        assert!(node < self.shape.nodes, "node {node} beyond the board");
        let start = self.shape.nodes_start() + node as usize * NODE_ENTRIES;
        &self.memory.words()[start..start + NODE_ENTRIES]
    }

    /// The words of leaf record `record`.
    #[must_use]
    pub fn record(&self, record: u32) -> &[AtomicU32] {
        assert!(record < self.shape.records, "record {record} beyond the board");
        let start = self.shape.records_start() + record as usize * RECORD_WORDS;
        &self.memory.words()[start..start + RECORD_WORDS]
    }

    /// The area of member slot `slot`.
    #[must_use]
    pub fn member(&self, slot: u32) -> MemberArea<'_> {
        MemberArea::over(&self.memory.words()[self.member_range(slot)])
    }

    /// The area of cut `cut`.
    #[must_use]
    pub fn cut(&self, cut: crate::frames::CutId) -> CutArea<'_> {
        CutArea::over(&self.memory.words()[self.cut_range(cut)], self.shape.leaves)
    }

    /// Reserves the memory of a cut's area and clears it.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn open_cut(&self, cut: crate::frames::CutId) -> io::Result<()> {
        let range = self.cut_range(cut);
        self.memory.clear(range.clone())?;
        // Patch records at the end are reserved when a leaf is published with patches.
        self.memory.reserve(range.start..range.start + CutArea::fixed_words(self.shape.leaves))
    }

    /// Reserves the memory of the patch record of one leaf of a cut.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn reserve_patches(&self, cut: crate::frames::CutId, leaf: LeafNumber) -> io::Result<()> {
        let start = self.cut_range(cut).start;
        let record = CutArea::patch_words(self.shape.leaves, leaf);
        self.memory.reserve(start + record.start..start + record.end)
    }

    /// Gives the memory of a cut's area back.
    ///
    /// # Errors
    /// The host refused.
    pub fn close_cut(&self, cut: crate::frames::CutId) -> io::Result<()> {
        self.memory.punch(self.cut_range(cut))
    }

    /// Reserves the memory of a member's area and clears it.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn open_member(&self, slot: u32) -> io::Result<()> {
        self.memory.clear(self.member_range(slot))?;
        self.memory.reserve(self.member_range(slot))
    }

    fn member_range(&self, slot: u32) -> Range<usize> {
        assert!(slot < self.shape.members, "member {slot} beyond the board");
        let start = self.shape.members_start() + slot as usize * self.shape.member_words();
        start..start + self.shape.member_words()
    }

    fn cut_range(&self, cut: crate::frames::CutId) -> Range<usize> {
        let start = self.shape.cuts_start() + self.shape.place_of(cut) as usize * self.shape.cut_words();
        start..start + self.shape.cut_words()
    }
}

/// Words on the heap: a board for one process, in tests of the core.
pub struct HeapWords(Box<[AtomicU32]>);

impl HeapWords {
    /// Zeroed words for a board of `shape`.
    #[must_use]
    pub fn for_shape(shape: &BoardShape) -> Self {
        Self((0..shape.total_words()).map(|_| AtomicU32::new(0)).collect())
    }
}

impl WordMemory for HeapWords {
    fn words(&self) -> &[AtomicU32] {
        &self.0
    }

    fn reserve(&self, _words: Range<usize>) -> io::Result<()> {
        Ok(())
    }

    fn punch(&self, words: Range<usize>) -> io::Result<()> {
        for word in &self.0[words] {
            word.store(0, std::sync::atomic::Ordering::Relaxed);
        }
        Ok(())
    }
}
