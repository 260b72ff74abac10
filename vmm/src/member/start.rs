//! What a first VM starts with: the built-in guest, or a kernel that is not; and what such kernels
//! expect of their machine besides: the serial port's interrupt, a way to reset it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use super::MemberError;
use crate::boot::{EntryState, ImageEntry, load_builtin, load_image};
use crate::devices::InterruptLine;
use crate::devices::identity::IdentityInterrupt;
use crate::devices::serial::SerialInterrupt;
use crate::kvm::{Irqchip, Level, VcpuThread, Vm};
use crate::space::Space;
use crate::window::Window;

/// The interrupt of the first serial port of a PC.
const SERIAL_PIN: u8 = 4;
/// That of the identity device: the second parallel port's, which no machine of salp has.
const IDENTITY_PIN: u8 = 5;
/// The keyboard controller's port for commands and status.
const KEYBOARD_PORT: u16 = 0x64;
/// Its command to reset the processor.
const KEYBOARD_RESET: u8 = 0xfe;

/// The reset control register of PC chipsets, and its bit that does it.
const RESET_PORT: u16 = 0xcf9;
const RESET_CPU: u8 = 1 << 2;

/// The files that come with an order to boot an image.
pub(super) struct ImageFiles {
    kernel: File,
    initrd: Option<File>,
}

impl ImageFiles {
    /// The kernel, then the initrd if there is one.
    pub(super) fn new(descriptors: Vec<OwnedFd>, has_initrd: bool) -> Result<Self, MemberError> {
        let mut files = descriptors.into_iter().map(File::from);
        match (files.next(), files.next(), files.next()) {
            (Some(kernel), initrd, None) if initrd.is_some() == has_initrd => Ok(Self { kernel, initrd }),
            _ => Err(MemberError::Protocol("an image comes with its kernel, and its initrd if it has one")),
        }
    }

    /// Loads them into fresh memory.
    pub(super) fn load(
        mut self,
        space: &Arc<Space<Window>>,
        vcpus: u8,
        command_line: &str,
    ) -> Result<ImageEntry, MemberError> {
        let memory = super::ram::boot_memory(space).map_err(MemberError::Window)?;
        Ok(load_image(&memory, vcpus, &mut self.kernel, self.initrd.as_mut(), command_line)?)
    }
}

/// The bit of `IA32_MISC_ENABLE` without which Linux does not trust string instructions (SDM 4, 2.1).
const MSR_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;

/// Puts the first vCPU at the image's entry. The others wait for its start-up interrupt, as KVM made
/// them.
pub(super) fn enter_image(vcpus: &[VcpuThread], entry: &ImageEntry) -> Result<(), MemberError> {
    let first = vcpus.first().ok_or(MemberError::Protocol("an image needs a vcpu"))?;
    let mut state = first.save()?;
    state.sregs = entry.special_registers(state.sregs);
    state.regs = entry.registers();
    for msr in state.msrs.iter_mut().filter(|msr| msr.index == MSR_MISC_ENABLE) {
        msr.value |= FAST_STRINGS;
    }
    Ok(first.set(&state)?)
}

/// An edge on a pin of the full irqchip. The line's "vector" is the pin.
struct PinLine(Weak<Vm>);

impl InterruptLine for PinLine {
    fn raise(&self, pin: u8) {
        // A VM that is gone has ended, and its guest misses no interrupt.
        let Some(vm) = self.0.upgrade() else { return };
        for level in [Level::High, Level::Low] {
            if let Err(error) = vm.set_irq_line(pin.into(), level) {
                tracing::error!(%error, pin, "an interrupt is lost");
            }
        }
    }
}

/// The interrupt of the serial port, in a VM that has pins.
pub(super) fn serial_interrupt(vm: Option<&Arc<Vm>>) -> Option<SerialInterrupt> {
    let vm = vm.filter(|vm| vm.irqchip() == Irqchip::Full)?;
    Some(SerialInterrupt { line: Arc::new(PinLine(Arc::downgrade(vm))), vector: SERIAL_PIN })
}

/// The interrupt of the identity device: a pin where the VM has some, else `line`.
pub(super) fn identity_interrupt(vm: Option<&Arc<Vm>>, line: &Arc<dyn InterruptLine>) -> IdentityInterrupt {
    match vm.filter(|vm| vm.irqchip() == Irqchip::Full) {
        Some(vm) => {
            IdentityInterrupt { line: Arc::new(PinLine(Arc::downgrade(vm))), pin: Some(IDENTITY_PIN) }
        }
        None => IdentityInterrupt { line: Arc::clone(line), pin: None },
    }
}

/// Whether a write to a port resets the machine.
pub(super) fn is_reset(port: u16, data: &[u8]) -> bool {
    match (port, data) {
        (KEYBOARD_PORT, &[command]) => command == KEYBOARD_RESET,
        (RESET_PORT, &[value]) => value & RESET_CPU != 0,
        _ => false,
    }
}

/// What a port reads that has no device but a meaning: the keyboard controller takes commands at once.
pub(super) fn read_port(port: u16, data: &mut [u8]) {
    if port == KEYBOARD_PORT {
        data.fill(0);
    }
}

/// Loads the built-in guest.
pub(super) fn load_builtin_guest(
    space: &Arc<Space<Window>>,
    vcpus: u8,
    command_line: &str,
) -> Result<EntryState, MemberError> {
    let memory = super::ram::boot_memory(space).map_err(MemberError::Window)?;
    Ok(load_builtin(&memory, vcpus, command_line)?)
}

/// Puts all vCPUs at the built-in guest's entry.
pub(super) fn enter_builtin(vcpus: &[VcpuThread], entry: &EntryState) -> Result<(), MemberError> {
    for (index, vcpu) in (0..).zip(vcpus) {
        let mut state = vcpu.save()?;
        state.sregs = entry.special_registers(index, state.sregs);
        state.regs = entry.registers(index);
        state.mp_state.mp_state = kvm_bindings::KVM_MP_STATE_RUNNABLE;
        vcpu.set(&state)?;
    }
    Ok(())
}
