//! A simulated host: a window whose pages behave as the Linux kernel's do under userfaultfd, each
//! page one number.
//!
//! What it keeps to, as measured on a real kernel: a protection marks present (or swapped) anonymous
//! pages, zero pages that were read, and *every* page of a privately mapped block; a page that was
//! never touched is not marked, and a store to it does not trap; markers on pages of a block scan
//! like swapped-out pages that were not written, until the page is read; a new mapping has neither
//! registration nor marks; devices store to pinned pages whatever lies over them.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::world::{Call, HostPlant, Waits, World};
use crate::frames::CutId;
use crate::space::{Fault, Host, HostError, PageSource, PageStates, Patch, Traps};
use crate::sync::{AtomicU32, point};
use crate::words::{Gfn, LEAF_PAGES, LeafNumber, MemoryShape, PAGE_BYTES, PageSet, index};

/// What a guest's access ran into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trap {
    Fault(Fault),
    /// A memory error.
    Poison,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mapping {
    Anonymous,
    File(CutId),
}

#[derive(Clone, Copy, Default)]
struct Page {
    /// The window's own bytes.
    own: Option<u64>,
    is_swapped: bool,
    mark: bool,
    /// A page of the file, or the zero page, stands in the page table.
    is_seen: bool,
    is_poisoned: bool,
    holds: u32,
    /// The host page that holds the own bytes.
    frame: u64,
    /// The one that devices hold.
    held_frame: u64,
}

impl Page {
    /// The page gets own bytes: where they are, or in a fresh host page.
    fn put(&mut self, world: &World, value: u64) {
        if self.own.replace(value).is_none() {
            self.frame = world.new_frame();
        }
        (self.is_seen, self.is_swapped) = (false, false);
    }

    /// A device comes by: what it holds must be where it was.
    fn assert_held(&self, gfn: Gfn) {
        assert!(self.holds > 0, "{gfn} is not held");
        assert!(self.own.is_some() && self.frame == self.held_frame, "{gfn}: a held page has gone away");
    }
}

struct SimLeaf {
    mapping: Mapping,
    traps_touches: bool,
    traps_stores: bool,
    pages: Box<[Page]>,
}

impl SimLeaf {
    fn fresh(mapping: Mapping) -> Self {
        Self {
            mapping,
            traps_touches: false,
            traps_stores: false,
            pages: vec![Page::default(); LEAF_PAGES].into(),
        }
    }
}

pub(super) struct SimHost {
    world: Arc<World>,
    leaves: Mutex<Vec<SimLeaf>>,
    idle_waits: AtomicU32,
}

fn number_of(bytes: &[u8; PAGE_BYTES]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"))
}

impl SimHost {
    /// A window of untouched anonymous memory.
    pub(super) fn new(world: Arc<World>, shape: MemoryShape) -> Self {
        let leaves = (0..shape.span_leaves()).map(|_| SimLeaf::fresh(Mapping::Anonymous)).collect();
        Self { world, leaves: Mutex::new(leaves), idle_waits: AtomicU32::new(0) }
    }

    /// A window that traps everywhere, over the file of a cut.
    pub(super) fn new_clone(world: Arc<World>, shape: MemoryShape, cut: CutId) -> Self {
        let host = Self::new(world, shape);
        for leaf in host.leaves().iter_mut() {
            leaf.mapping = Mapping::File(cut);
            leaf.traps_touches = true;
        }
        host
    }

    fn leaves(&self) -> MutexGuard<'_, Vec<SimLeaf>> {
        self.leaves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_leaf<T>(&self, leaf: LeafNumber, work: impl FnOnce(&mut SimLeaf) -> T) -> T {
        work(&mut self.leaves()[leaf.index()])
    }

    fn try_call(&self, call: Call, action: &'static str, leaf: LeafNumber) -> Result<(), HostError> {
        point();
        if self.world.fails(call) { Err(refused(action, leaf)) } else { Ok(()) }
    }

    /// What a page shows; never called where it would trap.
    fn shown(&self, leaf: LeafNumber, state: &SimLeaf, position: usize) -> u64 {
        match (state.pages[position].own, state.mapping) {
            (Some(value), _) => value,
            (None, Mapping::Anonymous) => 0,
            (None, Mapping::File(cut)) => self.world.block(cut, leaf)[position],
        }
    }

