//! A VM without salp's memory manager: what the baselines fork.
//!
//! [`PlainMemory`] is one mapping, [`PlainVm`] a KVM VM with one vCPU over it that runs the built-in
//! guest's `puppet` case on the calling thread; without KVM the orders are done by host code on the
//! mapping. It makes its VM, and saves and sets state, with the code that salp itself uses.
//!
//! The mapping is laid out like guest-physical space, hole included, as salp's windows are.
//!
//! Known holes: one vCPU, no devices.
#![expect(unsafe_code, reason = "maps memory and hands it to a guest")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{Ordering, fence};

use kvm_ioctls::VcpuExit;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use salp_protocol::{call, order, port};
use serde::{Deserialize, Serialize};
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::BenchError;
use crate::boot::load_builtin;
use crate::kvm::vcpu::monotonic_ns;
use crate::kvm::{Irqchip, Kvm, Region, Vcpu, VcpuState, Vm, VmConfig, VmState, VouchedAddress};
use crate::member::messages::PuppetOrder;
use crate::words::{Gpa, LEAF_BYTES, LEAF_SHIFT, MemoryShape, index, wide};

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
    shape: MemoryShape,
}

impl PlainMemory {
    /// Anonymous, untouched.
    pub(super) fn anonymous(shape: MemoryShape, pages: Pages) -> io::Result<Self> {
        let memory = Self::reserve(shape)?;
        let advice = match pages {
            Pages::Huge => Advice::LinuxHugepage,
            Pages::Small => Advice::LinuxNoHugepage,
        };
        // SAFETY: the range is this mapping's own, and the advice changes no contents.
        unsafe { madvise(memory.start.cast(), memory.span_bytes(), advice) }?;
        Ok(memory)
    }

    /// A private view of `file`.
    pub(super) fn private_of(file: &File, shape: MemoryShape) -> io::Result<Self> {
        let memory = Self::reserve(shape)?;
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::FIXED);
        // SAFETY: replaces a part of this mapping's own reserve, which nobody uses yet.
        unsafe { mmap(memory.start.cast(), memory.span_bytes(), access, flags, file, 0) }?;
        Ok(memory)
    }

    fn reserve(shape: MemoryShape) -> io::Result<Self> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        let len_bytes = index(shape.span_bytes()) + LEAF_BYTES;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let reserved = unsafe { mmap_anonymous(std::ptr::null_mut(), len_bytes, access, flags) }?;
        let reserved = reserved.cast::<u8>();
        let skipped = reserved.align_offset(LEAF_BYTES);
        Ok(Self { reserved, start: reserved.wrapping_add(skipped), shape })
    }

    /// Its shape.
    pub(super) fn shape(&self) -> MemoryShape {
        self.shape
    }

    fn span_bytes(&self) -> usize {
        index(self.shape.span_bytes())
    }

    /// The runs of RAM: first byte and length.
    fn runs(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        let bytes = |leaves: u32| u64::from(leaves) << LEAF_SHIFT;
        self.shape.regions().into_iter().map(move |(first, leaves)| (first.gpa().0, bytes(leaves)))
    }

    fn check(&self, at: u64, len_bytes: u64) -> Result<*mut u8, BenchError> {
        if self.shape.contains(Gpa(at), index(len_bytes)) {
            return Ok(self.start.wrapping_add(index(at)));
        }
        Err(BenchError::Baseline(format!("{len_bytes} bytes at {at:#x} are not memory")))
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

    /// Puts bytes to the start of the memory.
    pub(super) fn put_first(&self, bytes: &[u8]) -> Result<(), BenchError> {
        let place = self.check(0, wide(bytes.len()))?;
        // SAFETY: inside the mapping, which is writable and holds no Rust object.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len()) };
        Ok(())
    }

    /// Writes to every page.
    pub(super) fn touch(&self) -> Result<(), BenchError> {
        let pages = |(from, bytes): (u64, u64)| (from..from + bytes).step_by(crate::words::PAGE_BYTES);
        self.runs().flat_map(pages).try_for_each(|at| self.store(at, 1))
    }

    /// Copies all of `from`, which has the same shape.
    pub(super) fn copy_from(&self, from: &Self) -> Result<(), BenchError> {
        from.runs().try_for_each(|(at, len_bytes)| {
            let (to, from) = (self.check(at, len_bytes)?, from.check(at, len_bytes)?);
            // SAFETY: two mappings of that length; no vCPU runs on either meanwhile.
            unsafe { std::ptr::copy_nonoverlapping(from, to, index(len_bytes)) };
            Ok(())
        })
    }

    /// Writes all of it to the same places of `file`.
    pub(super) fn write_all_to(&self, file: &File) -> Result<(), BenchError> {
        self.runs().try_for_each(|(at, len_bytes)| self.write_to(file, at, len_bytes))
    }

    /// Writes `[at, at + len_bytes)` to the same place of `file`.
    pub(super) fn write_to(&self, file: &File, at: u64, len_bytes: u64) -> Result<(), BenchError> {
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

    /// The runs of RAM in host addresses.
    pub(super) fn host_ranges(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        let start = wide(self.start.addr());
        self.runs().map(move |(at, len_bytes)| start + at..start + at + len_bytes)
    }

    fn regions(&self) -> Vec<Region> {
        let region = |(at, len_bytes): (u64, u64)| {
            // SAFETY: whoever has a VM over a mapping drops the VM first; nothing of Rust lies in it.
            let host = unsafe { VouchedAddress::new(self.start.wrapping_add(index(at))) };
            Region { gpa: Gpa(at), len_bytes: index(len_bytes), host }
        };
        self.runs().map(region).collect()
    }

    fn guest_memory(&self) -> io::Result<GuestMemoryMmap> {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let region = |(at, len_bytes): (u64, u64)| {
            let start = self.start.wrapping_add(index(at));
            // SAFETY: the mapping outlives the loader, which is all that uses this view.
            let mapping = unsafe { MmapRegion::build_raw(start, index(len_bytes), access, flags) };
            let region = GuestRegionMmap::new(mapping.map_err(io::Error::other)?, GuestAddress(at));
            region.ok_or_else(|| io::Error::other("a region of memory wraps around"))
        };
        let regions = self.runs().map(region).collect::<io::Result<_>>()?;
        GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)
    }
}

