//! Which VMs of a colony share which leaves: a row for each VM, a column for each leaf. Two cells of a
//! column that look alike are one piece of memory.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anstyle::{Ansi256Color, Style};

use super::cell::{EXCLUSIVE, LENT, Tint, ZERO};
use super::svg::{Canvas, TEXT_HEIGHT};
use crate::control::resources::{LeafView, MemoryView};

/// Leaves in a row of a terminal.
const TERMINAL_LEAVES: usize = 64;
/// Leaves in a row of a picture.
const PICTURE_LEAVES: usize = 128;
/// A leaf in a picture, in pixels.
const CELL_PX: usize = 8;

/// Colours of forks, in their order; then from the beginning again.
const FORKS: [Tint; 10] = [
    Tint { index: 25, hex: "#2669a8" },
    Tint { index: 71, hex: "#54a24b" },
    Tint { index: 37, hex: "#3aa6a0" },
    Tint { index: 178, hex: "#c9a227" },
    Tint { index: 168, hex: "#d0578a" },
    Tint { index: 95, hex: "#8c6d5a" },
    Tint { index: 110, hex: "#8fbfe0" },
    Tint { index: 108, hex: "#9bc995" },
    Tint { index: 182, hex: "#d6a5c9" },
    Tint { index: 60, hex: "#5f6a9e" },
];

/// One VM's row: what leads to its name in the tree, and its memory.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) label: String,
    pub(super) memory: MemoryView,
}

/// What a leaf is, seen from the family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// Never touched.
    Zero,
    /// Mostly this VM's alone.
    Own,
    /// Mostly shared since a fork: that one's place among the forks, and whether it is published.
    Since(usize, bool),
}

/// The forks that somebody still shares something of, ascending.
fn forks(rows: &[Row]) -> BTreeMap<u64, usize> {
    let leaves = rows.iter().flat_map(|row| &row.memory.leaves);
    let mut forks: Vec<_> = leaves.filter_map(|leaf| leaf.block).map(|block| block.fork).collect();
    forks.sort_unstable();
    forks.dedup();
    forks.into_iter().zip(0..).collect()
}

fn kind(leaf: &LeafView, forks: &BTreeMap<u64, usize>) -> Kind {
    let pages = leaf.pages;
    match leaf.block.and_then(|block| Some((*forks.get(&block.fork)?, block.is_published))) {
        Some((place, is_published)) if pages.shared + pages.lent >= pages.exclusive => {
            Kind::Since(place, is_published)
        }
        _ if pages.exclusive + pages.lent + pages.shared > 0 => Kind::Own,
        _ => Kind::Zero,
    }
}

impl Kind {
    fn tint(self) -> Tint {
        match self {
            Self::Zero => ZERO,
            Self::Own => EXCLUSIVE,
            Self::Since(place, true) => FORKS[place % FORKS.len()],
            Self::Since(_, false) => LENT,
        }
    }

    /// Letters for forks: large if published.
    fn glyph(self) -> char {
        let letter = |place: usize| char::from(b'a' + u8::try_from(place % 26).unwrap_or(0));
        match self {
            Self::Zero => '·',
            Self::Own => '█',
            Self::Since(place, true) => letter(place).to_ascii_uppercase(),
            Self::Since(place, false) => letter(place),
        }
    }
}

/// For a terminal: rows of 64 leaves.
pub(super) fn text(rows: &[Row]) -> String {
    let forks = forks(rows);
    let width = rows.iter().map(|row| row.label.chars().count()).max().unwrap_or(0);
    let leaves = rows.iter().map(|row| row.memory.leaves.len()).max().unwrap_or(0);
    let mut text = String::new();
    for first in (0..leaves).step_by(TERMINAL_LEAVES) {
        text += &format!("leaves from {first} ({} MiB)\n", first * 2);
        for row in rows {
            text += &format!("{:<width$}  ", row.label);
            for leaf in row.memory.leaves.iter().skip(first).take(TERMINAL_LEAVES) {
                let kind = kind(leaf, &forks);
                let style = style(kind);
                text += &format!("{style}{}{style:#}", kind.glyph());
            }
            text.push('\n');
        }
    }
    text + &legend(&forks)
}

fn style(kind: Kind) -> Style {
    let colour = |tint: Tint| Ansi256Color(tint.index);
    match kind {
        Kind::Zero => colour(Tint { index: 245, hex: "" }).on(colour(ZERO)),
        Kind::Own => colour(EXCLUSIVE).on_default(),
        Kind::Since(..) => Ansi256Color(255).on(colour(kind.tint())),
    }
}

