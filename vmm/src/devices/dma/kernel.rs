//! Transfers by the host kernel: one thread that owns an io_uring with registered buffers.
//!
//! A buffer is registered when its first transfer arrives, and unregistered when it has no transfer
//! and no slot. The kernel pins its pages in between, and beyond: until the last transfer that used
//! it has been reaped. So each registration carries a tag, whose completion says that the kernel has
//! let go, and only then is the [`Buffer`] (the memory manager's pin) dropped.
//!
//! Caveat: registered memory counts against RLIMIT_MEMLOCK of an ordinary user; beyond it, transfers
//! end with status FAILED.
#![expect(unsafe_code, reason = "io_uring entries and registered buffers name memory by address")]

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};

use io_uring::{IoUring, opcode, squeue, types};
use rustix::event::{EventfdFlags, eventfd};
use salp_protocol::dma::status;

use super::request::{Request, Work};
use super::{BackingKind, Shared, Slot};
use crate::devices::lock;
use crate::devices::memory::Buffer;
use crate::words::wide;

/// Entries of the submission queue, and transfers' operations under way at most.
const OPERATIONS: usize = 256;
/// Room for every completion that can be outstanding: operations, cancellations, tags, the wake-up.
const COMPLETIONS: u32 = 1024;
/// Registered buffers at most; further transfers wait.
const BUFFERS: u32 = 64;

/// What a completion's `user_data` says it is, above a 32-bit number.
const KIND_SHIFT: u32 = 32;
const OPERATION: u64 = 0;
const TAG: u64 = 1;
const WAKE: u64 = 2;
const CANCEL: u64 = 3;

/// Offset that means "this file has no offsets" (a pipe).
const NO_OFFSET: u64 = u64::MAX;

/// To the kernel thread.
enum Message {
    Transfer(Box<Request>),
    /// A slot has been freed.
    Close,
}

/// The kernel thread, seen from the engine.
pub(super) struct Handle {
    inbox: Arc<Mutex<Vec<Message>>>,
    wake: Arc<OwnedFd>,
    thread: JoinHandle<()>,
}

impl Handle {
    fn send(&self, message: Message) {
        lock(&self.inbox).push(message);
        self.ring();
    }

    fn ring(&self) {
        // It cannot fail short of 2^64 - 1 wake-ups, and then the thread is awake.
        if let Err(error) = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes()) {
            tracing::debug!(%error, "waking the io_uring thread");
        }
    }
}

impl Shared {
    /// Hands a transfer to the kernel thread, which is started if it is the first.
    pub(super) fn give_to_kernel(self: &Arc<Self>, request: Box<Request>) {
        let mut kernel = lock(&self.kernel);
        if self.stopped() {
            return;
        }
        if kernel.is_none() {
            match spawn(self) {
                Ok(handle) => *kernel = Some(handle),
                Err(error) => {
                    tracing::warn!(%error, "no io_uring on this host");
                    return self.finish(request, status::FAILED);
                }
            }
        }
        if let Some(handle) = &*kernel {
            handle.send(Message::Transfer(request));
        }
    }

    /// A slot's buffer is no longer needed beyond its transfers.
    pub(super) fn close_in_kernel(&self) {
        if let Some(handle) = &*lock(&self.kernel) {
            handle.send(Message::Close);
        }
    }

    /// Joins the kernel thread. `stop` is set.
    pub(super) fn stop_kernel(&self) {
        let handle = lock(&self.kernel).take();
        if let Some(handle) = handle {
            handle.ring();
            if handle.thread.join().is_err() {
                tracing::error!("the io_uring thread of the DMA engine panicked");
            }
        }
    }
}

fn spawn(shared: &Arc<Shared>) -> io::Result<Handle> {
    let ring = IoUring::builder().setup_cqsize(COMPLETIONS).build(OPERATIONS as u32)?;
    ring.submitter().register_buffers_sparse(BUFFERS)?;
    let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let inbox = Arc::new(Mutex::new(Vec::new()));
    let engine = Ring {
        shared: Arc::clone(shared),
        inbox: Arc::clone(&inbox),
        wake: Arc::clone(&wake),
        ring,
        waiting: VecDeque::new(),
        registrations: (0..BUFFERS).map(|_| None).collect(),
        transfers: HashMap::new(),
        operations: HashMap::new(),
        unsubmitted: VecDeque::new(),
        to_cancel: Vec::new(),
        next_number: 0,
        armed: false,
        cancelled: false,
    };
    let thread = Builder::new().name("dma-kernel".into()).spawn(move || engine.run())?;
    Ok(Handle { inbox, wake, thread })
}

