//! A VM that stands still, and the cut of it that can be used again; a VM that is ready.
//!
//! As long as nothing of a paused VM can have changed since its last cut, another fork needs no new
//! one: the keeper has the state, and the memory is the cut's. [`Still`] is what it keeps for that;
//! the cut is held meanwhile. Any order that may change the VM ends it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::fork::Taken;
use super::member_handle::MemberHandle;
use super::{Colony, ColonyError};
use crate::family::VmId;
use crate::member::messages::{Order, Reply};

/// The last cut of a VM that stood still at it.
pub(super) struct Still {
    /// [`MemberHandle::changes`] just before the cut.
    pub(super) changes: u64,
    /// The cut.
    pub(super) taken: Arc<Taken>,
}

impl Colony {
    /// Stops a VM's vCPUs and lets its devices complete nothing, until [`Colony::resume`]. It can be
    /// forked; its clones run.
    ///
    /// # Errors
    /// There is no such VM, or it did not stop, or its process ended.
    pub fn pause(&self, vm: VmId) -> Result<(), ColonyError> {
        let member = self.member(vm)?;
        let _changing = member.changing();
        member.ask(Order::Quiesce, &[])?;
        member.is_paused.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Lets a paused VM go on.
    ///
    /// # Errors
    /// There is no such VM, or its process ended.
    pub fn resume(&self, vm: VmId) -> Result<(), ColonyError> {
        let member = self.member(vm)?;
        let _changing = member.changing();
        member.is_paused.store(false, Ordering::SeqCst);
        member.ask(Order::Resume, &[]).map(|_| ())
    }

    /// Waits until a VM's guest has said that it knows who it is (the identity device's `READY`), since the
    /// VM began or was last reset. Returns the generation that it knows.
    ///
    /// # Errors
    /// There is no such VM, or its process or its guest's run ended first, or it said nothing for `limit`.
    pub fn wait_ready(&self, vm: VmId, limit: Duration) -> Result<u64, ColonyError> {
        let is_gone = || ColonyError::NotReady { vm, why: "it has been ended".to_owned() };
        let member = self.member(vm).map_err(|_| is_gone())?;
        let said = member.wait_for(limit, |state| {
            let ended = || state.ended.as_ref().map(|(_, text)| Err(text.clone()));
            state.ready.map(Ok).or_else(ended)
        });
        match said {
            Ok(Ok(generation)) => Ok(generation),
            Ok(Err(end)) => Err(ColonyError::NotReady { vm, why: format!("its run has ended: {end}") }),
            Err(ColonyError::Silent { seconds, .. }) => {
                let is_paused = member.is_paused.load(Ordering::SeqCst);
                let hint = if is_paused { "it is paused" } else { "does it use the identity device?" };
                let why = format!("its guest has not said so within {seconds} s: {hint}");
                Err(ColonyError::NotReady { vm, why })
            }
            Err(ColonyError::Died(_)) => Err(is_gone()),
            Err(error) => Err(error),
        }
    }

    /// Whether a VM is paused.
    ///
    /// # Errors
    /// There is no such VM.
    pub fn is_paused(&self, vm: VmId) -> Result<bool, ColonyError> {
        Ok(self.member(vm)?.is_paused.load(Ordering::SeqCst))
    }

    /// Asks a VM's member something.
    ///
    /// # Errors
    /// There is no such VM, or it refused, or its process ended.
    pub fn ask(&self, vm: VmId, order: Order) -> Result<Reply, ColonyError> {
        self.member(vm)?.ask(order, &[])
    }
}

impl MemberHandle {
    /// The last cut, if nothing can have changed since.
    pub(super) fn still_cut(&self) -> Option<Arc<Taken>> {
        let mut still = self.still();
        let known = still.take_if(|known| known.changes != self.changes());
        let found = still.as_ref().map(|still| Arc::clone(&still.taken));
        drop(still);
        // Without the lock: to let go of a cut takes the keeper's.
        drop(known);
        found
    }

    /// The VM stands still at this cut, unless it has changed or ended meanwhile. Whoever changes or ends it
    /// does so first and forgets then: one of the two sees the other.
    pub(super) fn stand_still(&self, still: Still) {
        let changes = still.changes;
        let before = self.still().replace(still);
        drop(before);
        if changes != self.changes() || !self.is_alive() {
            self.forget_still();
        }
    }

    /// The VM may change, or has ended: its last cut need not be held for further clones.
    pub(super) fn forget_still(&self) {
        let known = self.still().take();
        drop(known);
    }
}
