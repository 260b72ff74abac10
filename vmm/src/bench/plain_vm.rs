//! A VM without salp's memory manager: what the baselines fork.
//!
//! [`PlainMemory`] is one mapping, [`PlainVm`] a KVM VM with one vCPU over it that runs the built-in
//! guest's `puppet` case on the calling thread; without KVM the orders are done by host code on the
//! mapping. It makes its VM, and saves and sets state, with the code that salp itself uses.
//!
//! Known holes: one vCPU, no devices, memory below the device hole only.
#![expect(unsafe_code, reason = "maps memory and hands it to a guest")]

use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{Ordering, fence};

use kvm_ioctls::VcpuExit;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use salp_protocol::{call, layout, order, port};
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::BenchError;
use crate::boot::load_builtin;
use crate::kvm::{Irqchip, Kvm, Region, Vcpu, VcpuState, Vm, VmConfig, VmState, VouchedAddress};
use crate::member::messages::PuppetOrder;
use crate::words::{Gpa, LEAF_BYTES, index, wide};

/// What a guest is told that it is.
const FIRST_VM: u64 = 1;

/// The kind of pages of an anonymous mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pages {
    /// Huge where the host has them.
    Huge,
    /// 4 KiB.
    Small,
}

/// One mapping that is guest memory, its start a multiple of 2 MiB. Unmapped when dropped.
#[derive(Debug)]
pub(super) struct PlainMemory {
    reserved: *mut u8,
    start: *mut u8,
    len_bytes: usize,
}

impl PlainMemory {
    /// Anonymous, untouched.
    pub(super) fn anonymous(len_bytes: usize, pages: Pages) -> io::Result<Self> {
        let memory = Self::reserve(len_bytes)?;
        let advice = match pages {
            Pages::Huge => Advice::LinuxHugepage,
            Pages::Small => Advice::LinuxNoHugepage,
        };
        // SAFETY: the range is this mapping's own, and the advice changes no contents.
        unsafe { madvise(memory.start.cast(), len_bytes, advice) }?;
        Ok(memory)
    }

    /// A private view of `file`.
    pub(super) fn private_of(file: &std::fs::File, len_bytes: usize) -> io::Result<Self> {
        let memory = Self::reserve(len_bytes)?;
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::FIXED);
        // SAFETY: replaces a part of this mapping's own reserve, which nobody uses yet.
        unsafe { mmap(memory.start.cast(), len_bytes, access, flags, file, 0) }?;
        Ok(memory)
    }

    fn reserve(len_bytes: usize) -> io::Result<Self> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let reserved =
            unsafe { mmap_anonymous(std::ptr::null_mut(), len_bytes + LEAF_BYTES, access, flags) }?;
        let reserved = reserved.cast::<u8>();
        let skipped = reserved.align_offset(LEAF_BYTES);
        Ok(Self { reserved, start: reserved.wrapping_add(skipped), len_bytes })
    }

    /// Its length.
    pub(super) fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    fn check(&self, at: u64, len_bytes: u64) -> Result<*mut u8, BenchError> {
        match at.checked_add(len_bytes) {
            Some(end) if end <= wide(self.len_bytes) => Ok(self.start.wrapping_add(index(at))),
            _ => Err(BenchError::Baseline(format!("{len_bytes} bytes at {at:#x} are not memory"))),
        }
    }

    fn store(&self, at: u64, value: u64) -> Result<(), BenchError> {
        let place = self.check(at, 8)?.cast::<u64>();
        // SAFETY: inside the mapping, which is readable and writable and holds no Rust object.
        unsafe { place.write_volatile(value) };
        Ok(())
    }

    fn load(&self, at: u64) -> Result<u64, BenchError> {
        let place = self.check(at, 8)?.cast::<u64>();
        // SAFETY: as above.
        Ok(unsafe { place.read_volatile() })
    }

    /// Writes to every page.
    pub(super) fn touch(&self) -> Result<(), BenchError> {
        (0..wide(self.len_bytes)).step_by(crate::words::PAGE_BYTES).try_for_each(|at| self.store(at, 1))
    }

    /// Copies all of `from`, which is as long.
    pub(super) fn copy_from(&self, from: &Self) -> Result<(), BenchError> {
        self.check(0, wide(from.len_bytes))?;
        // SAFETY: two mappings of that length; no vCPU runs on either meanwhile.
        unsafe { std::ptr::copy_nonoverlapping(from.start, self.start, from.len_bytes) };
        Ok(())
    }

    /// Writes `[at, at + len_bytes)` to the same place of `file`.
    pub(super) fn write_to(&self, file: &std::fs::File, at: u64, len_bytes: u64) -> Result<(), BenchError> {
        let mut done = 0;
        while done < len_bytes {
            let from = self.check(at + done, len_bytes - done)?;
            let offset = i64::try_from(at + done).map_err(io::Error::other)?;
            // SAFETY: the range was checked; the kernel only reads it.
            let count =
                unsafe { libc::pwrite(file.as_raw_fd(), from.cast(), index(len_bytes - done), offset) };
            match u64::try_from(count) {
                Ok(count) if count > 0 => done += count,
                _ => return Err(io::Error::last_os_error().into()),
            }
        }
        Ok(())
    }

    fn region(&self) -> Region {
        // SAFETY: whoever has a VM over a mapping drops the VM first; nothing of Rust lies in it.
        let host = unsafe { VouchedAddress::new(self.start) };
        Region { gpa: Gpa(0), len_bytes: self.len_bytes, host }
    }

    fn guest_memory(&self) -> io::Result<GuestMemoryMmap> {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: the mapping outlives the loader, which is all that uses this view.
        let mapping = unsafe { MmapRegion::build_raw(self.start, self.len_bytes, access, flags) };
        let region = GuestRegionMmap::new(mapping.map_err(io::Error::other)?, GuestAddress(0));
        let region = region.ok_or_else(|| io::Error::other("a region of memory wraps around"))?;
        GuestMemoryMmap::from_regions(vec![region]).map_err(io::Error::other)
    }
}

