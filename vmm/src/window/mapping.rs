//! The virtual range itself: reserved once, remapped in place, accessed by raw copies only.
//!
//! Never a Rust reference to guest memory but atomics: guests, devices and the host's kernel change
//! it at any time.
#![expect(unsafe_code, reason = "mmap, madvise and raw copies")]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::failure;
use crate::words::{HostAddress, LEAF_BYTES, PAGE_BYTES, index, wide};

/// `[base, base + len)`, aligned to 2 MiB and owned: unmapped when dropped.
pub(super) struct Reservation {
    base: HostAddress,
    len_bytes: usize,
    /// What was mapped to find an aligned range in.
    whole: (HostAddress, usize),
}

/// Where [`Reservation::of_addresses`] begins: 16 TiB, above whatever a program is linked to and its heap.
const FIRST_ADDRESS: u64 = 16 << 40;
/// And where it ends: 64 TiB, below libraries, stacks and what the kernel chooses for mappings.
const LAST_ADDRESS: u64 = 64 << 40;

const PRIVATE_FIXED: i32 = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;

impl Reservation {
    /// Reserves addresses; nothing is accessible yet.
    pub(super) fn new(len_bytes: u64) -> io::Result<Self> {
        let len_bytes = index(len_bytes);
        let whole_bytes = len_bytes + LEAF_BYTES;
        failure::point("mapping.reserve")?;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let whole = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                whole_bytes,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if whole == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let whole = whole.cast::<u8>();
        let base = whole.wrapping_add(whole.align_offset(LEAF_BYTES));
        Ok(Self { base: HostAddress::new(base), len_bytes, whole: (HostAddress::new(whole), whole_bytes) })
    }

