//! Reset: a clone's memory returns to its cut.
//!
//! The tables keep what the clone shared when it began, and say so again (the keeper's part, needed
//! only where the clone has been cut itself). Here the window follows: lent pages are published for
//! those who need them, exclusive pages get the bytes of the cut in place, and a leaf that has many
//! of them, or maps something else by now, traps again and is found out anew. What costs is what was
//! written, not what there is.

use serde::{Deserialize, Serialize};

use super::{Backing, Host, OPEN, Space, SpaceError};
use crate::board::LeafMap;
use crate::plants::{Plant, is_planted};
use crate::tables::Found;
use crate::words::{LeafNumber, PageSet, wide};

/// Up to so many pages of a leaf are given their bytes in place. That costs about 0.1 us a page, and
/// the next store to them nothing; to drop them all costs a new mapping of the leaf, and each a copy.
const RESTORE_LIMIT: usize = 64;

/// What a reset did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetFigures {
    /// Pages that got the bytes of the cut in place.
    pub restored_pages: u64,
    /// Leaves whose pages were dropped.
    pub dropped_leaves: u64,
}

impl<H: Host> Space<H> {
    /// Gives the memory of a clone the content of its cut. Its vCPUs are stopped, its devices let go
    /// of all pages, and its tables share what they did when it began.
    ///
    /// # Errors
    /// The VM is no clone, or a page is pinned: nothing has changed. The host refused: the memory is
    /// in between, and must be reset again before anybody uses it.
    pub fn reset(&self) -> Result<ResetFigures, SpaceError> {
        if self.placeholder.get().is_none() {
            return Err(SpaceError::NoOrigin);
        }
        let _cutting = self.cutting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Whoever is still at a leaf that it has just opened for a store says first what that leaf is.
        drop(self.remap.write().unwrap_or_else(std::sync::PoisonError::into_inner));
        let pinned = self.pin_table().pages().next();
        if let Some(gfn) = pinned
            && !is_planted(Plant::ResetSeesNoPin)
        {
            return Err(SpaceError::Pinned { gfn });
        }
        for leaf in self.shape.leaves().filter(|leaf| self.is_protected(*leaf)) {
            // Publishes what is lent.
            self.with_open_leaf(leaf, || Ok(()))?;
        }
        let mut figures = ResetFigures::default();
        let is_elsewhere =
            |leaf: &LeafNumber| self.has_departed(*leaf) && self.backing(*leaf) != Backing::Trapped;
        for leaf in self.shape.leaves().filter(is_elsewhere) {
            self.return_leaf(leaf, &mut figures)?;
        }
        let is_known = |leaf| matches!(self.backing(leaf), Backing::Anonymous | Backing::Block(_));
        for (first, count) in self.runs(is_known) {
            for (leaf, states) in self.host.scan(first, count)? {
                self.restore_leaf(leaf, &states.anonymous, &mut figures)?;
            }
        }
        Ok(figures)
    }

    /// Gives the exclusive pages of a leaf the bytes of the cut.
    fn restore_leaf(
        &self,
        leaf: LeafNumber,
        pages: &PageSet,
        figures: &mut ResetFigures,
    ) -> Result<(), SpaceError> {
        let backing = self.backing(leaf);
        let (block, patches) = match self.look_up(leaf) {
            Found::Shared { block, patches } => (block, patches),
            Found::Zero => (None, None),
            // A leaf that is known was neither when it was found out.
            Found::Pending(_) | Found::Lost => return self.return_leaf(leaf, figures),
        };
        let is_same = backing == block.map_or(Backing::Anonymous, Backing::Block);
        if !is_same || pages.len() > RESTORE_LIMIT {
            return self.return_leaf(leaf, figures);
        }
        let patches = patches.map_or_else(Vec::new, |cut| self.patches_of(cut, leaf));
        let _leaf = self.lock_leaf(leaf);
        let _remap = self.remapping();
        self.host.restore(leaf, pages, block, &patches)?;
        figures.restored_pages += wide(pages.len());
        Ok(())
    }

    /// Makes a leaf trap as when the clone began, and maps it if that needs nobody's answer.
    fn return_leaf(&self, leaf: LeafNumber, figures: &mut ResetFigures) -> Result<(), SpaceError> {
        {
            let _leaf = self.lock_leaf(leaf);
            let _remap = self.remapping();
            // Also if it is refused: the next reset comes back to it.
            self.set_departed(leaf, true);
            self.host.trap(leaf)?;
            self.set_backing(leaf, Backing::Trapped);
            self.board.member(self.slot).set_map(leaf, LeafMap::Unknown);
            self.set_registered(leaf, false);
            self.set_protected(leaf, OPEN);
        }
        figures.dropped_leaves += 1;
        self.resolve_if_known(leaf)
    }
}
