//! The user's terminal: raw while a guest has it, as it was when that is over; and what is typed.
//!
//! Raw means that every key goes to the guest, Ctrl-C too; only [`LEAVE_KEY`] is kept. Output is still
//! processed, so that a guest's newline begins a line. A terminal is made raw only if standard input and
//! output are both that, and this process is in its foreground: in the background, reading or changing it
//! would stop the process, and with a keeper its VMs.
//!
//! # Known hole
//! After SIGKILL the terminal stays raw (`reset` mends it), and the leave key cannot be sent to a guest.

use std::io::{self, IsTerminal as _};
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;
use rustix::stdio::{stdin, stdout};
use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcgetpgrp, tcsetattr};

/// Ctrl-]: leaves the guest's console.
pub const LEAVE_KEY: u8 = 0x1d;
/// The leave key for people.
pub const LEAVE_KEY_NAME: &str = "Ctrl-]";
/// Read at once.
const CHUNK_BYTES: usize = 4096;

/// What the terminal was like, while it is raw.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Where input comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A terminal, which is raw now.
    Raw,
    /// A file or pipe.
    Plain,
    /// A terminal that is not to be touched: nothing is read.
    Nobody,
}

/// Makes the terminal raw where it is one, until it is dropped or [`restore`] is called.
#[derive(Debug)]
pub struct Input {
    /// Where it comes from.
    pub source: Source,
}

impl Input {
    /// Looks what standard input is.
    ///
    /// # Errors
    /// The terminal refused.
    pub fn open() -> io::Result<Self> {
        if !io::stdin().is_terminal() {
            return Ok(Self { source: Source::Plain });
        }
        let is_ours = tcgetpgrp(stdin()).is_ok_and(|group| group == rustix::process::getpgrp());
        if !is_ours || !stdout().is_terminal() {
            return Ok(Self { source: Source::Nobody });
        }
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        raw.output_modes |= OutputModes::OPOST;
        // Before the change: from here on whatever ends this process finds what to set.
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        Ok(Self { source: Source::Raw })
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        restore();
    }
}

/// Makes the terminal what it was. Does nothing where that is done already.
pub fn restore() {
    let saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take();
    // A terminal that hung up needs nothing.
    if let Some(Err(error)) = saved.map(|before| tcsetattr(stdin(), OptionalActions::Now, &before)) {
        tracing::debug!(%error, "the terminal stays raw");
    }
}

/// Why no more input comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// The leave key.
    Left,
    /// The end of the input, or whoever got it wants no more.
    Ended,
}

/// Reads standard input and gives it to `send`, which says whether to go on, until it is over.
///
/// # Errors
/// Standard input cannot be read.
pub fn pump(source: Source, mut send: impl FnMut(&[u8]) -> bool) -> io::Result<Over> {
    if source == Source::Nobody {
        return Ok(Over::Ended);
    }
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let count = match rustix::io::read(stdin(), &mut chunk) {
            Err(Errno::INTR) => continue,
            // The terminal has hung up.
            Err(Errno::IO) => return Ok(Over::Ended),
            count => count?,
        };
        let read = &chunk[..count];
        let (typed, is_left) = until_leave_key(source, read);
        if !typed.is_empty() && !send(typed) && !is_left {
            return Ok(Over::Ended);
        }
        if is_left {
            return Ok(Over::Left);
        }
        if count == 0 {
            return Ok(Over::Ended);
        }
    }
}

/// Gives `give` all of `typed`, which says how much it takes each time. What a terminal's guest has no
/// room for is lost, as on a line: else nobody would see the leave key.
///
/// # Errors
/// What `give` says.
pub fn deliver<E>(
    source: Source,
    typed: &[u8],
    mut give: impl FnMut(&[u8]) -> Result<usize, E>,
) -> Result<(), E> {
    let mut rest = typed;
    while !rest.is_empty() {
        let taken = give(rest)?;
        if taken == 0 && source == Source::Raw {
            break;
        }
        rest = rest.get(taken..).unwrap_or_default();
    }
    Ok(())
}

/// What goes to the guest, and whether the user leaves.
fn until_leave_key(source: Source, read: &[u8]) -> (&[u8], bool) {
    match read.iter().position(|&byte| byte == LEAVE_KEY) {
        Some(at) if source == Source::Raw => (&read[..at], true),
        _ => (read, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_leave_key_is_one_only_at_a_terminal() {
        assert_eq!(until_leave_key(Source::Raw, b"ab\x1dc"), (&b"ab"[..], true));
        assert_eq!(until_leave_key(Source::Raw, b"\x03\x04"), (&b"\x03\x04"[..], false));
        assert_eq!(until_leave_key(Source::Plain, b"ab\x1dc"), (&b"ab\x1dc"[..], false));
    }
}
