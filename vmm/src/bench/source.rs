//! A colony whose first VM does what the benchmark orders.

use std::path::Path;
use std::time::Duration;

use salp_protocol::{layout, order};

use super::BenchError;
use super::work::{PageRun, TRIPS, Work, WorkTimes, median};
use crate::arena_files::ArenaChoice;
use crate::family::VmId;
use crate::keeper::fork::{ForkTimes, Forked};
use crate::keeper::{Colony, ColonyConfig};
use crate::kvm::vcpu::monotonic_ns;
use crate::member::messages::{GuestKind, Order, Publication, PuppetOrder};
use crate::space::Keep;
use crate::words::MemoryShape;

/// How long anything may take: software KVM on a busy machine is slow.
const LIMIT: Duration = Duration::from_secs(120);
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
    /// Members ready for as many clones.
    pub(super) clones: usize,
    pub(super) program: &'a Path,
}

/// See the module.
pub(super) struct Source {
    pub(super) colony: Colony,
    pub(super) root: VmId,
    guest: GuestKind,
}

impl Source {
    /// Boots it, with the pool full.
    pub(super) fn new(config: SourceConfig<'_>) -> Result<Self, BenchError> {
        let SourceConfig { memory, is_huge, guest, publishing, clones, program } = config;
        let mut colony = ColonyConfig::new(memory);
        colony.is_huge = is_huge;
        colony.guest = guest;
        colony.publication =
            Publication { in_background: publishing == Publishing::InBackground, keep: Keep::Own };
        colony.pool = clones + 1;
        colony.program = Some(program.to_owned());
        if !is_huge {
            colony.arena = ArenaChoice::SmallPages;
        }
        let colony = Colony::new(colony)?;
        let root = colony.boot("case=puppet")?;
        let source = Self { colony, root, guest };
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

    /// Has the guest count, and waits until it does.
    pub(super) fn start_counting(&self) -> Result<(), BenchError> {
        let member = self.colony.member(self.root)?;
        let before = member.state().reports;
        let [a, b] = [layout::FREE, layout::FREE + 4096];
        self.begin(self.root, PuppetOrder { order: order::COUNT, a, b, c: COUNT_ROUNDS, d: 0 })?;
        Ok(member.wait_for(LIMIT, |state| (state.reports > before).then_some(()))?)
    }

    /// Ends that.
    pub(super) fn stop_counting(&self) -> Result<(), BenchError> {
        self.begin(self.root, PuppetOrder::default())?;
        self.result(self.root)?;
        self.result(self.root)?;
        Ok(())
    }

    /// Forks a VM that waits for orders; all clones wait for orders then.
    pub(super) fn fork(&self, vm: VmId, clones: usize) -> Result<(Forked, ForkTimes), BenchError> {
        let (forked, times) = self.fork_as_it_is(vm, clones)?;
        if self.guest == GuestKind::Kvm {
            // Each says the result of its source's last order once more.
            forked.clones.iter().try_for_each(|clone| self.result(clone.vm).map(|_| ()))?;
        }
        Ok((forked, times))
    }

    /// Forks a VM whatever it is at. The times are those of the first clone.
    pub(super) fn fork_as_it_is(&self, vm: VmId, clones: usize) -> Result<(Forked, ForkTimes), BenchError> {
        let forked = self.colony.fork(vm, clones)?;
        let times = self.colony.fork_times(&forked, &forked.clones[0], LIMIT)?;
        Ok((forked, times))
    }

    /// Waits until a cut is published; returns when that was known, in nanoseconds.
    pub(super) fn await_published(&self, forked: &Forked) -> Result<u64, BenchError> {
        let member = self.colony.member(forked.source)?;
        member.wait_for(LIMIT, |state| state.finished_cuts.contains(&forked.cut).then_some(()))?;
        Ok(monotonic_ns())
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
