//! Figures for Prometheus: `GET /metrics`, in the OpenMetrics text format.
//!
//! What is counted over time (forks and their stages) is kept here. All else is asked of the colony when
//! somebody wants it: nothing is measured that nobody looks at.

use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry as Metrics, Unit};

use super::registry::Entry;
use super::service::Service;
use super::{ControlError, VmState};
use crate::family::{Census, VmId};
use crate::keeper::Colony;
use crate::keeper::fork::ForkTimes;
use crate::keeper::usage::Usage;
use crate::words::{PAGE_BYTES, wide};

/// The format's media type.
pub(super) const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// How long the VMs may take to say what they use.
const USAGE_LIMIT: Duration = Duration::from_secs(2);
/// The smallest bucket, in seconds; each further one is twice as wide, up to 40 s.
const FIRST_BUCKET: f64 = 10e-6;
const BUCKETS: u16 = 22;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Stage {
    stage: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Vm {
    vm: String,
    id: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VmPages {
    vm: String,
    id: u32,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VmFaults {
    vm: String,
    id: u32,
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Publication {
    vm: String,
    fork: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Nodes {
    level: u32,
    sharing: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Sharing {
    sharing: &'static str,
}

type Histograms = Family<Stage, Histogram, fn() -> Histogram>;

fn histogram() -> Histogram {
    Histogram::new(exponential_buckets(FIRST_BUCKET, 2.0, BUCKETS))
}

/// What is counted as it happens.
pub(super) struct Counts {
    stages: Histograms,
    calls: Histogram,
    pauses: Histogram,
    forks: Counter,
    failed_forks: Counter,
    clones: Counter,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            stages: Histograms::new_with_constructor(histogram),
            calls: histogram(),
            pauses: histogram(),
            forks: Counter::default(),
            failed_forks: Counter::default(),
            clones: Counter::default(),
        }
    }
}

impl Counts {
    /// A fork, with what is known of each of its clones.
    pub(super) fn note_fork(&self, clones: &[ForkTimes]) {
        self.forks.inc();
        self.clones.inc_by(wide(clones.len()));
        for (number, times) in clones.iter().enumerate() {
            self.calls.observe(times.call_us / 1e6);
            for (stage, us) in times.stages_us.named() {
                // What the clones have in common is counted once.
                if number == 0 || matches!(stage, "clone" | "enter") {
                    self.stages.get_or_create(&Stage { stage }).observe(us / 1e6);
                }
            }
        }
        if let Some(first) = clones.first() {
            self.pauses.observe(first.pause_us / 1e6);
        }
    }

    /// A fork that gave nothing.
    pub(super) fn note_failed_fork(&self) {
        self.failed_forks.inc();
    }

    fn register(&self, metrics: &mut Metrics) {
        metrics.register_with_unit(
            "fork_stage",
            "Parts of a fork; clone and enter for each clone",
            Unit::Seconds,
            self.stages.clone(),
        );
        metrics.register_with_unit(
            "fork",
            "The request to a clone's vCPU entering the guest",
            Unit::Seconds,
            self.calls.clone(),
        );
        metrics.register_with_unit(
            "pause",
            "How long the source of a fork stood still",
            Unit::Seconds,
            self.pauses.clone(),
        );
        metrics.register("forks", "Forks done", self.forks.clone());
        metrics.register("failed_forks", "Forks that gave no clone", self.failed_forks.clone());
        metrics.register("clones", "Clones made", self.clones.clone());
    }
}

/// All figures, as text.
pub(super) fn text(service: &Service, colony: &Colony) -> Result<String, ControlError> {
    let mut metrics = Metrics::with_prefix("salp");
    let build = Info::new(vec![("version", env!("CARGO_PKG_VERSION")), ("commit", env!("SALP_COMMIT"))]);
    metrics.register("build", "What runs", build);
    service.counts.register(&mut metrics);
    let entries = service.registry.all();
    register_states(&mut metrics, &entries);
    let usage = colony.usage(USAGE_LIMIT);
    let name_of = |vm: VmId| {
        let entry = entries.iter().find(|entry| entry.vm == vm);
        // A clone that a guest has just made has no name yet.
        entry.map_or_else(String::new, |entry| entry.name.clone())
    };
    register_vms(&mut metrics, &usage, &name_of);
    register_tables(&mut metrics, colony);
    let backlog = Family::<Publication, Gauge>::default();
    for cut in colony.backlog() {
        let label = Publication { vm: name_of(cut.source), fork: cut.cut.get() };
        backlog.get_or_create(&label).set(signed(wide(cut.pending_leaves)));
    }
    metrics.register("publication_backlog_leaves", "Leaves (2 MiB) still to be published", backlog);
    let arena = Gauge::<i64>::default();
    arena.set(signed(colony.arena_used_bytes()?));
    metrics.register_with_unit("arena_used", "Memory that holds shared frames", Unit::Bytes, arena);
    let pool = Gauge::<i64>::default();
    pool.set(signed(wide(colony.pool_ready())));
    metrics.register("pool_ready_members", "Processes that are ready to become VMs", pool);
    let mut out = String::new();
    text::encode(&mut out, &metrics).map_err(|error| ControlError::Protocol(error.to_string()))?;
    Ok(out)
}

fn register_states(metrics: &mut Metrics, entries: &[Entry]) {
    let vms = Family::<State, Gauge>::default();
    for state in ["running", "paused", "stopped", "ended"] {
        vms.get_or_create(&State { state }).set(0);
    }
    for entry in entries {
        let state = match entry.state {
            VmState::Running => "running",
            VmState::Paused => "paused",
            VmState::Stopped => "stopped",
            VmState::Ended { .. } => "ended",
        };
        vms.get_or_create(&State { state }).inc();
    }
    metrics.register("vms", "VMs by state", vms);
}

fn register_vms(metrics: &mut Metrics, usage: &[Usage], name_of: &dyn Fn(VmId) -> String) {
    let pages = Family::<VmPages, Gauge>::default();
    let (shared, unique) = (Family::<Vm, Gauge>::default(), Family::<Vm, Gauge>::default());
    let pins = Family::<Vm, Gauge>::default();
    let faults = Family::<VmFaults, Counter>::default();
    for one in usage {
        let (vm, id) = (name_of(one.vm), one.vm.0);
        let label = Vm { vm: vm.clone(), id };
        let counts = &one.pages;
        let states = [
            ("zero", counts.zero),
            ("exclusive", counts.exclusive),
            ("lent", counts.lent),
            ("shared", counts.shared),
            ("pinned", counts.pinned),
            ("lost", counts.poisoned),
        ];
        for (state, count) in states {
            pages.get_or_create(&VmPages { vm: vm.clone(), id, state }).set(signed(count));
        }
        shared.get_or_create(&label).set(signed(counts.shared * wide(PAGE_BYTES)));
        unique.get_or_create(&label).set(signed((counts.exclusive + counts.lent) * wide(PAGE_BYTES)));
        pins.get_or_create(&label).set(signed(one.pins));
        let description = &one.description;
        let kinds = [
            ("touch", description.leaves_resolved),
            ("store", description.store_faults),
            ("host", description.minor_faults),
        ];
        for (kind, count) in kinds {
            faults.get_or_create(&VmFaults { vm: vm.clone(), id, kind }).inc_by(count);
        }
    }
    metrics.register("vm_pages", "Pages (4 KiB) of a VM by state; pinned ones are exclusive too", pages);
    metrics.register_with_unit("vm_shared", "Memory that a VM shares", Unit::Bytes, shared);
    metrics.register_with_unit("vm_unique", "Memory that a VM alone has", Unit::Bytes, unique);
    metrics.register("vm_pins", "Pins that devices hold", pins);
    let help = "Leaves found out (touch), stores that trapped (store), faults of the host's kernel (host)";
    metrics.register("vm_faults", help, faults);
}

fn register_tables(metrics: &mut Metrics, colony: &Colony) {
    let census = colony.census();
    let nodes = Family::<Nodes, Gauge>::default();
    for (level, Census { own, shared }) in census.levels() {
        nodes.get_or_create(&Nodes { level, sharing: "own" }).set(signed(wide(own)));
        nodes.get_or_create(&Nodes { level, sharing: "shared" }).set(signed(wide(shared)));
    }
    let records = Family::<Sharing, Gauge>::default();
    records.get_or_create(&Sharing { sharing: "own" }).set(signed(wide(census.records.own)));
    records.get_or_create(&Sharing { sharing: "shared" }).set(signed(wide(census.records.shared)));
    metrics.register("table_nodes", "Table nodes by level and sharing", nodes);
    metrics.register("table_records", "Leaf records by sharing", records);
}

/// The library's gauges are signed.
fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
