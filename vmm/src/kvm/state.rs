//! Everything a vCPU is: saved from one, set into another, sent as bytes between.
//!
//! Key types: [`VcpuState`] (one vCPU's state, serialisable) and [`StateLayout`] (what this host's
//! KVM has to be asked for, found once).
//!
//! # Order
//! Saving asks for `mp_state` first, since that ioctl takes in INIT and SIPI events that the other
//! parts then show. Setting goes: TSC frequency, `mp_state`, sregs (mode, APIC base), regs, xcrs,
//! xsave (whose layout xcr0 decides), debug registers, LAPIC (needs the APIC base), MSRs (the TSC
//! deadline needs the LAPIC's timer mode and the TSC, so those two come last, in this order),
//! events (setting registers drops a pending exception).
//!
//! # Time
//! A clone's clocks show what its source's show, to some microseconds, however long the clone took to
//! start: its first instruction may be late, its time is right. It never runs backward.
//! - The TSC is set to its saved value plus what the host's clock says has passed since. KVM gives vCPUs
//!   whose values were set within a second of what the first one's shows the same offset, that of the
//!   first: no vCPU sees less than it saw before the cut. A software KVM runs `rdtsc` natively: there the
//!   guest sees the host's TSC, which goes on by itself.
//! - kvmclock goes on from the VM's saved clock ([`VmState`](super::VmState)) likewise, to be set before
//!   the vCPUs; its system-time MSR is set, and KVM writes a new time page at the next entry.
//! - The wall-clock MSRs are *not* set: each write makes KVM store the host's wall clock in guest
//!   memory, which a clone must not suffer twice (and which would fault on memory not there yet).
//!   What the guest last read stays where it is.
//!
//! Setting a state may touch guest memory (kvmclock and steal-time pages are looked up): whoever
//! resolves the window's faults must be at work before.
#![expect(unsafe_code, reason = "the xsave ioctls trust their caller with the buffer's size")]

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_XSAVE2, Msrs, Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::error::KvmError;
use super::host::Kvm;
use super::vcpu::monotonic_ns;

/// Bytes of the XSAVE area in the original API; anything more comes with `KVM_CAP_XSAVE2`.
const XSAVE_BYTES: usize = size_of::<kvm_xsave>();
/// The most MSRs asked for in one ioctl (KVM takes 256).
const MSR_BATCH: usize = 128;

/// The time-stamp counter.
const MSR_TSC: u32 = 0x10;
/// The LAPIC timer's deadline.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// The wall-clock MSRs of kvmclock, old and new.
const MSR_WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];

/// What to ask this host's KVM for. The same for all vCPUs of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateLayout {
    /// The MSRs that can be read, in the order in which they are to be set.
    msr_indices: Vec<u32>,
    /// Bytes of the XSAVE area, 4096 at least, a multiple of 4.
    xsave_bytes: usize,
}

impl StateLayout {
    /// Finds the layout with the help of any vCPU, or returns the one found before.
    pub(super) fn of(kvm: &Kvm, vm: &VmFd, vcpu: &VcpuFd) -> Result<Arc<Self>, KvmError> {
        if let Some(layout) = kvm.layout_cell().get() {
            return Ok(Arc::clone(layout));
        }
        let list = kvm.fd().get_msr_index_list().map_err(KvmError::ioctl("KVM_GET_MSR_INDEX_LIST"))?;
        let mut msr_indices = Vec::new();
        for &index in list.as_slice() {
            // KVM_GET_MSRS returns how many it could read: 0 tells that this one is not readable.
            if read_msrs(vcpu, &[index])?.len() == 1 {
                msr_indices.push(index);
            }
        }
        msr_indices.sort_by_key(|&index| match index {
            MSR_TSC => 1,
            MSR_TSC_DEADLINE => 2,
            _ => 0,
        });
        let area = vm.check_extension_raw(KVM_CAP_XSAVE2.into());
        let xsave_bytes = usize::try_from(area).unwrap_or(0).max(XSAVE_BYTES).next_multiple_of(4);
        let layout = Arc::new(Self { msr_indices, xsave_bytes });
        Ok(Arc::clone(kvm.layout_cell().get_or_init(|| layout)))
    }

    /// How many MSRs a state has.
    #[must_use]
    pub const fn msr_count(&self) -> usize {
        self.msr_indices.len()
    }
}

