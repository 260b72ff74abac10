//! The keeper's memory map as it goes over the socket.

use super::registry::Entry;
use super::resources::{BlockView, LeafView, LevelView, MemoryView, Pages, TablesView};
use crate::family::TableCensus;
use crate::keeper::map::{MapLeaf, MemoryMap};
use crate::space::PageCounts;
use crate::words::{LEAF_BYTES, PAGE_BYTES, wide};

impl From<PageCounts> for Pages {
    fn from(counts: PageCounts) -> Self {
        let PageCounts { zero, exclusive, lent, shared, pinned, poisoned } = counts;
        Self { zero, exclusive, lent, shared, pinned, lost: poisoned }
    }
}

impl From<&MapLeaf> for LeafView {
    fn from(leaf: &MapLeaf) -> Self {
        let block = leaf.block.map(|block| BlockView {
            fork: block.cut.get().into(),
            is_published: block.is_published,
            vms: block.vms,
        });
        Self { leaf: leaf.leaf.0, pages: leaf.pages.into(), block }
    }
}

impl From<&TableCensus> for TablesView {
    fn from(census: &TableCensus) -> Self {
        let level = |(level, nodes): (u32, crate::family::Census)| LevelView {
            level,
            own_nodes: nodes.own,
            shared_nodes: nodes.shared,
        };
        Self {
            levels: census.levels().map(level).collect(),
            own_records: census.records.own,
            shared_records: census.records.shared,
        }
    }
}

/// A VM's memory, for users.
pub(super) fn view(entry: &Entry, map: &MemoryMap) -> MemoryView {
    let leaves: Vec<_> = map.leaves.iter().map(LeafView::from).collect();
    let mut pages = PageCounts::default();
    map.leaves.iter().for_each(|leaf| pages.add(&leaf.pages));
    MemoryView {
        name: entry.name.clone(),
        id: entry.vm.0.into(),
        page_bytes: wide(PAGE_BYTES),
        leaf_bytes: wide(LEAF_BYTES),
        pages: pages.into(),
        tables: TablesView::from(&map.tables),
        leaves,
    }
}
