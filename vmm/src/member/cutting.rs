//! A cut, in the member of its source: the pause, and what the clones get.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use salp_protocol::call;

use super::MemberError;
use super::life::{Answer, Member, RESET_OPEN, STOP_LIMIT};
use super::messages::{CutReply, CutTimes, EncodedSnapshot, Event, Reply, Snapshot};
use crate::devices::backing::{Backing, BackingState};
use crate::devices::gate::HeldGate;
use crate::failure;
use crate::frames::CutId;
use crate::ipc::channel::DESCRIPTOR_LIMIT;
use crate::kvm::vcpu::monotonic_ns;
use crate::kvm::{VcpuThread, begin_save, stop_all};
use crate::space::Space;
use crate::window::{CutFiles, Window};

/// How long to look for the vCPUs' re-entry.
const REENTRY_LIMIT: Duration = Duration::from_millis(50);

impl Member {
    pub(super) fn cut(
        &mut self,
        cut: CutId,
        previous: Option<CutId>,
        asked_by: Option<usize>,
        descriptors: Vec<OwnedFd>,
    ) -> Answer {
        let no_files = |_| MemberError::Protocol("a cut comes with two files");
        let [blocks, patches] = <[OwnedFd; 2]>::try_from(descriptors).map_err(no_files)?;
        let life = self.life()?;
        if self.prepared.is_some() {
            return Err(RESET_OPEN);
        }
        if life.has_ended {
            return Err(MemberError::Protocol("this vm has ended"));
        }
        life.services.answer().map_err(MemberError::Window)?;
        let space = Arc::clone(&life.space);
        let backing = Arc::clone(&life.backing);
        space.host().attach_cut(cut, CutFiles { blocks, patches });
        let result = self.take_cut(&space, &backing, cut, previous, asked_by);
        match result {
            Ok((reply, extents)) => {
                self.is_at_origin = false;
                self.cuts += 1;
                self.just_cut = Some(cut);
                Ok((Reply::Cut(Box::new(reply)), extents))
            }
            Err(error) => {
                // Also one that was performed, and whose state could not be handed over.
                space.release_cut(cut);
                space.host().detach_cut(cut);
                Err(error)
            }
        }
    }

    /// The keeper does not get the answer to the order just obeyed: a cut is none then.
    pub(super) fn take_back(&mut self) {
        if let Some(cut) = self.just_cut.take()
            && let Ok(life) = self.life()
        {
            life.space.release_cut(cut);
            life.space.host().detach_cut(cut);
        }
    }

    fn take_cut(
        &self,
        space: &Space<Window>,
        backing: &Backing,
        cut: CutId,
        previous: Option<CutId>,
        asked_by: Option<usize>,
    ) -> Result<(CutReply, Vec<OwnedFd>), MemberError> {
        let mut times = CutTimes { begun: monotonic_ns(), ..CutTimes::default() };
        let reserved = space.reserve_cut(cut)?;
        times.reserved = monotonic_ns();
        let stopped = failure::point("cut.stop").map_err(MemberError::from);
        let stopped = stopped.and_then(|()| Ok(stop_all(&self.vcpus, STOP_LIMIT)?));
        times.stopped = monotonic_ns();
        let held = self.gate.hold();
        times.held = monotonic_ns();
        let result = stopped.and_then(|()| {
            self.show_fork(asked_by)?;
            // While memory is protected; those that sleep are not woken for it.
            if self.held.is_none() {
                begin_save(&self.vcpus);
            }
            let mut snapshot = self.save_devices(&held, backing, asked_by)?;
            times.saved = monotonic_ns();
            let figures = reserved.perform(previous)?;
            times.protected = monotonic_ns();
            snapshot.vcpus = self.vcpus.iter().map(VcpuThread::save).collect::<Result<_, _>>()?;
            times.collected = monotonic_ns();
            Ok((snapshot, figures))
        });
        // Also after a failure: the VM goes on.
        let resumed = if self.held.is_none() { self.resume_vcpus() } else { Ok(()) };
        times.resumed = monotonic_ns();
        drop(held);
        let (mut snapshot, figures) = result?;
        resumed?;
        let extents = self.extents_of(&mut snapshot)?;
        let is_still = self.held.is_some() && self.vm.is_some() && snapshot.dma.requests.is_empty();
        failure::point("cut.encode")?;
        let snapshot = EncodedSnapshot::of(&snapshot)?;
        Ok((CutReply { snapshot, extents: extents.len(), is_still, figures, times }, extents))
    }

    /// Names the extent files that a snapshot needs, and returns them in that order.
    fn extents_of(&self, snapshot: &mut Snapshot) -> Result<Vec<OwnedFd>, MemberError> {
        let extents = &self.life()?.extents;
        snapshot.extents = snapshot.backing.iter().flat_map(BackingState::extent_files).collect();
        if snapshot.extents.len() >= DESCRIPTOR_LIMIT {
            return Err(MemberError::Protocol("the backing is in too many files of its ancestors"));
        }
        let files = snapshot.extents.iter().map(|id| extents.get(*id)).collect::<io::Result<_>>();
        files.map_err(MemberError::Window)
    }

    /// What clones are to see of the calls that wait for this fork.
    fn show_fork(&self, asked_by: Option<usize>) -> Result<(), MemberError> {
        for vcpu in self.vcpus.iter() {
            if vcpu.open_call()? == Some(call::FORK) {
                let is_asked = asked_by == Some(vcpu.index());
                vcpu.show_result(if is_asked { 0 } else { call::AGAIN })?;
            }
        }
        Ok(())
    }

    /// All but the vCPUs.
    fn save_devices(
        &self,
        held: &HeldGate,
        backing: &Backing,
        asked_by: Option<usize>,
    ) -> Result<Snapshot, MemberError> {
        let live = self.machine.role().map_err(MemberError::Protocol)?;
        let no_engine = MemberError::Protocol("this vm has no dma engine");
        let bus = live.bus();
        let dma = bus.dma.as_ref().ok_or(no_engine)?;
        Ok(Snapshot {
            vcpus: Vec::new(),
            vm: self.vm.as_ref().map(|vm| vm.save()).transpose()?,
            dma: dma.save(held),
            backing: Some(backing.freeze(held)),
            extents: Vec::new(),
            serial: bus.serial.save(held),
            identity: bus.identity.save(held),
            asked_by,
        })
    }

    /// Reports when the last vCPU entered the guest again.
    pub(super) fn report_reentry(&self, cut: CutId) {
        let at = self.await_reentry();
        let harvest = self.life().and_then(|life| Ok(life.space.harvest()?));
        match harvest {
            Ok(report) => self.machine.tell(Event::Reentered { cut, at, pages: report.counts }),
            Err(error) => self.machine.tell(Event::Trouble(error.to_string())),
        }
    }

    /// When the last vCPU entered the guest after a resume. One that is inside a call of its own, or
    /// has ended, went on at the order to resume. 0 of a VM that stands still.
    pub(super) fn await_reentry(&self) -> u64 {
        let limit = Instant::now() + REENTRY_LIMIT;
        let mut at = 0;
        if self.held.is_some() {
            return at;
        }
        for vcpu in self.vcpus.iter() {
            let entered = loop {
                let times = vcpu.times();
                if times.entered_ns != 0 {
                    break times.entered_ns;
                }
                if vcpu.has_ended() || Instant::now() > limit {
                    break times.resumed_ns;
                }
                std::thread::yield_now();
            };
            at = at.max(entered);
        }
        at
    }
}
