#![expect(unsafe_code, reason = "test guests live in an anonymous mapping")]
//! Guests for the tests: hand-assembled programs in a small anonymous mapping, entered directly in
//! 64-bit mode; no boot, no operating system.
//!
//! On a software KVM only ring 3 runs natively, and the I/O permission bitmap decides about ports
//! there: the TSS has one that allows all. What needs `HLT` starts in ring 0.

use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment};

use crate::kvm::{HostAddress, Irqchip, Kvm, Region, Vcpu, Vm, VmConfig};
use crate::words::{Gpa, index, wide};

/// Guest memory, in bytes.
pub(super) const RAM_BYTES: usize = 2 << 20;
/// Where nothing is but MMIO.
pub(super) const MMIO: u64 = 0x2000_0000;
/// Set to 1 to end the COUNT program.
pub(super) const FLAG: u64 = 0x2_0000;
/// The interrupt vector of HANDLER.
pub(super) const VECTOR: u8 = 0x40;

/// Where the program begins.
pub(super) const CODE: u64 = 0x1000;
const PML4: u64 = 0x2000;
const PDPT: u64 = 0x3000;
const DIRECTORY: u64 = 0x4000;
/// A TSS whose I/O bitmap begins at byte 0x68 and is all zero: every port is allowed.
const TSS: u64 = 0x5000;
const GDT: u64 = 0x7000;
const IDT: u64 = 0x8000;
const HANDLER_CODE: u64 = 0x9000;
const STACK_TOP: u64 = 0xb000;
const COUNTERS: u64 = 0x1_0000;

/// Where vCPU `vcpu` counts.
pub(super) fn counter(vcpu: usize) -> Gpa {
    Gpa(COUNTERS + wide(vcpu) * 0x1000)
}

/// The ring a program is entered in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Ring {
    Kernel,
    User,
}

/// Anonymous memory for one guest.
pub(super) struct Ram {
    start: NonNull<u8>,
}

// SAFETY: the mapping is owned; it is accessed through raw pointers and atomics only.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    pub(super) fn new(program: &[u8]) -> Self {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), RAM_BYTES, protection, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED, "2 MiB of memory");
        let ram = Self { start: NonNull::new(start.cast()).expect("not at 0") };
        let user = 0x67; // present, writable, user, accessed, dirty
        ram.store(Gpa(PML4), PDPT | user);
        ram.store(Gpa(PDPT), DIRECTORY | user);
        for entry in 0..512 {
            ram.store(Gpa(DIRECTORY + 8 * entry), entry << 21 | user | 0x80);
        }
        ram.write(Gpa(TSS + 0x66), &0x68_u16.to_le_bytes());
        ram.store(Gpa(GDT + 0x08), 0x00af_9b00_0000_ffff);
        ram.store(Gpa(GDT + 0x10), 0x00cf_9300_0000_ffff);
        let gate = HANDLER_CODE & 0xffff | 0x08 << 16 | 0x8e00 << 32;
        ram.store(Gpa(IDT + 16 * u64::from(VECTOR)), gate);
        ram.write(Gpa(HANDLER_CODE), HANDLER);
        ram.write(Gpa(CODE), program);
        ram
    }

    /// A copy, as it is now.
    pub(super) fn copy(&self) -> Self {
        let copy = Self::new(&[]);
        // SAFETY: both ranges are owned mappings of this length; the copied guest is stopped.
        unsafe { copy.start.copy_from_nonoverlapping(self.start, RAM_BYTES) };
        copy
    }

    fn at(&self, gpa: Gpa, len_bytes: usize) -> *mut u8 {
        assert!(index(gpa.0) + len_bytes <= RAM_BYTES, "{gpa} is outside the test's memory");
        // SAFETY: inside the mapping, as just checked.
        unsafe { self.start.add(index(gpa.0)) }.as_ptr()
    }

    fn write(&self, gpa: Gpa, bytes: &[u8]) {
        // SAFETY: `at` checked the range; no guest runs yet.
        unsafe { bytes.as_ptr().copy_to_nonoverlapping(self.at(gpa, bytes.len()), bytes.len()) };
    }

    pub(super) fn read(&self, gpa: Gpa, bytes: &mut [u8]) {
        for (at, byte) in (gpa.0..).zip(bytes) {
            // SAFETY: `at` checks; a byte is always aligned.
            *byte = unsafe { AtomicU8::from_ptr(self.at(Gpa(at), 1)) }.load(Ordering::Relaxed);
        }
    }

    fn word(&self, gpa: Gpa) -> &AtomicU64 {
        assert!(gpa.0.is_multiple_of(8), "{gpa} is unaligned");
        // SAFETY: in range and aligned, as checked; lives as long as self.
        unsafe { AtomicU64::from_ptr(self.at(gpa, 8).cast()) }
    }

    pub(super) fn load(&self, gpa: Gpa) -> u64 {
        self.word(gpa).load(Ordering::Acquire)
    }

    pub(super) fn store(&self, gpa: Gpa, value: u64) {
        self.word(gpa).store(value, Ordering::Release);
    }

    /// Where `gpa` lies in this process.
    pub(super) fn host_address(&self, gpa: Gpa) -> u64 {
        wide(self.at(gpa, 1).addr())
    }

    /// Poisons a page that was never touched. The error says why that is not possible here.
    pub(super) fn poison(&self, page: Gpa) -> std::io::Result<OwnedFd> {
        use vmm_sys_util::ioctl::ioctl_with_mut_ref;
        let flags = rustix::mm::UserfaultfdFlags::CLOEXEC;
        // SAFETY: a new descriptor that concerns only the page registered below.
        let fd = unsafe { rustix::mm::userfaultfd(flags) }?;
        let (start, length) = (self.host_address(page), 4096);
        // UFFDIO_API with UFFD_FEATURE_POISON; UFFDIO_REGISTER for missing pages; UFFDIO_POISON.
        let mut api = [0xaa, 1_u64 << 14, 0];
        let mut register = [start, length, 1, 0];
        let mut poison = [start, length, 0, 0];
        // SAFETY: structures of 3, 4 and 4 words (linux/userfaultfd.h); the page is a test
        // guest's, into which no Rust reference exists.
        let failed = unsafe {
            ioctl_with_mut_ref(&fd, 0xc018_aa3f, &mut api) < 0
                || ioctl_with_mut_ref(&fd, 0xc020_aa00, &mut register) < 0
                || ioctl_with_mut_ref(&fd, 0xc020_aa08, &mut poison) < 0
        };
        if failed { Err(std::io::Error::last_os_error()) } else { Ok(fd) }
    }

    /// A VM over this memory, which must outlive it.
    pub(super) fn vm(&self, kvm: &Kvm, vcpus: u8, irqchip: Irqchip) -> (Vm, Vec<Vcpu>) {
        // SAFETY: the tests drop their VMs before the memory.
        let host = unsafe { HostAddress::new(self.start.as_ptr()) };
        let regions = vec![Region { gpa: Gpa(0), len_bytes: RAM_BYTES, host }];
        Vm::new(kvm, &VmConfig { vcpus, irqchip, regions }).expect("a VM")
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: the mapping is owned, and the VM over it is gone.
        unsafe { libc::munmap(self.start.as_ptr().cast(), RAM_BYTES) };
    }
}

