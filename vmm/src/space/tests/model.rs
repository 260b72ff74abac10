//! Random operations on a colony, judged by its model; and the same with planted faults, to show
//! that the judge sees them.
//!
//! A run is the same each time. `SALP_MODEL_SEED=N` chooses other operations, `SALP_MODEL_CASES=N` how
//! many scripts of them. What fails is shrunk to a short script, which is printed with its seed.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use proptest::prelude::{Just, Strategy, prop, prop_oneof};
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};

use super::colony::{Colony, LEAVES};
use super::world::{Call, HostPlant};
use crate::plants::{self, Plant};
use crate::space::{Access, Keep};
use crate::words::{Gfn, LEAF_PAGES, LeafNumber, wide};

/// One thing that happens in a colony. VMs, pages and cuts are picked modulo how many there are.
/// A fork without a number of clones is given up before its cut.
#[derive(Clone, Debug)]
enum Op {
    Load { vm: usize, page: usize },
    Store { vm: usize, page: usize },
    StoreRun { vm: usize, page: usize, pages: u64 },
    FillLeaf { vm: usize, leaf: u32 },
    Pin { vm: usize, page: usize, pages: u64, access: Access },
    Unpin { vm: usize, pick: usize },
    UnpinAny { vm: usize, page: usize },
    DeviceStore { vm: usize, pick: usize },
    Discard { vm: usize, page: usize, pages: u64 },
    DiscardLeaf { vm: usize, leaf: u32 },
    SwapOut { vm: usize, page: usize, pages: u64 },
    Migrate { vm: usize, page: usize, pages: u64 },
    Publish { pick: usize, keep: Keep },
    Harvest { vm: usize },
    Sweep,
    CloneAgain { pick: usize },
    ResolveKnown { vm: usize },
    CheckAll { vm: usize },
    Reset { vm: usize },
    Exit { vm: usize },
    Kill { pick: usize },
    Fail { call: Call, after: u32 },
    Fork { vm: usize, clones: Option<usize>, between: Vec<Op> },
}

/// The pages that operations prefer: few, so that they meet, and some at the edges of leaves.
const POSITIONS: [usize; 10] = [0, 1, 2, 3, 8, 63, 64, 300, 510, 511];

fn gfn(page: usize) -> Gfn {
    let leaf = LeafNumber(u32::try_from(page / POSITIONS.len()).expect("few") % LEAVES);
    leaf.gfn(POSITIONS[page % POSITIONS.len()])
}

/// Up to `pages` pages, all of one leaf.
fn run_of(page: usize, pages: u64) -> impl Iterator<Item = Gfn> {
    let first = gfn(page);
    let end = (first.0 + pages).min(LeafNumber(first.leaf().0 + 1).first_gfn().0);
    (first.0..end).map(Gfn)
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
    let access = || prop::sample::select(vec![Access::Read, Access::ReadWrite]);
    let keep = || prop::sample::select(vec![Keep::Own, Keep::Shared]);
    prop_oneof![
        6 => (vm(), page()).prop_map(|(vm, page)| Op::Load { vm, page }),
        16 => (vm(), page()).prop_map(|(vm, page)| Op::Store { vm, page }),
        5 => (vm(), page(), 2..24u64).prop_map(|(vm, page, pages)| Op::StoreRun { vm, page, pages }),
        2 => (vm(), 0..LEAVES).prop_map(|(vm, leaf)| Op::FillLeaf { vm, leaf }),
        6 => (vm(), page(), 1..4u64, access())
            .prop_map(|(vm, page, pages, access)| Op::Pin { vm, page, pages, access }),
        4 => (vm(), 0..8usize).prop_map(|(vm, pick)| Op::Unpin { vm, pick }),
        1 => (vm(), page()).prop_map(|(vm, page)| Op::UnpinAny { vm, page }),
        6 => (vm(), 0..8usize).prop_map(|(vm, pick)| Op::DeviceStore { vm, pick }),
        2 => (vm(), page(), 1..12u64).prop_map(|(vm, page, pages)| Op::Discard { vm, page, pages }),
        2 => (vm(), 0..LEAVES).prop_map(|(vm, leaf)| Op::DiscardLeaf { vm, leaf }),
        3 => (vm(), page(), 1..8u64).prop_map(|(vm, page, pages)| Op::SwapOut { vm, page, pages }),
        2 => (vm(), page(), 1..8u64).prop_map(|(vm, page, pages)| Op::Migrate { vm, page, pages }),
        1 => vm().prop_map(|vm| Op::ResolveKnown { vm }),
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
    let fork =
        (0..8usize, prop::option::weighted(0.9, 0..3usize), prop::collection::vec(simple(failures), 0..8))
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
            let at = vm(at);
            run_of(page, pages).for_each(|gfn| colony.store(at, gfn));
        }
        Op::FillLeaf { vm: at, leaf } => {
            let at = vm(at);
            (0..LEAF_PAGES).for_each(|position| colony.store(at, LeafNumber(leaf).gfn(position)));
        }
        Op::Pin { vm: at, page, pages, access } => colony.pin(vm(at), gfn(page), pages, access),
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
            let host = colony.vms[vm(at)].space.host();
            run_of(page, pages).for_each(|gfn| host.swap_out(gfn));
        }
        Op::Migrate { vm: at, page, pages } => {
            let host = colony.vms[vm(at)].space.host();
            run_of(page, pages).for_each(|gfn| host.migrate(gfn));
        }
        Op::ResolveKnown { vm: at } => colony.resolve_known(vm(at)),
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
fn run(plant: HostPlant, operations: &[Op]) {
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

/// The number in an environment variable.
fn from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

fn seed() -> u64 {
    from_environment("SALP_MODEL_SEED").unwrap_or(0)
}

fn cases(default: u32) -> u32 {
    let cases = from_environment("SALP_MODEL_CASES").map(u32::try_from);
    cases.map_or(default, |cases| cases.expect("SALP_MODEL_CASES is below 2^32"))
}

fn runner(cases: u32, max_shrink_iters: u32) -> TestRunner {
    let config = Config { cases, failure_persistence: None, max_shrink_iters, ..Config::default() };
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed().to_le_bytes());
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes))
}

