//! Force: lent pages are published for those who need them, once for all of them; and what the
//! source does with its own copy afterwards.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::{Backing, Host, OPEN, OpenCut, PageSource, Space, SpaceError};
use crate::board::{LeafMap, LeafWord, Patches};
use crate::frames::CutId;
use crate::plants::{Plant, is_planted};
use crate::words::{LEAF_PAGES, LeafNumber, PageSet};

/// What the source does with its own copy of a leaf that is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Keep {
    /// The protection is taken off; the memory is used twice.
    Own,
    /// The block takes the copy's place, where nothing else is in the way.
    Shared,
}

/// Up to so many pages over a block are published as patches instead of a block of their own.
/// A patch costs a reader 2.2 us and 4 KiB; a block costs it nothing, and its writer 2 MiB.
const PATCH_LIMIT: usize = 8;

/// What one cut said of a leaf just now.
struct Settled {
    cut: CutId,
    word: LeafWord,
    lent: PageSet,
    has_copies: bool,
}

impl<H: Host> Space<H> {
    /// The cuts that wait for `leaf`, oldest first.
    pub(super) fn pending_cuts(&self, leaf: LeafNumber) -> Vec<Arc<OpenCut>> {
        let mut cuts = self.open_cuts();
        cuts.retain(|cut| {
            let area = self.board.cut(cut.id());
            area.leaf(leaf) == LeafWord::Pending && !area.is_unneeded()
        });
        cuts
    }

    /// Publishes the leaf for all cuts that wait for it, and does with the source's copy as `keep`
    /// says. Waits for no other process and no vCPU.
    ///
    /// # Errors
    /// The host refused to open the leaf again. (A leaf that cannot be written is lost to the
    /// clones, who are told; the source goes on.)
    pub fn force(&self, leaf: LeafNumber, keep: Keep) -> Result<(), SpaceError> {
        let _leaf = (!is_planted(Plant::ForceWithoutLock)).then(|| self.lock_leaf(leaf));
        let map = self.board.member(self.slot).map(leaf);
        if keep == Keep::Shared && map == LeafMap::Own && !is_planted(Plant::DropsBeforeItSays) {
            // From the moment it is published, the block may take the place of the VM's own pages.
            self.board.member(self.slot).set_map(leaf, LeafMap::Unknown);
        }
        let result = self.force_and_keep(leaf, keep);
        if self.backing(leaf) == Backing::Anonymous {
            self.board.member(self.slot).set_map(leaf, map);
        }
        result
    }

    fn force_and_keep(&self, leaf: LeafNumber, keep: Keep) -> Result<(), SpaceError> {
        let Some(published) = self.force_locked(leaf) else {
            // Nothing is pending, but somebody may have gone to sleep on a word of it meanwhile.
            for cut in self.open_cuts() {
                self.host.wake_word(self.board.cut(cut.id()).raw(leaf));
            }
            return Ok(());
        };
        match published {
            Some((block, lent)) if keep == Keep::Shared && self.can_drop(leaf, &lent)? => {
                self.drop_leaf(leaf, block)
            }
            _ => self.open_leaf(leaf),
        }
    }

    /// Settles all that is pending on a leaf, whose lock is held. None: nothing was. Otherwise the
    /// block that holds the leaf as the window does, and which pages are lent, if there is such a
    /// block.
    pub(super) fn force_locked(&self, leaf: LeafNumber) -> Option<Option<(CutId, PageSet)>> {
        let pending = self.pending_cuts(leaf);
        let mut last: Option<Settled> = None;
        let mut newest_block = None;
        for cut in &pending {
            let (word, lent) = match self.lent_to(cut, leaf) {
                Ok(lent) => (self.publish_leaf(cut, leaf, &lent, last.as_ref()), lent),
                Err(error) => {
                    tracing::error!(%leaf, cut = %cut.id(), %error, "lent pages cannot be found");
                    (LeafWord::Lost, PageSet::EMPTY)
                }
            };
            newest_block = match word {
                // Where pages were pinned at the cut, the block has the bytes of the cut and the
                // window may have a device's later ones.
                LeafWord::Block if !cut.has_copies_in(leaf) => Some((cut.id(), lent)),
                LeafWord::Base => newest_block,
                _ => None,
            };
            let area = self.board.cut(cut.id());
            area.publish(leaf, word);
            if !is_planted(Plant::WakesNobody) {
                self.host.wake_word(area.raw(leaf));
            }
            last = Some(Settled { cut: cut.id(), word, lent, has_copies: cut.has_copies_in(leaf) });
        }
        (!pending.is_empty()).then_some(newest_block)
    }