/// Puts a vCPU at the start of the program.
pub(super) fn start(vcpu: &Vcpu, ring: Ring) {
    let fd = vcpu.fd();
    let mut sregs = fd.get_sregs().expect("sregs");
    let dpl = if ring == Ring::User { 3 } else { 0 };
    let code = kvm_segment {
        limit: 0xffff_ffff,
        selector: if ring == Ring::User { 0x33 } else { 0x08 },
        type_: 11,
        present: 1,
        dpl,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let selector = if ring == Ring::User { 0x2b } else { 0x10 };
    let data = kvm_segment { selector, type_: 3, db: 1, l: 0, ..code };
    sregs.cs = code;
    [sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss] = [data; 5];
    sregs.tr =
        kvm_segment { base: TSS, limit: 0xfff, selector: 0x40, type_: 11, present: 1, ..Default::default() };
    sregs.gdt = kvm_dtable { base: GDT, limit: 0x17, ..Default::default() };
    let idt_limit = if ring == Ring::User { 0 } else { 0xfff };
    sregs.idt = kvm_dtable { base: IDT, limit: idt_limit, ..Default::default() };
    sregs.cr3 = PML4;
    sregs.cr4 = 0x20; // PAE
    sregs.cr0 = 0x8005_0033; // PG, AM, WP, NE, ET, MP, PE
    sregs.efer = 0x500; // LMA, LME
    sregs.apic_base |= 0xc00; // enabled, x2APIC
    fd.set_sregs(&sregs).expect("sregs");
    let regs = kvm_regs {
        rip: CODE,
        rsp: STACK_TOP,
        rflags: 2,
        rdi: counter(vcpu.index()).0,
        rsi: FLAG,
        r10: MMIO + 8 * wide(vcpu.index()),
        ..Default::default()
    };
    fd.set_regs(&regs).expect("regs");
    fd.set_mp_state(kvm_bindings::kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE })
        .expect("mp_state");
}

/// One exit of each kind: ports 0x10 in three widths, MMIO at `rdi`, exit with the MMIO value read.
pub(super) const EXITS: &[u8] = &[
    0xb8, 0x44, 0x33, 0x22, 0x11, // mov eax,0x11223344
    0x66, 0xba, 0x10, 0x00, // mov dx,0x10
    0xee, // out dx,al
    0x66, 0xef, // out dx,ax
    0xef, // out dx,eax
    0xec, // in al,dx
    0x48, 0x89, 0x07, // mov QWORD PTR [rdi],rax
    0x8b, 0x07, // mov eax,DWORD PTR [rdi]
    0x66, 0xba, 0xf4, 0x00, // mov dx,0xf4
    0xef, // out dx,eax
    0x0f, 0x0b, // ud2
];

