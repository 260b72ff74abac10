//! Whether a vCPU does anything, and whether it ever will again.
//!
//! With an interrupt controller in the kernel, `HLT` does not leave `KVM_RUN`: nothing tells that a
//! guest has halted for good. So it is looked for, in two steps. [`VcpuWatch::doing`] looks at a running
//! vCPU from outside and disturbs nothing; only if all sleep in the guest are they stopped, and
//! [`Rest`] tells from their state what could wake them.
//!
//! Known holes: `STI; HLT` with every source of interrupts masked cannot be told from waiting. A
//! non-maskable interrupt would wake a halted vCPU: only a guest that has routed its own timer so has any.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED};
use kvm_ioctls::VcpuFd;

use super::error::KvmError;
use super::vcpu::Shared;

/// `RFLAGS.IF`.
const INTERRUPTS_ENABLED: u64 = 1 << 9;

/// What a running vCPU is at, seen from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// It is not in the guest: stopped, or something is done for it. It will come back, or is told to.
    Elsewhere,
    /// It runs the guest's instructions.
    Works,
    /// It sleeps in the guest: halted, or waiting for a page or a start-up interrupt.
    Sleeps,
}

/// Looks at one vCPU from any thread.
#[derive(Clone, Debug)]
pub struct VcpuWatch(pub(super) Arc<Shared>);

impl VcpuWatch {
    /// What it is at now; a moment later that may have changed.
    #[must_use]
    pub fn doing(&self) -> Doing {
        // Relaxed: a look from outside, which nothing else is inferred from.
        let Some(thread) = self.0.running_thread().filter(|_| self.0.in_guest.load(Ordering::Relaxed)) else {
            return Doing::Elsewhere;
        };
        let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap_or_default();
        // The letter behind the name (proc(5)), which may have parentheses of its own.
        match stat.rsplit(')').next().and_then(|rest| rest.trim_start().chars().next()) {
            Some('R') => Doing::Works,
            Some(_) => Doing::Sleeps,
            None => Doing::Elsewhere,
        }
    }
}

/// What can wake a stopped vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// It need not be woken.
    Awake,
    /// It is halted, and an interrupt can wake it.
    Waiting,
    /// It waits for another vCPU to start it.
    Unstarted,
    /// It is halted with interrupts off, and none that cannot be turned off is on its way.
    Halted,
}

impl Rest {
    /// Of a vCPU that does not run.
    pub(super) fn of(fd: &VcpuFd) -> Result<Self, KvmError> {
        // First: it takes in start-up events.
        let state = fd.get_mp_state().map_err(KvmError::ioctl("KVM_GET_MP_STATE"))?.mp_state;
        let events = fd.get_vcpu_events().map_err(KvmError::ioctl("KVM_GET_VCPU_EVENTS"))?;
        let is_disturbed = [
            events.nmi.pending,
            events.nmi.injected,
            events.smi.pending,
            events.exception.injected,
            events.exception.pending,
            events.interrupt.injected,
        ]
        .iter()
        .any(|&flag| flag != 0);
        let flags = fd.get_regs().map_err(KvmError::ioctl("KVM_GET_REGS"))?.rflags;
        Ok(match state {
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => Self::Unstarted,
            KVM_MP_STATE_HALTED if flags & INTERRUPTS_ENABLED == 0 && !is_disturbed => Self::Halted,
            KVM_MP_STATE_HALTED => Self::Waiting,
            _ => Self::Awake,
        })
    }

    /// Whether a VM whose vCPUs are so has halted for good.
    #[must_use]
    pub fn is_for_good(vcpus: &[Self]) -> bool {
        let is_over = |vcpu: &Self| matches!(vcpu, Self::Halted | Self::Unstarted);
        vcpus.iter().all(is_over) && vcpus.contains(&Self::Halted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_vcpu_that_can_go_on_is_enough() {
        use Rest::{Awake, Halted, Unstarted, Waiting};
        assert!(Rest::is_for_good(&[Halted]));
        assert!(Rest::is_for_good(&[Halted, Unstarted]));
        assert!(!Rest::is_for_good(&[Halted, Awake]));
        assert!(!Rest::is_for_good(&[Waiting, Halted]));
        assert!(!Rest::is_for_good(&[Unstarted]));
        assert!(!Rest::is_for_good(&[]));
    }
}
