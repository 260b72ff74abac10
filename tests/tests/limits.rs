//! Limits of a colony: what they refuse, before anything has changed, and what they say.

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use salp::arena_files::ArenaKind;
use salp::family::VmId;
use salp::keeper::limits::{LimitError, Limits};
use salp::keeper::member_handle::MemberState;
use salp::keeper::spec::{CloneSpec, ForkSpec};
use salp::keeper::{Colony, ColonyConfig, ColonyError};
use salp::member::messages::{GuestKind, Order, Publication, PuppetOrder};
use salp::space::Keep;
use salp::words::MemoryShape;
use salp_protocol::{layout, order};
use salp_tests::procs::salp_binary;
use salp_tests::world::{LIMIT, can_run};

const MEMORY_BYTES: u64 = 16 << 20;

/// A colony with a first VM, or none where the host cannot run one.
fn colony(test: &str, vcpus: u8, limits: Limits) -> Option<(Colony, VmId)> {
    if !can_run(test, GuestKind::Thread) {
        return None;
    }
    let colony = without_vms(vcpus, limits);
    let root = colony.boot("").expect("the first VM is within every limit here");
    colony.settle();
    Some((colony, root))
}

fn without_vms(vcpus: u8, limits: Limits) -> Colony {
    let mut config = ColonyConfig::new(MemoryShape::new(MEMORY_BYTES).expect("whole leaves"));
    config.guest = GuestKind::Thread;
    config.vcpus = vcpus;
    config.limits = limits;
    config.publication = Publication { in_background: true, keep: Keep::Shared, keep_later: Keep::Shared };
    config.program = Some(salp_binary());
    Colony::new(config).expect("a colony")
}

fn clones(count: usize) -> ForkSpec {
    ForkSpec::each(vec![CloneSpec::default(); count])
}

#[test]
fn a_colony_has_no_more_vms_than_it_may() {
    let limits = Limits { vms: Some(3), ..Limits::default() };
    let Some((colony, root)) = colony("a_colony_has_no_more_vms_than_it_may", 1, limits) else { return };
    let error = colony.fork(root, 3).expect_err("two are left");
    assert!(error.to_string().starts_with("the colony has 1 vms, and may have 3: "), "{error}");
    assert_eq!(colony.structure_counts().0, 0, "no cut was taken");
    let forked = colony.fork_as(root, &clones(4)).expect("two of them");
    let found: Vec<_> = forked.missing.iter().map(|missing| (missing.position, &missing.error)).collect();
    let expected = LimitError::Vms { used: 1, limit: 3 };
    let is_expected = |error: &ColonyError| matches!(error, ColonyError::Limit(found) if *found == expected);
    assert!(matches!(found[..], [(2, a), (3, b)] if is_expected(a) && is_expected(b)), "{found:?}");
    assert_eq!(colony.vms().len(), 3);
    assert!(matches!(colony.boot(""), Err(ColonyError::Limit(LimitError::Vms { used: 3, limit: 3 }))));
    let error = colony.fork_as(root, &clones(1)).expect_err("none is left");
    assert!(matches!(error, ColonyError::Limit(LimitError::Vms { used: 3, limit: 3 })), "{error}");
    colony.end(forked.clones[0].vm).expect("it is there");
    colony.fork(root, 1).expect("there is room again");
    colony.check().expect("all adds up");
}

#[test]
fn vcpus_are_counted() {
    let limits = Limits { cpus: Some(5), ..Limits::default() };
    let Some((colony, root)) = colony("vcpus_are_counted", 2, limits) else { return };
    let forked = colony.fork_as(root, &clones(2)).expect("one of them");
    assert_eq!(forked.clones.len(), 1);
    let expected = LimitError::Cpus { used: 2, limit: 5, each: 2 };
    let error = &forked.missing[0].error;
    assert!(matches!(error, ColonyError::Limit(found) if *found == expected), "{error}");
    assert!(error.to_string().contains("--max-cpus"), "{error}");
}

