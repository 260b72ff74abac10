//! userfaultfd: traps on first touches and on stores, resolved in user space.
//!
//! Registering a range replaces its modes, and the modes asked for here are never both needed at
//! one leaf: a leaf that traps every touch has no pages to protect. Unregistering wakes waiters of
//! some modes only, so every release here is followed by a wake.
#![expect(unsafe_code, reason = "userfaultfd has no wrapper that fits; its ioctls take plain structures")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::failure;
use std::sync::OnceLock;

use crate::space::{Fault, Traps};
use crate::words::{PAGE_BYTES, wide};

/// The features that salp needs: bit, and name in `linux/userfaultfd.h`.
const FEATURES: [(u64, &str); 5] = [
    (1 << 0, "UFFD_FEATURE_PAGEFAULT_FLAG_WP"),
    (1 << 5, "UFFD_FEATURE_MISSING_SHMEM"),
    (1 << 10, "UFFD_FEATURE_MINOR_SHMEM"),
    (1 << 12, "UFFD_FEATURE_WP_HUGETLBFS_SHMEM"),
    (1 << 14, "UFFD_FEATURE_POISON"),
];

const MODE_MISSING: u64 = 1;
const MODE_WP: u64 = 2;
const MODE_MINOR: u64 = 4;

const EVENT_PAGEFAULT: u8 = 0x12;
const FLAG_WP: u64 = 2;

/// `linux/userfaultfd.h`: `_IOWR(0xAA, number, size)`.
const fn read_write(number: u64, size: usize) -> u64 {
    3 << 30 | (size as u64) << 16 | 0xaa << 8 | number
}

/// `_IOR(0xAA, number, struct uffdio_range)`.
const fn read(number: u64) -> u64 {
    2 << 30 | 16 << 16 | 0xaa << 8 | number
}

const API: u64 = read_write(0x3f, 24);
const REGISTER: u64 = read_write(0, 32);
const UNREGISTER: u64 = read(1);
const WAKE: u64 = read(2);
const COPY: u64 = read_write(3, 40);
const WRITE_PROTECT: u64 = read_write(6, 24);
const POISON: u64 = read_write(8, 32);
/// `_IO(0xAA, 0)` on `/dev/userfaultfd`.
const NEW: u64 = 0xaa00;

pub(super) const IOCTLS: [u64; 8] = [WAKE, UNREGISTER, REGISTER, COPY, WRITE_PROTECT, POISON, API, NEW];

/// The device.
const DEVICE: &str = "/dev/userfaultfd";

/// The device opened ahead, or why it could not be, see [`Userfault::open_device_ahead`].
static OPENED: OnceLock<io::Result<File>> = OnceLock::new();

/// One message of `struct uffd_msg`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

/// The userfaultfd of one window, for its whole life.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

fn open_device() -> io::Result<File> {
    File::options().read(true).write(true).open(DEVICE)
}

