//! The driver of the identity device ([`salp_protocol::identity`]): its registers, and who this VM is
//! ([`Known`]).
#![expect(unsafe_code, reason = "device registers are memory-mapped")]

use core::arch::asm;
use core::fmt;

use salp_protocol::identity::{DATA_BYTES, MAGIC, NAME_BYTES, SEED_BYTES, register};
use salp_protocol::layout;

/// Reads 8 bytes at `offset` of the device's page.
pub(crate) fn read(offset: u64) -> u64 {
    let value;
    // SAFETY: the loader maps the device's page at its own address; nothing of Rust is there.
    unsafe {
        asm!("mov {}, [{}]", out(reg) value,
            in(reg) layout::IDENTITY_REGISTERS.wrapping_add(offset), options(nostack));
    }
    value
}

/// Writes the register at `offset`.
pub(crate) fn write(offset: u64, value: u64) {
    // SAFETY: as for `read`.
    unsafe {
        asm!("mov [{}], {}", in(reg) layout::IDENTITY_REGISTERS.wrapping_add(offset), in(reg) value,
            options(nostack));
    }
}

/// Reads `bytes.len()` bytes at `offset`, both multiples of 8.
fn read_bytes(offset: u64, bytes: &mut [u8]) {
    for (at, chunk) in (offset..).step_by(8).zip(bytes.chunks_exact_mut(8)) {
        chunk.copy_from_slice(&read(at).to_le_bytes());
    }
}

/// Who this VM was when it last looked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    /// The device's generation.
    pub(crate) generation: u64,
    /// Its seed.
    pub(crate) seed: [u8; SEED_BYTES],
}

impl Known {
    /// Looks, all in one generation.
    pub(crate) fn now() -> Self {
        loop {
            let generation = read(register::GENERATION);
            let mut seed = [0; SEED_BYTES];
            read_bytes(register::SEED, &mut seed);
            if read(register::GENERATION) == generation {
                return Self { generation, seed };
            }
        }
    }

    /// Whether there is a device.
    pub(crate) fn is_there() -> bool {
        read(register::MAGIC) == MAGIC
    }

    /// A figure that tells seeds apart and does not tell the seed (FNV-1a).
    pub(crate) fn digest(&self) -> u64 {
        self.seed.iter().fold(0xcbf2_9ce4_8422_2325, |digest, byte| {
            (digest ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
    }

    /// Tells whoever waits for it that this VM knows who it is.
    pub(crate) fn say_ready(&self) {
        write(register::READY, self.generation);
    }
}

impl fmt::Display for Known {
    /// `a-1: clone 0, generation 1, seed 0x0123456789abcdef, data key=value other=value`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut name, mut data) = ([0; NAME_BYTES], [0; DATA_BYTES]);
        let read_text = |offset, bytes: &mut [u8], length| {
            let length = (length as usize).min(bytes.len());
            read_bytes(offset, &mut bytes[..length.next_multiple_of(8)]);
            length
        };
        let name_length = read_text(register::NAME, &mut name, read(register::NAME_LENGTH));
        let data_length = read_text(register::DATA, &mut data, read(register::DATA_LENGTH));
        let name = str::from_utf8(&name[..name_length]).unwrap_or("?");
        let data = str::from_utf8(&data[..data_length]).unwrap_or("?");
        let index = read(register::INDEX);
        write!(
            f,
            "{name}: clone {index}, generation {}, seed {:#018x}, data",
            self.generation,
            self.digest()
        )?;
        data.split_terminator('\0').try_for_each(|pair| write!(f, " {pair}"))
    }
}
