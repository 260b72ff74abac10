//! Random operations on a colony, judged by its model; and the same with planted faults, to show
//! that the judge sees them.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::colony::{Colony, LEAVES};
use super::world::{Call, Plant};
use crate::space::Keep;
use crate::words::{Gfn, LEAF_PAGES, LeafNumber, wide};

/// One thing that happens in a colony. VMs, pages and cuts are picked modulo how many there are.
#[derive(Clone, Debug)]
enum Op {
    Load { vm: usize, page: usize },
    Store { vm: usize, page: usize },
    StoreRun { vm: usize, page: usize, pages: u64 },
    Pin { vm: usize, page: usize, pages: u64 },
    Unpin { vm: usize, pick: usize },
    UnpinAny { vm: usize, page: usize },
    DeviceStore { vm: usize, pick: usize },
    Discard { vm: usize, page: usize, pages: u64 },
    DiscardLeaf { vm: usize, leaf: u32 },
    SwapOut { vm: usize, page: usize, pages: u64 },
    Publish { pick: usize, keep: Keep },
    Harvest { vm: usize },
    Sweep,
    CloneAgain { pick: usize },
    CheckAll { vm: usize },
    Reset { vm: usize },
    Exit { vm: usize },
    Kill { pick: usize },
    Fail { call: Call, after: u32 },
    Fork { vm: usize, clones: usize, between: Vec<Op> },
}

/// The pages that operations prefer: few, so that they meet, and some at the edges of leaves.
const POSITIONS: [usize; 10] = [0, 1, 2, 3, 8, 63, 64, 300, 510, 511];

fn gfn(page: usize) -> Gfn {
    let leaf = LeafNumber(u32::try_from(page / POSITIONS.len()).expect("few") % LEAVES);
    leaf.gfn(POSITIONS[page % POSITIONS.len()])
}

fn calls() -> impl Strategy<Value = Call> {
    prop::sample::select(vec![
        Call::MapAnonymous,
        Call::MapBlock,
        Call::Register,
        Call::Unregister,
        Call::Protect,
        Call::Unprotect,
        Call::Scan,
        Call::Populate,
        Call::Zero,
        Call::PublishBlock,
        Call::PublishPatches,
        Call::Restore,
    ])
}

/// Whether calls of the host are made to fail.
#[derive(Clone, Copy)]
enum Failures {
    None,
    Some,
}

/// An operation that is no fork.
fn simple(failures: Failures) -> impl Strategy<Value = Op> {
    let vm = || 0..8usize;
    let page = || 0..POSITIONS.len() * LEAVES as usize;
    let keep = || prop::sample::select(vec![Keep::Own, Keep::Shared]);
    prop_oneof![
        6 => (vm(), page()).prop_map(|(vm, page)| Op::Load { vm, page }),
        16 => (vm(), page()).prop_map(|(vm, page)| Op::Store { vm, page }),
        5 => (vm(), page(), 2..24u64).prop_map(|(vm, page, pages)| Op::StoreRun { vm, page, pages }),
        6 => (vm(), page(), 1..4u64).prop_map(|(vm, page, pages)| Op::Pin { vm, page, pages }),
        4 => (vm(), 0..8usize).prop_map(|(vm, pick)| Op::Unpin { vm, pick }),
        1 => (vm(), page()).prop_map(|(vm, page)| Op::UnpinAny { vm, page }),
        6 => (vm(), 0..8usize).prop_map(|(vm, pick)| Op::DeviceStore { vm, pick }),
        2 => (vm(), page(), 1..12u64).prop_map(|(vm, page, pages)| Op::Discard { vm, page, pages }),
        2 => (vm(), 0..LEAVES).prop_map(|(vm, leaf)| Op::DiscardLeaf { vm, leaf }),
        3 => (vm(), page(), 1..8u64).prop_map(|(vm, page, pages)| Op::SwapOut { vm, page, pages }),
        8 => (0..16usize, keep()).prop_map(|(pick, keep)| Op::Publish { pick, keep }),
        3 => vm().prop_map(|vm| Op::Harvest { vm }),
        5 => Just(Op::Sweep),
        2 => (0..16usize).prop_map(|pick| Op::CloneAgain { pick }),
        1 => vm().prop_map(|vm| Op::CheckAll { vm }),
        5 => vm().prop_map(|vm| Op::Reset { vm }),
        2 => vm().prop_map(|vm| Op::Exit { vm }),
        1 => (0..16usize).prop_map(|pick| Op::Kill { pick }),
        4 => (calls(), 0..4u32).prop_map(move |(call, after)| match failures {
            Failures::None => Op::Sweep,
            Failures::Some => Op::Fail { call, after },
        }),
    ]
}

fn operations(failures: Failures) -> impl Strategy<Value = Vec<Op>> {
    let fork = (0..8usize, 0..3usize, prop::collection::vec(simple(failures), 0..8))
        .prop_map(|(vm, clones, between)| Op::Fork { vm, clones, between });
    prop::collection::vec(prop_oneof![5 => simple(failures), 1 => fork], 1..70)
}

