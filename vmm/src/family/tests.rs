//! The family alone: sources that publish are played by setting leaf words.

use std::sync::Arc;

use super::*;
use crate::board::{BoardShape, HeapWords, LeafMap, Patches};
use crate::tables::ROOT_LEVEL;

/// Leaves that the VMs of these tests write: three, in two directories.
const LEAVES: [LeafNumber; 3] = [LeafNumber(0), LeafNumber(1), LeafNumber(600)];

struct Play {
    board: Board,
    family: Family,
}

impl Play {
    fn new() -> (Self, VmId) {
        let shape = BoardShape { leaves: 1024, cuts: 32, members: 20, nodes: 256, records: 256 };
        let board = Board::new(shape, Arc::new(HeapWords::for_shape(&shape)));
        let mut family = Family::new(board.clone());
        let first = family.first_vm(0);
        (Self { board, family }, first)
    }

    fn cut(&mut self, source: VmId, protected: &[LeafNumber]) -> CutId {
        let cut = self.family.reserve_cut(source).expect("there is room");
        protected.iter().for_each(|leaf| self.board.cut(cut).set_protected(*leaf));
        self.family.commit_cut(cut);
        cut
    }

    /// A cut, and a clone of it in member slot `slot`.
    fn fork(&mut self, source: VmId, slot: u32, protected: &[LeafNumber]) -> (CutId, VmId) {
        let cut = self.cut(source, protected);
        self.board.open_member(slot).expect("the heap has room");
        (cut, self.family.clone_vm(cut, slot, false).expect("the cut is new"))
    }

    fn publish(&self, cut: CutId, leaves: &[LeafNumber]) {
        leaves.iter().for_each(|leaf| self.board.cut(cut).publish(*leaf, LeafWord::Block));
    }

    /// Sweeps until nothing follows any more, and says all that followed.
    fn sweep(&mut self) -> Sweep {
        let mut all = Sweep::default();
        loop {
            let sweep = self.family.sweep().expect("there is room");
            sweep.unneeded.iter().for_each(|cut| self.family.cut_released(*cut));
            sweep.closed.iter().for_each(|cut| self.board.close_cut(*cut).expect("the heap refuses nothing"));
            self.family.check().expect("the family adds up");
            if sweep == Sweep::default() {
                return all;
            }
            all.unneeded.extend(sweep.unneeded);
            all.freed.extend(sweep.freed);
            all.closed.extend(sweep.closed);
        }
    }

    fn end(&mut self, vm: VmId) -> Vec<(CutId, LeafNumber)> {
        self.family.end_vm(vm);
        self.family.source_gone(vm)
    }

    fn assert_empty(&self) {
        assert_eq!(self.family.table_counts(), TableCounts::default());
        assert_eq!(self.family.open_cuts(), 0);
        assert_eq!(self.family.tables().ledger().iter().count(), 0);
        assert_eq!(self.family.vms().count(), 0);
    }
}

fn block(cut: CutId) -> Found {
    Found::Shared { block: Some(cut), patches: None }
}

/// E1: one reference at the root; no node, no record.
#[test]
fn a_fork_takes_one_reference() {
    let (mut play, first) = Play::new();
    let (cut, clone) = play.fork(first, 1, &LEAVES);
    assert_eq!(play.family.table_counts(), TableCounts::default());
    assert_eq!(play.family.references_to(cut), 2);
    assert_eq!(play.family.resolve(clone, LEAVES[0]).expect("lives"), Found::Pending(cut));
    assert_eq!(play.family.resolve(clone, LeafNumber(5)).expect("lives"), Found::Zero);
    for slot in 2..12 {
        play.family.clone_vm(cut, slot, false).expect("the cut is needed");
    }
    assert_eq!((play.family.table_counts(), play.family.references_to(cut)), (TableCounts::default(), 12));
}

