//! [`SharedMemory`]: words that several processes see, in a memfd that each maps `MAP_SHARED`.
//!
//! The bytes are only ever reached as atomic words, so no Rust reference to plain shared memory
//! exists, whatever a peer does. A word is always used with one width: an area is either of
//! [`words_u32`](SharedMemory::words_u32) or of [`words_u64`](SharedMemory::words_u64), by agreement.
//!
//! The file is sparse and sealed against changes of its size, so a peer cannot make a mapped word
//! disappear. A first store to a page still needs memory, and a host without any answers `SIGBUS`:
//! whoever must not fail calls [`reserve`](SharedMemory::reserve) first.
//!
//! # Holes
//! - A peer that punches a range takes away what others reserved there. Processes of a colony trust
//!   each other that far; by agreement only the area's owner punches.
//! - Above a memory cgroup's limit the host kills instead of refusing.
#![expect(unsafe_code, reason = "maps the file and hands out atomics in it")]

use std::ops::Range;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::ptr::{NonNull, null_mut};
use std::slice;
use std::sync::atomic::AtomicU64;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::IpcError;
use crate::failure;
use crate::sync::AtomicU32;
use crate::words::{PAGE_BYTES, index, wide};

/// What no one may do to the file any more.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// Why shared memory cannot be used as asked.
#[derive(Debug, thiserror::Error)]
pub enum SharedMemoryError {
    /// The range is not inside the memory.
    #[error("range {start:#x} to {end:#x} is outside shared memory of {len_bytes:#x} bytes")]
    OutOfRange {
        /// First byte asked for.
        start: usize,
        /// First byte after what was asked for (saturated).
        end: usize,
        /// Size of the memory.
        len_bytes: usize,
    },
    /// The offset is not a multiple of the word's size.
    #[error("offset {offset:#x} in shared memory is not a multiple of {align_bytes}")]
    Misaligned {
        /// Offset asked for, in bytes.
        offset: usize,
        /// What it must be a multiple of.
        align_bytes: usize,
    },
    /// The host has no memory for it.
    #[error("the host is out of memory for {len_bytes} bytes of shared memory")]
    OutOfMemory {
        /// How much was asked for.
        len_bytes: usize,
    },
    /// The descriptor cannot be shared memory, or the host refused a call.
    #[error(transparent)]
    Ipc(#[from] IpcError),
}

impl SharedMemoryError {
    fn host(action: &'static str, len_bytes: usize, errno: Errno) -> Self {
        match errno {
            Errno::NOMEM | Errno::NOSPC => Self::OutOfMemory { len_bytes },
            other => Self::Ipc(IpcError::host(action, other)),
        }
    }
}

/// A memfd mapped in this process.
#[derive(Debug)]
pub struct SharedMemory {
    file: OwnedFd,
    base: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is unmapped only by `drop`.
unsafe impl Send for SharedMemory {}
// SAFETY: shared references give out atomics and system calls on the file, both fit for any thread.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// New memory, all zero and not yet backed, of `len_bytes` rounded up to whole pages. `name` is
    /// shown in `/proc/<pid>/maps`.
    ///
    /// # Errors
    /// [`SharedMemoryError::OutOfMemory`] where the host refuses the size; zero bytes; a name with NUL.
    pub fn create(name: &str, len_bytes: usize) -> Result<Self, SharedMemoryError> {
        let Some(len_bytes) = len_bytes.checked_next_multiple_of(PAGE_BYTES) else {
            return Err(SharedMemoryError::OutOfMemory { len_bytes });
        };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let failed = |errno| SharedMemoryError::host("create shared memory", len_bytes, errno);
        let file = rustix::fs::memfd_create(name, flags).map_err(failed)?;
        rustix::fs::ftruncate(&file, wide(len_bytes)).map_err(failed)?;
        // SEAL too: nobody may add a seal that stops the others from writing.
        rustix::fs::fcntl_add_seals(&file, SEALS | SealFlags::SEAL).map_err(failed)?;
        Self::from_fd(file)
    }

    /// Memory that another process [created](Self::create).
    ///
    /// # Errors
    /// The descriptor is not a memfd sealed against changes of size, or is empty, or cannot be
    /// mapped for reading and writing.
    pub fn from_fd(file: OwnedFd) -> Result<Self, SharedMemoryError> {
        let seals = rustix::fs::fcntl_get_seals(&file)
            .map_err(|errno| IpcError::host("read the seals of shared memory", errno))?;
        if !seals.contains(SEALS) {
            return Err(IpcError::Malformed { reason: "shared memory may change its size" }.into());
        }
        Self::map(file)
    }

