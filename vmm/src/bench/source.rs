//! A colony whose first VM does what the benchmark orders.

use std::path::Path;
use std::time::Duration;

use salp_protocol::{layout, order};

use super::BenchError;
use super::work::{FirstRead, PageRun, TRIPS, Work, WorkTimes, median};
use crate::arena_files::ArenaChoice;
use crate::family::VmId;
use crate::keeper::fork::{Cloned, ForkTimes, Forked};
use crate::keeper::{Colony, ColonyConfig};
use crate::kvm::vcpu::monotonic_ns;
use crate::member::messages::{GuestKind, Order, Publication, PuppetOrder};
use crate::space::Keep;
use crate::words::MemoryShape;

/// How long anything may take: software KVM on a busy machine is slow.
pub(super) const LIMIT: Duration = Duration::from_secs(120);
/// Members that there may be at one time.
const MEMBERS: u32 = 1200;
/// Rounds of a counting guest between two exits: a millisecond or more.
const COUNT_ROUNDS: u64 = 1 << 20;

/// Whether pages are published from the cut on, or when asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Publishing {
    /// From the cut on.
    InBackground,
    /// When asked.
    WhenAsked,
}

/// What a [`Source`] is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct SourceConfig<'a> {
    pub(super) memory: MemoryShape,
    pub(super) is_huge: bool,
    pub(super) guest: GuestKind,
    pub(super) publishing: Publishing,
    pub(super) keep: Keep,
    /// Members kept ready.
    pub(super) pool: usize,
    pub(super) program: &'a Path,
}

/// See the module.
pub(super) struct Source {
    pub(super) colony: Colony,
    pub(super) root: VmId,
    guest: GuestKind,
    publishing: Publishing,
}

impl Source {
    /// Boots it, with the pool full.
    pub(super) fn new(config: SourceConfig<'_>) -> Result<Self, BenchError> {
        let SourceConfig { memory, is_huge, guest, publishing, keep, pool, program } = config;
        let mut colony = ColonyConfig::new(memory);
        colony.is_huge = is_huge;
        colony.guest = guest;
        colony.publication =
            Publication { in_background: publishing == Publishing::InBackground, keep, keep_later: keep };
        colony.pool = pool;
        colony.members = colony.members.max(MEMBERS);
        colony.program = Some(program.to_owned());
        if !is_huge {
            colony.arena = ArenaChoice::SmallPages;
        }
        let colony = Colony::new(colony)?;
        let root = colony.boot("case=puppet")?;
        let source = Self { colony, root, guest, publishing };
        source.order(root, PuppetOrder::default())?;
        source.settle()?;
        Ok(source)
    }

    /// Waits until nothing of what went before is left to do, and the pool is full.
    pub(super) fn settle(&self) -> Result<(), BenchError> {
        self.colony.settle();
        Ok(self.colony.warm()?)
    }

    /// Has a guest begin something.
    fn begin(&self, vm: VmId, order: PuppetOrder) -> Result<(), BenchError> {
        self.colony.ask(vm, Order::Puppet { vcpu: 0, order })?;
        Ok(())
    }

    /// The next result of a guest.
    fn result(&self, vm: VmId) -> Result<u64, BenchError> {
        let found = self.colony.member(vm)?.wait_for(LIMIT, |state| {
            let result = (!state.puppet_results.is_empty()).then(|| state.puppet_results.remove(0).1);
            result.map(Ok).or_else(|| state.ended.clone().map(|(_, text)| Err(text)))
        })?;
        found.map_err(BenchError::GuestEnded)
    }

    /// Has a guest ask for its reset.
    pub(super) fn begin_reset(&self, vm: VmId) -> Result<(), BenchError> {
        self.begin(vm, PuppetOrder { order: order::RESET, ..PuppetOrder::default() })
    }

    /// Takes what a guest that was at its cut again says of the order before that.
    pub(super) fn take_results_at_cut(&self, vm: VmId) -> Result<(), BenchError> {
        if self.guest == GuestKind::Kvm { self.result(vm).map(|_| ()) } else { Ok(()) }
    }

    /// Has a guest do something; returns its result and how long it took, in nanoseconds.
    fn order(&self, vm: VmId, order: PuppetOrder) -> Result<(u64, u64), BenchError> {
        let begin = monotonic_ns();
        self.begin(vm, order)?;
        let result = self.result(vm)?;
        Ok((result, monotonic_ns() - begin))
    }

    /// Has a guest write `value` to pages.
    pub(super) fn dirty(&self, vm: VmId, runs: &[PageRun], value: u64) -> Result<(), BenchError> {
        runs.iter().try_for_each(|run| self.order(vm, run.store(value)).map(|_| ()))
    }

    /// Has a VM do an order that has no result of interest.
    pub(super) fn order_store(&self, vm: VmId, order: PuppetOrder) -> Result<(), BenchError> {
        self.order(vm, order).map(|_| ())
    }

    /// Has the guest count, and waits until it does.
    pub(super) fn start_counting(&self, vm: VmId) -> Result<(), BenchError> {
        let [a, b] = [layout::FREE, layout::FREE + 4096];
        self.start_walking(vm, PuppetOrder { order: order::COUNT, a, b, c: COUNT_ROUNDS, d: 0 })
    }