fn apply(colony: &mut Colony, op: &Op) {
    if colony.vms.is_empty() {
        return;
    }
    let vm = |vm: usize| vm % colony.vms.len();
    let pinned = |vm: usize, pick: usize| {
        let pins = &colony.vms[vm].pins;
        pins.keys().nth(pick % pins.len().max(1)).copied()
    };
    match *op {
        Op::Load { vm: at, page } => colony.load(vm(at), gfn(page)),
        Op::Store { vm: at, page } => colony.store(vm(at), gfn(page)),
        Op::StoreRun { vm: at, page, pages } => {
            let (at, first) = (vm(at), gfn(page));
            let end = (first.0 + pages).min(u64::from(LEAVES) * wide(LEAF_PAGES));
            (first.0..end).for_each(|number| colony.store(at, Gfn(number)));
        }
        Op::Pin { vm: at, page, pages } => colony.pin(vm(at), gfn(page), pages),
        Op::Unpin { vm: at, pick } => {
            if let Some(gfn) = pinned(vm(at), pick) {
                colony.unpin(vm(at), gfn);
            }
        }
        Op::UnpinAny { vm: at, page } => colony.unpin(vm(at), gfn(page)),
        Op::DeviceStore { vm: at, pick } => {
            if let Some(gfn) = pinned(vm(at), pick) {
                colony.device_store(vm(at), gfn);
            }
        }
        Op::Discard { vm: at, page, pages } => {
            let first = gfn(page);
            let pages = pages.min(wide(LEAF_PAGES - first.in_leaf()));
            colony.discard(vm(at), first, pages);
        }
        Op::DiscardLeaf { vm: at, leaf } => {
            colony.discard(vm(at), LeafNumber(leaf).first_gfn(), wide(LEAF_PAGES));
        }
        Op::SwapOut { vm: at, page, pages } => {
            let first = gfn(page);
            for position in (first.in_leaf()..LEAF_PAGES).take(crate::words::index(pages)) {
                colony.vms[vm(at)].space.host().swap_out(first.leaf().gfn(position));
            }
        }
        Op::Publish { pick, keep } => colony.publish(pick, keep),
        Op::Harvest { vm: at } => colony.harvest(vm(at)),
        Op::Sweep => colony.sweep(),
        Op::CloneAgain { pick } => {
            let cuts = colony.known_cuts();
            if let Some(cut) = cuts.get(pick % cuts.len().max(1)) {
                colony.clone_of(*cut);
            }
        }
        Op::CheckAll { vm: at } => colony.check_all(vm(at)),
        Op::Reset { vm: at } => colony.reset(vm(at)),
        Op::Exit { vm: at } => colony.exit(vm(at)),
        Op::Kill { pick } => colony.kill(pick),
        Op::Fail { call, after } => colony.world.arm(call, after),
        Op::Fork { vm: at, clones, ref between } => {
            colony.fork(vm(at), clones, |colony| between.iter().for_each(|op| apply(colony, op)));
        }
    }
}

/// Runs all operations, then compares all pages of all VMs, then ends them all.
fn run(plant: Plant, operations: &[Op]) {
    let mut colony = Colony::new(plant);
    for op in operations {
        apply(&mut colony, op);
        colony.check_shown();
    }
    colony.world.disarm();
    for at in 0..colony.vms.len() {
        colony.check_all(at);
    }
    colony.sweep();
    for at in 0..colony.vms.len() {
        colony.harvest(at);
    }
    colony.sweep();
    for at in 0..colony.vms.len() {
        colony.check_all(at);
    }
    colony.tear_down();
}

fn runner(cases: u32) -> TestRunner {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    // PROPTEST_CASES asks for more, each with other operations; without it every run is the same.
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => TestRunner::new(Config { failure_persistence: None, ..Config::default() }),
        None => TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha)),
    }
}

#[test]
fn a_colony_is_what_deep_copies_are() {
    let result = runner(400).run(&operations(Failures::None), |operations| {
        run(Plant::None, &operations);
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn a_refusing_host_harms_nobody_else() {
    let result = runner(400).run(&operations(Failures::Some), |operations| {
        run(Plant::None, &operations);
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
}

/// The operations go where the rules are: none of the counted things stays undone.
#[test]
fn the_operations_reach_all_of_it() {
    let mut done = BTreeMap::new();
    let mut runner = runner(250);
    for _ in 0..250 {
        let operations =
            operations(Failures::None).new_tree(&mut runner).expect("nothing is filtered").current();
        let mut colony = Colony::new(Plant::None);
        for op in &operations {
            apply(&mut colony, op);
        }
        colony.count_done(&mut done);
    }
    for what in [
        "resolved",
        "stores",
        "blocks",
        "patches",
        "reused",
        "dropped",
        "pinned copies",
        "restored",
        "returned",
    ] {
        assert!(done.get(what).is_some_and(|count| *count > 5), "{what}: {done:?}");
    }
}

/// The judge must be able to convict.
#[test]
fn planted_faults_are_found() {
    for plant in [
        Plant::ProtectSkipsAPage,
        Plant::StoresPassProtection,
        Plant::ForceReadsTheWindow,
        Plant::HalfABlock,
        Plant::SweepFreesTooMuch,
        Plant::DiscardForgets,
        Plant::PatchAstray,
        Plant::ResetForgets,
    ] {
        let config =
            Config { cases: 200, failure_persistence: None, max_shrink_iters: 0, ..Config::default() };
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let result = TestRunner::new_with_rng(config, rng).run(&operations(Failures::None), |operations| {
            catch_unwind(AssertUnwindSafe(|| run(plant, &operations)))
                .map_err(|_| TestCaseError::fail("convicted"))
        });
        assert!(result.is_err(), "{plant:?} went unseen");
    }
}
