//! The window: a VM's memory as a host virtual range, and the machine under a
//! [`Space`](crate::space::Space).
//!
//! A window is laid out like the guest-physical space: a host address is the window's base plus the
//! guest-physical address. KVM's memory slots point at it once and never change; what lies under
//! it changes leaf by leaf, by `mmap` and `mremap` in place. One userfaultfd serves it for life.
//!
//! - [`Window`]: implements [`Host`].
//! - [`FrameFiles`]: where the arena's files are found by name.
//! - [`Resolvers`]: the threads that resolve faults.
//!
//! Known holes:
//! - The window is `MADV_DONTFORK`, and each remap asks for that again; a process that forks between
//!   the two shares that leaf with its child. Members never fork.
//! - Only pages that are the VM's own trap while a cut protects. A thread that is not stopped and
//!   stores for the first time to a page (untouched, or of the arena), then to another page that the
//!   cut has not come to yet, has the second store in the clone without the first. So threads that
//!   store by themselves, devices' too, must be held while a cut is performed; DMA into pinned pages
//!   need not be.

mod guarded;
mod mapping;
mod pagemap;
mod publish;
mod resolvers;
mod restore;
mod userfault;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use self::pagemap::Pagemap;
pub use self::resolvers::{OnEnd, OnFailure, Resolvers, Surplus};
pub use self::userfault::Userfault;

use self::mapping::Reservation;
use crate::arena_files::{ArenaDir, ArenaReader};
use crate::frames::CutId;
use crate::ipc::futex;
use crate::space::{Host, HostError, PageSource, PageStates, Patch, SpaceError, Traps};
use crate::sync::AtomicU32 as BoardWord;
use crate::words::{
    Gfn, Gpa, HostAddress, LEAF_BYTES, LeafNumber, MemoryShape, PAGE_BYTES, PageSet, index, wide,
};

/// Where files of the arena are found.
pub trait FrameFiles: Send + Sync {
    /// Opens a file of the arena for reading.
    ///
    /// # Errors
    /// There is no such file, or the host refused.
    fn open(&self, name: &str) -> io::Result<OwnedFd>;
}

impl FrameFiles for ArenaDir {
    fn open(&self, name: &str) -> io::Result<OwnedFd> {
        self.open_read_only(name).map_err(io::Error::other)
    }
}

impl FrameFiles for ArenaReader {
    fn open(&self, name: &str) -> io::Result<OwnedFd> {
        self.open_read_only(name).map_err(io::Error::other)
    }
}

/// The `ioctl` requests of this module.
pub const IOCTLS: [u64; 9] = {
    let [a, b, c, d, e, f, g, h] = userfault::IOCTLS;
    [a, b, c, d, e, f, g, h, pagemap::PAGEMAP_SCAN]
};

/// The files that a source writes for one cut.
#[derive(Debug)]
pub struct CutFiles {
    /// Blocks, each at its leaf's own offset.
    pub blocks: OwnedFd,
    /// Patch frames.
    pub patches: OwnedFd,
}

/// See the module.
pub struct Window {
    memory: Reservation,
    shape: MemoryShape,
    is_huge: bool,
    userfault: Userfault,
    pagemap: Pagemap,
    files: Arc<dyn FrameFiles>,
    cuts: Mutex<BTreeMap<CutId, Arc<CutFiles>>>,
    /// Whose turn it is to write into the arena. All of a cut is written to one file, whose lock in the
    /// kernel is unfair: a publisher that goes from leaf to leaf would keep out for milliseconds whoever
    /// waits for just one.
    turn: parking_lot::FairMutex<()>,
    /// Block files mapped beside the window, to restore pages from.
    images: Mutex<BTreeMap<CutId, Arc<Reservation>>>,
}

impl Window {
    /// A window in which nothing is mapped yet, but whose addresses are settled. Its anonymous memory
    /// will be of huge pages if `is_huge`.
    ///
    /// # Errors
    /// The host has no userfaultfd for kernel faults, no PAGEMAP_SCAN, or no room.
    pub fn new(shape: MemoryShape, is_huge: bool, files: Arc<dyn FrameFiles>) -> io::Result<Self> {
        guarded::install()?;
        Ok(Self {
            memory: Reservation::of_addresses(shape.span_bytes())?,
            shape,
            is_huge,
            userfault: Userfault::open()?,
            pagemap: Pagemap::open_own()?,
            files,
            cuts: Mutex::new(BTreeMap::new()),
            turn: parking_lot::FairMutex::new(()),
            images: Mutex::new(BTreeMap::new()),
        })
    }

