//! Bytes on their way into the arena, and blocks on their way into a window.
#![expect(unsafe_code, reason = "pwritev of guest memory, which has no Rust reference")]

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use super::mapping::Reservation;
use super::{CutFiles, Window};
use crate::failure;
use crate::frames::CutId;
use crate::space::{PageSource, Patch};
use crate::words::{LEAF_BYTES, LeafNumber, PAGE_BYTES, index, wide};

static ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

impl Window {
    fn files_of(&self, cut: CutId) -> io::Result<Arc<CutFiles>> {
        let files = self.cut_files().get(&cut).cloned();
        files.ok_or_else(|| io::Error::other(format!("{cut} is not one of this vm")))
    }

    /// Writes a whole block by one call. If that writes less, the block is punched: the kernel shows
    /// a huge page as complete after any partial write.
    pub(super) fn write_block(
        &self,
        cut: CutId,
        leaf: LeafNumber,
        sources: &[PageSource<'_>],
    ) -> io::Result<()> {
        assert!(sources.len() == crate::words::LEAF_PAGES, "a block is written as a whole");
        let files = self.files_of(cut)?;
        let offset = leaf.gpa().0;
        let pages: Vec<(usize, PageSource<'_>)> = sources.iter().copied().enumerate().collect();
        self.write_pages(files.blocks.as_fd(), offset, leaf, &pages).inspect_err(|_| {
            let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            let punched = failure::point("publish.punch")
                .map_err(io::Error::from)
                .and_then(|()| Ok(rustix::fs::fallocate(&files.blocks, punch, offset, wide(LEAF_BYTES))?));
            if let Err(error) = punched {
                tracing::error!(%cut, %leaf, %error, "half a block cannot be punched");
            }
        })
    }

    /// Writes patch frames, one after the other from `first_frame`.
    pub(super) fn write_patches(
        &self,
        cut: CutId,
        leaf: LeafNumber,
        first_frame: u32,
        pages: &[(usize, PageSource<'_>)],
    ) -> io::Result<()> {
        let files = self.files_of(cut)?;
        self.write_pages(files.patches.as_fd(), u64::from(first_frame) * wide(PAGE_BYTES), leaf, pages)
    }

    fn write_pages(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        leaf: LeafNumber,
        pages: &[(usize, PageSource<'_>)],
    ) -> io::Result<()> {
        let side = self.side_mapping(leaf, pages)?;
        let pointer = |(position, source): &(usize, PageSource<'_>)| match source {
            PageSource::Window => {
                self.memory.address(index(leaf.gfn(*position).gpa().0)).as_ptr().cast_const()
            }
            PageSource::Copy(bytes) => bytes.as_ptr(),
            PageSource::Block(_) => {
                let side = side.as_ref().expect("a block among the sources has a side mapping");
                side.address(position * PAGE_BYTES).as_ptr().cast_const()
            }
            PageSource::Zero => ZEROS.as_ptr(),
        };
        let mut vectors: Vec<libc::iovec> = Vec::new();
        for page in pages {
            let start = pointer(page);
            match vectors.last_mut() {
                Some(last) if last.iov_base.cast_const().wrapping_byte_add(last.iov_len) == start.cast() => {
                    last.iov_len += PAGE_BYTES;
                }
                _ => vectors.push(libc::iovec { iov_base: start.cast_mut().cast(), iov_len: PAGE_BYTES }),
            }
        }
        let count = i32::try_from(vectors.len()).map_err(io::Error::other)?;
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        let _turn = self.turn.lock();
        failure::point("publish.write")?;
        // SAFETY: every vector covers whole pages of the window (lent, hence present, anonymous and
        // unchanging), of a copy, of the side mapping or of ZEROS, all alive until the call returns.
        let written = unsafe { libc::pwritev(file.as_raw_fd(), vectors.as_ptr(), count, offset) };
        let expected = pages.len() * PAGE_BYTES;
        match usize::try_from(written) {
            Err(_) => Err(io::Error::last_os_error()),
            Ok(written) if written < expected => Err(io::Error::new(
                io::ErrorKind::StorageFull,
                format!("only {written} of {expected} bytes were written: the arena is full"),
            )),
            Ok(_) => Ok(()),
        }
    }

    /// The block that some of the pages come from, mapped read-only beside the window: through the
    /// window it might trap.
    fn side_mapping(
        &self,
        leaf: LeafNumber,
        pages: &[(usize, PageSource<'_>)],
    ) -> io::Result<Option<Reservation>> {
        let block = pages.iter().find_map(|(_, source)| match source {
            PageSource::Block(cut) => Some(*cut),
            _ => None,
        });
        let Some(block) = block else { return Ok(None) };
        let file = self.files.open(&block.block_file())?;
        let side = Reservation::new(wide(LEAF_BYTES))?;
        side.map_file(0..wide(LEAF_BYTES), file.as_fd(), leaf.gpa().0)?;
        Ok(Some(side))
    }

    /// Maps a block, with patches over it, in one step.
    pub(super) fn place_block(
        &self,
        leaf: LeafNumber,
        block: Option<CutId>,
        patches: &[Patch],
    ) -> io::Result<()> {
        let place = self.leaf_span(leaf);
        if patches.is_empty() {
            return self.map_base(&self.memory, place, leaf, block);
        }
        let aside = Reservation::new(wide(LEAF_BYTES))?;
        self.map_base(&aside, 0..wide(LEAF_BYTES), leaf, block)?;
        for patch in patches {
            aside.write(patch.position * PAGE_BYTES, &self.read_patch(patch)?);
        }
        self.memory.move_in(place, aside)
    }

    /// Maps what lies under the patches of a leaf: a block, or fresh anonymous memory.
    fn map_base(
        &self,
        memory: &Reservation,
        place: Range<u64>,
        leaf: LeafNumber,
        block: Option<CutId>,
    ) -> io::Result<()> {
        match block {
            Some(cut) => {
                let file = self.files.open(&cut.block_file())?;
                memory.map_file(place, file.as_fd(), leaf.gpa().0)
            }
            None => memory.map_anonymous(place, self.is_huge),
        }
    }

    /// The bytes of a patch frame.
    pub(super) fn read_patch(&self, patch: &Patch) -> io::Result<[u8; PAGE_BYTES]> {
        let file = std::fs::File::from(self.files.open(&patch.cut.patch_file())?);
        let mut frame = [0; PAGE_BYTES];
        failure::point("publish.read_patch")?;
        file.read_exact_at(&mut frame, u64::from(patch.frame) * wide(PAGE_BYTES))?;
        Ok(frame)
    }
}