    fn map(file: OwnedFd) -> Result<Self, SharedMemoryError> {
        let stat = rustix::fs::fstat(&file).map_err(|errno| IpcError::host("stat shared memory", errno))?;
        let len_bytes = usize::try_from(stat.st_size).unwrap_or(0);
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at a place the kernel chooses disturbs no other.
        let base = unsafe { rustix::mm::mmap(null_mut(), len_bytes, access, flags, &file, 0) }
            .map_err(|errno| SharedMemoryError::host("map shared memory", len_bytes, errno))?;
        let Some(base) = NonNull::new(base.cast()) else {
            return Err(IpcError::Malformed { reason: "shared memory mapped at address 0" }.into());
        };
        let memory = Self { file, base, len_bytes };
        // SAFETY: the range is the mapping just made; the advice changes no byte of it.
        unsafe { rustix::mm::madvise(base.as_ptr().cast(), len_bytes, Advice::LinuxDontFork) }
            .map_err(|errno| IpcError::host("keep shared memory out of forks", errno))?;
        Ok(memory)
    }

    /// The file, to hand it to another process.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Size in bytes: whole pages.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Bytes that the host has backed with memory.
    ///
    /// # Errors
    /// The host refused to say.
    pub fn resident_bytes(&self) -> Result<u64, SharedMemoryError> {
        let stat =
            rustix::fs::fstat(&self.file).map_err(|errno| IpcError::host("stat shared memory", errno))?;
        Ok(u64::try_from(stat.st_blocks).unwrap_or(0) * 512)
    }

    /// `count` words of 4 bytes at `offset` (bytes, a multiple of 4).
    ///
    /// # Errors
    /// [`SharedMemoryError::OutOfRange`], [`SharedMemoryError::Misaligned`].
    pub fn words_u32(&self, offset: usize, count: usize) -> Result<&[AtomicU32], SharedMemoryError> {
        let first = self.place::<AtomicU32>(offset, count)?;
        // SAFETY: `place` checked that the words are aligned and inside the mapping, which lives as
        // long as `self`; every bit pattern is a value; all access, in every process, is atomic.
        Ok(unsafe { slice::from_raw_parts(first.as_ptr(), count) })
    }

    /// `count` words of 8 bytes at `offset` (bytes, a multiple of 8).
    ///
    /// # Errors
    /// [`SharedMemoryError::OutOfRange`], [`SharedMemoryError::Misaligned`].
    pub fn words_u64(&self, offset: usize, count: usize) -> Result<&[AtomicU64], SharedMemoryError> {
        let first = self.place::<AtomicU64>(offset, count)?;
        // SAFETY: as in `words_u32`.
        Ok(unsafe { slice::from_raw_parts(first.as_ptr(), count) })
    }

    /// Backs `range` (bytes) with memory now, so that no later store to it can fail.
    ///
    /// # Errors
    /// [`SharedMemoryError::OutOfMemory`] (what was not backed before is not backed now),
    /// [`SharedMemoryError::OutOfRange`].
    pub fn reserve(&self, range: Range<usize>) -> Result<(), SharedMemoryError> {
        self.allocate("reserve shared memory", FallocateFlags::empty(), range)
    }

    /// Gives the memory of the whole pages in `range` (bytes) back to the host; all of it reads 0.
    ///
    /// # Errors
    /// [`SharedMemoryError::OutOfRange`].
    pub fn punch(&self, range: Range<usize>) -> Result<(), SharedMemoryError> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.allocate("punch shared memory", flags, range)
    }

    /// Makes all of `range` (bytes, whole pages) read 0. That costs nothing where nobody has ever stored
    /// anything; to punch has the host look into every mapping, of every process.
    ///
    /// # Errors
    /// [`SharedMemoryError::OutOfRange`].
    pub fn clear(&self, range: Range<usize>) -> Result<(), SharedMemoryError> {
        self.check(range.start, range.len())?;
        // no failure point: where the host cannot say, it is punched
        match rustix::fs::seek(&self.file, SeekFrom::Data(wide(range.start))) {
            Ok(first) if first >= wide(range.end) => Ok(()),
            Err(Errno::NXIO) => Ok(()),
            _ => self.punch(range),
        }
    }