/// E2 to E4, as seen after a harvest.
#[test]
fn a_table_is_broken_top_down_and_reused() {
    let (mut play, first) = Play::new();
    let (cut, clone) = play.fork(first, 1, &LEAVES);
    play.publish(cut, &LEAVES);
    play.sweep();
    // Root, level 3, two directories; three leaves.
    let shared = TableCounts { nodes: 4, records: 3 };
    assert_eq!(play.family.table_counts(), shared);
    let mut page = PageSet::EMPTY;
    page.insert(7);

    play.family.harvest(first, &[(LEAVES[0], page)]).expect("there is room");
    let path = TableCounts { nodes: 3, records: 1 };
    assert_eq!(play.family.table_counts(), TableCounts { nodes: 4 + path.nodes, records: 4 });
    assert_eq!(play.family.resolve(clone, LEAVES[0]).expect("lives"), block(cut));

    // The other VM shares its path with nobody but the cut now, which is gone with its table: the
    // same nodes go on, nothing is copied but the leaf.
    let nodes = play.family.tables().path(play.family.root(clone).expect("lives"), LEAVES[0])[..3].to_vec();
    play.family.harvest(clone, &[(LEAVES[0], page)]).expect("there is room");
    let after = play.family.tables().path(play.family.root(clone).expect("lives"), LEAVES[0]);
    assert_eq!(after[..3], nodes, "reused");
    assert_eq!(play.family.table_counts(), TableCounts { nodes: 7, records: 5 });
    play.family.check().expect("the family adds up");

    // In another directory: that one is still shared.
    play.family.harvest(clone, &[(LEAVES[0], page), (LEAVES[2], page)]).expect("there is room");
    assert_eq!(play.family.table_counts(), TableCounts { nodes: 8, records: 6 });
    play.family.harvest(clone, &[]).expect("there is room");
    assert_eq!(play.family.table_counts().records, 4);
    play.end(first);
    play.end(clone);
    let sweep = play.sweep();
    assert_eq!(sweep.freed.len(), 3);
    play.assert_empty();
}

#[test]
fn a_harvest_before_the_cut_is_settled_does_not_keep_it() {
    let (mut play, first) = Play::new();
    let (cut, clone) = play.fork(first, 1, &LEAVES);
    let owned = [(LEAVES[1], PageSet::ALL)];
    play.family.harvest(clone, &owned).expect("there is room");
    assert_eq!(play.sweep(), Sweep::default());
    play.publish(cut, &LEAVES);
    play.sweep();
    assert_eq!(play.family.references_to(cut), 0, "the table has taken the cut's place everywhere");
    for vm in [first, clone] {
        for leaf in LEAVES {
            assert_eq!(play.family.resolve(vm, leaf).expect("lives"), block(cut));
        }
    }
    play.end(first);
    play.end(clone);
    play.sweep();
    play.assert_empty();
}

#[test]
fn an_unneeded_cut_is_let_go_by_its_source() {
    let (mut play, first) = Play::new();
    let (cut, clone) = play.fork(first, 1, &LEAVES);
    assert_eq!(play.sweep(), Sweep::default());
    assert!(play.family.is_image_needed(first));
    play.end(clone);
    let sweep = play.family.sweep().expect("there is room");
    assert_eq!(sweep.unneeded, [cut], "in the first sweep after the clone's end");
    assert!(play.board.cut(cut).is_unneeded() && !play.family.is_image_needed(first));
    assert!(matches!(play.family.clone_vm(cut, 2, false), Err(FamilyError::NoCut(_))), "no new dependants");
    assert_eq!(play.family.open_cuts(), 1, "the source has not let go yet");
    play.family.cut_released(cut);
    assert_eq!(play.sweep().closed, [cut]);
    play.end(first);
    play.sweep();
    play.assert_empty();
}

/// A cut that only a clone's table names, not its root, is needed.
#[test]
fn a_clone_with_a_table_of_its_own_keeps_its_cut() {
    let (mut play, first) = Play::new();
    let (old, clone) = play.fork(first, 1, &LEAVES);
    let owned = [(LEAVES[0], PageSet::ALL)];
    // Source and clone name the cut from nodes of their own now, equally often.
    play.family.harvest(first, &owned).expect("there is room");
    play.family.harvest(clone, &owned).expect("there is room");
    // A cut that nobody needs has the source's table as base, and gives the same to the source.
    play.cut(first, &[]);
    assert_eq!(play.sweep().unneeded.len(), 1);
    assert!(!play.board.cut(old).is_unneeded());
    assert_eq!(play.family.resolve(clone, LEAVES[2]).expect("lives"), Found::Pending(old));
}

