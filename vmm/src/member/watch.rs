//! The watch looks after what follows from nothing happening.
//!
//! - A console line that has been begun is sent on after [`LINE_PAUSE`]: a prompt shows, and a guest that
//!   writes byte after byte does not cost a message each.
//! - A guest that has been let into by its machine and then does nothing for [`QUIET_PAUSE`] may have
//!   halted for good. If all vCPUs sleep, the keeper is told, which orders a look
//!   ([`Order::Look`](super::messages::Order::Look)); one that computes is looked at again later.
//!
//! A thread that comes and goes rings its bell last, so that the loop joins it.
//!
//! It has no thread of its own: the member's loop waits for the [`Watch`]'s bell among others, no longer
//! than until something is [due](Due). Nothing is due of an idle VM, so that it has no timers.
//!
//! Known hole: a guest that was idle with interrupts on and then halts without touching any device is not
//! noticed here, but by the next look that somebody asks for (`salp ps`).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::machine::MemberMachine;
use super::messages::Event;
use crate::kvm::{Doing, VcpuThread};

/// How long the beginning of a line waits for its rest.
const LINE_PAUSE: Duration = Duration::from_millis(5);
/// How long a guest must have done nothing with its machine to be looked at.
const QUIET_PAUSE: Duration = Duration::from_millis(100);
/// The longest time between two looks at a guest that computes.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What the machine tells its watch.
#[derive(Debug)]
pub(super) struct Watch {
    /// The guest has done something since this was last looked at.
    is_active: AtomicBool,
    /// The guest is not looked at before it acts: whoever sees it act says so.
    is_resting: AtomicBool,
    /// A line has been begun that was not there before.
    has_line: AtomicBool,
    /// A thread has ended, or is about to, that nobody has joined.
    has_ended_thread: AtomicBool,
    /// Readable when there may be something new.
    bell: OwnedFd,
}

/// When what is due.
#[derive(Default)]
pub(super) struct Due {
    line: Option<Instant>,
    quiet: Option<Instant>,
    pause: Duration,
}

impl Watch {
    pub(super) fn new() -> std::io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let [is_active, has_line, has_ended_thread] = [const { AtomicBool::new(false) }; 3];
        Ok(Self { is_active, is_resting: AtomicBool::new(true), has_line, has_ended_thread, bell })
    }

    fn ring(&self) {
        if let Err(error) = rustix::io::write(&self.bell, &1u64.to_ne_bytes()) {
            tracing::error!(%error, "the watch cannot be rung for");
        }
    }

    /// The guest has written the beginning of a line.
    pub(super) fn line_begun(&self) {
        if !self.has_line.swap(true, Ordering::SeqCst) {
            self.ring();
        }
    }

    /// The calling thread, one of those that come and go, is about to end.
    pub(super) fn thread_ends(&self) {
        self.has_ended_thread.store(true, Ordering::SeqCst);
        self.ring();
    }

    /// Whether one has said that since this was last asked.
    pub(super) fn take_ended_thread(&self) -> bool {
        self.has_ended_thread.swap(false, Ordering::SeqCst)
    }

    /// The guest goes on after something was done for it.
    pub(super) fn guest_acts(&self) {
        // Relaxed: at the worst the watch looks once too often, or a moment later.
        if self.is_active.load(Ordering::Relaxed) {
            return;
        }
        self.is_active.store(true, Ordering::SeqCst);
        // Pairs with `rest`, which stores and loads the other way round: one of the two sees the other's.
        if self.is_resting.load(Ordering::SeqCst) {
            self.ring();
        }
    }

    /// The guest is looked at when it acts; rings at once if it just has.
    fn rest(&self) {
        self.is_resting.store(true, Ordering::SeqCst);
        if self.is_active.load(Ordering::SeqCst) {
            self.ring();
        }
    }

    /// Does what is due by now.
    pub(super) fn look(&self, due: &mut Due, machine: &MemberMachine, vcpus: &[VcpuThread]) {
        // Fails only when it is silent. First: who rings after this is seen the next time.
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        let now = Instant::now();
        match due.line {
            Some(at) if at <= now => {
                due.line = None;
                // Before the line is taken: one that is begun after that rings again.
                self.has_line.store(false, Ordering::SeqCst);
                machine.flush_line();
            }
            Some(_) => {}
            None => due.line = self.has_line.load(Ordering::SeqCst).then(|| now + LINE_PAUSE),
        }
        match due.quiet {
            Some(at) if at > now => {}
            // It has rested, or must be looked at.
            _ if self.is_active.swap(false, Ordering::SeqCst) => {
                self.is_resting.store(false, Ordering::SeqCst);
                due.pause = QUIET_PAUSE;
                due.quiet = Some(now + QUIET_PAUSE);
            }
            Some(_) => self.look_at_guest(due, machine, vcpus),
            None => {}
        }
    }

    /// The guest has not acted for a while.
    fn look_at_guest(&self, due: &mut Due, machine: &MemberMachine, vcpus: &[VcpuThread]) {
        due.quiet = None;
        let doing: Vec<_> = vcpus.iter().map(|vcpu| vcpu.watch().doing()).collect();
        if doing.contains(&Doing::Works) {
            due.pause = (due.pause * 2).min(LONGEST_PAUSE);
            due.quiet = Some(Instant::now() + due.pause);
            return;
        }
        if !doing.is_empty() && doing.iter().all(|&one| one == Doing::Sleeps) {
            machine.tell(Event::Quiet);
        }
        self.rest();
    }
}

impl Due {
    /// How long from now until something is; none: nothing will be.
    pub(super) fn left(&self) -> Option<Duration> {
        let first = self.line.into_iter().chain(self.quiet).min();
        first.map(|at| at.saturating_duration_since(Instant::now()))
    }
}

impl AsFd for Watch {
    /// To poll: readable when there may be something new.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
