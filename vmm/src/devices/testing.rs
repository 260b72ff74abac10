//! What the devices' tests stand on: guest memory in a plain mapping, extent files in memory, an
//! interrupt line that counts, a sink that remembers.
#![expect(unsafe_code, reason = "tests play guest memory with a mapping of their own")]

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::backing::{ExtentFileId, ExtentFiles};
use super::{Access, GuestRam, InterruptLine, PinnedRange, RamError, lock};
use crate::words::{Gpa, HostAddress, PAGE_BYTES, index, wide};

struct Mapping {
    first: AtomicPtr<u8>,
    len_bytes: usize,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `mmap_anonymous` with this length; pins hold the mapping by an `Arc`.
        let result = unsafe { munmap(self.first.load(Ordering::Relaxed).cast(), self.len_bytes) };
        result.expect("the range was mapped by this module");
    }
}

/// Guest memory of some pages at a guest-physical address.
pub(super) struct TestRam {
    base: u64,
    mapping: Arc<Mapping>,
    pins: Arc<AtomicUsize>,
    refuse_pins: Mutex<bool>,
    after_store: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl TestRam {
    pub(super) fn new(base: u64, pages: usize) -> Self {
        let len_bytes = pages * PAGE_BYTES;
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let first = unsafe { mmap_anonymous(std::ptr::null_mut(), len_bytes, protection, flags) };
        let first = AtomicPtr::new(first.expect("memory for a test").cast());
        let mapping = Arc::new(Mapping { first, len_bytes });
        Self {
            base,
            mapping,
            pins: Arc::default(),
            refuse_pins: Mutex::new(false),
            after_store: Mutex::new(None),
        }
    }

    /// Memory of the same size with the same bytes: a clone's, at a cut.
    pub(super) fn copy(&self) -> Self {
        let copy = Self::new(self.base, self.mapping.len_bytes / PAGE_BYTES);
        copy.set(self.base, &self.bytes(self.base, self.mapping.len_bytes));
        copy
    }

    pub(super) fn refuse_pins(&self) {
        *lock(&self.refuse_pins) = true;
    }

    /// Calls `then` once, right after the next status has been stored, on the engine's thread.
    pub(super) fn after_next_store(&self, then: impl FnOnce() + Send + 'static) {
        *lock(&self.after_store) = Some(Box::new(then));
    }

    pub(super) fn pins(&self) -> usize {
        self.pins.load(Ordering::Acquire)
    }

    pub(super) fn bytes(&self, gpa: u64, len_bytes: usize) -> Vec<u8> {
        let mut bytes = vec![0; len_bytes];
        self.read(Gpa(gpa), &mut bytes).expect("inside the test's memory");
        bytes
    }

    pub(super) fn set(&self, gpa: u64, bytes: &[u8]) {
        self.write(Gpa(gpa), bytes).expect("inside the test's memory");
    }

    pub(super) fn load_u32(&self, gpa: u64) -> u32 {
        let host = self.host(Gpa(gpa), 4).expect("inside the test's memory");
        // SAFETY: `host` checked the range; the tests use multiples of 4.
        unsafe { AtomicU32::from_ptr(host.as_ptr().cast()) }.load(Ordering::Acquire)
    }

    fn host(&self, gpa: Gpa, len_bytes: usize) -> Result<HostAddress, RamError> {
        let end = gpa.0.checked_add(wide(len_bytes));
        let limit = self.base + wide(self.mapping.len_bytes);
        if gpa.0 < self.base || end.is_none_or(|end| end > limit) {
            let gfn = gpa.max(Gpa(limit)).gfn();
            return Err(RamError::OutOfRange { gpa, len_bytes, gfn });
        }
        let first = HostAddress::new(self.mapping.first.load(Ordering::Relaxed));
        Ok(first.plus(index(gpa.0 - self.base)))
    }
}

struct TestPin {
    host: HostAddress,
    len_bytes: usize,
    pins: Arc<AtomicUsize>,
    _mapping: Arc<Mapping>,
}

// SAFETY: the mapping stays where it is while `_mapping` holds it.
unsafe impl PinnedRange for TestPin {
    fn host(&self) -> (HostAddress, usize) {
        (self.host, self.len_bytes)
    }
}

impl Drop for TestPin {
    fn drop(&mut self) {
        self.pins.fetch_sub(1, Ordering::Release);
    }
}

impl GuestRam for TestRam {
    fn pin(&self, gpa: Gpa, len_bytes: usize, _: Access) -> Result<Box<dyn PinnedRange>, RamError> {
        let host = self.host(gpa, len_bytes)?;
        if *lock(&self.refuse_pins) {
            let reason = "refused by the test".to_owned();
            return Err(RamError::Host { gfn: gpa.gfn(), reason });
        }
        self.pins.fetch_add(1, Ordering::Relaxed);
        let (pins, mapping) = (Arc::clone(&self.pins), Arc::clone(&self.mapping));
        Ok(Box::new(TestPin { host, len_bytes, pins, _mapping: mapping }))
    }