/// However many VMs are forked at the same time.
#[test]
fn forks_at_the_same_time_do_not_exceed_a_limit_together() {
    let test = "forks_at_the_same_time_do_not_exceed_a_limit_together";
    let limits = Limits { vms: Some(12), ..Limits::default() };
    let Some((colony, root)) = colony(test, 1, limits) else { return };
    let others = colony.fork(root, 3).expect("there is room").clones;
    let sources: Vec<_> = others.iter().map(|clone| clone.vm).chain([root]).collect();
    let (made, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let begin = Barrier::new(sources.len());
    let fork = |vm| {
        begin.wait();
        match colony.fork_as(vm, &clones(4)) {
            Ok(forked) => {
                made.fetch_add(forked.clones.len(), Ordering::Relaxed);
                refused.fetch_add(forked.missing.len(), Ordering::Relaxed);
            }
            Err(ColonyError::Limit(_)) => {
                refused.fetch_add(4, Ordering::Relaxed);
            }
            Err(error) => panic!("{error}"),
        }
    };
    std::thread::scope(|scope| {
        for vm in sources {
            let fork = &fork;
            scope.spawn(move || fork(vm));
        }
    });
    assert_eq!((made.into_inner(), refused.into_inner(), colony.vms().len()), (8, 8, 12));
    colony.check().expect("all adds up");
}

#[test]
fn a_vm_must_fit_into_what_may_be_shared() {
    if !can_run("a_vm_must_fit_into_what_may_be_shared", GuestKind::Thread) {
        return;
    }
    let limits = Limits { memory_bytes: Some(MEMORY_BYTES - 1), ..Limits::default() };
    let error = without_vms(1, limits).boot("").expect_err("it does not fit");
    assert!(matches!(error, ColonyError::Limit(LimitError::Vm { vm_bytes: MEMORY_BYTES, .. })), "{error}");
    assert!(error.to_string().contains("--memory-limit"), "{error}");
}

/// A full arena refuses forks; when VMs have ended it does no more.
#[test]
fn a_fork_needs_room_in_the_arena() {
    let limits = Limits { memory_bytes: Some(MEMORY_BYTES), ..Limits::default() };
    let Some((colony, root)) = colony("a_fork_needs_room_in_the_arena", 1, limits) else { return };
    if colony.arena_kind() != ArenaKind::HugeTmpfs {
        println!("SKIPPED: a_fork_needs_room_in_the_arena: the arena has no huge pages here");
        return;
    }
    let member = colony.member(root).expect("it is there");
    let fill_and_fork = |len_bytes| {
        let order = PuppetOrder { order: order::FILL, a: layout::FREE, b: 1, c: len_bytes, d: 0 };
        colony.ask(root, Order::Puppet { vcpu: 0, order }).expect("it takes orders");
        member.wait_for(LIMIT, |state| state.puppet_results.pop()).expect("it fills its memory");
        let forked = colony.fork(root, 1)?;
        let is_published = |state: &mut MemberState| state.finished_cuts.contains(&forked.cut).then_some(());
        member.wait_for(LIMIT, is_published).expect("it publishes");
        Ok::<_, ColonyError>(forked)
    };
    // Six blocks, then one more each time: eight are all that there is room for.
    let mut forked = vec![fill_and_fork(MEMORY_BYTES - layout::FREE).expect("the arena is empty")];
    let error = loop {
        match fill_and_fork(2 << 20) {
            Ok(one) => forked.push(one),
            Err(error) => break error,
        }
        assert!(forked.len() < 4, "{} bytes are in the arena", colony.arena_used_bytes().expect("a number"));
    };
    assert!(matches!(error, ColonyError::Limit(LimitError::Arena { .. })), "{error}");
    assert_eq!((forked.len(), colony.vms().len()), (3, 4), "a fork that is refused makes nothing");
    for one in &forked {
        colony.end(one.clones[0].vm).expect("it is there");
    }
    colony.settle();
    colony.fork(root, 1).expect("there is room again");
}

#[test]
fn a_keeper_opens_and_locks_what_its_user_may() {
    if !can_run("a_keeper_opens_and_locks_what_its_user_may", GuestKind::Thread) {
        return;
    }
    let resources = [(Resource::Nofile, 1000), (Resource::Memlock, 1 << 20)];
    for (resource, less) in resources {
        let limit = getrlimit(resource);
        setrlimit(resource, Rlimit { current: Some(less), ..limit }).expect("less than there may be");
    }
    drop(without_vms(1, Limits::default()));
    for (resource, _) in resources {
        let limit = getrlimit(resource);
        assert_eq!(limit.current, limit.maximum, "{resource:?}");
    }
}

/// A colony's pool begins to fill by itself: who waits for it waits for members of others too.
#[test]
fn a_warm_pool_is_full() {
    if !can_run("a_warm_pool_is_full", GuestKind::Thread) {
        return;
    }
    for _ in 0..20 {
        let colony = without_vms(1, Limits::default());
        colony.warm().expect("members can be had");
        assert_eq!(colony.pooled().len(), colony.config().pool);
    }
}
