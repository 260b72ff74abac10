//! Where the vCPUs enter, and all that runs in ring 0.
//!
//! - `start`: the entry point, in ring 3, with a stack and three arguments
//!   (see [`salp_protocol::layout`]).
//! - 256 entry stubs of 16 bytes at the image's first page, where the loader's interrupt descriptor
//!   table points. They push an error code (where the processor does not) and the vector.
//! - An exception ends the VM with its vector as status.
//! - An interrupt counts itself in [`INTERRUPTS`] and signals its end to the local APIC by MMIO
//!   (without a local APIC in KVM, the host sees that store and ignores it).
//! - `UD2` in `halt` is how ring 3 asks for `HLT`: the handler looks at the count
//!   once more with interrupts off, so that none is slept over.
//!
//! The handlers use no stack of ring 3 (its red zone stays intact) and no SSE.
#![expect(unsafe_code, reason = "machine entry and interrupt stubs are assembly")]

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, Ordering};

use salp_protocol::{exit, layout, port};

use crate::cases;

/// How often each vector's interrupt has arrived, on all vCPUs together.
static INTERRUPTS: [AtomicU64; 256] = [const { AtomicU64::new(0) }; 256];

global_asm!(
    ".section .vectors, \"ax\", @progbits",
    ".set vector, 0",
    ".rept 256",
    ".balign 16",
    // The exceptions that push an error code (SDM 3A, table 7-1).
    ".set coded, (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17)",
    ".if coded || (vector == 21) || (vector == 29) || (vector == 30)",
    ".else",
    "push 0",
    ".endif",
    "push vector",
    ".if vector == 6",
    "jmp invalid_opcode",
    ".elseif vector < 32",
    "jmp exception",
    ".elseif vector == 255",
    "jmp spurious",
    ".else",
    "jmp interrupt",
    ".endif",
    ".set vector, vector + 1",
    ".endr",
    ".balign 16",
    ".text",
    "start:",
    ".globl start",
    "call {run}",
    "ud2",
    // Stack: vector, error code, rip, cs, rflags, rsp, ss.
    "interrupt:",
    "push rax",
    "push rcx",
    "mov rax, [rsp + 16]",
    "mov ecx, offset {interrupts}",
    "lock inc qword ptr [rcx + rax * 8]",
    "mov eax, {end_of_interrupt}",
    "mov dword ptr [rax], 0",
    "pop rcx",
    "pop rax",
    "spurious:",
    "add rsp, 16",
    "iretq",
    "invalid_opcode:",
    "cmp qword ptr [rsp + 16], offset idle_instruction",
    "jne exception",
    "add qword ptr [rsp + 16], 2",
    "cmp [rdi], rsi",
    "jne spurious",
    "sti",
    "hlt",
    "jmp spurious",
    "exception:",
    "pop r8",
    "pop rdx",
    "mov rdi, [rsp]",
    "mov rsi, cr2",
    "mov eax, r8d",
    "or eax, {exception}",
    "2:",
    "out {exit}, eax",
    "jmp 2b",
    "halt:",
    ".globl halt",
    "idle_instruction:",
    "ud2",
    "ret",
    run = sym run,
    interrupts = sym INTERRUPTS,
    end_of_interrupt = const layout::LOCAL_APIC + 0xb0,
    exception = const exit::EXCEPTION,
    exit = const port::EXIT,
);

extern "C" fn run(vcpu: u64, vcpus: u64, ram_bytes: u64) -> ! {
    cases::run(vcpu, vcpus, ram_bytes)
}

/// How often the interrupt `vector` has arrived. Pairs with the stub's locked increment.
pub(crate) fn interrupts(vector: u8) -> u64 {
    INTERRUPTS[usize::from(vector)].load(Ordering::Acquire)
}

unsafe extern "C" {
    /// The UD2 that its handler knows: with the count's address and the value seen.
    fn halt(count: *const AtomicU64, seen: u64);
}

/// Halts this vCPU until an interrupt arrives, unless `vector` has arrived more often than `seen`
/// already. May return for another interrupt: look again.
pub(crate) fn wait_for_interrupt(vector: u8, seen: u64) {
    // SAFETY: the handler reads the count, which lives for ever, halts and returns behind the UD2;
    // it changes no register.
    unsafe { halt(&raw const INTERRUPTS[usize::from(vector)], seen) }
}

/// Registers of the local APIC (SDM vol. 3, table 12-1).
mod apic {
    pub(super) const SPURIOUS: u64 = 0xf0;
    pub(super) const TIMER: u64 = 0x320;
    pub(super) const INITIAL_COUNT: u64 = 0x380;
    pub(super) const DIVIDE: u64 = 0x3e0;
    /// Software enable, spurious vector 255.
    pub(super) const ENABLE: u32 = 0x1ff;
    /// Divide by 1. KVM's local APIC then counts nanoseconds.
    pub(super) const BY_ONE: u32 = 0xb;
}

fn write_local_apic(register: u64, value: u32) {
    // SAFETY: the loader maps the local APIC's page at its own address; nothing of Rust is there.
    unsafe { asm!("mov [{}], {:e}", in(reg) layout::LOCAL_APIC + register, in(reg) value) }
}

/// Lets this vCPU's local APIC accept interrupts.
pub(crate) fn enable_interrupts() {
    write_local_apic(apic::SPURIOUS, apic::ENABLE);
}

/// Asks for one interrupt `vector` on this vCPU in `delay_us` microseconds (4 s at most).
pub(crate) fn start_timer(vector: u8, delay_us: u32) {
    write_local_apic(apic::DIVIDE, apic::BY_ONE);
    write_local_apic(apic::TIMER, u32::from(vector));
    write_local_apic(apic::INITIAL_COUNT, delay_us.saturating_mul(1000).max(1));
}