#[test]
fn a_dead_source_takes_along_what_it_had_not_published() {
    let (mut play, first) = Play::new();
    let (cut, clone) = play.fork(first, 1, &LEAVES);
    let (_, grandchild) = play.fork(clone, 2, &[]);
    play.publish(cut, &LEAVES[..1]);
    let mut lost = play.end(first);
    lost.sort();
    assert_eq!(lost, [(cut, LEAVES[1]), (cut, LEAVES[2])]);
    for _ in 0..2 {
        for vm in [clone, grandchild] {
            assert_eq!(play.family.resolve(vm, LEAVES[0]).expect("lives"), block(cut));
            assert_eq!(play.family.resolve(vm, LEAVES[1]).expect("lives"), Found::Lost);
        }
        // Once more when all is settled.
        play.sweep();
    }
    play.end(clone);
    play.end(grandchild);
    play.sweep();
    play.assert_empty();
}

#[test]
fn later_cuts_read_through_an_unneeded_one() {
    let (mut play, first) = Play::new();
    let (needed, _) = play.fork(first, 1, &LEAVES);
    let unneeded = play.cut(first, &LEAVES);
    assert_eq!(play.sweep().unneeded, [unneeded]);
    // Published for the first cut, dropped for its block by the source: the third has nothing there.
    play.publish(needed, &LEAVES[..1]);
    let (_, late) = play.fork(first, 2, &LEAVES[1..]);
    assert_eq!(play.family.resolve(late, LEAVES[0]).expect("lives"), block(needed));
    play.end(first);
    assert_eq!(play.family.resolve(late, LEAVES[0]).expect("lives"), block(needed), "nor is it lost");
}

#[test]
fn a_chain_of_depth_16_resolves_to_the_nearest_cut() {
    let (mut play, mut vm) = Play::new();
    let mut chain = Vec::new();
    for slot in 1..=16 {
        let leaf = LeafNumber(slot);
        let (cut, clone) = play.fork(vm, slot, &[LeafNumber(0), leaf]);
        chain.push((cut, leaf));
        vm = clone;
    }
    for settled in [false, true] {
        if settled {
            play.sweep();
        }
        for (cut, leaf) in &chain {
            let expected = if settled { block(*cut) } else { Found::Pending(*cut) };
            assert_eq!(play.family.resolve(vm, *leaf).expect("lives"), expected);
            play.publish(*cut, &[LeafNumber(0), *leaf]);
        }
        let (last, _) = chain[15];
        assert_eq!(play.family.resolve(vm, LeafNumber(0)).expect("lives"), block(last));
    }
    assert_eq!(play.family.references_to(chain[0].0), 0, "all are settled");
    // A fork at this depth does what the first one did.
    let before = play.family.table_counts();
    play.fork(vm, 17, &[LeafNumber(0)]);
    assert_eq!(play.family.table_counts(), before);
    let all: Vec<VmId> = play.family.vms().collect();
    play.sweep();
    all.into_iter().for_each(|vm| drop(play.end(vm)));
    play.sweep();
    play.assert_empty();
}

/// F3: three VMs, exits in all orders, during and after publication.
#[test]
fn exits_in_all_orders_leave_nothing() {
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        for published in 0..=3 {
            let (mut play, first) = Play::new();
            let (cut, child) = play.fork(first, 1, &LEAVES);
            let (below, grandchild) = play.fork(child, 2, &LEAVES[..1]);
            play.publish(cut, &LEAVES[..published]);
            play.publish(below, &LEAVES[..published.min(1)]);
            for index in order {
                play.sweep();
                play.end([first, child, grandchild][index]);
            }
            play.sweep();
            play.assert_empty();
        }
    }
}

