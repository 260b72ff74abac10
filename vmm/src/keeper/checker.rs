//! The whole-state checker: stops every VM, recomputes everything, compares.
//!
//! Besides what [`Family::check`](crate::family::Family::check) recounts: no two windows have the
//! same anonymous page; pages that two windows map of one block are one page; what is pinned is
//! exclusive; the sums of each VM's pages are its memory.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use thiserror::Error;

use super::host_pages::{self, Watched};
use super::member_handle::MemberHandle;
use super::{Colony, ColonyError};
use crate::family::VmId;
use crate::member::messages::{Order, Reply};
use crate::space::{PageCounts, SpaceReport};
use crate::words::{Gfn, LeafNumber, wide};

/// Something that does not add up.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CheckFault {
    /// Two VMs' own pages are one host page.
    #[error("{gfn} of {vm} and {other_gfn} of {other} are the same host page")]
    SamePage {
        /// One VM.
        vm: VmId,
        /// Its page.
        gfn: Gfn,
        /// The other.
        other: VmId,
        /// Its page.
        other_gfn: Gfn,
    },
    /// A page that should be shared is not the block's.
    #[error("{gfn} of {vm} is not the page of its block that others map")]
    NotShared {
        /// The VM.
        vm: VmId,
        /// Its page.
        gfn: Gfn,
    },
    /// A pinned page is not exclusive.
    #[error("{gfn} of {vm} is pinned and not exclusive")]
    PinnedNotExclusive {
        /// The VM.
        vm: VmId,
        /// Its page.
        gfn: Gfn,
    },
    /// A VM's pages do not sum up to its memory.
    #[error("the pages of {vm} sum up to {sum}, its memory has {memory}")]
    Sum {
        /// The VM.
        vm: VmId,
        /// Pages counted.
        sum: u64,
        /// Pages of RAM.
        memory: u64,
    },
}

impl CheckFault {
    /// The leaves that it is about.
    fn leaves(&self) -> Vec<LeafNumber> {
        match self {
            Self::SamePage { gfn, other_gfn, .. } => vec![gfn.leaf(), other_gfn.leaf()],
            Self::NotShared { gfn, .. } | Self::PinnedNotExclusive { gfn, .. } => vec![gfn.leaf()],
            Self::Sum { .. } => Vec::new(),
        }
    }
}

/// How often host pages are compared where publication goes on meanwhile.
const COMPARISONS: usize = 100;

/// What the checker saw.
#[derive(Clone, Debug, Default)]
pub struct Checked {
    /// Each VM's pages.
    pub vms: BTreeMap<VmId, PageCounts>,
    /// Host pages compared.
    pub pages_compared: u64,
    /// Those that did not add up because the host moved them meanwhile: they do.
    pub pages_moved: u64,
    /// Leaves that did not add up because they became others meanwhile: all was compared again.
    pub leaves_changed: u64,
}

struct Seen {
    member: Arc<MemberHandle>,
    report: SpaceReport,
    window: u64,
}

impl Colony {
    /// Checks the whole state, with every VM stopped meanwhile.
    ///
    /// # Errors
    /// What does not add up, or a VM that could not be looked at.
    pub fn check(&self) -> Result<Checked, ColonyError> {
        let members: Vec<_> = self.shared.lock().vms.values().cloned().collect();
        let mut stopped = Vec::new();
        let mut result = Ok(());
        for member in &members {
            match member.ask(Order::Quiesce, &[]) {
                Ok(_) => stopped.push(member),
                // It ended meanwhile: there is nothing left to look at.
                Err(ColonyError::Died(_)) => {}
                Err(error) => result = Err(error),
            }
        }
        let checked = result.and_then(|()| self.check_stopped(&stopped));
        for member in stopped.into_iter().filter(|member| !member.is_paused.load(Ordering::SeqCst)) {
            match member.ask(Order::Resume, &[]) {
                Ok(_) | Err(ColonyError::Died(_)) => {}
                Err(error) => return Err(error),
            }
        }
        checked
    }

    fn check_stopped(&self, members: &[&Arc<MemberHandle>]) -> Result<Checked, ColonyError> {
        let mut seen = harvest(members)?;
        self.check_tables(&seen)?;
        let mut checked = Checked::default();
        for one in &seen {
            let vm = one.member.vm();
            let counts = one.report.counts;
            let sum = counts.zero + counts.exclusive + counts.lent + counts.shared + counts.poisoned;
            let memory = self.config().memory.ram_bytes() / wide(crate::words::PAGE_BYTES);
            if sum != memory {
                return Err(CheckFault::Sum { vm, sum, memory }.into());
            }
            checked.vms.insert(vm, counts);
        }
        // VMs that stand still go on publishing, which changes what their pages are: only what was said
        // before and after the look can be held against them.
        for _ in 0..COMPARISONS {
            let Err(error) = compare(&seen, &mut checked) else { return Ok(checked) };
            let ColonyError::Check(fault) = &error else { return Err(error) };
            let again = harvest(members)?;
            if fault.leaves().iter().all(|leaf| is_same_said(&seen, &again, *leaf)) {
                return Err(error);
            }
            tracing::debug!(%error, "a leaf has become another while it was looked at");
            checked.leaves_changed += 1;
            seen = again;
        }
        Err(ColonyError::Unfit(format!("no leaf stood still in {COMPARISONS} comparisons of host pages")))
    }

    fn check_tables(&self, seen: &[Seen]) -> Result<(), ColonyError> {
        let mut inner = self.shared.lock();
        for one in seen {
            inner.family.harvest(one.member.vm(), &one.report.owned())?;
        }
        inner.family.book_released();
        Ok(inner.family.check()?)
    }
}

fn harvest(members: &[&Arc<MemberHandle>]) -> Result<Vec<Seen>, ColonyError> {
    let look = |member: &&Arc<MemberHandle>| {
        let report = match member.ask(Order::Harvest, &[])? {
            Reply::Harvest(report) => *report,
            _ => return Err(ColonyError::unexpected(member.vm())),
        };
        let window = match member.ask(Order::Describe, &[])? {
            Reply::Describe(description) => description.window,
            _ => 0,
        };
        Ok(Seen { member: Arc::clone(member), report, window })
    };
    members.iter().map(look).collect()
}

fn compare(seen: &[Seen], checked: &mut Checked) -> Result<(), ColonyError> {
    let watch = |one: &Seen| Watched::new(one.member.vm(), one.member.process(), one.window);
    let windows: io::Result<Vec<_>> = seen.iter().map(|one| Ok((watch(one)?, &one.report))).collect();
    host_pages::compare(&windows?, checked)
}

/// Whether all VMs say the same of a leaf at two times.
fn is_same_said(seen: &[Seen], again: &[Seen], leaf: LeafNumber) -> bool {
    let said = |one: &Seen| one.report.leaves.iter().find(|report| report.leaf == leaf).cloned();
    seen.iter().map(said).eq(again.iter().map(said))
}
