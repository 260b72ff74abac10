//! A space: the guest-physical memory of one VM, and the rules of its pages.
//!
//! A guest page is exclusive and mutable (host anonymous memory in this VM's window), or shared and
//! immutable (a frame of the arena), or, for a while, *lent*: after a cut an exclusive page stays
//! where it is, write-protected, until it is published for the clones or no clone needs it.
//!
//! The space decides; a [`Host`] does. With the real window as host these are system calls, with a
//! simulated one the rules run anywhere.
//!
//! # Case table of a fault
//! | fault | trapped leaf | protected leaf | leaf without protection |
//! |---|---|---|---|
//! | touch | find out what it holds (ask the source of a cut, wait), map it, wake | wake | wake |
//! | store | wake | pinned and copied page: take the protection off that page; else force the leaf, take the protection off the leaf | wake |
//!
//! # Locks
//! `cutting` (one cut at a time) -> leaf lock -> `remap` -> `pins`. Who changes what a leaf maps,
//! or takes a protection off, holds the leaf's lock and reads `remap`; a cut, while it copies
//! pinned pages and protects, writes `remap` and takes no leaf lock: so nothing is un-protected,
//! remapped or woken in that phase, and no pin comes or goes unseen. What runs under `remap` waits
//! for nobody: it touches no page that could fault into user space.
//! A force holds its leaf's lock only, and waits for no other process and no vCPU.

mod cut;
mod discard;
mod fault;
mod force;
mod host;
mod pin;
mod report;
mod reset;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, OnceLock, PoisonError, RwLockReadGuard};

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use self::cut::{CutFigures, OpenCut, ReservedCut};
pub use self::fault::Fault;
pub use self::force::Keep;
pub use self::host::{Host, HostError, PageSource, PageStates, Patch, Traps};
pub use self::pin::{Access, PinTable};
pub use self::report::{LeafReport, PageCounts, SpaceReport};
pub use self::reset::ResetFigures;

use crate::board::{Board, LeafMap};
use crate::frames::CutId;
use crate::plants::{Plant, is_planted};
use crate::sync::{AtomicU32, Mutex, RwLock};
use crate::words::{Gfn, LeafNumber, MemoryShape, PageSet};

/// An operation on a space that cannot be done. Nothing has changed, unless the text says so.
#[derive(Debug, Error)]
pub enum SpaceError {
    /// The range is not memory.
    #[error("{gfn} is not memory of this vm")]
    NotMemory {
        /// The first page that is not.
        gfn: Gfn,
    },
    /// The bytes are lost: the VM that had them ended before they were published.
    #[error("{gfn} is lost: its source ended before the page was published")]
    Lost {
        /// The page.
        gfn: Gfn,
    },
    /// A pinned page cannot be given up.
    #[error("{gfn} is pinned")]
    Pinned {
        /// The page.
        gfn: Gfn,
    },
    /// A page is unpinned that is not pinned.
    #[error("{gfn} is not pinned")]
    NotPinned {
        /// The page.
        gfn: Gfn,
    },
    /// The VM is not a clone.
    #[error("the vm is no clone: there is no cut that it could return to")]
    NoOrigin,
    /// The space is being torn down.
    #[error("the vm is being stopped")]
    Stopping,
    /// The host refused.
    #[error("{0}")]
    Host(#[from] HostError),
}

/// What a window leaf maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// Not known yet: every access traps.
    Trapped,
    /// Anonymous memory: what was never touched is zero.
    Anonymous,
    /// The block of that cut, privately: exclusive pages lie over it.
    Block(CutId),
    /// Poisoned: its bytes are lost.
    Lost,
}

impl Backing {
    const fn encode(self) -> u32 {
        match self {
            Self::Trapped => 0,
            Self::Anonymous => 1,
            Self::Lost => 2,
            Self::Block(cut) => cut.get() << 2 | 3,
        }
    }

    const fn decode(word: u32) -> Self {
        match (word & 3, CutId::new(word >> 2)) {
            (0, _) => Self::Trapped,
            (1, _) => Self::Anonymous,
            (3, Some(cut)) => Self::Block(cut),
            _ => Self::Lost,
        }
    }
}

