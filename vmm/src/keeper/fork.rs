//! A fork: one cut, any number of clones, each with a result of its own.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use serde::Serialize;

use super::limits::Admission;
use super::member_handle::{Asked, MemberHandle};
use super::pause::Still;
use super::spec::{CloneSpec, ForkSpec, Missing};
use super::steward::Job;
use super::{Colony, ColonyError, Shared, borrow};
use crate::family::{Family, VmId};
use crate::frames::CutId;
use crate::kvm::vcpu::monotonic_ns;
use crate::member::messages::{CutReply, CutTimes, Description, EncodedSnapshot, Order, Reply};
use crate::space::CutFigures;

/// A clone, and when the order to run it was given.
#[derive(Clone, Debug)]
pub struct Cloned {
    /// Its number.
    pub vm: VmId,
    /// Its name.
    pub name: String,
    /// Its place among those that were wanted.
    pub position: usize,
    /// In nanoseconds of `CLOCK_MONOTONIC`; where it is to begin paused, when it could have run.
    pub running_at: u64,
    /// What its memory took: tables and window, in nanoseconds.
    pub memory_ns: u64,
}

/// What a fork did.
#[derive(Debug)]
pub struct Forked {
    /// The cut.
    pub cut: CutId,
    /// The source.
    pub source: VmId,
    /// The clones, in the order in which they were wanted: at least one, if any was.
    pub clones: Vec<Cloned>,
    /// Those that could not be had, in the same order.
    pub missing: Vec<Missing>,
    /// When the fork was asked for, in nanoseconds of `CLOCK_MONOTONIC`.
    pub asked_at: u64,
    /// Structure and files were reserved.
    pub reserved_at: u64,
    /// The source had answered.
    pub cut_at: u64,
    /// The source's own times.
    pub times: CutTimes,
    /// What was done in the pause.
    pub figures: CutFigures,
}

/// A fork in microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ForkTimes {
    /// First kick to the source's last re-entry.
    pub pause_us: f64,
    /// Request to the clone's vCPU entering the guest.
    pub call_us: f64,
    /// What of the call is memory's: tables, files, reservation, copies, protection, the clone's window.
    pub memory_us: f64,
    /// Request to the clone's first exit.
    pub first_instruction_us: f64,
    /// The parts.
    pub stages_us: Stages,
}

/// The parts of a fork, in microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Stages {
    /// Keeper: structure and files.
    pub reserve_structure: f64,
    /// To the source's process.
    pub hop_to_source: f64,
    /// Source, running: registration, protection ahead.
    pub reserve_memory: f64,
    /// First kick to the last vCPU stopped.
    pub stop: f64,
    /// Completions held.
    pub hold: f64,
    /// Devices saved; the vCPUs' threads begin to save theirs.
    pub save: f64,
    /// Pinned pages copied.
    pub copy: f64,
    /// Memory protected.
    pub protect: f64,
    /// The rest of saving the vCPUs: all of it where there is no processor to spare.
    pub collect: f64,
    /// Resume ordered to the last vCPU in the guest again.
    pub resume: f64,
    /// Resume ordered to the answer in the keeper: descriptors, encoding, the hop.
    pub hop_to_keeper: f64,
    /// Source's answer to the order to run the clone: two hops, mapping, state set.
    pub clone: f64,
    /// That order to the clone's vCPU entering the guest.
    pub enter: f64,
}

impl Stages {
    /// Each with its name.
    #[must_use]
    pub const fn named(&self) -> [(&'static str, f64); 12] {
        [
            ("reserve_structure", self.reserve_structure),
            ("hop_to_source", self.hop_to_source),
            ("reserve_memory", self.reserve_memory),
            ("stop", self.stop),
            ("hold", self.hold),
            ("save", self.save),
            ("copy", self.copy),
            ("protect", self.protect),
            ("collect", self.collect),
            ("resume", self.resume),
            ("clone", self.clone),
            ("enter", self.enter),
        ]
    }
}

impl Colony {
    /// Takes a cut of a VM and starts `count` clones from it that run at once: all of them, or none.
    ///
    /// # Errors
    /// The VM does not exist, or something could not be had: the VM runs on.
    pub fn fork(&self, vm: VmId, count: usize) -> Result<Forked, ColonyError> {
        self.fork_as(vm, &ForkSpec::plain(count))
    }

