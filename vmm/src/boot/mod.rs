//! Bringing a guest to its first instruction: image, tables and registers.
//!
//! [`load_image`] does it for other people's kernels (its memory map is in [`image`]); the rest is
//! about the built-in one.
//!
//! [`load_builtin`] writes salp's built-in guest and all that it needs to start directly in 64-bit
//! ring 3 into fresh (zero) memory, and returns an [`EntryState`] that tells each vCPU's registers.
//! The memory map is [`salp_protocol::layout`]; the loader's own part of it is below.
//!
//! | from | what |
//! |---|---|
//! | 0 | not mapped, so that a null pointer faults |
//! | 0x1000 | GDT |
//! | 0x2000 | IDT |
//! | 0x6000 | command line |
//! | 0x8000 | TSS of each vCPU with a bitmap that opens all ports, 12 KiB each |
//! | 0x20000 | ring-0 stack of each vCPU, 8 KiB each |
//! | 0x30000 | page tables |
//! | 1 MiB | the image (`layout::IMAGE`), up to `layout::STACKS` |
//!
//! Known holes: RAM of 64 GiB and 8 vCPUs at most; all of RAM can be written and executed by ring 3.

mod builtin;
mod entry;
mod image;
mod mptable;
mod paging;
mod pvh;
mod segment;
mod shape;

pub use builtin::{MAX_RAM_BYTES, MIN_RAM_BYTES, load_builtin};
pub use entry::EntryState;
pub use image::{ImageEntry, ImageError, MAX_COMMAND_LINE_BYTES, load_image};
pub use shape::ShapeError;

use salp_protocol::layout;
use vm_memory::GuestMemoryError;

/// Why a guest cannot be loaded. Nothing runs yet; memory may hold parts of the guest.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The caller gave the VM too little memory for the built-in guest.
    #[error("{ram_bytes} bytes of RAM are too few for the built-in guest, which needs {MIN_RAM_BYTES}")]
    RamTooSmall {
        /// Bytes of RAM.
        ram_bytes: u64,
    },
    /// The caller gave the VM more memory than the loader's page tables cover.
    #[error("{ram_bytes} bytes of RAM are too many for the built-in guest, which maps {MAX_RAM_BYTES}")]
    RamTooLarge {
        /// Bytes of RAM.
        ram_bytes: u64,
    },
    /// A memory region is not where the guest's memory map has RAM (in whole 2 MiB from 0 to the
    /// device hole, then from [`layout::HIGH_RAM`] without a gap).
    #[error(
        "RAM of {len_bytes} bytes at {start:#x} does not fit the memory map: expected at {expected:#x}, in \
         whole 2 MiB"
    )]
    RamMisplaced {
        /// First byte of the region.
        start: u64,
        /// Its bytes.
        len_bytes: u64,
        /// Where RAM must go on.
        expected: u64,
    },
    /// The command line does not fit its place.
    #[error("the command line has {len_bytes} bytes, {} is the most", layout::COMMAND_LINE_BYTES - 1)]
    CommandLineTooLong {
        /// Bytes without the NUL.
        len_bytes: usize,
    },
    /// The command line holds a NUL, which would end it.
    #[error("the command line holds a NUL at byte {at}")]
    CommandLineNul {
        /// Position of the NUL.
        at: usize,
    },
    /// The number of vCPUs is not from 1 to [`layout::MAX_VCPUS`].
    #[error("the built-in guest runs on 1 to {} vCPUs, not {vcpus}", layout::MAX_VCPUS)]
    VcpuCount {
        /// vCPUs asked for.
        vcpus: u8,
    },
    /// The image is not a loadable ELF file: a mistake of this build.
    #[error("the built-in guest's image cannot be loaded")]
    Image(#[source] linux_loader::loader::Error),
    /// The image leaves its place in the memory map: a mistake of this build.
    #[error("the built-in guest's image (entry {entry:#x}, end {end:#x}) leaves its place")]
    ImageMisplaced {
        /// Entry point.
        entry: u64,
        /// First byte behind the image.
        end: u64,
    },
    /// Guest memory cannot be written.
    #[error("the loader cannot write {what}")]
    Memory {
        /// What was to be written.
        what: &'static str,
        /// Why not.
        source: GuestMemoryError,
    },
}