/// One leaf of a window. Changed under its lock and a read of `remap`; read by a cut that writes
/// `remap`. The atomics order nothing by themselves.
#[derive(Default)]
struct Leaf {
    lock: Mutex<()>,
    backing: AtomicU32,
    /// 1 = registered for store traps, so that it can be protected.
    registered: AtomicU32,
    /// [`OPEN`], [`PROTECTED`] or [`PARTLY_PROTECTED`].
    protected: AtomicU32,
    /// 1 = it maps something else than what the VM shared there when it began; or it traps, and not over
    /// the file that the window began over.
    departed: AtomicU32,
}

/// No protection lies over the leaf.
const OPEN: u32 = 0;
/// A protection lies over all of the leaf that was there when it was laid.
const PROTECTED: u32 = 1;
/// As before, but it has been taken off pages that had been copied for the cuts.
const PARTLY_PROTECTED: u32 = 2;

/// Counts of what a space has done, for tests and reports.
#[derive(Default)]
pub struct Counters {
    /// Leaves found out and mapped, at a first touch or because all was published.
    pub leaves_resolved: AtomicU64,
    /// Faults by a store into a protected leaf.
    pub store_faults: AtomicU64,
    /// Blocks written.
    pub blocks_published: AtomicU64,
    /// Patch frames written.
    pub patches_published: AtomicU64,
    /// Leaves whose protection was taken off without a copy, nobody needing them.
    pub leaves_reused: AtomicU64,
    /// Published leaves whose own copy was dropped.
    pub leaves_dropped: AtomicU64,
}

/// See the module.
pub struct Space<H: Host> {
    host: H,
    board: Board,
    slot: u32,
    shape: MemoryShape,
    leaves: Box<[Leaf]>,
    remap: RwLock<()>,
    cutting: Mutex<()>,
    /// 1 from the reservation of a cut to its end: leaves stay registered.
    reserving: AtomicU32,
    /// Cuts of this VM with leaves that may be pending, oldest first.
    cuts: RwLock<Vec<Arc<OpenCut>>>,
    pins: Mutex<PinTable>,
    /// The exclusive pages of protected blocks, as they were just before the protection.
    block_sets: Mutex<BTreeMap<LeafNumber, PageSet>>,
    /// The cut over whose file trapped leaves are mapped: the one that the VM is a clone of.
    placeholder: OnceLock<CutId>,
    stopping: AtomicU32,
    counters: Counters,
}

impl<H: Host> Space<H> {
    /// A space whose window is anonymous and untouched.
    pub fn new(host: H, board: Board, slot: u32, shape: MemoryShape) -> Self {
        let space = Self::unused(host, board, slot, shape);
        space.begin_as_root();
        space
    }

    /// The space of a clone of `cut`: all its leaves trap, over that cut's file.
    pub fn new_clone(host: H, board: Board, slot: u32, shape: MemoryShape, cut: CutId) -> Self {
        let space = Self::unused(host, board, slot, shape);
        space.begin_as_clone(cut);
        space
    }

    /// The space of a VM that will be one of the two: nobody has touched its window.
    pub fn unused(host: H, board: Board, slot: u32, shape: MemoryShape) -> Self {
        Self {
            host,
            board,
            slot,
            shape,
            leaves: (0..shape.span_leaves()).map(|_| Leaf::default()).collect(),
            remap: RwLock::new(()),
            cutting: Mutex::new(()),
            reserving: AtomicU32::new(0),
            cuts: RwLock::new(Vec::new()),
            pins: Mutex::new(PinTable::default()),
            block_sets: Mutex::new(BTreeMap::new()),
            placeholder: OnceLock::new(),
            stopping: AtomicU32::new(0),
            counters: Counters::default(),
        }
    }

    /// The window is anonymous and untouched.
    pub fn begin_as_root(&self) {
        for leaf in self.shape.leaves() {
            self.set_backing(leaf, Backing::Anonymous);
            self.board.member(self.slot).set_map(leaf, LeafMap::Own);
        }
    }