    /// Makes the window untouched anonymous memory: that of a VM that shares nothing.
    ///
    /// # Errors
    /// The host refused.
    pub fn become_root(&self) -> io::Result<()> {
        for (first, count) in self.shape.regions() {
            self.memory.map_anonymous(self.span(first, count), self.is_huge)?;
        }
        Ok(())
    }

    /// Makes all of the window trap, over the file of `cut`: before a clone's first instruction.
    ///
    /// # Errors
    /// The host refused.
    pub fn become_clone(&self, cut: CutId) -> io::Result<()> {
        let file = self.files.open(&cut.block_file())?;
        for (first, count) in self.shape.regions() {
            let range = self.span(first, count);
            self.memory.map_file(range.clone(), file.as_fd(), range.start)?;
            self.userfault.register(self.memory.host(range), Traps::Touches)?;
        }
        Ok(())
    }

    /// Names the files of a cut that this VM is the source of.
    pub fn attach_cut(&self, cut: CutId, files: CutFiles) {
        self.cut_files().insert(cut, Arc::new(files));
    }

    /// Closes the files of a cut on which nothing is pending any more.
    pub fn detach_cut(&self, cut: CutId) {
        self.cut_files().remove(&cut);
    }

    fn cut_files(&self) -> MutexGuard<'_, BTreeMap<CutId, Arc<CutFiles>>> {
        self.cuts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The shape of the memory.
    pub fn shape(&self) -> MemoryShape {
        self.shape
    }

    /// The host address of a guest-physical one. Anything may be under it; see [`Host`].
    pub fn host_address(&self, gpa: Gpa) -> HostAddress {
        self.memory.address(index(gpa.0))
    }

    /// The userfaultfd of the window.
    pub fn userfault(&self) -> &Userfault {
        &self.userfault
    }

    /// The guest page at a host address, if it is one of this window.
    pub fn gfn_at(&self, address: u64) -> Option<Gfn> {
        let offset = address.checked_sub(self.memory.address(0).get())?;
        (offset < self.shape.span_bytes()).then_some(Gpa(offset).gfn())
    }

    /// Copies guest memory out, a range that the caller has checked to be RAM. May wait for a fault
    /// to be resolved.
    ///
    /// # Errors
    /// [`SpaceError::Lost`]; what came before the lost page has been copied.
    pub fn read(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), SpaceError> {
        debug_assert!(self.shape.contains(gpa, into.len()));
        let left = self.memory.read_guarded(index(gpa.0), into);
        Self::all_copied(gpa, into.len(), left)
    }

    /// Copies into guest memory, a range that the caller has checked to be RAM. May wait for a fault
    /// to be resolved.
    ///
    /// # Errors
    /// [`SpaceError::Lost`]; what came before the lost page has been copied.
    pub fn write(&self, gpa: Gpa, from: &[u8]) -> Result<(), SpaceError> {
        debug_assert!(self.shape.contains(gpa, from.len()));
        let left = self.memory.write_guarded(index(gpa.0), from);
        Self::all_copied(gpa, from.len(), left)
    }

    fn all_copied(gpa: Gpa, len_bytes: usize, left_bytes: usize) -> Result<(), SpaceError> {
        match left_bytes {
            0 => Ok(()),
            left => Err(SpaceError::Lost { gfn: Gpa(gpa.0 + wide(len_bytes - left)).gfn() }),
        }
    }

    /// An aligned 32-bit word of guest memory, for atomic access, in a range that the caller has
    /// checked to be RAM.
    pub fn word(&self, gpa: Gpa) -> Option<&AtomicU32> {
        self.memory.word(index(gpa.0))
    }

    /// The host frame number under a page, 0 where none is mapped or the caller may not know.
    ///
    /// # Errors
    /// The host refused.
    pub fn frame_number(&self, gfn: Gfn) -> io::Result<u64> {
        self.pagemap.frame_number(self.memory.address(index(gfn.gpa().0)))
    }

    fn span(&self, first: LeafNumber, count: u32) -> std::ops::Range<u64> {
        first.gpa().0..first.gpa().0 + wide(LEAF_BYTES) * u64::from(count)
    }

    fn leaf_span(&self, leaf: LeafNumber) -> std::ops::Range<u64> {
        self.span(leaf, 1)
    }

    fn hosts(&self, first: LeafNumber, count: u32) -> std::ops::Range<u64> {
        self.memory.host(self.span(first, count))
    }

    fn page_span(first: Gfn, pages: u64) -> std::ops::Range<u64> {
        first.gpa().0..Gfn(first.0 + pages).gpa().0
    }
}