impl Drop for PlainMemory {
    fn drop(&mut self) {
        // SAFETY: this mapping's own range; the VM over it, if any, was dropped before.
        if let Err(error) = unsafe { munmap(self.reserved.cast(), self.len_bytes + LEAF_BYTES) } {
            tracing::error!(%error, "memory stays mapped");
        }
    }
}

/// The state of a [`PlainVm`] but for its memory; empty without KVM.
pub(super) struct PlainState(Option<(VmState, VcpuState)>);

/// A guest over memory that somebody else owns: a child of `fork` has its parent's.
pub(super) struct Guest(Option<(Vcpu, Vm)>);

/// A VM and its memory.
pub(super) struct PlainVm {
    // In the order in which they must go.
    pub(super) guest: Guest,
    pub(super) memory: PlainMemory,
}

impl PlainVm {
    /// A VM without state.
    pub(super) fn shell(kvm: Option<&Kvm>, memory: PlainMemory) -> Result<Self, BenchError> {
        Ok(Self { guest: Guest::over(kvm, &memory)?, memory })
    }

    /// Boots the built-in guest and runs it until it waits for its first order.
    pub(super) fn boot(kvm: Option<&Kvm>, memory: PlainMemory) -> Result<Self, BenchError> {
        let mut vm = Self::shell(kvm, memory)?;
        if let Some((vcpu, _)) = &vm.guest.0 {
            let entry = load_builtin(&vm.memory.guest_memory()?, 1, "case=puppet")
                .map_err(|error| BenchError::Baseline(error.to_string()))?;
            let mut state = vcpu.save()?;
            state.sregs = entry.special_registers(0, state.sregs);
            state.regs = entry.registers(0);
            state.mp_state.mp_state = kvm_bindings::KVM_MP_STATE_RUNNABLE;
            vcpu.set(&state)?;
        }
        vm.guest.run_to_order()?;
        Ok(vm)
    }

    /// Has the guest do one order; returns its result.
    pub(super) fn order(&mut self, order: PuppetOrder) -> Result<u64, BenchError> {
        self.guest.order(&self.memory, order)
    }
}

impl Guest {
    /// A VM over `memory`, which must outlive it; nothing without KVM.
    pub(super) fn over(kvm: Option<&Kvm>, memory: &PlainMemory) -> Result<Self, BenchError> {
        let Some(kvm) = kvm else { return Ok(Self(None)) };
        if wide(memory.len_bytes()) > layout::DEVICE_HOLE {
            return Err(BenchError::Baseline("a baseline's memory ends below the device hole".to_owned()));
        }
        let config = VmConfig { vcpus: 1, irqchip: Irqchip::Split, regions: vec![memory.region()] };
        let (vm, vcpus) = Vm::new(kvm, &config)?;
        let vcpu = vcpus.into_iter().next();
        Ok(Self(vcpu.map(|vcpu| (vcpu, vm))))
    }

