//! The axes of the conformance table and their values, and the points of them that a row runs at: not
//! the full product, but so many that each pair of values comes together at some point.
//!
//! - [`Axis`], [`Point`]: a point has a value on each axis, the usual one where a row does not vary it.
//! - [`covering`]: which combinations cover all pairs. Greedy, and the same at each run.

use std::collections::BTreeSet;
use std::fmt;

use salp::member::messages::PinHolder;
use salp::space::Access;
use salp::tables::ShareLevel;

use crate::GuestKind;
use crate::world::Setup;

/// What the memory is that a row is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lies {
    /// In a huge page, written all over.
    Huge,
    /// In a 4 KiB page, in a leaf written all over.
    Small,
    /// In what was a huge page until a protection of 4 KiB was laid in it.
    SplitByProtection,
    /// In what was a huge page until 4 KiB of it were discarded.
    SplitByDiscard,
    /// Untouched, in an untouched leaf.
    UntouchedLeaf,
    /// Untouched, in a leaf with one written page.
    UntouchedPage,
    /// In swap.
    SwappedOut,
}

/// How far publication has come at the time of the action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forced {
    /// Only what somebody asked for.
    Nothing,
    /// The leaf that the row is about.
    Leaf,
    /// Everything; the source keeps its own copies.
    All,
    /// Everything; the source maps the blocks.
    Dropped,
}

/// What the source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A VM that shares nothing.
    Root,
    /// A clone that knows nothing of its memory yet.
    Clone,
}

/// Something that differs between the points of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Axis {
    /// KVM vCPU or host thread.
    Guest,
    /// See [`Lies`].
    Backing,
    /// See [`Forced`].
    Publication,
    /// See [`ShareLevel`].
    Level,
    /// See [`Source`].
    Source,
    /// Who makes the pins.
    Pin,
}

/// The axes of a row about memory.
pub const MEMORY: &[Axis] = &[Axis::Backing, Axis::Publication, Axis::Level, Axis::Source];
/// The axes of a row about memory and pins.
pub const PINNED: &[Axis] = &[Axis::Backing, Axis::Publication, Axis::Level, Axis::Source, Axis::Pin];
/// Those of a row whose source and memory are its own.
pub const LEVEL: &[Axis] = &[Axis::Level];
/// Those of such a row about pins.
pub const LEVEL_AND_PIN: &[Axis] = &[Axis::Level, Axis::Pin];

const GUESTS: [GuestKind; 2] = [GuestKind::Kvm, GuestKind::Thread];
const BACKINGS: [Lies; 7] = [
    Lies::Huge,
    Lies::Small,
    Lies::SplitByProtection,
    Lies::SplitByDiscard,
    Lies::UntouchedLeaf,
    Lies::UntouchedPage,
    Lies::SwappedOut,
];
const PUBLICATIONS: [Forced; 4] = [Forced::Nothing, Forced::Leaf, Forced::All, Forced::Dropped];
const LEVELS: [ShareLevel; 3] = [ShareLevel::Root, ShareLevel::Directory, ShareLevel::Leaf];
const SOURCES: [Source; 2] = [Source::Root, Source::Clone];
const PINS: [PinHolder; 2] = [PinHolder::Salp(Access::ReadWrite), PinHolder::Kernel];

impl Axis {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Guest, Self::Backing, Self::Publication, Self::Level, Self::Source, Self::Pin];

    /// Its name in records.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::Backing => "backing",
            Self::Publication => "published",
            Self::Level => "level",
            Self::Source => "source",
            Self::Pin => "pin",
        }
    }

    /// The names of the values that can be run, the usual one first.
    #[must_use]
    pub const fn values(self) -> &'static [&'static str] {
        match self {
            Self::Guest => &["kvm", "thread"],
            Self::Backing => &[
                "huge",
                "4-kib",
                "split-by-protection",
                "split-by-discard",
                "untouched-leaf",
                "untouched-page",
                "swapped-out",
            ],
            Self::Publication => &["nothing", "leaf", "all", "dropped"],
            Self::Level => &["root", "directory", "leaf"],
            Self::Source => &["root", "clone"],
            Self::Pin => &["salp", "kernel"],
        }
    }
}

/// A value on each axis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Point {
    /// What runs in the VMs.
    pub guest: GuestKind,
    /// What the memory is.
    pub backing: Lies,
    /// How far publication goes.
    pub forced: Forced,
    /// Where forks share.
    pub level: ShareLevel,
    /// What the source is.
    pub source: Source,
    /// Who pins.
    pub pin: PinHolder,
    /// The values that the row varies, as in a record.
    text: String,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Point {
    /// The point with these values, by their places, and the usual ones elsewhere.
    fn of(axes: &[Axis], values: &[usize]) -> Self {
        let at = |axis: Axis| axes.iter().position(|one| *one == axis).map_or(0, |at| values[at]);
        let words =
            axes.iter().zip(values).map(|(axis, at)| format!("{}={}", axis.name(), axis.values()[*at]));
        Self {
            guest: GUESTS[at(Axis::Guest)],
            backing: BACKINGS[at(Axis::Backing)],
            forced: PUBLICATIONS[at(Axis::Publication)],
            level: LEVELS[at(Axis::Level)],
            source: SOURCES[at(Axis::Source)],
            pin: PINS[at(Axis::Pin)],
            text: words.collect::<Vec<_>>().join(" "),
        }
    }

    /// What a world at this point is made of, the rest as in `setup`.
    #[must_use]
    pub fn setup(&self, setup: Setup) -> Setup {
        Setup { is_huge: setup.is_huge && self.backing != Lies::Small, share_level: self.level, ..setup }
    }
}