    /// A guest's load.
    pub(super) fn load(&self, gfn: Gfn) -> Result<u64, Trap> {
        point();
        let (leaf, position) = (gfn.leaf(), gfn.in_leaf());
        self.with_leaf(leaf, |state| {
            if state.pages[position].is_poisoned {
                return Err(Trap::Poison);
            }
            if state.traps_touches {
                return Err(Trap::Fault(Fault::Touch));
            }
            let value = self.shown(leaf, state, position);
            let page = &mut state.pages[position];
            page.is_swapped = false;
            page.is_seen |= page.own.is_none();
            Ok(value)
        })
    }

    /// A guest's store.
    pub(super) fn store(&self, gfn: Gfn, value: u64) -> Result<(), Trap> {
        point();
        let stores_pass = self.world.plant == HostPlant::StoresPassProtection;
        self.with_leaf(gfn.leaf(), |state| {
            let page = &mut state.pages[gfn.in_leaf()];
            if page.is_poisoned {
                return Err(Trap::Poison);
            }
            if state.traps_touches {
                return Err(Trap::Fault(Fault::Touch));
            }
            if page.mark && !stores_pass {
                return Err(Trap::Fault(Fault::Store));
            }
            page.put(&self.world, value);
            Ok(())
        })
    }

    /// A device's store to a page that it holds.
    pub(super) fn device_store(&self, gfn: Gfn, value: u64) {
        point();
        self.with_leaf(gfn.leaf(), |state| {
            let page = &mut state.pages[gfn.in_leaf()];
            page.assert_held(gfn);
            page.own = Some(value);
        });
    }

    /// What a device reads from a page that it holds.
    pub(super) fn device_load(&self, gfn: Gfn) -> u64 {
        self.with_leaf(gfn.leaf(), |state| {
            let page = &state.pages[gfn.in_leaf()];
            page.assert_held(gfn);
            page.own.expect("a held page has bytes")
        })
    }

    pub(super) fn hold(&self, gfn: Gfn) {
        self.with_leaf(gfn.leaf(), |state| {
            let page = &mut state.pages[gfn.in_leaf()];
            // With more than one thread a cut may have come since the pin.
            let is_open = !page.mark || !matches!(self.world.waits(), Waits::Serves);
            assert!(page.own.is_some() && is_open, "{gfn} was pinned and is not exclusive");
            assert!(page.holds == 0 || page.frame == page.held_frame, "{gfn}: a held page has gone away");
            page.is_swapped = false;
            page.held_frame = page.frame;
            page.holds += 1;
        });
    }

    pub(super) fn let_go(&self, gfn: Gfn) {
        self.with_leaf(gfn.leaf(), |state| state.pages[gfn.in_leaf()].holds -= 1);
    }

    /// The host takes an exclusive page out to swap, if it can.
    pub(super) fn swap_out(&self, gfn: Gfn) {
        self.with_leaf(gfn.leaf(), |state| {
            let page = &mut state.pages[gfn.in_leaf()];
            page.is_swapped = page.own.is_some() && page.holds == 0;
        });
    }

    /// The host moves an exclusive page to another place, if it can.
    pub(super) fn migrate(&self, gfn: Gfn) {
        let plant = self.world.plant;
        self.with_leaf(gfn.leaf(), |state| {
            let page = &mut state.pages[gfn.in_leaf()];
            if page.own.is_some() && (page.holds == 0 || plant == HostPlant::MovesHeldPages) {
                page.frame = self.world.new_frame();
                if plant == HostPlant::MoveForgets {
                    page.own = Some(0);
                }
            }
        });
    }

    /// The pages of a leaf as a guest would see them; none where it would trap or fail.
    pub(super) fn peek(&self, leaf: LeafNumber) -> Option<Vec<u64>> {
        self.with_leaf(leaf, |state| {
            let is_poisoned = state.pages.iter().any(|page| page.is_poisoned);
            (!state.traps_touches && !is_poisoned).then(|| {
                let block = match state.mapping {
                    Mapping::Anonymous => None,
                    Mapping::File(cut) => Some(self.world.block(cut, leaf)),
                };
                let below = |position: usize| block.as_ref().map_or(0, |block| block[position]);
                let pages = state.pages.iter().enumerate();
                pages.map(|(position, page)| page.own.unwrap_or_else(|| below(position))).collect()
            })
        })
    }

