//! The conformance table, made of the records of a run: which row passed at how many points with each
//! value of its axes, or why it was skipped there.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use crate::axes::Axis;
use crate::catalogue::{ROWS, names};
use crate::record::{Outcome, Record};

/// A value that is in the table and cannot be run: no code for it yet.
const SNAPSHOT: &str = "snapshot";

/// What the records say of one cell.
#[derive(Default)]
struct Cell {
    passed: usize,
    reasons: BTreeSet<String>,
}

/// The records of a run, by row, axis and value.
#[derive(Default)]
pub struct Table {
    /// Of a row as a whole: the records without axes, too.
    rows: BTreeMap<String, Cell>,
    cells: BTreeMap<(String, String, String), Cell>,
}

impl Cell {
    fn add(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Pass => self.passed += 1,
            Outcome::Skipped(reason) => _ = self.reasons.insert(reason.clone()),
        }
    }

    /// What stands in the table: how many points passed, and the marks of the reasons.
    fn text(&self, reasons: &mut Vec<String>) -> String {
        let mut words = Vec::new();
        if self.passed > 0 {
            words.push(self.passed.to_string());
        }
        for reason in &self.reasons {
            let at = reasons.iter().position(|known| known == reason).unwrap_or_else(|| {
                reasons.push(reason.clone());
                reasons.len() - 1
            });
            words.push(format!("s{}", at + 1));
        }
        words.join(" ")
    }
}

impl Table {
    /// Reads the records in the output of tests.
    #[must_use]
    pub fn of(output: &str) -> Self {
        let mut table = Self::default();
        for record in output.lines().filter_map(Record::parse) {
            table.rows.entry(record.row.clone()).or_default().add(&record.outcome);
            for (axis, value) in record.values {
                table.cells.entry((record.row.clone(), axis, value)).or_default().add(&record.outcome);
            }
        }
        table
    }

    /// The rows of which nothing was said.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        names().filter(|row| !self.rows.contains_key(*row)).collect()
    }

    /// Rows that are not in the catalogue.
    #[must_use]
    pub fn unknown(&self) -> Vec<&str> {
        self.rows.keys().map(String::as_str).filter(|row| !names().any(|name| name == *row)).collect()
    }

    /// The table in Markdown.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = HEAD.to_owned();
        let mut reasons = Vec::new();
        for (title, rows) in ROWS {
            _ = write!(text, "\n## {title}\n\n");
            for (row, what) in *rows {
                _ = writeln!(text, "- **{row}** {what}");
            }
            text.push('\n');
            self.write_group(&mut text, rows, &mut reasons);
        }
        _ = write!(text, "\n## Skipped\n\n");
        if reasons.is_empty() {
            text.push_str("Nothing.\n");
        }
        for (number, reason) in (1..).zip(&reasons) {
            _ = writeln!(text, "- s{number}: {reason}");
        }
        text
    }

    fn write_group(&self, text: &mut String, rows: &[(&str, &str)], reasons: &mut Vec<String>) {
        let mut columns: Vec<(&str, &str)> = Vec::new();
        for axis in Axis::ALL {
            let extra = (axis == Axis::Backing).then_some(SNAPSHOT);
            columns.extend(axis.values().iter().copied().chain(extra).map(|value| (axis.name(), value)));
        }
        let is_used = |column: &(&str, &str)| rows.iter().any(|(row, _)| self.cell(row, column).is_some());
        columns.retain(is_used);
        text.push_str("| row | points |");
        columns.iter().for_each(|(axis, value)| _ = write!(text, " {axis}: {value} |"));
        text.push_str("\n|---|---|");
        columns.iter().for_each(|_| text.push_str("---|"));
        text.push('\n');
        for (row, _) in rows {
            let all = self.rows.get(*row).map_or_else(|| "not run".to_owned(), |cell| cell.text(reasons));
            _ = write!(text, "| {row} | {all} |");
            for column in &columns {
                let cell = self.cell(row, column).map_or_else(String::new, |cell| cell.text(reasons));
                _ = write!(text, " {cell} |");
            }
            text.push('\n');
        }
    }

    fn cell(&self, row: &str, (axis, value): &(&str, &str)) -> Option<&Cell> {
        self.cells.get(&(row.to_owned(), (*axis).to_owned(), (*value).to_owned()))
    }
}

const HEAD: &str = "\
# Conformance

What a clone must look like from outside, row by row. `make conformance` runs all of it and writes this
page. A row runs at so many points that each pair of values of two of its axes comes together at one of
them. After each row the whole-state checker runs.

A number says at how many points with that value the row passed; s1, s2, ... why it was skipped there
(at the end of the page). An empty cell: the row does not vary that axis. A row that fails is not here:
`make conformance` fails. P is the source, C its clone, G a clone of C.

Axes: *guest*: KVM vCPU or host thread. *backing*: what the memory is that the row is about.
*published*: how much of it had been written to the arena at the time of the action; *dropped*: and the
source maps the blocks. *level*: at which level of the tables a fork shares. *source*: a first VM, or a
clone. *pin*: by a device of salp's, or by the host's kernel (buffers registered with io_uring, filled
or read through a pipe when the test says so).
";

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "
noise
CONFORMANCE A1 guest=kvm level=root: pass
CONFORMANCE A1 guest=kvm level=leaf: pass
CONFORMANCE A1 guest=thread level=leaf: skipped: no swap
CONFORMANCE K1: pass
CONFORMANCE Z9: pass
";

    #[test]
    fn records_become_cells() {
        let table = Table::of(OUTPUT);
        let text = table.markdown();
        assert!(text.contains("| A1 | 2 s1 | 2 | s1 | 1 | 1 s1 |"), "{text}");
        assert!(text.contains("| K1 | 1 |\n") && text.contains("- s1: no swap\n"), "{text}");
        assert!(text.contains("| A2 | not run |"), "{text}");
        assert_eq!(table.unknown(), ["Z9"]);
        assert!(table.missing().contains(&"A2") && !table.missing().contains(&"A1"));
    }
}