    /// All leaves of the window trap, over the file of `cut`. A space begins once.
    pub fn begin_as_clone(&self, cut: CutId) {
        let first = self.placeholder.set(cut);
        debug_assert!(first.is_ok(), "a space begins once");
    }

    /// The host under the space.
    pub fn host(&self) -> &H {
        &self.host
    }

    /// The shape of the memory.
    pub fn shape(&self) -> MemoryShape {
        self.shape
    }

    /// What has been done so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// What a leaf maps now.
    pub fn backing(&self, leaf: LeafNumber) -> Backing {
        Backing::decode(self.leaves[leaf.index()].backing.load(Ordering::Acquire))
    }

    fn set_backing(&self, leaf: LeafNumber, backing: Backing) {
        self.leaves[leaf.index()].backing.store(backing.encode(), Ordering::Release);
    }

    fn is_protected(&self, leaf: LeafNumber) -> bool {
        self.leaves[leaf.index()].protected.load(Ordering::Acquire) != OPEN
    }

    fn is_partly_protected(&self, leaf: LeafNumber) -> bool {
        self.leaves[leaf.index()].protected.load(Ordering::Acquire) == PARTLY_PROTECTED
    }

    fn set_protected(&self, leaf: LeafNumber, protected: u32) {
        self.leaves[leaf.index()].protected.store(protected, Ordering::Release);
    }

    fn has_departed(&self, leaf: LeafNumber) -> bool {
        self.leaves[leaf.index()].departed.load(Ordering::Acquire) != 0
    }

    fn set_departed(&self, leaf: LeafNumber, has_departed: bool) {
        let has_departed = has_departed && !is_planted(Plant::DepartureForgotten);
        self.leaves[leaf.index()].departed.store(u32::from(has_departed), Ordering::Release);
    }

    fn set_registered(&self, leaf: LeafNumber, is_registered: bool) {
        self.leaves[leaf.index()].registered.store(u32::from(is_registered), Ordering::Release);
    }

    /// The states of one leaf's pages.
    fn scan_leaf(&self, leaf: LeafNumber) -> Result<PageStates, SpaceError> {
        Ok(self.host.scan(leaf, 1)?.first().map(|(_, states)| *states).unwrap_or_default())
    }

    fn is_registered(&self, leaf: LeafNumber) -> bool {
        self.leaves[leaf.index()].registered.load(Ordering::Acquire) != 0
    }

    fn lock_leaf(&self, leaf: LeafNumber) -> MutexGuard<'_, ()> {
        // The lock guards no data of its own: a thread that died in it left the host as it was.
        self.leaves[leaf.index()].lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remapping(&self) -> RwLockReadGuard<'_, ()> {
        self.remap.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn pin_table(&self) -> MutexGuard<'_, PinTable> {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_cuts(&self) -> Vec<Arc<OpenCut>> {
        self.cuts.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn is_cut_reserved(&self) -> bool {
        self.reserving.load(Ordering::Acquire) != 0
    }

    /// Waiting threads give up with [`SpaceError::Stopping`].
    pub fn stop(&self) {
        self.stopping.store(1, Ordering::Release);
    }

    /// Whether that was said.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire) != 0
    }

    /// The first page of `first..first + pages` that is not memory, as an error.
    fn check_range(&self, first: Gfn, pages: u64) -> Result<(), SpaceError> {
        let is_memory = |gfn: Gfn| self.shape.contains(gfn.gpa(), crate::words::PAGE_BYTES);
        let limit = u64::from(self.shape.span_leaves()) * crate::words::wide(crate::words::LEAF_PAGES);
        match first.0.checked_add(pages) {
            // Past the end: the first page that is not memory, without walking there.
            Some(end) if end <= limit => (first.0..end)
                .map(Gfn)
                .find(|gfn| !is_memory(*gfn))
                .map_or(Ok(()), |gfn| Err(SpaceError::NotMemory { gfn })),
            _ => Err(SpaceError::NotMemory { gfn: Gfn(first.0.max(limit)) }),
        }
    }
}
