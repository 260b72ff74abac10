//! The cut: the instant a clone is taken, seen from the source's memory.
//!
//! Reserve first, while the VM runs: it may fail and changes nothing that anybody sees. Leaves are
//! registered, the lent sets of earlier cuts are recorded (a new protection would blur them), and
//! blocks with exclusive pages are protected *ahead*: a store to one opens it again. Then perform,
//! with the vCPUs stopped and completions held: copy exactly the pinned pages, protect.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Backing, Host, HostError, OPEN, PROTECTED, PageSource, PageStates, Space, SpaceError, Traps};
use crate::failure;
use crate::frames::CutId;
use crate::plants::{Plant, is_planted};
use crate::sync::{AtomicU32, Mutex};
use crate::words::{Gfn, LeafNumber, PAGE_BYTES, PageSet};

/// How many leaves over blocks are protected at a time while the VM runs. One call for each would have
/// the host interrupt the vCPUs for each.
const LEAVES_AHEAD: u32 = 16;

/// Room for copies of pages that are pinned between a cut's reservation and its pause.
const SPARE_COPIES: usize = 8;

/// A cut of this VM with leaves that may be pending.
pub struct OpenCut {
    id: CutId,
    previous: Option<CutId>,
    /// Lent sets that were scanned before a protection was laid over them, by leaf.
    recorded: Mutex<BTreeMap<LeafNumber, PageSet>>,
    copies: PinnedCopies,
    next_frame: AtomicU32,
}

/// The pinned pages as they were at the cut. They belong to the cut, whatever becomes of the pins.
#[derive(Default)]
struct PinnedCopies {
    /// Ascending.
    gfns: Vec<Gfn>,
    /// Of each page; before the cut is performed, room that has been touched.
    bytes: Vec<[u8; PAGE_BYTES]>,
}

impl PinnedCopies {
    /// Room for `pages` in all. Everything may be pinned: that much memory may be refused.
    fn make_room(&mut self, pages: usize) -> Result<(), SpaceError> {
        let refused = |source| HostError {
            action: "making room for copies of pinned pages",
            leaf: LeafNumber(0),
            source,
        };
        failure::point("cut.room").map_err(|injected| refused(injected.into()))?;
        let more = pages.saturating_sub(self.bytes.len());
        let has_room = self.gfns.try_reserve(pages).and_then(|()| self.bytes.try_reserve(more));
        has_room.map_err(|_| refused(std::io::ErrorKind::OutOfMemory.into()))?;
        self.bytes.resize(self.bytes.len() + more, [1; PAGE_BYTES]);
        Ok(())
    }
}

impl OpenCut {
    /// The cut's name.
    pub fn id(&self) -> CutId {
        self.id
    }

    /// The cut that this VM made before it.
    pub(super) fn previous(&self) -> Option<CutId> {
        self.previous
    }

    fn recorded_sets(&self) -> MutexGuard<'_, BTreeMap<LeafNumber, PageSet>> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The copy of a page that was pinned at the cut.
    pub(super) fn copy_of(&self, gfn: Gfn) -> Option<&[u8; PAGE_BYTES]> {
        self.copies.gfns.binary_search(&gfn).ok().map(|index| &self.copies.bytes[index])
    }

    /// The pages of a leaf that were pinned at the cut.
    pub(super) fn copies_in(&self, leaf: LeafNumber) -> PageSet {
        let mut pages = PageSet::EMPTY;
        let from = self.copies.gfns.partition_point(|gfn| *gfn < leaf.first_gfn());
        for gfn in self.copies.gfns[from..].iter().take_while(|gfn| gfn.leaf() == leaf) {
            pages.insert(gfn.in_leaf());
        }
        pages
    }

    pub(super) fn has_copies_in(&self, leaf: LeafNumber) -> bool {
        !self.copies_in(leaf).is_empty()
    }

    /// Where a page that was lent or pinned at the cut is to be taken from.
    pub(super) fn source_of(&self, gfn: Gfn) -> PageSource<'_> {
        self.copy_of(gfn).map_or(PageSource::Window, PageSource::Copy)
    }

    /// Room for `count` frames in the cut's patch file; the number of the first.
    pub(super) fn take_frames(&self, count: u32) -> u32 {
        self.next_frame.fetch_add(count, Ordering::Relaxed)
    }
}

