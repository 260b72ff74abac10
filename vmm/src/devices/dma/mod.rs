//! The DMA engine of `salp_protocol::dma`: moves data between guest memory and a backing,
//! asynchronously, several transfers at once, completed in any order.
//!
//! # Life of a request
//! 1. *Doorbell*, on the vCPU's thread: descriptors up to the new tail are read, once, and queued.
//!    Never more are in flight than the ring has entries, so a guest cannot make the engine grow.
//! 2. *Preparation*, on a worker: the allegations are checked, the guest side is pinned (or found in
//!    a registered buffer), the backing's side is planned (`backing.rs`).
//! 3. *Transfer*: by a worker in chunks spread over the transfer's duration, or (flag KERNEL, pipes)
//!    by the host kernel in `kernel.rs` when the duration is over.
//! 4. *Completion*, on the completer, inside the [gate](super::gate): the write is committed to the
//!    backing, result and status are stored, the count grows, the interrupt is raised. Then the
//!    pins go.
//!
//! At a cut [`DmaEngine::save`] records the requests between 1 and 4. The source goes on with them;
//! [`DmaEngine::restore`] and [`DmaEngine::start`] do them again for the clone, from the beginning,
//! on the clone's memory and on the backing frozen at the cut. That is right because no step before
//! the completion is visible in the backing, and no request overwrites what it reads.
//!
//! | module | what |
//! |---|---|
//! | `registers` | MMIO, doorbell, buffer slots |
//! | `request` | a descriptor's checks, a transfer's steps |
//! | `workers` | queue, worker threads, completer |
//! | `kernel` | the io_uring thread |
//! | `state` | what a cut saves |
//!
//! # Caveats
//! A guest that changes memory which a request is to read, while it is in flight, gets any mixture;
//! after a fork the clone's transfer may read other bytes than the source's. `COPY` must not overlap.
//! With `REGISTERED`, each side of a `COPY` that lies in the slot uses it, one at least must.
//! A 4-byte write changes half of a register.

mod kernel;
mod registers;
mod request;
mod state;
mod workers;

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread::JoinHandle;

use salp_protocol::dma::{BUFFER_SLOTS, Descriptor};

use super::backing::Backing;
use super::gate::{CompletionGate, HeldGate};
use super::memory::Buffer;
use super::{GuestRam, InterruptLine, lock};
use crate::words::Gpa;

pub use state::{DmaState, Registers, SavedBuffer, SavedRequest};

/// What is at the engine's other end.
#[derive(Clone)]
pub enum BackingKind {
    /// Storage.
    Storage(Arc<Backing>),
    /// A pair of pipe ends, for tests that decide when a transfer happens: READ takes bytes from
    /// the first, WRITE puts them into the second, both by the host kernel; offsets mean nothing.
    /// The pipes are in blocking mode.
    Pipe(Arc<File>, Arc<File>),
    /// A pipe that stayed with the source of a fork: every READ and WRITE ends LOST_AT_FORK.
    Lost,
}

/// What the engine has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DmaCounters {
    /// Transfers completed with status OK.
    pub transfers: u64,
    /// Transfers completed with another status.
    pub failed: u64,
    /// Bytes moved by transfers with status OK.
    pub bytes: u64,
}

/// Told of each buffer that a guest has pinned for long or let go of: whether it is registered now, and its
/// pages. Called with a lock of the engine held.
pub type BufferBell = Box<dyn Fn(bool, u32) + Send + Sync>;

/// A buffer slot.
enum Slot {
    Free,
    /// A vCPU is pinning it.
    Registering,
    /// To be pinned once the clone's memory is live.
    Restoring(SavedBuffer),
    Ready(Arc<Buffer>),
}

/// A request between doorbell and completion, as a cut sees it.
struct InFlight {
    descriptor: Descriptor,
    /// The buffer of its slot, as of the doorbell.
    buffer: Option<Arc<Buffer>>,
    detached: bool,
    lost: bool,
}

/// Everything that a cut saves, under one lock.
struct Core {
    registers: Registers,
    slots: [Slot; BUFFER_SLOTS],
    in_flight: BTreeMap<u64, InFlight>,
    /// The completer has stored a status and not counted it yet (0 or 1).
    storing: u64,
    /// Registered buffers are pinned, so requests may be issued.
    live: bool,
}

/// What all threads of an engine share.
struct Shared {
    ram: Arc<dyn GuestRam>,
    interrupt: Arc<dyn InterruptLine>,
    backing: BackingKind,
    gate: Arc<CompletionGate>,
    /// Set once, before everybody is woken.
    stop: AtomicBool,
    core: Mutex<Core>,
    jobs: Mutex<workers::Jobs>,
    /// A job was queued, or stop.
    job_queued: Condvar,
    ended: Mutex<workers::Ended>,
    /// A transfer ended, or stop.
    transfer_ended: Condvar,
    kernel: Mutex<Option<kernel::Handle>>,
    buffer_bell: OnceLock<BufferBell>,
    pins: Arc<AtomicUsize>,
    transfers: AtomicU64,
    failed: AtomicU64,
    bytes: AtomicU64,
}

