//! A clone's return to its cut, in its member: vCPUs, devices and memory are what they were when the
//! clone began. What others need of it in between is published first.
//!
//! It has two halves. [`Member::prepare_reset`] stops the VM and may be refused: the VM goes on then.
//! [`Member::reset`] does it. Between the two the keeper may change what the VM's tables share: it must
//! where the clone has been cut itself. A second half that fails leaves a VM that can only be reset
//! again, or ended.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::MemberError;
use super::life::{Answer, Member, STOP_LIMIT};
use super::machine::MemberMachine;
use super::messages::{Event, Reply, ResetReply, ResetTimes};
use crate::failure;
use crate::ipc::Channel;
use crate::kvm::stop_all;
use crate::kvm::vcpu::monotonic_ns;
use crate::space::SpaceError;

impl Member {
    /// Waits until the keeper says something; meanwhile does what a guest asks for that its member
    /// can do alone, and what the watch finds due.
    ///
    /// # Errors
    /// None of them can be waited for.
    pub fn await_order(&mut self, keeper: &Channel) -> Result<(), MemberError> {
        loop {
            let machine = Arc::clone(&self.machine);
            let said = wait(keeper, &machine, self.due.left())?;
            if said.is_asked
                && let Some((vcpu, asked_at)) = machine.reset_bell().take()
            {
                self.reset_for_guest(vcpu, asked_at);
            }
            machine.watch().look(&mut self.due, &machine, &self.vcpus);
            // After the look, which silences the bell.
            if machine.watch().take_ended_thread() {
                self.join_ended_threads();
            }
            if said.has_order {
                return Ok(());
            }
        }
    }

    fn reset_for_guest(&mut self, vcpu: usize, asked_at: u64) {
        if self.origin.is_some() && !self.is_at_origin {
            // The keeper must say first what the tables share.
            return self.machine.tell(Event::ResetAsked { vcpu });
        }
        match self.reset_since(asked_at) {
            Ok(_) => self.after(),
            Err(error) => {
                tracing::debug!(%error, "a guest's reset is refused");
                if let Some(mailbox) = self.machine.mailbox(vcpu) {
                    mailbox.refuse_reset();
                }
            }
        }
    }

    /// Stops the VM and its devices, if it can be reset.
    ///
    /// # Errors
    /// It is no clone, or a page is pinned from outside: it goes on as before. A vCPU did not stop.
    pub(super) fn prepare_reset(&mut self, begun: u64) -> Result<ResetTimes, MemberError> {
        if let Some(times) = self.prepared {
            return Ok(times);
        }
        let mut times = ResetTimes { begun, ..ResetTimes::default() };
        let life = self.life()?;
        if life.has_ended {
            return Err(MemberError::Protocol("this vm has ended"));
        }
        if self.origin.is_none() {
            return Err(SpaceError::NoOrigin.into());
        }
        if self.outside.holds_pages()
            && let Some(gfn) = life.space.pinned_gfns().first().copied()
        {
            return Err(SpaceError::Pinned { gfn }.into());
        }
        let stopped = failure::point("reset.stop").map_err(MemberError::from);
        if let Err(error) = stopped.and_then(|()| Ok(stop_all(&self.vcpus, STOP_LIMIT)?)) {
            if self.held.is_none() {
                self.resume_vcpus()?;
            }
            return Err(error);
        }
        times.stopped = monotonic_ns();
        // Transfers in flight end uncompleted: at the cut they had not been asked for, or are asked for
        // again.
        if let Some(dma) = &self.machine.role().map_err(MemberError::Protocol)?.bus().dma {
            dma.stop();
        }
        self.life_mut()?.thread_guest = None;
        times.drained = monotonic_ns();
        self.prepared = Some(times);
        Ok(times)
    }

    /// Makes the VM what it was when it began, and runs it.
    ///
    /// # Errors
    /// As [`Member::prepare_reset`]; or the host refused, and the VM stays stopped.
    pub(super) fn reset(&mut self) -> Answer {
        self.reset_since(monotonic_ns())
    }

    /// The same, begun at that moment.
    fn reset_since(&mut self, begun: u64) -> Answer {
        let mut times = self.prepare_reset(begun)?;
        let snapshot = self.origin.clone().ok_or(SpaceError::NoOrigin)?;
        let life = self.life()?;
        let (space, backing) = (Arc::clone(&life.space), Arc::clone(&life.backing));
        let figures = space.reset()?;
        times.restored = monotonic_ns();
        if let Some(state) = &snapshot.backing {
            backing.reset(state)?;
        }
        self.generation += 1;
        let bus = self.bus(&space, &backing, Some(&snapshot))?;
        let live = self.machine.role().map_err(MemberError::Protocol)?;
        *live.bus.write().unwrap_or_else(PoisonError::into_inner) = bus;
        self.machine.begin_again();
        if let (Some(kvm), Some(state)) = (&self.vm, &snapshot.vm) {
            // no failure point: each of its calls has one
            kvm.set_devices(state)?;
        }
        self.set_vcpus(&snapshot)?;
        times.set = monotonic_ns();
        self.prepared = None;
        self.held = None;
        self.is_at_origin = true;
        self.has_halted = false;
        let begun = self.go().and_then(|_| {
            times.resumed = monotonic_ns();
            self.begin_as_clone(&snapshot)
        });
        if let Err(error) = begun {
            // It is not what it was at the cut: stopped again.
            self.prepare_reset(monotonic_ns())?;
            return Err(error);
        }
        let reply = ResetReply { figures, times };
        self.just_reset = Some(reply);
        Ok((Reply::Reset(reply), Vec::new()))
    }
}

/// Who has said something.
struct Said {
    has_order: bool,
    is_asked: bool,
}

/// Waits for an order, a bell, or the time to be over.
fn wait(keeper: &Channel, machine: &MemberMachine, limit: Option<Duration>) -> Result<Said, MemberError> {
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    let mut ends = [
        PollFd::new(keeper, PollFlags::IN),
        PollFd::new(machine.reset_bell(), PollFlags::IN),
        PollFd::new(machine.watch(), PollFlags::IN),
    ];
    loop {
        match poll(&mut ends, limit.as_ref()) {
            Ok(_) => {
                // The end of the channel is an order too: to go.
                let [has_order, is_asked, _] = ends.map(|end| !end.revents().is_empty());
                return Ok(Said { has_order, is_asked });
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(MemberError::Window(error.into())),
        }
    }
}
