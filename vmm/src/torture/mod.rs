//! `salp torture`: a family of VMs whose devices transfer data without a pause is forked, reset, paused
//! and killed at random, under memory pressure, and everything that its guests can see is checked.
//!
//! | module | what |
//! |---|---|
//! | [`script`] | decides, by a seed, what is done to whom |
//! | [`subject`] | one VM of the family: does what was decided, and judges what the VM says |
//! | [`herd`] | the family: who descends from whom, who may lose pages, what is counted |
//! | [`puppet`] | the guest where there is no KVM: a model of its memory and disk, kept here |
//! | [`pressure`] | a memory limit of its own, and swap |
//!
//! # What must hold
//! - Under KVM each guest checks its own memory by checksums and each transfer by what it moved (the
//!   `dma` case). A thread guest's memory and disk are compared with a model.
//! - A VM may be told that pages are lost only if one that it descends from was killed, by the torture or
//!   by the host at the memory limit, before it had published all that its clones need. Nobody ever reads
//!   a wrong byte, and nobody hangs.
//! - The whole-state checker holds, again and again, and every VM that should run gives word after it.
//! - At the end nothing is left: VMs, processes, tables, memory of the arena, descriptors.
//!
//! The first thing that does not hold ends the run and is the [`Report`]'s finding.
//!
//! # Known holes
//! What is done at the same time, and the moments of kills, are decided by the seed; what meets what is
//! up to the host. A limit is set where there is swap only, unless it is asked for: without swap a host
//! kills what it cannot page out. With swap it may do so too, where much is pinned: that is counted; a
//! process that dies in the same round by a fault of salp's own is then taken for its victim.

pub mod herd;
pub mod pressure;
mod puppet;
pub mod script;
pub mod subject;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use thiserror::Error;

use self::herd::Herd;
use self::pressure::{Pressed, Pressure};
use crate::keeper::{Colony, ColonyConfig, ColonyError};
use crate::kvm::KvmError;
use crate::member::messages::GuestKind;
use crate::words::MemoryShape;

/// Rounds between two runs of the checker.
const ROUNDS_BETWEEN_CHECKS: u64 = 12;

/// What is to be done.
pub struct Plan<'a> {
    /// How long.
    pub time: Duration,
    /// Memory of each VM.
    pub memory: MemoryShape,
    /// VMs alive at one time.
    pub vms: usize,
    /// What runs in them.
    pub guest: GuestKind,
    /// Decides what happens.
    pub seed: u64,
    /// Memory of the whole family, in bytes; none: what is sensible where there is swap.
    pub limit: Option<u64>,
    /// The salp binary, if it is not this process's.
    pub program: Option<PathBuf>,
    /// A fault that the run must find.
    pub plant: Option<Plant>,
    /// Asked now and then.
    pub is_interrupted: &'a (dyn Fn() -> bool + Sync),
    /// Told after every round.
    pub progress: &'a dyn Fn(&Summary),
}

/// A fault on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    /// A bit of a VM's memory is turned over behind everybody's back.
    Bit,
}

/// What was done, and what held.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Times that something was done.
    pub rounds: u64,
    /// Families begun.
    pub boots: u64,
    /// Forks, and the clones that they made.
    pub forks: u64,
    /// See `forks`.
    pub clones: u64,
    /// Forks that failed because the source was killed meanwhile or had lost pages.
    pub failed_forks: u64,
    /// The most generations between a root and a clone.
    pub deepest_chain: u64,
    /// Returns of a clone to its cut.
    pub resets: u64,
    /// VMs stopped for a while.
    pub pauses: u64,
    /// VMs whose process was killed.
    pub kills: u64,
    /// Processes of ended VMs that others still needed, killed.
    pub image_kills: u64,
    /// VMs whose process the host killed at the memory limit.
    pub host_kills: u64,
    /// VMs told that pages of theirs are lost.
    pub told_of_loss: u64,
    /// VMs that verified all of their memory and ended.
    pub verified_vms: u64,
    /// Transfers that guests verified, at least: what a VM did after its last word is not counted.
    pub transfers: u64,
    /// Bytes of these.
    pub transferred_bytes: u64,
    /// Runs of the checker.
    pub checks: u64,
    /// Host pages that it compared.
    pub pages_compared: u64,
    /// Those that the host moved meanwhile.
    pub pages_moved: u64,
    /// Leaves that became others meanwhile.
    pub leaves_changed: u64,
    /// The most swap that the family used, in bytes, as seen after the rounds.
    pub most_swapped_bytes: u64,
    /// Times that the family ran into its memory limit.
    pub limit_hits: u64,
}