    /// Takes a cut of a VM and starts the clones that are wanted. One that cannot be had is told in
    /// [`Forked::missing`].
    ///
    /// # Errors
    /// The VM does not exist, a clone cannot be told what it is to be told, or no clone could be had (or
    /// not all, where there are to be all or none): the VM runs on.
    pub fn fork_as(&self, vm: VmId, spec: &ForkSpec) -> Result<Forked, ColonyError> {
        self.shared.fork(vm, spec, None)
    }

    /// How long a fork took, for one of its clones: waits until its first exit is known.
    ///
    /// # Errors
    /// A process ended, or a VM that sleeps did not come to an exit within `limit`.
    pub fn fork_times(
        &self,
        forked: &Forked,
        clone: &Cloned,
        limit: Duration,
    ) -> Result<ForkTimes, ColonyError> {
        let reentered = self
            .member(forked.source)?
            .wait_for(limit, |state| state.reentered.get(&forked.cut).map(|(at, _)| *at))?;
        let member = self.member(clone.vm)?;
        let is_kvm = self.config().guest == crate::member::messages::GuestKind::Kvm;
        let first_exit =
            if is_kvm { member.wait_for(limit, |state| state.first_exit)? } else { clone.running_at };
        let entered = match member.ask(Order::Describe, &[])? {
            Reply::Describe(description) => entered_at(&description).unwrap_or(clone.running_at),
            _ => clone.running_at,
        };
        Ok(times_of(forked, clone, reentered, first_exit, entered))
    }
}

pub(super) fn entered_at(description: &Description) -> Option<u64> {
    description.vcpus.iter().map(|times| times.entered_ns).filter(|at| *at != 0).min()
}

pub(super) fn times_of(
    forked: &Forked,
    clone: &Cloned,
    reentered: u64,
    first_exit: u64,
    entered: u64,
) -> ForkTimes {
    let us = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e3;
    let times = &forked.times;
    // A vCPU that was stopped again since then (for the next cut) has later times: the order to run
    // is a lower bound of both.
    let entered = if entered > first_exit { clone.running_at } else { entered };
    ForkTimes {
        pause_us: us(times.reserved, reentered.max(times.resumed)),
        call_us: us(forked.asked_at, entered.max(clone.running_at)),
        memory_us: memory_us(forked, clone),
        first_instruction_us: us(forked.asked_at, first_exit),
        stages_us: Stages {
            reserve_structure: us(forked.asked_at, forked.reserved_at),
            hop_to_source: us(forked.reserved_at, times.begun),
            reserve_memory: us(times.begun, times.reserved),
            stop: us(times.reserved, times.stopped),
            hold: us(times.stopped, times.held),
            save: us(times.held, times.saved),
            copy: forked.figures.copy.as_secs_f64() * 1e6,
            protect: forked.figures.protect.as_secs_f64() * 1e6,
            collect: us(times.protected, times.collected),
            resume: us(times.collected, reentered.max(times.resumed)),
            hop_to_keeper: us(times.resumed, forked.cut_at),
            clone: us(forked.cut_at, clone.running_at),
            enter: us(clone.running_at, entered),
        },
    }
}

fn memory_us(forked: &Forked, clone: &Cloned) -> f64 {
    let times = &forked.times;
    let reserved = (forked.reserved_at - forked.asked_at) + (times.reserved - times.begun);
    let paused = forked.figures.copy + forked.figures.protect;
    (reserved + clone.memory_ns) as f64 / 1e3 + paused.as_secs_f64() * 1e6
}

impl Shared {
    pub(super) fn fork(
        self: &Arc<Self>,
        source: VmId,
        spec: &ForkSpec,
        asked_by: Option<usize>,
    ) -> Result<Forked, ColonyError> {
        spec.check()?;
        let asked_at = monotonic_ns();
        let member = self.member(source)?;
        self.check_room()?;
        // Until the cut is committed: the base of the next one is the table that this one leaves.
        let changing = member.changing();
        let (members, admission) = self.take_members(spec)?;
        let (taken, moments) = match member.still_cut() {
            Some(taken) => (taken, Moments::of_nothing(monotonic_ns())),
            None => match self.take_new_cut(&member, asked_by) {
                Ok(taken) => taken,
                Err(error) => {
                    self.give_all_back(members);
                    return Err(error);
                }
            },
        };
        drop(changing);
        let cut = taken.cut;
        let started = self.start_clones((source, &taken), spec, members, &admission);
        drop(taken);
        self.post(Job::Sweep);
        self.fill_pool_later();
        let (clones, missing) = started?;
        Ok(Forked {
            cut,
            source,
            clones,
            missing,
            asked_at,
            reserved_at: moments.reserved_at,
            cut_at: moments.cut_at,
            times: moments.times,
            figures: moments.figures,
        })
    }

