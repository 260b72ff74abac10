//! The threads that resolve a window's faults.
//!
//! They own no io_uring, take no pin, make no KVM call. One that waits for another process's leaf
//! keeps the others free: there is one more of them than can wait at one time. Once nothing of the window
//! can make one wait, one is enough, and the others are [sent home](Surplus::send_home).
//!
//! A fault that the host refuses to resolve (no memory, no room for a mapping) is tried again until it
//! is: who waits there waits, and whoever made the window is told once.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{JoinHandle, ThreadId};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::Window;
use crate::space::{Fault, Space, SpaceError};
use crate::words::{Gfn, wide};

/// What to do with a fault that cannot be resolved.
pub type OnFailure = Arc<dyn Fn(SpaceError) + Send + Sync>;
/// What a thread does last.
pub type OnEnd = Arc<dyn Fn() + Send + Sync>;

/// Resolver threads; stopped and joined when dropped.
pub struct Resolvers {
    space: Arc<Space<Window>>,
    surplus: Surplus,
    threads: Vec<JoinHandle<()>>,
    /// The threads that are about to end.
    ended: Receiver<ThreadId>,
}

/// The threads of a window's [`Resolvers`] but the last, which can be done without at some time.
#[derive(Clone)]
pub struct Surplus {
    /// A semaphore: whoever takes one of it goes.
    stop: Arc<OwnedFd>,
    /// How many have not been told to.
    count: Arc<AtomicU64>,
}

impl Surplus {
    /// Has them end, as soon as they have resolved what they are at.
    ///
    /// # Errors
    /// The host refused.
    pub fn send_home(&self) -> io::Result<()> {
        // Relaxed: the number alone matters.
        self.tell(self.count.swap(0, Ordering::Relaxed))
    }

    fn tell(&self, count: u64) -> io::Result<()> {
        if count > 0 {
            rustix::io::write(&*self.stop, &count.to_ne_bytes())?;
        }
        Ok(())
    }
}

impl Resolvers {
    /// Starts `count` threads. One that has called `on_end` can be [joined](Self::join_ended).
    ///
    /// # Errors
    /// The host has no thread or descriptor left.
    pub fn start(
        space: &Arc<Space<Window>>,
        count: usize,
        on_failure: &OnFailure,
        on_end: &OnEnd,
    ) -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK | EventfdFlags::SEMAPHORE;
        let surplus = Surplus { stop: Arc::new(eventfd(0, flags)?), count: Arc::default() };
        let (ends, ended) = channel();
        let mut resolvers = Self { space: Arc::clone(space), surplus, threads: Vec::new(), ended };
        for number in 0..count {
            let (space, stop) = (Arc::clone(space), Arc::clone(&resolvers.surplus.stop));
            let (on_failure, on_end, ends) = (Arc::clone(on_failure), Arc::clone(on_end), ends.clone());
            let work = move || {
                run(&space, &stop, &on_failure);
                // Nobody looks any more where all end.
                let _ = ends.send(std::thread::current().id());
                on_end();
            };
            let thread = std::thread::Builder::new().name(format!("resolver {number}")).spawn(work)?;
            resolvers.threads.push(thread);
        }
        resolvers.surplus.count.store(wide(count.saturating_sub(1)), Ordering::Relaxed);
        Ok(resolvers)
    }

    /// Joins the threads that have gone: until then they keep their stacks.
    pub fn join_ended(&mut self) {
        while let Ok(ended) = self.ended.try_recv() {
            if let Some(place) = self.threads.iter().position(|thread| thread.thread().id() == ended) {
                join(self.threads.swap_remove(place));
            }
        }
    }

    /// How many threads have not been joined.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.threads.len()
    }

    /// Those that can be done without once nobody can be made to wait.
    #[must_use]
    pub fn surplus(&self) -> Surplus {
        self.surplus.clone()
    }
}

impl Drop for Resolvers {
    fn drop(&mut self) {
        self.space.stop();
        // One for each, also for those that have gone: nobody is left to be told too much.
        if let Err(error) = self.surplus.tell(wide(self.threads.len())) {
            tracing::error!(%error, "resolver threads cannot be told to stop");
        }
        self.threads.drain(..).for_each(join);
    }
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("a resolver thread panicked");
    }
}

fn run(space: &Space<Window>, stop: &OwnedFd, on_failure: &OnFailure) {
    let window = space.host();
    loop {
        let mut waiting = [
            PollFd::new(window.userfault(), PollFlags::IN),
            PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
        ];
        match poll(&mut waiting, None) {
            Ok(_) if !waiting[1].revents().is_empty() => {
                // Another may have been faster, and go instead.
                if rustix::io::read(stop, &mut [0; 8]).is_ok() {
                    return;
                }
            }
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "waiting for faults failed");
                return;
            }
        }
        match window.userfault().next_fault() {
            Ok(None) => {}
            Ok(Some((address, fault))) => {
                let Some(gfn) = window.gfn_at(address) else {
                    tracing::error!(address, "a fault outside the window");
                    continue;
                };
                resolve(space, gfn, fault, on_failure);
            }
            Err(error) => {
                tracing::error!(%error, "reading a fault failed");
                return;
            }
        }
    }
}

/// How long to wait before a fault is tried again: twice as long each time.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LAST_PAUSE: Duration = Duration::from_millis(128);

/// Resolves a fault, and tries again as long as the host refuses.
fn resolve(space: &Space<Window>, gfn: Gfn, fault: Fault, on_failure: &OnFailure) {
    let mut pause = FIRST_PAUSE;
    loop {
        match space.handle_fault(gfn, fault) {
            Ok(()) => return,
            Err(error @ SpaceError::Host(_)) if pause == LAST_PAUSE => on_failure(error),
            Err(SpaceError::Host(error)) => tracing::debug!(%error, "a fault is tried again"),
            Err(error) => return on_failure(error),
        }
        // Memory that comes back gives no sign.
        std::thread::sleep(pause);
        if space.is_stopping() {
            return;
        }
        // Past the last one it stays, and is not told again.
        pause = if pause > LAST_PAUSE { pause } else { pause * 2 };
    }
}
