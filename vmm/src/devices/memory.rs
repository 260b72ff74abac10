//! Pinned guest memory and every bulk move of bytes to or from it.
//!
//! A `Buffer` is a pin with its addresses, a `Span` a bounds-checked part of one. The guest (and
//! other devices) may write the memory at any time, so no Rust reference to it exists anywhere:
//! bytes are moved by system calls or by a string instruction that the compiler cannot see into.
//! What a racing move returns is any mixture of old and new bytes, and nobody decides by them.
#![expect(unsafe_code, reason = "guest memory is touched through raw pointers and system calls only")]

use std::arch::asm;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::{Access, GuestRam, RamError};
use crate::words::{Gpa, HostAddress, wide};

/// A pin: while this lives, its host address range is valid and stays the same memory.
///
/// # Safety
/// For as long as the value lives, [`PinnedRange::host`] must return one and the same range, mapped,
/// readable (and writable, if pinned so) by any thread of this process.
pub unsafe trait PinnedRange: Send + Sync {
    /// First address and length in bytes.
    fn host(&self) -> (HostAddress, usize);
}

/// A pinned range of guest memory. The pin ends with the last reference.
pub(super) struct Buffer {
    /// Tells buffers of a process apart.
    pub(super) id: u64,
    pub(super) gpa: Gpa,
    pub(super) len_bytes: usize,
    host: HostAddress,
    // Dropped before `held`, so that a count of 0 means that nothing is pinned.
    _pin: Box<dyn PinnedRange>,
    _held: CountGuard,
}

struct CountGuard(Arc<AtomicUsize>);

impl Drop for CountGuard {
    fn drop(&mut self) {
        // Pairs with the acquire load of whoever waits for 0.
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl Buffer {
    /// Pins a range and counts it in `held` while it lives.
    pub(super) fn pin(
        ram: &dyn GuestRam,
        gpa: Gpa,
        len_bytes: usize,
        access: Access,
        held: &Arc<AtomicUsize>,
    ) -> Result<Arc<Self>, RamError> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let pin = ram.pin(gpa, len_bytes, access)?;
        let (host, pinned_bytes) = pin.host();
        if pinned_bytes < len_bytes {
            let reason = format!("{pinned_bytes} bytes pinned of {len_bytes}");
            return Err(RamError::Host { gfn: gpa.gfn(), reason });
        }
        held.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            gpa,
            len_bytes,
            host,
            _pin: pin,
            _held: CountGuard(Arc::clone(held)),
        }))
    }

    /// The whole of it, as the host kernel registers it.
    pub(super) fn host(&self) -> HostAddress {
        self.host
    }

    /// The part of the buffer at `[gpa, gpa + len_bytes)`, `None` if it is not all inside.
    pub(super) fn span(self: &Arc<Self>, gpa: Gpa, len_bytes: usize) -> Option<Span> {
        let start = usize::try_from(gpa.0.checked_sub(self.gpa.0)?).ok()?;
        (start.checked_add(len_bytes)? <= self.len_bytes).then(|| Span {
            buffer: Arc::clone(self),
            start,
            len_bytes,
        })
    }
}

/// A part of a [`Buffer`].
pub(super) struct Span {
    pub(super) buffer: Arc<Buffer>,
    start: usize,
    len_bytes: usize,
}

impl Span {
    /// The address of `[at, at + len_bytes)`. Panics outside the span: positions are the engine's
    /// own arithmetic, a guest's numbers were checked when the span was made.
    pub(super) fn address(&self, at: usize, len_bytes: usize) -> HostAddress {
        let end = at.checked_add(len_bytes);
        assert!(end.is_some_and(|end| end <= self.len_bytes), "outside the span");
        self.buffer.host.plus(self.start + at)
    }

    /// Fills `[at, at + len_bytes)` with zeros.
    pub(super) fn zero(&self, at: usize, len_bytes: usize) {
        let to = self.address(at, len_bytes).as_ptr();
        // SAFETY: `address` checked that the range lies in the buffer, whose pin keeps it mapped
        // and writable. The direction flag is clear (System V ABI). Races with the guest touch
        // bytes that no Rust value lives in.
        unsafe {
            asm!("rep stosb", inout("rcx") len_bytes => _, inout("rdi") to => _, in("al") 0_u8,
                options(nostack, preserves_flags));
        }
    }

    /// Copies `[at, at + len_bytes)` of `from` to the same positions here.
    pub(super) fn copy_from(&self, from: &Span, at: usize, len_bytes: usize) {
        let to = self.address(at, len_bytes).as_ptr();
        let from = from.address(at, len_bytes).as_ptr();
        // SAFETY: both ranges were checked by `address` and are kept mapped by their pins; the
        // direction flag is clear (System V ABI); no Rust value lives in these bytes.
        unsafe {
            asm!("rep movsb", inout("rcx") len_bytes => _, inout("rdi") to => _,
                inout("rsi") from => _, options(nostack, preserves_flags));
        }
    }

    /// Reads `[at, at + len_bytes)` from `file` at `offset`. An early end of file is an error.
    pub(super) fn read_file(&self, at: usize, len_bytes: usize, file: &File, offset: u64) -> io::Result<()> {
        let to = self.address(at, len_bytes);
        all_of(len_bytes, offset, |done, left, offset| {
            // SAFETY: the kernel writes at most `left` bytes to a range that `address` checked and
            // that the pin keeps mapped.
            unsafe { libc::pread(file.as_raw_fd(), to.plus(done).as_ptr().cast(), left, offset) }
        })
    }

    /// Writes `[at, at + len_bytes)` to `file` at `offset`.
    pub(super) fn write_file(&self, at: usize, len_bytes: usize, file: &File, offset: u64) -> io::Result<()> {
        let from = self.address(at, len_bytes);
        all_of(len_bytes, offset, |done, left, offset| {
            // SAFETY: the kernel reads at most `left` bytes of a range that `address` checked and
            // that the pin keeps mapped.
            unsafe { libc::pwrite(file.as_raw_fd(), from.plus(done).as_ptr().cast(), left, offset) }
        })
    }
}

/// Repeats a transfer `(done, left, file offset) -> bytes or -1` until all bytes are moved.
fn all_of(
    len_bytes: usize,
    offset: u64,
    mut transfer: impl FnMut(usize, usize, i64) -> isize,
) -> io::Result<()> {
    let mut done = 0;
    while done < len_bytes {
        let position =
            i64::try_from(offset + wide(done)).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        match usize::try_from(transfer(done, len_bytes - done, position)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => done += moved,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}