/// A8, and with harvests between: nothing grows.
#[test]
fn ten_thousand_forks_and_exits_leave_nothing() {
    let (mut play, first) = Play::new();
    let mut high = TableCounts::default();
    for round in 0..10_000u32 {
        let (cut, clone) = play.fork(first, 1, &LEAVES[..1]);
        if round % 16 == 0 {
            let owned = [(LEAVES[0], PageSet::ALL)];
            play.family.harvest(first, &owned).expect("there is room");
        }
        if round % 3 == 0 {
            play.publish(cut, &LEAVES[..1]);
        }
        play.end(clone);
        while play.family.sweep().expect("there is room") != Sweep::default() {
            play.family.cut_released(cut);
            play.board.close_cut(cut).expect("the heap refuses nothing");
        }
        let counts = play.family.table_counts();
        if round < 100 {
            high = TableCounts {
                nodes: high.nodes.max(counts.nodes),
                records: high.records.max(counts.records),
            };
        }
        assert!(counts.nodes <= high.nodes && counts.records <= high.records, "{round}: {counts:?}");
        assert!(play.family.open_cuts() <= 2, "{round}: cuts are left");
    }
    play.family.check().expect("the family adds up");
    play.end(first);
    play.sweep();
    play.assert_empty();
}

#[test]
fn a_mapped_block_is_not_freed() {
    let (mut play, first) = Play::new();
    let (cut, clone) = play.fork(first, 1, &LEAVES[..1]);
    play.publish(cut, &LEAVES[..1]);
    play.board.member(0).set_map(LEAVES[0], LeafMap::Block(cut));
    play.end(clone);
    play.sweep();
    // The source writes all of the leaf again, and a later cut says so.
    let (next, clone) = play.fork(first, 1, &LEAVES[..1]);
    play.publish(next, &LEAVES[..1]);
    play.end(clone);
    let sweep = play.sweep();
    assert!(!sweep.freed.iter().any(|frames| frames.cut() == cut), "the source maps it");
    play.board.member(0).set_map(LEAVES[0], LeafMap::Block(next));
    assert_eq!(play.sweep().freed, [Frames::Block(crate::frames::BlockId { cut, leaf: LEAVES[0] })]);
}

#[test]
fn patches_keep_their_block_and_their_cut() {
    let (mut play, first) = Play::new();
    let (cut, clone) = play.fork(first, 1, &LEAVES[..1]);
    play.publish(cut, &LEAVES[..1]);
    let (below, grandchild) = play.fork(clone, 2, &LEAVES[..1]);
    let mut pages = PageSet::EMPTY;
    pages.insert(3);
    let area = play.board.cut(below);
    area.set_patches(LEAVES[0], &Patches { block: Some(cut), first_frame: 0, pages });
    area.publish(LEAVES[0], LeafWord::Patched);
    let found = Found::Shared { block: Some(cut), patches: Some(below) };
    assert_eq!(play.family.resolve(grandchild, LEAVES[0]).expect("lives"), found);
    play.end(first);
    play.end(clone);
    assert!(play.sweep().freed.is_empty());
    assert_eq!(play.family.resolve(grandchild, LEAVES[0]).expect("lives"), found);
    play.end(grandchild);
    assert_eq!(play.sweep().freed.len(), 2);
    play.assert_empty();
}

#[test]
fn a_reserved_cut_can_be_given_up() {
    let (mut play, first) = Play::new();
    let cut = play.family.reserve_cut(first).expect("there is room");
    assert!(matches!(play.family.clone_vm(cut, 1, false), Err(FamilyError::NoCut(_))), "not performed yet");
    play.family.abort_cut(cut);
    assert_eq!(play.sweep().closed, [cut]);
    assert_eq!(play.family.tables().path(play.family.root(first).expect("lives"), LEAVES[0]).len(), 1);
    assert!(play.family.tables().path(Entry::Empty, LEAVES[0]).len() < ROOT_LEVEL as usize);
    play.end(first);
    play.sweep();
    play.assert_empty();
}

#[test]
fn cuts_run_out_and_come_back() {
    let (mut play, first) = Play::new();
    let cuts: Vec<CutId> = (0..32).map(|_| play.family.reserve_cut(first).expect("32 places")).collect();
    assert!(matches!(play.family.reserve_cut(first), Err(FamilyError::Cuts(32))));
    play.family.abort_cut(cuts[5]);
    play.sweep();
    let next = play.family.reserve_cut(first).expect("one place is free");
    assert_eq!(next.get() % 32, cuts[5].get() % 32);
    assert!(!cuts.contains(&next), "numbers are not used again");
}

