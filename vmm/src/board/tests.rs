//! The board alone: places, words, requests.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::*;
use crate::frames::CutId;
use crate::words::{LeafNumber, PageSet};

fn shape() -> BoardShape {
    BoardShape { leaves: 70, cuts: 3, members: 2, nodes: 5, records: 100 }
}

fn board() -> (Board, Arc<HeapWords>) {
    let words = Arc::new(HeapWords::for_shape(&shape()));
    (Board::new(shape(), words.clone()), words)
}

fn cut(number: u32) -> CutId {
    CutId::new(number).expect("not zero")
}

fn pages(positions: &[usize]) -> PageSet {
    let mut pages = PageSet::EMPTY;
    positions.iter().for_each(|position| pages.insert(*position));
    pages
}

/// Each area is written full of its own number; none may lose a word to another.
#[test]
fn areas_do_not_overlap() {
    let (board, words) = board();
    let shape = shape();
    let mut areas: Vec<&[AtomicU32]> = Vec::new();
    areas.extend((0..shape.nodes).map(|node| board.node(node)));
    areas.extend((0..shape.records).map(|record| board.record(record)));
    for slot in 0..shape.members {
        areas.push(&words.words()[board.member_range(slot)]);
    }
    for number in 1..=shape.cuts {
        areas.push(&words.words()[board.cut_range(cut(number))]);
    }
    for (number, area) in (1u32..).zip(&areas) {
        for word in *area {
            assert_eq!(word.swap(number, Ordering::Relaxed), 0, "area {number} lies over another");
        }
    }
    let used: usize = areas.iter().map(|area| area.len()).sum();
    let total = words.words().iter().filter(|word| word.load(Ordering::Relaxed) != 0).count();
    assert_eq!(used, total);
}

/// The parts of one area: what one setter writes no other getter sees.
#[test]
fn the_parts_of_a_cut_do_not_overlap() {
    let (board, _) = board();
    let area = board.cut(cut(1));
    let leaves = || (0..shape().leaves).map(LeafNumber);
    area.set_origin(11, 1);
    leaves().for_each(|leaf| area.set_protected(leaf));
    leaves().for_each(|leaf| area.request(leaf));
    let all: Vec<LeafNumber> = leaves().collect();
    assert_eq!(area.pending().collect::<Vec<_>>(), all, "requests and bits are no leaf words");
    let patches = |leaf: LeafNumber| Patches {
        block: Some(cut(leaf.0 + 1)),
        first_frame: leaf.0 * 7,
        pages: pages(&[0, leaf.index(), 511]),
    };
    leaves().for_each(|leaf| area.set_patches(leaf, &patches(leaf)));
    assert_eq!(area.pending().count(), all.len(), "patch records are no leaf words");
    leaves().for_each(|leaf| area.publish(leaf, LeafWord::Patched));
    leaves().for_each(|leaf| assert_eq!(area.patches(leaf), patches(leaf)));
    assert_eq!(area.take_requests(), all);
    area.set_table(22);
    area.set_unneeded();
    assert_eq!((area.base(), area.table(), area.source(), area.is_unneeded()), (11, Some(22), 1, true));
    assert_eq!(area.protected().collect::<Vec<_>>(), all);
    assert_eq!(board.cut(cut(2)).protected().count(), 0);
}

#[test]
fn a_fresh_cut_promises_nothing() {
    let (board, _) = board();
    let area = board.cut(cut(3));
    area.set_unneeded();
    area.set_protected(LeafNumber(69));
    area.publish(LeafNumber(69), LeafWord::Block);
    area.set_table(5);
    // The same place, for a later cut.
    board.open_cut(cut(6)).expect("the heap has room");
    let area = board.cut(cut(6));
    assert_eq!((area.base(), area.table(), area.is_unneeded()), (0, None, false));
    assert_eq!(area.leaf(LeafNumber(69)), LeafWord::Base);
    area.set_protected(LeafNumber(69));
    assert_eq!(area.leaf(LeafNumber(69)), LeafWord::Pending);
}

#[test]
fn leaf_words_round_trip() {
    for word in [
        LeafWord::Pending,
        LeafWord::Block,
        LeafWord::Base,
        LeafWord::Zero,
        LeafWord::Patched,
        LeafWord::Lost,
    ] {
        assert_eq!(LeafWord::decode(word.encode()), word);
    }
    assert_eq!(LeafWord::Pending.encode(), 0, "a fresh word is pending");
    assert_eq!(LeafWord::decode(77), LeafWord::Lost);
}

