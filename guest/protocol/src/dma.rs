//! The DMA engine: a device that moves data between guest memory and a backing, asynchronously.
//!
//! # Registers
//! 8 bytes each, little-endian, in one page of MMIO at
//! [`layout::DMA_REGISTERS`](crate::layout::DMA_REGISTERS); accesses of 4 or 8 bytes.
//!
//! # Ring
//! [`Descriptor`]s in guest memory, [`RING_ENTRIES`](register::RING_ENTRIES) of them. The guest
//! fills entry `tail % entries`, then writes the new `tail` (a free-running count) to
//! [`DOORBELL`](register::DOORBELL). The engine takes up to that tail, works on several at once and
//! may complete them in any order. A completion is: the data is in place, then `result` and
//! `status` are stored in the descriptor (`status` last, with release order), then
//! [`COMPLETED`](register::COMPLETED) grows by one, then, if asked for, the interrupt. A guest must
//! not reuse an entry whose status is [`status::PENDING`].

/// Offsets of the registers.
pub mod register {
    /// Reads [`MAGIC`](super::MAGIC).
    pub const IDENTITY: u64 = 0x00;
    /// Guest-physical address of the ring, a multiple of 64. May be written while the engine is idle.
    pub const RING_BASE: u64 = 0x08;
    /// Entries in the ring: a power of two, 1 to 1,024. Writing it (also) resets tail and completed
    /// counts to 0.
    pub const RING_ENTRIES: u64 = 0x10;
    /// Write: the new tail. Read: the last one written.
    pub const DOORBELL: u64 = 0x18;
    /// How many descriptors have been completed since the ring was set. Read-only.
    pub const COMPLETED: u64 = 0x20;
    /// The interrupt: vector in bits 0 to 7, bit 8 enables it. 0 after reset.
    pub const INTERRUPT: u64 = 0x28;
    /// Transfers take at least this many microseconds each. 0 after reset, 10,000,000 at most.
    pub const DELAY_US: u64 = 0x30;
    /// Transfers move at most this many bytes per second, each; 0 = no limit.
    pub const RATE: u64 = 0x38;
    /// Address of a buffer to register (a multiple of 4096).
    pub const BUFFER_BASE: u64 = 0x40;
    /// Length of the buffer to register, in bytes (a multiple of 4096, 16 MiB at most).
    pub const BUFFER_LENGTH: u64 = 0x48;
    /// Write `slot` (0 to 15): register the buffer, pinned until unregistered.
    pub const BUFFER_REGISTER: u64 = 0x50;
    /// Write `slot`: unregister it once its transfers are over.
    pub const BUFFER_UNREGISTER: u64 = 0x58;
    /// The last error of a register write, an [`error`](super::error); reading clears it.
    pub const ERROR: u64 = 0x60;
    /// Size of the backing, in bytes. Read-only.
    pub const BACKING_BYTES: u64 = 0x68;
}

/// What [`register::IDENTITY`] reads: "salpdma1".
pub const MAGIC: u64 = u64::from_le_bytes(*b"salpdma1");

/// Slots for registered buffers.
pub const BUFFER_SLOTS: usize = 16;

/// The longest transfer of one descriptor, in bytes.
pub const MAX_TRANSFER_BYTES: u32 = 1 << 20;

/// One request in the ring. 64 bytes, aligned to 64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Descriptor {
    /// An [`operation`].
    pub operation: u16,
    /// [`flag`]s.
    pub flags: u16,
    /// Bytes to move: 1 to [`MAX_TRANSFER_BYTES`].
    pub length: u32,
    /// Source: an offset in the backing for [`operation::READ`], else a guest-physical address.
    pub source: u64,
    /// Destination: an offset in the backing for [`operation::WRITE`], else a guest-physical address.
    pub destination: u64,
    /// With [`flag::REGISTERED`]: the slot that holds the guest side of the transfer.
    pub slot: u32,
    /// Reserved, 0.
    pub reserved: u32,
    /// Anything; the engine leaves it alone.
    pub cookie: u64,
    /// Bytes moved, written by the engine before `status`.
    pub result: u32,
    /// A [`status`]; the guest writes [`status::PENDING`] before the doorbell.
    pub status: u32,
    /// Reserved, 0.
    pub padding: [u64; 2],
}

const _: () = assert!(size_of::<Descriptor>() == 64 && align_of::<Descriptor>() == 64);

/// What a descriptor asks for.
pub mod operation {
    /// Backing to guest memory.
    pub const READ: u16 = 1;
    /// Guest memory to backing.
    pub const WRITE: u16 = 2;
    /// Guest memory to guest memory.
    pub const COPY: u16 = 3;
}

/// Flags of a descriptor.
pub mod flag {
    /// Raise the interrupt at completion.
    pub const INTERRUPT: u16 = 1;
    /// The guest side lies inside the registered buffer [`slot`](super::Descriptor::slot).
    pub const REGISTERED: u16 = 2;
    /// The host kernel does the transfer (io_uring, with registered buffers) instead of the
    /// engine's own thread. Not for COPY.
    pub const KERNEL: u16 = 4;
}

/// The state of a descriptor.
pub mod status {
    /// Not completed.
    pub const PENDING: u32 = 0;
    /// Done: all bytes are in place.
    pub const OK: u32 = 1;
    /// The descriptor makes no sense (operation, length, slot, flags).
    pub const INVALID: u32 = 2;
    /// An address is outside guest memory or the backing.
    pub const OUT_OF_RANGE: u32 = 3;
    /// The backing or the host failed.
    pub const FAILED: u32 = 4;
    /// The transfer could not be done again after a fork (it was on a pipe).
    pub const LOST_AT_FORK: u32 = 5;
}

/// Errors of register writes.
pub mod error {
    /// None.
    pub const NONE: u64 = 0;
    /// The value is not allowed for that register.
    pub const VALUE: u64 = 1;
    /// The buffer cannot be pinned.
    pub const PIN: u64 = 2;
    /// The slot is taken, or free, or out of range.
    pub const SLOT: u64 = 3;
    /// The engine is not idle.
    pub const BUSY: u64 = 4;
}
