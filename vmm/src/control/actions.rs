//! What is done for users: listing, forking, pausing, resetting, stopping, console input. All of it may
//! wait for members.

use std::num::NonZero;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::events::What;
use super::memory;
use super::registry::{Entry, Happening};
use super::resources::{ClonePages, MemoryView, MissingClone, RemoveReply};
use super::service::Service;
use super::{
    CloneView, ControlError, ForkReply, ForkRequest, MOST_CLONES, Problem, ResetStages, ResetView,
    StateRequest, StopReply, VmList, VmState, VmView, WantedState, lock,
};
use crate::family::{FamilyError, VmId};
use crate::keeper::fork::{Cloned, ForkTimes};
use crate::keeper::spec::{CloneSpec, ForkSpec};
use crate::keeper::{Colony, ColonyError};
use crate::member::messages::ResetReply;

/// How long a list may wait for VMs that are looked at.
const LOOK_LIMIT: Duration = Duration::from_millis(500);
/// How long the guest of a clone may take to say that it is ready.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// The most processes made at the same time.
const MOST_PARALLEL: u64 = 16;
/// How long console input may wait for room.
const ROOM_LIMIT: Duration = Duration::from_secs(1);

impl Service {
    /// All VMs.
    pub(super) fn list(&self) -> VmList {
        self.look();
        VmList { vms: self.registry.all().iter().map(|entry| self.view(entry)).collect() }
    }

    /// One VM.
    pub(super) fn find(&self, name: &str) -> Result<VmView, ControlError> {
        let vm = self.registry.find(name)?.vm;
        if let Some(colony) = &*self.colony.read().unwrap_or_else(PoisonError::into_inner) {
            colony.look_for_end(vm, LOOK_LIMIT);
        }
        Ok(self.view(&self.registry.find(name)?))
    }

    /// A VM's memory.
    pub(super) fn memory(&self, name: &str) -> Result<MemoryView, ControlError> {
        let entry = self.registry.find_live(name)?;
        let map = self.with_colony(|colony| Ok(colony.memory_map(entry.vm)?));
        match map {
            Ok(map) => Ok(memory::view(&entry, &map)),
            // That it has ended says more.
            Err(error) => self.registry.find_live(name).and(Err(error)),
        }
    }

    /// How far publication is.
    pub(super) fn backlog(&self) -> Result<Vec<What>, ControlError> {
        let publishing = |cut: crate::keeper::map::Backlog| What::Publishing {
            fork: cut.cut.get().into(),
            pending_leaves: crate::words::wide(cut.pending_leaves),
        };
        self.with_colony(|colony| Ok(colony.backlog().into_iter().map(publishing).collect()))
    }

    /// A VM for users.
    pub(super) fn view(&self, entry: &Entry) -> VmView {
        VmView {
            name: entry.name.clone(),
            id: entry.vm.0.into(),
            parent: entry.parent.clone(),
            parent_id: entry.parent_id.map(|vm| vm.0.into()),
            state: entry.state.clone(),
            memory_bytes: self.settings.memory_bytes,
            cpus: self.settings.cpus,
            pid: entry.state.is_live().then_some(entry.pid),
            keeper_pid: std::process::id(),
            socket: self.place.path().join(&self.socket),
            console: entry.console.path().to_owned(),
        }
    }

    /// Finds out which guests have halted.
    fn look(&self) {
        if let Some(colony) = &*self.colony.read().unwrap_or_else(PoisonError::into_inner) {
            colony.look_for_ends(LOOK_LIMIT);
        }
    }

    /// Does something with the colony, unless that is ending.
    pub(super) fn with_colony<T>(
        &self,
        act: impl FnOnce(&Colony) -> Result<T, ControlError>,
    ) -> Result<T, ControlError> {
        let colony = self.colony.read().unwrap_or_else(PoisonError::into_inner);
        act(colony.as_ref().ok_or(ControlError::Ending)?)
    }

    /// Clones a VM.
    pub(super) fn fork(&self, name: &str, request: &ForkRequest) -> Result<ForkReply, ControlError> {
        let source = self.registry.find_live(name)?;
        check_request(request)?;
        let result = self.under_way(|| self.with_colony(|colony| self.fork_in(colony, &source, request)));
        match result {
            // It ended, which says more.
            Err(ControlError::Colony(
                ColonyError::NoVm(_) | ColonyError::Died(_) | ColonyError::Refused { .. },
            )) => self.registry.find_live(name).and(result),
            result => result,
        }
    }

    /// Does what makes VMs run: the colony does not end meanwhile.
    pub(super) fn under_way<T>(&self, act: impl FnOnce() -> T) -> T {
        *lock(&self.under_way) += 1;
        let result = act();
        *lock(&self.under_way) -= 1;
        // All may have ended meanwhile, and the colony waited for this.
        self.registry.tell(Happening::Ended(None));
        result
    }

