//! What commands print: results on standard output, remarks on standard error.
//!
//! Colours are for terminals alone, and not where `NO_COLOR` is set (or `TERM` is `dumb`); whoever stops
//! reading has seen enough, which is no error.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write as _};

use anstyle::{AnsiColor, Style};
use serde::Serialize;

/// What is as it should be.
pub(super) const GOOD: Style = AnsiColor::Green.on_default();
/// What could be better.
pub(super) const FAIR: Style = AnsiColor::Yellow.on_default();
/// What is wrong.
pub(super) const BAD: Style = AnsiColor::Red.on_default().bold();
/// What matters less.
pub(super) const FAINT: Style = Style::new().dimmed();

/// How this command speaks.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// Without remarks, and with names alone where there would be a table.
    pub is_quiet: bool,
}

impl Output {
    /// Prints what was asked for.
    ///
    /// # Errors
    /// It cannot be written.
    pub(super) fn print(self, text: &str) -> io::Result<()> {
        let mut out = anstream::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            result => result,
        }
    }

    /// Prints what was asked for as one JSON document.
    ///
    /// # Errors
    /// As for [`print`](Self::print).
    pub(super) fn print_json(self, value: &impl Serialize) -> io::Result<()> {
        self.print(&(serde_json::to_string_pretty(value)? + "\n"))
    }

    /// Says something that was not asked for.
    pub(super) fn remark(self, text: impl Display) {
        if !self.is_quiet {
            eprintln!("salp: {text}");
        }
    }
}

/// Columns as wide as what is in them, the first row being the head.
pub(super) fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        let rows = [["A", "LONG"], ["äöü", ""]].map(|row| row.map(str::to_owned));
        assert_eq!(columns(&rows), "A    LONG\näöü\n");
    }
}
