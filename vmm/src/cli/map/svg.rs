//! Pictures: a [`Canvas`] that becomes an SVG file which needs nothing outside of itself, and the map of
//! one VM. A leaf is a small column of what its pages are: exclusive at the bottom, then lent, shared, and
//! what was never touched; a red frame says that a device holds some.

use std::fmt::Write as _;

use super::cell::{EXCLUSIVE, LENT, LOST, PINNED, SHARED, Tint, ZERO, shared_tint, sharers};
use super::sums;
use crate::control::resources::{LeafView, MemoryView};

/// Between lines of text, in pixels.
pub(super) const TEXT_HEIGHT: usize = 20;
/// Leaves in a row.
const COLUMNS: usize = 64;
/// A leaf, in pixels.
const CELL_PX: usize = 16;
/// A leaf without the gap to the next.
const SIDE_PX: usize = 14;
/// Where rows begin.
const LEFT_PX: usize = 72;

/// What is drawn so far.
#[derive(Debug)]
pub(super) struct Canvas(String);

impl Canvas {
    pub(super) fn new() -> Self {
        Self(String::new())
    }

    /// Adds markup. Writing into a text cannot fail.
    fn add(&mut self, markup: std::fmt::Arguments<'_>) {
        let _ = self.0.write_fmt(markup);
        self.0.push('\n');
    }

    pub(super) fn text(&mut self, x: usize, y: usize, class: &str, text: &str) {
        self.add(format_args!("<text x=\"{x}\" y=\"{y}\" class=\"{class}\">{}</text>", escaped(text)));
    }

    fn rectangle(&mut self, (x, y): (usize, usize), (width, height): (usize, usize), tint: Tint) {
        let hex = tint.hex;
        self.add(format_args!(
            "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"{hex}\"/>"
        ));
    }

    pub(super) fn path(&mut self, tint: Tint, path: &str) {
        self.add(format_args!("<path fill=\"{}\" d=\"{path}\"/>", tint.hex));
    }

    /// A word of the legend with its colour.
    pub(super) fn key(&mut self, x: usize, y: usize, tint: Tint, text: &str) {
        self.rectangle((x, y - 10), (12, 12), tint);
        self.text(x + 17, y, "note", text);
    }

    pub(super) fn finish(self, width: usize, height: usize) -> String {
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\">\n<style>\n\
             text {{ font-family: sans-serif; fill: #222 }}\n\
             .title {{ font-size: 16px; font-weight: bold }}\n\
             .note {{ font-size: 12px; fill: #555 }}\n\
             .label {{ font-family: monospace; font-size: 12px; white-space: pre }}\n\
             </style>\n<rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n{}</svg>\n",
            self.0
        )
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// The map of one VM.
pub(super) fn picture(memory: &MemoryView) -> String {
    let mut canvas = Canvas::new();
    canvas.text(8, 20, "title", &format!("Memory of {}", memory.name));
    canvas.text(8, 38, "note", &sums(memory));
    let top = 52;
    for (place, leaf) in memory.leaves.iter().enumerate() {
        let (row, column) = (place / COLUMNS, place % COLUMNS);
        let y = top + row * CELL_PX;
        if column == 0 {
            canvas.text(8, y + 12, "label", &format!("{} MiB", place * 2));
        }
        draw_leaf(&mut canvas, leaf, (LEFT_PX + column * CELL_PX, y));
    }
    let y = top + memory.leaves.len().div_ceil(COLUMNS) * CELL_PX + 24;
    let fixed = [
        (ZERO, "never touched"),
        (EXCLUSIVE, "exclusive"),
        (LENT, "lent"),
        (PINNED, "pinned"),
        (LOST, "lost"),
    ];
    let mut x = LEFT_PX;
    for (tint, text) in fixed {
        canvas.key(x, y, tint, text);
        x += text.len() * 7 + 40;
    }
    let mut x = LEFT_PX;
    for ((most, tint), least) in SHARED.iter().zip([1, 2, 3, 5, 9]) {
        let text = match *most {
            u32::MAX => format!("by {least} or more"),
            most if most == least => format!("shared by {least}"),
            most => format!("by {least} to {most}"),
        };
        canvas.key(x, y + TEXT_HEIGHT, *tint, &text);
        x += text.len() * 7 + 40;
    }
    canvas.finish(LEFT_PX + COLUMNS * CELL_PX + 8, y + TEXT_HEIGHT + 16)
}

/// The parts of a leaf, from the bottom: each is seen if it has a page at all.
fn draw_leaf(canvas: &mut Canvas, leaf: &LeafView, (x, y): (usize, usize)) {
    let pages = leaf.pages;
    let vms = sharers(leaf);
    canvas.add(format_args!(
        "<g><title>leaf {}: {} exclusive, {} lent, {} shared by {vms}, {} zero, {} pinned, {} lost</title>",
        leaf.leaf, pages.exclusive, pages.lent, pages.shared, pages.zero, pages.pinned, pages.lost
    ));
    canvas.rectangle((x, y), (SIDE_PX, SIDE_PX), ZERO);
    let parts = [
        (pages.lost, LOST),
        (pages.exclusive, EXCLUSIVE),
        (pages.lent, LENT),
        (pages.shared, shared_tint(vms)),
    ];
    let total = parts.iter().map(|(count, _)| count).sum::<u64>() + pages.zero;
    let mut left_px = SIDE_PX;
    for (count, tint) in parts.into_iter().filter(|(count, _)| *count > 0) {
        let share = (count * 14).div_ceil(total.max(1));
        let height = usize::try_from(share).unwrap_or(SIDE_PX).min(left_px);
        left_px -= height;
        canvas.rectangle((x, y + left_px), (SIDE_PX, height), tint);
    }
    if pages.pinned > 0 {
        let (hex, side) = (PINNED.hex, SIDE_PX - 2);
        let (x, y) = (x + 1, y + 1);
        canvas.add(format_args!(
            "<rect x=\"{x}\" y=\"{y}\" width=\"{side}\" height=\"{side}\" fill=\"none\" stroke=\"{hex}\" \
             stroke-width=\"2\"/>"
        ));
    }
    canvas.add(format_args!("</g>"));
}

#[cfg(test)]
mod tests {
    use super::super::cell::tests::leaf;
    use super::super::tests::memory;
    use super::*;
    use crate::control::resources::Pages;

    #[test]
    fn every_part_of_a_leaf_is_drawn() {
        let mixed = Pages { exclusive: 1, lent: 100, pinned: 1, ..Pages::default() };
        let picture = picture(&memory("a<b", vec![leaf(0, mixed, Some((1, 2)))]));
        let cell = picture.split("<g>").nth(1).and_then(|rest| rest.split("</g>").next()).expect("a leaf");
        for tint in [ZERO, EXCLUSIVE, LENT, shared_tint(2), PINNED] {
            assert_eq!(cell.matches(tint.hex).count(), 1, "{cell}");
        }
        assert!(cell.contains("1 exclusive, 100 lent, 411 shared by 2, 0 zero, 1 pinned"), "{cell}");
        assert!(picture.contains("Memory of a&lt;b"));
    }

    #[test]
    fn rows_have_64_leaves() {
        let leaves = (0..130).map(|number| leaf(number, Pages::default(), None)).collect();
        let picture = picture(&memory("a", leaves));
        assert_eq!(picture.matches("<title>").count(), 130);
        for label in ["0 MiB", "128 MiB", "256 MiB"] {
            assert!(picture.contains(&format!(">{label}<")), "{label}");
        }
    }
}
