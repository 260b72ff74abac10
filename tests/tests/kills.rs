//! Sources and clones are killed in random order while publication runs: whoever lives has the right
//! bytes or is told what is lost, and nothing is left behind.
//!
//! Every VM has a model of its memory: one stamp a tracked page. Orders are waited for, so at a fork
//! the clone's model is its source's. A VM one of whose ancestors was killed may find a page lost:
//! then its run ends and its member says which. One whose ancestors only ended never may.

use std::collections::BTreeMap;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use salp::family::VmId;
use salp::keeper::member_handle::MemberHandle;
use salp::keeper::{Colony, ColonyConfig, ColonyError};
use salp::kvm::Kvm;
use salp::member::messages::{GuestKind, Order, PuppetOrder};
use salp::words::MemoryShape;
use salp_protocol::{layout, order};
use salp_tests::procs::{Random, Usage, children, salp_binary, settled};
use salp_tests::user::User;

const MEMORY_BYTES: u64 = 16 << 20;
/// Pages that carry a stamp: 16 in each leaf from the first free one on.
const TRACKED: u64 = 96;
const STRIDE: u64 = (MEMORY_BYTES - layout::FREE) / TRACKED;
/// How long anything may take: far more than it does.
const LIMIT: Duration = Duration::from_secs(60);
/// VMs alive at one time.
const FAMILY_LIMIT: usize = 8;
/// Rounds between looks at the base line.
const ROUNDS_BETWEEN_LOOKS: usize = 20;

struct Tracked {
    member: Arc<MemberHandle>,
    stamps: Vec<u64>,
    /// A VM whose pages it may depend on was killed.
    may_lose: bool,
}

/// What became of an order.
enum Outcome {
    Result(u64),
    /// The guest's run has ended with something lost.
    Lost,
    /// The process is gone.
    Gone,
}

struct Test {
    colony: Colony,
    random: Random,
    vms: BTreeMap<VmId, Tracked>,
    /// Who was cloned from whom, ended VMs included: pages reach a grandchild past an ended parent.
    parents: BTreeMap<VmId, VmId>,
    kills: usize,
    losses: usize,
    checks: usize,
    failed_forks: usize,
}

fn config(guest: GuestKind) -> ColonyConfig {
    let mut config = ColonyConfig::new(MemoryShape::new(MEMORY_BYTES).expect("whole leaves"));
    config.guest = guest;
    config.program = Some(salp_binary());
    config.backing_bytes = 1 << 20;
    config
}

fn can_trap() -> bool {
    Path::new("/dev/userfaultfd").exists() && rustix::process::geteuid().is_root()
}

impl Test {
    fn new(guest: GuestKind, name: &str) -> Self {
        let colony = Colony::new(config(guest)).expect("a colony");
        let random = Random::from_environment(name);
        let (vms, parents) = (BTreeMap::new(), BTreeMap::new());
        Self { colony, random, vms, parents, kills: 0, losses: 0, checks: 0, failed_forks: 0 }
    }

    fn boot(&mut self) {
        let vm = self.colony.boot("case=puppet").expect("a first vm");
        let member = self.colony.member(vm).expect("it was just booted");
        let stamps = vec![0; usize::try_from(TRACKED).expect("few")];
        self.vms.insert(vm, Tracked { member, stamps, may_lose: false });
        self.store(vm, 0, TRACKED);
    }

    /// One of the VMs.
    fn any(&mut self) -> Option<VmId> {
        let count = self.vms.len();
        (count > 0).then(|| {
            let at = self.random.below(count);
            self.vms.keys().copied().nth(at).expect("below the count")
        })
    }

    fn order(&self, vm: VmId, order: PuppetOrder) -> Outcome {
        let member = &self.vms[&vm].member;
        match member.ask(Order::Puppet { vcpu: 0, order }, &[]) {
            Ok(_) => {}
            Err(ColonyError::Died(_)) => return Outcome::Gone,
            Err(error) => panic!("{vm}: {error}"),
        }
        Self::outcome(vm, member)
    }

    /// Waits for an order's result.
    fn outcome(vm: VmId, member: &MemberHandle) -> Outcome {
        let found = member.wait_for(LIMIT, |state| {
            let result = (!state.puppet_results.is_empty()).then(|| state.puppet_results.remove(0).1);
            result.map(Ok).or_else(|| state.ended.clone().map(Err))
        });
        match found {
            Ok(Ok(result)) => Outcome::Result(result),
            Ok(Err((status, text))) => {
                assert!(status.is_none(), "{vm} ended with {status:?}, {text}");
                // Who resolves faults says so by itself, before or after.
                let named = member.wait_for(LIMIT, |state| {
                    state.troubles.iter().any(|trouble| trouble.contains("is lost")).then_some(())
                });
                match named {
                    Ok(()) => Outcome::Lost,
                    Err(ColonyError::Died(_)) => Outcome::Gone,
                    Err(error) => panic!("{vm} ended, and not by a loss: {text}: {error}"),
                }
            }
            Err(ColonyError::Died(_)) => Outcome::Gone,
            Err(error) => panic!("{vm}: {error}"),
        }
    }

