//! A colony whose first VM runs a kernel that is not the built-in one, and input for its console.

use std::fs::File;
use std::os::fd::AsFd as _;

use super::{Colony, ColonyError};
use crate::family::VmId;
use crate::member::messages::{Order, Reply};

impl Colony {
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
        let backing_bytes = self.config().backing_bytes;
        let order = |vm| Order::BootImage {
            vm,
            command_line: command_line.to_owned(),
            has_initrd: initrd.is_some(),
            backing_bytes,
        };
        let descriptors: Vec<_> = std::iter::once(kernel).chain(initrd).map(File::as_fd).collect();
        self.boot_by(order, &descriptors)
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
