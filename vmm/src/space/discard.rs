//! Discard: pages become zero, for this VM only.

use super::{Backing, Host, Space, SpaceError, Traps};
use crate::board::LeafMap;
use crate::plants::{Plant, is_planted};
use crate::words::{Gfn, LEAF_PAGES, LeafNumber, wide};

impl<H: Host> Space<H> {
    /// Makes `pages` pages from `first` zero. What others need of them is published first.
    ///
    /// # Errors
    /// A page is no memory, or pinned: nothing has changed. The host refused, or part of a lost leaf
    /// was meant (only the whole can become zero): earlier leaves of the range are zero.
    pub fn discard(&self, first: Gfn, pages: u64) -> Result<(), SpaceError> {
        self.check_range(first, pages)?;
        self.check_unpinned(first, pages)?;
        let end = first.0 + pages;
        let mut from = first;
        while from.0 < end {
            let leaf = from.leaf();
            let until = end.min(leaf.first_gfn().0 + wide(LEAF_PAGES));
            self.discard_in_leaf(leaf, from, until - from.0)?;
            from = Gfn(until);
        }
        Ok(())
    }

    fn check_unpinned(&self, first: Gfn, pages: u64) -> Result<(), SpaceError> {
        match self.pin_table().first_in(first, pages) {
            Some(gfn) if !is_planted(Plant::DiscardSeesNoPin) => Err(SpaceError::Pinned { gfn }),
            _ => Ok(()),
        }
    }

    fn discard_in_leaf(&self, leaf: LeafNumber, first: Gfn, pages: u64) -> Result<(), SpaceError> {
        let is_whole = pages == wide(LEAF_PAGES);
        // Of a leaf that goes as a whole nobody needs to know what it held.
        if self.backing(leaf) == Backing::Trapped && !is_whole {
            self.resolve_leaf(leaf)?;
        }
        self.with_open_leaf(leaf, || {
            if self.backing(leaf) == Backing::Lost && !is_whole {
                // Zeros on some pages would need a leaf in two conditions.
                return Err(SpaceError::Lost { gfn: first });
            }
            self.check_unpinned(first, pages)?;
            if is_whole {
                self.host.map_anonymous(leaf)?;
                self.set_departed(leaf, true);
                self.set_registered(leaf, false);
                self.set_backing(leaf, Backing::Anonymous);
                self.board.member(self.slot).set_map(leaf, LeafMap::Own);
                if self.is_cut_reserved() {
                    self.host.register(leaf, 1, Traps::Stores)?;
                    self.set_registered(leaf, true);
                }
                self.host.wake(leaf)?;
            } else {
                let is_block = matches!(self.backing(leaf), Backing::Block(_));
                let was_registered = is_block && self.is_registered(leaf);
                if is_block {
                    self.set_registered(leaf, false);
                }
                self.host.zero(first, pages, is_block)?;
                if was_registered {
                    self.host.register(leaf, 1, Traps::Stores)?;
                    self.set_registered(leaf, true);
                }
            }
            Ok(())
        })
    }
}