#[test]
fn requests_are_taken_once() {
    let (board, _) = board();
    let area = board.cut(cut(1));
    for leaf in [0, 31, 32, 69, 31] {
        area.request(LeafNumber(leaf));
    }
    assert_eq!(area.take_requests(), [0, 31, 32, 69].map(LeafNumber));
    assert!(area.take_requests().is_empty());
    area.request(LeafNumber(31));
    assert_eq!(area.take_requests(), [LeafNumber(31)]);
}

/// Two that ask and one that takes: each request is in a take, or the one who asked would wait.
#[test]
fn a_request_in_a_race_is_not_lost() {
    const ROUNDS: u32 = 2_000;
    let (board, _) = board();
    let answered = [AtomicU32::new(0), AtomicU32::new(0)];
    std::thread::scope(|scope| {
        for (leaf, answers) in [LeafNumber(0), LeafNumber(1)].into_iter().zip(&answered) {
            let board = &board;
            scope.spawn(move || {
                for round in 1..=ROUNDS {
                    board.cut(cut(1)).request(leaf);
                    while answers.load(Ordering::Acquire) < round {
                        std::thread::yield_now();
                    }
                }
            });
        }
        while answered.iter().any(|answers| answers.load(Ordering::Relaxed) < ROUNDS) {
            for leaf in board.cut(cut(1)).take_requests() {
                answered[leaf.index()].fetch_add(1, Ordering::Release);
            }
            std::thread::yield_now();
        }
    });
}

#[test]
fn a_member_area_keeps_its_words_apart() {
    let (board, _) = board();
    board.open_member(1).expect("the heap has room");
    let area = board.member(1);
    area.set_base(9);
    area.ring();
    area.set_map(LeafNumber(0), LeafMap::Block(cut(4)));
    area.set_map(LeafNumber(69), LeafMap::Block(cut(5)));
    assert_eq!(
        (area.map(LeafNumber(0)), area.map(LeafNumber(69))),
        (LeafMap::Block(cut(4)), LeafMap::Block(cut(5)))
    );
    assert_eq!(area.map(LeafNumber(1)), LeafMap::Unknown);
    area.set_map(LeafNumber(1), LeafMap::Own);
    assert_eq!(area.map(LeafNumber(1)), LeafMap::Own);
    assert_eq!(area.doorbell().load(Ordering::Relaxed), 1);
    let inside = area.walk(|base| (base, area.walkers()));
    assert_eq!((inside, area.walkers()), ((9, 1), 0));
    board.open_member(1).expect("the heap has room");
    assert_eq!((area.map(LeafNumber(0)), area.doorbell().load(Ordering::Relaxed)), (LeafMap::Unknown, 0));
}

#[test]
#[should_panic(expected = "made for another shape")]
fn memory_too_small_is_refused() {
    let words = Arc::new(HeapWords::for_shape(&BoardShape { nodes: 1, ..shape() }));
    drop(Board::new(shape(), words));
}

/// Whoever counts is to tell once, until the keeper has looked; what is counted is beside all else.
#[test]
fn buffers_are_counted_and_told_once_between_two_looks() {
    let (board, _) = board();
    let area = board.member(1);
    assert!(area.count_buffer(true, 24), "the first is told");
    assert!(!area.count_buffer(true, 2) && !area.count_buffer(false, 24), "nobody has looked since");
    let first = area.take_buffers();
    assert_eq!((first.held(), first.since(&BufferCounts::default())), ((1, 2), (2, 1)));
    assert!(area.count_buffer(false, 2), "somebody has looked");
    let second = area.take_buffers();
    assert_eq!((second.held(), second.since(&first)), ((0, 0), (0, 1)));
    // After the greatest count they begin again.
    let greatest = BufferCounts { registered: u32::MAX, unregistered: u32::MAX, ..first };
    let after = BufferCounts { registered: 1, unregistered: 0, ..first };
    assert_eq!((after.held().0, after.since(&greatest)), (1, (2, 1)));
    (0..shape().leaves).for_each(|leaf| assert_eq!(area.map(LeafNumber(leaf)), LeafMap::Unknown));
    assert_eq!((area.doorbell().load(Ordering::Relaxed), area.walkers()), (0, 0));
    assert_eq!(area.walk(|base| base), 0);
    assert_eq!(board.member(0).take_buffers(), BufferCounts::default());
}
