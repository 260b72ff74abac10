//! The floor of a pause: what this host takes to save a vCPU and to write-protect all memory of a VM
//! that is no clone, has none, and has nothing else to do.
//!
//! Whoever shares memory copy-on-write has to take write access to all of it from the guest, `fork()`
//! by its page tables, salp by userfaultfd. The kernel then also looks through what KVM has of the range.
//! What salp's pause is above these two is salp's own.
//!
//! Known holes: one vCPU, which has stopped by itself. The memory is one mapping for each run of RAM.

use super::words::{Floor, us};
use crate::bench::BenchError;
use crate::bench::plain_vm::PlainVm;
use crate::kvm::vcpu::monotonic_ns;
use crate::space::Traps;
use crate::window::Userfault;

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
    Ok(Floor { save_us: us(begin, saved), protect_us: us(saved, protected) })
}