/// One model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// The register's number.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// The whole state of one vCPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// The TSC's frequency in kHz, 0 where KVM does not tell.
    pub tsc_khz: u32,
    /// When the MSRs were read, in nanoseconds of `CLOCK_MONOTONIC`.
    pub saved_at_ns: u64,
    /// Running, halted, waiting for a start-up interrupt.
    pub mp_state: kvm_mp_state,
    /// General registers, `rip`, `rflags`.
    pub regs: kvm_regs,
    /// Segments, descriptor tables, control registers, EFER, APIC base.
    pub sregs: kvm_sregs,
    /// Extended control registers (xcr0).
    pub xcrs: kvm_xcrs,
    /// The XSAVE area (FPU, SSE, AVX and further), as the processor lays it out.
    pub xsave: Vec<u8>,
    /// Debug registers.
    pub debug: kvm_debugregs,
    /// The local APIC's registers.
    pub lapic: kvm_lapic_state,
    /// All readable MSRs, in the order in which they are to be set.
    pub msrs: Vec<Msr>,
    /// Exceptions, interrupts, NMI and SMI that are pending or being delivered.
    pub events: kvm_vcpu_events,
}

/// What is known of a vCPU without asking for it.
#[derive(Debug, Default)]
pub struct Known {
    /// Everything: it has not run since.
    pub all: Option<Box<VcpuState>>,
    /// Its TSC's frequency, which nobody else sets.
    pub tsc_khz: Option<u32>,
    /// Whether it runs or what it waits for.
    pub mp_state: Option<kvm_mp_state>,
}

impl VcpuState {
    /// Saves a vCPU that is not running and has no unfinished I/O.
    ///
    /// # Errors
    /// The ioctl that failed.
    pub fn save(fd: &VcpuFd, layout: &StateLayout) -> Result<Self, KvmError> {
        Ok(Self {
            mp_state: KvmError::call("KVM_GET_MP_STATE", || fd.get_mp_state())?,
            // Not told on hosts with an unstable TSC (EIO): then there is nothing to compare.
            tsc_khz: fd.get_tsc_khz().unwrap_or(0),
            regs: KvmError::call("KVM_GET_REGS", || fd.get_regs())?,
            sregs: KvmError::call("KVM_GET_SREGS", || fd.get_sregs())?,
            xcrs: KvmError::call("KVM_GET_XCRS", || fd.get_xcrs())?,
            xsave: get_xsave(fd, layout)?,
            debug: KvmError::call("KVM_GET_DEBUGREGS", || fd.get_debug_regs())?,
            lapic: KvmError::call("KVM_GET_LAPIC", || fd.get_lapic())?,
            saved_at_ns: monotonic_ns(),
            msrs: save_msrs(fd, layout)?,
            events: KvmError::call("KVM_GET_VCPU_EVENTS", || fd.get_vcpu_events())?,
        })
    }

    /// Makes a vCPU what this state says; parts that it is [`Known`] to have are not set again (each ioctl
    /// costs microseconds). The vCPU is not running; after an error it is in an
    /// undefined state and must be set again or dropped.
    ///
    /// # Errors
    /// The ioctl that failed, the MSR that was refused, or a state from a host whose XSAVE area is
    /// larger than this one's.
    pub fn set(&self, fd: &VcpuFd, layout: &StateLayout, known: &Known) -> Result<(), KvmError> {
        let all = known.all.as_deref();
        let differs = |is_equal: fn(&Self, &Self) -> bool| all.is_none_or(|known| !is_equal(self, known));
        let is_other_tsc = || fd.get_tsc_khz().is_ok_and(|khz| khz != self.tsc_khz);
        if self.tsc_khz != 0 && known.tsc_khz != Some(self.tsc_khz) && is_other_tsc() {
            KvmError::call("KVM_SET_TSC_KHZ", || fd.set_tsc_khz(self.tsc_khz))?;
        }
        if known.mp_state != Some(self.mp_state) {
            KvmError::call("KVM_SET_MP_STATE", || fd.set_mp_state(self.mp_state))?;
        }
        KvmError::call("KVM_SET_SREGS", || fd.set_sregs(&self.sregs))?;
        KvmError::call("KVM_SET_REGS", || fd.set_regs(&self.regs))?;
        if differs(|a, b| a.xcrs == b.xcrs) {
            KvmError::call("KVM_SET_XCRS", || fd.set_xcrs(&self.xcrs))?;
        }
        if differs(|a, b| a.xsave == b.xsave) {
            set_xsave(fd, &self.xsave, layout)?;
        }
        if differs(|a, b| a.debug == b.debug) {
            KvmError::call("KVM_SET_DEBUGREGS", || fd.set_debug_regs(&self.debug))?;
        }
        KvmError::call("KVM_SET_LAPIC", || fd.set_lapic(&self.lapic))?;
        set_msrs(fd, &self.msrs, self.tsc_since_save())?;
        // Setting registers drops a pending exception: this comes last, and always.
        KvmError::call("KVM_SET_VCPU_EVENTS", || fd.set_vcpu_events(&self.events))
    }

    /// What the TSC has counted since the MSRs were read; 0 where its frequency is not known.
    fn tsc_since_save(&self) -> u64 {
        let since_ns = monotonic_ns().saturating_sub(self.saved_at_ns);
        let ticks = u128::from(since_ns) * u128::from(self.tsc_khz) / 1_000_000;
        u64::try_from(ticks).unwrap_or(0)
    }
}

