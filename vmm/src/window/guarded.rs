//! Copies that survive lost memory.
//!
//! A page of a window may be poisoned: its bytes are lost, and whoever touches it gets `SIGBUS`. A
//! vCPU that does is seen to by KVM's exit loop. A device's thread copies by [`copy`] instead: the
//! handler of this module sees that the fault is in its one copying instruction, and lets it return
//! how much is left. A `SIGBUS` from anywhere else goes to the handler that was there before.
//!
//! Known hole: atomic accesses ([`Window::word`](super::Window::word)) are not covered; who makes one
//! copies from the same leaf first, or has it pinned. A leaf is lost at its first touch or never.
#![expect(unsafe_code, reason = "a signal handler that goes on behind the instruction that faulted")]

use std::arch::global_asm;
use std::io;

use crate::ipc::bus_error::Link;

global_asm!(
    ".text",
    ".balign 16",
    // rdi: to, rsi: from, rdx: bytes. Returns the bytes that are left.
    "salp_guarded_copy:",
    "mov rcx, rdx",
    "salp_guarded_copy_instruction:",
    "rep movsb",
    "salp_guarded_copy_end:",
    "mov rax, rcx",
    "ret",
);

unsafe extern "C" {
    fn salp_guarded_copy(to: *mut u8, from: *const u8, len_bytes: usize) -> usize;
    fn salp_guarded_copy_instruction();
    fn salp_guarded_copy_end();
}

/// Copies, and returns how many bytes at the end could not be copied because a page is lost.
///
/// # Safety
/// Both ranges are mapped, readable and writable respectively, but for pages that are poisoned; they do
/// not overlap. [`install`] has been called.
pub(super) unsafe fn copy(to: *mut u8, from: *const u8, len_bytes: usize) -> usize {
    // SAFETY: the caller answers for the ranges; the routine keeps to the C calling convention, and
    // where its one instruction faults the handler goes on right behind it, with the registers as the
    // fault left them.
    unsafe { salp_guarded_copy(to, from, len_bytes) }
}

static LINK: Link = Link::new();

extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let registers = libc::REG_RIP as usize;
    let context_of_fault = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel gives a SA_SIGINFO handler the context of the fault, for it to change.
    let rip = unsafe { &mut (*context_of_fault).uc_mcontext.gregs[registers] };
    if *rip == salp_guarded_copy_instruction as *const () as i64 {
        *rip = salp_guarded_copy_end as *const () as i64;
    } else {
        LINK.pass_on(signal, info, context);
    }
}

/// Installs the handler, once in a process.
pub(super) fn install() -> io::Result<()> {
    LINK.install(on_bus_error)
}

#[cfg(test)]
mod tests {
    use std::ptr::null_mut;

    use super::*;

    #[test]
    fn a_copy_from_a_lost_page_says_what_is_left() {
        install().expect("a handler");
        // Behind the end of its file a mapping has no bytes either: the same signal, at the same place.
        let file = rustix::fs::memfd_create("guarded-test", rustix::fs::MemfdFlags::CLOEXEC).expect("a file");
        rustix::fs::ftruncate(&file, 4096).expect("a length");
        let flags = rustix::mm::MapFlags::SHARED;
        let access = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let mapped = unsafe { rustix::mm::mmap(null_mut(), 8192, access, flags, &file, 0) };
        let mapped = mapped.expect("a mapping").cast::<u8>();
        let mut bytes = [7; 200];
        // SAFETY: mapped but for the second page, which has no bytes.
        let left = unsafe { copy(bytes.as_mut_ptr(), mapped.wrapping_add(4096 - 50), bytes.len()) };
        assert_eq!(left, 150);
        assert_eq!(bytes[..50], [0; 50]);
        assert_eq!(bytes[50..], [7; 150]);
        // SAFETY: as above, in the other direction.
        let left = unsafe { copy(mapped.wrapping_add(4096 - 50), bytes.as_ptr(), bytes.len()) };
        assert_eq!(left, 150);
        // SAFETY: the mapping was made here, and nobody uses it any more.
        unsafe { rustix::mm::munmap(mapped.cast(), 8192) }.expect("unmapped");
    }
}
