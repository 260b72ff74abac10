//! The completion gate: while a cut is taken, no device tells the guest that anything is done.
//!
//! Every completion record (a change of the backing's map, result and status, completed count,
//! interrupt) is written between [`CompletionGate::enter`] and the drop of what it returns. A cut
//! calls [`CompletionGate::hold`], which keeps new writers out and waits for those inside. Until
//! the returned [`HeldGate`] is dropped, saved device state, memory and interrupt state agree: a
//! request is completed in all of them or in none. Transfers go on; only completions wait.
//!
//! # Why this cannot deadlock
//! A writer inside the gate does a bounded amount of work and waits for three things at most: a
//! device's or the backing's lock (whose holders never enter the gate and never touch guest
//! memory), a page of guest memory (resolved by the fault reader, which knows no gate and is not
//! stopped before the gate is held), the interrupt (which must not wait for a vCPU, see
//! [`InterruptLine`](super::InterruptLine)). So `hold` returns. A writer that waits outside holds no
//! lock and so stands in nobody's way; it comes in when the cut is over, or gives up when its device is
//! stopped ([`CompletionGate::enter_unless`]). Holders do not exclude each other. A writer must
//! not enter twice: the second entry would wait for a holder that waits for the first.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::lock;

#[derive(Debug, Default)]
struct Counts {
    /// Writers inside.
    inside: usize,
    /// Cuts that hold the gate, or wait for writers to leave.
    holders: usize,
}

/// The gate. One for all devices of a VM.
#[derive(Debug, Default)]
pub struct CompletionGate {
    counts: Mutex<Counts>,
    /// Signalled when `inside` or `holders` becomes 0, and by [`CompletionGate::wake`].
    changed: Condvar,
}

/// A writer's stay inside the gate; it leaves when this is dropped.
#[derive(Debug)]
#[must_use]
pub struct Entered<'a> {
    gate: &'a CompletionGate,
}

/// The gate is held: nobody is inside until this is dropped.
#[derive(Debug)]
#[must_use]
pub struct HeldGate {
    gate: Arc<CompletionGate>,
}

impl CompletionGate {
    /// An open gate.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Goes inside, after waiting for all holders to release.
    pub fn enter(&self) -> Entered<'_> {
        self.enter_unless(&AtomicBool::new(false))
            .expect("nobody can set a flag that only this function knows")
    }

    /// Goes inside, or returns `None` once `stop` is set. Whoever sets it then calls
    /// [`CompletionGate::wake`].
    pub fn enter_unless(&self, stop: &AtomicBool) -> Option<Entered<'_>> {
        let mut counts = lock(&self.counts);
        loop {
            // Pairs with the release store before `wake`.
            if stop.load(Ordering::Acquire) {
                return None;
            }
            if counts.holders == 0 {
                counts.inside += 1;
                return Some(Entered { gate: self });
            }
            counts = self.changed.wait(counts).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Makes waiting writers look at their stop flags.
    pub fn wake(&self) {
        // Taking the lock closes the gap between a writer's look at its flag and its wait.
        let _counts = lock(&self.counts);
        self.changed.notify_all();
    }

    /// Keeps writers out from now on, and returns when the last one inside has left.
    pub fn hold(self: &Arc<Self>) -> HeldGate {
        let mut counts = lock(&self.counts);
        counts.holders += 1;
        while counts.inside > 0 {
            counts = self.changed.wait(counts).unwrap_or_else(PoisonError::into_inner);
        }
        HeldGate { gate: Arc::clone(self) }
    }
}

impl HeldGate {
    /// Whether this holds `gate` (and not that of another VM).
    #[must_use]
    pub fn holds(&self, gate: &Arc<CompletionGate>) -> bool {
        Arc::ptr_eq(&self.gate, gate)
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut counts = lock(&self.gate.counts);
        counts.inside -= 1;
        if counts.inside == 0 {
            self.gate.changed.notify_all();
        }
    }
}

impl Drop for HeldGate {
    fn drop(&mut self) {
        let mut counts = lock(&self.gate.counts);
        counts.holders -= 1;
        if counts.holders == 0 {
            self.gate.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[test]
    fn nobody_is_inside_while_held() {
        let gate = CompletionGate::new();
        let inside = Arc::new(AtomicUsize::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = (0..3)
            .map(|_| {
                let (gate, inside, stop) = (gate.clone(), inside.clone(), stop.clone());
                thread::spawn(move || {
                    let mut entries = 0;
                    while let Some(entered) = gate.enter_unless(&stop) {
                        inside.fetch_add(1, Ordering::SeqCst);
                        thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(entered);
                        entries += 1;
                    }
                    entries
                })
            })
            .collect();
        for _ in 0..200 {
            let held = gate.hold();
            for _ in 0..20 {
                assert_eq!(inside.load(Ordering::SeqCst), 0);
                thread::yield_now();
            }
            drop(held);
        }
        let held = gate.hold();
        stop.store(true, Ordering::Release);
        gate.wake();
        for writer in writers {
            let entries: u64 = writer.join().expect("a writer does not panic");
            tracing::debug!(entries);
        }
        drop(held);
    }

    #[test]
    fn a_writer_waits_for_the_last_holder() {
        let gate = CompletionGate::new();
        let (first, second) = (gate.hold(), gate.hold());
        assert!(first.holds(&gate) && !first.holds(&CompletionGate::new()));
        let (send, receive) = mpsc::channel();
        let writer = thread::spawn({
            let gate = gate.clone();
            move || {
                let _entered = gate.enter();
                send.send(()).expect("the test waits for this");
            }
        });
        drop(first);
        assert_eq!(lock(&gate.counts).holders, 1);
        assert!(receive.try_recv().is_err());
        drop(second);
        receive.recv().expect("the writer enters once the gate is open");
        writer.join().expect("the writer does not panic");
    }
}
