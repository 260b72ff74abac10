//! The floor of a fork: what this host takes to save a vCPU and to write-protect all memory of a VM
//! that is no clone, has none, and has nothing else to do; and to map as much memory for a clone.
//!
//! Whoever shares memory copy-on-write has to take write access to all of it from the guest, `fork()`
//! by its page tables, salp by userfaultfd. The kernel then also looks through what KVM has of the range.
//! What salp's pause is above these two is salp's own.
//!
//! A clone's memory begins as one mapping of a file, all of which traps. What salp's memory part of the
//! call of a source that stands still is above that is for its tables and the opening of the file.
//!
//! Known holes: one vCPU, which has stopped by itself. The memory is one mapping for each run of RAM.

use std::fs::File;
use std::io;

use rustix::fs::MemfdFlags;
use vm_memory::{FileOffset, MmapRegion};

use super::words::{Floor, us};
use crate::bench::BenchError;
use crate::bench::plain_vm::{PlainMemory, PlainVm};
use crate::kvm::vcpu::monotonic_ns;
use crate::space::Traps;
use crate::window::Userfault;
use crate::words::{index, wide};

/// Saves, protects, and takes all of it back.
pub(super) fn measure(source: &mut PlainVm) -> Result<Floor, BenchError> {
    let userfault = Userfault::open()?;
    for range in source.memory.host_ranges() {
        userfault.register(range, Traps::Stores)?;
    }
    let begin = monotonic_ns();
    source.guest.save()?;
    let saved = monotonic_ns();
    for range in source.memory.host_ranges() {
        userfault.protect(range, true)?;
    }
    let protected = monotonic_ns();
    for range in source.memory.host_ranges() {
        userfault.unregister(range)?;
    }
    // The saved guest asks for its order anew.
    source.guest.run_to_order()?;
    let map_us = map(&source.memory)?;
    Ok(Floor { save_us: us(begin, saved), protect_us: us(saved, protected), map_us })
}

/// Maps a file for each run of memory, and has it trap; takes it back.
fn map(memory: &PlainMemory) -> Result<f64, BenchError> {
    let userfault = Userfault::open()?;
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
    let mut took = 0.0;
    for range in memory.host_ranges() {
        let len_bytes = range.end - range.start;
        let file =
            File::from(rustix::fs::memfd_create("salp-floor", MemfdFlags::CLOEXEC).map_err(io::Error::from)?);
        file.set_len(len_bytes)?;
        let begin = monotonic_ns();
        let mapping =
            MmapRegion::<()>::build(Some(FileOffset::new(file, 0)), index(len_bytes), access, flags)
                .map_err(io::Error::other)?;
        let start = wide(mapping.as_ptr().addr());
        userfault.register(start..start + len_bytes, Traps::Touches)?;
        took += us(begin, monotonic_ns());
    }
    Ok(took)
}
