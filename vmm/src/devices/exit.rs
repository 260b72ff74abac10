//! The exit port: a value that the guest writes there ends the VM and becomes its status.

use std::sync::OnceLock;

/// The port. The first value counts.
#[derive(Debug, Default)]
pub struct ExitPort {
    status: OnceLock<u32>,
}

impl ExitPort {
    /// A port that nothing was written to.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A guest's write of 1, 2 or 4 bytes, little-endian; other sizes are ignored.
    pub fn write(&self, from: &[u8]) {
        let value = match *from {
            [a] => u32::from(a),
            [a, b] => u32::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => return,
        };
        if self.status.set(value).is_err() {
            tracing::debug!(value, "a second exit status is ignored");
        }
    }

    /// The status, once the guest has written it.
    #[must_use]
    pub fn status(&self) -> Option<u32> {
        self.status.get().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_sensible_write_is_the_status() {
        let port = ExitPort::new();
        port.write(&[1, 2, 3]);
        port.write(&[]);
        assert_eq!(port.status(), None);
        port.write(&0x0102_0304_u32.to_le_bytes());
        port.write(&[9]);
        assert_eq!(port.status(), Some(0x0102_0304));
    }
}
