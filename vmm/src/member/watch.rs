//! The watch: a thread that looks after what follows from nothing happening.
//!
//! - A console line that has been begun is sent on after [`LINE_PAUSE`]: a prompt shows, and a guest that
//!   writes byte after byte does not cost a message each.
//! - A guest that has been let into by its machine and then does nothing for [`QUIET_PAUSE`] may have
//!   halted for good. If all vCPUs sleep, the keeper is told, which orders a look
//!   ([`Order::Look`](super::messages::Order::Look)); one that computes is looked at again later.
//!
//! The thread waits without a timer unless one of these is on its way, so that an idle VM has no timers.
//!
//! Known hole: a guest that was idle with interrupts on and then halts without touching any device is not
//! noticed here, but by the next look that somebody asks for (`salp ps`).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::machine::MemberMachine;
use super::messages::Event;
use crate::kvm::{Doing, VcpuThread, VcpuWatch};

/// How long the beginning of a line waits for its rest.
const LINE_PAUSE: Duration = Duration::from_millis(5);
/// How long a guest must have done nothing with its machine to be looked at.
const QUIET_PAUSE: Duration = Duration::from_millis(100);
/// The longest time between two looks at a guest that computes.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct State {
    /// A line has been begun that was not there before.
    has_line: bool,
    /// The thread waits for the guest to act.
    is_resting: bool,
}

/// What the machine tells its watch.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// The guest has done something since this was last looked at.
    is_active: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

/// When what is due.
#[derive(Default)]
struct Due {
    line: Option<Instant>,
    quiet: Option<Instant>,
    pause: Duration,
}

impl Watch {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest has written the beginning of a line.
    pub(super) fn line_begun(&self) {
        self.lock().has_line = true;
        self.changed.notify_all();
    }

    /// The guest goes on after something was done for it.
    pub(super) fn guest_acts(&self) {
        // Relaxed: at the worst the watch looks once too often, or a moment later.
        if self.is_active.load(Ordering::Relaxed) {
            return;
        }
        self.is_active.store(true, Ordering::SeqCst);
        // Under the lock: the watch rests only where it has not seen that store.
        if self.lock().is_resting {
            self.changed.notify_all();
        }
    }

    /// Waits until something is due, or there is something new.
    fn wait(&self, due: &Due) {
        let mut state = self.lock();
        state.is_resting = due.quiet.is_none();
        loop {
            let is_new = due.line.is_none() && state.has_line;
            if is_new || due.quiet.is_none() && self.is_active.load(Ordering::SeqCst) {
                break;
            }
            let deadline = due.line.into_iter().chain(due.quiet).min();
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            state = match left {
                Some(Duration::ZERO) => break,
                Some(left) => {
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
        state.is_resting = false;
    }

    fn run(&self, machine: &MemberMachine, vcpus: &[VcpuWatch]) {
        let mut due = Due::default();
        loop {
            self.wait(&due);
            let now = Instant::now();
            match due.line {
                Some(at) if at <= now => {
                    due.line = None;
                    self.lock().has_line = false;
                    machine.flush_line();
                }
                Some(_) => {}
                None => due.line = self.lock().has_line.then(|| now + LINE_PAUSE),
            }
            match due.quiet {
                Some(at) if at > now => {}
                // It has rested, or must be looked at.
                _ if self.is_active.swap(false, Ordering::SeqCst) => {
                    due.pause = QUIET_PAUSE;
                    due.quiet = Some(now + QUIET_PAUSE);
                }
                Some(_) => self.look(&mut due, machine, vcpus),
                None => {}
            }
        }
    }

    /// The guest has not acted for a while.
    fn look(&self, due: &mut Due, machine: &MemberMachine, vcpus: &[VcpuWatch]) {
        due.quiet = None;
        let doing: Vec<_> = vcpus.iter().map(VcpuWatch::doing).collect();
        if doing.contains(&Doing::Works) {
            due.pause = (due.pause * 2).min(LONGEST_PAUSE);
            due.quiet = Some(Instant::now() + due.pause);
        } else if doing.iter().all(|&one| one == Doing::Sleeps) {
            machine.tell(Event::Quiet);
        }
    }
}

/// Starts the watch of a machine with these vCPUs. It ends with the process.
pub(super) fn start(machine: &Arc<MemberMachine>, vcpus: &[VcpuThread]) -> std::io::Result<()> {
    let vcpus: Vec<_> = vcpus.iter().map(VcpuThread::watch).collect();
    let machine = Arc::clone(machine);
    let run = move || machine.watch().run(&machine, &vcpus);
    std::thread::Builder::new().name("watch".to_owned()).spawn(run).map(|_| ())
}
