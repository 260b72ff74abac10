//! What goes over the control socket as JSON: VMs as users see them, requests, replies. The API's
//! document is made from these types and their comments.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::Problem;
use crate::member::messages::HowEnded;

/// Whether a VM runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase", tag = "state")]
pub enum VmState {
    /// It runs.
    Running,
    /// A user has paused it.
    Paused,
    /// A user has stopped it.
    Stopped,
    /// Its guest has ended, or its process.
    Ended {
        /// In which way.
        how: HowEnded,
        /// The exit status that the guest gave.
        status: Option<u32>,
        /// How it ended.
        text: String,
    },
}

impl VmState {
    /// Whether the VM has not ended: it runs or is paused.
    #[must_use]
    pub fn is_live(&self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }

    /// The state in a few words.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Running => "running".to_owned(),
            Self::Paused => "paused".to_owned(),
            Self::Stopped => "stopped".to_owned(),
            Self::Ended { how, status, text } => match (how, status) {
                (HowEnded::Exited, Some(status)) => format!("ended with {status}"),
                (HowEnded::Reset, _) => "reset".to_owned(),
                (HowEnded::Halted, _) => "halted".to_owned(),
                (HowEnded::Crashed, _) => format!("crashed: {}", first_line(text)),
                (HowEnded::Exited | HowEnded::Killed, _) => format!("ended: {}", first_line(text)),
            },
        }
    }
}

/// The rest describes a vCPU.
fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// A VM as users see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmView {
    /// Its name.
    pub name: String,
    /// Its number in its colony.
    pub id: u64,
    /// The name of the VM that it was cloned from.
    pub parent: Option<String>,
    /// Its number in the colony: names can be given again.
    pub parent_id: Option<u64>,
    /// Whether it runs.
    #[serde(flatten)]
    pub state: VmState,
    /// Its memory.
    pub memory_bytes: u64,
    /// Its vCPUs.
    pub cpus: u8,
    /// Its process, while it runs or is paused.
    pub pid: Option<u32>,
    /// The process of its colony.
    pub keeper_pid: u32,
    /// The socket of its colony.
    #[schema(value_type = String)]
    pub socket: PathBuf,
    /// The file that its console output goes to.
    #[schema(value_type = String)]
    pub console: PathBuf,
}

/// All VMs of a colony, in the order of their numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmList {
    /// Those that have ended too.
    pub vms: Vec<VmView>,
}

/// What to fork.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ForkRequest {
    /// How many clones of one cut.
    #[schema(minimum = 1, maximum = 64)]
    pub count: u64,
    /// The clone's name; of several, what their names begin with.
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    pub name: Option<String>,
    /// What the clones' names begin with: `-1`, `-2` and so on follow. Not beside `name`.
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    pub name_prefix: Option<String>,
    /// The clones stand still until they are resumed.
    pub paused: bool,
    /// How many processes are made at the same time, beyond those that are ready.
    #[schema(minimum = 1, maximum = 16)]
    pub parallel: u64,
    /// The answer comes when each clone's guest has said that it knows who it is (the identity device's
    /// `READY`), 30 s later at the latest. Not beside `paused`.
    pub wait_ready: bool,
    /// What each clone is told by its identity device: keys without `=`, 3,072 bytes in all.
    pub data: BTreeMap<String, String>,
}

impl Default for ForkRequest {
    /// One clone, whose name is made up, and that runs at once.
    fn default() -> Self {
        Self {
            count: 1,
            name: None,
            name_prefix: None,
            paused: false,
            parallel: 1,
            wait_ready: false,
            data: BTreeMap::new(),
        }
    }
}