    /// Has the guest begin an order that has no end, and waits until it has reported.
    pub(super) fn start_walking(&self, vm: VmId, order: PuppetOrder) -> Result<(), BenchError> {
        let member = self.colony.member(vm)?;
        let before = member.state().reports;
        self.begin(vm, order)?;
        Ok(member.wait_for(LIMIT, |state| (state.reports > before).then_some(()))?)
    }

    /// Rounds of such a guest at its last report.
    pub(super) fn rounds(&self, vm: VmId) -> Result<u64, BenchError> {
        Ok(self.colony.member(vm)?.state().progress.rounds)
    }

    /// Ends that.
    pub(super) fn stop_counting(&self, vm: VmId) -> Result<(), BenchError> {
        self.begin(vm, PuppetOrder::default())?;
        self.result(vm)?;
        self.result(vm)?;
        Ok(())
    }

    /// Forks a VM that waits for orders. What the clones say of their source's last order has not been
    /// taken.
    pub(super) fn fork_now(&self, vm: VmId, clones: usize) -> Result<Forked, BenchError> {
        Ok(self.colony.fork(vm, clones)?)
    }

    /// Waits until clones wait for orders.
    pub(super) fn await_clones(&self, clones: &[Cloned]) -> Result<(), BenchError> {
        if self.guest == GuestKind::Kvm {
            // Each says the result of its source's last order once more.
            clones.iter().try_for_each(|clone| self.result(clone.vm).map(|_| ()))?;
        }
        Ok(())
    }

    /// Has the first clone read right after [`Self::fork_now`]: microseconds since the fork was asked
    /// for.
    pub(super) fn first_read_us(&self, forked: &Forked, first: &FirstRead) -> Result<f64, BenchError> {
        let clone = forked.clones[0].vm;
        self.begin(clone, first.order())?;
        if self.guest == GuestKind::Kvm {
            self.result(clone)?;
        }
        let sum = self.result(clone)?;
        let us = monotonic_ns().saturating_sub(forked.asked_at) as f64 / 1e3;
        first.check(sum)?;
        self.await_clones(&forked.clones[1..])?;
        Ok(us)
    }

    /// The times of a fork, for its first clone.
    pub(super) fn times(&self, forked: &Forked) -> Result<ForkTimes, BenchError> {
        Ok(self.colony.fork_times(forked, &forked.clones[0], LIMIT)?)
    }

    /// A clone of the first VM whose memory is all published, in the arena.
    pub(super) fn cloned_from_root(&self) -> Result<VmId, BenchError> {
        self.settle()?;
        let (forked, _) = self.fork(self.root, 1)?;
        if self.publishing == Publishing::WhenAsked {
            self.colony.ask(self.root, Order::Publish { keep: Keep::Own })?;
        }
        self.await_published(&forked)?;
        self.settle()?;
        Ok(forked.clones[0].vm)
    }

    /// Forks a VM that waits for orders; all clones wait for orders then.
    pub(super) fn fork(&self, vm: VmId, clones: usize) -> Result<(Forked, ForkTimes), BenchError> {
        let (forked, times) = self.fork_as_it_is(vm, clones)?;
        self.await_clones(&forked.clones)?;
        Ok((forked, times))
    }

    /// Forks a VM whatever it is at. The times are those of the first clone.
    pub(super) fn fork_as_it_is(&self, vm: VmId, clones: usize) -> Result<(Forked, ForkTimes), BenchError> {
        let forked = self.fork_now(vm, clones)?;
        let times = self.times(&forked)?;
        Ok((forked, times))
    }

    /// A fork of the first VM while it stands still and has been cut before.
    pub(super) fn fork_still(&self, clones: usize) -> Result<(Forked, ForkTimes), BenchError> {
        self.colony.pause(self.root)?;
        let first = self.fork_now(self.root, 1)?;
        self.await_clones(&first.clones)?;
        self.await_nothing_pending(&first)?;
        let forked = self.fork_now(self.root, clones)?;
        let times = self.times(&forked)?;
        self.await_clones(&forked.clones)?;
        if forked.cut != first.cut {
            return Err(BenchError::CutAgain);
        }
        self.end_clones(&first)?;
        self.colony.resume(self.root)?;
        Ok((forked, times))
    }

    /// Waits until a cut is published; returns when that was known, in nanoseconds.
    pub(super) fn await_published(&self, forked: &Forked) -> Result<u64, BenchError> {
        let member = self.colony.member(forked.source)?;
        member.wait_for(LIMIT, |state| state.finished_cuts.contains(&forked.cut).then_some(()))?;
        Ok(monotonic_ns())
    }

    /// Waits until a cut is published that may have nothing to publish.
    pub(super) fn await_nothing_pending(&self, forked: &Forked) -> Result<(), BenchError> {
        self.await_published(forked)?;
        self.settle()
    }

    /// Has a VM do the work.
    pub(super) fn work(&self, vm: VmId, work: &Work) -> Result<WorkTimes, BenchError> {
        let nothing = PuppetOrder::default();
        let trips = (0..TRIPS).map(|_| self.order(vm, nothing).map(|(_, ns)| ns));
        let trip_ns = median(trips.collect::<Result<Vec<_>, _>>()?);
        work.run(trip_ns, |order| self.order(vm, order))
    }

    /// Ends the clones of a fork, and waits for what follows from that.
    pub(super) fn end_clones(&self, forked: &Forked) -> Result<(), BenchError> {
        forked.clones.iter().try_for_each(|clone| self.colony.end(clone.vm))?;
        self.settle()
    }
}
