//! What a space uses: a harvest of what the host knows, by leaf and in sums.

use serde::{Deserialize, Serialize};

use super::{Backing, Host, Space, SpaceError};
use crate::plants::{Plant, is_planted};
use crate::words::{Gfn, LEAF_PAGES, LeafNumber, PageSet, wide};

/// One leaf of a space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeafReport {
    /// Which.
    pub leaf: LeafNumber,
    /// What the window maps there.
    pub backing: Backing,
    /// Pages that this VM alone has.
    pub exclusive: PageSet,
    /// Pages that a cut still waits for.
    pub lent: PageSet,
    /// Pages that a device holds.
    pub pinned: PageSet,
    /// Pins in the leaf.
    pub pins: u32,
}

/// Sums over a space, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageCounts {
    /// Never touched.
    pub zero: u64,
    /// This VM's alone, pinned ones included.
    pub exclusive: u64,
    /// Waiting to be published.
    pub lent: u64,
    /// Frames of the arena, or not known yet.
    pub shared: u64,
    /// Held by a device.
    pub pinned: u64,
    /// Lost.
    pub poisoned: u64,
}

impl PageCounts {
    /// Adds other pages.
    pub fn add(&mut self, other: &Self) {
        self.zero += other.zero;
        self.exclusive += other.exclusive;
        self.lent += other.lent;
        self.shared += other.shared;
        self.pinned += other.pinned;
        self.poisoned += other.poisoned;
    }
}

/// A harvest of a whole space.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpaceReport {
    /// Each leaf of RAM.
    pub leaves: Vec<LeafReport>,
    /// Their sums.
    pub counts: PageCounts,
    /// Pins in all.
    pub pins: u64,
}

impl SpaceReport {
    /// The leaves with pages of this VM's own, as the tables want them.
    #[must_use]
    pub fn owned(&self) -> Vec<(LeafNumber, PageSet)> {
        let owned = |leaf: &LeafReport| (leaf.leaf, leaf.exclusive);
        self.leaves.iter().map(owned).filter(|(_, exclusive)| !exclusive.is_empty()).collect()
    }
}

impl<H: Host> Space<H> {
    /// Reads from the host which pages are exclusive and which are lent. Exact while the VM is
    /// stopped; each leaf is looked at once otherwise.
    ///
    /// # Errors
    /// The host refused.
    pub fn harvest(&self) -> Result<SpaceReport, SpaceError> {
        let mut report = SpaceReport::default();
        for leaf in self.shape.leaves() {
            let one = self.harvest_leaf(leaf)?;
            let counts = &mut report.counts;
            let (exclusive, lent) = (wide(one.exclusive.len()), wide(one.lent.len()));
            let rest = wide(LEAF_PAGES) - exclusive - lent;
            counts.exclusive += exclusive;
            counts.lent += if is_planted(Plant::LentUncounted) { 0 } else { lent };
            counts.pinned += wide(one.pinned.len());
            match one.backing {
                Backing::Anonymous => counts.zero += rest,
                Backing::Block(_) | Backing::Trapped => counts.shared += rest,
                Backing::Lost => counts.poisoned += wide(LEAF_PAGES),
            }
            report.pins += u64::from(one.pins);
            report.leaves.push(one);
        }
        Ok(report)
    }

    fn harvest_leaf(&self, leaf: LeafNumber) -> Result<LeafReport, SpaceError> {
        let _leaf = self.lock_leaf(leaf);
        let backing = self.backing(leaf);
        let pending = self.pending_cuts(leaf);
        let anonymous = match backing {
            Backing::Anonymous | Backing::Block(_) => self.scan_leaf(leaf)?,
            Backing::Trapped | Backing::Lost => super::PageStates::default(),
        };
        // Under a protection the markers of a block look like pages: what was there before is known.
        let known = match backing {
            Backing::Block(_) if self.is_protected(leaf) && !is_planted(Plant::MarkersAreOwned) => {
                self.block_sets().get(&leaf).copied().unwrap_or(PageSet::EMPTY).union(&anonymous.present)
            }
            _ => anonymous.anonymous,
        };
        let lent = if pending.is_empty() { PageSet::EMPTY } else { known.minus(&anonymous.written) };
        let pins = self.pin_table();
        let mut pinned = PageSet::EMPTY;
        if pins.pins_in(leaf) > 0 {
            for position in (0..LEAF_PAGES).filter(|position| pins.pins_on(leaf.gfn(*position)) > 0) {
                pinned.insert(position);
            }
        }
        // What a device holds was copied for the clones: it is not lent.
        let lent = lent.minus(&pinned);
        Ok(LeafReport {
            leaf,
            backing,
            exclusive: known.minus(&lent),
            lent,
            pinned,
            pins: pins.pins_in(leaf),
        })
    }

    /// The pages that a device holds, ascending.
    pub fn pinned_gfns(&self) -> Vec<Gfn> {
        self.pin_table().pages().collect()
    }
}
