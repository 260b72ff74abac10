//! Patterns that tell every page, round and VM apart, and a generator of random numbers.

use crate::memory::{PAGE_WORDS, load, store};

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// One number out of two, so that near arguments give far results.
pub(crate) fn mix(a: u64, b: u64) -> u64 {
    let x = (a ^ b.rotate_left(32)).wrapping_add(GOLDEN).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let y = (x ^ (x >> 31)).wrapping_mul(0x94d0_49bb_1331_11eb).wrapping_add(b);
    y ^ (y >> 29)
}

/// Word `index` of the pattern `seed`.
pub(crate) fn word(seed: u64, index: u64) -> u64 {
    let x = (seed ^ index).wrapping_mul(GOLDEN);
    x ^ (x >> 32)
}

/// Fills the first `words` words at `address` with the pattern `seed`.
pub(crate) fn fill(address: u64, words: u64, seed: u64) {
    for i in 0..words {
        store(address + 8 * i, word(seed, i));
    }
}

/// A word that is not what it must be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mismatch {
    pub(crate) address: u64,
    pub(crate) expected: u64,
    pub(crate) found: u64,
}

/// Compares the first `words` words at `address` with the pattern `seed`.
pub(crate) fn check(address: u64, words: u64, seed: u64) -> Result<(), Mismatch> {
    check_bytes(address, 8 * words, seed)
}

/// Compares `bytes` bytes at `address` (a multiple of 8) with the pattern `seed`.
pub(crate) fn check_bytes(address: u64, bytes: u64, seed: u64) -> Result<(), Mismatch> {
    for i in 0..bytes.div_ceil(8) {
        let kept = bytes - 8 * i;
        let mask = if kept >= 8 { u64::MAX } else { (1 << (8 * kept)) - 1 };
        let (expected, found) = (word(seed, i) & mask, load(address + 8 * i) & mask);
        if found != expected {
            return Err(Mismatch { address: address + 8 * i, expected, found });
        }
    }
    Ok(())
}

/// The checksum of a page's bytes; depends on their order and on `seed`.
pub(crate) fn checksum(address: u64, seed: u64) -> u64 {
    (0..PAGE_WORDS).fold(seed, |sum, i| (sum.rotate_left(5) ^ load(address + 8 * i)).wrapping_mul(GOLDEN))
}

/// xorshift64*: random enough to choose pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(mix(seed, GOLDEN) | 1)
    }

    /// The next number.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// The next number below `bound`, which is above 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound
    }
}
