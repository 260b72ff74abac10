//! Who is told what happens in a colony on its own: console output, ends, and forks that guests ask
//! for.
//!
//! An observer is called by the thread that hears all members: it must not wait for a member, nor for
//! anybody who does. What it is told of one VM comes in order, and may come before the fork that
//! made the VM has returned.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::fork::{Cloned, ForkTimes, Forked, times_of};
use super::member_handle::MemberHandle;
use super::{Colony, ColonyError, Shared};
use crate::board::BufferCounts;
use crate::family::VmId;
use crate::frames::CutId;
use crate::keeper::fork::entered_at;
use crate::member::messages::{HowEnded, Order, Reply};
use crate::words::PAGE_SHIFT;

/// See the module.
pub trait Observer: Send + Sync {
    /// A VM has written this to its console.
    fn console(&self, vm: VmId, bytes: &[u8]);
    /// A guest's run has ended, with its exit status if it gave one; the text says more.
    fn ended(&self, vm: VmId, how: HowEnded, status: Option<u32>, text: &str);
    /// A VM has been reset and begins again.
    fn restarted(&self, vm: VmId);
    /// A VM's process is gone.
    fn gone(&self, vm: VmId);
    /// All that a VM shared at these cuts is published.
    fn published(&self, _vm: VmId, _cuts: &[CutId]) {}
    /// The devices of some VM have pinned buffers for long, or let them go, for the first time since
    /// [`Colony::take_buffers`].
    fn buffers_changed(&self) {}
    /// The guest of `source` has asked for a fork, perhaps before whoever booted it knows of it: what the
    /// clone is called, if that is not the colony's to make up. Not called by the thread that hears all
    /// members: it may wait for others, but not for this colony.
    ///
    /// # Errors
    /// It gets no name: there is no fork.
    fn name_clone(&self, source: &str) -> Result<Option<String>, ColonyError> {
        let _ = source;
        Ok(None)
    }
    /// There is no clone of that name: the fork failed.
    fn forget_name(&self, name: &str) {
        let _ = name;
    }
    /// A guest has asked for a fork, and here it is.
    fn forked(&self, forked: Forked);
}

/// Pages of a clone, as its fork left them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForkPages {
    /// The clone had them at once: in the arena already, or never written.
    pub shared: u64,
    /// They stayed in the source's window, and are published afterwards.
    pub lent: u64,
    /// Copied in the pause: the pinned ones.
    pub copied: u64,
    /// The source's device held them right after the pause.
    pub pinned: u64,
}

impl Colony {
    /// From now on `observer` is told what happens, as long as it exists. The first one stays; with
    /// one, consoles are not kept in [`MemberState`](super::member_handle::MemberState).
    pub fn observe(&self, observer: Weak<dyn Observer>) {
        if self.shared.observer.set(observer).is_err() {
            tracing::error!("a colony has one observer");
        }
    }

    /// What the devices of each VM have pinned for long. Of what changes from now on whoever observes the
    /// colony is told, once.
    #[must_use]
    pub fn take_buffers(&self) -> BTreeMap<VmId, BufferCounts> {
        let shared = &self.shared;
        let inner = shared.lock();
        let counts = inner.vms.iter().map(|(vm, member)| (*vm, shared.board.member(member.slot())));
        counts.map(|(vm, area)| (vm, area.take_buffers())).collect()
    }

    /// Has every member look whether its guest has halted for good, and waits for all of them for
    /// `limit`. Whoever observes the colony is told before this returns.
    pub fn look_for_ends(&self, limit: Duration) {
        let members: Vec<_> = self.shared.lock().vms.values().cloned().collect();
        look(&members, limit);
    }

    /// As [`look_for_ends`](Self::look_for_ends), of one VM.
    pub fn look_for_end(&self, vm: VmId, limit: Duration) {
        let member = self.shared.lock().vms.get(&vm).cloned();
        look(member.as_slice(), limit);
    }

    /// How long a fork took, for one of its clones, without waiting for the clone's first exit: a guest
    /// that sleeps has none. Where the clone's vCPU has not entered the guest yet, the call ends with the
    /// order to do so.
    ///
    /// # Errors
    /// A process has ended.
    pub fn known_fork_times(&self, forked: &Forked, clone: &Cloned) -> Result<ForkTimes, ColonyError> {
        let source = self.member(forked.source)?;
        // The source's answer to this comes after its report on the end of the pause.
        source.ask(Order::Describe, &[])?;
        let resumed = forked.times.resumed;
        let reentered = source.state().reentered.get(&forked.cut).map_or(resumed, |(at, _)| *at);
        let member = self.member(clone.vm)?;
        let entered = match member.ask(Order::Describe, &[])? {
            Reply::Describe(description) => entered_at(&description).unwrap_or(clone.running_at),
            _ => clone.running_at,
        };
        let first_exit = member.state().first_exit.unwrap_or(u64::MAX);
        Ok(times_of(forked, clone, reentered, first_exit, entered))
    }
}

fn look(members: &[Arc<MemberHandle>], limit: Duration) {
    let asked: Vec<_> = members.iter().map(|member| member.begin(Order::Look, &[])).collect();
    let deadline = Instant::now() + limit;
    for asked in asked {
        let left = deadline.saturating_duration_since(Instant::now());
        if let Err(error) = asked.and_then(|asked| asked.wait_within(left)) {
            tracing::debug!(%error, "a vm cannot be looked at");
        }
    }
}

impl Colony {
    /// The pages of a fork's clones. None before the source has said what its memory was after the pause,
    /// which it does before it answers anything else, and where its process is gone.
    #[must_use]
    pub fn fork_pages(&self, forked: &Forked) -> Option<ForkPages> {
        let source = self.member(forked.source).ok()?;
        let (_, counts) = *source.state().reentered.get(&forked.cut)?;
        let total = self.config().memory.ram_bytes() >> PAGE_SHIFT;
        let (lent, copied) = (counts.lent, forked.figures.copied_pages);
        let shared = total.saturating_sub(lent + copied);
        Some(ForkPages { shared, lent, copied, pinned: counts.pinned })
    }
}

impl Shared {
    /// The observer, if there is one still.
    pub(super) fn observer(&self) -> Option<Arc<dyn Observer>> {
        self.observer.get().and_then(Weak::upgrade)
    }
}
