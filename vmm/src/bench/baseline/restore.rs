//! Snapshots in a file in memory, and VMs made of them.
//!
//! A file has the memory at its guest-physical places, then the VM's state. It lies where salp's arena
//! would: in huge pages where those are asked for and the host has them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;

use super::host::{BaselineHost, do_task, memfd};
use super::words::{Outcome, Setup, Snapshotted, stages, us};
use crate::arena_files::{ArenaChoice, ArenaDir};
use crate::bench::BenchError;
use crate::bench::plain_vm::{Guest, PlainMemory, PlainState, PlainVm};
use crate::bench::work::Task;
use crate::kvm::vcpu::monotonic_ns;
use crate::words::{LEAF_BYTES, MemoryShape, index, wide};

/// A file for one snapshot. Other processes open it by its path while this exists.
pub(super) struct SnapshotFile {
    file: File,
    /// What the file lies in, if it is not a memfd.
    _arena: Option<ArenaDir>,
}

impl SnapshotFile {
    /// An empty one.
    pub(super) fn new(setup: &Setup) -> Result<Self, BenchError> {
        if !setup.is_huge {
            return Ok(Self { file: memfd()?, _arena: None });
        }
        let len_bytes = setup.memory.span_bytes();
        // The state is in a block of its own.
        let arena = ArenaDir::create_as(ArenaChoice::Best, len_bytes + 4 * wide(LEAF_BYTES))?;
        let file = File::from(arena.create_file("snapshot", len_bytes)?);
        Ok(Self { file, _arena: Some(arena) })
    }

    /// Writes a VM to it, which then waits for its next order.
    pub(super) fn write(&self, source: &mut PlainVm) -> Result<Snapshotted, BenchError> {
        let begin = monotonic_ns();
        let state = source.guest.save()?;
        let bytes = postcard::to_stdvec(&state).map_err(io::Error::other)?;
        self.file.write_all_at(&bytes, source.memory.shape().span_bytes())?;
        let saved = monotonic_ns();
        source.memory.write_all_to(&self.file)?;
        let written = monotonic_ns();
        source.guest.run_to_order()?;
        Ok(Snapshotted {
            path: format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()),
            pause_us: us(begin, written),
            stages_us: stages(&[("save", begin, saved), ("write", saved, written)]),
        })
    }
}

/// Opens a snapshot, and reads the state in it.
pub(super) fn load(path: &str, shape: MemoryShape) -> Result<(File, PlainState), BenchError> {
    let file = OpenOptions::new().read(true).open(path)?;
    let from = shape.span_bytes();
    let mut bytes = vec![0; index(file.metadata()?.len().saturating_sub(from))];
    file.read_exact_at(&mut bytes, from)?;
    let state = postcard::from_bytes(&bytes).map_err(io::Error::other)?;
    Ok((file, state))
}

impl BaselineHost {
    /// Makes a VM of a snapshot, has it do its task, and ends it.
    pub(super) fn restore(&self, path: &str, task: &Task) -> Result<Outcome, BenchError> {
        let shape = self.setup.memory;
        let begin = monotonic_ns();
        let (file, state) = load(path, shape)?;
        let loaded = monotonic_ns();
        let memory = PlainMemory::private_of(&file, shape)?;
        let mapped = monotonic_ns();
        // After `memory`: it must go first.
        let mut guest = Guest::over(self.kvm.as_ref(), &memory)?;
        let vm_made = monotonic_ns();
        guest.set(&state)?;
        let entering = monotonic_ns();
        guest.run_to_order()?;
        let first_exit = monotonic_ns();
        let (first_mib_us, work) = do_task(&mut guest, &memory, task, begin)?;
        Ok(Outcome {
            // The source is not stopped.
            pause_us: 0.0,
            call_us: us(begin, entering),
            first_instruction_us: us(begin, first_exit),
            first_mib_us,
            stages_us: stages(&[
                ("load", begin, loaded),
                ("map", loaded, mapped),
                ("make_vm", mapped, vm_made),
                ("set", vm_made, entering),
            ]),
            work,
        })
    }
}
