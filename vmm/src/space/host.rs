//! What a space asks of the machine under it.

use std::time::Duration;

use thiserror::Error;

use crate::frames::CutId;
use crate::sync::AtomicU32;
use crate::words::{Gfn, LeafNumber, PAGE_BYTES, PageSet};

/// The host refused something.
#[derive(Debug, Error)]
#[error("{action} at {leaf} failed: {source}")]
pub struct HostError {
    /// What was tried.
    pub action: &'static str,
    /// Where.
    pub leaf: LeafNumber,
    /// Why not.
    pub source: std::io::Error,
}

/// Which accesses to a leaf trap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traps {
    /// Stores to protected pages.
    Stores,
    /// Every first access to a leaf over a file, whether the page is in the arena or not.
    Touches,
    /// Every first access to anonymous memory.
    Misses,
}

/// Where the bytes of a page come from when a block is written.
#[derive(Clone, Copy, Debug)]
pub enum PageSource<'a> {
    /// The window's own page, which is lent and present.
    Window,
    /// A copy made earlier.
    Copy(&'a [u8; PAGE_BYTES]),
    /// The same page of that cut's block.
    Block(CutId),
    /// Zeros.
    Zero,
}

/// A patched page of a leaf that is being mapped: frame `frame` of the patch file of `cut`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patch {
    /// The page's position in the leaf.
    pub position: usize,
    /// Whose patch file.
    pub cut: CutId,
    /// Which frame of it.
    pub frame: u32,
}

/// Which pages of a leaf are anonymous memory of the window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageStates {
    /// Anonymous, in memory or swapped out.
    pub anonymous: PageSet,
    /// Of those, the ones in memory.
    pub present: PageSet,
    /// Of those, the ones without a protection.
    pub written: PageSet,
}

/// The machine under a space: the real window, or a simulated one.
///
/// Except where it says so, no method touches a page that may fault into user space, and none
/// waits for another thread of the space.
pub trait Host: Send + Sync {
    /// Puts fresh anonymous memory in place of whatever the leaf maps. Wakes nobody.
    ///
    /// # Errors
    /// The host refused; the leaf is unchanged.
    fn map_anonymous(&self, leaf: LeafNumber) -> Result<(), HostError>;

    /// Puts the block of `block` (zeros where none), privately and with `patches` over it, in place
    /// of whatever the leaf maps, in one step. Wakes nobody.
    ///
    /// # Errors
    /// The host refused; the leaf is unchanged.
    fn map_block(&self, leaf: LeafNumber, block: Option<CutId>, patches: &[Patch]) -> Result<(), HostError>;

    /// Makes accesses to `count` leaves from `first` trap, in addition to those that do.
    ///
    /// # Errors
    /// The host refused.
    fn register(&self, first: LeafNumber, count: u32, traps: Traps) -> Result<(), HostError>;

    /// No access to the leaf traps any more, protections are gone, and who waits there is woken.
    ///
    /// # Errors
    /// The host refused.
    fn unregister(&self, leaf: LeafNumber) -> Result<(), HostError>;

    /// Protects the anonymous pages of `count` registered leaves from `first`.
    ///
    /// # Errors
    /// The host refused.
    fn protect(&self, first: LeafNumber, count: u32) -> Result<(), HostError>;

    /// Takes the protection off a leaf, and wakes who waits there.
    ///
    /// # Errors
    /// The host refused.
    fn unprotect(&self, leaf: LeafNumber) -> Result<(), HostError>;

    /// Takes the protection off one page, and wakes who waits there.
    ///
    /// # Errors
    /// The host refused.
    fn unprotect_page(&self, gfn: Gfn) -> Result<(), HostError>;

    /// Wakes who waits at the leaf.
    ///
    /// # Errors
    /// The host refused.
    fn wake(&self, leaf: LeafNumber) -> Result<(), HostError>;

    /// Makes every access to the leaf a memory error, and frees who waits there.
    ///
    /// # Errors
    /// The host refused.
    fn poison(&self, leaf: LeafNumber) -> Result<(), HostError>;

    /// Which pages of `count` leaves from `first` are anonymous: (leaf, states), only leaves that
    /// have any.
    ///
    /// # Errors
    /// The host refused.
    fn scan(&self, first: LeafNumber, count: u32) -> Result<Vec<(LeafNumber, PageStates)>, HostError>;

    /// Makes these pages anonymous memory of the window, with the bytes that they show, where they
    /// are not yet. The leaf is neither trapped nor protected.
    ///
    /// # Errors
    /// The host refused.
    fn populate(&self, first: Gfn, pages: u64) -> Result<(), HostError>;

    /// Makes these pages zero. The leaf is neither trapped nor protected; `backing_is_block` tells
    /// what lies under it: a block's leaf is not registered any more afterwards.
    ///
    /// # Errors
    /// The host refused.
    fn zero(&self, first: Gfn, pages: u64, backing_is_block: bool) -> Result<(), HostError>;

    /// Makes every access to the leaf trap, over anonymous memory: whatever was there is gone. Nobody
    /// accesses the leaf meanwhile.
    ///
    /// # Errors
    /// The host refused; the leaf is as before, or must be trapped again before it is accessed.
    fn trap(&self, leaf: LeafNumber) -> Result<(), HostError>;

    /// Gives anonymous pages of the leaf the bytes that `block` (zeros where none) and `patches` have
    /// there, in place. The leaf is neither trapped nor protected.
    ///
    /// # Errors
    /// The host refused; some pages may have been given theirs.
    fn restore(
        &self,
        leaf: LeafNumber,
        pages: &PageSet,
        block: Option<CutId>,
        patches: &[Patch],
    ) -> Result<(), HostError>;

    /// Copies an anonymous page of the window.
    fn copy_page(&self, gfn: Gfn, into: &mut [u8; PAGE_BYTES]);

    /// Writes the block of `leaf` in the file of `cut`, as a whole.
    ///
    /// # Errors
    /// The arena is full, or the host refused: the block is as if never written.
    fn publish_block(
        &self,
        cut: CutId,
        leaf: LeafNumber,
        sources: &[PageSource<'_>],
    ) -> Result<(), HostError>;

    /// Writes patch frames, from frame `first_frame`, in the patch file of `cut`.
    ///
    /// # Errors
    /// The arena is full, or the host refused.
    fn publish_patches(
        &self,
        cut: CutId,
        leaf: LeafNumber,
        first_frame: u32,
        pages: &[(usize, PageSource<'_>)],
    ) -> Result<(), HostError>;

    /// Waits until `word` is not `value`, or somebody wakes it, or the time is over.
    fn wait_word(&self, word: &AtomicU32, value: u32, limit: Duration);

    /// Wakes all who wait for `word`.
    fn wake_word(&self, word: &AtomicU32);
}
