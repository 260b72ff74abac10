//! The engine's threads: workers prepare requests and move chunks when they are due, one completer
//! writes completion records inside the gate. All waiting is on condition variables, so that a stop
//! ends it at once.
//!
//! Completions have a thread of their own because the gate may be held: the workers must go on then.

use std::cmp::Ordering as Order;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use salp_protocol::dma::{Descriptor, error, flag, operation, status};

use super::request::{self, Request, Work};
use super::{BackingKind, InFlight, SavedBuffer, Shared, Slot, entry};
use crate::devices::backing::BackingError;
use crate::devices::memory::{Buffer, Span};
use crate::devices::{Access, RamError, lock};
use crate::failure;
use crate::words::{Gpa, PAGE_BYTES, index};

const WORKERS: usize = 2;

/// Something for a worker.
pub(super) enum Job {
    /// Pin the registered buffers of a restored engine, then issue its requests.
    Revive,
    /// Check, pin and plan a request.
    Prepare(u64),
    /// Move what is due.
    Step(Box<Request>),
}

struct Timed {
    due: Instant,
    /// First come, first served among equals.
    order: u64,
    job: Job,
}

/// The jobs that wait for a worker or their time.
#[derive(Default)]
pub(super) struct Jobs {
    heap: BinaryHeap<Timed>,
    next_order: u64,
}

/// A transfer that is over, well or not.
pub(super) struct Outcome {
    pub(super) number: u64,
    pub(super) flags: u16,
    pub(super) status: u32,
    /// What holds its pins and plans; `None` if it never got any.
    pub(super) request: Option<Box<Request>>,
}

/// The transfers that wait for their completion record.
#[derive(Default)]
pub(super) struct Ended(VecDeque<Outcome>);

#[cfg(test)]
impl Jobs {
    pub(super) fn len(&self) -> usize {
        self.heap.len()
    }
}

impl Ord for Timed {
    fn cmp(&self, other: &Self) -> Order {
        // The heap gives its greatest first: that is the earliest.
        (other.due, other.order).cmp(&(self.due, self.order))
    }
}

impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<Order> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Order::Equal
    }
}

impl Eq for Timed {}

/// Starts the threads that are not there yet: the completer first.
pub(super) fn spawn(shared: &Arc<Shared>, threads: &mut Vec<JoinHandle<()>>) -> std::io::Result<()> {
    while threads.len() <= WORKERS {
        let shared = Arc::clone(shared);
        failure::point("dma.thread")?;
        let thread = if threads.is_empty() {
            Builder::new().name("dma-completer".into()).spawn(move || shared.complete_all())
        } else {
            Builder::new().name("dma-worker".into()).spawn(move || shared.work())
        };
        threads.push(thread?);
    }
    Ok(())
}

impl Shared {
    pub(super) fn stopped(&self) -> bool {
        // Pairs with the release store in `stop`.
        self.stop.load(Ordering::Acquire)
    }

