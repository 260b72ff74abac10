//! When a vCPU was stopped and resumed.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// Moments of a vCPU's last stop and resume, in nanoseconds of `CLOCK_MONOTONIC` (the same in all
/// processes of a host). 0: has not happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    /// The stop was requested.
    pub requested_ns: u64,
    /// The vCPU was stopped, its state clean; if it was so before the request, that moment.
    pub stopped_ns: u64,
    /// The resume was ordered.
    pub resumed_ns: u64,
    /// Right before the first `KVM_RUN` after the resume.
    pub entered_ns: u64,
    /// That `KVM_RUN` returned: the guest's first instruction was before this.
    pub first_exit_ns: u64,
}

/// [`Times`], written by the vCPU's thread and its stoppers.
#[derive(Debug, Default)]
pub(super) struct TimeStamps {
    pub(super) requested: AtomicU64,
    pub(super) stopped: AtomicU64,
    pub(super) resumed: AtomicU64,
    pub(super) entered: AtomicU64,
    pub(super) first_exit: AtomicU64,
}

/// Now, in nanoseconds of `CLOCK_MONOTONIC`.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let [s, ns] = [now.tv_sec, now.tv_nsec].map(|part| u64::try_from(part).unwrap_or(0));
    s * 1_000_000_000 + ns
}

impl TimeStamps {
    // All relaxed: each is a figure for reports. Who needs several that belong together reads them
    // while the vCPU is stopped, ordered by the slot's lock.

    pub(super) fn entering(&self) {
        if self.entered.load(Ordering::Relaxed) == 0 {
            self.entered.store(monotonic_ns(), Ordering::Relaxed);
        }
    }

    pub(super) fn left(&self) {
        if self.first_exit.load(Ordering::Relaxed) == 0 {
            self.first_exit.store(monotonic_ns(), Ordering::Relaxed);
        }
    }

    pub(super) fn stamp(moment: &AtomicU64) {
        moment.store(monotonic_ns(), Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> Times {
        let at = |moment: &AtomicU64| moment.load(Ordering::Relaxed);
        Times {
            requested_ns: at(&self.requested),
            stopped_ns: at(&self.stopped),
            resumed_ns: at(&self.resumed),
            entered_ns: at(&self.entered),
            first_exit_ns: at(&self.first_exit),
        }
    }
}
