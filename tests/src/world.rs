//! A world: a colony in this process, its VMs in processes of their own, their guests puppets.
//!
//! Every function panics where the colony refuses: in a test that is the finding. An order to a
//! guest may block in a fault that another member resolves; nothing here waits longer than
//! [`LIMIT`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use salp::arena_files::ArenaChoice;
use salp::family::VmId;
use salp::frames::CutId;
use salp::keeper::checker::Checked;
use salp::keeper::fork::Forked;
use salp::keeper::member_handle::MemberHandle;
use salp::keeper::{Colony, ColonyConfig, ColonyError};
use salp::kvm::Kvm;
use salp::member::messages::{Description, GuestKind, Order, PinHolder, Publication, PuppetOrder, Reply};
use salp::space::{Access, Keep, LeafReport, SpaceReport};
use salp::tables::ShareLevel;
use salp::window::Userfault;
use salp::words::{Gfn, Gpa, MemoryShape};
use salp_protocol::order;

use crate::axes::Point;
use crate::procs::salp_binary;
use crate::record::{Outcome, report_values, value_of};

/// How long anything may take: software KVM on a busy machine is slow.
pub const LIMIT: Duration = Duration::from_secs(60);

/// How long the host's kernel may take to give memory back.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a world is made of.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Memory of each VM, in MiB.
    pub memory_mib: u64,
    /// vCPUs of each VM.
    pub vcpus: u8,
    /// Huge pages in windows and arena.
    pub is_huge: bool,
    /// When lent pages are published.
    pub publication: Publication,
    /// Whether clones keep what they began with.
    pub is_resettable: bool,
    /// Where forks share tables.
    pub share_level: ShareLevel,
    /// Room in the arena, in MiB, if not as much as is usual.
    pub arena_mib: Option<u64>,
    /// The built-in guest's command line.
    pub command_line: String,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            memory_mib: 16,
            vcpus: 1,
            is_huge: true,
            publication: Publication { in_background: false, keep: Keep::Own, keep_later: Keep::Own },
            is_resettable: true,
            share_level: ShareLevel::Root,
            arena_mib: None,
            command_line: "case=puppet".to_owned(),
        }
    }
}

/// Cuts of each VM, with their clones.
type Cuts = BTreeMap<VmId, Vec<(CutId, Vec<VmId>)>>;

/// Worlds that count what this process has must be alone in it; all others share it.
static PROCESS: RwLock<()> = RwLock::new(());

