//! `--memory`: whether a VM can have that much.

use thiserror::Error;

use super::size;
use crate::keeper::available_memory_bytes;
use crate::words::{MemoryShape, MemoryShapeError};

/// What the built-in guest needs at least, in bytes.
pub(super) const BUILTIN_LEAST_BYTES: u64 = 16 << 20;

/// A size that no VM can have here.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// No VM can.
    #[error("{0}")]
    Shape(#[from] MemoryShapeError),
    /// The guest needs more than that.
    #[error("the built-in guest needs 16M of memory at least, --memory gives {0}")]
    TooSmall(String),
    /// The host has less.
    #[error("--memory {asked} is more than the {available} that this host has available: give less")]
    TooMuch {
        /// What was asked for.
        asked: String,
        /// What there is.
        available: String,
    },
}

/// The shape of a VM with `bytes` of memory, of which its guest needs `least`; and what the host has
/// available, in bytes.
///
/// # Errors
/// The size is not possible, too small for the guest, or more than the host has.
pub(super) fn check(bytes: u64, least: u64) -> Result<(MemoryShape, u64), MemoryError> {
    let shape = MemoryShape::new(bytes)?;
    if bytes < least {
        return Err(MemoryError::TooSmall(size::show(bytes)));
    }
    let available = available_memory_bytes().unwrap_or(u64::MAX);
    if bytes > available {
        let (asked, available) = (size::show(bytes), size::show(available));
        return Err(MemoryError::TooMuch { asked, available });
    }
    Ok((shape, available))
}
