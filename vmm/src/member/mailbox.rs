//! Where the guest's calls meet the keeper: orders for a puppet, results of forks, the word to
//! finish. One mailbox a vCPU.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::messages::PuppetOrder;
use crate::family::VmId;
use crate::kvm::vcpu::monotonic_ns;

#[derive(Default)]
struct Letters {
    order: Option<PuppetOrder>,
    /// An order has been taken whose result has not come.
    is_working: bool,
    fork: Option<Option<VmId>>,
    should_finish: bool,
    /// The guest's own reset cannot be.
    is_reset_refused: bool,
}

/// See the module.
pub struct Mailbox {
    letters: Mutex<Letters>,
    /// Readable while there may be something new.
    bell: OwnedFd,
}

impl Mailbox {
    /// An empty mailbox.
    ///
    /// # Errors
    /// No descriptor could be made.
    pub fn new() -> std::io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { letters: Mutex::default(), bell })
    }

    fn letters(&self) -> MutexGuard<'_, Letters> {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        if let Err(error) = rustix::io::write(&self.bell, &1u64.to_ne_bytes()) {
            tracing::error!(%error, "a mailbox cannot be rung");
        }
    }

    /// Makes the bell silent, to look at what came and then to wait.
    pub fn hush(&self) {
        // Fails only when it is silent.
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
    }

    /// Puts an order in. One that is there already is replaced: the keeper asks one at a time.
    pub fn put_order(&self, order: PuppetOrder) {
        self.letters().order = Some(order);
        self.ring();
    }

    /// Takes the order.
    pub fn take_order(&self) -> Option<PuppetOrder> {
        let mut letters = self.letters();
        let order = letters.order.take();
        letters.is_working |= order.is_some();
        order
    }

    /// Whether an order waits, or the guest is to finish.
    pub fn should_stop_counting(&self) -> bool {
        let letters = self.letters();
        letters.order.is_some() || letters.should_finish
    }

    /// The result of the order that was taken is there: true the first time.
    pub fn take_working(&self) -> bool {
        std::mem::take(&mut self.letters().is_working)
    }

    /// A clone begins, or begins again: nothing that came since counts, and whatever order its source
    /// was at, this guest is at it too.
    pub fn begin_again(&self) {
        *self.letters() = Letters { is_working: true, ..Letters::default() };
    }

    /// Says that the guest's reset cannot be.
    pub fn refuse_reset(&self) {
        self.letters().is_reset_refused = true;
        self.ring();
    }

    /// Whether that was said: true the first time.
    pub fn take_refusal(&self) -> bool {
        std::mem::take(&mut self.letters().is_reset_refused)
    }

    /// Puts the result of a fork in.
    pub fn put_fork(&self, clone: Option<VmId>) {
        self.letters().fork = Some(clone);
        self.ring();
    }

    /// Takes the result of a fork.
    pub fn take_fork(&self) -> Option<Option<VmId>> {
        self.letters().fork.take()
    }

    /// Tells the guest to finish.
    pub fn finish(&self) {
        self.letters().should_finish = true;
        self.ring();
    }

    /// Whether the guest is to finish.
    pub fn should_finish(&self) -> bool {
        self.letters().should_finish
    }
}

/// Rings when a guest wants to be reset.
pub struct ResetBell {
    bell: OwnedFd,
    /// The vCPU that asked last.
    asked_by: AtomicUsize,
    /// When, in nanoseconds of `CLOCK_MONOTONIC`.
    asked_at: AtomicU64,
}

impl ResetBell {
    pub(super) fn new() -> std::io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { bell, asked_by: AtomicUsize::new(0), asked_at: AtomicU64::new(0) })
    }

    pub(super) fn ring(&self, vcpu: usize) {
        // Relaxed: the bell orders it.
        self.asked_at.store(monotonic_ns(), Ordering::Relaxed);
        self.asked_by.store(vcpu, Ordering::Relaxed);
        if let Err(error) = rustix::io::write(&self.bell, &1u64.to_ne_bytes()) {
            tracing::error!(%error, "a guest's wish to be reset is lost");
        }
    }

    /// The vCPU that has asked since the last look, and when.
    pub(super) fn take(&self) -> Option<(usize, u64)> {
        let is_rung = rustix::io::read(&self.bell, &mut [0; 8]).is_ok();
        is_rung.then(|| (self.asked_by.load(Ordering::Relaxed), self.asked_at.load(Ordering::Relaxed)))
    }
}

impl AsFd for ResetBell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

impl AsFd for Mailbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
