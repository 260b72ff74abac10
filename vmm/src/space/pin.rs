//! Pins: a device's claim on pages. While one is held, those pages keep their physical place.
//!
//! A pin, for reading or writing, needs exclusivity first: a page that is lent is forced (or
//! reused), one that is shared is copied into the window. Between pin and cut: either the pin is
//! first, and the page is copied in the pause, or the cut is first, and the pin forces.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Backing, Host, Space, SpaceError};
use crate::plants::{Plant, is_planted};
use crate::words::{Gfn, LEAF_PAGES, LeafNumber, wide};

/// What a device does with pinned pages. Both kinds need the page to be exclusive: a reader must
/// see the VM's later stores too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Access {
    /// The device reads memory.
    Read,
    /// The device writes memory, and may read it.
    ReadWrite,
}

/// Exact counts of pins: by page, by leaf, and in all.
#[derive(Debug, Default)]
pub struct PinTable {
    pages: BTreeMap<Gfn, u32>,
    leaves: BTreeMap<LeafNumber, u32>,
    total: u64,
}

impl PinTable {
    /// One pin more on `gfn`.
    pub fn pin(&mut self, gfn: Gfn) {
        *self.pages.entry(gfn).or_default() += 1;
        *self.leaves.entry(gfn.leaf()).or_default() += 1;
        self.total += u64::from(!is_planted(Plant::PinUncounted));
    }

    /// One pin less on `gfn`.
    ///
    /// # Errors
    /// The page is not pinned: nothing has changed.
    pub fn unpin(&mut self, gfn: Gfn) -> Result<(), SpaceError> {
        let pages = self.pages.get_mut(&gfn).ok_or(SpaceError::NotPinned { gfn })?;
        *pages -= 1;
        if *pages == 0 {
            self.pages.remove(&gfn);
        }
        let leaf = gfn.leaf();
        let pins = self.leaves.get_mut(&leaf).expect("the leaf of a pinned page has pins");
        *pins -= 1;
        if *pins == 0 {
            self.leaves.remove(&leaf);
        }
        self.total -= 1;
        Ok(())
    }

    /// Pins on one page.
    #[must_use]
    pub fn pins_on(&self, gfn: Gfn) -> u32 {
        self.pages.get(&gfn).copied().unwrap_or(0)
    }

    /// Pins on all pages of a leaf.
    #[must_use]
    pub fn pins_in(&self, leaf: LeafNumber) -> u32 {
        self.leaves.get(&leaf).copied().unwrap_or(0)
    }

    /// The pinned pages, ascending.
    pub fn pages(&self) -> impl Iterator<Item = Gfn> + '_ {
        self.pages.keys().copied()
    }

    /// Number of pinned pages.
    #[must_use]
    pub fn pinned_pages(&self) -> usize {
        self.pages.len()
    }

    /// Number of pins.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Whether the sums by leaf and in all equal a recount by page.
    #[must_use]
    pub fn is_consistent(&self) -> bool {
        let mut leaves = BTreeMap::new();
        for (gfn, pins) in &self.pages {
            *leaves.entry(gfn.leaf()).or_default() += pins;
        }
        leaves == self.leaves && self.pages.values().copied().map(u64::from).sum::<u64>() == self.total
    }

    /// The first pinned page among `pages` from `first`.
    #[must_use]
    pub fn first_in(&self, first: Gfn, pages: u64) -> Option<Gfn> {
        self.pages.range(first..Gfn(first.0 + pages)).next().map(|(gfn, _)| *gfn)
    }
}

impl<H: Host> Space<H> {
    /// Pins `pages` pages from `first`: they are exclusive, and stay where they are, until
    /// [`Space::unpin`] is called as often. May wait for the source of a page; must not be called
    /// by a thread that resolves faults.
    ///
    /// # Errors
    /// A page is no memory, or lost, or cannot be made exclusive. Nothing is pinned then.
    pub fn pin(&self, first: Gfn, pages: u64, _access: Access) -> Result<(), SpaceError> {
        self.check_range(first, pages)?;
        let end = first.0 + pages;
        let mut from = first;
        while from.0 < end {
            let leaf = from.leaf();
            let until = end.min(leaf.first_gfn().0 + wide(LEAF_PAGES));
            if let Err(error) = self.pin_in_leaf(leaf, from, until - from.0) {
                self.unpin(first, from.0 - first.0)?;
                return Err(error);
            }
            from = Gfn(until);
        }
        Ok(())
    }

    fn pin_in_leaf(&self, leaf: LeafNumber, first: Gfn, pages: u64) -> Result<(), SpaceError> {
        if self.backing(leaf) == Backing::Trapped {
            self.resolve_leaf(leaf)?;
        }
        self.with_open_leaf(leaf, || {
            if self.backing(leaf) == Backing::Lost {
                return Err(SpaceError::Lost { gfn: first });
            }
            if !is_planted(Plant::PinWithoutUnshare) {
                self.host.populate(first, pages)?;
            }
            let mut table = self.pin_table();
            (first.0..first.0 + pages).map(Gfn).for_each(|gfn| table.pin(gfn));
            Ok(())
        })
    }

    /// Takes one pin off each of `pages` pages from `first`.
    ///
    /// # Errors
    /// A page is not pinned: no pin has been taken off.
    pub fn unpin(&self, first: Gfn, pages: u64) -> Result<(), SpaceError> {
        let mut table = self.pin_table();
        let gfns = || (first.0..first.0 + pages).map(Gfn);
        if let Some(gfn) = gfns().find(|gfn| table.pins_on(*gfn) == 0) {
            return Err(SpaceError::NotPinned { gfn });
        }
        gfns().try_for_each(|gfn| table.unpin(gfn))
    }

    /// Number of pinned pages, and of pins.
    pub fn pinned(&self) -> (usize, u64) {
        let table = self.pin_table();
        (table.pinned_pages(), table.total())
    }
}
