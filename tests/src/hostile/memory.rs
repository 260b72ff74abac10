//! Guest memory between two canaries, as the devices and as the loader see it.
#![expect(unsafe_code, reason = "plays guest memory with a mapping of its own")]

use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use salp::devices::{Access, GuestRam, PinnedRange, RamError};
use salp::words::{Gpa, HostAddress, PAGE_BYTES, index, wide};
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// Bytes of each canary: whatever runs over an end of the memory meets it, however far it runs.
const CANARY_BYTES: usize = 64 << 10;
/// What is in it. One number for all of it is found to be whole fast.
const CANARY: u64 = 0xca9a_81e5_ca9a_81e5;

/// A canary, guest memory from address 0 on, and a canary.
struct Mapping {
    first: AtomicPtr<u8>,
    ram_bytes: usize,
}

/// See the module.
pub(super) struct CanaryRam {
    mapping: Arc<Mapping>,
    pins: Arc<AtomicUsize>,
}

impl Mapping {
    fn len_bytes(&self) -> usize {
        self.ram_bytes + 2 * CANARY_BYTES
    }

    fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset <= self.len_bytes(), "{offset} is outside the mapping");
        // SAFETY: inside the mapping, or right behind it.
        unsafe { self.first.load(Ordering::Relaxed).add(offset) }
    }

    /// The words of both canaries.
    fn canaries(&self) -> impl Iterator<Item = *mut u64> {
        let words = |start: usize| (0..CANARY_BYTES / 8).map(move |word| start + 8 * word);
        words(0).chain(words(CANARY_BYTES + self.ram_bytes)).map(|offset| self.at(offset).cast())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `mmap_anonymous` with this length; pins hold the mapping by an `Arc`.
        let result = unsafe { munmap(self.at(0).cast(), self.len_bytes()) };
        result.expect("the range was mapped by this module");
    }
}

impl CanaryRam {
    /// `pages` of memory, zero.
    pub(super) fn new(pages: usize) -> Self {
        let ram_bytes = pages * PAGE_BYTES;
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        let len_bytes = ram_bytes + 2 * CANARY_BYTES;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let first = unsafe { mmap_anonymous(std::ptr::null_mut(), len_bytes, protection, flags) };
        let first = AtomicPtr::new(first.expect("memory for a test").cast());
        let mapping = Arc::new(Mapping { first, ram_bytes });
        for word in mapping.canaries() {
            // SAFETY: a word of the mapping that nobody else knows yet.
            unsafe { word.write(CANARY) };
        }
        Self { mapping, pins: Arc::default() }
    }

    /// Bytes of the guest's memory.
    pub(super) fn len_bytes(&self) -> u64 {
        wide(self.mapping.ram_bytes)
    }

    /// Makes the memory zero again.
    pub(super) fn clear(&self) {
        // SAFETY: exactly the guest's part of the mapping, of which no Rust object is a part.
        let cleared = unsafe {
            rustix::mm::madvise(
                self.mapping.at(CANARY_BYTES).cast(),
                self.mapping.ram_bytes,
                rustix::mm::Advice::LinuxDontNeed,
            )
        };
        cleared.expect("anonymous memory can be given back");
    }

    /// Panics if anything outside of the guest's memory was written.
    #[track_caller]
    pub(super) fn expect_whole(&self) {
        let count = self.mapping.canaries().filter(|word| {
            // SAFETY: a word of the mapping; whoever writes it is what this looks for.
            let found = unsafe { word.read_volatile() };
            found != CANARY
        });
        assert_eq!(count.count(), 0, "words outside of the guest's memory were written");
    }

    /// Pins that are held.
    pub(super) fn pins(&self) -> usize {
        self.pins.load(Ordering::Acquire)
    }

    /// The memory as the loader wants it. It must not outlive this.
    pub(super) fn for_loader(&self) -> GuestMemoryMmap {
        // SAFETY: the guest's part of the mapping, which lives longer; nothing in Rust refers to it.
        let region = unsafe {
            MmapRegion::build_raw(
                self.mapping.at(CANARY_BYTES),
                self.mapping.ram_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            )
        };
        let region = GuestRegionMmap::new(region.expect("a whole mapping"), GuestAddress(0));
        GuestMemoryMmap::from_regions(vec![region.expect("it starts at 0")]).expect("one region")
    }

    fn host(&self, gpa: Gpa, len_bytes: usize) -> Result<HostAddress, RamError> {
        let end = gpa.0.checked_add(wide(len_bytes));
        if end.is_none_or(|end| end > self.len_bytes()) {
            let gfn = gpa.max(Gpa(self.len_bytes())).gfn();
            return Err(RamError::OutOfRange { gpa, len_bytes, gfn });
        }
        Ok(HostAddress::new(self.mapping.at(CANARY_BYTES + index(gpa.0))))
    }
}

struct CanaryPin {
    host: HostAddress,
    len_bytes: usize,
    pins: Arc<AtomicUsize>,
    _mapping: Arc<Mapping>,
}

// SAFETY: the mapping stays where it is while `_mapping` holds it.
unsafe impl PinnedRange for CanaryPin {
    fn host(&self) -> (HostAddress, usize) {
        (self.host, self.len_bytes)
    }
}

impl Drop for CanaryPin {
    fn drop(&mut self) {
        self.pins.fetch_sub(1, Ordering::Release);
    }
}

impl GuestRam for CanaryRam {
    fn pin(&self, gpa: Gpa, len_bytes: usize, _: Access) -> Result<Box<dyn PinnedRange>, RamError> {
        let host = self.host(gpa, len_bytes)?;
        self.pins.fetch_add(1, Ordering::Relaxed);
        let (pins, mapping) = (Arc::clone(&self.pins), Arc::clone(&self.mapping));
        Ok(Box::new(CanaryPin { host, len_bytes, pins, _mapping: mapping }))
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
        Ok(())
    }
}
