//! The whole-state checker: stops every VM, recomputes everything, compares.
//!
//! Besides what [`Family::check`](crate::family::Family::check) recounts: no two windows have the
//! same anonymous page; pages that two windows map of one block are one page; what is pinned is
//! exclusive; the sums of each VM's pages are its memory.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use thiserror::Error;

use super::member_handle::MemberHandle;
use super::{Colony, ColonyError};
use crate::family::VmId;
use crate::frames::CutId;
use crate::member::messages::{Order, Reply};
use crate::space::{Backing, LeafReport, PageCounts, SpaceReport};
use crate::window::Pagemap;
use crate::words::{Gfn, LEAF_PAGES, LeafNumber, wide};

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

/// What the checker saw.
#[derive(Clone, Debug, Default)]
pub struct Checked {
    /// Each VM's pages.
    pub vms: BTreeMap<VmId, PageCounts>,
    /// Host pages compared.
    pub pages_compared: u64,
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
        let mut seen = Vec::new();
        for member in members {
            let report = match member.ask(Order::Harvest, &[])? {
                Reply::Harvest(report) => *report,
                _ => return Err(ColonyError::Refused { vm: member.vm(), reason: "no harvest".to_owned() }),
            };
            let window = match member.ask(Order::Describe, &[])? {
                Reply::Describe(description) => description.window,
                _ => 0,
            };
            seen.push(Seen { member: Arc::clone(member), report, window });
        }
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
        checked.pages_compared = compare_pages(&seen)?;
        Ok(checked)
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

/// Compares host frame numbers of all VMs; returns how many pages were looked at. Where the host
/// does not show them (all 0), nothing is compared.
fn compare_pages(seen: &[Seen]) -> Result<u64, ColonyError> {
    let mut own: HashMap<u64, (VmId, Gfn)> = HashMap::new();
    let mut shared: HashMap<(CutId, LeafNumber, usize), u64> = HashMap::new();
    let mut compared = 0;
    for one in seen {
        let vm = one.member.vm();
        let pagemap = Pagemap::open_of(one.member.process())?;
        for leaf in &one.report.leaves {
            if leaf.backing == Backing::Trapped || leaf.backing == Backing::Lost {
                continue;
            }
            check_pins(vm, leaf)?;
            let frames = pagemap.frame_numbers(one.window + leaf.leaf.gpa().0, LEAF_PAGES)?;
            for (position, frame) in frames.into_iter().enumerate().filter(|(_, frame)| *frame != 0) {
                let gfn = leaf.leaf.gfn(position);
                compared += 1;
                if leaf.exclusive.contains(position) || leaf.lent.contains(position) {
                    if let Some((other, other_gfn)) = own.insert(frame, (vm, gfn)) {
                        return Err(CheckFault::SamePage { vm, gfn, other, other_gfn }.into());
                    }
                } else if let Backing::Block(cut) = leaf.backing
                    && *shared.entry((cut, leaf.leaf, position)).or_insert(frame) != frame
                {
                    return Err(CheckFault::NotShared { vm, gfn }.into());
                }
            }
        }
    }
    Ok(compared)
}

fn check_pins(vm: VmId, leaf: &LeafReport) -> Result<(), CheckFault> {
    match leaf.pinned.minus(&leaf.exclusive).iter().next() {
        Some(position) => Err(CheckFault::PinnedNotExclusive { vm, gfn: leaf.leaf.gfn(position) }),
        None => Ok(()),
    }
}