    fn allocate(
        &self,
        action: &'static str,
        flags: FallocateFlags,
        range: Range<usize>,
    ) -> Result<(), SharedMemoryError> {
        let wanted = range.len();
        self.check(range.start, wanted)?;
        if wanted == 0 {
            return Ok(());
        }
        let is_punch = flags.contains(FallocateFlags::PUNCH_HOLE);
        failure::point(if is_punch { "shared.punch" } else { "shared.reserve" }).map_err(IpcError::from)?;
        loop {
            match rustix::fs::fallocate(&self.file, flags, wide(range.start), wide(wanted)) {
                // A signal makes the kernel undo what it did: start again.
                Err(Errno::INTR) => {}
                result => {
                    return result.map_err(|errno| SharedMemoryError::host(action, wanted, errno));
                }
            }
        }
    }

    /// The address of `count` words `W` at `offset`, if all of them are there and aligned.
    fn place<W>(&self, offset: usize, count: usize) -> Result<NonNull<W>, SharedMemoryError> {
        self.check(offset, count.saturating_mul(size_of::<W>()))?;
        let align_bytes = align_of::<W>();
        if !offset.is_multiple_of(align_bytes) {
            return Err(SharedMemoryError::Misaligned { offset, align_bytes });
        }
        // SAFETY: `check` found the offset inside the mapping (or one past its end, with no words).
        Ok(unsafe { self.base.add(offset) }.cast())
    }

    fn check(&self, start: usize, wanted: usize) -> Result<(), SharedMemoryError> {
        let end = start.saturating_add(wanted);
        if end > self.len_bytes {
            return Err(SharedMemoryError::OutOfRange { start, end, len_bytes: self.len_bytes });
        }
        Ok(())
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and `&mut self` says that no word of it is borrowed.
        let result = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len_bytes) };
        debug_assert!(result.is_ok(), "unmapping a whole mapping cannot fail: {result:?}");
    }
}

