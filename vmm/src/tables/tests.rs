//! Tables alone: sharing, breaking, reuse, thunks, reclaiming.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::*;
use crate::board::{Board, BoardShape, HeapWords};
use crate::frames::{BlockId, CutId, Frames};
use crate::words::{LeafNumber, PageSet};

const NEAR: LeafNumber = LeafNumber(3);
const BESIDE: LeafNumber = LeafNumber(4);
/// In another directory.
const FAR: LeafNumber = LeafNumber(3 + 512);

fn tables(nodes: u32, records: u32) -> (Board, Tables) {
    let shape = BoardShape { leaves: 1024, cuts: 4, members: 1, nodes, records };
    let board = Board::new(shape, Arc::new(HeapWords::for_shape(&shape)));
    (board.clone(), Tables::new(board))
}

fn cut(number: u32) -> CutId {
    CutId::new(number).expect("not zero")
}

/// References on cuts, as the family would count them.
#[derive(Default)]
struct Cuts(BTreeMap<CutId, i64>);

impl Cuts {
    fn retain(&mut self) -> impl FnMut(CutId) {
        |cut| *self.0.entry(cut).or_default() += 1
    }

    fn give_up(&mut self, released: &Released) {
        released.cuts.iter().for_each(|cut| *self.0.entry(*cut).or_default() -= 1);
    }

    fn of(&self, cut: CutId) -> i64 {
        self.0.get(&cut).copied().unwrap_or(0)
    }
}

fn counts(nodes: usize, records: usize) -> TableCounts {
    TableCounts { nodes, records }
}

fn found(cut: CutId) -> Found {
    Found::Shared { block: Some(cut), patches: None }
}

/// A root with blocks of cut 1 at the given leaves.
fn build(tables: &mut Tables, leaves: &[LeafNumber]) -> Entry {
    let mut root = Entry::Empty;
    for leaf in leaves {
        tables.set_shared(&mut root, *leaf, (Some(cut(1)), None), &mut |_| ()).expect("there is room");
    }
    root
}

#[test]
fn a_path_is_made_once() {
    let (board, mut tables) = tables(8, 8);
    let root = build(&mut tables, &[NEAR, BESIDE]);
    assert_eq!(tables.counts(), counts(3, 2));
    assert_eq!(resolve(&board, root, NEAR), found(cut(1)));
    assert_eq!(resolve(&board, root, LeafNumber(5)), Found::Zero);
    assert_eq!(tables.path(root, NEAR).len(), 4);
    tables.release(root);
    assert_eq!(tables.counts(), counts(0, 0));
    assert_eq!(tables.take_released().frames.len(), 2);
}

#[test]
fn sharing_is_possible_at_any_level() {
    for level in 0..4 {
        let (board, mut tables) = tables(8, 8);
        let root = build(&mut tables, &[NEAR, FAR]);
        let entry = tables.path(root, NEAR)[level];
        let before = tables.counts();
        let shared = tables.share(entry);
        assert_eq!((tables.counts(), tables.references(shared)), (before, 2));
        // Its owner goes; what is shared stays.
        tables.release(root);
        assert_eq!(tables.references(shared), 1);
        if level == 0 {
            assert_eq!(resolve(&board, shared, FAR), found(cut(1)));
        }
        tables.release(shared);
        assert_eq!(tables.counts(), counts(0, 0));
    }
}

#[test]
fn a_break_ends_where_it_is_told() {
    for (level, nodes) in [(ShareLevel::Root, 4), (ShareLevel::Directory, 4 + 2), (ShareLevel::Leaf, 4 + 4)] {
        let (board, mut tables) = tables(16, 16);
        let old = build(&mut tables, &[NEAR, FAR]);
        let mut new = tables.share(old);
        tables.break_down_to(&mut new, level, &mut |_| ()).expect("there is room");
        assert_eq!(tables.counts(), counts(nodes, 2), "{level:?}");
        for leaf in [NEAR, BESIDE, FAR] {
            assert_eq!(resolve(&board, new, leaf), resolve(&board, old, leaf), "{level:?} {leaf}");
        }
        tables.release(old);
        tables.release(new);
        assert_eq!(tables.counts(), counts(0, 0), "{level:?}");
    }
}