    /// To make a member takes a processor for milliseconds. While a source publishes, its clones need
    /// that for their first steps; the pool is filled when it has done so, unless it is empty.
    fn fill_pool_later(&self) {
        if !self.config.publication.in_background || self.pool.count() == 0 {
            self.post(Job::FillPool);
        }
    }

    /// Takes a cut.
    fn take_new_cut(
        self: &Arc<Self>,
        member: &MemberHandle,
        asked_by: Option<usize>,
    ) -> Result<(Arc<Taken>, Moments), ColonyError> {
        let source = member.vm();
        let changes = member.changes();
        let (cut, previous) = {
            let mut inner = self.lock();
            let cut = inner.family.reserve_cut(source)?;
            (cut, inner.last_cut.get(&source).copied())
        };
        let (taken, is_still, moments) = match self.take_cut(member, cut, previous, asked_by) {
            Ok(taken) => taken,
            Err(error) => {
                let mut inner = self.lock();
                // The files, if any, go with the next sweep.
                match error {
                    Untaken::Not(_) => inner.family.abort_cut(cut),
                    // Its source is asked to let go of it, as of any that nobody needs.
                    Untaken::Perhaps(_) => inner.family.commit_cut(cut),
                }
                drop(inner);
                self.post(Job::Sweep);
                return Err(error.into());
            }
        };
        let mut inner = self.lock();
        inner.family.commit_cut(cut);
        // See `Taken`. In one go with the commitment: a sweep must not come between.
        inner.family.hold_cut(cut);
        // Not of a source that is gone by now: nobody would take it out again.
        if inner.vms.contains_key(&source) {
            inner.last_cut.insert(source, cut);
        }
        drop(inner);
        let taken = Arc::new(taken);
        if is_still {
            member.stand_still(Still { changes, taken: Arc::clone(&taken) });
        }
        Ok((taken, moments))
    }

    /// A member for each clone, before anything else is done; or why there is none. At least one, if any is
    /// wanted.
    fn take_members(self: &Arc<Self>, spec: &ForkSpec) -> Result<(Vec<Had>, Admission<'_>), ColonyError> {
        let wanted = spec.clones.len();
        let (admission, refusal) = self.admit(wanted);
        let count = admission.left();
        if let Some(refusal) = &refusal
            && (count == 0 || spec.is_all_or_none)
        {
            return Err(refusal.clone().into());
        }
        let mut members: Vec<Had> = self.pool.take(count).into_iter().map(Ok).collect();
        members.extend(self.make_members(count - members.len(), spec));
        // Whoever made them: those that are wanted first get what there is.
        members.sort_by_key(Had::is_err);
        if let Some(refusal) = refusal {
            members.resize_with(wanted, || Err(refusal.clone().into()));
        }
        let is_enough = if spec.is_all_or_none { members.iter().all(Had::is_ok) } else { wanted == 0 };
        if is_enough || members.iter().any(Had::is_ok) && !spec.is_all_or_none {
            return Ok((members, admission));
        }
        Err(self.give_all_back(members).unwrap_or(ColonyError::Members(self.config.members)))
    }

    /// Gives members back, and returns why the first one that is missing is.
    fn give_all_back(&self, members: Vec<Had>) -> Option<ColonyError> {
        let (mut first, mut leaving) = (None, Vec::new());
        for member in members {
            match member {
                Ok(member) => leaving.extend(self.give_back(member)),
                Err(error) => first = first.or(Some(error)),
            }
        }
        leaving.iter().for_each(|member| member.wait_end());
        first
    }

