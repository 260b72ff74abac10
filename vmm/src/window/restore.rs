//! A window's way back to its cut: pages get their bytes in place, from block files mapped beside the
//! window; leaves trap again.
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
use crate::words::{LeafNumber, PAGE_BYTES, PageSet, index};

impl Window {
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
