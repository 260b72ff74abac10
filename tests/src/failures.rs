//! Failure injection over a whole colony: an operation is run once to learn which points of failure
//! its processes reach, then once for each of them with that one failing.
//!
//! - [`Operation`]: what is run, and who judges what became of it.
//! - [`fail_everywhere`]: runs it, and prints each point, how often it was reached, and the outcomes.
//!
//! The points are `salp::failure`'s, those of the keeper in this process: nothing else may run here
//! meanwhile, so the world must be [alone](World::alone).

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use salp::failure::{self, Armed, Reached, Watching};
use salp::family::VmId;
use salp::keeper::ColonyError;
use salp::keeper::member_handle::MemberHandle;
use salp::member::messages::{Order, PuppetOrder, Reply};
use salp::words::{Gpa, LEAF_BYTES, LeafNumber, index};
use salp_protocol::order;

use crate::row::FULL;
use crate::world::{LIMIT, World};

/// Whose point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Whose {
    /// The keeper's.
    Keeper,
    /// The member of the VM that the operation is about.
    Source,
    /// The member of its clone: perhaps still in the pool.
    Clone,
}

/// A failure to inject.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Failure {
    /// Whose process.
    pub whose: Whose,
    /// The point.
    pub point: String,
    /// At which hit.
    pub hit: u64,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {} at hit {}", self.whose, self.point, self.hit)
    }
}

/// Something a colony does, again and again.
pub trait Operation {
    /// The family that it is done to, and what is known of it.
    type Scene;

    /// Whether of a point that is reached more often the last hit fails too, not the first alone.
    const IS_LAST_TOO: bool = false;

    /// Makes the family.
    fn prepare(&self, world: &World) -> Self::Scene;

    /// The members that it concerns.
    fn members(&self, world: &World, scene: &Self::Scene) -> Vec<(Whose, Arc<MemberHandle>)>;

    /// Does it.
    ///
    /// # Errors
    /// The colony said that it cannot.
    fn act(&self, world: &World, scene: &mut Self::Scene) -> Result<(), ColonyError>;

    /// Looks at everything, does it once more without a failure, and takes the family down. Panics where
    /// anything is wrong. `failure` is what was injected.
    fn judge(
        &self,
        world: &World,
        scene: Self::Scene,
        outcome: &Result<(), ColonyError>,
        failure: Option<&Failure>,
    );
}

/// The points that were reached, and whether the failure that was wanted has happened.
struct Seen {
    points: BTreeMap<(Whose, String), u64>,
    has_failed: bool,
}

fn ask(member: &MemberHandle, watching: Watching) -> Result<Reached, ColonyError> {
    match member.ask(Order::Failures(watching), &[])? {
        Reply::Failures(reached) => Ok(reached),
        other => panic!("failures of {}: {other:?}", member.vm()),
    }
}

fn armed(failure: Option<&Failure>, whose: Whose) -> Option<Armed> {
    let failure = failure.filter(|failure| failure.whose == whose)?;
    Some(Armed { point: failure.point.clone(), hit: failure.hit })
}

/// One run.
fn run<O: Operation>(world: &World, operation: &O, failure: Option<&Failure>) -> (Seen, String) {
    let mut scene = operation.prepare(world);
    world.colony.warm().expect("the pool fills");
    let members = operation.members(world, &scene);
    for (whose, member) in &members {
        // The answer to this is the first thing that a member sends while it is watched.
        if let Err(error) = ask(member, Watching::Begin(armed(failure, *whose))) {
            assert!(error.to_string().contains("injected"), "{error}");
        }
    }
    failure::watch(armed(failure, Whose::Keeper));
    let outcome = operation.act(world, &mut scene);
    world.colony.settle();
    let mut seen = Seen { points: BTreeMap::new(), has_failed: false };
    let mut note = |whose: Whose, reached: Reached| {
        seen.has_failed |= reached.has_failed;
        for (point, count) in reached.points {
            *seen.points.entry((whose, point)).or_default() += count;
        }
    };
    note(Whose::Keeper, failure::take());
    for (whose, member) in members {
        match ask(&member, Watching::End) {
            Ok(reached) => note(whose, reached),
            // It was killed for its failure.
            Err(ColonyError::Died(_)) => {
                let has_failed = failure.is_some_and(|failure| failure.whose == whose);
                note(whose, Reached { has_failed, ..Reached::default() });
            }
            Err(error) => panic!("{error}"),
        }
    }
    let failure = failure.filter(|_| seen.has_failed);
    let text = match (&outcome, failure) {
        (Ok(()), _) => "went on".to_owned(),
        (Err(error), Some(_)) => format!("refused: {error}"),
        (Err(error), None) => panic!("nothing was to fail: {error}"),
    };
    operation.judge(world, scene, &outcome, failure);
    (seen, text)
}

