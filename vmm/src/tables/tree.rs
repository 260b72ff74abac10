//! The nodes and leaf records of a colony and their reference counts. Written by the keeper alone.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use thiserror::Error;

use super::{Entry, LEAF_LEVEL, LeafRecord, ROOT_LEVEL, ShareLevel, leaves_per_slot, slot};
use crate::board::{Board, NODE_ENTRIES};
use crate::failure;
use crate::frames::{CutId, Frames, Ledger};
use crate::plants::{Plant, is_planted};
use crate::words::{LeafNumber, PageSet};

/// No room is left for a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum TablesError {
    /// All nodes are in use.
    #[error("all {0} table nodes are in use")]
    Nodes(u32),
    /// All leaf records are in use.
    #[error("all {0} leaf records are in use")]
    Records(u32),
}

/// What nobody refers to any more, after a release.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// Frames of the arena.
    pub frames: Vec<Frames>,
    /// Cuts, once for each reference that was given up.
    pub cuts: Vec<CutId>,
}

/// Nodes and records in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableCounts {
    /// Nodes of 512 entries.
    pub nodes: usize,
    /// Leaf records.
    pub records: usize,
}

/// See the module [`crate::tables`].
#[derive(Debug)]
pub struct Tables {
    board: Board,
    node_references: Pool,
    record_references: Pool,
    /// Where each record in use stands: its frames depend on it.
    record_leaf: Vec<LeafNumber>,
    ledger: Ledger,
    released: Released,
}

/// Numbers with reference counts. What falls to 0 waits in limbo until it is reclaimed.
#[derive(Debug, Default)]
struct Pool {
    references: Vec<u32>,
    free: Vec<u32>,
    limbo: Vec<u32>,
    limit: u32,
}

impl Pool {
    fn new(limit: u32) -> Self {
        Self { limit: limit.min(super::NUMBER_LIMIT), ..Self::default() }
    }

    fn take(&mut self) -> Option<u32> {
        let number = match self.free.pop() {
            Some(number) => number,
            None => {
                let next = u32::try_from(self.references.len()).ok().filter(|next| *next < self.limit)?;
                self.references.push(0);
                next
            }
        };
        self.references[number as usize] = 1;
        Some(number)
    }

    fn retain(&mut self, number: u32) {
        self.references[number as usize] += 1;
    }

    /// True if that was the last reference.
    fn release(&mut self, number: u32) -> bool {
        let count = &mut self.references[number as usize];
        *count = count.checked_sub(1).expect("released more often than retained");
        if *count == 0 {
            self.limbo.push(number);
        }
        *count == 0
    }

    fn in_use(&self) -> usize {
        self.references.len() - self.free.len() - self.limbo.len()
    }
}

impl Tables {
    /// No tables yet, on this board.
    #[must_use]
    pub fn new(board: Board) -> Self {
        let shape = board.shape();
        Self {
            node_references: Pool::new(shape.nodes),
            record_references: Pool::new(shape.records),
            record_leaf: Vec::new(),
            ledger: Ledger::default(),
            released: Released::default(),
            board,
        }
    }

    /// Takes one more reference on whatever `entry` names. References on cuts are the caller's to
    /// count: it is told of those that nodes give up by [`Tables::take_released`].
    #[must_use]
    pub fn share(&mut self, entry: Entry) -> Entry {
        match entry {
            Entry::Node(node) => self.node_references.retain(node),
            Entry::Leaf(record) => self.record_references.retain(record),
            Entry::Empty | Entry::Thunk(_) | Entry::Lost => {}
        }
        entry
    }

    /// Gives up one reference, and with the last one all that the node or record refers to.
    pub fn release(&mut self, entry: Entry) {
        match entry {
            Entry::Node(node) => {
                if self.node_references.release(node) {
                    for index in 0..NODE_ENTRIES {
                        let below = self.load(node, index);
                        self.release(below);
                    }
                }
            }
            Entry::Leaf(record) => {
                if self.record_references.release(record) {
                    let leaf = self.record_leaf[record as usize];
                    let content = self.leaf_record(record);
                    for frames in content.frames(leaf) {
                        if self.ledger.release(frames) {
                            self.released.frames.push(frames);
                        }
                    }
                    if let LeafRecord::Private { under, .. } = content {
                        self.release(under);
                    }
                }
            }
            Entry::Thunk(cut) => self.released.cuts.push(cut),
            Entry::Empty | Entry::Lost => {}
        }
    }

    /// What has lost its last reference since the last call.
    #[must_use]
    pub fn take_released(&mut self) -> Released {
        std::mem::take(&mut self.released)
    }

