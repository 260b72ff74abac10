//! One KVM VM: memory slots, interrupt controller, clock, vCPUs.
//!
//! Key types: [`Vm`], made by [`Vm::new`] from a [`VmConfig`]; [`Vcpu`], a vCPU not yet running;
//! [`VmState`], the state that belongs to no vCPU.
//!
//! A VM is made whole: slots first, then the interrupt controller, then vCPUs with their CPUID (in
//! any other order a slot change waits milliseconds for a grace period of the kernel). It can be
//! made long before it is needed: a pool holds such shells, and a clone only sets their state.
#![expect(unsafe_code, reason = "hands host memory to the kernel as guest memory")]

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X86_DISABLE_EXITS, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MP_STATE_RUNNABLE, KVM_PIT_SPEAKER_DUMMY, KVM_X86_DISABLE_EXITS_HLT,
    kvm_clock_data, kvm_enable_cap, kvm_irqchip, kvm_mp_state, kvm_msi, kvm_pit_config, kvm_pit_state2,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::error::KvmError;
use super::host::Kvm;
use super::state::{Known, StateLayout, VcpuState};
use super::vcpu::monotonic_ns;
use crate::words::{Gpa, wide};

/// Where Intel hosts keep three pages of their own (a task state for real mode), in the device hole.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// Pins of the I/O APIC that a split irqchip leaves to user space.
const SPLIT_PINS: u64 = 24;

/// The address of a range of this process that becomes guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VouchedAddress(u64);

impl VouchedAddress {
    /// Vouches for a host range.
    ///
    /// # Safety
    /// As long as a VM with a [`Region`] at this address exists, the region's range stays reserved
    /// for that VM's guest: it may be remapped or unmapped, but never becomes memory in which Rust
    /// keeps anything, for the guest writes to it at any time.
    #[must_use]
    pub unsafe fn new(start: *mut u8) -> Self {
        Self(wide(start.expose_provenance()))
    }
}

/// A range of guest memory and where it lies in this process. It becomes one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First guest-physical address, a multiple of 4 KiB.
    pub gpa: Gpa,
    /// Length in bytes, a multiple of 4 KiB.
    pub len_bytes: usize,
    /// Where it lies.
    pub host: VouchedAddress,
}

/// Which interrupt controller the VM has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Irqchip {
    /// Local APICs in the kernel, devices interrupt by MSI. Cheap to make and to close.
    Split,
    /// Local APICs, I/O APIC, PIC and PIT in the kernel. For guests that need those; closing such
    /// a VM takes some 20 ms.
    Full,
}

/// What a VM is made of.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// How many vCPUs, 1 at least.
    pub vcpus: u8,
    /// The interrupt controller.
    pub irqchip: Irqchip,
    /// Guest memory.
    pub regions: Vec<Region>,
}

/// A message-signalled interrupt, as a device would write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msi {
    /// Where it is written: `0xfee0_0000` plus the APIC id shifted left by 12 (SDM 3A, 12.11.1).
    pub address: u64,
    /// What is written: the vector, and delivery and trigger mode.
    pub data: u32,
}

impl Msi {
    /// A fixed, edge-triggered interrupt with `vector` for the vCPU `vcpu`.
    #[must_use]
    pub fn fixed(vcpu: u8, vector: u8) -> Self {
        Self { address: 0xfee0_0000 | u64::from(vcpu) << 12, data: u32::from(vector) }
    }
}

/// The state of a VM that belongs to no vCPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmState {
    /// kvmclock, in nanoseconds since the guest's start.
    pub clock_ns: u64,
    /// When the clock was read, in nanoseconds of `CLOCK_MONOTONIC`.
    pub saved_at_ns: u64,
    /// The full irqchip's devices; none with the split one.
    pub devices: Option<FullIrqchipState>,
}

/// The state of the interrupt controllers and the timer of [`Irqchip::Full`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FullIrqchipState {
    /// First PIC, second PIC, I/O APIC.
    pub chips: [kvm_irqchip; 3],
    /// The timer.
    pub pit: kvm_pit_state2,
}

/// A KVM VM. Its descriptor may be used by any thread.
///
/// vCPUs hold the VM alive in the kernel: drop them (and their threads) first, see
/// [`close`](mod@super::close).
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    irqchip: Irqchip,
}

/// A vCPU that no thread runs yet.
#[derive(Debug)]
pub struct Vcpu {
    pub(super) fd: VcpuFd,
    pub(super) index: usize,
    pub(super) layout: Arc<StateLayout>,
    known: Mutex<Known>,
}

impl Vcpu {
    /// Its index in the VM, which is its APIC id.
    #[must_use]
    pub const fn index(&self) -> usize {
        self.index
    }

    /// Its descriptor, to set registers at boot.
    #[must_use]
    pub const fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Its descriptor, to run it on the calling thread.
    pub fn fd_mut(&mut self) -> &mut VcpuFd {
        self.forget();
        &mut self.fd
    }