    /// Writes what one cut needs of a leaf, and returns what to say of it.
    fn publish_leaf(
        &self,
        cut: &OpenCut,
        leaf: LeafNumber,
        lent: &PageSet,
        last: Option<&Settled>,
    ) -> LeafWord {
        let copies = cut.copies_in(leaf);
        if let Some(last) = last
            && Some(last.cut) == cut.previous()
            // What could not be written for one cut may yet be written for the next.
            && last.word != LeafWord::Lost
            && (last.lent == *lent || is_planted(Plant::UnequalSetsAreOneBlock))
            && (!last.has_copies && copies.is_empty() || is_planted(Plant::PinnedSetsAreOneBlock))
        {
            return LeafWord::Base;
        }
        let base = match self.backing(leaf) {
            Backing::Block(cut) => PageSource::Block(cut),
            _ => PageSource::Zero,
        };
        let pages = lent.union(&copies);
        let result = match base {
            PageSource::Zero if pages.is_empty() => return LeafWord::Zero,
            PageSource::Block(block) if pages.len() <= PATCH_LIMIT => {
                self.write_patches(cut, leaf, block, &pages)
            }
            _ => self.write_block(cut, leaf, &pages, base),
        };
        result.unwrap_or_else(|error| {
            tracing::error!(%leaf, cut = %cut.id(), %error, "a leaf cannot be published");
            LeafWord::Lost
        })
    }

    fn write_block(
        &self,
        cut: &OpenCut,
        leaf: LeafNumber,
        pages: &PageSet,
        base: PageSource<'_>,
    ) -> Result<LeafWord, SpaceError> {
        let sources: Vec<PageSource<'_>> = (0..LEAF_PAGES)
            .map(|position| match pages.contains(position) {
                true => cut.source_of(leaf.gfn(position)),
                false => base,
            })
            .collect();
        self.host.publish_block(cut.id(), leaf, &sources)?;
        self.counters.blocks_published.fetch_add(1, Ordering::Relaxed);
        Ok(LeafWord::Block)
    }

    fn write_patches(
        &self,
        cut: &OpenCut,
        leaf: LeafNumber,
        block: CutId,
        pages: &PageSet,
    ) -> Result<LeafWord, SpaceError> {
        let sources: Vec<_> =
            pages.iter().map(|position| (position, cut.source_of(leaf.gfn(position)))).collect();
        let count = u32::try_from(sources.len()).expect("a leaf has 512 pages");
        let no_memory = |source| super::HostError { action: "reserving a patch record", leaf, source };
        self.board.reserve_patches(cut.id(), leaf).map_err(no_memory)?;
        let first_frame = cut.take_frames(count);
        if count > 0 {
            self.host.publish_patches(cut.id(), leaf, first_frame, &sources)?;
        }
        self.board
            .cut(cut.id())
            .set_patches(leaf, &Patches { block: Some(block), first_frame, pages: *pages });
        self.counters.patches_published.fetch_add(u64::from(count), Ordering::Relaxed);
        Ok(LeafWord::Patched)
    }

    /// Takes the protection off a leaf on which nothing is pending any more. Its lock is held. A cut
    /// that came after the force, before this, is settled first.
    pub(super) fn open_leaf(&self, leaf: LeafNumber) -> Result<(), SpaceError> {
        let _remap = loop {
            let remap = self.remapping();
            let is_unseen = is_planted(Plant::OpensWhilePending) || is_planted(Plant::OpensWithoutALook);
            if is_unseen || self.pending_cuts(leaf).is_empty() {
                break remap;
            }
            drop(remap);
            self.force_locked(leaf);
        };
        if self.is_cut_reserved() {
            self.host.unprotect(leaf)?;
        } else {
            self.host.unregister(leaf)?;
            self.set_registered(leaf, false);
        }
        self.set_protected(leaf, OPEN);
        Ok(())
    }

    /// Runs `work` on a leaf on which nothing is pending and over which no protection lies, under its
    /// lock and `remap`.
    pub(super) fn with_open_leaf<T>(
        &self,
        leaf: LeafNumber,
        work: impl FnOnce() -> Result<T, SpaceError>,
    ) -> Result<T, SpaceError> {
        let _leaf = self.lock_leaf(leaf);
        loop {
            if self.is_protected(leaf) {
                if !is_planted(Plant::OpensWhilePending) {
                    self.force_locked(leaf);
                }
                self.open_leaf(leaf)?;
            }
            let remap = (!is_planted(Plant::PinOutsideRemap)).then(|| self.remapping());
            // A cut may have come between the two: then its protection lies over the leaf.
            if !self.is_protected(leaf) {
                let result = work();
                drop(remap);
                return result;
            }
        }
    }