    /// Books an outcome. None: the VM's run is over.
    fn book(&mut self, vm: VmId, outcome: Outcome) -> Option<u64> {
        match outcome {
            Outcome::Result(result) => Some(result),
            Outcome::Lost => {
                assert!(self.vms[&vm].may_lose, "{vm} lost pages, and no ancestor of it was killed");
                self.losses += 1;
                self.end(vm);
                None
            }
            Outcome::Gone => panic!("the process of {vm} is gone, and nobody killed it"),
        }
    }

    /// Stamps `count` tracked pages from `first`.
    fn store(&mut self, vm: VmId, first: u64, count: u64) {
        let value = self.random.draw();
        let a = layout::FREE + first * STRIDE;
        let outcome =
            self.order(vm, PuppetOrder { order: order::STORE_STRIDE, a, b: value, c: count, d: STRIDE });
        if self.book(vm, outcome).is_some()
            && let Some(tracked) = self.vms.get_mut(&vm)
        {
            let first = usize::try_from(first).expect("few");
            let count = usize::try_from(count).expect("few");
            tracked.stamps[first..first + count].fill(value);
        }
    }

    /// All stamps are the model's, or the VM is told what is lost.
    fn check(&mut self, vm: VmId) {
        let a = layout::FREE;
        let sum = PuppetOrder { order: order::SUM_STRIDE, a, b: 0, c: TRACKED, d: STRIDE };
        let outcome = self.order(vm, sum);
        if let Some(found) = self.book(vm, outcome) {
            let expected = self.vms[&vm].stamps.iter().fold(0, |sum: u64, stamp| sum.wrapping_add(*stamp));
            assert_eq!(found, expected, "{vm} reads wrong bytes");
            self.checks += 1;
        }
    }

    /// Forks `vm`. With `is_killed`, the source is killed at a random moment of it.
    fn fork(&mut self, vm: VmId, count: usize, is_killed: bool) {
        let source = Arc::clone(&self.vms[&vm].member);
        let spins = self.random.below(12_000);
        let forked = std::thread::scope(|scope| {
            if is_killed {
                scope.spawn(move || {
                    // Chooses the moment, and no more: up to some milliseconds.
                    let until = Instant::now() + Duration::from_micros(u64::try_from(spins).expect("few"));
                    while Instant::now() < until {
                        std::hint::spin_loop();
                    }
                    source.kill();
                });
            }
            self.colony.fork(vm, count)
        });
        if is_killed {
            self.book_kill(vm);
        }
        match forked {
            Ok(forked) => {
                assert_eq!(forked.clones.len(), count, "a fork makes all clones or none");
                for clone in forked.clones {
                    self.adopt(clone.vm, vm, is_killed);
                }
            }
            // Who may lose pages may lose them in the middle of a fork, too.
            Err(error) => {
                let may_fail = is_killed || self.vms.get(&vm).is_some_and(|vm| vm.may_lose);
                assert!(may_fail, "the fork of {vm} failed: {error}");
                self.failed_forks += 1;
            }
        }
        if is_killed {
            self.vms.remove(&vm);
        }
    }

    fn adopt(&mut self, clone: VmId, parent: VmId, is_parent_killed: bool) {
        let member = self.colony.member(clone).expect("a clone is there when the fork returns");
        let source = &self.vms[&parent];
        let stamps = source.stamps.clone();
        let may_lose = source.may_lose || is_parent_killed;
        self.vms.insert(clone, Tracked { member, stamps, may_lose });
        self.parents.insert(clone, parent);
        if self.colony.config().guest == GuestKind::Kvm {
            // The clone is inside its source's call for the next order: it gives in the last result again.
            let outcome = Self::outcome(clone, &self.vms[&clone].member);
            self.book(clone, outcome);
        }
    }

    /// All who may read through `vm` may lose pages from now on.
    fn book_kill(&mut self, vm: VmId) {
        self.kills += 1;
        for (child, tracked) in &mut self.vms {
            let mut ancestor = Some(*child);
            while let Some(one) = ancestor.filter(|one| *one != vm) {
                ancestor = self.parents.get(&one).copied();
            }
            tracked.may_lose |= ancestor.is_some();
        }
    }