#[test]
fn what_a_source_has_itself_goes_with_the_last_clone() {
    let (mut play, first) = Play::new();
    let (cut, clone) = play.fork(first, 1, &LEAVES[..2]);
    play.publish(cut, &LEAVES[..2]);
    // The source has kept its own pages of the first leaf; the second it is just dropping.
    play.board.member(0).set_map(LEAVES[0], LeafMap::Own);
    assert_eq!(play.sweep().freed, [], "the clone needs both");
    play.end(clone);
    let first_block = Frames::Block(crate::frames::BlockId { cut, leaf: LEAVES[0] });
    assert_eq!(play.sweep().freed, [first_block]);
    assert_eq!(play.family.resolve(first, LEAVES[1]).expect("it lives"), block(cut));
    play.board.member(0).set_map(LEAVES[1], LeafMap::Own);
    let sweep = play.sweep();
    assert_eq!((sweep.freed.len(), sweep.closed), (1, vec![cut]));
}

/// A clone that was cut itself shares what it did at the beginning, when it is told to return there.
#[test]
fn a_resettable_clone_keeps_its_origin() {
    let (mut play, first) = Play::new();
    let (cut, other) = play.fork(first, 1, &LEAVES);
    let clone = play.family.clone_vm(cut, 2, true).expect("the cut is needed");
    assert!(matches!(play.family.reset_vm(first), Err(FamilyError::NoOrigin(_))));
    assert!(matches!(play.family.is_at_origin(other), Err(FamilyError::NoOrigin(_))));
    assert!(play.family.is_at_origin(clone).expect("it can return"));
    play.publish(cut, &LEAVES);
    play.sweep();
    let (second, grandchild) = play.fork(clone, 3, &LEAVES[..1]);
    play.publish(second, &LEAVES[..1]);
    play.sweep();
    assert!(!play.family.is_at_origin(clone).expect("it can return"));
    assert_eq!(play.family.resolve(clone, LEAVES[0]).expect("lives"), block(second));
    play.family.reset_vm(clone).expect("there is room");
    play.sweep();
    assert!(play.family.is_at_origin(clone).expect("it can return"));
    assert_eq!(play.family.resolve(clone, LEAVES[0]).expect("lives"), block(cut));
    assert_eq!(play.family.resolve(grandchild, LEAVES[0]).expect("lives"), block(second));
    for vm in [first, other, clone, grandchild] {
        play.end(vm);
        play.sweep();
    }
    play.assert_empty();
}

#[test]
fn a_census_counts_each_node_once() {
    let (mut play, first) = Play::new();
    let (cut, a) = play.fork(first, 1, &LEAVES);
    let (_, b) = play.fork(a, 2, &[]);
    play.publish(cut, &LEAVES);
    play.sweep();
    let shared = play.family.census_of(b).expect("it lives");
    // A root, a directory, and the two last directories of the three leaves.
    assert_eq!(shared.nodes.map(|nodes| (nodes.own, nodes.shared)), [(0, 1), (0, 1), (0, 2)]);
    assert_eq!((shared.records.own, shared.records.shared), (0, 3));
    let mut exclusive = PageSet::EMPTY;
    exclusive.insert(7);
    play.family.harvest(b, &[(LEAVES[2], exclusive)]).expect("there is room");
    let broken = play.family.census_of(b).expect("it lives");
    assert_eq!(broken.nodes.map(|nodes| (nodes.own, nodes.shared)), [(1, 0), (1, 0), (1, 1)]);
    assert_eq!((broken.records.own, broken.records.shared), (1, 3), "its own lies over the shared one");
    let (census, counts) = (play.family.census(), play.family.table_counts());
    assert_eq!(census.nodes.iter().map(|nodes| nodes.own + nodes.shared).sum::<usize>(), counts.nodes);
    assert_eq!(census.records.own + census.records.shared, counts.records);
}
