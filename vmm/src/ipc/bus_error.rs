//! Handlers of `SIGBUS` in a chain: each looks whether the signal is its own, and passes on what is
//! not.
#![expect(unsafe_code, reason = "installs signal handlers and calls the ones that were there before")]

use std::io;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

/// A handler. It is called on an alternate stack and must be async-signal-safe.
pub type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// One handler's link: a static beside it.
pub struct Link {
    /// The handler that was there before.
    before: OnceLock<libc::sigaction>,
    /// 0, or why there is no handler.
    installed: OnceLock<i32>,
}

impl Link {
    /// A handler that is not installed.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it is made in statics only")]
    pub const fn new() -> Self {
        Self { before: OnceLock::new(), installed: OnceLock::new() }
    }

    /// Installs `handler`, once in a process.
    ///
    /// # Errors
    /// The host refused.
    pub fn install(&self, handler: Handler) -> io::Result<()> {
        let errno = *self.installed.get_or_init(|| {
            // SAFETY: for this structure all zeros is a value: no flags, empty mask.
            let [mut before, mut new]: [libc::sigaction; 2] = unsafe { std::mem::zeroed() };
            new.sa_sigaction = handler as *const () as libc::sighandler_t;
            // On the alternate stack, as the standard library's handler for stack overflows must be.
            new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            // SAFETY: valid structures; the handler is async-signal-safe. The old one is asked for
            // first, so that it is known when the new one runs.
            let result = unsafe {
                libc::sigaction(libc::SIGBUS, null(), &raw mut before);
                self.before.get_or_init(|| before);
                libc::sigaction(libc::SIGBUS, &raw const new, null_mut())
            };
            if result == 0 { 0 } else { io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL) }
        });
        if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(errno)) }
    }

    /// Does what would have happened without this link's handler.
    pub fn pass_on(&self, signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        let before = self.before.get().filter(|before| {
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
}