/// Names what failed and where.
fn failed(action: &'static str, leaf: LeafNumber) -> impl FnOnce(io::Error) -> HostError {
    move |source| HostError { action, leaf, source }
}

impl Host for Window {
    fn map_anonymous(&self, leaf: LeafNumber) -> Result<(), HostError> {
        self.memory
            .map_anonymous(self.leaf_span(leaf), self.is_huge)
            .map_err(failed("mapping anonymous memory", leaf))
    }

    fn map_block(&self, leaf: LeafNumber, block: Option<CutId>, patches: &[Patch]) -> Result<(), HostError> {
        self.place_block(leaf, block, patches).map_err(failed("mapping a block", leaf))
    }

    fn register(&self, first: LeafNumber, count: u32, traps: Traps) -> Result<(), HostError> {
        self.userfault
            .register(self.hosts(first, count), traps)
            .map_err(failed("registering with userfaultfd", first))
    }

    fn unregister(&self, leaf: LeafNumber) -> Result<(), HostError> {
        self.userfault.unregister(self.hosts(leaf, 1)).map_err(failed("unregistering", leaf))
    }

    fn protect(&self, first: LeafNumber, count: u32) -> Result<(), HostError> {
        self.userfault.protect(self.hosts(first, count), true).map_err(failed("protecting", first))
    }

    fn unprotect(&self, leaf: LeafNumber) -> Result<(), HostError> {
        self.userfault.protect(self.hosts(leaf, 1), false).map_err(failed("un-protecting", leaf))
    }

    fn unprotect_page(&self, gfn: Gfn) -> Result<(), HostError> {
        let range = self.memory.host(Self::page_span(gfn, 1));
        self.userfault.protect(range, false).map_err(failed("un-protecting a page", gfn.leaf()))
    }

    fn wake(&self, leaf: LeafNumber) -> Result<(), HostError> {
        self.userfault.wake(self.hosts(leaf, 1)).map_err(failed("waking", leaf))
    }

    fn poison(&self, leaf: LeafNumber) -> Result<(), HostError> {
        self.userfault.poison(self.hosts(leaf, 1)).map_err(failed("poisoning", leaf))
    }

    fn scan(&self, first: LeafNumber, count: u32) -> Result<Vec<(LeafNumber, PageStates)>, HostError> {
        self.pagemap.scan(&self.memory, first, count).map_err(failed("scanning page states", first))
    }

    fn populate(&self, first: Gfn, pages: u64) -> Result<(), HostError> {
        self.memory
            .populate(Self::page_span(first, pages))
            .map_err(failed("making pages exclusive", first.leaf()))
    }

    fn zero(&self, first: Gfn, pages: u64, backing_is_block: bool) -> Result<(), HostError> {
        let range = Self::page_span(first, pages);
        if backing_is_block {
            return self.zero_over_block(first, pages).map_err(failed("discarding", first.leaf()));
        }
        self.memory.discard(range).map_err(failed("discarding", first.leaf()))
    }

    fn trap(&self, leaf: LeafNumber) -> Result<(), HostError> {
        self.trap_leaf(leaf).map_err(failed("trapping", leaf))
    }

    fn restore(
        &self,
        leaf: LeafNumber,
        pages: &PageSet,
        block: Option<CutId>,
        patches: &[Patch],
    ) -> Result<(), HostError> {
        self.restore_pages(leaf, pages, block, patches).map_err(failed("restoring pages", leaf))
    }

    fn copy_page(&self, gfn: Gfn, into: &mut [u8; PAGE_BYTES]) {
        self.memory.read(index(gfn.gpa().0), into);
    }

    fn publish_block(
        &self,
        cut: CutId,
        leaf: LeafNumber,
        sources: &[PageSource<'_>],
    ) -> Result<(), HostError> {
        self.write_block(cut, leaf, sources).map_err(failed("publishing a block", leaf))
    }

    fn publish_patches(
        &self,
        cut: CutId,
        leaf: LeafNumber,
        first_frame: u32,
        pages: &[(usize, PageSource<'_>)],
    ) -> Result<(), HostError> {
        self.write_patches(cut, leaf, first_frame, pages).map_err(failed("publishing patches", leaf))
    }

    fn wait_word(&self, word: &BoardWord, value: u32, limit: Duration) {
        if let Err(error) = futex::wait(word, value, Some(limit)) {
            tracing::error!(%error, "waiting for a word of the board failed");
        }
    }

    fn wake_word(&self, word: &BoardWord) {
        // no failure point: who waits there looks again by itself
        if let Err(error) = futex::wake_all(word) {
            tracing::error!(%error, "waking those who wait for a word of the board failed");
        }
    }
}

#[cfg(test)]
mod tests;