/// Counts in `rbx` and at `rdi`; every 4,096 rounds a checked port read (0x20), a port write (0x10),
/// an MMIO write and a checked MMIO read (`r10`); until the byte at `rsi` is set: exit with `r9`.
pub(super) const COUNT: &[u8] = &[
    0x48, 0xff, 0xc3, // inc rbx
    0x48, 0x89, 0x1f, // mov QWORD PTR [rdi],rbx
    0x48, 0x39, 0x1f, // cmp QWORD PTR [rdi],rbx
    0x75, 0x30, // jne fail
    0xf7, 0xc3, 0xff, 0x0f, 0x00, 0x00, // test ebx,0xfff
    0x75, 0xed, // jne count
    0x49, 0xff, 0xc1, // inc r9
    0xba, 0x20, 0x00, 0x00, 0x00, // mov edx,0x20
    0xed, // in eax,dx
    0x44, 0x39, 0xc8, // cmp eax,r9d
    0x75, 0x1a, // jne fail
    0x66, 0xba, 0x10, 0x00, // mov dx,0x10
    0xef, // out dx,eax
    0x4d, 0x89, 0x0a, // mov QWORD PTR [r10],r9
    0x4d, 0x39, 0x0a, // cmp QWORD PTR [r10],r9
    0x75, 0x0d, // jne fail
    0x80, 0x3e, 0x00, // cmp BYTE PTR [rsi],0x0
    0x74, 0xcd, // je count
    0x44, 0x89, 0xc8, // mov eax,r9d
    0x66, 0xba, 0xf4, 0x00, // mov dx,0xf4
    0xef, // out dx,eax
    // fail:
    0xb8, 0xad, 0x0b, 0x00, 0x00, // mov eax,0xbad
    0x66, 0xba, 0xf4, 0x00, // mov dx,0xf4
    0xef, // out dx,eax
];

/// Makes NEXT calls, adding `rdi` of each result to `r12` and to `rbx`'s target, and 1 to `r13` for each
/// AGAIN; exit with `r12` when one returns 0.
pub(super) const CALLS: &[u8] = &[
    0xb8, 0x04, 0x00, 0x00, 0x00, // mov eax,0x4
    0x66, 0xba, 0xf8, 0x00, // mov dx,0xf8
    0xef, // out dx,eax
    0x48, 0x83, 0xf8, 0xff, // cmp rax,0xffffffffffffffff
    0x74, 0x0d, // je again
    0x48, 0x85, 0xc0, // test rax,rax
    0x74, 0x0d, // je done
    0x49, 0x01, 0xfc, // add r12,rdi
    0x4c, 0x89, 0x23, // mov QWORD PTR [rbx],r12
    0xeb, 0xe3, // jmp calls
    // again:
    0x49, 0xff, 0xc5, // inc r13
    0xeb, 0xde, // jmp calls
    // done:
    0x44, 0x89, 0xe0, // mov eax,r12d
    0x66, 0xba, 0xf4, 0x00, // mov dx,0xf4
    0xef, // out dx,eax
];

/// Makes a FORK call and exits with its result.
pub(super) const FORKS: &[u8] = &[
    0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax,0x1
    0x66, 0xba, 0xf8, 0x00, // mov dx,0xf8
    0xef, // out dx,eax
    0x66, 0xba, 0xf4, 0x00, // mov dx,0xf4
    0xef, // out dx,eax
];

/// An exception with no descriptor table for it.
pub(super) const FAULT: &[u8] = &[
    0x0f, 0x0b, // ud2
];

/// Ring 0: x2APIC on, tells so by port 0x10, sleeps for ever.
pub(super) const HALTS: &[u8] = &[
    0xb9, 0x0f, 0x08, 0x00, 0x00, // mov ecx,0x80f
    0xb8, 0xff, 0x01, 0x00, 0x00, // mov eax,0x1ff
    0x31, 0xd2, // xor edx,edx
    0x0f, 0x30, // wrmsr
    0x66, 0xba, 0x10, 0x00, // mov dx,0x10
    0xee, // out dx,al
    0xfb, // sti
    // sleep:
    0xf4, // hlt
    0xeb, 0xfd, // jmp sleep
];

/// Ring 0: counts at `rdi`, tells the count by port 0x10, ends the interrupt.
pub(super) const HANDLER: &[u8] = &[
    0x48, 0xff, 0x07, // inc QWORD PTR [rdi]
    0x66, 0xba, 0x10, 0x00, // mov dx,0x10
    0x48, 0x8b, 0x07, // mov rax,QWORD PTR [rdi]
    0xee, // out dx,al
    0xb9, 0x0b, 0x08, 0x00, 0x00, // mov ecx,0x80b
    0x31, 0xc0, // xor eax,eax
    0x31, 0xd2, // xor edx,edx
    0x0f, 0x30, // wrmsr
    0x48, 0xcf, // iretq
    0xe9, 0xe3, 0x00, 0x00, 0x00, // jmp 700 <handler+0x100>
];