/// A cut that can be performed. Dropping it gives it up.
pub struct ReservedCut<'a, H: Host> {
    space: &'a Space<H>,
    id: CutId,
    copies: PinnedCopies,
    is_performed: bool,
    _cutting: MutexGuard<'a, ()>,
}

/// What a cut did in the pause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutFigures {
    /// Pinned pages that were copied.
    pub copied_pages: u64,
    /// Time spent copying them.
    pub copy: Duration,
    /// Time spent protecting.
    pub protect: Duration,
    /// Leaves that the clone cannot share at once.
    pub protected_leaves: u64,
    /// Calls that protected a run of leaves.
    pub protect_calls: u64,
}

impl<H: Host> Drop for ReservedCut<'_, H> {
    fn drop(&mut self) {
        let space = self.space;
        space.reserving.store(0, Ordering::Release);
        if self.is_performed {
            space.unregister(|leaf| !space.is_protected(leaf));
        } else {
            // Nobody waits for what was protected ahead, or before the host refused the rest.
            space.unregister(|leaf| !space.is_protected(leaf) || space.pending_cuts(leaf).is_empty());
        }
    }
}

impl<H: Host> Space<H> {
    /// Prepares a cut while the VM runs.
    ///
    /// # Errors
    /// The host refused; the VM runs on as before.
    pub fn reserve_cut(&self, id: CutId) -> Result<ReservedCut<'_, H>, SpaceError> {
        let cutting = self.cutting.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let _remap = self.remap.write().unwrap_or_else(PoisonError::into_inner);
            self.reserving.store(1, Ordering::Release);
        }
        let pinned = self.pin_table().pinned_pages();
        let mut reserved = ReservedCut {
            space: self,
            id,
            copies: PinnedCopies::default(),
            is_performed: false,
            _cutting: cutting,
        };
        // Pins may come until the pause: some room more, touched now rather than then.
        let room = pinned + pinned / 4 + SPARE_COPIES;
        reserved.copies.make_room(room)?;
        self.register_anonymous()?;
        self.record_pending()?;
        self.protect_ahead()?;
        Ok(reserved)
    }

    /// Registers all anonymous leaves for store traps.
    fn register_anonymous(&self) -> Result<(), SpaceError> {
        let unregistered =
            |leaf: LeafNumber| self.backing(leaf) == Backing::Anonymous && !self.is_registered(leaf);
        for (first, count) in self.runs(unregistered) {
            self.host.register(first, count, Traps::Stores)?;
            for leaf in (first.0..first.0 + count).map(LeafNumber) {
                self.set_registered(leaf, true);
            }
        }
        Ok(())
    }

    /// Records what is lent to earlier cuts: exact now, since lent pages keep their protection and
    /// newer ones have none; blurred by the next protection. A leaf that is forced meanwhile may be
    /// recorded wrongly, and nobody asks for it any more.
    fn record_pending(&self) -> Result<(), SpaceError> {
        if is_planted(Plant::LentNotRecorded) {
            return Ok(());
        }
        for cut in self.open_cuts() {
            for leaf in self.board.cut(cut.id()).pending() {
                self.lent_to(&cut, leaf)?;
            }
        }
        Ok(())
    }

    /// The pages of a leaf that are lent to a cut on which it is pending: as recorded, or as they are
    /// now, which is recorded then. Whoever comes first, force or the next cut, decides.
    pub(super) fn lent_to(&self, cut: &OpenCut, leaf: LeafNumber) -> Result<PageSet, SpaceError> {
        let mut recorded = cut.recorded_sets();
        if let Some(lent) = recorded.get(&leaf) {
            return Ok(*lent);
        }
        let states = self.scan_leaf(leaf)?;
        let lent = match () {
            () if is_planted(Plant::LentForgetsSwapped) => states.present.minus(&states.written),
            () if is_planted(Plant::UnprotectedIsLent) => states.anonymous,
            () => states.anonymous.minus(&states.written),
        };
        recorded.insert(leaf, lent);
        Ok(lent)
    }

    /// Protects the blocks that have exclusive pages now, so that the pause need not: some at a time,
    /// since whoever wants to map or to open a leaf waits meanwhile.
    fn protect_ahead(&self) -> Result<(), SpaceError> {
        for (first, count) in self.runs(|leaf| self.is_open_block(leaf)) {
            for done in (0..count).step_by(LEAVES_AHEAD as usize) {
                let _remap = self.remap.write().unwrap_or_else(PoisonError::into_inner);
                self.protect_blocks(LeafNumber(first.0 + done), LEAVES_AHEAD.min(count - done))?;
            }
        }
        Ok(())
    }

    fn is_open_block(&self, leaf: LeafNumber) -> bool {
        matches!(self.backing(leaf), Backing::Block(_)) && !self.is_protected(leaf)
    }

    /// Protects those of `count` leaves from `first` that are open blocks with exclusive pages, neighbours
    /// by one call; returns the number of calls. `remap` is held for writing: nothing but stores can change
    /// pages meanwhile.
    fn protect_blocks(&self, first: LeafNumber, count: u32) -> Result<u64, SpaceError> {
        let mut calls = 0;
        loop {
            let mut found = self.host.scan(first, count)?;
            found.retain(|(leaf, states)| !states.anonymous.is_empty() && self.is_open_block(*leaf));
            let mut has_changed = false;
            for run in found.chunk_by(|(leaf, _), (next, _)| leaf.0 + 1 == next.0) {
                has_changed |= !self.protect_neighbours(run)?;
                calls += 1;
            }
            if !has_changed {
                return Ok(calls);
            }
        }
    }

    /// Protects neighbouring blocks, and remembers their exclusive pages as they were just before: the
    /// protection leaves markers that look the same. False: pages of some became exclusive meanwhile, which
    /// are open again. (One that a store made so meanwhile and that is in swap before the second scan would
    /// go unseen. The host's kernel takes no page for swap that was used since it looked last.)
    fn protect_neighbours(&self, blocks: &[(LeafNumber, PageStates)]) -> Result<bool, SpaceError> {
        let [(first, _), ..] = blocks else { return Ok(true) };
        let count = u32::try_from(blocks.len()).expect("no more than leaves");
        if blocks.iter().any(|(leaf, _)| !self.is_registered(*leaf)) {
            self.host.register(*first, count, Traps::Stores)?;
        }
        for (leaf, before) in blocks {
            self.set_registered(*leaf, true);
            self.block_sets().insert(*leaf, before.anonymous);
            // First: where the host gives up half way, whoever meets the protection must find it.
            self.set_protected(*leaf, PROTECTED);
        }
        self.host.protect(*first, count)?;
        if blocks.iter().all(|(_, before)| before.anonymous == PageSet::ALL) {
            return Ok(true);
        }
        let after: BTreeMap<_, _> = self.host.scan(*first, count)?.into_iter().collect();
        let mut is_as_before = true;
        for (leaf, before) in blocks {
            // A store between the scan and the protection made one more page exclusive: it is present,
            // markers are not.
            let present = after.get(leaf).map_or(PageSet::EMPTY, |states| states.present);
            let is_changed = !present.minus(&before.anonymous).is_empty();
            if is_changed && !is_planted(Plant::StoresMeanwhileUnseen) {
                self.host.unprotect(*leaf)?;
                self.set_protected(*leaf, OPEN);
                is_as_before = false;
            }
        }
        Ok(is_as_before)
    }

    /// Maximal runs of RAM leaves for which `is` holds.
    pub(super) fn runs(&self, is: impl Fn(LeafNumber) -> bool) -> Vec<(LeafNumber, u32)> {
        let mut runs: Vec<(LeafNumber, u32)> = Vec::new();
        for leaf in self.shape.leaves().filter(|leaf| is(*leaf)) {
            match runs.last_mut() {
                Some((first, count)) if first.0 + *count == leaf.0 => *count += 1,
                _ => runs.push((leaf, 1)),
            }
        }
        runs
    }

    /// Takes the registration off leaves that nothing needs it for. One that cannot be opened stays as
    /// it is until a store comes to it, or the next cut.
    fn unregister(&self, is_idle: impl Fn(LeafNumber) -> bool) {
        for leaf in self.shape.leaves().filter(|leaf| self.is_registered(*leaf) && is_idle(*leaf)) {
            let _leaf = self.lock_leaf(leaf);
            if self.is_registered(leaf)
                && is_idle(leaf)
                && let Err(error) = self.open_leaf(leaf)
            {
                tracing::warn!(%error, "a leaf stays registered");
            }
        }
    }
}