/// The engine. Its threads start with the first doorbell (or [`DmaEngine::start`]) and end with
/// [`DmaEngine::stop`] or the drop.
pub struct DmaEngine {
    shared: Arc<Shared>,
    /// Held while descriptors are read, so that two vCPUs do not take the same ones.
    doorbell: Mutex<()>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl DmaEngine {
    /// An engine after reset.
    #[must_use]
    pub fn new(
        ram: Arc<dyn GuestRam>,
        interrupt: Arc<dyn InterruptLine>,
        backing: BackingKind,
        gate: Arc<CompletionGate>,
    ) -> Self {
        let engine = Self::restore(&DmaState::default(), ram, interrupt, backing, gate);
        lock(&engine.shared.core).live = true;
        engine
    }

    /// The engine of a clone. It touches no guest memory before [`DmaEngine::start`].
    #[must_use]
    pub fn restore(
        state: &DmaState,
        ram: Arc<dyn GuestRam>,
        interrupt: Arc<dyn InterruptLine>,
        backing: BackingKind,
        gate: Arc<CompletionGate>,
    ) -> Self {
        let in_flight = state.requests.iter().map(|saved| {
            let request = InFlight {
                descriptor: saved.descriptor(),
                buffer: None,
                detached: saved.detached,
                lost: saved.lost,
            };
            (saved.number, request)
        });
        let core = Core {
            registers: state.registers,
            slots: state.buffers.map(|buffer| buffer.map_or(Slot::Free, Slot::Restoring)),
            in_flight: in_flight.collect(),
            storing: 0,
            live: false,
        };
        let shared = Shared {
            ram,
            interrupt,
            backing,
            gate,
            stop: AtomicBool::new(false),
            core: Mutex::new(core),
            jobs: Mutex::default(),
            job_queued: Condvar::new(),
            ended: Mutex::default(),
            transfer_ended: Condvar::new(),
            kernel: Mutex::new(None),
            buffer_bell: OnceLock::new(),
            pins: Arc::default(),
            transfers: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        };
        Self { shared: Arc::new(shared), doorbell: Mutex::new(()), threads: Mutex::default() }
    }

    /// From now on `bell` is told of registered buffers. The first one stays.
    pub fn watch_buffers(&self, bell: BufferBell) {
        if self.shared.buffer_bell.set(bell).is_err() {
            tracing::error!("the buffers of a DMA engine are watched twice");
        }
    }

    /// Begins work: pins the registered buffers again and issues the uncompleted requests, on the
    /// engine's threads. To be called once the memory of a restored engine is live; harmless at any
    /// other time.
    ///
    /// # Errors
    /// The host's, when it cannot start a thread.
    pub fn start(&self) -> std::io::Result<()> {
        {
            let mut core = lock(&self.shared.core);
            let no_buffers = !core.slots.iter().any(|slot| matches!(slot, Slot::Restoring(_)));
            // An idle engine costs its clone no threads.
            core.live |= no_buffers && core.in_flight.is_empty();
            if core.live {
                return Ok(());
            }
        }
        self.ensure_threads()?;
        self.shared.queue(workers::Job::Revive);
        Ok(())
    }

    /// The engine's state for a clone. The gate must be held and the vCPUs stopped.
    ///
    /// # Panics
    /// If `held` holds the gate of another VM.
    #[must_use]
    pub fn save(&self, held: &HeldGate) -> DmaState {
        assert!(held.holds(&self.shared.gate), "the held gate is another VM's");
        let core = lock(&self.shared.core);
        let on_pipe = !matches!(self.shared.backing, BackingKind::Storage(_));
        let saved = |(number, request): (&u64, &InFlight)| {
            let copy = request.descriptor.operation == salp_protocol::dma::operation::COPY;
            let lost = request.lost || (on_pipe && !copy);
            SavedRequest::new(*number, &request.descriptor, request.detached, lost)
        };
        DmaState {
            registers: core.registers,
            requests: core.in_flight.iter().map(saved).collect(),
            buffers: std::array::from_fn(|slot| match &core.slots[slot] {
                Slot::Free | Slot::Registering => None,
                Slot::Restoring(buffer) => Some(*buffer),
                Slot::Ready(buffer) => Some(SavedBuffer { gpa: buffer.gpa, len_bytes: buffer.len_bytes }),
            }),
        }
    }

    /// Ends all work: transfers in flight are dropped uncompleted, all threads are joined, and when
    /// the host kernel has let go of the memory the pins are dropped. May be called while the gate
    /// is held. MMIO afterwards is safe and does nothing.
    pub fn stop(&self) {
        self.shared.stop();
        for thread in lock(&self.threads).drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the DMA engine panicked");
            }
        }
        self.shared.drop_work();
    }

    /// What has been done so far.
    #[must_use]
    pub fn counters(&self) -> DmaCounters {
        DmaCounters {
            transfers: self.shared.transfers.load(Ordering::Relaxed),
            failed: self.shared.failed.load(Ordering::Relaxed),
            bytes: self.shared.bytes.load(Ordering::Relaxed),
        }
    }

    /// Pins held now: registered buffers and transfers of unregistered memory.
    #[must_use]
    pub fn pins_held(&self) -> usize {
        self.shared.pins.load(Ordering::Acquire)
    }

    /// Requests taken and not completed.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        lock(&self.shared.core).in_flight.len()
    }

    fn ensure_threads(&self) -> std::io::Result<()> {
        let mut threads = lock(&self.threads);
        // Also those that could not be started the last time.
        if !self.shared.stopped() {
            workers::spawn(&self.shared, &mut threads)?;
        }
        Ok(())
    }
}

impl Drop for DmaEngine {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The address of ring entry `number`, `None` past the end of the address space.
fn entry(registers: &Registers, number: u64) -> Option<Gpa> {
    let position = number.checked_rem(registers.ring_entries)?;
    let offset = position.checked_mul(64)?;
    registers.ring_base.checked_add(offset).map(Gpa)
}

#[cfg(test)]
mod tests;