/// Held as long as the world exists.
enum Place {
    Shared { _guard: RwLockReadGuard<'static, ()> },
    Alone { _guard: RwLockWriteGuard<'static, ()> },
}

/// See the module.
pub struct World {
    /// The colony, for whatever has no function here.
    pub colony: Colony,
    guest: GuestKind,
    vcpus: u8,
    is_puppet: bool,
    command_line: String,
    /// The cuts of each VM, with their clones, as far as they were taken here.
    cuts: Mutex<Cuts>,
    // Last: after the colony is gone.
    _place: Place,
}

/// Why the host cannot run `guest`, if it cannot.
#[must_use]
pub fn lack(guest: GuestKind) -> Option<String> {
    if let Err(error) = Userfault::open() {
        return Some(error.to_string());
    }
    match guest {
        GuestKind::Thread => None,
        GuestKind::Kvm => Kvm::open().err().map(|error| error.to_string()),
    }
}

/// Whether the host can run `guest`; if not, says what the test `test` is skipped for.
#[must_use]
pub fn can_run(test: &str, guest: GuestKind) -> bool {
    let lack = lack(guest);
    if let Some(reason) = &lack {
        println!("SKIPPED: {test}: {reason}");
        report_values(test, &value_of(guest), &Outcome::Skipped(reason.clone()));
    }
    lack.is_none()
}

impl World {
    /// A world without VMs, or none where the host cannot run it.
    #[must_use]
    pub fn new(test: &str, guest: GuestKind, setup: &Setup) -> Option<Self> {
        can_run(test, guest).then(|| {
            let guard = PROCESS.read().unwrap_or_else(PoisonError::into_inner);
            Self::make(guest, setup, Place::Shared { _guard: guard })
        })
    }

    /// As [`World::new`], with no other world in this process.
    #[must_use]
    pub fn alone(test: &str, guest: GuestKind, setup: &Setup) -> Option<Self> {
        can_run(test, guest).then(|| {
            let guard = PROCESS.write().unwrap_or_else(PoisonError::into_inner);
            Self::make(guest, setup, Place::Alone { _guard: guard })
        })
    }

    /// A world at a point of a row, whose guest the host can run.
    #[must_use]
    pub fn at(point: &Point, setup: Setup) -> Self {
        let guard = PROCESS.read().unwrap_or_else(PoisonError::into_inner);
        Self::make(point.guest, &point.setup(setup), Place::Shared { _guard: guard })
    }

    /// As [`World::at`], with no other world in this process.
    #[must_use]
    pub fn alone_at(point: &Point, setup: Setup) -> Self {
        let guard = PROCESS.write().unwrap_or_else(PoisonError::into_inner);
        Self::make(point.guest, &point.setup(setup), Place::Alone { _guard: guard })
    }

    fn make(guest: GuestKind, setup: &Setup, place: Place) -> Self {
        let memory = MemoryShape::new(setup.memory_mib << 20).expect("a size that a VM can have");
        let mut config = ColonyConfig::new(memory);
        config.guest = guest;
        config.vcpus = setup.vcpus;
        config.is_huge = setup.is_huge;
        config.publication = setup.publication;
        config.is_resettable = setup.is_resettable;
        config.share_level = setup.share_level;
        config.limits.memory_bytes = setup.arena_mib.map(|mib| mib << 20);
        config.program = Some(salp_binary());
        if !setup.is_huge {
            config.arena = ArenaChoice::SmallPages;
        }
        Self {
            colony: Colony::new(config).expect("a colony"),
            guest,
            vcpus: setup.vcpus,
            is_puppet: setup.command_line.contains("case=puppet"),
            command_line: setup.command_line.clone(),
            cuts: Mutex::default(),
            _place: place,
        }
    }

    /// What runs in the VMs.
    #[must_use]
    pub fn guest(&self) -> GuestKind {
        self.guest
    }

    /// Boots a VM that shares nothing.
    pub fn root(&self) -> VmId {
        self.colony.boot(&self.command_line).expect("the first VM boots")
    }

    /// The member of a VM.
    #[must_use]
    pub fn member(&self, vm: VmId) -> Arc<MemberHandle> {
        self.colony.member(vm).expect("the VM is there")
    }

    /// Asks a member for something that has no other answer than that it is done.
    #[track_caller]
    pub fn tell(&self, vm: VmId, order: Order) {
        match self.colony.ask(vm, order.clone()) {
            Ok(Reply::Done) => {}
            other => panic!("{vm}, {order:?}: {other:?}"),
        }
    }

    // ---- the guest ----

    /// Has a vCPU do something, and waits for its result.
    #[track_caller]
    pub fn order(&self, vm: VmId, vcpu: usize, order: PuppetOrder) -> u64 {
        self.begin(vm, vcpu, order);
        self.result(vm, vcpu)
    }

    /// Has a vCPU begin something.
    #[track_caller]
    pub fn begin(&self, vm: VmId, vcpu: usize, order: PuppetOrder) {
        self.tell(vm, Order::Puppet { vcpu, order });
    }

    /// The next result of a vCPU.
    #[track_caller]
    pub fn result(&self, vm: VmId, vcpu: usize) -> u64 {
        let found = self.member(vm).wait_for(LIMIT, |state| {
            let at = state.puppet_results.iter().position(|(of, _)| *of == vcpu);
            let result = at.map(|at| Ok(state.puppet_results.remove(at).1));
            result.or_else(|| state.ended.clone().map(|end| Err((end, state.troubles.clone()))))
        });
        match found {
            Ok(Ok(result)) => result,
            Ok(Err((end, troubles))) => panic!("{vm} ended at an order: {end:?} {troubles:?}"),
            Err(error) => panic!("{vm}, vcpu {vcpu}: {error}; {:?}", self.member(vm).state().troubles),
        }
    }

    /// vCPU 0 does `order` with operands `a` and `b`.
    #[track_caller]
    pub fn run(&self, vm: VmId, order: u64, a: u64, b: u64) -> u64 {
        self.order(vm, 0, PuppetOrder { order, a, b, ..PuppetOrder::default() })
    }

    /// Stores 8 bytes.
    #[track_caller]
    pub fn store(&self, vm: VmId, gpa: Gpa, value: u64) {
        assert_eq!(self.run(vm, order::STORE64, gpa.0, value), 0, "{vm} stores at {gpa}");
    }

    /// Loads 8 bytes.
    #[track_caller]
    pub fn load(&self, vm: VmId, gpa: Gpa) -> u64 {
        self.run(vm, order::LOAD64, gpa.0, 0)
    }

    /// Stores `value` at the start of each of `pages` pages from `first`.
    #[track_caller]
    pub fn store_pages(&self, vm: VmId, first: Gfn, pages: u64, value: u64) {
        let order = PuppetOrder { order: order::STORE_STRIDE, a: first.gpa().0, b: value, c: pages, d: 4096 };
        assert_eq!(self.order(vm, 0, order), 0, "{vm} stores {pages} pages from {first}");
    }

    /// The wrapping sum of the first 8 bytes of `count` places from `gpa`, `step` bytes apart.
    #[track_caller]
    pub fn sum(&self, vm: VmId, gpa: Gpa, count: u64, step: u64) -> u64 {
        self.order(vm, 0, PuppetOrder { order: order::SUM_STRIDE, a: gpa.0, b: 0, c: count, d: step })
    }

    /// Loads 8 bytes and compares.
    #[track_caller]
    pub fn expect(&self, vm: VmId, gpa: Gpa, value: u64) {
        let found = self.load(vm, gpa);
        assert!(found == value, "{vm} has {found:#x} at {gpa}, not {value:#x}");
    }

    // ---- forks ----

    /// Forks a VM whose vCPUs all wait for orders.
    #[track_caller]
    pub fn fork(&self, vm: VmId) -> VmId {
        self.fork_many(vm, 1).clones[0].vm
    }

    /// Takes one cut and starts `count` clones.
    #[track_caller]
    pub fn fork_many(&self, vm: VmId, count: usize) -> Forked {
        let forked = self.fork_running(vm, count);
        for clone in &forked.clones {
            self.await_puppets(clone.vm);
        }
        forked
    }

    /// As [`World::fork_many`], of a VM that is at something: its clones are at it too.
    #[track_caller]
    pub fn fork_running(&self, vm: VmId, count: usize) -> Forked {
        let forked = self.colony.fork(vm, count).unwrap_or_else(|error| panic!("a fork of {vm}: {error}"));
        let clones = forked.clones.iter().map(|clone| clone.vm).collect();
        self.lock_cuts().entry(vm).or_default().push((forked.cut, clones));
        forked
    }

    /// A clone's vCPUs give in the result of the order before the cut once more, each.
    #[track_caller]
    pub fn await_puppets(&self, clone: VmId) {
        if self.is_puppet && self.guest == GuestKind::Kvm {
            (0..usize::from(self.vcpus)).for_each(|vcpu| {
                self.result(clone, vcpu);
            });
        }
    }

    /// Ends a VM, and waits until what follows from that has been done.
    #[track_caller]
    pub fn end(&self, vm: VmId) {
        self.colony.end(vm).unwrap_or_else(|error| panic!("the end of {vm}: {error}"));
        self.lock_cuts().remove(&vm);
        self.colony.settle();
    }

    fn lock_cuts(&self) -> std::sync::MutexGuard<'_, Cuts> {
        self.cuts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a VM publish all that is pending, and waits until it has, for its living clones.
    #[track_caller]
    pub fn publish_all(&self, vm: VmId, keep: Keep) {
        let mut cuts = self.lock_cuts().get(&vm).cloned().unwrap_or_default();
        let living = self.colony.vms();
        // A cut without a living clone may have been let go of instead.
        cuts.retain(|(_, clones)| clones.iter().any(|clone| living.contains(clone)));
        self.tell(vm, Order::Publish { keep });
        let all = |state: &mut salp::keeper::member_handle::MemberState| {
            cuts.iter().all(|(cut, _)| state.finished_cuts.contains(cut)).then_some(())
        };
        if let Err(error) = self.member(vm).wait_for(LIMIT, all) {
            panic!("{vm} publishes: {error}; {:?}", self.member(vm).state().troubles);
        }
        self.colony.settle();
    }

    // ---- devices ----

    /// The living clones of each cut of a VM that was taken here, oldest cut first.
    #[must_use]
    pub fn clones(&self, vm: VmId) -> Vec<Vec<VmId>> {
        let living = self.colony.vms();
        let cuts = self.lock_cuts().get(&vm).cloned().unwrap_or_default();
        let alive = |clones: Vec<VmId>| clones.into_iter().filter(|clone| living.contains(clone)).collect();
        cuts.into_iter().map(|(_, clones)| alive(clones)).collect()
    }

    /// Pins pages, as a device outside does that works through the window.
    #[track_caller]
    pub fn pin(&self, vm: VmId, first: Gfn, pages: u64) {
        self.pin_for(vm, first, pages, PinHolder::Salp(Access::ReadWrite));
    }

    /// Pins pages for a device outside.
    #[track_caller]
    pub fn pin_for(&self, vm: VmId, first: Gfn, pages: u64, holder: PinHolder) {
        self.tell(vm, Order::Pin { first, pages, holder });
    }

    /// Takes such a pin off.
    #[track_caller]
    pub fn unpin(&self, vm: VmId, first: Gfn, pages: u64) {
        self.tell(vm, Order::Unpin { first, pages });
    }

    /// A device stores 8 bytes at the start of a page that it has pinned.
    #[track_caller]
    pub fn device_store(&self, vm: VmId, gfn: Gfn, value: u64) {
        self.tell(vm, Order::DeviceStore { gfn, value });
    }

    /// A device loads 8 bytes from the start of a page that it has pinned.
    #[track_caller]
    pub fn device_load(&self, vm: VmId, gfn: Gfn) -> u64 {
        match self.colony.ask(vm, Order::DeviceLoad { gfn }) {
            Ok(Reply::Loaded(value)) => value,
            other => panic!("{vm}, a device's load of {gfn}: {other:?}"),
        }
    }

    // ---- what is there ----

    /// What a VM's memory is. Exact only while its guest is at rest.
    #[track_caller]
    pub fn report(&self, vm: VmId) -> SpaceReport {
        match self.colony.ask(vm, Order::Harvest) {
            Ok(Reply::Harvest(report)) => *report,
            other => panic!("a harvest of {vm}: {other:?}"),
        }
    }

    /// One leaf of a VM's memory.
    #[track_caller]
    pub fn leaf(&self, vm: VmId, gfn: Gfn) -> LeafReport {
        let leaves = self.report(vm).leaves;
        leaves.into_iter().find(|leaf| leaf.leaf == gfn.leaf()).expect("the page is memory")
    }

    /// What a VM has done.
    #[track_caller]
    pub fn describe(&self, vm: VmId) -> Description {
        match self.colony.ask(vm, Order::Describe) {
            Ok(Reply::Describe(description)) => *description,
            other => panic!("a description of {vm}: {other:?}"),
        }
    }

    /// Cuts, nodes and records, and bytes of the arena.
    #[must_use]
    pub fn usage(&self) -> ((usize, usize, usize), u64) {
        self.colony.settle();
        (self.colony.structure_counts(), self.colony.arena_used_bytes().expect("the arena's use"))
    }

    /// The whole-state checker, and that nothing has gone wrong that nobody waited for.
    #[track_caller]
    pub fn check(&self) -> Checked {
        self.colony.settle();
        let checked = self.colony.check().unwrap_or_else(|error| panic!("{error}"));
        for vm in self.colony.vms() {
            let member = self.member(vm);
            let state = member.state();
            assert!(state.troubles.is_empty(), "{vm}: {:?}", state.troubles);
            let console = String::from_utf8_lossy(&state.console).into_owned();
            assert!(console.is_empty(), "{vm} says: {console}");
            if self.is_puppet {
                assert!(state.ended.is_none(), "{vm} has ended: {:?}", state.ended);
                assert!(state.puppet_results.is_empty(), "{vm}: results that nobody waited for");
            }
        }
        checked
    }

    /// Checks everything, ends everything, and finds that nothing is left.
    #[track_caller]
    pub fn finish(self) {
        self.check();
        self.end_all();
    }

    /// Ends all VMs; the colony is as it was at its beginning then.
    #[track_caller]
    pub fn end_all(&self) {
        for vm in self.colony.vms() {
            self.end(vm);
        }
        self.colony.wait_until_gone(LIMIT).unwrap_or_else(|error| panic!("the end: {error}"));
        self.await_usage(((0, 0, 0), 0));
    }

    /// Waits until [`World::usage`] is as `expected`. The host's kernel gives the memory of a removed
    /// file back some milliseconds after the last process that mapped it was reaped.
    #[track_caller]
    pub fn await_usage(&self, expected: ((usize, usize, usize), u64)) {
        self.await_usage_within(expected, 0);
    }

    /// As [`World::await_usage`], with up to `more_bytes` more in the arena: what an earlier cut waited for
    /// may have been published meanwhile.
    #[track_caller]
    pub fn await_usage_within(&self, expected: ((usize, usize, usize), u64), more_bytes: u64) {
        let (counts, bytes) = expected;
        let is_so = |usage: ((usize, usize, usize), u64)| {
            usage.0 == counts && (bytes..=bytes + more_bytes).contains(&usage.1)
        };
        let begun = Instant::now();
        while !is_so(self.usage()) {
            let (usage, is_late) = (self.usage(), begun.elapsed() > PATIENCE);
            assert!(!is_late, "cuts, nodes and records, and bytes: {usage:?}, not {expected:?}");
            std::thread::yield_now();
        }
    }

    /// What the colony answers to an order that should be refused.
    #[track_caller]
    pub fn refusal(&self, vm: VmId, order: Order) -> String {
        match self.colony.ask(vm, order) {
            Err(ColonyError::Refused { reason, .. }) => reason,
            other => panic!("{vm} did not refuse: {other:?}"),
        }
    }
}