    /// Tells every thread to end. Locks are taken around the wake-ups so that nobody who has just
    /// looked at the flag misses them.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        {
            let _jobs = lock(&self.jobs);
            self.job_queued.notify_all();
        }
        {
            let _ended = lock(&self.ended);
            self.transfer_ended.notify_all();
        }
        self.gate.wake();
    }

    /// After the threads have ended: ends the kernel's transfers, then drops all pins and plans.
    pub(super) fn drop_work(&self) {
        self.stop_kernel();
        drop(std::mem::take(&mut *lock(&self.jobs)));
        drop(std::mem::take(&mut *lock(&self.ended)));
        let mut core = lock(&self.core);
        let slots = std::mem::replace(&mut core.slots, [const { Slot::Free }; _]);
        let in_flight = std::mem::take(&mut core.in_flight);
        for slot in &slots {
            if let Slot::Ready(buffer) = slot {
                self.ring_buffer_bell(false, buffer);
            }
        }
        drop(core);
        drop((slots, in_flight));
    }

    /// Says that a buffer is registered now, or is not any more. Under the lock of the slots, so that what
    /// is told has the order of what happens.
    pub(super) fn ring_buffer_bell(&self, is_registered: bool, buffer: &Buffer) {
        if let Some(bell) = self.buffer_bell.get() {
            bell(is_registered, u32::try_from(buffer.len_bytes / PAGE_BYTES).unwrap_or(u32::MAX));
        }
    }

    pub(super) fn queue(&self, job: Job) {
        self.queue_at(Instant::now(), job);
    }

    fn queue_at(&self, due: Instant, job: Job) {
        let mut jobs = lock(&self.jobs);
        let order = jobs.next_order;
        jobs.next_order += 1;
        jobs.heap.push(Timed { due, order, job });
        drop(jobs);
        self.job_queued.notify_one();
    }

    /// A worker's life.
    fn work(self: &Arc<Self>) {
        while let Some(job) = self.next_job() {
            match job {
                Job::Revive => self.revive(),
                Job::Prepare(number) => self.begin(number),
                Job::Step(request) => self.step(request),
            }
        }
    }

    /// Waits for a job that is due, `None` at stop.
    fn next_job(&self) -> Option<Job> {
        let mut jobs = lock(&self.jobs);
        loop {
            if self.stopped() {
                return None;
            }
            let now = Instant::now();
            let due = jobs.heap.peek().map(|timed| timed.due);
            jobs = match due {
                Some(due) if due <= now => return jobs.heap.pop().map(|timed| timed.job),
                Some(due) => {
                    let wait = self.job_queued.wait_timeout(jobs, due - now);
                    wait.unwrap_or_else(PoisonError::into_inner).0
                }
                None => {
                    let wait = self.job_queued.wait(jobs);
                    wait.unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
    }

    /// Makes a restored engine live. Two at once do no harm: the later pin is dropped.
    fn revive(&self) {
        loop {
            let mut core = lock(&self.core);
            if core.live {
                return;
            }
            let next = core.slots.iter().enumerate().find_map(|(number, slot)| match slot {
                Slot::Restoring(saved) => Some((number, *saved)),
                _ => None,
            });
            let Some((number, saved)) = next else {
                core.live = true;
                let numbers: Vec<u64> = core.in_flight.keys().copied().collect();
                drop(core);
                for number in numbers {
                    self.queue(Job::Prepare(number));
                }
                return;
            };
            drop(core);
            self.revive_slot(number, saved);
        }
    }

    fn revive_slot(&self, number: usize, saved: SavedBuffer) {
        let access = Access::ReadWrite;
        let pinned = Buffer::pin(&*self.ram, saved.gpa, saved.len_bytes, access, &self.pins);
        let mut core = lock(&self.core);
        if !matches!(core.slots[number], Slot::Restoring(_)) {
            return;
        }
        core.slots[number] = match pinned {
            Ok(buffer) => {
                self.ring_buffer_bell(true, &buffer);
                Slot::Ready(buffer)
            }
            Err(error) => {
                tracing::warn!(slot = number, %error, "a clone's DMA buffer cannot be pinned");
                core.registers.error = error::PIN;
                Slot::Free
            }
        };
    }

    fn begin(self: &Arc<Self>, number: u64) {
        let (descriptor, prepared) = {
            let core = lock(&self.core);
            let Some(request) = core.in_flight.get(&number) else {
                return;
            };
            let descriptor = request.descriptor;
            let sides = Sides::new(request, &core.slots);
            let (delay_us, rate) = (core.registers.delay_us, core.registers.rate);
            let duration = request::duration(delay_us, rate, index(descriptor.length.into()));
            drop(core);
            (descriptor, self.prepare(&descriptor, &sides).map(|work| (work, duration)))
        };
        match prepared {
            Ok((work, duration)) => self.requeue(Box::new(Request {
                number,
                flags: descriptor.flags,
                len_bytes: index(descriptor.length.into()),
                moved_bytes: 0,
                began: Instant::now(),
                duration,
                work,
            })),
            Err(status) => self.end(Outcome { number, flags: descriptor.flags, status, request: None }),
        }
    }

    fn requeue(&self, request: Box<Request>) {
        self.queue_at(request.next_due(), Job::Step(request));
    }

    /// Pins and plans; an error is the request's status.
    fn prepare(&self, descriptor: &Descriptor, sides: &Sides) -> Result<Work, u32> {
        let order = request::check(descriptor)?;
        if sides.lost {
            return Err(status::LOST_AT_FORK);
        }
        let len_bytes = index(descriptor.length.into());
        let read = descriptor.operation == operation::READ;
        match (order, &self.backing) {
            (request::Order::Copy { from, to }, _) => {
                let (from, to) = self.pin_copy(sides, from, to, len_bytes)?;
                Ok(Work::Copy { from, to })
            }
            (request::Order::Read { offset, to }, BackingKind::Storage(backing)) => {
                let plan = backing.plan_read(offset, len_bytes).map_err(backing_status)?;
                let to = self.pin(sides, to, len_bytes, Access::ReadWrite)?;
                Ok(Work::Read { plan, to })
            }
            (request::Order::Write { from, offset }, BackingKind::Storage(backing)) => {
                let plan = backing.plan_write(offset, len_bytes).map_err(backing_status)?;
                let from = self.pin(sides, from, len_bytes, Access::Read)?;
                Ok(Work::Write { plan, from })
            }
            (_, BackingKind::Lost) => Err(status::LOST_AT_FORK),
            (
                request::Order::Read { to: guest, .. } | request::Order::Write { from: guest, .. },
                BackingKind::Pipe(..),
            ) => {
                let access = if read { Access::ReadWrite } else { Access::Read };
                let span = self.pin(sides, guest, len_bytes, access)?;
                Ok(Work::Pipe { span, read })
            }
        }
    }

    /// The guest side of a READ or WRITE.
    fn pin(&self, sides: &Sides, gpa: Gpa, len_bytes: usize, access: Access) -> Result<Span, u32> {
        match (&sides.buffer, sides.registered) {
            (Some(buffer), true) => buffer.span(gpa, len_bytes).ok_or(status::OUT_OF_RANGE),
            (None, true) => Err(status::INVALID),
            (_, false) => self.pin_shortly(gpa, len_bytes, access),
        }
    }

    fn pin_shortly(&self, gpa: Gpa, len_bytes: usize, access: Access) -> Result<Span, u32> {
        let buffer = Buffer::pin(&*self.ram, gpa, len_bytes, access, &self.pins);
        let span = buffer.map_err(ram_status)?.span(gpa, len_bytes);
        span.ok_or(status::OUT_OF_RANGE)
    }

    /// Both sides of a COPY: one at least is in the registered buffer, if there is one.
    fn pin_copy(&self, sides: &Sides, from: Gpa, to: Gpa, len_bytes: usize) -> Result<(Span, Span), u32> {
        let inside = |gpa| sides.buffer.as_ref().and_then(|b| b.span(gpa, len_bytes));
        let (source, destination) = match (sides.registered, &sides.buffer) {
            (true, None) => return Err(status::INVALID),
            (true, Some(_)) => (inside(from), inside(to)),
            (false, _) => (None, None),
        };
        if sides.registered && source.is_none() && destination.is_none() {
            return Err(status::OUT_OF_RANGE);
        }
        let or_pin = |span: Option<Span>, gpa, access| match span {
            Some(span) => Ok(span),
            None => self.pin_shortly(gpa, len_bytes, access),
        };
        let source = or_pin(source, from, Access::Read)?;
        Ok((source, or_pin(destination, to, Access::ReadWrite)?))
    }

    fn step(self: &Arc<Self>, mut request: Box<Request>) {
        if request.by_kernel() {
            return self.give_to_kernel(request);
        }
        match request.step(Instant::now()) {
            Ok(()) if !request.is_moved() => self.requeue(request),
            Ok(()) => self.finish(request, status::OK),
            Err(error) => {
                tracing::warn!(number = request.number, %error, "a DMA transfer failed");
                self.finish(request, status::FAILED);
            }
        }
    }

    /// The data of `request` is in place, or never will be.
    pub(super) fn finish(&self, request: Box<Request>, status: u32) {
        let (number, flags) = (request.number, request.flags);
        self.end(Outcome { number, flags, status, request: Some(request) });
    }

    fn end(&self, outcome: Outcome) {
        lock(&self.ended).0.push_back(outcome);
        self.transfer_ended.notify_one();
    }

    /// The completer's life.
    fn complete_all(&self) {
        loop {
            let mut ended = lock(&self.ended);
            while ended.0.is_empty() && !self.stopped() {
                let wait = self.transfer_ended.wait(ended);
                ended = wait.unwrap_or_else(PoisonError::into_inner);
            }
            let outcome = ended.0.pop_front();
            drop(ended);
            match outcome {
                Some(outcome) if !self.stopped() => self.complete(outcome),
                _ => return,
            }
        }
    }

    /// Writes one completion record, unless the engine is stopped first.
    fn complete(&self, outcome: Outcome) {
        let Some(inside) = self.gate.enter_unless(&self.stop) else {
            return;
        };
        let moved_bytes = outcome.request.as_ref().map_or(0, |r| r.moved_bytes);
        let (status, pins) = match outcome.request {
            Some(request) => commit(*request, outcome.status),
            None => (outcome.status, Remains(None, None)),
        };
        let registers = {
            let mut core = lock(&self.core);
            core.storing = 1;
            core.registers
        };
        let stored = entry(&registers, outcome.number).is_some_and(|gpa| {
            // A transfer has at most 1 MiB.
            let result = u32::try_from(moved_bytes).unwrap_or(u32::MAX);
            let place = |offset| Gpa(gpa.0.saturating_add(offset));
            let written = self.ram.write(place(request::RESULT_OFFSET), &result.to_le_bytes());
            let stored = self.ram.store_u32(place(request::STATUS_OFFSET), status);
            written.is_ok() && stored.is_ok()
        });
        // Before the count, so that whoever sees the completion finds it counted.
        self.count(status, moved_bytes);
        let (interrupt, removed) = {
            let mut core = lock(&self.core);
            core.storing = 0;
            core.registers.completed = core.registers.completed.wrapping_add(1);
            if !stored {
                core.registers.error = error::VALUE;
            }
            (core.registers.interrupt, core.in_flight.remove(&outcome.number))
        };
        if outcome.flags & flag::INTERRUPT != 0 && interrupt & 0x100 != 0 {
            let [vector, ..] = interrupt.to_le_bytes();
            self.interrupt.raise(vector);
        }
        drop(inside);
        // Pins end outside the gate: that may take the memory manager's locks.
        drop((pins, removed));
    }

    fn count(&self, status: u32, moved_bytes: usize) {
        if status == status::OK {
            self.transfers.fetch_add(1, Ordering::Relaxed);
            let bytes = crate::words::wide(moved_bytes);
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
        } else {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// What `Shared::prepare` needs to know of a request's memory.
struct Sides {
    registered: bool,
    buffer: Option<Arc<Buffer>>,
    lost: bool,
}

impl Sides {
    fn new(request: &InFlight, slots: &[Slot]) -> Self {
        let asked = request.descriptor.flags & flag::REGISTERED != 0;
        let in_slot = match slots.get(index(request.descriptor.slot.into())) {
            Some(Slot::Ready(buffer)) if asked && !request.detached => Some(buffer),
            _ => None,
        };
        let buffer = request.buffer.as_ref().or(in_slot).cloned();
        Self {
            // A buffer unregistered before a fork is gone in the clone; its requests are not.
            registered: asked && (buffer.is_some() || !request.detached),
            buffer,
            lost: request.lost,
        }
    }
}

/// What is pinned and planned still when a request is completed.
struct Remains(#[expect(dead_code)] Option<Work>, #[expect(dead_code)] Option<Span>);

/// Makes a finished write part of the backing. Returns the request's status.
fn commit(request: Request, status: u32) -> (u32, Remains) {
    let number = request.number;
    match request.work {
        Work::Write { plan, from } if status == status::OK => {
            let status = match plan.commit() {
                Ok(()) => status::OK,
                Err(error) => {
                    tracing::warn!(number, %error, "a DMA write cannot be committed");
                    status::FAILED
                }
            };
            (status, Remains(None, Some(from)))
        }
        work => (status, Remains(Some(work), None)),
    }
}

fn ram_status(error: RamError) -> u32 {
    match error {
        RamError::OutOfRange { .. } => status::OUT_OF_RANGE,
        RamError::Host { .. } => {
            tracing::warn!(%error, "guest memory cannot be pinned for DMA");
            status::FAILED
        }
    }
}

fn backing_status(error: BackingError) -> u32 {
    if matches!(error, BackingError::OutOfRange { .. }) {
        return status::OUT_OF_RANGE;
    }
    tracing::warn!(%error, "the backing cannot take a DMA transfer");
    status::FAILED
}