/// How often a run is repeated whose failure did not happen: processes are not in step.
const TRIES: usize = 10;

/// Runs `operation` with each failure that it can meet, and returns how many there were. Every hit of a
/// point fails once with `SALP_FAILURES=all`.
pub fn fail_everywhere<O: Operation>(test: &str, world: &World, operation: &O) -> usize {
    // The first time some things are made that stay.
    run(world, operation, None);
    let (seen, _) = run(world, operation, None);
    println!("{test}: {} points", seen.points.len());
    let is_all = std::env::var("SALP_FAILURES").is_ok_and(|value| value == "all");
    let (mut injected, mut missed) = (0, 0);
    for ((whose, point), reached) in &seen.points {
        for hit in (1..=*reached).filter(|hit| is_all || *hit == 1 || O::IS_LAST_TOO && hit == reached) {
            let failure = Failure { whose: *whose, point: point.clone(), hit };
            println!("{test}: {failure}");
            let runs = (0..TRIES).map(|_| run(world, operation, Some(&failure)));
            let text = runs.into_iter().find_map(|(seen, text)| seen.has_failed.then_some(text));
            println!(
                "{test}: {whose:?} {point}, hit {hit} of {reached}: {}",
                text.as_deref().unwrap_or("not met again")
            );
            injected += usize::from(text.is_some());
            missed += usize::from(text.is_none() && hit == 1);
        }
    }
    println!("{test}: {injected} failures injected, {missed} points not met again");
    // A leaf that the publisher has reached first needs no step of the clone's: such a point may be missed.
    assert!(missed * 10 <= seen.points.len(), "{missed} of {} points were not met again", seen.points.len());
    injected
}

// ---- what is compared ----

/// The first leaf that the guest's own code and stacks never touch: from here on memory is compared.
const FIRST: LeafNumber = FULL;

/// The bytes of a VM's memory that are its test's, as the host sees them. Of a clone only when it has
/// touched all of them.
pub fn bytes(world: &World, vm: VmId) -> Vec<u8> {
    let memory = File::open(format!("/proc/{}/mem", world.member(vm).process())).expect("a member's memory");
    let window = world.describe(vm).window;
    let len_bytes = world.colony.config().memory.span_bytes() - FIRST.gpa().0;
    let mut bytes = vec![0; index(len_bytes)];
    memory.read_exact_at(&mut bytes, window + FIRST.gpa().0).expect("a window is mapped");
    bytes
}

/// Has a guest read a word of each page; none: its run has ended, because a page is lost.
///
/// # Errors
/// It could not be told to.
pub fn read_all(world: &World, vm: VmId) -> Result<Option<u64>, ColonyError> {
    let pages = (world.colony.config().memory.span_bytes() - FIRST.gpa().0) / 4096;
    let order = PuppetOrder { order: order::SUM_STRIDE, a: FIRST.gpa().0, b: 0, c: pages, d: 4096 };
    world.colony.ask(vm, Order::Puppet { vcpu: 0, order })?;
    let member = world.member(vm);
    let found = member.wait_for(LIMIT, |state| match (state.puppet_results.pop(), &state.ended) {
        (Some((_, result)), _) => Some(Some(result)),
        (None, Some((_, text))) => {
            println!("{vm} ended: {text}");
            Some(None)
        }
        (None, None) => None,
    });
    Ok(found.unwrap_or_else(|error| panic!("{vm} reads: {error}; {:?}", member.state().troubles)))
}

/// Memory is `expected`, but for `but`.
#[track_caller]
pub fn expect_bytes(world: &World, vm: VmId, expected: &[u8], but: &[(Gpa, usize)]) {
    let mut found = bytes(world, vm);
    assert_eq!(found.len(), expected.len());
    for (gpa, len_bytes) in but {
        let at = index(gpa.0 - FIRST.gpa().0);
        found[at..at + len_bytes].copy_from_slice(&expected[at..at + len_bytes]);
    }
    if let Some(at) = found.iter().zip(expected).position(|(one, other)| one != other) {
        let leaf = at / LEAF_BYTES + FIRST.index();
        panic!(
            "{vm}: byte {at:#x} of what is compared, in leaf {leaf}, is {:#x}, not {:#x}",
            found[at], expected[at]
        );
    }
}

/// The checker, and that nothing but what was injected has troubled anybody.
#[track_caller]
pub fn check(world: &World) {
    world.colony.settle();
    world.colony.check().unwrap_or_else(|error| panic!("{error}"));
    for vm in world.colony.vms() {
        let member = world.member(vm);
        let troubles = std::mem::take(&mut member.state().troubles);
        let is_wanted = |trouble: &String| trouble.contains("injected") || trouble.contains("is lost");
        assert!(troubles.iter().all(is_wanted), "{vm}: {troubles:?}");
    }
}
