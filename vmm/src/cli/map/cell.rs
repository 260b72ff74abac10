//! What a leaf looks like, in a terminal and in a picture: [`Cell`] and [`Tint`].
//!
//! | leaf | glyph | colour |
//! |---|---|---|
//! | a page is lost | `X` | black |
//! | a page is pinned | `P` | red |
//! | the VM's own pages | a bar as high as they are many | orange |
//! | most of the own pages lent | `▒` | violet |
//! | shared by n VMs | n, `+` above 9 | the darker a blue the more VMs |
//! | never touched | `·` | grey |

use crate::control::resources::{LeafView, Pages};

/// A colour, in a terminal's palette of 256 and for pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cli) struct Tint {
    pub(in crate::cli) index: u8,
    pub(in crate::cli) hex: &'static str,
}

const fn tint(index: u8, hex: &'static str) -> Tint {
    Tint { index, hex }
}

pub(in crate::cli) const ZERO: Tint = tint(236, "#e4e4e4");
pub(in crate::cli) const EXCLUSIVE: Tint = tint(208, "#f58518");
pub(in crate::cli) const LENT: Tint = tint(134, "#9156c8");
pub(in crate::cli) const PINNED: Tint = tint(160, "#d62728");
pub(in crate::cli) const LOST: Tint = tint(16, "#000000");
const LIGHT: Tint = tint(255, "#ffffff");
const DARK: Tint = tint(16, "#000000");
const GREY: Tint = tint(245, "#888888");

/// Shared by up to so many VMs.
pub(in crate::cli) const SHARED: [(u32, Tint); 5] = [
    (1, tint(153, "#c6dbef")),
    (2, tint(110, "#8fbfe0")),
    (4, tint(68, "#5297cc")),
    (8, tint(25, "#2669a8")),
    (u32::MAX, tint(18, "#0b3c78")),
];

/// The colour of what so many VMs share.
pub(in crate::cli) fn shared_tint(vms: u32) -> Tint {
    let found = SHARED.iter().find(|(most, _)| vms <= *most);
    found.map_or(SHARED[0].1, |(_, tint)| *tint)
}

/// How many VMs share what a leaf shares.
pub(in crate::cli) fn sharers(leaf: &LeafView) -> u32 {
    leaf.block.map_or(1, |block| block.vms)
}

/// One leaf in a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cli) struct Cell {
    pub(in crate::cli) glyph: char,
    pub(in crate::cli) fore: Tint,
    pub(in crate::cli) back: Tint,
}

/// Bars of an eighth to eight eighths.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

impl Cell {
    /// See the module.
    pub(in crate::cli) fn of(leaf: &LeafView) -> Self {
        let Pages { exclusive, lent, shared, pinned, lost, .. } = leaf.pages;
        if lost > 0 {
            return Self { glyph: 'X', fore: LIGHT, back: LOST };
        }
        if pinned > 0 {
            return Self { glyph: 'P', fore: LIGHT, back: PINNED };
        }
        let below = if shared > 0 { shared_tint(sharers(leaf)) } else { ZERO };
        let own = exclusive + lent;
        if lent > exclusive {
            Self { glyph: '▒', fore: LENT, back: below }
        } else if own > 0 {
            let all = own + shared + leaf.pages.zero;
            Self { glyph: bar(own, all), fore: EXCLUSIVE, back: below }
        } else if shared > 0 {
            let vms = sharers(leaf);
            let glyph = char::from_digit(vms, 10).unwrap_or('+');
            Self { glyph, fore: if vms > 2 { LIGHT } else { DARK }, back: below }
        } else {
            Self { glyph: '·', fore: GREY, back: ZERO }
        }
    }
}

/// A bar for so many of `all` pages, at least one of them.
fn bar(pages: u64, all: u64) -> char {
    let eighths = (pages * 8).div_ceil(all).clamp(1, 8);
    BARS[usize::try_from(eighths - 1).unwrap_or(BARS.len() - 1)]
}

/// Several leaves as one, where there is no room for each: what most VMs share counts.
pub(in crate::cli) fn merged(leaves: &[LeafView]) -> Option<LeafView> {
    let mut merged = leaves.first()?.clone();
    for leaf in &leaves[1..] {
        let (sum, pages) = (&mut merged.pages, &leaf.pages);
        sum.zero += pages.zero;
        sum.exclusive += pages.exclusive;
        sum.lent += pages.lent;
        sum.shared += pages.shared;
        sum.pinned += pages.pinned;
        sum.lost += pages.lost;
        if merged.block.is_none() || sharers(leaf) > sharers(&merged) {
            merged.block = leaf.block.or(merged.block);
        }
    }
    Some(merged)
}

#[cfg(test)]
pub(in crate::cli) mod tests {
    use super::*;
    use crate::control::resources::BlockView;

    /// A leaf with these pages, the rest of it shared by `vms` VMs since a fork, or never touched.
    pub(in crate::cli) fn leaf(number: u32, pages: Pages, since: Option<(u64, u32)>) -> LeafView {
        let rest = 512 - pages.exclusive - pages.lent - pages.lost;
        let block = since.map(|(fork, vms)| BlockView { fork, is_published: true, vms });
        let pages = match block {
            Some(_) => Pages { shared: rest, ..pages },
            None => Pages { zero: rest, ..pages },
        };
        LeafView { leaf: number, pages, block }
    }

    #[test]
    fn each_leaf_looks_like_what_it_is() {
        let none = Pages::default();
        let own = |exclusive, lent| Pages { exclusive, lent, ..none };
        let cases = [
            (leaf(0, none, None), '·', ZERO),
            (leaf(0, own(1, 0), None), '▁', ZERO),
            (leaf(0, own(512, 0), None), '█', ZERO),
            (leaf(0, own(200, 57), Some((1, 2))), '▅', shared_tint(2)),
            (leaf(0, own(10, 11), None), '▒', ZERO),
            (leaf(0, none, Some((1, 3))), '3', shared_tint(3)),
            (leaf(0, none, Some((1, 30))), '+', shared_tint(30)),
            (leaf(0, Pages { exclusive: 9, pinned: 1, ..none }, None), 'P', PINNED),
            (leaf(0, Pages { lost: 1, pinned: 1, ..none }, None), 'X', LOST),
        ];
        for (leaf, glyph, back) in cases {
            let cell = Cell::of(&leaf);
            assert_eq!((cell.glyph, cell.back), (glyph, back), "{leaf:?}");
        }
    }

    #[test]
    fn leaves_without_room_are_one() {
        let own = Pages { exclusive: 512, ..Pages::default() };
        let three = [leaf(4, own, None), leaf(5, Pages::default(), Some((1, 3))), leaf(6, own, None)];
        let one = merged(&three).expect("there are some");
        assert_eq!((one.leaf, one.pages.exclusive, one.pages.shared), (4, 1024, 512));
        assert_eq!((Cell::of(&one).glyph, Cell::of(&one).back), ('▆', shared_tint(3)));
        assert_eq!(merged(&[]), None);
    }

    #[test]
    fn more_vms_are_a_darker_blue() {
        let tints = [1, 2, 3, 5, 9].map(|vms| shared_tint(vms).hex);
        assert_eq!(tints, SHARED.map(|(_, tint)| tint.hex));
    }
}
