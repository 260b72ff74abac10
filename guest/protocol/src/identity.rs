//! The identity device: how a VM learns who it is, and that it is somebody else now.
//!
//! # Registers
//! One page of MMIO at [`layout::IDENTITY_REGISTERS`](crate::layout::IDENTITY_REGISTERS), little-endian.
//! It can be read like memory: 1, 2, 4 or 8 bytes at any offset; what has no meaning is 0. Two registers
//! can be written, by 4 or 8 bytes at their offset; every other write is ignored.
//!
//! # Protocol
//! A clone, and a VM that is reset, has a new [`GENERATION`](register::GENERATION) and a new
//! [`SEED`](register::SEED) from its first instruction on, and the interrupt, where it is enabled, is
//! pending before that instruction. Whoever must not do twice what the source does too (draw random
//! numbers, send under its name) reseeds in the handler, or compares the generation with the last one
//! known. The source of a fork stays who it is. When the guest has come to terms with what it is it
//! writes the generation to [`READY`](register::READY): whoever forked it may be waiting for that. A write
//! begun before the cut carries the source's generation, and counts for nothing in the clone.
//!
//! No register changes while a VM runs but by its own writes: what is read in several pieces fits together
//! if the generation is the same before and after.

/// Offsets in the page.
pub mod register {
    /// Reads [`MAGIC`](super::MAGIC), 8 bytes.
    pub const MAGIC: u64 = 0x00;
    /// How often the VM's line of ancestors was cloned, and it was reset, 8 bytes: 0 in a colony's first
    /// VM. It grows whenever the VM becomes another one.
    pub const GENERATION: u64 = 0x08;
    /// Which clone of its fork this is, 8 bytes. 0 in a colony's first VM.
    pub const INDEX: u64 = 0x10;
    /// Length of the name in bytes, 8 bytes.
    pub const NAME_LENGTH: u64 = 0x18;
    /// Length of the data in bytes, 8 bytes.
    pub const DATA_LENGTH: u64 = 0x20;
    /// The interrupt, 8 bytes: the vector in bits 0 to 7, bit 8 enables it. The vector counts where
    /// [`INTERRUPT_PIN`] reads 0. A clone keeps it as it is at the cut; 0 at first.
    pub const INTERRUPT: u64 = 0x28;
    /// The pin of the I/O APIC that the interrupt is an edge on, 8 bytes; 0: there is none, the vector is
    /// sent to vCPU 0 by a message (MSI).
    pub const INTERRUPT_PIN: u64 = 0x30;
    /// Write the generation here to say that the guest knows it. Reads the last one that was taken,
    /// and before that all ones, 8 bytes.
    pub const READY: u64 = 0x38;
    /// [`SEED_BYTES`](super::SEED_BYTES) random bytes, other ones in each clone and after each reset.
    pub const SEED: u64 = 0x40;
    /// The name in UTF-8, followed by zeros.
    pub const NAME: u64 = 0x80;
    /// The data: for each pair its key, `=`, its value and a NUL, as in a program's environment.
    pub const DATA: u64 = 0x400;
}

/// What [`register::MAGIC`] reads: "salp-id1". Its last byte is the version.
pub const MAGIC: u64 = u64::from_le_bytes(*b"salp-id1");
/// Bytes of the seed.
pub const SEED_BYTES: usize = 32;
/// The longest name, in bytes.
pub const NAME_BYTES: usize = 128;
/// The most data, in bytes, separators included.
pub const DATA_BYTES: usize = 3072;
/// The bit of [`register::INTERRUPT`] that enables it.
pub const INTERRUPT_ENABLE: u64 = 1 << 8;

const _: () = {
    assert!(register::SEED + SEED_BYTES as u64 <= register::NAME);
    assert!(register::NAME + NAME_BYTES as u64 <= register::DATA);
    assert!(register::DATA + DATA_BYTES as u64 == 4096);
};
