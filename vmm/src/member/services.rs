//! The threads that work for clones: one answers requests, one works in the background. As a source a
//! VM publishes there, as a clone it maps what has been published.
//!
//! Neither is there before it is needed: who answers comes with the first cut and stays, who works in the
//! background goes when nothing is left to do.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::machine::MemberMachine;
use super::messages::Event;
use crate::board::Board;
use crate::failure;
use crate::ipc::futex;
use crate::space::{Keep, Space, SpaceError};
use crate::window::{Surplus, Window};

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

/// What is wanted, and whether somebody is there who looks once more before he goes.
#[derive(Default)]
struct Background {
    wanted: Wanted,
    is_running: bool,
}

/// What the threads share.
struct Work {
    space: Arc<Space<Window>>,
    machine: Arc<MemberMachine>,
    surplus: Surplus,
    board: Board,
    slot: u32,
    keep: Keep,
    stop: AtomicBool,
    background: Mutex<Background>,
}

/// See the module. Stopped and joined when dropped.
pub struct Services {
    work: Arc<Work>,
    forcer: Mutex<Option<JoinHandle<()>>>,
    publisher: Mutex<Option<JoinHandle<()>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Services {
    /// Services without a thread. `surplus` goes when nobody can be made to wait by a fault any more.
    #[must_use]
    pub fn new(
        space: &Arc<Space<Window>>,
        machine: &Arc<MemberMachine>,
        surplus: Surplus,
        board: Board,
        slot: u32,
        keep: Keep,
    ) -> Self {
        let work = Arc::new(Work {
            space: Arc::clone(space),
            machine: Arc::clone(machine),
            surplus,
            board,
            slot,
            keep,
            stop: AtomicBool::new(false),
            background: Mutex::default(),
        });
        Self { work, forcer: Mutex::default(), publisher: Mutex::default() }
    }

    /// From now on requests are answered: there is about to be a cut.
    ///
    /// # Errors
    /// The host has no thread left.
    pub fn answer(&self) -> io::Result<()> {
        let mut forcer = lock(&self.forcer);
        if forcer.is_none() {
            let work = Arc::clone(&self.work);
            *forcer = Some(start("forcer", move || serve(&work))?);
        }
        Ok(())
    }

    /// Has everything published that is pending now, in the background.
    ///
    /// # Errors
    /// The host has no thread left: what somebody asks for is published all the same.
    pub fn publish(&self, keep: Keep) -> io::Result<()> {
        self.want(|wanted| wanted.publish = Some(keep))
    }

    /// Has everything mapped that is known without asking, in the background.
    ///
    /// # Errors
    /// The host has no thread left: what is touched is mapped all the same.
    pub fn resolve_known(&self) -> io::Result<()> {
        self.want(|wanted| wanted.should_resolve = true)
    }

    fn want(&self, what: impl FnOnce(&mut Wanted)) -> io::Result<()> {
        let mut publisher = lock(&self.publisher);
        let mut background = lock(&self.work.background);
        what(&mut background.wanted);
        if background.is_running {
            return Ok(());
        }
        let work = Arc::clone(&self.work);
        // The one before has done all, or is about to return.
        let before = publisher.replace(start("publisher", move || work_in_background(&work))?);
        background.is_running = true;
        drop(background);
        if let Some(before) = before {
            join(before);
        }
        Ok(())
    }

    /// Joins the background thread if it has ended: until then it keeps its stack.
    pub fn join_ended(&self) {
        let mut publisher = lock(&self.publisher);
        let is_running = lock(&self.work.background).is_running;
        if !is_running && let Some(thread) = publisher.take() {
            join(thread);
        }
    }

    /// Tells the keeper of cuts on which nothing is pending any more.
    pub fn reap(&self) {
        self.work.reap();
    }
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    failure::point("services.thread")?;
    std::thread::Builder::new().name(name.to_owned()).spawn(work)
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("a publishing thread panicked");
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        self.work.stop.store(true, Ordering::SeqCst);
        let area = self.work.board.member(self.work.slot);
        area.ring();
        // no failure point: no process survives this
        if let Err(error) = futex::wake_all(area.doorbell()) {
            tracing::error!(%error, "the forcer cannot be woken");
        }
        let threads = [lock(&self.forcer).take(), lock(&self.publisher).take()];
        threads.into_iter().flatten().for_each(join);
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

    fn resolve_known(&self) {
        match self.space.resolve_known() {
            // Nothing traps that another process would have to be asked for.
            Ok(true) => {
                // no failure point: a thread too many stays
                if let Err(error) = self.surplus.send_home() {
                    self.trouble(&error);
                }
            }
            Ok(false) | Err(SpaceError::Stopping) => {}
            Err(error) => self.trouble(&error),
        }
    }

    fn publish(&self, keep: Keep) {
        loop {
            match self.space.publish_next(keep) {
                Ok(true) if self.stop.load(Ordering::SeqCst) => return,
                Ok(true) => {}
                Ok(false) => break,
                // What is published is settled, whatever becomes of the leaf here: on to the next.
                Err(error) => self.trouble(&error),
            }
        }
        self.reap();
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

/// Publishes or maps everything, until nothing of that is wanted.
fn work_in_background(work: &Work) {
    loop {
        let wanted = {
            let mut background = lock(&work.background);
            let wanted = std::mem::take(&mut background.wanted);
            background.is_running = !wanted.is_nothing();
            wanted
        };
        if wanted.is_nothing() || work.stop.load(Ordering::SeqCst) {
            return work.machine.watch().thread_ends();
        }
        if wanted.should_resolve {
            work.resolve_known();
        }
        if let Some(keep) = wanted.publish {
            work.publish(keep);
        }
    }
}