/// How it went.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// What was done.
    pub summary: Summary,
    /// What did not hold.
    pub finding: Option<String>,
    /// Whether it was interrupted.
    pub is_interrupted: bool,
}

/// Why there was no torture.
#[derive(Debug, Error)]
pub enum TortureError {
    /// KVM.
    #[error("{0}")]
    Kvm(#[from] KvmError),
    /// The colony, before anything was done to it.
    #[error("{0}")]
    Colony(#[from] ColonyError),
    /// The memory limit that was asked for.
    #[error("--limit cannot be set: {0}")]
    Limit(String),
}

/// Puts the family under pressure, as far as the host allows. What it says goes to whoever asked.
///
/// # Errors
/// A limit was asked for and cannot be set.
pub fn press(plan: &Plan<'_>) -> Result<Pressure, TortureError> {
    let ram_bytes = plan.memory.ram_bytes();
    let most_bytes = ram_bytes.saturating_mul(crate::words::wide(plan.vms) + 2);
    // A family shares most of its memory; what it needs besides is what each has written.
    let usual_bytes = ram_bytes / 2 * 3 + OVERHEAD_BYTES;
    Pressure::apply(plan.limit, usual_bytes, most_bytes).map_err(TortureError::Limit)
}

/// What the processes of a small family need that is not their guests' memory.
const OVERHEAD_BYTES: u64 = 96 << 20;

/// Does it, under a pressure that [`press`] has made.
///
/// # Errors
/// It could not begin.
pub fn run(plan: &Plan<'_>, pressure: &Pressure) -> Result<Report, TortureError> {
    if plan.guest == GuestKind::Kvm {
        // Before any process is started: what is missing is said once, and clearly.
        crate::kvm::Kvm::open()?;
    }
    let mut config = ColonyConfig::new(plan.memory);
    config.guest = plan.guest;
    config.program.clone_from(&plan.program);
    config.backing_bytes = BACKING_BYTES;
    let colony = Colony::new(config)?;
    colony.warm()?;
    let begun = Instant::now();
    let mut herd = Herd::new(plan, &colony, pressure);
    let result = live(plan, &mut herd, pressure, begun);
    let (mut summary, is_interrupted) = herd.end();
    note_pressure(&mut summary, pressure.look());
    drop(colony);
    let finding = result.err().map(|finding| explain(&finding, &pressure.look()));
    Ok(Report { seed: plan.seed, seconds: begun.elapsed().as_secs_f64(), summary, finding, is_interrupted })
}

/// The disk of each VM. Small, so that what was written at one time is written over soon.
const BACKING_BYTES: u64 = 16 << 20;

fn live(
    plan: &Plan<'_>,
    herd: &mut Herd<'_>,
    pressure: &Pressure,
    begun: Instant,
) -> Result<(), subject::Finding> {
    let mut rounds = 0_u64;
    while begun.elapsed() < plan.time && !(plan.is_interrupted)() {
        herd.round()?;
        rounds += 1;
        if rounds.is_multiple_of(ROUNDS_BETWEEN_CHECKS) {
            herd.check()?;
        }
        note_pressure(&mut herd.summary, pressure.look());
        (plan.progress)(&herd.summary);
    }
    if (plan.is_interrupted)() {
        return Ok(());
    }
    herd.verify_all()?;
    herd.expect_nothing_left()
}

fn note_pressure(summary: &mut Summary, pressed: Pressed) {
    summary.most_swapped_bytes = summary.most_swapped_bytes.max(pressed.swapped_bytes);
    summary.limit_hits = summary.limit_hits.max(pressed.limit_hits);
}

/// A process that the host has killed for want of memory explains much.
fn explain(finding: &subject::Finding, pressed: &Pressed) -> String {
    match pressed.killed {
        0 => finding.to_string(),
        killed => format!(
            "{finding}; the host killed {killed} processes at the memory limit: give a higher --limit"
        ),
    }
}
