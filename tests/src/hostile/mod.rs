//! Hostile input: what a guest, an image file or a user's program can say, said by a fuzzer.
//!
//! Each target is an ordinary function of bytes, so that a fuzzer can drive it (`make fuzz`, see
//! `tests/fuzz`) and a test can run what a fuzzer has found (`tests/tests/hostile.rs`). It panics where a
//! property does not hold:
//! - no input makes salp panic, overflow, or go on for ever;
//! - nothing outside of the guest's memory is written: there is a canary on both sides of it.
//!
//! | target | what its bytes are |
//! |---|---|
//! | [`kernels`] | an image file: ELF, bzImage, PVH notes |
//! | [`rings`] | a program for the DMA engine: memory, descriptors, doorbells, buffers |
//! | [`accesses`] | accesses to ports and to addresses without memory |
//! | [`requests`] | requests at a colony's control socket |
//!
//! Known hole: the canary sees what was written outside, not what was read there.

mod accesses;
mod bytes;
mod kernels;
mod memory;
mod requests;
mod rings;

pub use accesses::accesses;
pub use kernels::kernels;
pub use requests::requests;
pub use rings::rings;

/// A function that a fuzzer drives.
pub type Target = fn(&[u8]);

/// All targets, by name: that is also the name of the fuzzer and of the directory of its corpus.
pub const TARGETS: [(&str, Target); 4] =
    [("kernels", kernels), ("rings", rings), ("accesses", accesses), ("requests", requests)];