impl<H: Host> ReservedCut<'_, H> {
    /// The cut's name.
    pub fn id(&self) -> CutId {
        self.id
    }

    /// Performs the cut. The vCPUs are stopped and completions are held; everything else goes on.
    ///
    /// # Errors
    /// The host refused what the reservation had prepared. No page has been given up: the VM runs
    /// on, unchanged.
    pub fn perform(mut self, previous: Option<CutId>) -> Result<CutFigures, SpaceError> {
        let space = self.space;
        let mut figures = CutFigures::default();
        let remap = space.remap.write().unwrap_or_else(PoisonError::into_inner);
        let start = Instant::now();
        // None but for pins that have come since the reservation.
        self.copies.make_room(space.pin_table().pinned_pages())?;
        let PinnedCopies { gfns, bytes } = &mut self.copies;
        gfns.extend(space.pin_table().pages().filter(|_| !is_planted(Plant::PinnedNotCopied)));
        for (gfn, bytes) in gfns.iter().zip(bytes.iter_mut()) {
            space.host.copy_page(*gfn, bytes);
        }
        bytes.truncate(gfns.len());
        figures.copied_pages = crate::words::wide(self.copies.gfns.len());
        figures.copy = start.elapsed();
        let start = Instant::now();
        let recorded = space.protect_all(self.id, &mut figures)?;
        figures.protect = start.elapsed();
        let cut = OpenCut {
            id: self.id,
            previous,
            recorded: Mutex::new(recorded),
            copies: std::mem::take(&mut self.copies),
            next_frame: AtomicU32::new(0),
        };
        space.cuts.write().unwrap_or_else(PoisonError::into_inner).push(Arc::new(cut));
        space.reserving.store(0, Ordering::Release);
        drop(remap);
        self.is_performed = true;
        Ok(figures)
    }
}