/// A new clone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CloneView {
    /// Its name.
    pub name: String,
    /// Its number in its colony.
    pub id: u64,
    /// How long the source stood still, in microseconds.
    pub pause_us: f64,
    /// The request to the clone's vCPU entering the guest, in microseconds.
    pub call_us: f64,
    /// Its pages, as the fork left them; none where the source was gone before it could say.
    pub pages: Option<ClonePages>,
    /// The file that its console output goes to.
    #[schema(value_type = String)]
    pub console: PathBuf,
    /// What went wrong with it, though it is there: it did not say that it is ready.
    pub problem: Option<Problem>,
}

/// Pages of a clone, as its fork left them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClonePages {
    /// It had them at once: in the arena already, or never written.
    pub shared: u64,
    /// Its source lends them, until they are published.
    pub lent: u64,
    /// Copied in the pause, since a device held them.
    pub copied: u64,
}

/// A clone that could not be had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MissingClone {
    /// The name that it would have had, which is free again.
    pub name: String,
    /// Why.
    pub problem: Problem,
}

/// All clones of one fork.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ForkReply {
    /// The number of the fork in its colony.
    pub fork: u64,
    /// Those that there are, in the order of their names: one at least.
    pub clones: Vec<CloneView>,
    /// Those that could not be had.
    pub missing: Vec<MissingClone>,
}

/// What a VM is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StateRequest {
    /// Paused, or running.
    pub state: WantedState,
}

/// A state that a VM can be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum WantedState {
    /// It goes on.
    Running,
    /// It stands still.
    Paused,
}

/// A clone has returned to its cut.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ResetView {
    /// Its name.
    pub name: String,
    /// Pages that got the bytes of the cut in place.
    pub restored_pages: u64,
    /// Leaves (2 MiB) that are mapped afresh.
    pub remapped_leaves: u64,
    /// The order to its process to the order to its vCPUs to run, in microseconds.
    pub reset_us: f64,
    /// The parts.
    pub stages_us: ResetStages,
}

/// The parts of a reset, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ResetStages {
    /// Its vCPUs stopped.
    pub stop: f64,
    /// No transfer was under way any more.
    pub drain: f64,
    /// Its memory was that of the cut.
    pub memory: f64,
    /// Its vCPUs and devices were those of the cut.
    pub state: f64,
    /// The order to run was given.
    pub resume: f64,
}

/// A VM was stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StopReply {
    /// Its name.
    pub name: String,
    /// It was the last one.
    pub is_colony_ending: bool,
}

/// A VM was given console input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InputReply {
    /// How much of it found room.
    pub accepted_bytes: usize,
}

/// Pages of 4 KiB, by what they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pages {
    /// Never touched.
    pub zero: u64,
    /// The VM's alone; pinned ones too.
    pub exclusive: u64,
    /// The VM's, and clones wait for them to be published.
    pub lent: u64,
    /// Frames of the arena, which other VMs may see too; or not known yet.
    pub shared: u64,
    /// Held by a device.
    pub pinned: u64,
    /// Lost: the VM that had them was killed before they were published.
    pub lost: u64,
}

/// A VM's memory, leaf by leaf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryView {
    /// The VM's name.
    pub name: String,
    /// Its number in its colony.
    pub id: u64,
    /// Bytes of a page.
    pub page_bytes: u64,
    /// Bytes of a leaf.
    pub leaf_bytes: u64,
    /// Sums over all leaves. All but the pinned ones add up to the VM's memory.
    pub pages: Pages,
    /// The tables that say what the VM shares.
    pub tables: TablesView,
    /// Each leaf of its memory, ascending.
    pub leaves: Vec<LeafView>,
}

/// 2 MiB of a VM's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeafView {
    /// Its number: its guest-physical address is that times the bytes of a leaf.
    pub leaf: u32,
    /// Its pages.
    #[serde(flatten)]
    pub pages: Pages,
    /// What the VM has in common with others there. Two VMs with the same fork and leaf share that.
    pub block: Option<BlockView>,
}