/// The points of a row with these axes that are `guest`'s, the usual one first: each pair of values,
/// the guest's included, is at some point of one of the guests.
#[must_use]
pub fn points(axes: &[Axis], guest: GuestKind) -> Vec<Point> {
    let axes: Vec<Axis> = [Axis::Guest].iter().chain(axes).copied().collect();
    let sizes: Vec<usize> = axes.iter().map(|axis| axis.values().len()).collect();
    let points = covering(&sizes).into_iter().map(|values| Point::of(&axes, &values));
    points.filter(|point| point.guest == guest).collect()
}

/// A pair of values: (factor, value) twice, the lower factor first.
type Pair = [(usize, usize); 2];

/// Combinations of one value of each factor, given how many values each has (at least one), such that
/// each pair of values of two factors is in one of them. The first ones have a value of the first
/// factor each, and value 0 of all others.
#[must_use]
pub fn covering(sizes: &[usize]) -> Vec<Vec<usize>> {
    let Some(firsts) = sizes.first() else { return Vec::new() };
    let mut left: BTreeSet<Pair> = BTreeSet::new();
    for (low, of_low) in sizes.iter().enumerate() {
        for (high, of_high) in sizes.iter().enumerate().skip(low + 1) {
            left.extend((0..*of_low).flat_map(|a| (0..*of_high).map(move |b| [(low, a), (high, b)])));
        }
    }
    let mut found: Vec<Vec<usize>> = Vec::new();
    let mut add = |combination: Vec<usize>, left: &mut BTreeSet<Pair>| {
        left.retain(|pair| !pair.iter().all(|(factor, value)| combination[*factor] == *value));
        found.push(combination);
    };
    for first in 0..*firsts {
        let mut usual = vec![0; sizes.len()];
        usual[0] = first;
        add(usual, &mut left);
    }
    while let Some(pair) = left.first().copied() {
        add(with_pair(pair, sizes, &left), &mut left);
    }
    found
}

/// A combination with `pair`, and with as many others of `left` as a factor at a time can add.
fn with_pair(pair: Pair, sizes: &[usize], left: &BTreeSet<Pair>) -> Vec<usize> {
    let mut chosen: Vec<Option<usize>> = vec![None; sizes.len()];
    for (factor, value) in pair {
        chosen[factor] = Some(value);
    }
    for factor in 0..sizes.len() {
        if chosen[factor].is_some() {
            continue;
        }
        let gain = |value: usize| {
            let others = chosen.iter().enumerate().filter_map(|(other, set)| set.map(|set| (other, set)));
            others.filter(|other| left.contains(&ordered(*other, (factor, value)))).count()
        };
        // Of equals the first.
        chosen[factor] = (0..sizes[factor]).max_by_key(|value| (gain(*value), sizes[factor] - value));
    }
    chosen.into_iter().flatten().collect()
}

fn ordered(one: (usize, usize), other: (usize, usize)) -> Pair {
    if one.0 < other.0 { [one, other] } else { [other, one] }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first pair that is in none of the combinations.
    fn uncovered(sizes: &[usize], combinations: &[Vec<usize>]) -> Option<Pair> {
        for (low, of_low) in sizes.iter().enumerate() {
            for (high, of_high) in sizes.iter().enumerate().skip(low + 1) {
                for (a, b) in (0..*of_low).flat_map(|a| (0..*of_high).map(move |b| (a, b))) {
                    if !combinations.iter().any(|one| one[low] == a && one[high] == b) {
                        return Some([(low, a), (high, b)]);
                    }
                }
            }
        }
        None
    }

    #[test]
    fn all_pairs_are_covered_and_not_by_the_full_product() {
        for sizes in [&[2, 7, 4, 3, 2, 2][..], &[2], &[2, 3], &[3, 3, 3, 3], &[1, 5, 1], &[6, 2, 6]] {
            let found = covering(sizes);
            assert_eq!(uncovered(sizes, &found), None, "{sizes:?}");
            assert!(found.iter().all(|one| one.iter().zip(sizes).all(|(value, size)| value < size)));
            let two_largest = {
                let mut sorted = sizes.to_vec();
                sorted.sort_unstable();
                sorted.iter().rev().take(2).product::<usize>()
            };
            assert!(found.len() <= two_largest + 8, "{sizes:?}: {} combinations", found.len());
            assert_eq!(found, covering(sizes), "the same at each run");
        }
    }

    #[test]
    fn a_missing_combination_is_noticed() {
        let sizes = [2, 7, 4, 3, 2, 2];
        let found = covering(&sizes);
        // The last one was added for a pair that no other has.
        assert!(uncovered(&sizes, &found[..found.len() - 1]).is_some());
    }

    #[test]
    fn each_guest_begins_with_the_usual_point() {
        for guest in GUESTS {
            let points = points(PINNED, guest);
            let first = &points[0];
            assert_eq!((first.guest, first.backing, first.forced), (guest, Lies::Huge, Forced::Nothing));
            assert_eq!((first.level, first.source, first.pin), (ShareLevel::Root, Source::Root, PINS[0]));
        }
    }

    #[test]
    fn names_and_values_go_together() {
        let counts =
            [GUESTS.len(), BACKINGS.len(), PUBLICATIONS.len(), LEVELS.len(), SOURCES.len(), PINS.len()];
        assert_eq!(Axis::ALL.map(|axis| axis.values().len()), counts);
    }
}
