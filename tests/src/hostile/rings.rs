//! A guest that drives its DMA engine as a fuzzer likes: its memory, which holds the ring, its registers,
//! its buffers; and changes memory while transfers are under way.
//!
//! Besides what all targets hold: after the engine's stop nothing is pinned, and no more requests were
//! ever in flight than the ring has entries.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use salp::devices::backing::{Backing, ExtentFileId, ExtentFiles};
use salp::devices::dma::{BackingKind, DmaEngine};
use salp::devices::gate::CompletionGate;
use salp::devices::{GuestRam as _, InterruptLine};
use salp::words::Gpa;
use salp_protocol::dma::{flag, register};

use super::bytes::Bytes;
use super::memory::CanaryRam;

const PAGES: usize = 64;
const BACKING_BYTES: u64 = 256 << 10;
/// The most steps of one program.
const STEPS: usize = 200;
/// How long transfers may be waited for: an input that sets a rate of one byte a second has its way.
const PATIENCE: Duration = Duration::from_millis(3);

/// Extent files that nobody opens again: there are no clones here.
pub(super) struct NoClones;

impl ExtentFiles for NoClones {
    fn create(&self) -> io::Result<(ExtentFileId, File)> {
        Ok((ExtentFileId(1), File::from(memfd_create("extents", MemfdFlags::CLOEXEC)?)))
    }

    fn open(&self, _id: ExtentFileId) -> io::Result<File> {
        Err(io::ErrorKind::NotFound.into())
    }
}

/// A line on which nobody listens.
pub(super) struct DeadLine;

impl InterruptLine for DeadLine {
    fn raise(&self, _vector: u8) {}
}

/// An engine over `ram` with a small disk.
pub(super) fn engine(ram: &Arc<CanaryRam>, gate: Arc<CompletionGate>) -> DmaEngine {
    let backing = Backing::new(None, BACKING_BYTES, Arc::new(NoClones)).expect("a small disk");
    DmaEngine::new(Arc::<CanaryRam>::clone(ram), Arc::new(DeadLine), BackingKind::Storage(backing), gate)
}

/// The input is a program: an operation, then what it needs, again and again.
///
/// # Panics
/// A property does not hold, see [`super`].
pub fn rings(input: &[u8]) {
    let ram = Arc::new(CanaryRam::new(PAGES));
    let gate = CompletionGate::new();
    let engine = engine(&ram, Arc::clone(&gate));
    let mut bytes = Bytes::new(input);
    for _ in 0..STEPS {
        if step(&mut bytes, &ram, &engine, &gate).is_none() {
            break;
        }
        let entries = read(&engine, register::RING_ENTRIES);
        let in_flight = salp::words::wide(engine.in_flight());
        assert!(in_flight <= entries.max(1), "{in_flight} requests in a ring of {entries}");
    }
    engine.stop();
    assert_eq!((engine.pins_held(), ram.pins()), (0, 0), "pins are left");
    ram.expect_whole();
}

fn read(engine: &DmaEngine, register: u64) -> u64 {
    let mut word = [0; 8];
    engine.mmio_read(register, &mut word);
    u64::from_le_bytes(word)
}

fn write(engine: &DmaEngine, register: u64, value: u64) {
    engine.mmio_write(register, &value.to_le_bytes());
}

fn step(
    bytes: &mut Bytes<'_>,
    ram: &CanaryRam,
    engine: &DmaEngine,
    gate: &Arc<CompletionGate>,
) -> Option<()> {
    match bytes.byte()? & 7 {
        0 => store(ram, bytes.number()?, bytes.number()?),
        1 => write(engine, u64::from(bytes.byte()? & 15) * 8, bytes.number()?),
        // A ring that makes sense.
        2 => {
            write(engine, register::RING_BASE, u64::from(bytes.byte()?) << 6);
            write(engine, register::RING_ENTRIES, 1 << (bytes.byte()? & 15));
        }
        // A descriptor, submitted.
        3 => {
            let entries = read(engine, register::RING_ENTRIES).max(1);
            let tail = read(engine, register::DOORBELL);
            let at = read(engine, register::RING_BASE).wrapping_add(tail % entries * 64);
            describe(ram, at, bytes)?;
            write(engine, register::DOORBELL, tail.wrapping_add(1));
        }
        4 => {
            write(engine, register::DOORBELL, read(engine, register::DOORBELL).wrapping_add(bytes.number()?))
        }
        5 => {
            write(engine, register::BUFFER_BASE, u64::from(bytes.byte()?) << 12);
            write(engine, register::BUFFER_LENGTH, u64::from(bytes.byte()?) << 12);
            write(engine, register::BUFFER_REGISTER, u64::from(bytes.byte()? & 31));
        }
        6 => write(engine, register::BUFFER_UNREGISTER, u64::from(bytes.byte()? & 31)),
        // What is under way ends; or a cut comes, at which its state is saved.
        _ if bytes.byte()? & 1 == 0 => await_transfers(engine),
        _ => drop(engine.save(&gate.hold())),
    }
    Some(())
}

/// Stores to the guest's memory, if it is there.
fn store(ram: &CanaryRam, gpa: u64, value: u64) {
    // Elsewhere a guest's store is no store to memory.
    let _ = ram.write(Gpa(gpa), &value.to_le_bytes());
}

/// A descriptor whose fields mostly make sense.
fn describe(ram: &CanaryRam, at: u64, bytes: &mut Bytes<'_>) -> Option<()> {
    let how = bytes.byte()?;
    let operation = u64::from(how & 3);
    // The host's kernel moves rarely: each time it needs threads and descriptors of its own.
    let kernel = if how & 0xf0 == 0xf0 { flag::KERNEL } else { 0 };
    let flags = u64::from(u16::from(how >> 2 & 3) | kernel);
    let length = bytes.number()? & 0xffff_ffff;
    let (source, destination) = (bytes.number()?, bytes.number()?);
    let slot = u64::from(bytes.byte()? & 31);
    let words = [operation | flags << 16 | length << 32, source, destination, slot, 0, 0, 0, 0];
    for (word, value) in (0..).zip(words) {
        store(ram, at.wrapping_add(8 * word), value);
    }
    Some(())
}

fn await_transfers(engine: &DmaEngine) {
    let begun = Instant::now();
    while engine.in_flight() > 0 && begun.elapsed() < PATIENCE {
        std::thread::yield_now();
    }
}