#[test]
fn a_thunk_breaks_into_itself_and_is_counted() {
    let (_, mut tables) = tables(16, 16);
    let mut cuts = Cuts::default();
    // The root's own reference.
    cuts.retain()(cut(1));
    let mut root = Entry::Thunk(cut(1));
    tables.break_down_to(&mut root, ShareLevel::Leaf, &mut cuts.retain()).expect("there is room");
    // The root, level 3, and the two directories of the memory.
    assert_eq!(tables.counts(), counts(4, 0));
    for leaf in [NEAR, BESIDE, FAR] {
        assert_eq!(tables.path(root, leaf)[3], Entry::Thunk(cut(1)));
    }
    cuts.give_up(&tables.take_released());
    assert_eq!(cuts.of(cut(1)), 511 + 510 + 2 * 512);
    tables.release(root);
    cuts.give_up(&tables.take_released());
    assert_eq!(cuts.of(cut(1)), 0);
}

#[test]
fn a_break_without_room_changes_nothing_that_is_seen() {
    let (board, mut tables) = tables(6, 16);
    let old = build(&mut tables, &[NEAR, FAR]);
    let mut new = tables.share(old);
    // Four nodes are taken, four more would be needed.
    tables.break_down_to(&mut new, ShareLevel::Leaf, &mut |_| ()).expect_err("there is no room");
    for leaf in [NEAR, BESIDE, FAR] {
        assert_eq!(resolve(&board, new, leaf), resolve(&board, old, leaf), "{leaf}");
    }
    tables.release(old);
    tables.release(new);
    assert_eq!(tables.counts(), counts(0, 0));
}

#[test]
fn a_change_copies_the_path_and_nothing_else() {
    let (board, mut tables) = tables(16, 16);
    let old = build(&mut tables, &[NEAR, BESIDE, FAR]);
    assert_eq!(tables.counts(), counts(4, 3));
    let mut new = tables.share(old);
    tables.set_shared(&mut new, NEAR, (Some(cut(2)), None), &mut |_| ()).expect("there is room");
    // Root, level 3 and one directory; the other directory is shared by both.
    assert_eq!(tables.counts(), counts(7, 4));
    assert_eq!(resolve(&board, old, NEAR), found(cut(1)));
    assert_eq!(resolve(&board, new, NEAR), found(cut(2)));
    assert_eq!(resolve(&board, new, BESIDE), found(cut(1)));
    assert_eq!(tables.references(tables.path(new, FAR)[2]), 2);
    assert_eq!(tables.references(tables.path(new, BESIDE)[3]), 2, "the record beside is shared");

    // Each path has one referrer now: edited in place, by either.
    let mut old = old;
    for root in [&mut old, &mut new] {
        let nodes = tables.path(*root, BESIDE)[..3].to_vec();
        tables.set_shared(root, BESIDE, (Some(cut(3)), None), &mut |_| ()).expect("there is room");
        assert_eq!(tables.path(*root, BESIDE)[..3], nodes, "the same nodes");
    }
    assert_eq!(tables.counts().nodes, 7);
    assert_eq!(resolve(&board, old, BESIDE), found(cut(3)));
    tables.release(old);
    tables.release(new);
    assert_eq!(tables.counts(), counts(0, 0));
    assert_eq!(tables.ledger().iter().count(), 0);
}