// `index` and `wide` are lossless only where the two types are of one size; file sizes rely on it.
const _: () = assert!(index(wide(usize::MAX)) == usize::MAX);

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use rustix::fs::{Mode, OFlags};
    use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

    use super::*;

    fn shared(len_bytes: usize) -> (SharedMemory, SharedMemory) {
        let here = SharedMemory::create("shared-test", len_bytes).expect("create");
        let there = SharedMemory::from_fd(here.fd().try_clone_to_owned().expect("dup")).expect("map");
        (here, there)
    }

    #[test]
    fn a_store_is_seen_in_the_other_mapping() {
        let (here, there) = shared(3 * PAGE_BYTES - 1);
        assert_eq!((here.len_bytes(), there.len_bytes()), (3 * PAGE_BYTES, 3 * PAGE_BYTES));
        here.words_u32(PAGE_BYTES + 4, 2).expect("in range")[1].store(11, Ordering::Release);
        let last = 3 * PAGE_BYTES - 8;
        here.words_u64(last, 1).expect("in range")[0].store(u64::MAX - 1, Ordering::Release);
        assert_eq!(there.words_u32(PAGE_BYTES + 8, 1).expect("in range")[0].load(Ordering::Acquire), 11);
        assert_eq!(there.words_u64(last, 1).expect("in range")[0].load(Ordering::Acquire), u64::MAX - 1);
        assert_eq!(there.words_u32(0, 3 * PAGE_BYTES / 4).expect("in range").len(), 3 * PAGE_BYTES / 4);
    }

    #[test]
    fn what_is_outside_or_misaligned_is_refused() {
        let (memory, _) = shared(PAGE_BYTES);
        for (offset, count) in
            [(PAGE_BYTES, 1), (0, PAGE_BYTES / 8 + 1), (8, usize::MAX), (usize::MAX - 7, 1)]
        {
            let error = memory.words_u64(offset, count).expect_err("outside");
            assert!(matches!(error, SharedMemoryError::OutOfRange { .. }), "{error}");
        }
        assert!(memory.words_u64(PAGE_BYTES, 0).expect("no words").is_empty());
        let error = memory.words_u64(4, 1).expect_err("misaligned");
        assert!(matches!(error, SharedMemoryError::Misaligned { offset: 4, align_bytes: 8 }), "{error}");
        let error = memory.words_u32(2, 1).expect_err("misaligned");
        assert!(matches!(error, SharedMemoryError::Misaligned { .. }), "{error}");
        let error = memory.reserve(0..PAGE_BYTES + 1).expect_err("outside");
        assert!(matches!(error, SharedMemoryError::OutOfRange { .. }), "{error}");
    }

    #[test]
    fn memory_is_backed_by_reserve_and_given_back_by_punch() {
        let (memory, other) = shared(64 * PAGE_BYTES);
        assert_eq!(memory.resident_bytes().expect("stat"), 0);
        memory.reserve(PAGE_BYTES..9 * PAGE_BYTES).expect("reserve");
        assert_eq!(memory.resident_bytes().expect("stat"), 8 * wide(PAGE_BYTES));
        let word = &other.words_u32(PAGE_BYTES, 1).expect("in range")[0];
        word.store(5, Ordering::Relaxed);
        memory.reserve(0..2 * PAGE_BYTES).expect("reserve again");
        assert_eq!(word.load(Ordering::Relaxed), 5);
        memory.punch(0..64 * PAGE_BYTES).expect("punch");
        assert_eq!(memory.resident_bytes().expect("stat"), 0);
        assert_eq!(word.load(Ordering::Relaxed), 0);
        memory.reserve(3..3).expect("nothing");
    }

    #[test]
    fn what_somebody_has_stored_is_cleared_and_nothing_beside_it() {
        let (memory, other) = shared(8 * PAGE_BYTES);
        let words = other.words_u32(0, 8 * PAGE_BYTES / 4).expect("in range");
        let word = |page: usize| &words[(page + 1) * PAGE_BYTES / 4 - 1];
        (0..8).for_each(|page| word(page).store(5, Ordering::Relaxed));
        let values = || (0..8).map(|page| word(page).load(Ordering::Relaxed)).collect::<Vec<_>>();
        memory.clear(2 * PAGE_BYTES..5 * PAGE_BYTES).expect("clear");
        assert_eq!(values(), [5, 5, 0, 0, 0, 5, 5, 5]);
        // A read has backed those pages, and nobody has stored there.
        memory.clear(2 * PAGE_BYTES..5 * PAGE_BYTES).expect("clear again");
        word(4).store(6, Ordering::Relaxed);
        memory.clear(2 * PAGE_BYTES..5 * PAGE_BYTES).expect("clear the last page");
        assert_eq!(values(), [5, 5, 0, 0, 0, 5, 5, 5]);
        memory.clear(4 * PAGE_BYTES..8 * PAGE_BYTES).expect("clear to the end");
        assert_eq!(values(), [5, 5, 0, 0, 0, 0, 0, 0]);
        let error = memory.clear(8 * PAGE_BYTES..9 * PAGE_BYTES).expect_err("outside");
        assert!(matches!(error, SharedMemoryError::OutOfRange { .. }), "{error}");
    }

    #[test]
    fn nobody_can_change_the_size() {
        let (memory, _) = shared(2 * PAGE_BYTES);
        for len_bytes in [0, wide(PAGE_BYTES), wide(3 * PAGE_BYTES)] {
            assert_eq!(rustix::fs::ftruncate(memory.fd(), len_bytes), Err(Errno::PERM));
        }
        assert_eq!(rustix::fs::fcntl_add_seals(memory.fd(), SealFlags::FUTURE_WRITE), Err(Errno::PERM));
        let loose = rustix::fs::memfd_create("loose", MemfdFlags::ALLOW_SEALING).expect("memfd");
        rustix::fs::ftruncate(&loose, wide(PAGE_BYTES)).expect("truncate");
        let error = SharedMemory::from_fd(loose).expect_err("not sealed");
        assert!(matches!(error, SharedMemoryError::Ipc(IpcError::Malformed { .. })), "{error}");
        assert!(SharedMemory::create("empty", 0).is_err());
    }

    #[test]
    fn a_full_host_refuses_the_reservation_and_names_the_reason() {
        let Ok(context) = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC) else {
            println!("SKIPPED: a_full_host_refuses_the_reservation_and_names_the_reason needs CAP_SYS_ADMIN");
            return;
        };
        // A tmpfs of 16 KiB stands for a host with no more memory than that.
        rustix::mount::fsconfig_set_string(&context, "size", "16k").expect("size");
        rustix::mount::fsconfig_create(&context).expect("create");
        let (flags, attributes) = (FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty());
        let mount = rustix::mount::fsmount(&context, flags, attributes).expect("mount");
        let (flags, mode) = (OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
        let file = rustix::fs::openat(&mount, ".", flags, mode).expect("file");
        rustix::fs::ftruncate(&file, wide(64 * PAGE_BYTES)).expect("truncate");
        let memory = SharedMemory::map(file).expect("map");
        memory.reserve(0..2 * PAGE_BYTES).expect("fits");
        let error = memory.reserve(0..32 * PAGE_BYTES).expect_err("full");
        assert!(matches!(error, SharedMemoryError::OutOfMemory { len_bytes: 131_072 }), "{error}");
        assert_eq!(memory.resident_bytes().expect("stat"), 2 * wide(PAGE_BYTES));
    }
}
