//! What VMs use and have done, for metrics: all members are asked at once, each within a limit.

use std::time::{Duration, Instant};

use super::map::page_sums;
use super::{Colony, ColonyError};
use crate::family::VmId;
use crate::member::messages::{Description, Order, Reply};
use crate::space::PageCounts;

/// What one VM uses and has done.
#[derive(Clone, Debug)]
pub struct Usage {
    /// Which.
    pub vm: VmId,
    /// Its process.
    pub process: u32,
    /// Its pages.
    pub pages: PageCounts,
    /// Pins that its devices hold.
    pub pins: u64,
    /// What it has done.
    pub description: Description,
}

impl Colony {
    /// What all VMs use. One that ends meanwhile, or does not answer within `limit`, is left out.
    #[must_use]
    pub fn usage(&self, limit: Duration) -> Vec<Usage> {
        let members: Vec<_> = self.shared.lock().vms.values().cloned().collect();
        let ask = |order: &Order| members.iter().map(|member| member.begin(order.clone(), &[])).collect();
        let (harvests, descriptions): (Vec<_>, Vec<_>) = (ask(&Order::Harvest), ask(&Order::Describe));
        let deadline = Instant::now() + limit;
        let left = || deadline.saturating_duration_since(Instant::now());
        let mut all = Vec::new();
        for ((member, harvest), described) in members.iter().zip(harvests).zip(descriptions) {
            let harvest = harvest.and_then(|asked| asked.wait_within(left()));
            let described = described.and_then(|asked| asked.wait_within(left()));
            match (harvest, described) {
                (Ok(Reply::Harvest(report)), Ok(Reply::Describe(description))) => {
                    let vm = member.vm();
                    let inner = self.shared.lock();
                    // It may have ended since.
                    let Ok(pages) = page_sums(&inner, vm, &report) else { continue };
                    let (process, pins) = (member.process(), report.pins);
                    all.push(Usage { vm, process, pages, pins, description: *description });
                }
                (Err(error), _) | (_, Err(error)) => {
                    tracing::debug!(vm = %member.vm(), %error, "a vm does not say what it uses");
                }
                _ => tracing::error!(vm = %member.vm(), "a member answered something else"),
            }
        }
        all
    }

    /// What one VM uses.
    ///
    /// # Errors
    /// There is no such VM, or its process ended.
    pub fn usage_of(&self, vm: VmId) -> Result<Usage, ColonyError> {
        let member = self.member(vm)?;
        let report = match member.ask(Order::Harvest, &[])? {
            Reply::Harvest(report) => *report,
            _ => return Err(ColonyError::unexpected(vm)),
        };
        let description = match member.ask(Order::Describe, &[])? {
            Reply::Describe(description) => *description,
            _ => return Err(ColonyError::unexpected(vm)),
        };
        let pages = page_sums(&self.shared.lock(), vm, &report)?;
        Ok(Usage { vm, process: member.process(), pages, pins: report.pins, description })
    }

    /// Members that are ready to become VMs.
    #[must_use]
    pub fn pool_ready(&self) -> usize {
        self.shared.pool.count()
    }
}