    /// Saves the state of a guest that waits for an order. Source and clone both ask for it anew: the
    /// clone's first instruction is the one that makes its first exit.
    pub(super) fn save(&self) -> Result<PlainState, BenchError> {
        let Some((vcpu, vm)) = &self.0 else { return Ok(PlainState(None)) };
        let mut regs = vcpu.fd().get_regs().map_err(kvm_failed)?;
        regs.rax = call::AGAIN;
        vcpu.fd().set_regs(&regs).map_err(kvm_failed)?;
        Ok(PlainState(Some((vm.save()?, vcpu.save()?))))
    }

    /// Sets a saved state.
    pub(super) fn set(&self, state: &PlainState) -> Result<(), BenchError> {
        if let (Some((vcpu, vm)), PlainState(Some((of_vm, of_vcpu)))) = (&self.0, state) {
            vm.set(of_vm)?;
            vcpu.set(of_vcpu)?;
        }
        Ok(())
    }

    /// Runs until the guest asks for its next order. All exits are complete then.
    pub(super) fn run_to_order(&mut self) -> Result<(), BenchError> {
        let Some((vcpu, _)) = &mut self.0 else { return Ok(()) };
        let fd = vcpu.fd_mut();
        loop {
            let number = match fd.run() {
                Ok(VcpuExit::IoOut(port::CALL, &[a, b, c, d])) => u32::from_le_bytes([a, b, c, d]),
                Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => continue,
                Err(errno) if errno.errno() == libc::EINTR => continue,
                Ok(other) => return Err(BenchError::Baseline(format!("the guest left with {other:?}"))),
                Err(errno) => return Err(kvm_failed(errno)),
            };
            // The exit is complete once KVM_RUN was entered again.
            fd.set_kvm_immediate_exit(1);
            match fd.run() {
                Err(errno) if errno.errno() == libc::EINTR => {}
                other => return Err(BenchError::Baseline(format!("an exit was not completed: {other:?}"))),
            }
            fd.set_kvm_immediate_exit(0);
            match number {
                call::NEXT => return Ok(()),
                call::WHO => {
                    let mut regs = fd.get_regs().map_err(kvm_failed)?;
                    regs.rax = FIRST_VM;
                    fd.set_regs(&regs).map_err(kvm_failed)?;
                }
                other => return Err(BenchError::Baseline(format!("the guest makes call {other}"))),
            }
        }
    }

    /// Has the guest do one order on `memory`; returns its result.
    pub(super) fn order(&mut self, memory: &PlainMemory, order: PuppetOrder) -> Result<u64, BenchError> {
        let Some((vcpu, _)) = &self.0 else { return by_host(memory, order) };
        let mut regs = vcpu.fd().get_regs().map_err(kvm_failed)?;
        let PuppetOrder { order, a, b, c, d } = order;
        (regs.rax, regs.rdi, regs.rsi, regs.rdx, regs.r8) = (order, a, b, c, d);
        vcpu.fd().set_regs(&regs).map_err(kvm_failed)?;
        self.run_to_order()?;
        let Some((vcpu, _)) = &self.0 else { return Ok(0) };
        Ok(vcpu.fd().get_regs().map_err(kvm_failed)?.rdi)
    }
}

/// The orders that the baselines give, done by the host on the mapping.
fn by_host(memory: &PlainMemory, PuppetOrder { order, a, b, c, d }: PuppetOrder) -> Result<u64, BenchError> {
    // The mapping is no Rust object: nothing may be kept over the order's end.
    fence(Ordering::SeqCst);
    match order {
        order::NOTHING => Ok(0),
        order::STORE_STRIDE => (0..c).try_for_each(|page| memory.store(a + page * d, b)).map(|()| 0),
        order::SUM_STRIDE => {
            (0..c).try_fold(0_u64, |sum, page| Ok(sum.wrapping_add(memory.load(a + page * d)?)))
        }
        other => Err(BenchError::Baseline(format!("the host does not know order {other}"))),
    }
}

fn kvm_failed(errno: kvm_ioctls::Error) -> BenchError {
    BenchError::Baseline(format!("KVM: {errno}"))
}
