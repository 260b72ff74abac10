//! A clone's return to its cut, by order or because its guest asks.

use super::{Colony, ColonyError, Shared};
use crate::family::VmId;
use crate::member::messages::{Order, Reply, ResetReply};

impl Colony {
    /// Returns a clone to its cut: memory, vCPUs and devices are what they were when it began, and it
    /// goes on from there. Its own clones keep what they have. A guest that has ended by itself runs
    /// again.
    ///
    /// # Errors
    /// There is no such VM, it is no clone, or a page is pinned from outside: it goes on as before. The
    /// host refused: it stays stopped, and can be reset again or ended.
    pub fn reset(&self, vm: VmId) -> Result<ResetReply, ColonyError> {
        self.shared.reset(vm)
    }
}

impl Shared {
    pub(super) fn reset(&self, vm: VmId) -> Result<ResetReply, ColonyError> {
        let member = self.member(vm)?;
        let _changing = member.changing();
        let is_at_origin = self.lock().family.is_at_origin(vm)?;
        if !is_at_origin {
            // From the tables' change to the window's nothing may look at either.
            member.ask(Order::PrepareReset, &[])?;
            let mut inner = self.lock();
            inner.family.reset_vm(vm)?;
            inner.last_cut.remove(&vm);
        }
        match member.ask(Order::Reset, &[])? {
            Reply::Reset(reply) => Ok(reply),
            _ => Err(ColonyError::unexpected(vm)),
        }
    }

    /// A guest asks for what its member cannot do alone.
    pub(super) fn reset_for_guest(&self, vm: VmId, vcpu: usize) -> Result<(), ColonyError> {
        let result = self.reset(vm).map(|_| ());
        if result.is_err() {
            self.member(vm)?.ask(Order::RefuseReset { vcpu }, &[])?;
        }
        result
    }
}