    fn kill(&mut self, vm: VmId) {
        self.colony.kill(vm).expect("it exists");
        self.book_kill(vm);
        self.vms.remove(&vm);
    }

    fn end(&mut self, vm: VmId) {
        self.colony.end(vm).expect("it exists");
        self.vms.remove(&vm);
    }
}

impl Test {
    /// One round: a family grows, stores, forks, and dies in random order, all at once.
    fn round(&mut self) {
        self.boot();
        for _ in 0..24 {
            let Some(vm) = self.any() else { break };
            match self.random.below(100) {
                0..30 if self.vms.len() < FAMILY_LIMIT => {
                    let count = 1 + self.random.below(3);
                    self.fork(vm, count, false);
                }
                30..38 => self.fork(vm, 1, true),
                38..60 => {
                    let first = self.random.below(90);
                    let count = 1 + self.random.below(96 - first);
                    let [first, count] = [first, count].map(|n| u64::try_from(n).expect("few"));
                    self.store(vm, first, count);
                }
                60..70 => self.check(vm),
                70..74 => self.end(vm),
                _ => self.kill(vm),
            }
        }
        // Who is left reads all of it, in random order, some killed meanwhile.
        while let Some(vm) = self.any() {
            match self.random.below(4) {
                0 => self.check(vm),
                1 => self.end(vm),
                _ => self.kill(vm),
            }
        }
        self.parents.clear();
    }

    /// Everybody is gone, and so is everything that they had.
    fn look(&self, base: &(Usage, u64)) {
        self.colony.wait_until_gone(LIMIT).expect("all were killed or ended");
        self.colony.settle();
        self.colony.warm().expect("the pool fills again");
        assert_eq!(self.colony.structure_counts(), (0, 0, 0), "cuts, nodes, records");
        let used =
            settled(LIMIT, || self.colony.arena_used_bytes().expect("a number"), |used| *used <= base.1);
        assert!(used <= base.1, "the arena uses {used} bytes, {} at first", base.1);
        let usage = settled(Duration::from_secs(10), Usage::now, |now| now.is_within(&base.0));
        assert!(usage.is_within(&base.0), "{usage:?}, at first {:?}", base.0);
    }

    fn base(&self) -> (Usage, u64) {
        self.colony.wait_until_gone(LIMIT).expect("all were killed or ended");
        self.colony.settle();
        self.colony.warm().expect("the pool fills again");
        let two = || {
            let first = Usage::now();
            std::thread::sleep(Duration::from_millis(20));
            (first.clone() == Usage::now()).then_some(first)
        };
        let usage = settled(LIMIT, two, Option::is_some).expect("nothing happens now");
        (usage, self.colony.arena_used_bytes().expect("a number"))
    }

    fn run(mut self, kills: usize) {
        self.round();
        let base = self.base();
        assert_eq!(
            base.0.children,
            self.colony.config().pool + 1,
            "the pool and its zygote are all there is"
        );
        let mut rounds = 0;
        while self.kills < kills {
            self.round();
            rounds += 1;
            if rounds % ROUNDS_BETWEEN_LOOKS == 0 {
                self.look(&base);
            }
        }
        self.look(&base);
        println!(
            "{} kills in {rounds} rounds: {} checks held, {} runs ended by a loss, {} forks failed",
            self.kills, self.checks, self.losses, self.failed_forks
        );
        assert!(self.checks > 0, "nobody lived to be checked");
        drop(self.colony);
        let left = settled(LIMIT, Usage::now, |now| now.children == 0);
        assert_eq!(left.children, 0, "processes outlive their colony");
    }
}

/// Both tests count what this process holds: one after the other.
static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());

#[test]
fn a_thousand_kills_leave_nothing_behind() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if !can_trap() {
        println!("SKIPPED: a_thousand_kills_leave_nothing_behind: needs root and /dev/userfaultfd");
        return;
    }
    let guest = match Kvm::open() {
        Ok(_) => GuestKind::Kvm,
        Err(error) => {
            println!("SKIPPED in part: {error}: the guests are threads");
            GuestKind::Thread
        }
    };
    Test::new(guest, "kills").run(kills(1_000));
}

#[test]
fn kills_of_thread_guests_leave_nothing_behind() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if !can_trap() {
        println!("SKIPPED: kills_of_thread_guests_leave_nothing_behind: needs root and /dev/userfaultfd");
        return;
    }
    Test::new(GuestKind::Thread, "kills of thread guests").run(kills(200));
}

/// The zygote of this process's colony.
fn zygote() -> Option<Pid> {
    let is_zygote = |pid: &u32| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        name.trim() != "salp-member" && String::from_utf8_lossy(&line).contains("__zygote")
    };
    let pid = children().into_iter().find(is_zygote)?;
    Pid::from_raw(i32::try_from(pid).expect("a process's number"))
}