impl<H: Host> Space<H> {
    /// The protecting phase: nothing is un-protected, remapped or woken meanwhile. Returns the lent
    /// sets of blocks.
    fn protect_all(
        &self,
        cut: CutId,
        figures: &mut CutFigures,
    ) -> Result<BTreeMap<LeafNumber, PageSet>, SpaceError> {
        let area = self.board.cut(cut);
        let mut recorded = BTreeMap::new();
        // None but those that the host refused to register when they came to be, meanwhile.
        self.register_anonymous()?;
        for (first, count) in self.runs(|leaf| self.backing(leaf) == Backing::Anonymous) {
            // First: where the host gives up half way, whoever meets the protection must find it.
            for leaf in (first.0..first.0 + count).map(LeafNumber) {
                self.set_protected(leaf, PROTECTED);
            }
            self.host.protect(first, count)?;
            figures.protect_calls += 1;
            for leaf in (first.0..first.0 + count).map(LeafNumber) {
                area.set_protected(leaf);
                figures.protected_leaves += 1;
            }
        }
        for (first, count) in self.runs(|leaf| self.is_open_block(leaf)) {
            figures.protect_calls += self.protect_blocks(first, count)?;
        }
        for leaf in self.shape.leaves() {
            if matches!(self.backing(leaf), Backing::Block(_)) && self.is_protected(leaf) {
                if self.is_partly_protected(leaf) {
                    // The open pages are of the set that is known: they were pinned at a cut.
                    self.host.protect(leaf, 1)?;
                    self.set_protected(leaf, PROTECTED);
                    figures.protect_calls += 1;
                }
                let lent = self.block_sets().get(&leaf).copied().unwrap_or(PageSet::EMPTY);
                if !is_planted(Plant::MarkersAreLent) {
                    recorded.insert(leaf, lent);
                }
                area.set_protected(leaf);
                figures.protected_leaves += 1;
            }
        }
        Ok(recorded)
    }

    pub(super) fn block_sets(&self) -> MutexGuard<'_, BTreeMap<LeafNumber, PageSet>> {
        self.block_sets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
