//! Guest memory as the devices see it: a space behind [`GuestRam`].
#![expect(unsafe_code, reason = "vouches to the devices for pinned host ranges")]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::devices::{Access, GuestRam, PinnedRange, RamError};
use crate::space::{self, Space, SpaceError};
use crate::window::Window;
use crate::words::{Gfn, Gpa, HostAddress, LEAF_BYTES, LeafNumber, PAGE_BYTES, wide};

/// See the module.
pub struct SpaceRam(pub Arc<Space<Window>>);

/// Pinned pages of a space; unpinned when dropped.
struct SpacePin {
    space: Arc<Space<Window>>,
    first: Gfn,
    pages: u64,
    host: HostAddress,
    len_bytes: usize,
}

// SAFETY: the space keeps a pinned page where it is, mapped readable and writable, until it is
// unpinned, which `drop` does; and the `Arc` keeps the window.
unsafe impl PinnedRange for SpacePin {
    fn host(&self) -> (HostAddress, usize) {
        (self.host, self.len_bytes)
    }
}

impl Drop for SpacePin {
    fn drop(&mut self) {
        if let Err(error) = self.space.unpin(self.first, self.pages) {
            tracing::error!(%error, "a pin was counted wrongly");
        }
    }
}

impl SpaceRam {
    fn check(&self, gpa: Gpa, len_bytes: usize) -> Result<(), RamError> {
        if self.0.shape().contains(gpa, len_bytes) {
            return Ok(());
        }
        let is_memory = |gfn: &Gfn| self.0.shape().contains(gfn.gpa(), PAGE_BYTES);
        let gfn = (gpa.gfn().0..).map(Gfn).find(|gfn| !is_memory(gfn)).unwrap_or(gpa.gfn());
        Err(RamError::OutOfRange { gpa, len_bytes, gfn })
    }
}

fn lost(error: SpaceError) -> RamError {
    let gfn = match error {
        SpaceError::Lost { gfn } => gfn,
        _ => Gfn(0),
    };
    RamError::Host { gfn, reason: error.to_string() }
}

fn pages_of(gpa: Gpa, len_bytes: usize) -> (Gfn, u64) {
    let last = Gpa(gpa.0 + wide(len_bytes.max(1)) - 1).gfn();
    (gpa.gfn(), last.0 - gpa.gfn().0 + 1)
}

impl GuestRam for SpaceRam {
    fn pin(&self, gpa: Gpa, len_bytes: usize, access: Access) -> Result<Box<dyn PinnedRange>, RamError> {
        self.check(gpa, len_bytes)?;
        let (first, pages) = pages_of(gpa, len_bytes);
        let access = match access {
            Access::Read => space::Access::Read,
            Access::ReadWrite => space::Access::ReadWrite,
        };
        self.0.pin(first, pages, access).map_err(|error| match error {
            SpaceError::NotMemory { gfn } => RamError::OutOfRange { gpa, len_bytes, gfn },
            other => RamError::Host { gfn: first, reason: other.to_string() },
        })?;
        let host = self.0.host().host_address(gpa);
        Ok(Box::new(SpacePin { space: Arc::clone(&self.0), first, pages, host, len_bytes }))
    }

    fn read(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), RamError> {
        self.check(gpa, into.len())?;
        self.0.host().read(gpa, into).map_err(lost)
    }

    fn write(&self, gpa: Gpa, from: &[u8]) -> Result<(), RamError> {
        self.check(gpa, from.len())?;
        self.0.host().write(gpa, from).map_err(lost)
    }

    fn store_u32(&self, gpa: Gpa, value: u32) -> Result<(), RamError> {
        self.check(gpa, 4)?;
        let misaligned = || RamError::Host { gfn: gpa.gfn(), reason: format!("{gpa} is no multiple of 4") };
        // A lost page must not be found by the store: it has no way to fail.
        self.0.host().read(gpa, &mut [0; 4]).map_err(lost)?;
        // Pairs with the guest's load of the status: what was written before is visible then.
        self.0.host().word(gpa).ok_or_else(misaligned)?.store(value, Ordering::Release);
        Ok(())
    }
}

/// The RAM of a space for the loader, which wants a memory of vm-memory's.
///
/// # Errors
/// The regions do not fit together.
pub fn boot_memory(space: &Arc<Space<Window>>) -> std::io::Result<GuestMemoryMmap> {
    let region = |(first, count): (LeafNumber, u32)| {
        let host = space.host().host_address(first.gpa()).as_ptr();
        let len_bytes = count as usize * LEAF_BYTES;
        // SAFETY: the window maps this range readable and writable as long as the space lives, which
        // outlives the loader; nothing in Rust refers to it but by raw copies.
        let mapping = unsafe {
            MmapRegion::build_raw(
                host,
                len_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            )
        };
        let mapping = mapping.map_err(std::io::Error::other)?;
        GuestRegionMmap::new(mapping, GuestAddress(first.gpa().0))
            .ok_or_else(|| std::io::Error::other("a region of memory wraps around"))
    };
    let regions = space.shape().regions().into_iter().map(region).collect::<Result<Vec<_>, _>>()?;
    GuestMemoryMmap::from_regions(regions).map_err(std::io::Error::other)
}
