//! A fork: one cut, any number of clones.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::member_handle::{Asked, MemberHandle};
use super::pause::Still;
use super::steward::Job;
use super::{Colony, ColonyError, Shared, borrow};
use crate::family::VmId;
use crate::frames::CutId;
use crate::kvm::vcpu::monotonic_ns;
use crate::member::messages::{CutReply, CutTimes, Description, EncodedSnapshot, Order, Reply};
use crate::space::CutFigures;

/// A clone, and when the order to run it was given.
#[derive(Clone, Copy, Debug)]
pub struct Cloned {
    /// Its name.
    pub vm: VmId,
    /// In nanoseconds of `CLOCK_MONOTONIC`.
    pub running_at: u64,
    /// What its memory took: tables and window, in nanoseconds.
    pub memory_ns: u64,
}

/// What a fork did.
#[derive(Clone, Debug)]
pub struct Forked {
    /// The cut.
    pub cut: CutId,
    /// The source.
    pub source: VmId,
    /// The clones.
    pub clones: Vec<Cloned>,
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
    /// vCPUs and devices saved.
    pub save: f64,
    /// Pinned pages copied.
    pub copy: f64,
    /// Memory protected.
    pub protect: f64,
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
    pub const fn named(&self) -> [(&'static str, f64); 11] {
        [
            ("reserve_structure", self.reserve_structure),
            ("hop_to_source", self.hop_to_source),
            ("reserve_memory", self.reserve_memory),
            ("stop", self.stop),
            ("hold", self.hold),
            ("save", self.save),
            ("copy", self.copy),
            ("protect", self.protect),
            ("resume", self.resume),
            ("clone", self.clone),
            ("enter", self.enter),
        ]
    }
}

impl Colony {
    /// Takes a cut of a VM and starts `count` clones from it.
    ///
    /// # Errors
    /// The VM does not exist, or something could not be had: the VM runs on.
    pub fn fork(&self, vm: VmId, count: usize) -> Result<Forked, ColonyError> {
        self.shared.fork(vm, count, None)
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
            resume: us(times.protected, reentered.max(times.resumed)),
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
        count: usize,
        asked_by: Option<usize>,
    ) -> Result<Forked, ColonyError> {
        let asked_at = monotonic_ns();
        let member = self.member(source)?;
        // Until the cut is committed: the base of the next one is the table that this one leaves.
        let mut still = member.changing();
        let members = self.take_members(count)?;
        let (taken, moments) = match self.still_cut(&member, &mut still) {
            Some(taken) => (taken, Moments::of_nothing(monotonic_ns())),
            None => match self.take_new_cut(&member, asked_by, &mut still) {
                Ok(taken) => taken,
                Err(error) => {
                    members.into_iter().for_each(|member| self.give_back(member));
                    return Err(error);
                }
            },
        };
        let is_held_on = still.is_some();
        drop(still);
        let clones = self.start_clones(source, &taken, members);
        if !is_held_on {
            self.lock().family.let_go_of_cut(taken.cut);
        }
        self.post(Job::Sweep);
        self.fill_pool_later();
        Ok(Forked {
            cut: taken.cut,
            source,
            clones: clones?,
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
        if !self.config.publication.in_background || self.lock().pool.is_empty() {
            self.post(Job::FillPool);
        }
    }

    /// Takes a cut, which is held then: for this fork, or for as long as the source stands still.
    fn take_new_cut(
        &self,
        member: &MemberHandle,
        asked_by: Option<usize>,
        still: &mut Option<Still>,
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
                // The files, if any, go with the next sweep.
                self.lock().family.abort_cut(cut);
                self.post(Job::Sweep);
                return Err(error);
            }
        };
        let mut inner = self.lock();
        inner.family.commit_cut(cut);
        // Nobody but the source refers to it before the first clone does, and a clone looks for its
        // file: a sweep must not come between.
        inner.family.hold_cut(cut);
        // Not of a source that is gone by now: nobody would take it out again.
        if inner.vms.contains_key(&source) {
            inner.last_cut.insert(source, cut);
        }
        drop(inner);
        let taken = Arc::new(taken);
        *still = is_still.then(|| Still { changes, taken: Arc::clone(&taken) });
        Ok((taken, moments))
    }

    /// Members for `count` clones, before anything else is done: all or none.
    fn take_members(self: &Arc<Self>, count: usize) -> Result<Vec<Arc<MemberHandle>>, ColonyError> {
        let mut members = Vec::new();
        for _ in 0..count {
            match self.take_member() {
                Ok(member) => members.push(member),
                Err(error) => {
                    members.into_iter().for_each(|member| self.give_back(member));
                    return Err(error);
                }
            }
        }
        Ok(members)
    }

