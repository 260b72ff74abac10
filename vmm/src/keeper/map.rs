//! What each leaf of a VM's memory is, and which other VMs share it; what is not published yet.

use std::collections::BTreeMap;

use super::{Colony, ColonyError, Inner, Shared};
use crate::board::LeafMap;
use crate::family::{FamilyError, TableCensus, VmId};
use crate::frames::CutId;
use crate::member::messages::{Order, Reply};
use crate::space::{Backing, LeafReport, PageCounts, SpaceReport};
use crate::tables::Found;
use crate::words::{LEAF_PAGES, LeafNumber, wide};

/// A VM's memory.
#[derive(Clone, Debug)]
pub struct MemoryMap {
    /// Each leaf of RAM.
    pub leaves: Vec<MapLeaf>,
    /// The tables that the VM's root reaches.
    pub tables: TableCensus,
}

/// One leaf of a VM's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapLeaf {
    /// Which.
    pub leaf: LeafNumber,
    /// Its pages.
    pub pages: PageCounts,
    /// What it shares with others.
    pub block: Option<SharedBlock>,
}

/// What several VMs share of a leaf: the block of a cut, or what will be that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedBlock {
    /// Whose block: with the leaf's number that names it.
    pub cut: CutId,
    /// Whether it is written. Before that its pages are lent.
    pub is_published: bool,
    /// How many VMs have it, this one included.
    pub vms: u32,
}

/// A cut that is not published yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backlog {
    /// Which.
    pub cut: CutId,
    /// The VM that it is a cut of.
    pub source: VmId,
    /// Leaves to go.
    pub pending_leaves: usize,
}

impl Colony {
    /// What each leaf of a VM's memory is. Exact while the VM is stopped; each leaf is looked at once
    /// otherwise.
    ///
    /// # Errors
    /// There is no such VM, or its process ended.
    pub fn memory_map(&self, vm: VmId) -> Result<MemoryMap, ColonyError> {
        let report = match self.ask(vm, Order::Harvest)? {
            Reply::Harvest(report) => *report,
            _ => return Err(ColonyError::unexpected(vm)),
        };
        let shared = &self.shared;
        let inner = shared.lock();
        let lent = shared.lent_leaves(&inner);
        let block_of = |vm, leaf| {
            let member = inner.vms.get(&vm)?;
            shared.block_of(&inner, &lent, (vm, member.slot()), leaf)
        };
        let mut leaves = Vec::with_capacity(report.leaves.len());
        for one in &report.leaves {
            let own = block_of(vm, one.leaf);
            let block = own.map(|(cut, is_published)| {
                let vms = inner.vms.keys().filter(|other| block_of(**other, one.leaf) == own).count();
                SharedBlock { cut, is_published, vms: u32::try_from(vms).unwrap_or(u32::MAX) }
            });
            let found = inner.family.resolve(vm, one.leaf)?;
            leaves.push(MapLeaf { leaf: one.leaf, pages: pages_of(one, found), block });
        }
        Ok(MemoryMap { leaves, tables: inner.family.census_of(vm)? })
    }

    /// The cuts that are not published yet, oldest first.
    #[must_use]
    pub fn backlog(&self) -> Vec<Backlog> {
        let inner = self.shared.lock();
        let cuts = self.shared.needed_cuts(&inner).map(|(cut, source)| Backlog {
            cut,
            source,
            pending_leaves: self.shared.board.cut(cut).pending().count(),
        });
        cuts.filter(|cut| cut.pending_leaves > 0).collect()
    }

    /// All tables of the colony.
    #[must_use]
    pub fn census(&self) -> TableCensus {
        self.shared.lock().family.census()
    }
}

impl Shared {
    /// The cuts that somebody may read through. (One that is only reserved nobody refers to.)
    fn needed_cuts(&self, inner: &Inner) -> impl Iterator<Item = (CutId, VmId)> {
        let is_needed =
            |cut: CutId| inner.family.references_to(cut) > 0 && !self.board.cut(cut).is_unneeded();
        inner.family.cuts().filter(move |(cut, _)| is_needed(*cut))
    }

    /// The leaves whose pages a VM lends, and to which cut: the last.
    fn lent_leaves(&self, inner: &Inner) -> BTreeMap<(VmId, LeafNumber), CutId> {
        let pending = |(cut, source): (CutId, VmId)| {
            self.board.cut(cut).pending().map(move |leaf| ((source, leaf), cut))
        };
        self.needed_cuts(inner).flat_map(pending).collect()
    }

    /// The block that a VM has at a leaf, as its window says, and its table where it has not been there;
    /// and whether that is published.
    fn block_of(
        &self,
        inner: &Inner,
        lent: &BTreeMap<(VmId, LeafNumber), CutId>,
        (vm, slot): (VmId, u32),
        leaf: LeafNumber,
    ) -> Option<(CutId, bool)> {
        match self.board.member(slot).map(leaf) {
            LeafMap::Block(cut) => Some((cut, true)),
            LeafMap::Own => lent.get(&(vm, leaf)).map(|cut| (*cut, false)),
            LeafMap::Unknown => match inner.family.resolve(vm, leaf) {
                Ok(Found::Shared { block: Some(cut), .. }) => Some((cut, true)),
                Ok(Found::Pending(cut)) => Some((cut, false)),
                Ok(Found::Shared { block: None, .. } | Found::Zero | Found::Lost) | Err(_) => None,
            },
        }
    }
}

/// The pages of a VM, in sums.
pub(super) fn page_sums(inner: &Inner, vm: VmId, report: &SpaceReport) -> Result<PageCounts, FamilyError> {
    let mut sums = PageCounts::default();
    for leaf in &report.leaves {
        sums.add(&pages_of(leaf, inner.family.resolve(vm, leaf.leaf)?));
    }
    Ok(sums)
}

/// The pages of a leaf. What has not been touched since the cut is what the table says.
fn pages_of(leaf: &LeafReport, found: Found) -> PageCounts {
    let (exclusive, lent) = (wide(leaf.exclusive.len()), wide(leaf.lent.len()));
    let pages = PageCounts { exclusive, lent, pinned: wide(leaf.pinned.len()), ..PageCounts::default() };
    let all = wide(LEAF_PAGES);
    let rest = all - exclusive - lent;
    match (leaf.backing, found) {
        (Backing::Anonymous, _) | (Backing::Trapped, Found::Zero) => PageCounts { zero: rest, ..pages },
        (Backing::Lost, _) | (Backing::Trapped, Found::Lost) => PageCounts { poisoned: all, ..pages },
        (Backing::Block(_) | Backing::Trapped, _) => PageCounts { shared: rest, ..pages },
    }
}
