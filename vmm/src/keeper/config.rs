//! What a colony is made of, and what its host has for it.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::limits::Limits;
use crate::arena_files::ArenaChoice;
use crate::ipc::slices;
use crate::kvm::Irqchip;
use crate::member::confine::Confinement;
use crate::member::messages::{GuestKind, Publication};
use crate::space::Keep;
use crate::tables::ShareLevel;
use crate::words::MemoryShape;

/// What a colony is made of.
#[derive(Clone, Debug)]
pub struct ColonyConfig {
    /// Memory of each VM.
    pub memory: MemoryShape,
    /// Whether huge pages are asked for.
    pub is_huge: bool,
    /// vCPUs of each VM.
    pub vcpus: u8,
    /// The interrupt controllers of each VM: all of them for images, which look for them.
    pub irqchip: Irqchip,
    /// What runs in the VMs.
    pub guest: GuestKind,
    /// When lent pages are published.
    pub publication: Publication,
    /// Whether clones keep what they began with, to return to it.
    pub is_resettable: bool,
    /// What members may ask of the host.
    pub confinement: Confinement,
    /// The level at which forks share tables.
    pub share_level: ShareLevel,
    /// Members kept ready.
    pub pool: usize,
    /// Members at one time: VMs, those that have ended and whose pages others need, and the pool.
    pub members: u32,
    /// How much of all there may be.
    pub limits: Limits,
    /// Where shared frames live.
    pub arena: ArenaChoice,
    /// Size of the DMA engine's backing, in bytes.
    pub backing_bytes: u64,
    /// The file that the DMA engine's backing begins with, read only.
    pub backing_base: Option<Arc<File>>,
    /// The salp binary, if it is not this process's.
    pub program: Option<PathBuf>,
}

impl ColonyConfig {
    /// A colony of KVM VMs with `memory` and the usual rest.
    #[must_use]
    pub fn new(memory: MemoryShape) -> Self {
        Self {
            memory,
            is_huge: true,
            vcpus: 1,
            irqchip: Irqchip::Split,
            guest: GuestKind::Kvm,
            publication: Publication { in_background: true, keep: Keep::Own, keep_later: Keep::Shared },
            is_resettable: true,
            confinement: Confinement::On,
            share_level: ShareLevel::default(),
            pool: 2,
            members: 256,
            limits: Limits::default(),
            arena: ArenaChoice::Best,
            backing_bytes: 64 << 20,
            backing_base: None,
            program: None,
        }
    }
}

/// The limit; without one seven tenths of what the host has free now: beyond that, arena pages would push
/// guests out.
pub(super) fn arena_budget_bytes(config: &ColonyConfig) -> u64 {
    if let Some(limit_bytes) = config.limits.memory_bytes {
        return limit_bytes;
    }
    let available = available_memory_bytes().unwrap_or(4 << 30);
    (available / 10 * 7).max(config.memory.ram_bytes()).max(64 << 20)
}

/// Has this process, and so its members, open as many files and lock as much memory as its user may: a
/// keeper has some descriptors for each VM and each cut, a DMA engine's registered buffers are locked.
pub fn raise_limits() {
    for resource in [Resource::Nofile, Resource::Memlock] {
        let limit = getrlimit(resource);
        if limit.current != limit.maximum
            && let Err(error) = setrlimit(resource, Rlimit { current: limit.maximum, ..limit })
        {
            tracing::warn!(?resource, %error, "a limit of this process stays as it is");
        }
    }
}

/// Has whoever is woken in a fork wait for a processor no longer than must be: this thread, and all threads
/// and processes of the colony, which it starts.
pub fn shorten_slices() {
    if let Err(error) = slices::shorten_slices() {
        tracing::warn!(%error, "whoever is woken may wait for a processor for milliseconds");
    }
}

/// `MemAvailable` of the host.
#[must_use]
pub fn available_memory_bytes() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find(|line| line.starts_with("MemAvailable:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}
