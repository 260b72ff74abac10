//! First VMs: with the built-in guest, or a kernel that is not, and input for its console.

use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;

use super::spec::CloneSpec;
use super::steward::Job;
use super::{Colony, ColonyError};
use crate::devices::identity::Identity;
use crate::family::{Family, VmId};
use crate::member::messages::{Order, Reply};

impl Colony {
    /// Starts the built-in guest in the colony's first VM.
    ///
    /// # Errors
    /// No member could be had, or it could not boot.
    pub fn boot(&self, command_line: &str) -> Result<VmId, ColonyError> {
        self.boot_as(None, command_line)
    }

    /// The same, in a VM that is called `name`.
    ///
    /// # Errors
    /// As there, or it cannot be called that.
    pub fn boot_as(&self, name: Option<&str>, command_line: &str) -> Result<VmId, ColonyError> {
        let backing_bytes = self.shared.config.backing_bytes;
        let command_line = command_line.to_owned();
        let order = |vm, identity| Order::Boot { vm, identity, command_line, backing_bytes };
        let base: Vec<_> = self.shared.config.backing_base.iter().map(|file| file.as_fd()).collect();
        self.boot_by(name, order, &base)
    }

    /// Makes a member the first VM by the order that `order` gives for its name and what it is told.
    fn boot_by(
        &self,
        name: Option<&str>,
        order: impl FnOnce(VmId, Identity) -> Order,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<VmId, ColonyError> {
        let spec = CloneSpec { name: name.map(str::to_owned), ..CloneSpec::default() };
        spec.identity(VmId(0)).check()?;
        self.shared.check_size()?;
        let (admission, refusal) = self.shared.admit(1);
        if let Some(refusal) = refusal {
            return Err(refusal.into());
        }
        let (member, (vm, identity)) = loop {
            let member = self.shared.take_member()?;
            let make = |family: &mut Family, slot| Ok(family.first_vm(slot));
            match self.shared.give_role(&member, None, (&spec, &admission), make) {
                // It died in the pool.
                Err(ColonyError::Died(_)) => {}
                other => break (Arc::clone(&member), other?),
            }
        };
        let answer = member.ask(order(vm, identity), descriptors);
        self.shared.post(Job::FillPool);
        match answer {
            Ok(_) => Ok(vm),
            Err(error) => {
                member.kill();
                member.wait_end();
                Err(error)
            }
        }
    }

    /// Starts `kernel` (a static ELF64 image or a bzImage) in the colony's first VM. Linux and its like
    /// need [`Irqchip::Full`](crate::kvm::Irqchip::Full) in the colony's configuration. The offset of
    /// the files is used and changed.
    ///
    /// # Errors
    /// No member could be had, or it refused: the image is wrong, or does not fit. The reason says how.
    pub fn boot_image(
        &self,
        kernel: &File,
        initrd: Option<&File>,
        command_line: &str,
    ) -> Result<VmId, ColonyError> {
        self.boot_image_as(None, kernel, initrd, command_line)
    }

    /// The same, in a VM that is called `name`.
    ///
    /// # Errors
    /// As there, or it cannot be called that.
    pub fn boot_image_as(
        &self,
        name: Option<&str>,
        kernel: &File,
        initrd: Option<&File>,
        command_line: &str,
    ) -> Result<VmId, ColonyError> {
        let backing_bytes = self.config().backing_bytes;
        let order = |vm, identity| Order::BootImage {
            vm,
            identity,
            command_line: command_line.to_owned(),
            has_initrd: initrd.is_some(),
            backing_bytes,
        };
        let descriptors: Vec<_> = std::iter::once(kernel).chain(initrd).map(File::as_fd).collect();
        self.boot_by(name, order, &descriptors)
    }

    /// Gives a VM's serial port input. Returns how many bytes found room; the rest is to be given again
    /// when the guest has read some, which [`MemberState`](super::member_handle::MemberState) counts.
    ///
    /// # Errors
    /// There is no such VM, or it refused, or its process ended.
    pub fn console_input(&self, vm: VmId, input: &[u8]) -> Result<usize, ColonyError> {
        match self.ask(vm, Order::ConsoleInput(input.to_vec()))? {
            Reply::Accepted(accepted) => Ok(accepted),
            other => Err(ColonyError::Refused { vm, reason: format!("it answered {other:?}") }),
        }
    }
}
