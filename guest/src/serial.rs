//! Text to the first serial port, a byte at a time: for what went wrong, since each byte is an exit.
#![expect(unsafe_code, reason = "port output is an instruction")]

use core::arch::asm;
use core::fmt::{self, Write};

use salp_protocol::port;

struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // SAFETY: a byte to the transmit register; the 16550 of salp is always ready.
            unsafe { asm!("out dx, al", in("dx") port::SERIAL, in("al") byte, options(nomem, nostack)) }
        }
        Ok(())
    }
}

/// Writes one line.
pub(crate) fn print(text: fmt::Arguments<'_>) {
    // The port cannot fail, and there is nowhere to report a failing formatter to.
    let _ = writeln!(Serial, "{text}");
}