fn legend(forks: &BTreeMap<u64, usize>) -> String {
    let own = Kind::Own;
    let (zero, plain) = (style(Kind::Zero), style(own));
    let mut text = format!("{zero}·{zero:#} never touched  {plain}█{plain:#} the vm's own");
    for (fork, place) in forks {
        let kind = Kind::Since(*place, true);
        let style = style(kind);
        text += &format!("  {style}{}{style:#} since fork {fork}", kind.glyph());
    }
    text + "  (small letters: not published yet)\n"
}

/// As a picture.
pub(super) fn picture(rows: &[Row]) -> String {
    let forks = forks(rows);
    let label_px = rows.iter().map(|row| row.label.chars().count()).max().unwrap_or(0) * 8 + 16;
    let leaves = rows.iter().map(|row| row.memory.leaves.len()).max().unwrap_or(0);
    let columns = leaves.min(PICTURE_LEAVES);
    let mut canvas = Canvas::new();
    canvas.text(8, 20, "title", "Which VMs share which memory");
    canvas.text(
        8,
        38,
        "note",
        "a row is a VM, a column 2 MiB; equal colours in a column are one piece of memory",
    );
    let mut top = 62;
    for first in (0..leaves).step_by(PICTURE_LEAVES) {
        canvas.text(label_px, top, "note", &format!("from {} MiB", first * 2));
        top += 8;
        for row in rows {
            canvas.text(8, top + CELL_PX + 2, "label", &row.label);
            let band = row.memory.leaves.iter().skip(first).take(PICTURE_LEAVES);
            draw_row(&mut canvas, (label_px, top), band.map(|leaf| kind(leaf, &forks)));
            top += CELL_PX + 6;
        }
        top += 22;
    }
    let mut left = 8;
    let named = forks.iter().map(|(fork, place)| (Kind::Since(*place, true), format!("since fork {fork}")));
    let fixed = [(Kind::Zero, "never touched"), (Kind::Own, "the VM's own"), (Kind::Since(0, false), "lent")];
    let fixed = fixed.into_iter().map(|(kind, text)| (kind, text.to_owned()));
    for (kind, text) in fixed.chain(named) {
        let width = text.chars().count() * 7 + 34;
        if left + width > label_px + columns * CELL_PX {
            (left, top) = (8, top + TEXT_HEIGHT);
        }
        canvas.key(left, top, kind.tint(), &text);
        left += width;
    }
    canvas.finish((label_px + columns * CELL_PX + 8).max(620), top + 16)
}

/// One path for each colour of a row: pictures of large VMs stay small.
fn draw_row(canvas: &mut Canvas, (left, top): (usize, usize), kinds: impl Iterator<Item = Kind>) {
    let mut paths: BTreeMap<Kind, String> = BTreeMap::new();
    for (column, kind) in kinds.enumerate() {
        let (x, side) = (left + column * CELL_PX, CELL_PX - 1);
        // Into a text: it cannot fail.
        let _ = write!(paths.entry(kind).or_default(), "M{x} {top}h{side}v{CELL_PX}h-{side}z");
    }
    for (kind, path) in paths {
        canvas.path(kind.tint(), &path);
    }
}

#[cfg(test)]
mod tests {
    use super::super::cell::tests::leaf;
    use super::super::tests::memory;
    use super::*;
    use crate::control::resources::Pages;

    fn rows() -> Vec<Row> {
        let own = Pages { exclusive: 512, ..Pages::default() };
        let none = Pages::default();
        let source = vec![leaf(0, none, Some((3, 2))), leaf(1, none, Some((7, 2))), leaf(2, none, None)];
        let clone = vec![leaf(0, none, Some((3, 2))), leaf(1, own, None), leaf(2, none, None)];
        let row = |label: &str, leaves| Row { label: label.to_owned(), memory: memory(label, leaves) };
        vec![row("a", source), row("└─a-1", clone)]
    }

    #[test]
    fn what_is_shared_looks_alike_in_a_column() {
        let plain = anstream::adapter::strip_str(&text(&rows())).to_string();
        let lines: Vec<_> = plain.lines().collect();
        assert_eq!(lines[..3], ["leaves from 0 (0 MiB)", "a      AB·", "└─a-1  A█·"]);
        assert!(lines[3].contains("A since fork 3") && lines[3].contains("B since fork 7"), "{plain}");
    }

    #[test]
    fn the_picture_has_a_path_for_each_colour_of_a_row() {
        let picture = picture(&rows());
        assert_eq!(picture.matches("<path").count(), 3 + 3);
        assert!(picture.contains("└─a-1") && picture.starts_with("<svg") && picture.ends_with("</svg>\n"));
    }
}
