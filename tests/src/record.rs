//! What a test says of a row of the conformance table, for the table that is made of it.
//!
//! A record is a line of a test's output, whatever crate the test is in:
//!
//! ```text
//! CONFORMANCE <row> <axis>=<value> ...: pass
//! CONFORMANCE <row> <axis>=<value> ...: skipped: <reason>
//! ```
//!
//! `<row>` is as in [`ROWS`](crate::catalogue::ROWS). The axes and values are those of
//! [`Axis`](crate::axes::Axis); a record need not have any. A row that fails says nothing: its test
//! does. [`run`](crate::row::run) and [`at`](crate::row::at) print records by themselves; for any other
//! test of [`both_guests`](crate::both_guests) that is named after a row, [`of_test`] does; elsewhere a
//! test prints its line when it has passed. `make conformance` runs the files that its variable
//! `CONFORMANCE_FILES` names.

use std::cell::Cell;
use std::fmt;

use crate::GuestKind;
use crate::axes::{Axis, Point};

thread_local! {
    /// Whether the test of this thread has said something.
    static HAS_REPORTED: Cell<bool> = const { Cell::new(false) };
}

/// How a row ended at a point.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// As it should be.
    Pass,
    /// It could not be run, and why.
    Skipped(String),
}

/// A line of the above.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The row.
    pub row: String,
    /// (axis, value), by name.
    pub values: Vec<(String, String)>,
    /// How it ended.
    pub outcome: Outcome,
}

const MARK: &str = "CONFORMANCE ";
const PASS: &str = "pass";
const SKIPPED: &str = "skipped: ";

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{MARK}{}", self.row)?;
        for (axis, value) in &self.values {
            write!(f, " {axis}={value}")?;
        }
        match &self.outcome {
            Outcome::Pass => write!(f, ": {PASS}"),
            Outcome::Skipped(reason) => write!(f, ": {SKIPPED}{reason}"),
        }
    }
}

impl Record {
    /// The record in a line, if it is one.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let (head, outcome) = line.strip_prefix(MARK)?.split_once(": ")?;
        let mut words = head.split(' ');
        let row = words.next()?.to_owned();
        let value =
            |word: &str| word.split_once('=').map(|(axis, value)| (axis.to_owned(), value.to_owned()));
        let values = words.map(value).collect::<Option<Vec<_>>>()?;
        let outcome = match outcome.strip_prefix(SKIPPED) {
            Some(reason) => Outcome::Skipped(reason.to_owned()),
            None if outcome == PASS => Outcome::Pass,
            None => return None,
        };
        Some(Self { row, values, outcome })
    }
}

/// The rows that a test is of: its name begins with them, `a1_...` or `e2_to_e4_...`. None: it is no
/// row's.
#[must_use]
pub fn rows_of(test: &str) -> Vec<String> {
    let words: Vec<&str> = test.split('_').collect();
    let number = |at: usize| words.get(at).and_then(|word| word.get(1..)?.parse::<u32>().ok());
    let (Some(group), Some(from)) = (test.get(..1), number(0)) else { return Vec::new() };
    let to = if words.get(1) == Some(&"to") { number(2).unwrap_or(from) } else { from };
    (from..=to).map(|number| format!("{}{number}", group.to_ascii_uppercase())).collect()
}

/// Says how the rows of `test` ended at a point.
pub fn report(test: &str, point: &Point, outcome: &Outcome) {
    report_values(test, &point.to_string(), outcome);
}

/// As [`report`], at `<axis>=<value> ...`.
pub fn report_values(test: &str, values: &str, outcome: &Outcome) {
    HAS_REPORTED.set(true);
    let outcome = match outcome {
        Outcome::Pass => PASS.to_owned(),
        Outcome::Skipped(reason) => format!("{SKIPPED}{reason}"),
    };
    for row in rows_of(test) {
        println!("{MARK}{row} {values}: {outcome}");
    }
}

/// The value of a test that has no axis but its guest.
#[must_use]
pub fn value_of(guest: GuestKind) -> String {
    let at = usize::from(guest == GuestKind::Thread);
    format!("{}={}", Axis::Guest.name(), Axis::Guest.values()[at])
}

/// Runs a test, and says that its rows passed if it has said nothing of them.
pub fn of_test(test: &str, guest: GuestKind, run: impl FnOnce(&str, GuestKind)) {
    HAS_REPORTED.set(false);
    run(test, guest);
    if !HAS_REPORTED.get() {
        report_values(test, &value_of(guest), &Outcome::Pass);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_as_they_are_written() {
        let values = vec![("guest".to_owned(), "kvm".to_owned()), ("pin".to_owned(), "kernel".to_owned())];
        for outcome in [Outcome::Pass, Outcome::Skipped("no swap: not root".to_owned())] {
            for values in [values.clone(), Vec::new()] {
                let record = Record { row: "A1".to_owned(), values, outcome: outcome.clone() };
                assert_eq!(Record::parse(&record.to_string()), Some(record));
            }
        }
        for line in ["", "CONFORMANCE", "CONFORMANCE A1: failed", "CONFORMANCE A1 kvm: pass", "A1: pass"] {
            assert_eq!(Record::parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn a_test_is_named_after_its_rows() {
        assert_eq!(rows_of("a1_the_source_writes::kvm"), ["A1"]);
        assert_eq!(rows_of("e2_to_e4_a_write"), ["E2", "E3", "E4"]);
        assert_eq!(rows_of("c16_a_pin"), ["C16"]);
        assert_eq!(rows_of("a_pin_refuses_a_reset::kvm"), Vec::<String>::new());
    }
}