    /// Nobody walks the tables: what was given up may be used again.
    pub fn reclaim(&mut self) {
        for pool in [&mut self.node_references, &mut self.record_references] {
            let mut limbo = std::mem::take(&mut pool.limbo);
            pool.free.append(&mut limbo);
        }
    }

    /// Says that `leaf` is shared: the block of `block` under the patches of `patches`.
    ///
    /// `retain_cut` is called, here and below, for each reference to a cut that a new node takes.
    ///
    /// # Errors
    /// No room for a node or record: the content below `root` is unchanged.
    pub fn set_shared(
        &mut self,
        root: &mut Entry,
        leaf: LeafNumber,
        (block, patches): (Option<CutId>, Option<CutId>),
        retain_cut: &mut dyn FnMut(CutId),
    ) -> Result<(), TablesError> {
        let record = self.new_record(leaf, LeafRecord::Shared { block, patches })?;
        self.set_entry(root, leaf, record, retain_cut).inspect_err(|_| self.release(record))
    }

    /// Says which pages of `leaf` the one VM that has `root` owns; none = it owns no page there.
    /// What was shared there stays under them.
    ///
    /// # Errors
    /// As [`Tables::set_shared`].
    pub fn set_private(
        &mut self,
        root: &mut Entry,
        leaf: LeafNumber,
        exclusive: PageSet,
        retain_cut: &mut dyn FnMut(CutId),
    ) -> Result<(), TablesError> {
        let directory = self.own_path(root, leaf, retain_cut)?;
        let index = slot(LEAF_LEVEL, leaf);
        let old = self.load(directory, index);
        let under = match old {
            Entry::Leaf(record) => match self.leaf_record(record) {
                LeafRecord::Private { under, .. } => self.share_counted(under, retain_cut),
                LeafRecord::Shared { .. } => self.share(old),
            },
            _ => self.share_counted(old, retain_cut),
        };
        let new = if exclusive.is_empty() {
            under
        } else {
            match self.new_record(leaf, LeafRecord::Private { under, exclusive }) {
                Ok(record) => record,
                Err(error) => {
                    self.release(under);
                    return Err(error);
                }
            }
        };
        self.store(directory, index, new);
        self.release(old);
        Ok(())
    }

    fn share_counted(&mut self, entry: Entry, retain_cut: &mut dyn FnMut(CutId)) -> Entry {
        if let Entry::Thunk(cut) = entry
            && !is_planted(Plant::CutUncounted)
        {
            retain_cut(cut);
        }
        self.share(entry)
    }

    fn new_record(&mut self, leaf: LeafNumber, content: LeafRecord) -> Result<Entry, TablesError> {
        failure::point("tables.record").map_err(|_| TablesError::Records(self.board.shape().records))?;
        let number = self.record_references.take().ok_or(TablesError::Records(self.board.shape().records))?;
        content.store(self.board.record(number));
        let needed = number as usize + 1;
        if self.record_leaf.len() < needed {
            self.record_leaf.resize(needed, LeafNumber(0));
        }
        self.record_leaf[number as usize] = leaf;
        for frames in content.frames(leaf).filter(|_| !is_planted(Plant::FramesUncounted)) {
            self.ledger.retain(frames);
        }
        Ok(Entry::Leaf(number))
    }

    /// Puts `entry` at `leaf`; its reference passes to the tree.
    ///
    /// # Errors
    /// No room for a node: the reference stays the caller's.
    pub fn set_entry(
        &mut self,
        root: &mut Entry,
        leaf: LeafNumber,
        entry: Entry,
        retain_cut: &mut dyn FnMut(CutId),
    ) -> Result<(), TablesError> {
        let directory = self.own_path(root, leaf, retain_cut)?;
        let index = slot(LEAF_LEVEL, leaf);
        let old = self.load(directory, index);
        self.store(directory, index, entry);
        self.release(old);
        Ok(())
    }

    /// Breaks the path to `leaf` top-down, and returns its last directory, which has one referrer.
    fn own_path(
        &mut self,
        root: &mut Entry,
        leaf: LeafNumber,
        retain_cut: &mut dyn FnMut(CutId),
    ) -> Result<u32, TablesError> {
        let mut node = self.own_node(*root, retain_cut)?;
        *root = Entry::Node(node);
        for level in (LEAF_LEVEL + 1..=ROOT_LEVEL).rev() {
            let index = slot(level, leaf);
            let below = self.own_node(self.load(node, index), retain_cut)?;
            self.store(node, index, Entry::Node(below));
            node = below;
        }
        Ok(node)
    }