    /// The pages that are this window's own, and those of them that are marked: the truth, which a
    /// scan blurs.
    pub(super) fn own_pages(&self, leaf: LeafNumber) -> (PageSet, PageSet) {
        self.with_leaf(leaf, |state| {
            let (mut own, mut marked) = (PageSet::EMPTY, PageSet::EMPTY);
            for (position, page) in state.pages.iter().enumerate().filter(|(_, page)| page.own.is_some()) {
                own.insert(position);
                if page.mark {
                    marked.insert(position);
                }
            }
            (own, marked)
        })
    }

    /// The file whose block the leaf shows, where accesses do not trap.
    pub(super) fn shown_file(&self, leaf: LeafNumber) -> Option<CutId> {
        self.with_leaf(leaf, |state| match state.mapping {
            Mapping::File(cut) if !state.traps_touches => Some(cut),
            _ => None,
        })
    }

    fn bytes_of(&self, leaf: LeafNumber, position: usize, source: PageSource<'_>) -> u64 {
        let own = |must_be_marked: bool| {
            self.with_leaf(leaf, |state| {
                let page = &state.pages[position];
                assert!(
                    !must_be_marked || page.mark,
                    "{leaf} page {position}: read by a force and open for stores"
                );
                page.own.unwrap_or_else(|| panic!("{leaf} page {position}: read by a force and not there"))
            })
        };
        match source {
            PageSource::Window => own(self.world.plant != HostPlant::StoresPassProtection),
            PageSource::Copy(_) if self.world.plant == HostPlant::ForceReadsTheWindow => own(false),
            PageSource::Copy(bytes) => number_of(bytes),
            PageSource::Block(cut) => self.world.block(cut, leaf)[position],
            PageSource::Zero => 0,
        }
    }

    fn replace(&self, leaf: LeafNumber, mapping: Mapping) {
        self.with_leaf(leaf, |state| {
            let held = state.pages.iter().position(|page| page.holds > 0);
            assert!(held.is_none(), "{leaf} page {held:?}: remapped while a device holds it");
            *state = SimLeaf::fresh(mapping);
        });
    }
}

fn refused(action: &'static str, leaf: LeafNumber) -> HostError {
    HostError { action, leaf, source: io::Error::other("refused") }
}

impl Host for SimHost {
    fn map_anonymous(&self, leaf: LeafNumber) -> Result<(), HostError> {
        self.try_call(Call::MapAnonymous, "mapping anonymous memory", leaf)?;
        self.replace(leaf, Mapping::Anonymous);
        Ok(())
    }

    fn map_block(&self, leaf: LeafNumber, block: Option<CutId>, patches: &[Patch]) -> Result<(), HostError> {
        self.try_call(Call::MapBlock, "mapping a block", leaf)?;
        if let Some(cut) = block {
            // Nobody maps what is not there.
            self.world.block(cut, leaf);
        }
        let values: Vec<u64> = patches.iter().map(|patch| self.world.patch(patch.cut, patch.frame)).collect();
        self.replace(leaf, block.map_or(Mapping::Anonymous, Mapping::File));
        let astray = usize::from(self.world.plant == HostPlant::PatchAstray);
        self.with_leaf(leaf, |state| {
            for (patch, value) in patches.iter().zip(values) {
                state.pages[(patch.position + astray) % LEAF_PAGES].put(&self.world, value);
            }
        });
        Ok(())
    }

    fn register(&self, first: LeafNumber, count: u32, traps: Traps) -> Result<(), HostError> {
        self.try_call(Call::Register, "registering", first)?;
        for leaf in (first.0..first.0 + count).map(LeafNumber) {
            self.with_leaf(leaf, |state| match traps {
                Traps::Stores => state.traps_stores = true,
                Traps::Touches | Traps::Misses => state.traps_touches = true,
            });
        }
        Ok(())
    }

    fn unregister(&self, leaf: LeafNumber) -> Result<(), HostError> {
        self.try_call(Call::Unregister, "unregistering", leaf)?;
        self.with_leaf(leaf, |state| {
            (state.traps_stores, state.traps_touches) = (false, false);
            state.pages.iter_mut().for_each(|page| page.mark = false);
        });
        Ok(())
    }

