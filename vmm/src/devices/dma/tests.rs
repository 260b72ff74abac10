//! Tests of the engine over plain memory; those about forks are in `fork`.

mod fork;

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use salp_protocol::dma::{error, flag, operation, register, status};

use super::*;
use crate::devices::testing::{CountingLine, MemoryFiles, TestRam, has_io_uring};

/// The ring's entries in the tests.
const ENTRIES: u64 = 8;
const VECTOR: u8 = 0x40;
const RAM_BASE: u64 = 0x10_0000;
const RAM_PAGES: usize = 1024;
const RAM_END: u64 = RAM_BASE + (RAM_PAGES * 4096) as u64;
const RING: u64 = RAM_BASE;
/// Where the tests' data is.
const DATA: u64 = RAM_BASE + 0x1_0000;
const BACKING_BYTES: u64 = 8 << 20;
/// The longest delay: no transfer ends by itself during a test.
const FOREVER_US: u64 = 10_000_000;

/// An engine with a ring, and what is around it.
struct Machine {
    ram: Arc<TestRam>,
    line: Arc<CountingLine>,
    gate: Arc<CompletionGate>,
    files: Arc<MemoryFiles>,
    backing: BackingKind,
    engine: DmaEngine,
}

fn storage() -> (Arc<MemoryFiles>, BackingKind) {
    let files = Arc::new(MemoryFiles::default());
    let backing = Backing::new(None, BACKING_BYTES, files.clone()).expect("8 MiB are not much");
    (files, BackingKind::Storage(backing))
}

/// Bytes that differ from place to place.
fn pattern(seed: u8, len_bytes: usize) -> Vec<u8> {
    let mut value = u32::from(seed).wrapping_mul(0x9e37_79b9) | 1;
    let next = |_| {
        value = value.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        value.to_be_bytes()[0]
    };
    (0..len_bytes).map(next).collect()
}

fn descriptor(operation: u16, flags: u16, length: u32, from: u64, to: u64) -> Descriptor {
    Descriptor {
        operation,
        flags: flags | flag::INTERRUPT,
        length,
        source: from,
        destination: to,
        ..Descriptor::default()
    }
}

fn encode(d: &Descriptor) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(d.operation.to_le_bytes());
    bytes.extend(d.flags.to_le_bytes());
    bytes.extend(d.length.to_le_bytes());
    bytes.extend(d.source.to_le_bytes());
    bytes.extend(d.destination.to_le_bytes());
    bytes.extend(d.slot.to_le_bytes());
    bytes.extend(d.reserved.to_le_bytes());
    bytes.extend(d.cookie.to_le_bytes());
    bytes.extend(d.result.to_le_bytes());
    bytes.extend(d.status.to_le_bytes());
    bytes.extend(d.padding.iter().flat_map(|word| word.to_le_bytes()));
    bytes
}

impl Machine {
    fn with(files: Arc<MemoryFiles>, backing: BackingKind) -> Self {
        let ram = Arc::new(TestRam::new(RAM_BASE, RAM_PAGES));
        let (line, gate) = (CountingLine::new(), CompletionGate::new());
        let engine = DmaEngine::new(ram.clone(), line.clone(), backing.clone(), gate.clone());
        let machine = Self { ram, line, gate, files, backing, engine };
        machine.set(register::RING_BASE, RING);
        machine.set(register::RING_ENTRIES, ENTRIES);
        machine.set(register::INTERRUPT, u64::from(VECTOR) | 0x100);
        assert_eq!(machine.get(register::ERROR), error::NONE);
        machine
    }

    fn new() -> Self {
        let (files, backing) = storage();
        Self::with(files, backing)
    }

    fn set(&self, register: u64, value: u64) {
        self.engine.mmio_write(register, &value.to_le_bytes());
    }

