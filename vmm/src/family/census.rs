//! How many table nodes and leaf records there are, by level and by whether they are shared.

use std::collections::BTreeSet;

use super::{Family, FamilyError, VmId};
use crate::board::NODE_ENTRIES;
use crate::tables::{Entry, LEAF_LEVEL, LeafRecord, ROOT_LEVEL};

/// Nodes or records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Reached by one way only.
    pub own: usize,
    /// Reached by several, or from such a one.
    pub shared: usize,
}

/// A census of tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableCensus {
    /// Nodes of 512 entries: those of the root's level first.
    pub nodes: [Census; (ROOT_LEVEL - LEAF_LEVEL + 1) as usize],
    /// Leaf records.
    pub records: Census,
}

impl TableCensus {
    /// Nodes with the level that they stand at.
    pub fn levels(&self) -> impl Iterator<Item = (u32, Census)> + '_ {
        (LEAF_LEVEL..=ROOT_LEVEL).rev().zip(self.nodes)
    }
}

impl Family {
    /// All nodes and records of the colony.
    #[must_use]
    pub fn census(&self) -> TableCensus {
        let cuts = self.cuts.values().flat_map(|cut| std::iter::once(cut.base).chain(cut.table));
        let roots: Vec<_> = self.held_entries().map(|(_, entry)| entry).chain(cuts).collect();
        self.census_below(&roots)
    }

    /// The nodes and records that a VM's root reaches.
    ///
    /// # Errors
    /// No such VM.
    pub fn census_of(&self, vm: VmId) -> Result<TableCensus, FamilyError> {
        Ok(self.census_below(&[self.root(vm)?]))
    }

    fn census_below(&self, roots: &[Entry]) -> TableCensus {
        let (mut census, mut seen) = (TableCensus::default(), BTreeSet::new());
        for root in roots {
            self.count(*root, 0, false, &mut seen, &mut census);
        }
        census
    }

    fn count(
        &self,
        entry: Entry,
        depth: usize,
        is_above_shared: bool,
        seen: &mut BTreeSet<Entry>,
        census: &mut TableCensus,
    ) {
        let is_shared = is_above_shared || self.tables.references(entry) > 1;
        let add = |to: &mut Census| *if is_shared { &mut to.shared } else { &mut to.own } += 1;
        match entry {
            Entry::Node(node) if seen.insert(entry) => {
                add(&mut census.nodes[depth]);
                for index in 0..NODE_ENTRIES {
                    self.count(self.tables.entry(node, index), depth + 1, is_shared, seen, census);
                }
            }
            Entry::Leaf(record) if seen.insert(entry) => {
                add(&mut census.records);
                if let LeafRecord::Private { under, .. } = self.tables.leaf_record(record) {
                    self.count(under, depth, is_shared, seen, census);
                }
            }
            // A cut that is settled stands for its table. One that is not has none.
            Entry::Thunk(cut) if depth == 0 => {
                if let Some(table) = self.cuts.get(&cut).and_then(|cut| cut.table) {
                    self.count(table, 0, true, seen, census);
                }
            }
            _ => {}
        }
    }
}