    fn protect(&self, first: LeafNumber, count: u32) -> Result<(), HostError> {
        point();
        let fails = self.world.fails(Call::Protect);
        // A refusal may come half-way: the first leaf is protected then.
        let done = if fails { 1 } else { count };
        let skips = self.world.plant == HostPlant::ProtectSkipsAPage;
        for leaf in (first.0..first.0 + done).map(LeafNumber) {
            self.with_leaf(leaf, |state| {
                assert!(state.traps_stores, "{leaf} is protected and was never registered");
                let is_file = matches!(state.mapping, Mapping::File(_));
                for (position, page) in state.pages.iter_mut().enumerate() {
                    let is_skipped = skips && position == 1;
                    page.mark |= (is_file || page.own.is_some() || page.is_seen) && !is_skipped;
                }
            });
        }
        if fails { Err(refused("protecting", first)) } else { Ok(()) }
    }

    fn unprotect(&self, leaf: LeafNumber) -> Result<(), HostError> {
        self.try_call(Call::Unprotect, "un-protecting", leaf)?;
        self.with_leaf(leaf, |state| {
            assert!(state.traps_stores, "{leaf} is un-protected and was never registered");
            state.pages.iter_mut().for_each(|page| page.mark = false);
        });
        Ok(())
    }

    fn unprotect_page(&self, gfn: Gfn) -> Result<(), HostError> {
        self.try_call(Call::Unprotect, "un-protecting a page", gfn.leaf())?;
        self.with_leaf(gfn.leaf(), |state| {
            assert!(state.traps_stores, "{gfn} is un-protected and was never registered");
            let page = &mut state.pages[gfn.in_leaf()];
            page.mark = false;
            if self.world.plant == HostPlant::CopiesWhatIsOpened {
                page.frame = self.world.new_frame();
            }
        });
        Ok(())
    }

    fn wake(&self, _leaf: LeafNumber) -> Result<(), HostError> {
        Ok(())
    }

    fn poison(&self, leaf: LeafNumber) -> Result<(), HostError> {
        self.with_leaf(leaf, |state| {
            assert!(state.traps_touches, "{leaf} is poisoned and was open");
            state.pages.iter_mut().for_each(|page| page.is_poisoned = true);
        });
        Ok(())
    }

    fn scan(&self, first: LeafNumber, count: u32) -> Result<Vec<(LeafNumber, PageStates)>, HostError> {
        self.try_call(Call::Scan, "scanning", first)?;
        let mut found = Vec::new();
        for leaf in (first.0..first.0 + count).map(LeafNumber) {
            let mut states = PageStates::default();
            self.with_leaf(leaf, |state| {
                let is_file = matches!(state.mapping, Mapping::File(_));
                for (position, page) in state.pages.iter().enumerate() {
                    let is_marker = is_file && page.own.is_none() && page.mark && !page.is_seen;
                    if page.own.is_none() && !is_marker && !page.is_poisoned {
                        continue;
                    }
                    states.anonymous.insert(position);
                    if page.own.is_some() && !page.is_swapped {
                        states.present.insert(position);
                    }
                    if !page.mark {
                        states.written.insert(position);
                    }
                }
            });
            if !states.anonymous.is_empty() {
                found.push((leaf, states));
            }
        }
        Ok(found)
    }

    fn populate(&self, first: Gfn, pages: u64) -> Result<(), HostError> {
        let leaf = first.leaf();
        self.try_call(Call::Populate, "making pages exclusive", leaf)?;
        for position in (first.in_leaf()..).take(index(pages)) {
            self.with_leaf(leaf, |state| {
                assert!(!state.traps_touches && !state.pages[position].mark, "{leaf}: populated and trapped");
                let value = self.shown(leaf, state, position);
                let page = &mut state.pages[position];
                assert!(!page.is_poisoned, "{leaf}: populated and poisoned");
                page.put(&self.world, value);
            });
        }
        Ok(())
    }

