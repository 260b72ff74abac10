//! The user's terminal: each key by itself while a guest has it, as it was when that is over; and what is
//! typed.
//!
//! | manner | keys | Ctrl-C |
//! |---|---|---|
//! | [`Manner::Raw`] | go to the guest, but for [`LEAVE_KEY`] | a key as others are |
//! | [`Manner::Watched`] | are for nobody, but for [`LEAVE_KEY`] | SIGINT; Ctrl-Z does nothing |
//!
//! Output is processed in both, so that a guest's newline begins a line. A terminal is changed only if
//! standard input and output are both that, and this process is in its foreground: in the background,
//! reading or changing it would stop the process.
//!
//! # Known hole
//! After SIGKILL the terminal stays as it is (`reset` mends it), and the leave key cannot be sent to a
//! guest.

use std::io::{self, IsTerminal as _};
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;
use rustix::stdio::{stdin, stdout};
use rustix::termios::{
    LocalModes, OptionalActions, OutputModes, SpecialCodeIndex, Termios, tcgetattr, tcgetpgrp, tcsetattr,
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

/// Ctrl-]: leaves the guest's console; the guest goes on.
pub const LEAVE_KEY: u8 = 0x1d;
/// The leave key for people.
pub const LEAVE_KEY_NAME: &str = "Ctrl-]";
/// The signals with which a user or a terminal ends what runs there.
pub const ENDING_SIGNALS: [i32; 4] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT];
/// Read at once.
const CHUNK_BYTES: usize = 4096;

/// What the terminal was like, while a guest has it.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// What keys do; see the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// All go to the guest.
    Raw,
    /// The terminal's signals stay what they are; the guest gets nothing.
    Watched,
}

/// Where input comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A terminal that was taken.
    Terminal,
    /// A file or pipe.
    Plain,
    /// A terminal that is not to be touched: nothing is read.
    Nobody,
}

/// The terminal, if it was taken: it is given back when this is dropped or [`restore`] is called.
#[derive(Debug)]
pub struct Input {
    /// Where it comes from.
    pub source: Source,
}

impl Input {
    /// Looks what standard input is, and takes it where it is a terminal that may be taken.
    ///
    /// # Errors
    /// The terminal refused.
    pub fn open(manner: Manner) -> io::Result<Self> {
        let source = match () {
            () if !io::stdin().is_terminal() => Source::Plain,
            () if take(manner)? => Source::Terminal,
            () => Source::Nobody,
        };
        Ok(Self { source })
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        restore();
    }
}

/// Whether standard input and output are a terminal that this process may change.
#[must_use]
pub fn is_ours() -> bool {
    let is_in_front = || tcgetpgrp(stdin()).is_ok_and(|group| group == rustix::process::getpgrp());
    io::stdin().is_terminal() && stdout().is_terminal() && is_in_front()
}

/// Makes the terminal give each key by itself from now on. Returns whether it is this process's.
///
/// # Errors
/// The terminal refused.
pub fn take(manner: Manner) -> io::Result<bool> {
    if !is_ours() {
        return Ok(false);
    }
    let mut saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
    let before = saved.take().map_or_else(|| tcgetattr(stdin()), Ok)?;
    let mut now = before.clone();
    match manner {
        Manner::Raw => {
            now.make_raw();
            now.output_modes |= OutputModes::OPOST;
        }
        Manner::Watched => {
            now.local_modes -= LocalModes::ICANON | LocalModes::ECHO;
            now.special_codes[SpecialCodeIndex::VMIN] = 1;
            now.special_codes[SpecialCodeIndex::VTIME] = 0;
            // Off: whoever wants the terminal back leaves.
            now.special_codes[SpecialCodeIndex::VSUSP] = 0;
        }
    }
    // Before the change: from here on whatever ends this process finds what to set.
    *saved = Some(before);
    tcsetattr(stdin(), OptionalActions::Now, &now)?;
    Ok(true)
}

/// Makes the terminal what it was. Does nothing where that is done already.
pub fn restore() {
    let saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take();
    // A terminal that hung up needs nothing.
    if let Some(Err(error)) = saved.map(|before| tcsetattr(stdin(), OptionalActions::Now, &before)) {
        tracing::debug!(%error, "the terminal stays as the guest had it");
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
        if taken == 0 && source == Source::Terminal {
            break;
        }
        rest = rest.get(taken..).unwrap_or_default();
    }
    Ok(())
}

/// What goes to the guest, and whether the user leaves.
fn until_leave_key(source: Source, read: &[u8]) -> (&[u8], bool) {
    match read.iter().position(|&byte| byte == LEAVE_KEY) {
        Some(at) if source == Source::Terminal => (&read[..at], true),
        _ => (read, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_leave_key_is_one_only_at_a_terminal() {
        assert_eq!(until_leave_key(Source::Terminal, b"ab\x1dc"), (&b"ab"[..], true));
        assert_eq!(until_leave_key(Source::Terminal, b"\x03\x04"), (&b"\x03\x04"[..], false));
        assert_eq!(until_leave_key(Source::Plain, b"ab\x1dc"), (&b"ab\x1dc"[..], false));
    }
}