    /// Remembers its state, so that the first state that is set into it costs less: for one that is
    /// made ahead.
    ///
    /// # Errors
    /// As [`VcpuState::save`].
    pub fn remember(&self) -> Result<(), KvmError> {
        let state = self.save()?;
        let (tsc_khz, mp_state) = (Some(state.tsc_khz), Some(state.mp_state));
        *self.known() = Known { all: Some(Box::new(state)), tsc_khz, mp_state };
        Ok(())
    }

    /// It is about to run: little is known of it any more.
    pub(super) fn forget(&self) {
        let mut known = self.known();
        known.all = None;
        known.mp_state = None;
    }

    /// It stands behind an instruction that it has just executed: it is neither halted nor unstarted.
    pub(super) fn note_awake(&self) {
        self.known().mp_state = Some(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE });
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Saves its state.
    ///
    /// # Errors
    /// As [`VcpuState::save`].
    pub fn save(&self) -> Result<VcpuState, KvmError> {
        VcpuState::save(&self.fd, &self.layout)
    }

    /// Sets its state.
    ///
    /// # Errors
    /// As [`VcpuState::set`].
    pub fn set(&self, state: &VcpuState) -> Result<(), KvmError> {
        let known = std::mem::take(&mut *self.known());
        state.set(&self.fd, &self.layout, &known)?;
        self.known().tsc_khz = Some(state.tsc_khz);
        Ok(())
    }
}

impl Vm {
    /// Makes a VM and its vCPUs, with the CPUID that this host supports.
    ///
    /// # Errors
    /// The ioctl that failed; nothing is left behind.
    pub fn new(kvm: &Kvm, config: &VmConfig) -> Result<(Self, Vec<Vcpu>), KvmError> {
        let fd = kvm.fd().create_vm().map_err(KvmError::ioctl("KVM_CREATE_VM"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(KvmError::ioctl("KVM_SET_TSS_ADDR"))?;
        for (slot, region) in (0..).zip(&config.regions) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.gpa.0,
                memory_size: wide(region.len_bytes),
                userspace_addr: region.host.0,
            };
            // SAFETY: whoever made the region's `VouchedAddress` vouches that the range is the
            // guest's for as long as the VM exists.
            unsafe { fd.set_user_memory_region(slot) }
                .map_err(KvmError::ioctl("KVM_SET_USER_MEMORY_REGION"))?;
        }
        let vm = Self { fd, irqchip: config.irqchip };
        if !kvm.description().kind.is_hardware() {
            vm.refuse_asynchronous_faults()?;
        }
        vm.create_irqchip()?;
        let mut vcpus = Vec::with_capacity(config.vcpus.into());
        for index in 0..config.vcpus {
            vcpus.push(vm.create_vcpu(kvm, index, config.vcpus)?);
        }
        Ok((vm, vcpus))
    }

    /// Has vCPUs wait for a page themselves. KVM would have a worker wait, which asks for a *writable*
    /// page whatever the guest wanted: a first read of a leaf that traps then makes a private copy of
    /// that page, and the leaf is mapped by small pages from then on, each a fault of 30 us here.
    ///
    /// KVM leaves that to vCPUs that may halt without it; to say so has no other effect where it
    /// emulates the guest's `HLT` anyway. (With hardware virtualization an idle guest would keep a
    /// processor.) Best effort: without it guests are right, and slower.
    fn refuse_asynchronous_faults(&self) -> Result<(), KvmError> {
        let halts = u64::from(KVM_X86_DISABLE_EXITS_HLT);
        let known = self.fd.check_extension_raw(KVM_CAP_X86_DISABLE_EXITS.into());
        if u64::try_from(known).unwrap_or(0) & halts == 0 {
            return Ok(());
        }
        let capability =
            kvm_enable_cap { cap: KVM_CAP_X86_DISABLE_EXITS, args: [halts, 0, 0, 0], ..Default::default() };
        self.fd.enable_cap(&capability).map_err(KvmError::ioctl("KVM_ENABLE_CAP"))
    }

    fn create_irqchip(&self) -> Result<(), KvmError> {
        match self.irqchip {
            Irqchip::Split => {
                let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
                split.args[0] = SPLIT_PINS;
                self.fd.enable_cap(&split).map_err(KvmError::ioctl("KVM_ENABLE_CAP(KVM_CAP_SPLIT_IRQCHIP)"))
            }
            Irqchip::Full => {
                self.fd.create_irq_chip().map_err(KvmError::ioctl("KVM_CREATE_IRQCHIP"))?;
                let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
                self.fd.create_pit2(pit).map_err(KvmError::ioctl("KVM_CREATE_PIT2"))
            }
        }
    }

    fn create_vcpu(&self, kvm: &Kvm, index: u8, vcpus: u8) -> Result<Vcpu, KvmError> {
        let fd = self.fd.create_vcpu(index.into()).map_err(KvmError::ioctl("KVM_CREATE_VCPU"))?;
        fd.set_cpuid2(&cpuid_of(kvm.supported_cpuid(), index, vcpus))
            .map_err(KvmError::ioctl("KVM_SET_CPUID2"))?;
        let layout = StateLayout::of(kvm, &self.fd, &fd)?;
        Ok(Vcpu { fd, index: index.into(), layout, known: Mutex::default() })
    }