/// What several VMs share of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BlockView {
    /// The number of the fork that the pages were shared at.
    pub fork: u64,
    /// Whether they are in the arena. Before that they are their source's lent pages.
    pub is_published: bool,
    /// How many VMs share them, this one included.
    pub vms: u32,
}

/// Tables: nodes of 512 entries, and leaf records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TablesView {
    /// The root's level first.
    pub levels: Vec<LevelView>,
    /// Leaf records that one table alone has.
    pub own_records: usize,
    /// Leaf records that several have.
    pub shared_records: usize,
}

/// Nodes of one level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LevelView {
    /// The level; EPT counts them the same way.
    pub level: u32,
    /// Nodes that one table alone has.
    pub own_nodes: usize,
    /// Nodes that several have.
    pub shared_nodes: usize,
}

/// What a VM uses and has done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StatsView {
    /// Its name.
    pub name: String,
    /// Its number in its colony.
    pub id: u64,
    /// When this was so, in milliseconds of Unix time.
    pub at_unix_ms: u64,
    /// Processor time of its process, in microseconds.
    pub cpu_us: u64,
    /// Memory of its process that is in RAM, shared or not.
    pub resident_bytes: u64,
    /// Each vCPU.
    pub vcpus: Vec<VcpuStats>,
    /// Memory that it shares with other VMs, or could.
    pub shared_bytes: u64,
    /// Memory that it alone has.
    pub unique_bytes: u64,
    /// Its pages.
    pub pages: Pages,
    /// Pins that its devices hold.
    pub pins: u64,
    /// Faults since it began.
    pub faults: Faults,
    /// What it has published for clones.
    pub publication: PublicationStats,
    /// The DMA engine.
    pub dma: DmaStats,
}

/// A vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VcpuStats {
    /// Which.
    pub index: u32,
    /// Processor time of its thread, in microseconds.
    pub cpu_us: u64,
}

/// Faults, by kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Faults {
    /// Leaves found out, at a first touch or because all was published.
    pub touch: u64,
    /// Stores to lent pages.
    pub store: u64,
    /// Minor faults of its process, which the host's kernel resolved.
    pub host: u64,
}

/// What was done for clones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PublicationStats {
    /// Blocks (2 MiB) written.
    pub blocks: u64,
    /// Single pages written.
    pub patches: u64,
    /// Leaves that nobody needed: nothing was written.
    pub reused_leaves: u64,
    /// Leaves whose own copy was dropped for the published one.
    pub dropped_leaves: u64,
}

/// Transfers of the DMA engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DmaStats {
    /// Completed.
    pub transfers: u64,
    /// Of these, ended with an error.
    pub failed: u64,
    /// Taken and not completed.
    pub in_flight: u64,
}

/// A colony: a VM and its clones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ColonyView {
    /// The version of salp that runs it.
    pub version: String,
    /// Its process.
    pub keeper_pid: u32,
    /// Its socket.
    #[schema(value_type = String)]
    pub socket: PathBuf,
    /// Memory of each VM.
    pub memory_bytes: u64,
    /// vCPUs of each VM.
    pub cpus: u8,
    /// Where shared pages are: `HugeTmpfs`, or what the host allows instead.
    pub arena_kind: String,
    /// Memory that holds shared pages.
    pub arena_used_bytes: u64,
    /// Processes that are ready to become VMs.
    pub pool: PoolView,
    /// How many VMs there can be at one time.
    pub most_vms: u32,
    /// VMs that run or are paused.
    pub live_vms: usize,
    /// Of these, paused.
    pub paused_vms: usize,
    /// VMs that have ended and are listed still.
    pub ended_vms: usize,
    /// All tables.
    pub tables: TablesView,
}

/// A pool of processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolView {
    /// Ready now.
    pub ready: usize,
    /// Kept ready.
    pub size: usize,
}

/// A VM was removed from the list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RemoveReply {
    /// Its name, which is free again.
    pub name: String,
    /// It was stopped for that, and was the last one.
    pub is_colony_ending: bool,
}