    /// Pauses a VM or lets it go on; one that does so already stays as it is.
    pub(super) fn set_state(&self, name: &str, request: StateRequest) -> Result<VmView, ControlError> {
        let vm = self.registry.find_live(name)?.vm;
        let result = self.with_colony(|colony| {
            let result = match request.state {
                WantedState::Paused => colony.pause(vm),
                WantedState::Running => colony.resume(vm),
            };
            // Also after a failure. One that is gone is not paused.
            self.registry.note_pause(vm, || colony.is_paused(vm).unwrap_or(false));
            Ok(result?)
        });
        // That it has ended meanwhile says more than any error.
        let entry = self.registry.find_live(name)?;
        result.map(|()| self.view(&entry))
    }

    /// Returns a clone to its cut, also one whose guest has ended.
    pub(super) fn reset(&self, name: &str) -> Result<ResetView, ControlError> {
        let entry = self.registry.find(name)?;
        if entry.state == VmState::Stopped {
            return Err(self.not_running(entry));
        }
        let result = self.under_way(|| {
            self.with_colony(|colony| {
                self.take_kept(entry.vm);
                let result = colony.reset(entry.vm);
                // Also if its end was noted in between.
                self.take_kept(entry.vm);
                Ok(result?)
            })
        });
        match result {
            Ok(reply) => Ok(reset_view(entry.name, &reply)),
            Err(ControlError::Colony(ColonyError::Family(FamilyError::NoOrigin(_)))) => {
                let reason = "it is no clone, so that there is no cut to return to".to_owned();
                Err(ControlError::NotResettable { name: entry.name, reason })
            }
            Err(ControlError::Colony(ColonyError::Refused { reason, .. })) => {
                Err(ControlError::NotResettable { name: entry.name, reason })
            }
            Err(ControlError::Colony(ColonyError::NoVm(_) | ColonyError::Died(_))) => {
                Err(self.not_running(self.registry.find(name)?))
            }
            Err(error) => Err(error),
        }
    }

    /// A clone that has ended is not to be kept any more. Returns whether it was.
    fn take_kept(&self, vm: VmId) -> bool {
        let mut kept = lock(&self.kept);
        let at = kept.iter().position(|other| *other == vm);
        at.and_then(|at| kept.remove(at)).is_some()
    }

    fn not_running(&self, entry: Entry) -> ControlError {
        ControlError::NotRunning { how: entry.state.describe(), name: entry.name }
    }

    /// Gives a guest console input. Returns how much found room: a part at least, unless the guest reads
    /// nothing for a while.
    pub(super) fn input(&self, name: &str, input: &[u8]) -> Result<usize, ControlError> {
        let entry = self.registry.find_live(name)?;
        let given = self.give_input(entry.vm, input);
        if given.is_err() {
            // That it has ended says more.
            self.registry.find_live(name)?;
        }
        given
    }

