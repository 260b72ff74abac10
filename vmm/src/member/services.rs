//! The threads that work for clones: one answers requests, one works in the background. As a source a
//! VM publishes there, as a clone it maps what has been published.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::machine::MemberMachine;
use super::messages::Event;
use crate::board::Board;
use crate::ipc::futex;
use crate::space::{Keep, Space, SpaceError};
use crate::window::Window;

/// What the background thread is to do next.
#[derive(Clone, Copy, Default)]
struct Wanted {
    publish: Option<Keep>,
    should_resolve: bool,
}

impl Wanted {
    fn is_nothing(self) -> bool {
        self.publish.is_none() && !self.should_resolve
    }
}

/// What the threads share.
struct Work {
    space: Arc<Space<Window>>,
    machine: Arc<MemberMachine>,
    board: Board,
    slot: u32,
    keep: Keep,
    stop: AtomicBool,
    wanted: Mutex<Wanted>,
    changed: Condvar,
}

/// See the module. Stopped and joined when dropped.
pub struct Services {
    work: Arc<Work>,
    threads: Vec<JoinHandle<()>>,
}

impl Services {
    /// Starts the threads.
    ///
    /// # Errors
    /// The host has no thread left.
    pub fn start(
        space: &Arc<Space<Window>>,
        machine: &Arc<MemberMachine>,
        board: Board,
        slot: u32,
        keep: Keep,
    ) -> io::Result<Self> {
        let work = Arc::new(Work {
            space: Arc::clone(space),
            machine: Arc::clone(machine),
            board,
            slot,
            keep,
            stop: AtomicBool::new(false),
            wanted: Mutex::default(),
            changed: Condvar::new(),
        });
        let mut services = Self { work, threads: Vec::new() };
        for (name, run) in [("forcer", serve as fn(&Work)), ("publisher", publish)] {
            let work = Arc::clone(&services.work);
            let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || run(&work))?;
            services.threads.push(thread);
        }
        Ok(services)
    }

    /// Has everything published that is pending now, in the background.
    pub fn publish(&self, keep: Keep) {
        self.work.wanted.lock().unwrap_or_else(PoisonError::into_inner).publish = Some(keep);
        self.work.changed.notify_one();
    }

    /// Has everything mapped that is known without asking, in the background.
    pub fn resolve_known(&self) {
        self.work.wanted.lock().unwrap_or_else(PoisonError::into_inner).should_resolve = true;
        self.work.changed.notify_one();
    }

    /// Tells the keeper of cuts on which nothing is pending any more.
    pub fn reap(&self) {
        self.work.reap();
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        self.work.stop.store(true, Ordering::SeqCst);
        // Taking the lock closes the gap between the publisher's look and its wait.
        drop(self.work.wanted.lock().unwrap_or_else(PoisonError::into_inner));
        self.work.changed.notify_all();
        let area = self.work.board.member(self.work.slot);
        area.ring();
        if let Err(error) = futex::wake_all(area.doorbell()) {
            tracing::error!(%error, "the forcer cannot be woken");
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a publishing thread panicked");
            }
        }
    }
}

impl Work {
    fn reap(&self) {
        let finished = self.space.finished_cuts();
        for cut in &finished {
            self.space.host().detach_cut(*cut);
        }
        if !finished.is_empty() {
            self.machine.tell(Event::CutsFinished(finished));
        }
    }

    fn trouble(&self, error: &dyn std::fmt::Display) {
        self.machine.tell(Event::Trouble(error.to_string()));
    }
}

/// Answers requests whenever the doorbell rings.
fn serve(work: &Work) {
    let doorbell = work.board.member(work.slot).doorbell();
    loop {
        // Pairs with `MemberArea::ring`: requests set before the ring are seen after this load.
        let seen = doorbell.load(Ordering::Acquire);
        if work.stop.load(Ordering::SeqCst) {
            return;
        }
        if let Err(error) = work.space.serve_requests(work.keep) {
            work.trouble(&error);
        }
        work.reap();
        if let Err(error) = futex::wait(doorbell, seen, None) {
            work.trouble(&error);
            return;
        }
    }
}

/// Publishes or maps everything, each time it is asked to.
fn publish(work: &Work) {
    loop {
        let wanted = {
            let wanted = work.wanted.lock().unwrap_or_else(PoisonError::into_inner);
            let mut wanted = work
                .changed
                .wait_while(wanted, |wanted| wanted.is_nothing() && !work.stop.load(Ordering::SeqCst))
                .unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *wanted)
        };
        if wanted.is_nothing() {
            return;
        }
        if wanted.should_resolve
            && let Err(error) = work.space.resolve_known()
            && !matches!(error, SpaceError::Stopping)
        {
            work.trouble(&error);
        }
        let Some(keep) = wanted.publish else { continue };
        loop {
            match work.space.publish_next(keep) {
                Ok(true) if work.stop.load(Ordering::SeqCst) => return,
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    work.trouble(&error);
                    break;
                }
            }
        }
        work.reap();
    }
}