impl Userfault {
    /// Opens a userfaultfd that also sees faults of the kernel (KVM's are), with the features that
    /// salp needs.
    ///
    /// # Errors
    /// Not permitted, or a feature is missing: the text says what to do.
    pub fn open() -> io::Result<Self> {
        failure::point("userfault.open")?;
        let fd = Self::open_fd()?;
        let features = FEATURES.iter().fold(0, |all, (bit, _)| all | bit);
        let mut api: [u64; 3] = [0xaa, features, 0];
        control(&fd, API, &mut api).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("userfaultfd lacks a feature that salp needs (Linux 6.7 has them all): {error}"),
            )
        })?;
        Ok(Self(fd))
    }

    /// The names of the features that salp needs and this kernel has not.
    ///
    /// # Errors
    /// Not permitted: the text says what to do.
    pub fn missing_features() -> io::Result<Vec<&'static str>> {
        let fd = Self::open_fd()?;
        let mut api: [u64; 3] = [0xaa, 0, 0];
        control(&fd, API, &mut api)?;
        Ok(FEATURES.iter().filter(|(bit, _)| api[1] & bit == 0).map(|(_, name)| *name).collect())
    }

    /// Opens the device for later, for a process that will not be allowed to then: where it is refused
    /// now, that is what is said later. What it is for belongs to whoever uses it then.
    pub fn open_device_ahead() {
        OPENED.get_or_init(open_device);
    }

    fn open_fd() -> io::Result<OwnedFd> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the system call takes flags and returns a new descriptor or an error.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if let Ok(fd @ 0..) = i32::try_from(fd) {
            // SAFETY: the descriptor is new and nobody else's.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        let refused = |error: io::Error| {
            io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!(
                    "userfaultfd is not permitted ({error}): run as root, or give this user read and write \
                     access to /dev/userfaultfd"
                ),
            )
        };
        let device = match OPENED.get() {
            Some(Ok(device)) => device,
            Some(Err(error)) => return Err(refused(io::Error::from(error.kind()))),
            None => &open_device().map_err(refused)?,
        };
        // SAFETY: as above; the device's one ioctl takes flags.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), NEW, flags) };
        if fd < 0 {
            return Err(refused(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Makes accesses to a range of host addresses trap.
    ///
    /// # Errors
    /// The host refused.
    pub fn register(&self, range: Range<u64>, traps: Traps) -> io::Result<()> {
        let mode = match traps {
            Traps::Stores => MODE_WP,
            // MISSING alone lets through what the page cache has already: an older frame.
            Traps::Touches => MODE_MISSING | MODE_MINOR,
            Traps::Misses => MODE_MISSING,
        };
        failure::point("userfault.register")?;
        control(&self.0, REGISTER, &mut [range.start, range.end - range.start, mode, 0])
    }

    /// Ends all traps of a range, takes its protections off, wakes who waits there.
    ///
    /// # Errors
    /// The host refused.
    pub fn unregister(&self, range: Range<u64>) -> io::Result<()> {
        failure::point("userfault.unregister")?;
        control(&self.0, UNREGISTER, &mut [range.start, range.end - range.start])?;
        self.wake(range)
    }

    /// Protects the present pages of a range, or takes protections off and wakes.
    ///
    /// # Errors
    /// The host refused: what is protected must have been registered.
    pub fn protect(&self, range: Range<u64>, protect: bool) -> io::Result<()> {
        let mut argument = [range.start, range.end - range.start, u64::from(protect)];
        failure::point(if protect { "userfault.protect" } else { "userfault.unprotect" })?;
        loop {
            match control(&self.0, WRITE_PROTECT, &mut argument) {
                // The address space is changing at this moment.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                other => return other,
            }
        }
    }

    /// Puts a private copy of `page` at a host address of a registered range where nothing is mapped,
    /// and wakes who waits there.
    ///
    /// # Errors
    /// The host refused.
    pub fn copy(&self, to: u64, page: &[u8; PAGE_BYTES]) -> io::Result<()> {
        failure::point("userfault.copy")?;
        let from = wide(page.as_ptr().expose_provenance());
        loop {
            match control(&self.0, COPY, &mut [to, from, wide(PAGE_BYTES), 0, 0]) {
                // The address space is changing at this moment.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                other => return other,
            }
        }
    }

    /// Wakes who waits in a range.
    ///
    /// # Errors
    /// The host refused.
    pub fn wake(&self, range: Range<u64>) -> io::Result<()> {
        // No failure point: the kernel refuses only what is no range of pages. Who had to be woken and was
        // not would wait for ever.
        control(&self.0, WAKE, &mut [range.start, range.end - range.start])
    }

    /// Makes every access to the untouched pages of a registered range a memory error, and frees
    /// who waits there.
    ///
    /// # Errors
    /// The host refused.
    pub fn poison(&self, range: Range<u64>) -> io::Result<()> {
        failure::point("userfault.poison")?;
        control(&self.0, POISON, &mut [range.start, range.end - range.start, 0, 0])
    }

    /// Takes one fault that waits to be resolved: its host address and kind. None: there is none.
    ///
    /// # Errors
    /// The host refused.
    pub fn next_fault(&self) -> io::Result<Option<(u64, Fault)>> {
        loop {
            let mut message = Message::default();
            // SAFETY: the kernel writes at most one message of 32 bytes into a structure of that size
            // for which all byte patterns are valid.
            let count =
                unsafe { libc::read(self.0.as_raw_fd(), (&raw mut message).cast(), size_of::<Message>()) };
            match usize::try_from(count) {
                Ok(count) if count == size_of::<Message>() && message.event == EVENT_PAGEFAULT => {
                    let fault = if message.flags & FLAG_WP != 0 { Fault::Store } else { Fault::Touch };
                    return Ok(Some((message.address, fault)));
                }
                Ok(_) => {}
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// One ioctl whose argument is an array of words of exactly the size that the number encodes.
fn control<const N: usize>(fd: &OwnedFd, number: u64, argument: &mut [u64; N]) -> io::Result<()> {
    assert!((number >> 16 & 0x3fff) as usize == N * 8, "the argument has the size that the ioctl takes");
    // SAFETY: the kernel reads and writes the argument, whose size was just compared with the one
    // in the number. What the ioctl does to the address space concerns a window, to whose memory
    // no Rust reference but atomics exists.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number, argument.as_mut_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_header() {
        // Written down from a C program that printed the header's macros.
        assert_eq!(
            (API, REGISTER, UNREGISTER, WAKE, COPY, WRITE_PROTECT, POISON),
            (0xc018_aa3f, 0xc020_aa00, 0x8010_aa01, 0x8010_aa02, 0xc028_aa03, 0xc018_aa06, 0xc020_aa08)
        );
    }
}