    /// Whether the source's pages of a published leaf are all in its block, none is pinned, and no
    /// store can come until the leaf is remapped.
    fn can_drop(&self, leaf: LeafNumber, lent: &PageSet) -> Result<bool, SpaceError> {
        if self.pin_table().pins_in(leaf) > 0 {
            return Ok(false);
        }
        let states = self.scan_leaf(leaf)?;
        Ok(match self.backing(leaf) {
            // A page of a block that is not the VM's own yet has a marker, and traps like the others.
            // (Markers scan as pages that are not in memory.)
            Backing::Block(_) => states.written.is_empty() && states.present.minus(lent).is_empty(),
            // An anonymous page that was never touched does not trap: its first store could fall
            // between this and the remapping, and would be lost.
            _ if is_planted(Plant::DropsMoreThanLent) => true,
            _ => states.written.is_empty() && states.anonymous == *lent && *lent == PageSet::ALL,
        })
    }

    /// Puts the block in the place of the source's own pages, which are still protected: no store
    /// can have happened since they were published. The leaf's lock is held.
    fn drop_leaf(&self, leaf: LeafNumber, block: CutId) -> Result<(), SpaceError> {
        let remap = self.remapping();
        let has_new_cut = self.is_cut_reserved() || !self.pending_cuts(leaf).is_empty();
        if has_new_cut {
            // The coming cut has looked at this leaf already, or will: leave it as it is. One that
            // came after the force has lent pages in it.
            drop(remap);
            return self.open_leaf(leaf);
        }
        if let Err(error) = self.host.map_block(leaf, Some(block), &[]) {
            drop(remap);
            self.open_leaf(leaf)?;
            return Err(error.into());
        }
        self.set_backing(leaf, Backing::Block(block));
        self.set_departed(leaf, true);
        // After the remapping: what was mapped until now stays named, and the new block is named by
        // this VM's table, from which nothing is taken that the VM does not say to have.
        self.board.member(self.slot).set_map(leaf, LeafMap::Block(block));
        self.set_registered(leaf, false);
        self.set_protected(leaf, OPEN);
        self.host.wake(leaf)?;
        self.counters.leaves_dropped.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Answers all requests for leaves of this VM's cuts. Call whenever the doorbell has rung.
    ///
    /// # Errors
    /// The host refused; the other requests have been answered.
    pub fn serve_requests(&self, keep: Keep) -> Result<(), SpaceError> {
        let mut result = Ok(());
        for cut in self.open_cuts() {
            for leaf in self.board.cut(cut.id()).take_requests() {
                if let Err(error) = self.force(leaf, keep) {
                    result = Err(error);
                }
            }
        }
        result
    }

    /// Publishes one more leaf that a cut still needs. False: nothing is pending.
    ///
    /// # Errors
    /// The host refused.
    pub fn publish_next(&self, keep: Keep) -> Result<bool, SpaceError> {
        for cut in self.open_cuts() {
            let area = self.board.cut(cut.id());
            if area.is_unneeded() {
                continue;
            }
            if let Some(leaf) = area.pending().next() {
                self.force(leaf, keep)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Forgets the cuts on which nothing is pending; returns them. Their words say all.
    pub fn finished_cuts(&self) -> Vec<CutId> {
        let mut finished = Vec::new();
        let mut cuts = self.cuts.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        cuts.retain(|cut| {
            let is_pending = self.board.cut(cut.id()).pending().next().is_some();
            if !is_pending {
                finished.push(cut.id());
            }
            is_pending
        });
        finished
    }

    /// Nobody needs `cut`: the keeper has declared it unneeded, or it is no cut after all. Forgets it, and
    /// takes the protection off every leaf that waited for it alone, without a copy. Where the host
    /// refuses that, the protection goes with the next store.
    pub fn release_cut(&self, cut: CutId) {
        let is_other = |open: &Arc<OpenCut>| open.id() != cut;
        self.cuts.write().unwrap_or_else(std::sync::PoisonError::into_inner).retain(is_other);
        for leaf in self.board.cut(cut).pending() {
            let _leaf = self.lock_leaf(leaf);
            if !self.is_protected(leaf) || !self.pending_cuts(leaf).is_empty() {
                continue;
            }
            match self.open_leaf(leaf) {
                Ok(()) => {
                    self.counters.leaves_reused.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => tracing::warn!(%cut, %error, "a leaf that nobody needs stays protected"),
            }
        }
    }
}
