//! Transfers between memory and a backing: where a read's bytes were when it began, where a write's
//! bytes wait for their commit.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::{BLOCK, BLOCK_BYTES, Backing, BackingError};
use crate::devices::lock;
use crate::devices::memory::Span;
use crate::words::{index, wide};

/// Where some bytes of a transfer are.
#[derive(Clone, Debug)]
pub(in crate::devices) struct Segment {
    /// File and offset, or `None` for zeros.
    pub(in crate::devices) place: Option<(Arc<File>, u64)>,
    /// First byte, counted from the transfer's first.
    pub(in crate::devices) at: usize,
    /// Length.
    pub(in crate::devices) len_bytes: usize,
}

/// A read: where its bytes were when it began. They stay there until this is dropped.
pub(in crate::devices) struct ReadPlan {
    pub(super) backing: Arc<Backing>,
    pub(super) segments: Vec<Segment>,
    pub(super) extents: Vec<u32>,
}

/// A write: the extents that take its bytes. Dropped without a commit, it never happened. The owner
/// drops it only when nothing writes to the extents any more.
pub(in crate::devices) struct WritePlan {
    pub(super) backing: Arc<Backing>,
    pub(super) offset: u64,
    pub(super) len_bytes: usize,
    pub(super) segments: Vec<Segment>,
    pub(super) extents: Vec<u32>,
}

impl ReadPlan {
    /// Where the bytes are, in order.
    pub(in crate::devices) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Moves `[from, to)` of the transfer into `span`.
    pub(in crate::devices) fn transfer(&self, span: &Span, from: usize, to: usize) -> io::Result<()> {
        for (segment, at, len_bytes) in within(&self.segments, from, to) {
            match &segment.place {
                Some((file, offset)) => {
                    span.read_file(at, len_bytes, file, offset + wide(at - segment.at))?;
                }
                None => span.zero(at, len_bytes),
            }
        }
        Ok(())
    }
}

impl Drop for ReadPlan {
    fn drop(&mut self) {
        let mut inner = lock(&self.backing.inner);
        for extent in &self.extents {
            inner.own.end_read(*extent);
        }
    }
}

impl WritePlan {
    /// Where the bytes go, in order.
    pub(in crate::devices) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Moves `[from, to)` of the transfer out of `span`, to where no map looks yet.
    pub(in crate::devices) fn transfer(&self, span: &Span, from: usize, to: usize) -> io::Result<()> {
        for (segment, at, len_bytes) in within(&self.segments, from, to) {
            if let Some((file, offset)) = &segment.place {
                span.write_file(at, len_bytes, file, offset + wide(at - segment.at))?;
            }
        }
        Ok(())
    }

    /// Makes the write part of the backing; all bytes have been moved. To be called inside the
    /// gate. On an error nothing has changed.
    pub(in crate::devices) fn commit(mut self) -> Result<(), BackingError> {
        let backing = Arc::clone(&self.backing);
        let mut inner = lock(&backing.inner);
        let file = backing.own_file(&mut inner)?;
        let own = inner.own.layer.ok_or(BackingError::Full)?;
        let parts: Vec<Part> = parts(self.offset, self.len_bytes).collect();
        for (part, extent) in parts.iter().zip(&self.extents) {
            if part.len_bytes < BLOCK_BYTES {
                let old = backing.read_block(&inner, part.block)?;
                let (start, end) = (part.start, part.start + part.len_bytes);
                let first = u64::from(*extent) * BLOCK;
                file.write_all_at(&old[..start], first)?;
                file.write_all_at(&old[end..], first + wide(end))?;
            }
        }
        for (part, extent) in parts.iter().zip(std::mem::take(&mut self.extents)) {
            inner.remap(part.block, own, extent);
        }
        Ok(())
    }
}

impl Drop for WritePlan {
    fn drop(&mut self) {
        if !self.extents.is_empty() {
            lock(&self.backing.inner).own.free.extend(&self.extents);
        }
    }
}

/// The part of a transfer that lies in one block.
pub(super) struct Part {
    pub(super) block: u64,
    /// First byte, in the block.
    pub(super) start: usize,
    /// First byte, in the transfer.
    pub(super) at: usize,
    pub(super) len_bytes: usize,
}

/// Cuts a transfer at the borders of blocks.
pub(super) fn parts(offset: u64, len_bytes: usize) -> impl Iterator<Item = Part> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let position = offset + wide(at);
        let start = index(position % BLOCK);
        let part =
            Part { block: position / BLOCK, start, at, len_bytes: (BLOCK_BYTES - start).min(len_bytes - at) };
        at += part.len_bytes;
        (part.len_bytes > 0).then_some(part)
    })
}

/// Adds a segment, joined to the last one where it goes on there.
pub(super) fn push_joined(segments: &mut Vec<Segment>, segment: Segment) {
    if let Some(last) = segments.last_mut() {
        let joins = match (&last.place, &segment.place) {
            (None, None) => true,
            (Some((a, from)), Some((b, to))) => Arc::ptr_eq(a, b) && from + wide(last.len_bytes) == *to,
            _ => false,
        };
        if joins {
            last.len_bytes += segment.len_bytes;
            return;
        }
    }
    segments.push(segment);
}

/// The segments that overlap `[from, to)`, with the overlap's first byte and length.
fn within(segments: &[Segment], from: usize, to: usize) -> impl Iterator<Item = (&Segment, usize, usize)> {
    segments.iter().filter_map(move |segment| {
        let start = segment.at.max(from);
        let end = (segment.at + segment.len_bytes).min(to);
        (start < end).then(|| (segment, start, end - start))
    })
}
