//! What VMs and the colony use, for users.

use procfs::ProcResult;
use procfs::process::{Process, Stat};

use super::events::now_unix_ms;
use super::metrics;
use super::resources::{ColonyView, DmaStats, Faults, PoolView, PublicationStats, StatsView, VcpuStats};
use super::service::Service;
use super::{ControlError, VmState};
use crate::keeper::usage::Usage;
use crate::words::{PAGE_BYTES, wide};

/// What the host's kernel says of a VM's process.
struct Host {
    cpu_us: u64,
    resident_bytes: u64,
    vcpus: Vec<VcpuStats>,
}

impl Host {
    fn of(process: u32) -> ProcResult<Self> {
        let process = Process::new(i32::try_from(process).unwrap_or(0))?;
        let stat = process.stat()?;
        let mut vcpus = Vec::new();
        // A thread that has ended meanwhile is none of them.
        for task in process.tasks()?.flatten() {
            let Ok(stat) = task.stat() else { continue };
            if let Some(Ok(index)) = stat.comm.strip_prefix("vcpu").map(str::parse) {
                vcpus.push(VcpuStats { index, cpu_us: cpu_us(&stat) });
            }
        }
        vcpus.sort_by_key(|vcpu| vcpu.index);
        Ok(Self { cpu_us: cpu_us(&stat), resident_bytes: stat.rss * procfs::page_size(), vcpus })
    }
}

fn cpu_us(stat: &Stat) -> u64 {
    (stat.utime + stat.stime) * 1_000_000 / procfs::ticks_per_second()
}

impl Service {
    /// What a VM uses and has done.
    pub(super) fn stats(&self, name: &str) -> Result<StatsView, ControlError> {
        let entry = self.registry.find_live(name)?;
        let used = self.with_colony(|colony| Ok(colony.usage_of(entry.vm)?));
        let used = used.and_then(|usage| {
            let gone = |error| ControlError::Socket(std::io::Error::other(error));
            Ok((Host::of(usage.process).map_err(gone)?, usage))
        });
        let (host, usage) = match used {
            Ok(used) => used,
            // That it has ended says more.
            Err(error) => return self.registry.find_live(name).and(Err(error)),
        };
        let Usage { pages, pins, description, .. } = usage;
        Ok(StatsView {
            name: entry.name.clone(),
            id: entry.vm.0.into(),
            at_unix_ms: now_unix_ms(),
            cpu_us: host.cpu_us,
            resident_bytes: host.resident_bytes,
            vcpus: host.vcpus,
            shared_bytes: pages.shared * wide(PAGE_BYTES),
            unique_bytes: (pages.exclusive + pages.lent) * wide(PAGE_BYTES),
            pages: pages.into(),
            pins,
            faults: Faults {
                touch: description.leaves_resolved,
                store: description.store_faults,
                host: description.minor_faults,
            },
            publication: PublicationStats {
                blocks: description.blocks_published,
                patches: description.patches_published,
                reused_leaves: description.leaves_reused,
                dropped_leaves: description.leaves_dropped,
            },
            dma: DmaStats {
                transfers: description.dma_transfers,
                failed: description.dma_failed,
                in_flight: description.dma_in_flight,
            },
        })
    }

    /// The colony.
    pub(super) fn colony_view(&self) -> Result<ColonyView, ControlError> {
        let entries = self.registry.all();
        self.with_colony(|colony| {
            let config = colony.config();
            Ok(ColonyView {
                version: env!("SALP_VERSION").to_owned(),
                keeper_pid: std::process::id(),
                socket: self.place.path().join(&self.socket),
                memory_bytes: config.memory.ram_bytes(),
                cpus: config.vcpus,
                arena_kind: format!("{:?}", colony.arena_kind()),
                arena_used_bytes: colony.arena_used_bytes()?,
                pool: PoolView { ready: colony.pool_ready(), size: config.pool },
                most_vms: config.members,
                live_vms: entries.iter().filter(|entry| entry.state.is_live()).count(),
                paused_vms: entries.iter().filter(|entry| entry.state == VmState::Paused).count(),
                ended_vms: entries.iter().filter(|entry| !entry.state.is_live()).count(),
                tables: (&colony.census()).into(),
            })
        })
    }

    /// Everything for Prometheus.
    pub(super) fn metrics(&self) -> Result<String, ControlError> {
        self.with_colony(|colony| metrics::text(self, colony))
    }
}