#[test]
fn members_outlive_their_zygote_and_the_next_come_from_another() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if !can_trap() {
        println!(
            "SKIPPED: members_outlive_their_zygote_and_the_next_come_from_another: needs root, userfaultfd"
        );
        return;
    }
    let mut test = Test::new(GuestKind::Thread, "zygote");
    test.boot();
    let first = test.any().expect("it was just booted");
    test.colony.warm().expect("the pool fills");
    let pool = test.colony.config().pool;
    for _ in 0..3 {
        let zygote = zygote().expect("a colony has one");
        rustix::process::kill_process(zygote, Signal::KILL).expect("it is a child");
        // More than the pool has: some are made now.
        test.fork(first, pool + 1, false);
        let vms: Vec<_> = test.vms.keys().copied().collect();
        vms.iter().for_each(|vm| test.check(*vm));
        vms.into_iter().filter(|vm| *vm != first).for_each(|vm| test.end(vm));
        test.colony.warm().expect("the pool fills again");
        assert_ne!(self::zygote(), Some(zygote), "it was killed");
    }
    test.end(first);
    drop(test);
    let left = settled(LIMIT, Usage::now, |now| now.children == 0);
    assert_eq!((left.children, left.zombies), (0, 0), "processes outlive their colony");
}

/// `SALP_KILLS` for longer or shorter runs.
fn kills(usual: usize) -> usize {
    std::env::var("SALP_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

/// One run of the demo in its own process group, sent `signal` after `delay`. Returns how it ended and
/// what it said; the time it took if it ended by itself.
fn demo(signal: Option<(Signal, Duration, bool)>, moment: usize) -> (ExitStatus, String, Duration) {
    let user = User::of_any_host(&format!("signals-{moment}"));
    let mut child = user.demo().stderr(Stdio::piped()).process_group(0).spawn().expect("salp starts");
    let pid = Pid::from_child(&child);
    let start = Instant::now();
    if let Some((signal, delay, is_for_all)) = signal {
        // Before that a signal ends it as it ends any program.
        settled(LIMIT, || handles(child.id(), signal), |handles| *handles);
        std::thread::sleep(delay);
        let sent = match is_for_all {
            true => rustix::process::kill_process_group(pid, signal),
            false => rustix::process::kill_process(pid, signal),
        };
        sent.expect("it was not reaped yet");
    }
    let mut said = String::new();
    // Its members write there too: this ends when the last of them has ended.
    std::io::Read::read_to_string(&mut child.stderr.take().expect("piped"), &mut said).expect("text");
    let status = child.wait().expect("it was started here");
    let took = start.elapsed();
    user.end();
    (status, said, took)
}

/// Whether a process has a handler for `signal`; SIGKILL has none ever.
fn handles(pid: u32, signal: Signal) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let mask = line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    signal == Signal::KILL || mask >> (signal.as_raw() - 1) & 1 == 1
}

#[test]
fn a_demo_that_is_interrupted_or_killed_leaves_nothing_behind() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if !can_trap() || Kvm::open().is_err() {
        println!("SKIPPED: a_demo_that_is_interrupted_or_killed_leaves_nothing_behind: needs root and KVM");
        return;
    }
    let (status, said, took) = demo(None, 0);
    assert!(status.success() && said.is_empty(), "{status}: {said}");
    let mut caught = [0; 3];
    for (number, signal) in [Signal::INT, Signal::TERM, Signal::KILL].into_iter().enumerate() {
        for moment in 0..MOMENTS {
            let delay = took * u32::try_from(moment).expect("few") / u32::try_from(MOMENTS).expect("few");
            let is_for_all = moment % 2 == 1 && signal != Signal::KILL;
            let (status, said, _) = demo(Some((signal, delay, is_for_all)), number * MOMENTS + moment);
            if status.success() {
                // It was done already.
                assert_eq!(said, "");
                continue;
            }
            caught[number] += 1;
            if signal == Signal::KILL {
                assert_eq!(status.signal(), Some(signal.as_raw()), "{said}");
            } else {
                assert_eq!(status.code(), Some(128 + signal.as_raw()), "after {delay:?}: {said}");
                assert_eq!(said, "salp: interrupted, everything is ended\n", "after {delay:?}");
            }
        }
    }
    println!("caught of {MOMENTS} each: {caught:?} by SIGINT, SIGTERM, SIGKILL; a whole run takes {took:?}");
    assert!(caught.iter().all(|count| *count > 0), "no signal came in time: {caught:?}");
}

/// Moments in the run of a demo at which it is sent each signal.
const MOMENTS: usize = 10;