    fn give_input(&self, vm: VmId, input: &[u8]) -> Result<usize, ControlError> {
        let member = self.with_colony(|colony| Ok(colony.member(vm)?))?;
        let give = || self.with_colony(|colony| Ok(colony.console_input(vm, input)?));
        let rooms = member.state().console_rooms;
        let accepted = give()?;
        if accepted > 0 || input.is_empty() {
            return Ok(accepted);
        }
        match member.wait_for(ROOM_LIMIT, |state| (state.console_rooms != rooms).then_some(())) {
            Ok(()) => give(),
            Err(ColonyError::Silent { .. }) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    fn fork_in(
        &self,
        colony: &Colony,
        source: &Entry,
        request: &ForkRequest,
    ) -> Result<ForkReply, ControlError> {
        let count = crate::words::index(request.count);
        let (name, prefix) = (request.name.as_deref(), request.name_prefix.as_deref());
        let names = self.claim_clones(&source.name, name, prefix, count)?;
        let consoles = self.create_consoles(&names)?;
        let forked = match colony.fork_as(source.vm, &spec(request, &names)) {
            Ok(forked) => forked,
            Err(error) => {
                self.counts.note_failed_fork();
                self.place.lock()?.release(&names);
                return Err(error.into());
            }
        };
        self.tell_forked(source, &forked);
        let mut consoles: Vec<_> = consoles.into_iter().map(Some).collect();
        for clone in &forked.clones {
            let console = consoles.get_mut(clone.position).and_then(Option::take);
            console.into_iter().for_each(|console| self.add_clone(colony, clone.vm, source, console));
        }
        let missing = forked.missing.iter().map(|missing| MissingClone {
            name: names.get(missing.position).cloned().unwrap_or_default(),
            problem: Problem::from(&missing.error),
        });
        let missing: Vec<_> = missing.collect();
        let free: Vec<_> = missing.iter().map(|missing| missing.name.clone()).collect();
        self.place.lock()?.release(&free);
        let times = self.count_fork(colony, &forked);
        let pages = colony.fork_pages(&forked).map(|pages| ClonePages {
            shared: pages.shared,
            lent: pages.lent,
            copied: pages.copied,
        });
        let deadline = Instant::now() + READY_LIMIT;
        let view = |(clone, times): (&Cloned, Option<ForkTimes>)| {
            // One that has ended by now was forked all the same: its times are those that are known.
            let known =
                || (us(forked.times.reserved, forked.times.resumed), us(forked.asked_at, clone.running_at));
            let (pause_us, call_us) = times.map_or_else(known, |times| (times.pause_us, times.call_us));
            let left = deadline.saturating_duration_since(Instant::now());
            let ready = request.wait_ready.then(|| colony.wait_ready(clone.vm, left));
            let problem = ready.and_then(Result::err).map(|error| Problem::from(&error));
            let (name, console) = (clone.name.clone(), self.place.console(&clone.name));
            CloneView { name, id: clone.vm.0.into(), pause_us, call_us, pages, console, problem }
        };
        let clones = forked.clones.iter().zip(times).map(view).collect();
        Ok(ForkReply { fork: forked.cut.get().into(), clones, missing })
    }

    /// Stops a VM.
    pub(super) fn stop(&self, name: &str) -> Result<StopReply, ControlError> {
        let entry = self.registry.find(name)?;
        let reply = self.with_colony(|colony| {
            if !self.registry.end(entry.vm, VmState::Stopped) && !self.take_kept(entry.vm) {
                // It has ended by itself, and is not kept for a reset.
                self.registry.find_live(name)?;
            }
            let_end(colony, entry.vm)?;
            let is_colony_ending = self.is_over(colony);
            Ok(StopReply { name: entry.name.clone(), is_colony_ending })
        });
        // The main thread may end everything at once: whoever is being answered gets the answer first.
        self.registry.tell(Happening::Ended(None));
        reply
    }

    /// Removes a VM from the list, with its console; one that has not ended is stopped for that, if
    /// `is_forced`. What others need of its memory stays until they do not.
    pub(super) fn remove(&self, name: &str, is_forced: bool) -> Result<RemoveReply, ControlError> {
        let entry = self.registry.find(name)?;
        if entry.state.is_live() && !is_forced {
            return Err(ControlError::StillRuns(entry.name));
        }
        let is_colony_ending = self.with_colony(|colony| {
            self.registry.end(entry.vm, VmState::Stopped);
            self.take_kept(entry.vm);
            let_end(colony, entry.vm)?;
            Ok(self.is_over(colony))
        })?;
        // Several may remove it at the same time.
        if !self.registry.remove(entry.vm) {
            return Err(ControlError::Unknown(entry.name));
        }
        self.place.lock()?.release(std::slice::from_ref(&entry.name));
        self.registry.tell(Happening::Ended(None));
        Ok(RemoveReply { name: entry.name, is_colony_ending })
    }
}

/// Ends a VM, which may be gone already.
fn let_end(colony: &Colony, vm: VmId) -> Result<(), ControlError> {
    match colony.end(vm) {
        Ok(()) | Err(ColonyError::NoVm(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// What no schema says of a request.
fn check_request(request: &ForkRequest) -> Result<(), ControlError> {
    if !(1..=MOST_CLONES).contains(&request.count) {
        return Err(ControlError::Count(request.count));
    }
    let wrong = |text: String| Err(ControlError::Meaningless(text));
    if !(1..=MOST_PARALLEL).contains(&request.parallel) {
        return wrong(format!("parallel is {}: give 1 to {MOST_PARALLEL}", request.parallel));
    }
    if request.name.is_some() && request.name_prefix.is_some() {
        return wrong("name and name_prefix are both given: one of them is enough".to_owned());
    }
    if request.paused && request.wait_ready {
        return wrong("a clone that is paused does not become ready: give paused or wait_ready".to_owned());
    }
    Ok(())
}

/// What the colony is asked for: as many clones as can be had.
fn spec(request: &ForkRequest, names: &[String]) -> ForkSpec {
    let clone = |(index, name): (u32, &String)| CloneSpec {
        name: Some(name.clone()),
        index,
        data: request.data.clone(),
        is_paused: request.paused,
    };
    let mut spec = ForkSpec::each((0..).zip(names).map(clone).collect());
    spec.at_once = NonZero::new(crate::words::index(request.parallel)).unwrap_or(NonZero::<usize>::MIN);
    spec
}

fn reset_view(name: String, reply: &ResetReply) -> ResetView {
    let times = &reply.times;
    ResetView {
        name,
        restored_pages: reply.figures.restored_pages,
        remapped_leaves: reply.figures.dropped_leaves,
        reset_us: us(times.begun, times.resumed),
        stages_us: ResetStages {
            stop: us(times.begun, times.stopped),
            drain: us(times.stopped, times.drained),
            memory: us(times.drained, times.restored),
            state: us(times.restored, times.set),
            resume: us(times.set, times.resumed),
        },
    }
}

fn us(from: u64, to: u64) -> f64 {
    Duration::from_nanos(to.saturating_sub(from)).as_secs_f64() * 1e6
}