#[test]
fn a_thunk_stands_for_its_whole_subtree() {
    let (board, mut tables) = tables(16, 16);
    let mut cuts = Cuts::default();
    let mut root = Entry::Thunk(cut(1));
    cuts.retain()(cut(1));
    board.cut(cut(1)).set_protected(BESIDE);
    let exclusive = PageSet::ALL;
    tables.set_private(&mut root, NEAR, exclusive, &mut cuts.retain()).expect("there is room");
    cuts.give_up(&tables.take_released());
    // 511 slots in each of three nodes, and one under the record.
    assert_eq!(cuts.of(cut(1)), 3 * 511 + 1);
    assert_eq!(resolve(&board, root, BESIDE), Found::Pending(cut(1)));
    assert_eq!(resolve(&board, root, NEAR), Found::Zero, "not protected, and the cut's base is empty");

    // Once the cut is settled its table's entries take the place of all of them.
    let table = build(&mut tables, &[NEAR, BESIDE]);
    tables.replace_thunk(&[root, root], cut(1), table, &mut cuts.retain());
    cuts.give_up(&tables.take_released());
    assert_eq!(cuts.of(cut(1)), 0);
    assert_eq!(resolve(&board, root, NEAR), found(cut(1)));
    assert_eq!(resolve(&board, root, BESIDE), found(cut(1)));
    assert_eq!(resolve(&board, root, FAR), Found::Zero);
    let Some(Entry::Leaf(record)) = tables.path(root, NEAR).last().copied() else {
        panic!("a leaf stands there");
    };
    assert!(matches!(tables.leaf_record(record), LeafRecord::Private { exclusive: e, .. } if e == exclusive));
    tables.release(table);
    tables.release(root);
    assert_eq!(tables.counts(), counts(0, 0));
}

#[test]
fn what_is_private_goes_as_it_came() {
    let (board, mut tables) = tables(8, 8);
    let mut root = build(&mut tables, &[NEAR]);
    let before = (tables.counts(), tables.path(root, NEAR));
    for pages in [PageSet::ALL, PageSet::ALL.minus(&PageSet::from_words([1; 16])), PageSet::EMPTY] {
        tables.set_private(&mut root, NEAR, pages, &mut |_| ()).expect("there is room");
        assert_eq!(resolve(&board, root, NEAR), found(cut(1)), "what is shared stays under it");
        assert!(tables.take_released().frames.is_empty());
    }
    assert_eq!((tables.counts(), tables.path(root, NEAR)), before);
}

#[test]
fn what_was_given_up_is_used_again_only_when_reclaimed() {
    let (_, mut tables) = tables(3, 1);
    let root = build(&mut tables, &[NEAR]);
    tables.release(root);
    assert_eq!(tables.counts(), counts(0, 0));
    let mut other = Entry::Empty;
    let refused = tables.set_shared(&mut other, NEAR, (Some(cut(1)), None), &mut |_| ());
    assert_eq!(refused, Err(TablesError::Records(1)), "a walk may still be there");
    tables.reclaim();
    tables.set_shared(&mut other, NEAR, (Some(cut(1)), None), &mut |_| ()).expect("there is room");
    assert_eq!(tables.counts(), counts(3, 1));
}

#[test]
fn a_refused_change_changes_nothing() {
    for nodes in 0..6 {
        let (board, mut tables) = tables(3 + nodes, 8);
        let old = build(&mut tables, &[NEAR]);
        let mut new = tables.share(old);
        let result = tables.set_shared(&mut new, NEAR, (Some(cut(2)), None), &mut |_| ());
        let expected = if nodes < 3 { cut(1) } else { cut(2) };
        assert_eq!(result.is_err(), nodes < 3);
        assert_eq!(resolve(&board, new, NEAR), found(expected));
        assert_eq!(resolve(&board, old, NEAR), found(cut(1)));
        tables.release(old);
        tables.release(new);
        assert_eq!(tables.counts(), counts(0, 0));
        assert_eq!(tables.ledger().iter().count(), 0);
    }
}

#[test]
fn the_ledger_counts_records() {
    let (_, mut tables) = tables(8, 8);
    let mut root = Entry::Empty;
    let (block, patches) = (Some(cut(1)), Some(cut(2)));
    tables.set_shared(&mut root, NEAR, (block, patches), &mut |_| ()).expect("there is room");
    let frames = |cut| BlockId { cut, leaf: NEAR };
    assert_eq!(tables.ledger().references(Frames::Block(frames(cut(1)))), 1);
    assert_eq!(tables.ledger().references(Frames::Patches(frames(cut(2)))), 1);
    tables.set_entry(&mut root, NEAR, Entry::Lost, &mut |_| ()).expect("there is room");
    let released = tables.take_released();
    assert_eq!(released.frames, [Frames::Block(frames(cut(1))), Frames::Patches(frames(cut(2)))]);
    assert_eq!(tables.ledger().iter().count(), 0);
}