impl Drop for PlainMemory {
    fn drop(&mut self) {
        let len_bytes = self.span_bytes() + LEAF_BYTES;
        // SAFETY: this mapping's own range; the VM over it, if any, was dropped before.
        if let Err(error) = unsafe { munmap(self.reserved.cast(), len_bytes) } {
            tracing::error!(%error, "memory stays mapped");
        }
    }
}

/// The state of a [`PlainVm`] but for its memory; empty without KVM.
#[derive(Clone, Serialize, Deserialize)]
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

    /// Has the guest go over pages until `deadline_ns` of `CLOCK_MONOTONIC`; returns how many stores
    /// it has made for each second from `begin_ns` on.
    pub(super) fn stores_per_second(
        &mut self,
        order: PuppetOrder,
        begin_ns: u64,
        deadline_ns: u64,
    ) -> Result<f64, BenchError> {
        let stores = self.guest.count_until(&self.memory, order, deadline_ns)?;
        Ok(stores as f64 * 1e9 / (monotonic_ns() - begin_ns).max(1) as f64)
    }
}

impl Guest {
    /// A VM over `memory`, which must outlive it; nothing without KVM.
    pub(super) fn over(kvm: Option<&Kvm>, memory: &PlainMemory) -> Result<Self, BenchError> {
        let Some(kvm) = kvm else { return Ok(Self(None)) };
        let config = VmConfig { vcpus: 1, irqchip: Irqchip::Split, regions: memory.regions() };
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
        self.run_until(u64::MAX).map(|_| ())
    }

    /// Runs until the guest asks for its next order, which it is told to do at its first report after
    /// `deadline_ns`. Returns the count of its last report.
    fn run_until(&mut self, deadline_ns: u64) -> Result<u64, BenchError> {
        let Some((vcpu, _)) = &mut self.0 else { return Ok(0) };
        let fd = vcpu.fd_mut();
        let mut count = 0;
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
            let mut regs = fd.get_regs().map_err(kvm_failed)?;
            regs.rax = match number {
                call::NEXT => return Ok(count),
                call::WHO => FIRST_VM,
                call::PROGRESS => {
                    count = regs.rdi;
                    u64::from(monotonic_ns() >= deadline_ns)
                }
                other => return Err(BenchError::Baseline(format!("the guest makes call {other}"))),
            };
            fd.set_regs(&regs).map_err(kvm_failed)?;
        }
    }

    fn count_until(
        &mut self,
        memory: &PlainMemory,
        order: PuppetOrder,
        deadline_ns: u64,
    ) -> Result<u64, BenchError> {
        if self.0.is_none() {
            let PuppetOrder { a, b, c, d, .. } = order;
            let mut stores = 0;
            while monotonic_ns() < deadline_ns {
                for _ in 0..b {
                    memory.store(a + stores % c * d, stores / c + 1)?;
                    stores += 1;
                }
            }
            return Ok(stores);
        }
        self.give(order)?;
        self.run_until(deadline_ns)
    }

    fn give(&self, order: PuppetOrder) -> Result<(), BenchError> {
        let Some((vcpu, _)) = &self.0 else { return Ok(()) };
        let mut regs = vcpu.fd().get_regs().map_err(kvm_failed)?;
        let PuppetOrder { order, a, b, c, d } = order;
        (regs.rax, regs.rdi, regs.rsi, regs.rdx, regs.r8) = (order, a, b, c, d);
        vcpu.fd().set_regs(&regs).map_err(kvm_failed)
    }

    /// Has the guest do one order on `memory`; returns its result.
    pub(super) fn order(&mut self, memory: &PlainMemory, order: PuppetOrder) -> Result<u64, BenchError> {
        if self.0.is_none() {
            return by_host(memory, order);
        }
        self.give(order)?;
        self.run_to_order()?;
        let Some((vcpu, _)) = &self.0 else { return Ok(0) };
        Ok(vcpu.fd().get_regs().map_err(kvm_failed)?.rdi)
    }

    /// Runs the one instruction at the start of memory, which must be an output, in real mode.
    pub(super) fn run_first_byte(&mut self) -> Result<(), BenchError> {
        let Some((vcpu, _)) = &mut self.0 else { return Ok(()) };
        let mut state = vcpu.save()?;
        (state.sregs.cs.base, state.sregs.cs.selector) = (0, 0);
        (state.regs.rip, state.regs.rflags) = (0, 2);
        state.mp_state.mp_state = kvm_bindings::KVM_MP_STATE_RUNNABLE;
        vcpu.set(&state)?;
        loop {
            match vcpu.fd_mut().run() {
                Ok(VcpuExit::IoOut(..)) => return Ok(()),
                Err(errno) if errno.errno() == libc::EINTR => {}
                Ok(other) => {
                    return Err(BenchError::Baseline(format!("one instruction left with {other:?}")));
                }
                Err(errno) => return Err(kvm_failed(errno)),
            }
        }
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
