//! Limits of a colony: how many VMs and vCPUs it may have at a time, and how much of the host's memory.
//!
//! What a limit refuses is refused before anything has changed, with what is used and how to have more.
//! VMs are promised before they are made ([`Admission`]), so that two forks at once do not exceed a limit
//! together. A VM counts until it is ended: one whose guest has ended and that is kept for a reset, too.
//!
//! The memory limit is the arena's size, so that a publication beyond it fails (the clones lose pages, the
//! source none), and a fork is refused when there is no room for another block. The first VM must fit.
//!
//! # Known holes
//! What VMs write after a fork is theirs and in no arena: only the VMs' number bounds it. An arena of memfds
//! has no size of its own: it is bounded by the forks that are refused.

use std::cell::Cell;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{ColonyError, Inner, Shared};
use crate::words::{LEAF_BYTES, wide};

/// See the module. None is no limit but the host's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// VMs at one time.
    pub vms: Option<usize>,
    /// vCPUs of all VMs together.
    pub cpus: Option<usize>,
    /// What the arena may hold, and so what VMs share, in bytes. No VM is larger.
    pub memory_bytes: Option<u64>,
}

/// Why a limit is in the way.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LimitError {
    /// Too many VMs.
    #[error("the colony has {used} vms, and may have {limit}: stop one, or run it with a higher --max-vms")]
    Vms {
        /// How many it has, those on their way included.
        used: usize,
        /// How many it may have.
        limit: usize,
    },
    /// Too many vCPUs.
    #[error(
        "the colony has {used} vcpus, may have {limit}, and a vm has {each}: stop one, or run it with a \
         higher --max-cpus"
    )]
    Cpus {
        /// How many it has.
        used: usize,
        /// How many it may have.
        limit: usize,
        /// Of each VM.
        each: usize,
    },
    /// A VM alone is too large.
    #[error(
        "a vm of {vm_bytes} bytes cannot be shared in {limit_bytes}: run it with a higher --memory-limit, or \
         less --memory"
    )]
    Vm {
        /// Its memory.
        vm_bytes: u64,
        /// What may be shared.
        limit_bytes: u64,
    },
    /// The arena is full.
    #[error(
        "the colony's shared memory has {used_bytes} of {limit_bytes} bytes, no room for what a clone \
         shares: stop a vm, or run it with a higher --memory-limit"
    )]
    Arena {
        /// What is in it.
        used_bytes: u64,
        /// Its size.
        limit_bytes: u64,
    },
}

/// VMs that are promised and not made yet.
pub(super) struct Admission<'a> {
    shared: &'a Shared,
    left: Cell<usize>,
}

impl Admission<'_> {
    /// One of them is a VM now.
    pub(super) fn spend(&self, inner: &mut Inner) {
        let left = self.left.get();
        debug_assert!(left > 0, "a vm that nobody was promised");
        self.left.set(left.saturating_sub(1));
        inner.promised = inner.promised.saturating_sub(1);
    }

    /// How many are left.
    pub(super) fn left(&self) -> usize {
        self.left.get()
    }
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        self.shared.lock().promised -= self.left.get();
    }
}

impl Shared {
    /// Promises as many of `wanted` VMs as the limits allow, and says what is in the way of the others.
    pub(super) fn admit(&self, wanted: usize) -> (Admission<'_>, Option<LimitError>) {
        let (limits, each) = (self.config.limits, usize::from(self.config.vcpus));
        let mut inner = self.lock();
        let used = inner.vms.len() + inner.promised;
        let by_vms = limits.vms.map_or(wanted, |limit| limit.saturating_sub(used));
        let by_cpus = limits.cpus.map_or(wanted, |limit| (limit / each.max(1)).saturating_sub(used));
        let granted = wanted.min(by_vms).min(by_cpus);
        inner.promised += granted;
        drop(inner);
        let refusal = match (limits.vms, limits.cpus) {
            _ if granted == wanted => None,
            (Some(limit), _) if granted == by_vms => Some(LimitError::Vms { used, limit }),
            (_, limit) => Some(LimitError::Cpus { used: used * each, limit: limit.unwrap_or(0), each }),
        };
        (Admission { shared: self, left: Cell::new(granted) }, refusal)
    }

    /// Whether a VM is no larger than what may be shared.
    pub(super) fn check_size(&self) -> Result<(), ColonyError> {
        let vm_bytes = self.config.memory.ram_bytes();
        match self.config.limits.memory_bytes {
            Some(limit_bytes) if vm_bytes > limit_bytes => {
                Err(LimitError::Vm { vm_bytes, limit_bytes }.into())
            }
            _ => Ok(()),
        }
    }

    /// Whether a fork has room in the arena for anything at all.
    pub(super) fn check_room(&self) -> Result<(), ColonyError> {
        let Some(limit_bytes) = self.config.limits.memory_bytes else { return Ok(()) };
        let used_bytes = self.arena.used_bytes()?;
        if used_bytes + wide(LEAF_BYTES) > limit_bytes {
            return Err(LimitError::Arena { used_bytes, limit_bytes }.into());
        }
        Ok(())
    }
}