    /// A node of the same content as `entry` with one referrer, the caller, who gives up its
    /// reference on `entry`: that node itself, or a copy.
    fn own_node(&mut self, entry: Entry, retain_cut: &mut dyn FnMut(CutId)) -> Result<u32, TablesError> {
        if let Entry::Node(node) = entry
            && (self.node_references.references[node as usize] == 1 || is_planted(Plant::SharedNodeEdited))
        {
            return Ok(node);
        }
        failure::point("tables.node").map_err(|_| TablesError::Nodes(self.board.shape().nodes))?;
        let copy = self.node_references.take().ok_or(TablesError::Nodes(self.board.shape().nodes))?;
        for index in 0..NODE_ENTRIES {
            let below = match entry {
                Entry::Node(node) => self.load(node, index),
                // A thunk stands for its whole subtree: at each place below it is the same thunk.
                other => other,
            };
            let shared = self.share_counted(below, retain_cut);
            // Nobody comes to the copy before the entry that names it is stored.
            self.board.node(copy)[index].store(shared.encode(), Ordering::Relaxed);
        }
        self.release(entry);
        Ok(copy)
    }

    /// Breaks the nodes below `root` top-down as far as `level` says: what has one referrer then, the
    /// caller, ends above it.
    ///
    /// # Errors
    /// No room for a node: less is broken, and the content below `root` is unchanged.
    pub fn break_down_to(
        &mut self,
        root: &mut Entry,
        level: ShareLevel,
        retain_cut: &mut dyn FnMut(CutId),
    ) -> Result<(), TablesError> {
        let Some(lowest) = level.lowest_own().filter(|_| *root != Entry::Empty) else { return Ok(()) };
        let node = self.own_node(*root, retain_cut)?;
        *root = Entry::Node(node);
        self.break_below(node, (ROOT_LEVEL, LeafNumber(0)), lowest, retain_cut)
    }

    fn break_below(
        &mut self,
        node: u32,
        (level, first): (u32, LeafNumber),
        lowest: u32,
        retain_cut: &mut dyn FnMut(CutId),
    ) -> Result<(), TablesError> {
        if level == lowest {
            return Ok(());
        }
        let leaves = self.board.shape().leaves;
        for (index, step) in (0..NODE_ENTRIES).zip(0u32..) {
            let first = LeafNumber(first.0 + step * leaves_per_slot(level));
            let below = self.load(node, index);
            if first.0 >= leaves || !matches!(below, Entry::Node(_) | Entry::Thunk(_)) {
                continue;
            }
            let own = self.own_node(below, retain_cut)?;
            self.store(node, index, Entry::Node(own));
            self.break_below(own, (level - 1, first), lowest, retain_cut)?;
        }
        Ok(())
    }

    /// Puts the entries of `table` in the place of all thunks of `cut` below `roots`: the cut is
    /// settled as that table, so that what anybody sees does not change, and shared nodes can be
    /// edited in place.
    pub fn replace_thunk(
        &mut self,
        roots: &[Entry],
        cut: CutId,
        table: Entry,
        retain_cut: &mut dyn FnMut(CutId),
    ) {
        let mut seen = BTreeSet::new();
        for root in roots {
            self.replace_below(*root, ROOT_LEVEL, LeafNumber(0), (cut, table), &mut seen, retain_cut);
        }
    }

    fn replace_below(
        &mut self,
        entry: Entry,
        level: u32,
        first: LeafNumber,
        (cut, table): (CutId, Entry),
        seen: &mut BTreeSet<u32>,
        retain_cut: &mut dyn FnMut(CutId),
    ) {
        let Entry::Node(node) = entry else { return };
        if !seen.insert(node) {
            return;
        }
        for (index, step) in (0..NODE_ENTRIES).zip(0u32..) {
            let first = LeafNumber(first.0 + step * leaves_per_slot(level));
            match self.load(node, index) {
                below @ Entry::Node(_) => {
                    self.replace_below(below, level - 1, first, (cut, table), seen, retain_cut);
                }
                Entry::Thunk(named) if named == cut => {
                    let new = self.entry_at(table, level, first);
                    let new = self.share_counted(new, retain_cut);
                    self.store(node, index, new);
                    self.release(Entry::Thunk(cut));
                }
                Entry::Leaf(record) => {
                    if let LeafRecord::Private { under: Entry::Thunk(named), exclusive } =
                        self.leaf_record(record)
                        && named == cut
                    {
                        let under = self.entry_at(table, level, first);
                        let under = self.share_counted(under, retain_cut);
                        // One word changes; a walk sees the old entry or the new one.
                        LeafRecord::Private { under, exclusive }.store(self.board.record(record));
                        self.release(Entry::Thunk(cut));
                    }
                }
                Entry::Thunk(_) | Entry::Empty | Entry::Lost => {}
            }
        }
    }

