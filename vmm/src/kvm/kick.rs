//! How a thread is made to leave `KVM_RUN`, or a call in which it waits.
//!
//! Key types: [`StopSignal`], which everything that waits on a vCPU's thread heeds;
//! `ImmediateExit`, the flag that makes the next `KVM_RUN` return at once.
//!
//! # Protocol
//! The stopper raises the stop signal, *then* sets `immediate_exit`, *then* sends the signal. The
//! vCPU's thread clears `immediate_exit`, *then* looks at the stop signal, *then* enters `KVM_RUN`.
//! Whichever of the two stores to `immediate_exit` is later: if the thread's, then the stop signal
//! was raised before, and the thread sees it; if the stopper's, then `KVM_RUN` returns at once, or,
//! where it was entered before, the signal ends it. So no stop is lost and one signal is enough.
#![expect(unsafe_code, reason = "sends a signal and writes to a mapping shared with the kernel")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

use super::error::KvmError;
use crate::words::PAGE_BYTES;

/// How long somebody who is about to be stopped waits for that awake.
const LOOK_LIMIT: Duration = Duration::from_micros(200);

/// Why [`StopSignal::wait`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// The vCPU is to stop: leave the call as soon as possible.
    Stop,
    /// The descriptor that was also waited for is readable.
    Ready,
    /// The time has passed.
    Timeout,
}

/// Tells the thread of one vCPU that it is to stop. Whatever blocks on that thread must wait for
/// this too: by [`wait`](Self::wait), or by polling the descriptor.
#[derive(Debug)]
pub struct StopSignal {
    raised: AtomicBool,
    /// Readable while raised.
    event: OwnedFd,
}

impl StopSignal {
    /// A signal that is not raised.
    ///
    /// # Errors
    /// No descriptor could be made.
    pub fn new() -> Result<Self, KvmError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let event =
            eventfd(0, flags).map_err(|errno| KvmError::Ioctl { name: "eventfd", source: errno.into() })?;
        Ok(Self { raised: AtomicBool::new(false), event })
    }

    /// Whether the vCPU is to stop.
    #[must_use]
    pub fn is_raised(&self) -> bool {
        // Partner: the store in `raise`; see the protocol above.
        self.raised.load(Ordering::SeqCst)
    }

    /// Waits until the vCPU is to stop, `other` is readable, or `timeout` has passed. The stop is
    /// reported first.
    #[must_use]
    pub fn wait(&self, other: Option<BorrowedFd<'_>>, timeout: Option<Duration>) -> Woken {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            if self.is_raised() {
                return Woken::Stop;
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let left = left.map(|left| Timespec::try_from(left).expect("less than the timeout"));
            let mut fds = vec![PollFd::new(&self.event, PollFlags::IN)];
            fds.extend(other.as_ref().map(|other| PollFd::new(other, PollFlags::IN)));
            match poll(&mut fds, left.as_ref()) {
                Ok(0) => return Woken::Timeout,
                Ok(_) if fds[0].revents().is_empty() => return Woken::Ready,
                // Raised (seen at the top), or interrupted by the kick itself.
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => unreachable!("poll on two open descriptors: {errno}"),
            }
        }
    }

    /// Waits awake until the vCPU is to stop, for a moment: who has just caused that need not sleep.
    pub fn look(&self) {
        let begun = Instant::now();
        while !self.is_raised() && begun.elapsed() < LOOK_LIMIT {
            std::thread::yield_now();
        }
    }

    pub(super) fn raise(&self) {
        self.raised.store(true, Ordering::SeqCst);
        // Fails only when 2^64 - 1 raises are pending: then it is readable anyway.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    pub(super) fn lower(&self) {
        // Fails when it is not raised: then there is nothing to take back.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        self.raised.store(false, Ordering::SeqCst);
    }
}

impl AsFd for StopSignal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// The `immediate_exit` flag of one vCPU, through a mapping of its own: the vCPU's thread uses the
/// one inside its `VcpuFd`, and Rust references to the two never meet.
#[derive(Debug)]
pub(super) struct ImmediateExit {
    page: NonNull<u8>,
}

// SAFETY: the page is a mapping owned by this value, and is only accessed atomically.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    pub(super) fn map(vcpu: &VcpuFd) -> Result<Self, KvmError> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (null, fd) = (std::ptr::null_mut(), vcpu.as_raw_fd());
        // SAFETY: a new mapping at an address that the kernel chooses.
        let page = unsafe { libc::mmap(null, PAGE_BYTES, protection, libc::MAP_SHARED, fd, 0) };
        if page == libc::MAP_FAILED {
            return Err(KvmError::last_os("mmap of kvm_run"));
        }
        let page = NonNull::new(page.cast()).expect("a mapping is never at address 0");
        Ok(Self { page })
    }

    pub(super) fn set(&self) {
        // SAFETY: `immediate_exit` is a byte inside the mapped page, which lives as long as self;
        // the kernel and the vCPU's thread access it as a byte too.
        let flag = unsafe {
            let byte = self.page.add(std::mem::offset_of!(kvm_run, immediate_exit));
            AtomicU8::from_ptr(byte.as_ptr())
        };
        flag.store(1, Ordering::SeqCst);
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `map` with this length and no reference to it is left.
        let result = unsafe { libc::munmap(self.page.as_ptr().cast(), PAGE_BYTES) };
        debug_assert_eq!(result, 0, "munmap of an own mapping cannot fail");
    }
}

/// The signal that ends `KVM_RUN`. Real-time signals below this one are left to the C library.
#[must_use]
pub fn kick_signal() -> i32 {
    SIGRTMIN() + 2
}

extern "C" fn do_nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Makes the calling thread one that can be kicked.
pub(super) fn prepare_this_thread() -> Result<(), KvmError> {
    static INSTALLED: OnceLock<i32> = OnceLock::new();
    let installed = *INSTALLED.get_or_init(|| {
        register_signal_handler(kick_signal(), do_nothing).map_or_else(|e| e.errno(), |()| 0)
    });
    if installed != 0 {
        return Err(KvmError::Ioctl {
            name: "sigaction",
            source: std::io::Error::from_raw_os_error(installed),
        });
    }
    unblock_signal(kick_signal()).map_err(|error| KvmError::Ioctl {
        name: "pthread_sigmask",
        source: std::io::Error::other(error.to_string()),
    })
}

/// The kernel's number of the calling thread.
pub(super) fn this_thread() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

/// Sends the signal to a thread of this process that is known to be alive.
pub(super) fn kick(thread: i32) {
    // SAFETY: tgkill takes numbers; the handler of this signal, installed before the thread told
    // its number, does nothing.
    let result = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, kick_signal()) };
    debug_assert_eq!(result, 0, "the thread is alive, so it can be signalled");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_wins_over_a_ready_descriptor() {
        let stop = StopSignal::new().expect("a descriptor");
        let other = eventfd(1, EventfdFlags::CLOEXEC).expect("a descriptor");
        let wait = || stop.wait(Some(other.as_fd()), None);
        assert_eq!(wait(), Woken::Ready);
        stop.raise();
        assert_eq!(wait(), Woken::Stop);
        stop.lower();
        assert_eq!(wait(), Woken::Ready);
        assert_eq!(stop.wait(None, Some(Duration::ZERO)), Woken::Timeout);
    }

    #[test]
    fn a_stop_wakes_a_waiter() {
        let stop = StopSignal::new().expect("a descriptor");
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| stop.wait(None, None));
            stop.raise();
            assert_eq!(waiter.join().expect("no panic"), Woken::Stop);
        });
    }
}
