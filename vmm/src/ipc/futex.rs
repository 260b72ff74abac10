//! Waiting for a shared word to change: futexes that work between processes.
//!
//! A waiter looks at the word, finds it unchanged and calls [`wait`] with the value it saw; a writer
//! stores, then calls [`wake_all`]. The kernel compares once more under its own lock, so a store
//! between look and sleep is not missed. The waiter always looks again: a wake-up is a hint.
//!
//! Hole: nobody wakes the waiters of a process that is killed. Whoever watches that process (by its
//! pidfd) stores and wakes in its place, or the waiter gives a timeout.

use std::io;
use std::time::Duration;

use rustix::io::Errno;
use rustix::thread::futex::{self, Flags, Timespec};

use crate::sync::{AtomicU32, plain};

/// Why [`wait`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// Somebody woke this word, or a signal arrived: look again.
    Woken,
    /// The word did not hold the expected value when the kernel looked.
    Changed,
    /// The time is over.
    TimedOut,
}

/// Sleeps while `word` holds `expected`, for at most `timeout` (`None`: for ever).
///
/// # Errors
/// `EFAULT` if the word's page cannot be brought in (a hole in full shared memory).
pub fn wait(word: &AtomicU32, expected: u32, timeout: Option<Duration>) -> io::Result<Waited> {
    // A time too long for the kernel's type is as good as none.
    let limit = timeout.and_then(|time| Timespec::try_from(time).ok());
    // Not PRIVATE: the kernel then finds waiters by page and offset, whatever process mapped it.
    match futex::wait(plain(word), Flags::empty(), expected, limit.as_ref()) {
        Ok(()) | Err(Errno::INTR) => Ok(Waited::Woken),
        Err(Errno::AGAIN) => Ok(Waited::Changed),
        Err(Errno::TIMEDOUT) => Ok(Waited::TimedOut),
        Err(error) => Err(error.into()),
    }
}

/// Wakes all who wait on `word`, in any process, and says how many there were.
///
/// # Errors
/// `EFAULT` as for [`wait`].
pub fn wake_all(word: &AtomicU32) -> io::Result<usize> {
    // The kernel reads the count as a signed number.
    Ok(futex::wake(plain(word), Flags::empty(), i32::MAX.unsigned_abs())?)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;
    use std::thread;

    use super::*;
    use crate::ipc::SharedMemory;

    #[test]
    fn a_word_that_has_changed_is_not_waited_for() {
        let word = AtomicU32::new(7);
        assert_eq!(wait(&word, 6, None).expect("wait"), Waited::Changed);
    }

    #[test]
    fn waiting_ends_with_the_time() {
        let word = AtomicU32::new(7);
        let waited = wait(&word, 7, Some(Duration::from_millis(1))).expect("wait");
        assert_eq!(waited, Waited::TimedOut);
        assert_eq!(wake_all(&word).expect("wake"), 0);
    }

    #[test]
    fn a_store_through_one_mapping_wakes_a_waiter_on_another() {
        let here = SharedMemory::create("futex-test", 4096).expect("create");
        let there = SharedMemory::from_fd(here.fd().try_clone_to_owned().expect("dup")).expect("map");
        thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                let word = &there.words_u32(64, 1).expect("in range")[0];
                while word.load(Ordering::Acquire) == 0 {
                    wait(word, 0, None).expect("wait");
                }
                word.load(Ordering::Acquire)
            });
            let word = &here.words_u32(64, 1).expect("in range")[0];
            word.store(42, Ordering::Release);
            wake_all(word).expect("wake");
            assert_eq!(waiter.join().expect("waiter"), 42);
        });
    }

    #[test]
    fn a_sleeper_is_counted_by_the_wake() {
        let here = SharedMemory::create("futex-test", 4096).expect("create");
        let there = SharedMemory::from_fd(here.fd().try_clone_to_owned().expect("dup")).expect("map");
        thread::scope(|scope| {
            let waiter = scope.spawn(|| wait(&there.words_u32(0, 1).expect("in range")[0], 0, None));
            let word = &here.words_u32(0, 1).expect("in range")[0];
            // Only a waiter that really sleeps is counted: a private futex would never be found here.
            while wake_all(word).expect("wake") == 0 {
                thread::yield_now();
            }
            assert_eq!(waiter.join().expect("waiter").expect("wait"), Waited::Woken);
        });
    }
}
