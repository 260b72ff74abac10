//! Other bytes in the place of pages: zeros, where they are discarded; and a window's way back to its
//! cut, in place from block files mapped beside the window, or by leaves that trap again.
//!
//! A block file stays mapped here as long as the window: only files that the VM's origin refers to
//! are, so none is kept from going.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError};

use super::Window;
use super::mapping::Reservation;
use crate::frames::CutId;
use crate::space::{Patch, Traps};
use crate::words::{Gfn, LeafNumber, PAGE_BYTES, PageSet, index};

static ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

impl Window {
    /// Puts zeros in the place of pages of a leaf that maps a block. A page of the VM's own is replaced,
    /// not overwritten: a pipe may hold it. What is under it, the block's, must not show through
    /// meanwhile: all first accesses to the leaf trap. That ends with it, and all other traps do.
    pub(super) fn zero_over_block(&self, first: Gfn, pages: u64) -> io::Result<()> {
        let range = Self::page_span(first, pages);
        let hosts = self.hosts(first.leaf(), 1);
        self.userfault.register(hosts.clone(), Traps::Touches)?;
        let replaced = self.memory.discard(range.clone()).and_then(|()| {
            let mut places = self.memory.host(range.clone()).step_by(PAGE_BYTES);
            places.try_for_each(|place| self.userfault.copy(place, &ZEROS))
        });
        self.userfault.unregister(hosts)?;
        if let Err(error) = replaced {
            tracing::warn!(%first, %error, "discarded pages are overwritten where they are");
            range.step_by(PAGE_BYTES).for_each(|offset| self.memory.write(index(offset), &ZEROS));
        }
        Ok(())
    }

    /// Maps fresh anonymous memory at a leaf and registers it for first accesses. (The file that the
    /// window began over may be gone.)
    pub(super) fn trap_leaf(&self, leaf: LeafNumber) -> io::Result<()> {
        let range = self.leaf_span(leaf);
        self.memory.map_anonymous(range.clone(), self.is_huge)?;
        self.userfault.register(self.memory.host(range), Traps::Misses)
    }

    /// Copies into pages that are the window's own.
    pub(super) fn restore_pages(
        &self,
        leaf: LeafNumber,
        pages: &PageSet,
        block: Option<CutId>,
        patches: &[Patch],
    ) -> io::Result<()> {
        let image = block.map(|cut| self.image(cut)).transpose()?;
        for position in pages.iter() {
            let offset = index(leaf.gfn(position).gpa().0);
            match &image {
                Some(image) => self.memory.copy_from(image, offset, PAGE_BYTES),
                None => self.memory.write(offset, &[0; PAGE_BYTES]),
            }
        }
        for patch in patches.iter().filter(|patch| pages.contains(patch.position)) {
            self.memory.write(index(leaf.gfn(patch.position).gpa().0), &self.read_patch(patch)?);
        }
        Ok(())
    }

    /// The block file of a cut, laid out like the window.
    fn image(&self, cut: CutId) -> io::Result<Arc<Reservation>> {
        let mut images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(image) = images.get(&cut) {
            return Ok(Arc::clone(image));
        }
        let file = self.files.open(&cut.block_file())?;
        let image = Reservation::new(self.shape.span_bytes())?;
        image.map_file(0..self.shape.span_bytes(), file.as_fd(), 0)?;
        let image = Arc::new(image);
        images.insert(cut, Arc::clone(&image));
        Ok(image)
    }
}