/// A buffer in the ring's table.
struct Registration {
    buffer: Arc<Buffer>,
    transfers: usize,
    /// Unregistered; its tag has not come yet.
    leaving: bool,
}

/// A request that the kernel works on.
struct Transfer {
    request: Box<Request>,
    registration: u32,
    operations: usize,
    failed: bool,
}

/// One entry's worth of a transfer; it shrinks when the kernel does a part.
struct Operation {
    transfer: u32,
    file: Arc<File>,
    offset: u64,
    at: usize,
    len_bytes: usize,
    write: bool,
}

struct Ring {
    shared: Arc<Shared>,
    inbox: Arc<Mutex<Vec<Message>>>,
    wake: Arc<OwnedFd>,
    ring: IoUring,
    /// Transfers that wait for a place among the registrations.
    waiting: VecDeque<Box<Request>>,
    registrations: Vec<Option<Registration>>,
    transfers: HashMap<u32, Transfer>,
    /// Operations, submitted or not.
    operations: HashMap<u32, Operation>,
    unsubmitted: VecDeque<u32>,
    to_cancel: Vec<u32>,
    next_number: u32,
    /// A poll of `wake` is outstanding.
    armed: bool,
    cancelled: bool,
}

const fn user_data(kind: u64, number: u32) -> u64 {
    kind << KIND_SHIFT | number as u64
}

impl Ring {
    fn run(mut self) {
        loop {
            self.take_messages();
            let stopping = self.shared.stopped();
            if stopping {
                self.cancel();
            } else {
                self.admit();
            }
            self.submit_entries();
            if stopping && self.operations.is_empty() {
                self.release_idle();
                if self.registrations.iter().all(Option::is_none) {
                    return;
                }
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if is_passing(&error) => {}
                Err(error) => {
                    tracing::error!(%error, "io_uring failed for good, its memory stays pinned");
                    // The kernel may still write to the pages: never unpin them.
                    return std::mem::forget(self);
                }
            }
            self.reap();
        }
    }

    fn take_messages(&mut self) {
        let messages = std::mem::take(&mut *lock(&self.inbox));
        for message in messages {
            match message {
                Message::Transfer(request) => self.waiting.push_back(request),
                Message::Close => self.release_idle(),
            }
        }
    }

    /// Starts the transfers that there is room for.
    fn admit(&mut self) {
        while let Some(request) = self.waiting.pop_front() {
            match self.register(request.buffer()) {
                Ok(Some(registration)) => self.begin(request, registration),
                Ok(None) => return self.waiting.push_front(request),
                Err(error) => {
                    tracing::warn!(%error, "a buffer cannot be registered with io_uring");
                    self.shared.finish(request, status::FAILED);
                }
            }
        }
    }

    /// Finds or makes the registration of a buffer; `None` if the table is full.
    fn register(&mut self, buffer: &Arc<Buffer>) -> io::Result<Option<u32>> {
        let mut free = None;
        for (number, registration) in (0..).zip(&self.registrations) {
            match registration {
                Some(r) if r.buffer.id == buffer.id && !r.leaving => return Ok(Some(number)),
                None => free = free.or(Some(number)),
                Some(_) => {}
            }
        }
        let Some(number) = free else {
            return Ok(None);
        };
        let vector = libc::iovec { iov_base: buffer.host().as_ptr().cast(), iov_len: buffer.len_bytes };
        // SAFETY: the range is pinned by `buffer`, which the registration holds until the kernel
        // has let go of it (its tag).
        unsafe {
            let submitter = self.ring.submitter();
            submitter.register_buffers_update(number, &[vector], Some(&[user_data(TAG, number)]))?;
        }
        self.registrations[number as usize] =
            Some(Registration { buffer: Arc::clone(buffer), transfers: 0, leaving: false });
        Ok(Some(number))
    }