    /// Makes members, some at the same time. Where there are to be all or none, the first that cannot be
    /// made is the last that is tried.
    fn make_members(self: &Arc<Self>, count: usize, spec: &ForkSpec) -> Vec<Had> {
        let next = AtomicUsize::new(0);
        let make = || {
            let mut made = Vec::new();
            // Relaxed: it only hands out turns.
            while next.fetch_add(1, Ordering::Relaxed) < count {
                let member = self.take_member();
                if member.is_err() && spec.is_all_or_none {
                    next.store(count, Ordering::Relaxed);
                }
                made.push(member);
            }
            made
        };
        std::thread::scope(|scope| {
            let helpers = spec.at_once.get().min(count).saturating_sub(1);
            let helpers: Vec<_> = (0..helpers).map(|_| scope.spawn(make)).collect();
            let mut made = make();
            for helper in helpers {
                made.extend(helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            made
        })
    }

    fn take_cut(
        self: &Arc<Self>,
        member: &MemberHandle,
        cut: CutId,
        previous: Option<CutId>,
        asked_by: Option<usize>,
    ) -> Result<(Taken, bool, Moments), Untaken> {
        let files = self.make_cut_files(cut).map_err(Untaken::Not)?;
        let reserved_at = monotonic_ns();
        let order = Order::Cut { cut, previous, asked_by };
        let asked = member.begin(order, &borrow(&files));
        self.lock().files.insert(cut, files);
        match asked.map_err(Untaken::Not)?.wait_with_descriptors() {
            Ok((Reply::Cut(reply), extents)) if reply.extents == extents.len() => {
                let CutReply { snapshot, is_still, figures, times, .. } = *reply;
                let moments = Moments { reserved_at, cut_at: monotonic_ns(), times, figures };
                let keeper = Arc::downgrade(self);
                Ok((Taken { cut, snapshot, extents, keeper }, is_still, moments))
            }
            Err(error @ (ColonyError::Refused { .. } | ColonyError::Died(_))) => Err(Untaken::Not(error)),
            other => {
                Err(Untaken::Perhaps(other.err().unwrap_or_else(|| ColonyError::unexpected(member.vm()))))
            }
        }
    }

    /// Makes members clones. What becomes of one is nothing to the others, unless there are to be all or
    /// none.
    fn start_clones(
        self: &Arc<Self>,
        (source, taken): (VmId, &Taken),
        spec: &ForkSpec,
        members: Vec<Had>,
        admission: &Admission<'_>,
    ) -> Result<(Vec<Cloned>, Vec<Missing>), ColonyError> {
        let (mut started, mut missing) = (Vec::new(), Vec::new());
        let mut had = Vec::new();
        for (position, (member, wanted)) in members.into_iter().zip(&spec.clones).enumerate() {
            match member {
                Ok(member) => had.push((Wanted { position, spec: wanted, admission }, member)),
                Err(error) => missing.push(Missing { position, error }),
            }
        }
        // All are told before the first is waited for.
        let begun: Vec<_> =
            had.iter().map(|(wanted, member)| self.begin_clone(source, taken, *wanted, member)).collect();
        for ((wanted, member), begun) in had.iter().zip(begun) {
            let position = wanted.position;
            match begun.and_then(Begun::wait) {
                Ok(clone) => started.push((clone, Arc::clone(member))),
                // A clone whose member dies before it runs is taken over by another, once.
                Err(ColonyError::Died(_)) => match self.start_other(source, taken, *wanted) {
                    Ok(other) => started.push(other),
                    Err(error) => missing.push(Missing { position, error }),
                },
                Err(error) => {
                    member.kill();
                    member.wait_end();
                    missing.push(Missing { position, error });
                }
            }
        }
        let is_failed = if spec.is_all_or_none { !missing.is_empty() } else { started.is_empty() };
        missing.sort_by_key(|missing| missing.position);
        if is_failed && !missing.is_empty() {
            started.iter().for_each(|(_, member)| member.kill());
            started.iter().for_each(|(_, member)| member.wait_end());
            return Err(missing.swap_remove(0).error);
        }
        Ok((started.into_iter().map(|(clone, _)| clone).collect(), missing))
    }

    fn start_other(
        self: &Arc<Self>,
        source: VmId,
        taken: &Taken,
        wanted: Wanted<'_>,
    ) -> Result<(Cloned, Arc<MemberHandle>), ColonyError> {
        let (admission, refusal) = self.admit(1);
        if let Some(refusal) = refusal {
            return Err(refusal.into());
        }
        let member = self.take_member()?;
        let wanted = Wanted { admission: &admission, ..wanted };
        let clone = self.begin_clone(source, taken, wanted, &member).and_then(Begun::wait);
        if clone.is_err() {
            member.kill();
            member.wait_end();
        }
        Ok((clone?, member))
    }

    /// Makes a member a clone, and tells it to run.
    fn begin_clone<'a>(
        &self,
        source: VmId,
        taken: &Taken,
        wanted: Wanted<'_>,
        member: &'a Arc<MemberHandle>,
    ) -> Result<Begun<'a>, ColonyError> {
        let is_resettable = self.config.is_resettable;
        let is_paused = wanted.spec.is_paused;
        let begun = monotonic_ns();
        // Before it has a name by which it can be resumed.
        member.is_paused.store(is_paused, Ordering::SeqCst);
        let make = |family: &mut Family, slot| family.clone_vm(taken.cut, slot, is_resettable);
        let (vm, identity) = self.give_role(member, Some(source), (wanted.spec, wanted.admission), make)?;
        let tables_ns = monotonic_ns() - begun;
        let name = identity.name.clone();
        let snapshot = taken.snapshot.clone();
        let order = Order::Become { vm, identity, is_paused, cut: taken.cut, snapshot };
        // The base of the DMA engine's backing first, as at the boot.
        let base = self.config.backing_base.iter().map(|file| file.as_fd());
        let descriptors: Vec<_> = base.chain(borrow(&taken.extents)).collect();
        Ok(Begun {
            vm,
            name,
            position: wanted.position,
            tables_ns,
            asked: member.begin(order, &descriptors)?,
        })
    }
}

/// A member for a clone, or why there is none.
type Had = Result<Arc<MemberHandle>, ColonyError>;

/// A clone that is wanted, and its place among them.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    position: usize,
    spec: &'a CloneSpec,
    admission: &'a Admission<'a>,
}