    fn take_cut(
        &self,
        member: &MemberHandle,
        cut: CutId,
        previous: Option<CutId>,
        asked_by: Option<usize>,
    ) -> Result<(Taken, bool, Moments), ColonyError> {
        let files = self.make_cut_files(cut)?;
        let reserved_at = monotonic_ns();
        let order = Order::Cut { cut, previous, asked_by };
        let answer = member.begin(order, &borrow(&files)).and_then(Asked::wait_with_descriptors);
        self.lock().files.insert(cut, files);
        match answer {
            Ok((Reply::Cut(reply), extents)) => {
                let CutReply { snapshot, is_still, figures, times } = *reply;
                let moments = Moments { reserved_at, cut_at: monotonic_ns(), times, figures };
                Ok((Taken { cut, snapshot, extents }, is_still, moments))
            }
            other => Err(other.err().unwrap_or_else(|| ColonyError::unexpected(member.vm()))),
        }
    }

    /// All of them, or none: if one cannot be started, all are killed.
    fn start_clones(
        self: &Arc<Self>,
        source: VmId,
        taken: &Taken,
        members: Vec<Arc<MemberHandle>>,
    ) -> Result<Vec<Cloned>, ColonyError> {
        // All are told before the first is waited for.
        let begun: Vec<_> = members.iter().map(|member| self.begin_clone(source, taken, member)).collect();
        let mut started: Vec<(Cloned, Arc<MemberHandle>)> = Vec::new();
        let mut failed = None;
        for (member, begun) in members.iter().zip(begun) {
            match begun.and_then(Begun::wait) {
                Ok(clone) => started.push((clone, Arc::clone(member))),
                // A clone whose member dies before it runs is taken over by another, once.
                Err(ColonyError::Died(_)) if failed.is_none() => match self.start_other(source, taken) {
                    Ok(other) => started.push(other),
                    Err(error) => failed = Some(error),
                },
                Err(error) => {
                    member.kill();
                    member.wait_end();
                    failed.get_or_insert(error);
                }
            }
        }
        match failed {
            None => Ok(started.into_iter().map(|(clone, _)| clone).collect()),
            Some(error) => {
                started.iter().for_each(|(_, member)| member.kill());
                started.iter().for_each(|(_, member)| member.wait_end());
                Err(error)
            }
        }
    }

    fn start_other(
        self: &Arc<Self>,
        source: VmId,
        taken: &Taken,
    ) -> Result<(Cloned, Arc<MemberHandle>), ColonyError> {
        let member = self.take_member()?;
        let clone = self.begin_clone(source, taken, &member).and_then(Begun::wait);
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
        member: &'a Arc<MemberHandle>,
    ) -> Result<Begun<'a>, ColonyError> {
        let is_resettable = self.config.is_resettable;
        let begun = monotonic_ns();
        let vm = self.give_role(member, Some(source), |family, slot| {
            family.clone_vm(taken.cut, slot, is_resettable)
        })?;
        let tables_ns = monotonic_ns() - begun;
        let order = Order::Become { vm, cut: taken.cut, snapshot: taken.snapshot.clone() };
        // The base of the DMA engine's backing first, as at the boot.
        let base = self.config.backing_base.iter().map(|file| file.as_fd());
        let descriptors: Vec<_> = base.chain(borrow(&taken.extents)).collect();
        Ok(Begun { vm, tables_ns, asked: member.begin(order, &descriptors)? })
    }
}

/// A clone that has been told to run.
struct Begun<'a> {
    vm: VmId,
    tables_ns: u64,
    asked: Asked<'a>,
}

impl Begun<'_> {
    fn wait(self) -> Result<Cloned, ColonyError> {
        let vm = self.vm;
        match self.asked.wait()? {
            Reply::Running { at, window_ns } => {
                Ok(Cloned { vm, running_at: at, memory_ns: self.tables_ns + window_ns })
            }
            _ => Err(ColonyError::unexpected(vm)),
        }
    }
}

/// A cut that was performed.
pub(super) struct Taken {
    pub(super) cut: CutId,
    snapshot: EncodedSnapshot,
    /// The files of the DMA engine's backing, which clones read.
    extents: Vec<OwnedFd>,
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
            resumed: now,
        };
        Self { reserved_at: now, cut_at: now, times, figures: CutFigures::default() }
    }
}