    /// What stands in the slot of a node of `level` on the way from `root` to `leaf`; an entry
    /// further up if the tree ends there.
    fn entry_at(&self, root: Entry, level: u32, leaf: LeafNumber) -> Entry {
        let mut entry = root;
        for above in (level..=ROOT_LEVEL).rev() {
            let Entry::Node(node) = entry else { break };
            entry = self.load(node, slot(above, leaf));
        }
        entry
    }

    /// The one place that stores to an entry that others may see. References are moved by the callers:
    /// the store itself neither takes nor gives one.
    fn store(&self, node: u32, index: usize, entry: Entry) {
        // Pairs with the acquire load of a walk: what the entry names is complete.
        self.board.node(node)[index].store(entry.encode(), Ordering::Release);
    }

    fn load(&self, node: u32, index: usize) -> Entry {
        Entry::decode(self.board.node(node)[index].load(Ordering::Relaxed))
    }

    /// The entry at `index` of a node.
    #[must_use]
    pub fn entry(&self, node: u32, index: usize) -> Entry {
        self.load(node, index)
    }

    /// Where a record stands.
    #[must_use]
    pub fn leaf_of(&self, record: u32) -> LeafNumber {
        self.record_leaf[record as usize]
    }

    /// The leaf record with this number.
    #[must_use]
    pub fn leaf_record(&self, record: u32) -> LeafRecord {
        LeafRecord::load(self.board.record(record))
    }

    /// References to the node or record that `entry` names; 0 for entries that name neither.
    #[must_use]
    pub fn references(&self, entry: Entry) -> u32 {
        match entry {
            Entry::Node(node) => self.node_references.references[node as usize],
            Entry::Leaf(record) => self.record_references.references[record as usize],
            Entry::Empty | Entry::Thunk(_) | Entry::Lost => 0,
        }
    }

    /// The references to frames.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Nodes and records in use.
    #[must_use]
    pub fn counts(&self) -> TableCounts {
        TableCounts { nodes: self.node_references.in_use(), records: self.record_references.in_use() }
    }

    /// The entries on the way from `root` to `leaf`: root first, the slot of the leaf last. Shorter
    /// where the tree ends earlier.
    #[must_use]
    pub fn path(&self, root: Entry, leaf: LeafNumber) -> Vec<Entry> {
        let mut path = vec![root];
        let mut level = ROOT_LEVEL;
        while let Some(Entry::Node(node)) = path.last() {
            path.push(self.load(*node, slot(level, leaf)));
            level -= 1;
        }
        path
    }

    /// Calls `visit` for each entry below `root` that is no node, with its level and first leaf.
    pub fn for_each(&self, root: Entry, visit: &mut dyn FnMut(u32, LeafNumber, Entry)) {
        self.visit(root, ROOT_LEVEL + 1, LeafNumber(0), visit);
    }

    /// Calls `visit` for each entry of a last directory below `root` to which `root` is the only
    /// way: all nodes on the path have one referrer.
    pub fn for_each_own(&self, root: Entry, visit: &mut dyn FnMut(LeafNumber, Entry)) {
        self.visit_own(root, ROOT_LEVEL, LeafNumber(0), visit);
    }

    fn visit_own(
        &self,
        entry: Entry,
        level: u32,
        first: LeafNumber,
        visit: &mut dyn FnMut(LeafNumber, Entry),
    ) {
        let Entry::Node(node) = entry else { return };
        if self.references(entry) != 1 {
            return;
        }
        for (index, step) in (0..NODE_ENTRIES).zip(0u32..) {
            let first = LeafNumber(first.0 + step * leaves_per_slot(level));
            match self.load(node, index) {
                below @ Entry::Node(_) => self.visit_own(below, level - 1, first, visit),
                Entry::Empty => {}
                other if level == LEAF_LEVEL => visit(first, other),
                _ => {}
            }
        }
    }

    fn visit(
        &self,
        entry: Entry,
        level: u32,
        first: LeafNumber,
        visit: &mut dyn FnMut(u32, LeafNumber, Entry),
    ) {
        let Entry::Node(node) = entry else {
            if entry != Entry::Empty {
                visit(level, first, entry);
            }
            return;
        };
        for (index, step) in (0..NODE_ENTRIES).zip(0u32..) {
            let first = LeafNumber(first.0 + step * leaves_per_slot(level - 1));
            self.visit(self.load(node, index), level - 1, first, visit);
        }
    }
}
