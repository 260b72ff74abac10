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
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::KvmError;
use crate::words::wide;

thread_local! {
    /// Where to note the address, while this thread is inside `KVM_RUN`; else null. It needs
    /// neither initialisation nor destruction, so the handler may use it.
    static NOTE: Cell<*const AtomicU64> = const { Cell::new(null()) };
}

/// The handler that was there before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

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
        pass_on(signal, info, context);
        return;
    }
    // SAFETY: the kernel gives a valid siginfo to a SA_SIGINFO handler, with an address for SIGBUS.
    let address = unsafe { (*info).si_addr() };
    // SAFETY: not null, so `watch` is on this thread's stack and owns what it points to.
    unsafe { &*note }.store(wide(address.addr()), Ordering::Relaxed);
}

/// Does what would have happened without the handler of this module.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
    let before = BEFORE.get().filter(|before| {
        before.sa_flags & libc::SA_SIGINFO != 0
            && ![libc::SIG_DFL, libc::SIG_IGN].contains(&before.sa_sigaction)
    });
    if let Some(before) = before {
        // SAFETY: the kernel held this as the address of a SA_SIGINFO handler.
        let handler: Handler = unsafe { std::mem::transmute(before.sa_sigaction) };
        handler(signal, info, context);
    } else {
        // SAFETY: both are async-signal-safe. The signal is blocked until this returns, then the
        // process ends by it.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    }
}

/// Installs the handler, once in a process.
pub(super) fn install() -> Result<(), KvmError> {
    static INSTALLED: OnceLock<i32> = OnceLock::new();
    let errno = *INSTALLED.get_or_init(|| {
        // SAFETY: for this structure all zeros is a value: no flags, empty mask.
        let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let mut new: libc::sigaction = unsafe { std::mem::zeroed() };
        new.sa_sigaction = on_bus_error as *const () as libc::sighandler_t;
        // On the alternate stack, as the standard library's handler for stack overflows must be.
        new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: valid structures; the handler is async-signal-safe: it reads a thread-local
        // without a constructor, stores an atomic, or passes on. The old one is asked for first, so
        // that it is known when the new one runs.
        let result = unsafe {
            libc::sigaction(libc::SIGBUS, null(), &raw mut before);
            BEFORE.get_or_init(|| before);
            libc::sigaction(libc::SIGBUS, &raw const new, std::ptr::null_mut())
        };
        if result == 0 { 0 } else { std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL) }
    });
    if errno == 0 {
        return Ok(());
    }
    let source = std::io::Error::from_raw_os_error(errno);
    Err(KvmError::Ioctl { name: "sigaction", source })
}