    /// Finds addresses where nothing is mapped, and leaves them so until the first mapping is put
    /// there. That is cheap, where to replace even an empty mapping is not: KVM then looks through its
    /// records of every page of the range (300 us a GiB where it shadows page tables). Nobody else
    /// comes to be there, since the kernel gives out addresses from the top of its range, and these lie
    /// far below.
    pub(super) fn of_addresses(len_bytes: u64) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(FIRST_ADDRESS);
        let step = len_bytes.next_multiple_of(wide(LEAF_BYTES)) + wide(LEAF_BYTES);
        let len_bytes = index(len_bytes);
        failure::point("mapping.addresses")?;
        loop {
            let at = NEXT.fetch_add(step, Ordering::Relaxed);
            if at + step > LAST_ADDRESS {
                return Err(io::Error::from_raw_os_error(libc::ENOMEM));
            }
            // SAFETY: nothing that exists is touched: where something is mapped, this fails.
            let found = unsafe {
                libc::mmap(
                    std::ptr::without_provenance_mut(index(at)),
                    len_bytes,
                    libc::PROT_NONE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE,
                    -1,
                    0,
                )
            };
            if found == libc::MAP_FAILED {
                match io::Error::last_os_error() {
                    error if error.raw_os_error() == Some(libc::EEXIST) => continue,
                    error => return Err(error),
                }
            }
            let base = HostAddress::new(found.cast());
            let this = Self { base, len_bytes, whole: (base, len_bytes) };
            // SAFETY: mapped just now, and accessed by nobody.
            let result = unsafe { libc::munmap(found, len_bytes) };
            if result == 0 && base.get() == at {
                return Ok(this);
            }
            return Err(io::Error::other("addresses could not be reserved"));
        }
    }

    /// The address at `offset`.
    pub(super) fn address(&self, offset: usize) -> HostAddress {
        debug_assert!(offset <= self.len_bytes);
        self.base.plus(offset)
    }

    /// A range of offsets as host addresses.
    pub(super) fn host(&self, range: Range<u64>) -> Range<u64> {
        let base = self.base.get();
        base + range.start..base + range.end
    }

    /// Puts fresh anonymous memory at `range`, with huge pages asked for or refused.
    pub(super) fn map_anonymous(&self, range: Range<u64>, is_huge: bool) -> io::Result<()> {
        self.map_fixed(range.clone(), PRIVATE_FIXED | libc::MAP_ANONYMOUS, -1, 0)?;
        self.suggest(range.clone(), if is_huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE });
        self.suggest(range, libc::MADV_DONTFORK);
        Ok(())
    }

    /// Puts `file` from `offset` at `range`, privately: stores make private copies.
    pub(super) fn map_file(&self, range: Range<u64>, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.map_fixed(range.clone(), PRIVATE_FIXED, file.as_raw_fd(), offset)?;
        self.suggest(range, libc::MADV_DONTFORK);
        Ok(())
    }

    fn map_fixed(&self, range: Range<u64>, flags: i32, fd: i32, offset: u64) -> io::Result<()> {
        self.check(&range);
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        failure::point("mapping.map")?;
        // SAFETY: the range lies inside this reservation, which this object owns; what was mapped
        // there was guest memory, to which no Rust reference but atomics exists.
        let mapped = unsafe {
            libc::mmap(
                self.address(index(range.start)).as_ptr().cast(),
                index(range.end - range.start),
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                fd,
                offset,
            )
        };
        if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Moves a mapping prepared aside, as large as `range`, to `range`, in one step. It is then this
    /// reservation's.
    pub(super) fn move_in(&self, range: Range<u64>, aside: Self) -> io::Result<()> {
        self.check(&range);
        let len_bytes = index(range.end - range.start);
        assert!(len_bytes == aside.len_bytes, "what is moved in has the size of its place");
        failure::point("mapping.move")?;
        // SAFETY: source and destination are owned by the two reservations; see `map_fixed`.
        let moved = unsafe {
            libc::mremap(
                aside.base.as_ptr().cast(),
                len_bytes,
                len_bytes,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                self.address(index(range.start)).as_ptr(),
            )
        };
        if moved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        aside.unmap_around();
        Ok(())
    }

    /// Gives up what is left of the reservation when its range has moved away: the range itself may
    /// be somebody else's by now.
    fn unmap_around(self) {
        let this = std::mem::ManuallyDrop::new(self);
        let head = index(this.base.get() - this.whole.0.get());
        let tail = this.whole.1 - head - this.len_bytes;
        for (start, len_bytes) in [(this.whole.0, head), (this.address(this.len_bytes), tail)] {
            // SAFETY: head and tail were mapped by `new` and are accessed by nobody.
            let result =
                unsafe { if len_bytes > 0 { libc::munmap(start.as_ptr().cast(), len_bytes) } else { 0 } };
            debug_assert!(result == 0, "unmapping failed: {}", io::Error::last_os_error());
        }
    }

    /// As [`advise`](Self::advise), of a mapping that was just made. It is there and right without: to
    /// fail now would be to say that the range is as before.
    fn suggest(&self, range: Range<u64>, advice: i32) {
        if let Err(error) = self.advise(range, advice) {
            tracing::debug!(advice, %error, "the host does not take advice on a mapping");
        }
    }

    fn advise(&self, range: Range<u64>, advice: i32) -> io::Result<()> {
        self.check(&range);
        failure::point("mapping.advise")?;
        // SAFETY: the range lies inside this reservation; the advices used here change nothing but
        // how the range is backed, or make its pages zero, which is what the caller asks for.
        let result = unsafe {
            libc::madvise(
                self.address(index(range.start)).as_ptr().cast(),
                index(range.end - range.start),
                advice,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Makes private copies of these pages, where there are none yet.
    pub(super) fn populate(&self, range: Range<u64>) -> io::Result<()> {
        self.advise(range, libc::MADV_POPULATE_WRITE)
    }

    /// Gives anonymous pages back: they read 0.
    pub(super) fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.advise(range, libc::MADV_DONTNEED)
    }

    /// Copies out of the window.
    pub(super) fn read(&self, offset: usize, into: &mut [u8]) {
        assert!(offset + into.len() <= self.len_bytes, "a read beyond the window");
        // SAFETY: the source lies inside the reservation and is RAM (callers check), hence mapped
        // readable; the destination is a slice of the caller's. The bytes may change meanwhile: any
        // mixture of them is a right answer, as for a device.
        unsafe { std::ptr::copy(self.address(offset).as_ptr(), into.as_mut_ptr(), into.len()) }
    }

    /// Copies out of the window, up to a page that is lost; returns how many bytes are left.
    pub(super) fn read_guarded(&self, offset: usize, into: &mut [u8]) -> usize {
        assert!(offset + into.len() <= self.len_bytes, "a read beyond the window");
        // SAFETY: as for `read`; the slice is no part of the window.
        unsafe { super::guarded::copy(into.as_mut_ptr(), self.address(offset).as_ptr(), into.len()) }
    }

    /// Copies into the window, up to a page that is lost; returns how many bytes are left.
    pub(super) fn write_guarded(&self, offset: usize, from: &[u8]) -> usize {
        assert!(offset + from.len() <= self.len_bytes, "a write beyond the window");
        // SAFETY: as for `read_guarded`, in the other direction.
        unsafe { super::guarded::copy(self.address(offset).as_ptr(), from.as_ptr(), from.len()) }
    }

    /// Copies into the window.
    pub(super) fn write(&self, offset: usize, from: &[u8]) {
        assert!(offset + from.len() <= self.len_bytes, "a write beyond the window");
        // SAFETY: as for `read`, in the other direction.
        unsafe { std::ptr::copy(from.as_ptr(), self.address(offset).as_ptr(), from.len()) }
    }

    /// Copies from another range what it has at the same offset.
    pub(super) fn copy_from(&self, other: &Self, offset: usize, len_bytes: usize) {
        let end = offset + len_bytes;
        assert!(end <= self.len_bytes && end <= other.len_bytes, "a copy beyond a window");
        // SAFETY: as for `read`; two reservations never overlap.
        unsafe { std::ptr::copy(other.address(offset).as_ptr(), self.address(offset).as_ptr(), len_bytes) }
    }

    /// An aligned word, for atomic access. None if it is not aligned or not inside.
    pub(super) fn word(&self, offset: usize) -> Option<&AtomicU32> {
        (offset.is_multiple_of(4) && offset + 4 <= self.len_bytes).then(|| {
            // SAFETY: aligned and inside the reservation, which lives as long as the reference;
            // atomics are the one kind of reference to guest memory that there is.
            unsafe { AtomicU32::from_ptr(self.address(offset).as_ptr().cast()) }
        })
    }

    fn check(&self, range: &Range<u64>) {
        let is_inside = range.start <= range.end && range.end <= wide(self.len_bytes);
        let is_aligned =
            range.start.is_multiple_of(wide(PAGE_BYTES)) && range.end.is_multiple_of(wide(PAGE_BYTES));
        assert!(is_inside && is_aligned, "{range:x?} is not a range of pages of this window");
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the whole range was mapped by `new` and belongs to this object.
        let result = unsafe { libc::munmap(self.whole.0.as_ptr().cast(), self.whole.1) };
        debug_assert!(result == 0, "unmapping a window failed: {}", io::Error::last_os_error());
    }
}
