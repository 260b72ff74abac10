//! The threads that resolve a window's faults.
//!
//! They own no io_uring, take no pin, make no KVM call. One that waits for another process's leaf
//! keeps the others free: there is one more of them than can wait at one time.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::Window;
use crate::space::{Space, SpaceError};

/// What to do with a fault that cannot be resolved.
pub type OnFailure = Arc<dyn Fn(SpaceError) + Send + Sync>;

/// Resolver threads; stopped and joined when dropped.
pub struct Resolvers {
    space: Arc<Space<Window>>,
    stop: Arc<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
}

impl Resolvers {
    /// Starts `count` threads.
    ///
    /// # Errors
    /// The host has no thread or descriptor left.
    pub fn start(space: &Arc<Space<Window>>, count: usize, on_failure: &OnFailure) -> io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let mut resolvers = Self { space: Arc::clone(space), stop, threads: Vec::new() };
        for number in 0..count {
            let (space, stop) = (Arc::clone(space), Arc::clone(&resolvers.stop));
            let on_failure = Arc::clone(on_failure);
            let thread = std::thread::Builder::new()
                .name(format!("resolver {number}"))
                .spawn(move || run(&space, &stop, &on_failure))?;
            resolvers.threads.push(thread);
        }
        Ok(resolvers)
    }
}

impl Drop for Resolvers {
    fn drop(&mut self) {
        self.space.stop();
        if let Err(error) = rustix::io::write(&*self.stop, &1u64.to_ne_bytes()) {
            tracing::error!(%error, "resolver threads cannot be told to stop");
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a resolver thread panicked");
            }
        }
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
            Ok(_) if !waiting[1].revents().is_empty() => return,
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
                if let Err(error) = space.handle_fault(gfn, fault) {
                    on_failure(error);
                }
            }
            Err(error) => {
                tracing::error!(%error, "reading a fault failed");
                return;
            }
        }
    }
}