/// A clone that has been told to run.
struct Begun<'a> {
    vm: VmId,
    name: String,
    position: usize,
    tables_ns: u64,
    asked: Asked<'a>,
}

impl Begun<'_> {
    fn wait(self) -> Result<Cloned, ColonyError> {
        match self.asked.wait()? {
            Reply::Running { at, window_ns } => Ok(Cloned {
                vm: self.vm,
                name: self.name,
                position: self.position,
                running_at: at,
                memory_ns: self.tables_ns + window_ns,
            }),
            _ => Err(ColonyError::unexpected(self.vm)),
        }
    }
}

/// A cut that was performed, for clones. Nobody but the source refers to it before the first clone does,
/// and a clone looks for its file: the cut is held as long as this exists, for every fork that makes
/// clones of it, and for as long as the source stands still.
pub(super) struct Taken {
    cut: CutId,
    snapshot: EncodedSnapshot,
    /// The files of the DMA engine's backing, which clones read.
    extents: Vec<OwnedFd>,
    keeper: Weak<Shared>,
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some(keeper) = self.keeper.upgrade() {
            keeper.lock().family.let_go_of_cut(self.cut);
            keeper.post(Job::Sweep);
        }
    }
}

/// Why there is no cut.
enum Untaken {
    /// The source has not taken it, or has given it up.
    Not(ColonyError),
    /// It may have.
    Perhaps(ColonyError),
}

impl From<Untaken> for ColonyError {
    fn from(untaken: Untaken) -> Self {
        match untaken {
            Untaken::Not(error) | Untaken::Perhaps(error) => error,
        }
    }
}

/// What taking the cut of a fork took.
struct Moments {
    reserved_at: u64,
    /// The source had answered.
    cut_at: u64,
    times: CutTimes,
    figures: CutFigures,
}

impl Moments {
    /// Of a fork that uses a cut again.
    fn of_nothing(now: u64) -> Self {
        let times = CutTimes {
            begun: now,
            reserved: now,
            stopped: now,
            held: now,
            saved: now,
            protected: now,
            collected: now,
            resumed: now,
        };
        Self { reserved_at: now, cut_at: now, times, figures: CutFigures::default() }
    }
}