/// A buffer for `layout.xsave_bytes`.
fn xsave_buffer(layout: &StateLayout) -> Xsave {
    let extra_words = (layout.xsave_bytes - XSAVE_BYTES) / size_of::<u32>();
    Xsave::new(extra_words).expect("the kernel's XSAVE area is a few KiB")
}

fn get_xsave(fd: &VcpuFd, layout: &StateLayout) -> Result<Vec<u8>, KvmError> {
    let mut area = xsave_buffer(layout);
    if layout.xsave_bytes == XSAVE_BYTES {
        let plain = KvmError::call("KVM_GET_XSAVE", || fd.get_xsave())?;
        return Ok(plain.region.iter().flat_map(|word| word.to_le_bytes()).collect());
    }
    // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 gave for this host (a VM's answer only
    // grows when the process enables more features by `arch_prctl`, which salp never does).
    KvmError::call("KVM_GET_XSAVE2", || unsafe { fd.get_xsave2(&mut area) })?;
    let words = area.as_fam_struct_ref().xsave.region.iter().chain(area.as_slice());
    Ok(words.flat_map(|word| word.to_le_bytes()).collect())
}

fn set_xsave(fd: &VcpuFd, bytes: &[u8], layout: &StateLayout) -> Result<(), KvmError> {
    if bytes.len() > layout.xsave_bytes || !bytes.len().is_multiple_of(4) {
        return Err(KvmError::StateMismatch {
            what: "xsave bytes",
            found: crate::words::wide(bytes.len()),
            expected: crate::words::wide(layout.xsave_bytes),
        });
    }
    let mut area = xsave_buffer(layout);
    let mut words =
        bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().expect("chunks of 4")));
    // SAFETY: only the words of the area are written, not its length.
    let head = unsafe { &mut area.as_mut_fam_struct().xsave.region };
    for (slot, word) in head.iter_mut().zip(&mut words) {
        *slot = word;
    }
    for (slot, word) in area.as_mut_slice().iter_mut().zip(words) {
        *slot = word;
    }
    // SAFETY: the buffer has the size that KVM reads on this host, see `get_xsave`.
    KvmError::call("KVM_SET_XSAVE", || unsafe { fd.set_xsave2(&area) })
}

/// Reads MSRs until the first that cannot be read; the result is that much shorter.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, KvmError> {
    let entries: Vec<_> =
        indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut msrs = Msrs::from_entries(&entries).expect("batches are below KVM's limit");
    let count = KvmError::call("KVM_GET_MSRS", || fd.get_msrs(&mut msrs))?;
    let msr = |entry: &kvm_msr_entry| Msr { index: entry.index, value: entry.data };
    Ok(msrs.as_slice().iter().take(count).map(msr).collect())
}

fn save_msrs(fd: &VcpuFd, layout: &StateLayout) -> Result<Vec<Msr>, KvmError> {
    let mut saved = Vec::with_capacity(layout.msr_indices.len());
    for batch in layout.msr_indices.chunks(MSR_BATCH) {
        let msrs = read_msrs(fd, batch)?;
        if msrs.len() != batch.len() {
            return Err(KvmError::StateMismatch {
                what: "readable msrs",
                found: crate::words::wide(msrs.len()),
                expected: crate::words::wide(batch.len()),
            });
        }
        saved.extend(msrs);
    }
    Ok(saved)
}

/// Sets all MSRs but the wall clock's, the TSC `tsc_ahead` ahead of its value. One that is refused does no
/// harm if it has the value already (some can be read but not written).
fn set_msrs(fd: &VcpuFd, msrs: &[Msr], tsc_ahead: u64) -> Result<(), KvmError> {
    let entry = |msr: &Msr| {
        let ahead = if msr.index == MSR_TSC { tsc_ahead } else { 0 };
        kvm_msr_entry { index: msr.index, data: msr.value.wrapping_add(ahead), ..Default::default() }
    };
    let entries: Vec<_> = msrs.iter().filter(|msr| !MSR_WALL_CLOCK.contains(&msr.index)).map(entry).collect();
    let mut rest = entries.as_slice();
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(MSR_BATCH)];
        let list = Msrs::from_entries(batch).expect("batches are below KVM's limit");
        let count = KvmError::call("KVM_SET_MSRS", || fd.set_msrs(&list))?;
        rest = rest.get(count..).unwrap_or_default();
        if count < batch.len()
            && let Some((refused, others)) = rest.split_first()
        {
            let (index, value) = (refused.index, refused.data);
            if read_msrs(fd, &[index])? != [Msr { index, value }] {
                return Err(KvmError::MsrRefused { index, value });
            }
            rest = others;
        }
    }
    Ok(())
}