    fn begin(&mut self, mut request: Box<Request>, registration: u32) {
        let pieces = match self.pieces(&mut request) {
            Ok(pieces) if !pieces.is_empty() => pieces,
            Ok(_) => {
                self.shared.finish(request, status::OK);
                return self.release_idle();
            }
            Err(status) => {
                self.shared.finish(request, status);
                return self.release_idle();
            }
        };
        let number = self.number();
        if let Some(Some(r)) = self.registrations.get_mut(registration as usize) {
            r.transfers += 1;
        }
        let transfer = Transfer { request, registration, operations: pieces.len(), failed: false };
        self.transfers.insert(number, transfer);
        for mut piece in pieces {
            piece.transfer = number;
            let operation = self.number();
            self.operations.insert(operation, piece);
            self.unsubmitted.push_back(operation);
        }
    }

    /// A number that no transfer and no operation has.
    fn number(&mut self) -> u32 {
        loop {
            self.next_number = self.next_number.wrapping_add(1);
            let number = self.next_number;
            if !self.operations.contains_key(&number) && !self.transfers.contains_key(&number) {
                return number;
            }
        }
    }

    /// What the kernel has to do for a request. Zeros are filled in here: they are in no file.
    fn pieces(&self, request: &mut Request) -> Result<Vec<Operation>, u32> {
        let (segments, write) = match &request.work {
            Work::Read { plan, .. } => (plan.segments(), false),
            Work::Write { plan, .. } => (plan.segments(), true),
            Work::Pipe { read, .. } => {
                let BackingKind::Pipe(source, sink) = &self.shared.backing else {
                    return Err(status::FAILED);
                };
                return Ok(vec![Operation {
                    transfer: 0,
                    file: Arc::clone(if *read { source } else { sink }),
                    offset: NO_OFFSET,
                    at: 0,
                    len_bytes: request.len_bytes,
                    write: !read,
                }]);
            }
            Work::Copy { .. } => return Err(status::INVALID),
        };
        let mut pieces = Vec::new();
        let mut zero_bytes = 0;
        for segment in segments {
            match &segment.place {
                Some((file, offset)) => pieces.push(Operation {
                    transfer: 0,
                    file: Arc::clone(file),
                    offset: *offset,
                    at: segment.at,
                    len_bytes: segment.len_bytes,
                    write,
                }),
                None => {
                    request.span().zero(segment.at, segment.len_bytes);
                    zero_bytes += segment.len_bytes;
                }
            }
        }
        request.moved_bytes += zero_bytes;
        Ok(pieces)
    }

    /// Fills the submission queue.
    fn submit_entries(&mut self) {
        if !self.armed {
            let poll = opcode::PollAdd::new(types::Fd(self.wake.as_raw_fd()), libc::POLLIN as u32);
            self.armed = self.push(&poll.build().user_data(user_data(WAKE, 0)));
        }
        while let Some(number) = self.to_cancel.pop() {
            let cancel = opcode::AsyncCancel::new(user_data(OPERATION, number));
            if !self.push(&cancel.build().user_data(user_data(CANCEL, number))) {
                return self.to_cancel.push(number);
            }
        }
        while let Some(number) = self.unsubmitted.pop_front() {
            let under_way = self.operations.len() - self.unsubmitted.len() - 1;
            let entry = self.entry(number);
            let pushed = under_way < OPERATIONS && entry.is_none_or(|entry| self.push(&entry));
            if !pushed {
                return self.unsubmitted.push_front(number);
            }
        }
    }

    fn entry(&self, number: u32) -> Option<squeue::Entry> {
        let operation = self.operations.get(&number)?;
        let transfer = self.transfers.get(&operation.transfer)?;
        let address = transfer.request.span().address(operation.at, operation.len_bytes).as_ptr();
        // A transfer has at most 1 MiB; the table has 64 places.
        let len_bytes = u32::try_from(operation.len_bytes).ok()?;
        let buffer = u16::try_from(transfer.registration).ok()?;
        let fd = types::Fd(operation.file.as_raw_fd());
        let entry = if operation.write {
            let entry = opcode::WriteFixed::new(fd, address, len_bytes, buffer);
            entry.offset(operation.offset).build()
        } else {
            let entry = opcode::ReadFixed::new(fd, address, len_bytes, buffer);
            entry.offset(operation.offset).build()
        };
        Some(entry.user_data(user_data(OPERATION, number)))
    }

    fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: what an entry names outlives it: the file is in `operations` and the memory
        // pinned by the transfer and the registration until the entry's completion was reaped; the
        // eventfd lives as long as the ring.
        unsafe { self.ring.submission().push(entry).is_ok() }
    }

    fn reap(&mut self) {
        let completions: Vec<(u64, i32)> =
            self.ring.completion().map(|completion| (completion.user_data(), completion.result())).collect();
        for (data, result) in completions {
            let [low, high] = [data & u64::from(u32::MAX), data >> KIND_SHIFT];
            let number = u32::try_from(low).unwrap_or(u32::MAX);
            match high {
                OPERATION => self.reaped(number, result),
                // The kernel has let go: the pin may end.
                TAG => self.released(number),
                WAKE => self.woken(),
                _ => {}
            }
        }
    }

    fn released(&mut self, number: u32) {
        if let Some(registration) = self.registrations.get_mut(number as usize) {
            *registration = None;
        }
    }

    fn woken(&mut self) {
        self.armed = false;
        let mut count = [0; 8];
        if let Err(error) = rustix::io::read(&*self.wake, &mut count) {
            tracing::debug!(%error, "reading the io_uring thread's wake-up");
        }
    }

    fn reaped(&mut self, number: u32, result: i32) {
        let Some(operation) = self.operations.get_mut(&number) else {
            return;
        };
        let Some(transfer) = self.transfers.get_mut(&operation.transfer) else {
            return;
        };
        let moved = usize::try_from(result).unwrap_or(0).min(operation.len_bytes);
        transfer.request.moved_bytes += moved;
        let retry = result == -libc::EINTR || (moved > 0 && moved < operation.len_bytes);
        if retry && !self.cancelled {
            operation.at += moved;
            operation.len_bytes -= moved;
            if operation.offset != NO_OFFSET {
                operation.offset += wide(moved);
            }
            return self.unsubmitted.push_back(number);
        }
        if moved < operation.len_bytes {
            transfer.failed = true;
            if !self.cancelled {
                let number = transfer.request.number;
                let error = io::Error::from_raw_os_error(result.saturating_neg());
                tracing::warn!(number, result, %error, "a DMA transfer by the kernel failed");
            }
        }
        let transfer = operation.transfer;
        self.operations.remove(&number);
        self.operation_ended(transfer);
    }

    fn operation_ended(&mut self, number: u32) {
        let Some(transfer) = self.transfers.get_mut(&number) else {
            return;
        };
        transfer.operations -= 1;
        if transfer.operations > 0 {
            return;
        }
        let Some(transfer) = self.transfers.remove(&number) else {
            return;
        };
        if let Some(Some(r)) = self.registrations.get_mut(transfer.registration as usize) {
            r.transfers -= 1;
        }
        if !self.cancelled {
            let status = if transfer.failed { status::FAILED } else { status::OK };
            self.shared.finish(transfer.request, status);
        }
        self.release_idle();
    }

    /// Unregisters the buffers that no transfer uses and no slot holds.
    fn release_idle(&mut self) {
        let in_slots: Vec<u64> = if self.cancelled {
            Vec::new()
        } else {
            let core = lock(&self.shared.core);
            let ids = core.slots.iter().filter_map(|slot| match slot {
                Slot::Ready(buffer) => Some(buffer.id),
                _ => None,
            });
            ids.collect()
        };
        for (number, place) in (0..).zip(&mut self.registrations) {
            let Some(registration) = place else {
                continue;
            };
            let idle = registration.transfers == 0 && !registration.leaving;
            if !idle || in_slots.contains(&registration.buffer.id) {
                continue;
            }
            let none = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
            // SAFETY: an empty entry takes a buffer out of the table; nothing new is registered.
            let result =
                unsafe { self.ring.submitter().register_buffers_update(number, &[none], Some(&[0])) };
            match result {
                Ok(()) => registration.leaving = true,
                Err(error) => {
                    tracing::error!(%error, "a buffer cannot be unregistered, it stays pinned");
                    std::mem::forget(place.take());
                }
            }
        }
    }

    /// Ends everything: what is not submitted is dropped, the rest cancelled, once.
    fn cancel(&mut self) {
        self.waiting.clear();
        if self.cancelled {
            return;
        }
        self.cancelled = true;
        let unsubmitted = std::mem::take(&mut self.unsubmitted);
        self.to_cancel =
            self.operations.keys().copied().filter(|number| !unsubmitted.contains(number)).collect();
        for number in unsubmitted {
            if let Some(operation) = self.operations.remove(&number) {
                self.operation_ended(operation.transfer);
            }
        }
    }
}

/// Whether the kernel asks to try again.
fn is_passing(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    [libc::EINTR, libc::EAGAIN, libc::EBUSY].map(Some).contains(&code)
}
