//! The DMA engine, driven by a puppet through its registers and its ring: a test decides each
//! transfer, on either guest.

use std::time::Instant;

use salp::family::VmId;
use salp::member::messages::PuppetOrder;
use salp::words::{Gfn, Gpa};
use salp_protocol::dma::{error, operation, register, status};
use salp_protocol::order;

use crate::world::{LIMIT, World};

/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: u64 = 64;
/// Entries of the ring.
const ENTRIES: u64 = 64;

/// A transfer.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// An [`operation`].
    pub operation: u16,
    /// [`flag`](salp_protocol::dma::flag)s.
    pub flags: u16,
    /// Bytes.
    pub length: u32,
    /// Source: see [`Descriptor`](salp_protocol::dma::Descriptor).
    pub source: u64,
    /// Destination.
    pub destination: u64,
    /// The slot of a registered buffer.
    pub slot: u32,
}

impl Transfer {
    /// From the disk to memory.
    #[must_use]
    pub fn read(disk: u64, memory: Gpa, length: u32) -> Self {
        Self { operation: operation::READ, flags: 0, length, source: disk, destination: memory.0, slot: 0 }
    }

    /// From memory to the disk.
    #[must_use]
    pub fn write(memory: Gpa, disk: u64, length: u32) -> Self {
        Self { operation: operation::WRITE, flags: 0, length, source: memory.0, destination: disk, slot: 0 }
    }
}

/// The engine of the VMs of a world: the ring is in memory, so that a clone has it too.
#[derive(Clone, Copy)]
pub struct Engine<'a> {
    world: &'a World,
    ring: Gpa,
}

/// A transfer that was submitted, in a VM and its clones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Submitted(u64);

impl<'a> Engine<'a> {
    /// Sets the ring of `vm` up, in a page of its own.
    #[track_caller]
    pub fn set_up(world: &'a World, vm: VmId, ring: Gfn) -> Self {
        let engine = Self { world, ring: ring.gpa() };
        engine.configure(vm, register::RING_BASE, engine.ring.0);
        engine.configure(vm, register::RING_ENTRIES, ENTRIES);
        engine
    }

    /// The engine whose ring is there already.
    #[must_use]
    pub fn again(world: &'a World, ring: Gfn) -> Self {
        Self { world, ring: ring.gpa() }
    }

    /// Writes a register, which must not refuse the value.
    #[track_caller]
    pub fn configure(&self, vm: VmId, register: u64, value: u64) {
        self.world.run(vm, order::DMA_WRITE, register, value);
        let refused = self.read(vm, register::ERROR);
        assert_eq!(refused, error::NONE, "{vm}: register {register:#x} refuses {value:#x}");
    }

    /// Reads a register.
    #[track_caller]
    #[must_use]
    pub fn read(&self, vm: VmId, register: u64) -> u64 {
        self.world.run(vm, order::DMA_READ, register, 0)
    }

    /// Registers pages as the buffer of `slot`.
    #[track_caller]
    pub fn register(&self, vm: VmId, slot: u32, first: Gfn, pages: u64) {
        self.configure(vm, register::BUFFER_BASE, first.gpa().0);
        self.configure(vm, register::BUFFER_LENGTH, pages * 4096);
        self.configure(vm, register::BUFFER_REGISTER, u64::from(slot));
    }

    /// Submits a transfer.
    #[track_caller]
    pub fn submit(&self, vm: VmId, transfer: &Transfer) -> Submitted {
        let tail = self.read(vm, register::DOORBELL);
        self.describe(vm, tail, transfer);
        self.configure(vm, register::DOORBELL, tail + 1);
        Submitted(tail)
    }

    /// Writes a transfer into the ring, and tells nobody.
    #[track_caller]
    fn describe(&self, vm: VmId, number: u64, transfer: &Transfer) {
        let at = self.ring.0 + number % ENTRIES * DESCRIPTOR_BYTES;
        let Transfer { operation, flags, length, source, destination, slot } = *transfer;
        let head = u64::from(operation) | u64::from(flags) << 16 | u64::from(length) << 32;
        // The rest: slot, cookie, result and status (pending), padding.
        for (word, value) in (0..).zip([head, source, destination, u64::from(slot), 0, 0, 0, 0]) {
            self.world.store(vm, Gpa(at + 8 * word), value);
        }
    }

    /// Has the guest ring for ever, for transfers that are never over: `of` again and again, in a ring that
    /// is always full.
    #[track_caller]
    pub fn flood(&self, vm: VmId, of: &[Transfer]) {
        for (number, transfer) in (0..ENTRIES).zip(of.iter().cycle()) {
            self.describe(vm, number, transfer);
        }
        self.flood_on(vm);
    }

    /// As [`flood`](Self::flood), with what is in the ring.
    #[track_caller]
    pub fn flood_on(&self, vm: VmId) {
        let order = PuppetOrder { order: order::DMA_FLOOD, a: ENTRIES, b: 64, ..PuppetOrder::default() };
        self.world.begin(vm, 0, order);
    }

    /// The status of a transfer in a VM.
    #[track_caller]
    #[must_use]
    pub fn status(&self, vm: VmId, submitted: Submitted) -> u32 {
        let at = self.ring.0 + submitted.0 % ENTRIES * DESCRIPTOR_BYTES;
        let result_and_status = self.world.load(vm, Gpa(at + 40));
        u32::try_from(result_and_status >> 32).expect("half of a word")
    }

    /// Waits until a transfer is completed in a VM, well or not: its guest polls. Returns the status.
    #[track_caller]
    pub fn end(&self, vm: VmId, submitted: Submitted) -> u32 {
        let begun = Instant::now();
        loop {
            match self.status(vm, submitted) {
                status::PENDING => assert!(begun.elapsed() < LIMIT, "{vm}: {submitted:?} does not complete"),
                status => return status,
            }
        }
    }

    /// Waits until a transfer is completed in a VM.
    #[track_caller]
    pub fn complete(&self, vm: VmId, submitted: Submitted) {
        assert_eq!(self.end(vm, submitted), status::OK, "{vm}: {submitted:?}");
    }

    /// Does a transfer.
    #[track_caller]
    pub fn transfer(&self, vm: VmId, transfer: &Transfer) {
        let submitted = self.submit(vm, transfer);
        self.complete(vm, submitted);
    }
}