/// Scripts of random operations, each judged; the one that fails is shrunk.
fn judge(failures: Failures) {
    let cases = cases(120);
    let result = runner(cases, 4096).run(&operations(failures), |operations| {
        run(HostPlant::None, &operations);
        Ok(())
    });
    match result {
        Ok(()) => println!("{cases} scripts of seed {}", seed()),
        Err(TestError::Fail(reason, script)) => {
            let script: Vec<_> = script.iter().map(|op| format!("  {op:?}\n")).collect();
            panic!("SALP_MODEL_SEED={} SALP_MODEL_CASES={cases}: {reason}\n{}", seed(), script.concat());
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_colony_is_what_deep_copies_are() {
    judge(Failures::None);
}

#[test]
fn a_refusing_host_harms_nobody_else() {
    judge(Failures::Some);
}

/// The operations go where the rules are: none of the counted things stays undone.
#[test]
fn the_operations_reach_all_of_it() {
    let mut done = BTreeMap::new();
    let mut runner = runner(100, 0);
    for _ in 0..100 {
        let operations =
            operations(Failures::None).new_tree(&mut runner).expect("nothing is filtered").current();
        let mut colony = Colony::new(HostPlant::None);
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

/// What is broken.
#[derive(Clone, Copy, Debug)]
enum Planted {
    Host(HostPlant),
    Rule(Plant),
}

const HOST_PLANTS: [HostPlant; 11] = [
    HostPlant::ProtectSkipsAPage,
    HostPlant::StoresPassProtection,
    HostPlant::ForceReadsTheWindow,
    HostPlant::HalfABlock,
    HostPlant::SweepFreesTooMuch,
    HostPlant::DiscardForgets,
    HostPlant::PatchAstray,
    HostPlant::ResetForgets,
    HostPlant::MovesHeldPages,
    HostPlant::CopiesWhatIsOpened,
    HostPlant::MoveForgets,
];

/// Scripts until a fault is found: how many, or none.
fn convict(planted: Planted) -> Option<u32> {
    let (host, rule) = match planted {
        Planted::Host(plant) => (plant, None),
        Planted::Rule(plant) => (HostPlant::None, Some(plant)),
    };
    let _planted = plants::plant(rule);
    let mut runner = runner(0, 0);
    (1..=SCRIPTS).find(|_| {
        let script = operations(Failures::None).new_tree(&mut runner).expect("nothing is filtered").current();
        catch_unwind(AssertUnwindSafe(|| run(host, &script))).is_err()
    })
}

/// Scripts that a planted fault may survive.
const SCRIPTS: u32 = 4000;

/// The judge must be able to convict. Prints what it took.
#[test]
fn planted_faults_are_found() {
    let mut unseen = Vec::new();
    let mut lines = Vec::new();
    let rules = Plant::OF_ONE_THREAD.map(Planted::Rule);
    for planted in HOST_PLANTS.map(Planted::Host).into_iter().chain(rules) {
        let begun = Instant::now();
        match convict(planted) {
            Some(scripts) => {
                lines.push(format!("{planted:?}: script {scripts}, {} ms", begun.elapsed().as_millis()));
            }
            None => unseen.push(planted),
        }
    }
    println!("{}", lines.join("\n"));
    assert!(unseen.is_empty(), "unseen: {unseen:?}");
}
