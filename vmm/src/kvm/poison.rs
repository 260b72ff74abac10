//! Guest memory that is lost: how a vCPU that touches it comes to an end instead of the process.
//!
//! A page can be lost by a hardware memory error, or be poisoned on purpose because its bytes will
//! never come. When a guest touches such a page, KVM sends its thread `SIGBUS` with the page's
//! host address and leaves `KVM_RUN`. The handler here notes the address, and the exit loop ends
//! the guest's run with [`End::MemoryError`](super::End). A `SIGBUS` from anywhere else goes to the
//! handler that was there before, as if this one did not exist.
//!
//! Known hole: where the lost page holds the guest's page tables, a software KVM makes it a triple
//! fault.
#![expect(unsafe_code, reason = "installs a signal handler that looks at its thread's state")]

use std::cell::Cell;
use std::ptr::null;
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::KvmError;
use crate::ipc::bus_error::Link;
use crate::words::wide;

thread_local! {
    /// Where to note the address, while this thread is inside `KVM_RUN`; else null. It needs
    /// neither initialisation nor destruction, so the handler may use it.
    static NOTE: Cell<*const AtomicU64> = const { Cell::new(null()) };
}

static LINK: Link = Link::new();

/// Runs `enter` (a `KVM_RUN`) on this thread. Also returns the host address of lost memory that the
/// guest touched in it.
pub(super) fn watch<R>(enter: impl FnOnce() -> R) -> (R, Option<u64>) {
    let note = AtomicU64::new(0);
    NOTE.set(&raw const note);
    // Not reached by a panic: `enter` is one system call.
    let result = enter();
    NOTE.set(null());
    // Relaxed: the handler ran on this thread.
    let address = note.load(Ordering::Relaxed);
    (result, (address != 0).then_some(address))
}

extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let note = NOTE.get();
    if note.is_null() {
        LINK.pass_on(signal, info, context);
        return;
    }
    // SAFETY: the kernel gives a valid siginfo to a SA_SIGINFO handler, with an address for SIGBUS.
    let address = unsafe { (*info).si_addr() };
    // SAFETY: not null, so `watch` is on this thread's stack and owns what it points to.
    unsafe { &*note }.store(wide(address.addr()), Ordering::Relaxed);
}

/// Installs the handler, once in a process.
pub(super) fn install() -> Result<(), KvmError> {
    LINK.install(on_bus_error).map_err(|source| KvmError::Ioctl { name: "sigaction", source })
}