    fn zero(&self, first: Gfn, pages: u64, backing_is_block: bool) -> Result<(), HostError> {
        let leaf = first.leaf();
        self.try_call(Call::Zero, "discarding", leaf)?;
        let forgets = self.world.plant == HostPlant::DiscardForgets;
        self.with_leaf(leaf, |state| {
            assert!(
                backing_is_block == matches!(state.mapping, Mapping::File(_)),
                "{leaf}: what lies under it"
            );
            assert!(!state.traps_touches, "{leaf}: discarded and trapped");
            for page in state.pages.iter_mut().skip(first.in_leaf()).take(index(pages)) {
                assert!(!page.mark && !page.is_poisoned, "{leaf}: discarded and trapped");
                assert!(page.holds == 0, "{leaf}: discarded while a device holds it");
                if !forgets {
                    *page = Page::default();
                    if backing_is_block {
                        page.put(&self.world, 0);
                    }
                }
            }
        });
        Ok(())
    }

    fn trap(&self, leaf: LeafNumber) -> Result<(), HostError> {
        self.try_call(Call::MapAnonymous, "mapping anonymous memory", leaf)?;
        self.replace(leaf, Mapping::Anonymous);
        self.try_call(Call::Register, "registering", leaf)?;
        self.with_leaf(leaf, |state| state.traps_touches = true);
        Ok(())
    }

    fn restore(
        &self,
        leaf: LeafNumber,
        pages: &PageSet,
        block: Option<CutId>,
        patches: &[Patch],
    ) -> Result<(), HostError> {
        self.try_call(Call::Restore, "restoring pages", leaf)?;
        if self.world.plant == HostPlant::ResetForgets {
            return Ok(());
        }
        for position in pages.iter() {
            let patch = patches.iter().find(|patch| patch.position == position);
            let value = match (patch, block) {
                (Some(patch), _) => self.world.patch(patch.cut, patch.frame),
                (None, Some(cut)) => self.world.block(cut, leaf)[position],
                (None, None) => 0,
            };
            self.with_leaf(leaf, |state| {
                assert!(!state.traps_touches, "{leaf}: restored and trapped");
                let page = &mut state.pages[position];
                assert!(page.own.is_some() && !page.mark, "{leaf}: restored and not exclusive");
                (page.own, page.is_swapped) = (Some(value), false);
            });
        }
        Ok(())
    }

    fn copy_page(&self, gfn: Gfn, into: &mut [u8; PAGE_BYTES]) {
        point();
        let value = self.with_leaf(gfn.leaf(), |state| state.pages[gfn.in_leaf()].own);
        let value = value.unwrap_or_else(|| panic!("{gfn} is copied and not exclusive"));
        into[..8].copy_from_slice(&value.to_le_bytes());
    }

    fn publish_block(
        &self,
        cut: CutId,
        leaf: LeafNumber,
        sources: &[PageSource<'_>],
    ) -> Result<(), HostError> {
        self.try_call(Call::PublishBlock, "publishing a block", leaf)?;
        let bytes = |(position, source): (usize, &PageSource<'_>)| self.bytes_of(leaf, position, *source);
        let pages = sources.iter().enumerate().map(bytes).collect();
        point();
        self.world.write_block(cut, leaf, pages);
        Ok(())
    }

    fn publish_patches(
        &self,
        cut: CutId,
        leaf: LeafNumber,
        first_frame: u32,
        pages: &[(usize, PageSource<'_>)],
    ) -> Result<(), HostError> {
        self.try_call(Call::PublishPatches, "publishing patches", leaf)?;
        for (frame, (position, source)) in (first_frame..).zip(pages) {
            self.world.write_patch(cut, frame, self.bytes_of(leaf, *position, *source));
        }
        Ok(())
    }

    fn wait_word(&self, word: &AtomicU32, value: u32, _limit: Duration) {
        match self.world.waits() {
            Waits::Serves => self.world.serve_all(),
            Waits::Looks => return shuttle::thread::yield_now(),
            Waits::Sleeps(futexes) => return futexes.wait(word, value),
        }
        if word.load(Ordering::Acquire) != value {
            self.idle_waits.store(0, Ordering::Relaxed);
            return;
        }
        let idle = self.idle_waits.fetch_add(1, Ordering::Relaxed);
        assert!(idle < 8, "a clone waits for a word that nobody will change");
    }

    fn wake_word(&self, word: &AtomicU32) {
        if let Waits::Sleeps(futexes) = self.world.waits() {
            futexes.wake(word);
        }
    }
}