    fn read(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), RamError> {
        let host = self.host(gpa, into.len())?;
        for (at, byte) in into.iter_mut().enumerate() {
            // SAFETY: `host` checked the range.
            *byte = unsafe { host.plus(at).as_ptr().read_volatile() };
        }
        Ok(())
    }

    fn write(&self, gpa: Gpa, from: &[u8]) -> Result<(), RamError> {
        let host = self.host(gpa, from.len())?;
        for (at, byte) in from.iter().enumerate() {
            // SAFETY: `host` checked the range.
            unsafe { host.plus(at).as_ptr().write_volatile(*byte) };
        }
        Ok(())
    }

    fn store_u32(&self, gpa: Gpa, value: u32) -> Result<(), RamError> {
        let host = self.host(gpa, 4)?;
        assert!(gpa.0.is_multiple_of(4), "{gpa} is unaligned");
        // SAFETY: `host` checked the range, it is aligned.
        unsafe { AtomicU32::from_ptr(host.as_ptr().cast()) }.store(value, Ordering::Release);
        let then = lock(&self.after_store).take();
        if let Some(then) = then {
            then();
        }
        Ok(())
    }
}

/// Extent files in memory.
#[derive(Default)]
pub(super) struct MemoryFiles {
    files: Mutex<HashMap<u64, File>>,
    refuse_writes: AtomicBool,
}

impl MemoryFiles {
    /// From now on every write to a new file fails.
    pub(super) fn refuse_writes(&self) {
        self.refuse_writes.store(true, Ordering::Relaxed);
    }
}

impl ExtentFiles for MemoryFiles {
    fn create(&self) -> io::Result<(ExtentFileId, File)> {
        let file = File::from(memfd_create("extents", MemfdFlags::CLOEXEC)?);
        let mut files = lock(&self.files);
        let number = wide(files.len());
        files.insert(number, file.try_clone()?);
        if self.refuse_writes.load(Ordering::Relaxed) {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            return Ok((ExtentFileId(number), File::open(path)?));
        }
        Ok((ExtentFileId(number), file))
    }

    fn open(&self, id: ExtentFileId) -> io::Result<File> {
        let files = lock(&self.files);
        files.get(&id.0).ok_or(io::ErrorKind::NotFound)?.try_clone()
    }
}

/// Whether transfers by the host kernel can be tested here. Says so if not, past the test
/// harness, which keeps what a passing test prints.
pub(super) fn has_io_uring() -> bool {
    let ring = io_uring::IoUring::new(2);
    let works = ring.and_then(|ring| ring.submitter().register_buffers_sparse(1));
    // Registered memory counts against an ordinary user's limit; the tests run side by side.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    let small = limit.is_some_and(|bytes| bytes < 64 << 20) && !rustix::process::geteuid().is_root();
    if works.is_ok() && !small {
        return true;
    }
    let reason = format!("io_uring {works:?}, RLIMIT_MEMLOCK {limit:?} bytes");
    writeln!(io::stderr(), "SKIPPED: transfers by the host kernel: {reason}")
        .expect("a test may write to its standard error");
    false
}

/// An interrupt line that counts, and that can be waited for.
#[derive(Default)]
pub(super) struct CountingLine {
    raised: Mutex<HashMap<u8, usize>>,
    changed: Condvar,
}

impl CountingLine {
    pub(super) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(super) fn raised(&self, vector: u8) -> usize {
        lock(&self.raised).get(&vector).copied().unwrap_or(0)
    }

    /// Waits until `vector` was raised `count` times.
    pub(super) fn wait(&self, vector: u8, count: usize) {
        let mut raised = lock(&self.raised);
        while raised.get(&vector).copied().unwrap_or(0) < count {
            raised = self.changed.wait(raised).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl InterruptLine for CountingLine {
    fn raise(&self, vector: u8) {
        *lock(&self.raised).entry(vector).or_default() += 1;
        self.changed.notify_all();
    }
}

/// A sink that its test can look into.
#[derive(Clone, Default)]
pub(super) struct SharedSink(Arc<Mutex<Vec<u8>>>);

impl SharedSink {
    pub(super) fn bytes(&self) -> Vec<u8> {
        lock(&self.0).clone()
    }
}

impl Write for SharedSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