    fn get(&self, register: u64) -> u64 {
        let mut bytes = [0; 8];
        self.engine.mmio_read(register, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Puts a descriptor into the ring and rings. Returns its number.
    fn submit(&self, descriptor: &Descriptor) -> u64 {
        let number = self.get(register::DOORBELL);
        self.ram.set(RING + number % ENTRIES * 64, &encode(descriptor));
        self.set(register::DOORBELL, number + 1);
        number
    }

    fn status(&self, number: u64) -> u32 {
        self.ram.load_u32(RING + number % ENTRIES * 64 + request::STATUS_OFFSET)
    }

    fn result(&self, number: u64) -> u32 {
        self.ram.load_u32(RING + number % ENTRIES * 64 + request::RESULT_OFFSET)
    }

    /// Waits for `count` completions in all.
    fn wait(&self, count: u64) {
        self.line.wait(VECTOR, crate::words::index(count));
    }

    /// Submits, waits, and returns the status. Nothing else may be in flight.
    fn run(&self, descriptor: &Descriptor) -> u32 {
        let number = self.submit(descriptor);
        self.wait(number + 1);
        self.status(number)
    }

    fn register_buffer(&self, slot: u64, base: u64, length: u64) -> u64 {
        self.set(register::BUFFER_BASE, base);
        self.set(register::BUFFER_LENGTH, length);
        self.set(register::BUFFER_REGISTER, slot);
        self.get(register::ERROR)
    }

    /// Waits for an event that has no signal of its own.
    fn until(&self, what: impl Fn(&Self) -> bool) {
        while !what(self) {
            thread::yield_now();
        }
    }
}

/// Those flags that this host can serve.
fn possible<const N: usize>(flags: [u16; N]) -> impl Iterator<Item = u16> {
    let served = |flags: &u16| flags & flag::KERNEL == 0 || has_io_uring();
    flags.into_iter().filter(served)
}

/// Writes memory to the backing and reads it back elsewhere, with these flags on both.
fn write_then_read(machine: &Machine, flags: u16) {
    let bytes = pattern(3, 300_001);
    machine.ram.set(DATA, &bytes);
    let there = descriptor(operation::WRITE, flags, 300_001, DATA, 12_345);
    let back = descriptor(operation::READ, flags, 300_001, 12_345, DATA + 0x8_0000);
    assert_eq!(machine.run(&there), status::OK);
    assert_eq!(machine.run(&back), status::OK);
    assert_eq!(machine.result(1), 300_001);
    assert_eq!(machine.ram.bytes(DATA + 0x8_0000, bytes.len()), bytes);
    // Before the written bytes, in their first block, and where nothing was written: zeros.
    let before = descriptor(operation::READ, flags, 20_000, 0, DATA);
    assert_eq!(machine.run(&before), status::OK);
    let mut expected = vec![0; 12_345];
    expected.extend(&bytes[..20_000 - 12_345]);
    assert_eq!(machine.ram.bytes(DATA, 20_000), expected);
    let counters = DmaCounters { transfers: 3, failed: 0, bytes: 620_002 };
    assert_eq!(machine.engine.counters(), counters);
    assert_eq!(machine.get(register::COMPLETED), 3);
}

#[test]
fn the_engine_moves_data_both_ways() {
    let machine = Machine::new();
    write_then_read(&machine, 0);
    machine.until(|m| m.engine.pins_held() == 0 && m.ram.pins() == 0);
}

#[test]
fn the_host_kernel_moves_data_both_ways() {
    if !has_io_uring() {
        return;
    }
    let machine = Machine::new();
    write_then_read(&machine, flag::KERNEL);
    machine.until(|m| m.engine.pins_held() == 0 && m.ram.pins() == 0);
}

#[test]
fn registered_buffers_keep_one_pin_and_bound_their_transfers() {
    let machine = Machine::new();
    assert_eq!(machine.register_buffer(0, DATA, 0x10_0000), error::NONE);
    assert_eq!(machine.engine.pins_held(), 1);
    write_then_read(&machine, flag::REGISTERED);
    for flags in possible([flag::REGISTERED, flag::REGISTERED | flag::KERNEL]) {
        let outside = descriptor(operation::READ, flags, 4096, 0, DATA + 0x10_0000 - 4095);
        assert_eq!(machine.run(&outside), status::OUT_OF_RANGE);
        let mut unknown = descriptor(operation::READ, flags, 4096, 0, DATA);
        unknown.slot = 1;
        assert_eq!(machine.run(&unknown), status::INVALID);
    }
    assert_eq!(machine.engine.pins_held(), 1);
    machine.set(register::BUFFER_UNREGISTER, 0);
    assert_eq!(machine.get(register::ERROR), error::NONE);
    machine.until(|m| m.engine.pins_held() == 0 && m.ram.pins() == 0);
}

#[test]
fn a_registered_buffer_serves_the_kernel_until_it_is_unregistered() {
    if !has_io_uring() {
        return;
    }
    let machine = Machine::new();
    assert_eq!(machine.register_buffer(0, DATA, 0x10_0000), error::NONE);
    write_then_read(&machine, flag::REGISTERED | flag::KERNEL);
    assert_eq!(machine.ram.pins(), 1);
    machine.set(register::BUFFER_UNREGISTER, 0);
    machine.until(|m| m.ram.pins() == 0);
}

#[test]
fn copies_within_the_guest() {
    let machine = Machine::new();
    let bytes = pattern(9, 100_000);
    machine.ram.set(DATA + 1, &bytes);
    let copy = descriptor(operation::COPY, 0, 100_000, DATA + 1, DATA + 200_003);
    assert_eq!(machine.run(&copy), status::OK);
    assert_eq!(machine.ram.bytes(DATA + 200_003, bytes.len()), bytes);
    // One side in a registered buffer, the other one pinned for the transfer.
    assert_eq!(machine.register_buffer(0, DATA + 0x8_0000, 0x2_0000), error::NONE);
    let copy = descriptor(operation::COPY, flag::REGISTERED, 100_000, DATA + 1, DATA + 0x8_0007);
    assert_eq!(machine.run(&copy), status::OK);
    assert_eq!(machine.ram.bytes(DATA + 0x8_0007, bytes.len()), bytes);
    let copy = descriptor(operation::COPY, flag::REGISTERED, 100_000, DATA + 1, DATA + 200_003);
    assert_eq!(machine.run(&copy), status::OUT_OF_RANGE);
    let overlapping = descriptor(operation::COPY, 0, 100_000, DATA, DATA + 99_999);
    assert_eq!(machine.run(&overlapping), status::INVALID);
}

#[test]
fn wrong_descriptors_get_their_status() {
    let machine = Machine::new();
    let good = descriptor(operation::READ, 0, 4096, 0, DATA);
    let change = |change: &dyn Fn(&mut Descriptor)| {
        let mut descriptor = good;
        change(&mut descriptor);
        machine.run(&descriptor)
    };
    assert_eq!(change(&|_| ()), status::OK);
    for operation in [0, 4, u16::MAX] {
        assert_eq!(change(&|d| d.operation = operation), status::INVALID);
    }
    assert_eq!(change(&|d| d.flags |= 8), status::INVALID);
    assert_eq!(change(&|d| d.flags = u16::MAX), status::INVALID);
    for length in [0, (1 << 20) + 1, u32::MAX] {
        assert_eq!(change(&|d| d.length = length), status::INVALID);
    }
    assert_eq!(change(&|d| d.reserved = 1), status::INVALID);
    assert_eq!(change(&|d| d.padding = [0, 1]), status::INVALID);
    for slot in [0, 16, u32::MAX] {
        let unregistered = |d: &mut Descriptor| {
            d.flags |= flag::REGISTERED;
            d.slot = slot;
        };
        assert_eq!(change(&unregistered), status::INVALID);
    }
    for offset in [BACKING_BYTES - 4095, BACKING_BYTES, u64::MAX, u64::MAX - 4095] {
        assert_eq!(change(&|d| d.source = offset), status::OUT_OF_RANGE);
    }
    for gpa in [0, RAM_BASE - 1, RAM_END - 4095, RAM_END, u64::MAX, u64::MAX - 4095] {
        assert_eq!(change(&|d| d.destination = gpa), status::OUT_OF_RANGE);
        assert_eq!(
            change(&|d| (d.operation, d.source, d.destination) = (operation::WRITE, gpa, 0)),
            status::OUT_OF_RANGE
        );
        assert_eq!(change(&|d| (d.operation, d.source) = (operation::COPY, gpa)), status::OUT_OF_RANGE);
        assert_eq!(
            change(&|d| (d.flags, d.destination) = (flag::KERNEL | flag::INTERRUPT, gpa)),
            status::OUT_OF_RANGE
        );
    }
    let kernel_copy = |d: &mut Descriptor| {
        (d.operation, d.source) = (operation::COPY, DATA + 8192);
        d.flags |= flag::KERNEL;
    };
    assert_eq!(change(&kernel_copy), status::INVALID);
    machine.ram.refuse_pins();
    assert_eq!(change(&|_| ()), status::FAILED);
    assert_eq!(machine.engine.counters().transfers, 1);
}

#[test]
fn wrong_register_accesses_change_nothing() {
    let machine = Machine::new();
    let refused = |register, value, expected| {
        let before = machine.get(register);
        machine.set(register, value);
        assert_eq!(machine.get(register::ERROR), expected, "{register:#x} {value:#x}");
        assert_eq!(machine.get(register::ERROR), error::NONE, "reading clears it");
        assert_eq!(machine.get(register), before);
    };
    refused(register::RING_BASE, 32, error::VALUE);
    for entries in [0, 3, 2048, u64::MAX] {
        refused(register::RING_ENTRIES, entries, error::VALUE);
    }
    refused(register::INTERRUPT, 0x200, error::VALUE);
    refused(register::DELAY_US, 10_000_001, error::VALUE);
    refused(register::BUFFER_BASE, 100, error::VALUE);
    refused(register::BUFFER_LENGTH, (16 << 20) + 4096, error::VALUE);
    refused(register::BUFFER_LENGTH, 100, error::VALUE);
    for tail in [ENTRIES + 1, u64::MAX, 1 << 32] {
        refused(register::DOORBELL, tail, error::VALUE);
    }
    for read_only in [register::IDENTITY, register::COMPLETED, register::BACKING_BYTES, 0x70] {
        refused(read_only, 1, error::VALUE);
    }
    refused(register::BUFFER_UNREGISTER, 0, error::SLOT);
    refused(register::BUFFER_UNREGISTER, 16, error::SLOT);
    assert_eq!(machine.register_buffer(16, DATA, 4096), error::SLOT);
    assert_eq!(machine.register_buffer(u64::MAX, DATA, 4096), error::SLOT);
    assert_eq!(machine.register_buffer(1, DATA, 0), error::VALUE);
    assert_eq!(machine.register_buffer(1, RAM_END - 4096, 8192), error::PIN);
    assert_eq!(machine.register_buffer(1, 0u64.wrapping_sub(4096), 4096), error::VALUE);
    assert_eq!(machine.register_buffer(1, DATA, 4096), error::NONE);
    assert_eq!(machine.register_buffer(1, DATA, 4096), error::SLOT);
    for len_bytes in [0, 1, 2, 3, 5, 16] {
        machine.engine.mmio_write(register::RATE, &vec![1; len_bytes]);
        machine.engine.mmio_read(register::RATE, &mut vec![1; len_bytes]);
    }
    machine.engine.mmio_write(register::RATE + 1, &[1; 8]);
    machine.engine.mmio_write(register::RATE + 2, &[1; 4]);
    machine.engine.mmio_read(u64::MAX, &mut [1; 8]);
    machine.engine.mmio_write(u64::MAX - 7, &[1; 8]);
    assert_eq!(machine.get(register::RATE), 0);
    assert_eq!(machine.engine.in_flight(), 0);
}

#[test]
fn registers_can_be_reached_by_halves() {
    let machine = Machine::new();
    machine.engine.mmio_write(register::RATE, &0x5566_7788_u32.to_le_bytes());
    machine.engine.mmio_write(register::RATE + 4, &0x1122_3344_u32.to_le_bytes());
    assert_eq!(machine.get(register::RATE), 0x1122_3344_5566_7788);
    let mut half = [0; 4];
    machine.engine.mmio_read(register::RATE + 4, &mut half);
    assert_eq!(u32::from_le_bytes(half), 0x1122_3344);
    machine.set(register::RATE, 0);
    let bytes = encode(&descriptor(operation::READ, 0, 1, 0, DATA));
    machine.ram.set(RING, &bytes);
    machine.engine.mmio_write(register::DOORBELL, &1_u32.to_le_bytes());
    machine.wait(1);
    assert_eq!(machine.status(0), status::OK);
}

#[test]
fn a_ring_outside_memory_is_an_error_and_not_the_end() {
    let machine = Machine::new();
    for base in [RAM_END, !63] {
        machine.set(register::RING_BASE, base);
        machine.set(register::RING_ENTRIES, ENTRIES);
        machine.set(register::DOORBELL, 2);
        assert_eq!(machine.get(register::ERROR), error::VALUE);
        assert_eq!(machine.get(register::COMPLETED), 2);
    }
    machine.set(register::RING_BASE, RING);
    machine.set(register::RING_ENTRIES, ENTRIES);
    assert_eq!(machine.run(&descriptor(operation::READ, 0, 1, 0, DATA)), status::OK);
}

#[test]
fn quick_transfers_overtake_slow_ones_and_a_stop_waits_for_none() {
    let machine = Machine::new();
    let bytes = pattern(1, 4096);
    machine.ram.set(DATA, &bytes);
    machine.set(register::DELAY_US, FOREVER_US);
    let slow = machine.submit(&descriptor(operation::WRITE, 0, 1 << 20, DATA, 0));
    let slow_kernel = machine.submit(&descriptor(operation::WRITE, flag::KERNEL, 64, DATA, 0));
    // A request takes the delay that is set when a worker begins with it.
    machine.until(|m| m.engine.pins_held() == 2);
    machine.until(|m| lock(&m.engine.shared.jobs).len() == 2);
    machine.set(register::DELAY_US, 0);
    let quick = machine.submit(&descriptor(operation::COPY, 0, 4096, DATA, DATA + 4096));
    machine.wait(1);
    assert_eq!(machine.status(quick), status::OK);
    assert_eq!(machine.status(slow), status::PENDING);
    assert_eq!(machine.status(slow_kernel), status::PENDING);
    machine.set(register::RING_BASE, RING);
    assert_eq!(machine.get(register::ERROR), error::BUSY);
    machine.engine.stop();
    assert_eq!((machine.engine.pins_held(), machine.ram.pins()), (0, 0));
    machine.set(register::DOORBELL, 7);
    assert_eq!(machine.status(slow), status::PENDING);
}

#[test]
fn a_write_that_the_host_refuses_leaves_the_backing_as_it_was() {
    let machine = Machine::new();
    machine.files.refuse_writes();
    machine.ram.set(DATA, &[1; 8192]);
    for flags in possible([0, flag::KERNEL]) {
        let write = descriptor(operation::WRITE, flags, 4096, DATA, 4096);
        assert_eq!(machine.run(&write), status::FAILED);
        let read = descriptor(operation::READ, flags, 8192, 0, DATA + 8192);
        machine.ram.set(DATA + 8192, &[2; 8192]);
        assert_eq!(machine.run(&read), status::OK);
        assert_eq!(machine.ram.bytes(DATA + 8192, 8192), [0; 8192]);
    }
}

#[test]
fn a_full_ring_is_the_most_that_is_in_flight() {
    let machine = Machine::new();
    let held = machine.gate.hold();
    let read = descriptor(operation::READ, 0, 64, 0, DATA);
    for _ in 0..ENTRIES {
        machine.submit(&read);
    }
    for _ in 0..1000 {
        machine.set(register::DOORBELL, ENTRIES + 1);
        assert_eq!(machine.get(register::ERROR), error::VALUE);
        machine.set(register::DOORBELL, ENTRIES);
    }
    assert_eq!(machine.engine.in_flight(), crate::words::index(ENTRIES));
    drop(held);
    machine.wait(ENTRIES);
    for n in 0..500 {
        assert_eq!(machine.run(&read), status::OK, "round {n}");
    }
    assert_eq!(machine.get(register::COMPLETED), ENTRIES + 500);
}

#[test]
fn an_entry_may_be_used_again_as_soon_as_its_status_is_seen() {
    let machine = Machine::new();
    machine.set(register::RING_ENTRIES, 1);
    let read = descriptor(operation::READ, 0, 64, 0, DATA);
    let (stored, status_is_seen) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel::<()>();
    machine.ram.after_next_store(move || {
        stored.send(()).expect("the test waits for this");
        may_go_on.recv().expect("the test sends it");
    });
    machine.ram.set(RING, &encode(&read));
    machine.set(register::DOORBELL, 1);
    status_is_seen.recv().expect("the status is stored");
    assert_eq!((machine.status(0), machine.get(register::COMPLETED)), (status::OK, 0));
    machine.ram.set(RING, &encode(&read));
    machine.set(register::DOORBELL, 2);
    assert_eq!(machine.get(register::ERROR), error::NONE);
    go_on.send(()).expect("the engine waits for this");
    machine.wait(2);
    assert_eq!((machine.status(0), machine.get(register::COMPLETED)), (status::OK, 2));
}

#[test]
fn a_stop_ends_completions_that_wait_for_the_gate() {
    let machine = Machine::new();
    let held = machine.gate.hold();
    machine.submit(&descriptor(operation::READ, 0, 64, 0, DATA));
    machine.submit(&descriptor(operation::WRITE, flag::KERNEL, 64, DATA, 0));
    machine.until(|m| m.engine.pins_held() == 2);
    machine.engine.stop();
    assert_eq!(machine.ram.pins(), 0);
    drop(held);
}

#[test]
fn durations_and_steps() {
    use super::request::duration;
    assert_eq!(duration(0, 0, 1 << 20), Duration::ZERO);
    assert_eq!(duration(5, 1_000_000, 10), Duration::from_micros(10));
    assert_eq!(duration(50, 1_000_000, 10), Duration::from_micros(50));
    assert_eq!(duration(0, 1, 1 << 20), Duration::from_secs(1 << 20));
    assert_eq!(duration(0, u64::MAX, 1 << 20), Duration::ZERO);

    let ram = TestRam::new(0, 64);
    ram.set(0, &[1; 0x1_0000]);
    let (held, access) = (Arc::default(), crate::devices::Access::ReadWrite);
    let buffer = Buffer::pin(&ram, Gpa(0), 64 * 4096, access, &held).expect("it is memory");
    let span = |gpa| buffer.span(Gpa(gpa), 0x1_0000).expect("inside the buffer");
    let began = Instant::now();
    let mut request = request::Request {
        number: 0,
        flags: 0,
        len_bytes: 0x1_0000,
        moved_bytes: 0,
        began,
        duration: Duration::from_secs(16),
        work: request::Work::Copy { from: span(0), to: span(0x2_0000) },
    };
    // 16 chunks of 4096 bytes: one a second.
    request.step(began).expect("memory to memory");
    assert_eq!(request.moved_bytes, 0);
    assert_eq!(request.next_due(), began + Duration::from_secs(1));
    request.step(began + Duration::from_millis(3500)).expect("memory to memory");
    assert_eq!(request.moved_bytes, 3 * 4096);
    assert_eq!(ram.bytes(0x2_0000 + 3 * 4096 - 1, 2), [1, 0]);
    request.step(began + Duration::from_millis(15_999)).expect("memory to memory");
    assert!(!request.is_moved());
    request.step(began + Duration::from_secs(16)).expect("memory to memory");
    assert!(request.is_moved());
}