    /// Which interrupt controller the VM has.
    #[must_use]
    pub const fn irqchip(&self) -> Irqchip {
        self.irqchip
    }

    /// Raises a message-signalled interrupt. Returns whether the guest's APIC took it.
    ///
    /// # Errors
    /// `KVM_SIGNAL_MSI` failed.
    pub fn raise_msi(&self, msi: Msi) -> Result<bool, KvmError> {
        let [low, high] = [msi.address & u64::from(u32::MAX), msi.address >> 32]
            .map(|half| u32::try_from(half).expect("half of 64 bits"));
        let msi = kvm_msi { address_lo: low, address_hi: high, data: msi.data, ..Default::default() };
        let taken = self.fd.signal_msi(msi).map_err(KvmError::ioctl("KVM_SIGNAL_MSI"))?;
        Ok(taken > 0)
    }

    /// Sets an input pin of the full irqchip.
    ///
    /// # Errors
    /// The VM has the split one, or `KVM_IRQ_LINE` failed.
    pub fn set_irq_line(&self, pin: u32, level: Level) -> Result<(), KvmError> {
        if self.irqchip != Irqchip::Full {
            return Err(KvmError::WrongIrqchip { operation: "set_irq_line", needed: "full" });
        }
        self.fd.set_irq_line(pin, level == Level::High).map_err(KvmError::ioctl("KVM_IRQ_LINE"))
    }

    /// Saves the clock and, with the full irqchip, its devices. All vCPUs are stopped.
    ///
    /// # Errors
    /// The ioctl that failed.
    pub fn save(&self) -> Result<VmState, KvmError> {
        let clock = KvmError::call("KVM_GET_CLOCK", || self.fd.get_clock())?;
        let saved_at_ns = monotonic_ns();
        let devices = match self.irqchip {
            Irqchip::Split => None,
            Irqchip::Full => Some(self.save_devices()?),
        };
        Ok(VmState { clock_ns: clock.clock, saved_at_ns, devices })
    }

    fn save_devices(&self) -> Result<FullIrqchipState, KvmError> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            KvmError::call("KVM_GET_IRQCHIP", || self.fd.get_irqchip(&mut chip))?;
            Ok::<_, KvmError>(chip)
        };
        Ok(FullIrqchipState {
            chips: [chip(KVM_IRQCHIP_PIC_MASTER)?, chip(KVM_IRQCHIP_PIC_SLAVE)?, chip(KVM_IRQCHIP_IOAPIC)?],
            pit: KvmError::call("KVM_GET_PIT2", || self.fd.get_pit2())?,
        })
    }

    /// Sets a saved state; no vCPU is running. Set it before the states of the vCPUs. The clock
    /// shows what the source's shows at this moment.
    ///
    /// # Errors
    /// The ioctl that failed, or the state is that of another irqchip.
    pub fn set(&self, state: &VmState) -> Result<(), KvmError> {
        self.set_devices(state)?;
        let since_ns = monotonic_ns().saturating_sub(state.saved_at_ns);
        let clock = kvm_clock_data { clock: state.clock_ns.saturating_add(since_ns), ..Default::default() };
        KvmError::call("KVM_SET_CLOCK", || self.fd.set_clock(&clock))
    }

    /// As [`set`](Self::set), of a VM whose clock was set to this state's before, and has gone on by itself
    /// since.
    ///
    /// # Errors
    /// As there.
    pub fn set_devices(&self, state: &VmState) -> Result<(), KvmError> {
        let operation = "setting this state";
        match (&state.devices, self.irqchip) {
            (None, Irqchip::Split) => {}
            (Some(devices), Irqchip::Full) => {
                for chip in &devices.chips {
                    KvmError::call("KVM_SET_IRQCHIP", || self.fd.set_irqchip(chip))?;
                }
                KvmError::call("KVM_SET_PIT2", || self.fd.set_pit2(&devices.pit))?;
            }
            (None, Irqchip::Full) => {
                return Err(KvmError::WrongIrqchip { operation, needed: "split" });
            }
            (Some(_), Irqchip::Split) => {
                return Err(KvmError::WrongIrqchip { operation, needed: "full" });
            }
        }
        Ok(())
    }
}

/// The level of an interrupt pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Not asserted.
    Low,
    /// Asserted.
    High,
}

impl AsRawFd for Vm {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// The host's leaves with the parts that tell vCPUs apart (SDM 2A, CPUID): the APIC id and the
/// number of logical processors.
fn cpuid_of(supported: &CpuId, index: u8, vcpus: u8) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ebx &= 0x0000_ffff;
                entry.ebx |= u32::from(index) << 24 | u32::from(vcpus) << 16;
            }
            // Extended topology: the x2APIC id.
            0xb | 0x1f => entry.edx = u32::from(index),
            _ => {}
        }
    }
    cpuid
}
