//! What is done to whom: decisions that a seed makes, and nothing else.
//!
//! A decision depends on the seed and on which VMs there are, so the same seed repeats a run as far as
//! events let it: a VM that dies of a loss a moment earlier is not there to be chosen.

use std::time::Duration;

use crate::family::VmId;

/// Numbers that a seed decides (splitmix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The numbers of `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Draws a number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.draw() % limit
    }

    /// Whether a thing happens that happens in `percent` of 100 cases.
    pub fn is_in(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// A moment at most `limit` away, mostly a near one.
    fn moment(&mut self, limit: Duration) -> Duration {
        let limit_us = u64::try_from(limit.as_micros()).unwrap_or(u64::MAX) >> self.below(8);
        Duration::from_micros(self.below(limit_us.max(1)))
    }
}

/// What a VM looks like to whoever decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// Its name.
    pub vm: VmId,
    /// What it is.
    pub kind: Kind,
}

/// What can be done to a VM follows from this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A root that runs: it has no cut to return to.
    Root,
    /// A clone that runs.
    Clone,
    /// A paused VM.
    Paused {
        /// Whether it is a clone.
        is_clone: bool,
    },
    /// One that has ended, whose process others may still need: it can only be killed.
    Image,
}

/// Something that is done to one VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// It works, for about so long.
    Work(Duration),
    /// It is forked, and perhaps killed so long after that began.
    Fork {
        /// How many clones.
        clones: usize,
        /// When its process is killed.
        kill_after: Option<Duration>,
    },
    /// It returns to its cut.
    Reset,
    /// It is stopped.
    Pause,
    /// It goes on.
    Resume,
    /// Its process is killed, so long after the round began.
    Kill(Duration),
    /// It verifies all that it has written and transferred, and ends.
    Verify,
    /// It ends as it is.
    End,
}

/// VMs that something is done to at the same time.
const AT_ONCE: u64 = 3;
/// The most clones of one fork.
const CLONES: u64 = 3;
/// Forks and deaths that meet other events do so within this time.
const MEETING: Duration = Duration::from_millis(20);
/// The longest rest.
const REST: Duration = Duration::from_millis(50);

/// What is done next, at the same time, each to another VM. `most` VMs may be alive.
pub fn decide(random: &mut Random, views: &[View], most: usize) -> Vec<(VmId, Act)> {
    let mut left = views.to_vec();
    let mut alive = views.iter().filter(|view| view.kind != Kind::Image).count();
    let mut acts = Vec::new();
    for _ in 0..=random.below(AT_ONCE) {
        if left.is_empty() {
            break;
        }
        let at = random.below(crate::words::wide(left.len()));
        let View { vm, kind } = left.swap_remove(crate::words::index(at));
        let act = act(random, kind, most.saturating_sub(alive));
        match act {
            Act::Fork { clones, .. } => alive += clones,
            // Never all of them at once: whoever is left is the next one's source.
            Act::Kill(_) | Act::End | Act::Verify if kind != Kind::Image => {
                if alive <= 1 {
                    acts.push((vm, Act::Work(random.moment(REST))));
                    continue;
                }
                alive -= 1;
            }
            _ => {}
        }
        acts.push((vm, act));
    }
    acts
}

fn act(random: &mut Random, kind: Kind, room: usize) -> Act {
    let is_clone = matches!(kind, Kind::Clone | Kind::Paused { is_clone: true });
    let is_paused = matches!(kind, Kind::Paused { .. });
    match random.below(100) {
        _ if kind == Kind::Image => Act::Kill(random.moment(MEETING)),
        0..40 if room > 0 => {
            let clones = 1 + random.below(CLONES.min(crate::words::wide(room)));
            let kill_after = random.is_in(15).then(|| random.moment(MEETING));
            Act::Fork { clones: crate::words::index(clones), kill_after }
        }
        40..58 if is_clone => Act::Reset,
        58..68 if is_paused => Act::Resume,
        58..68 => Act::Pause,
        68..80 => Act::Kill(random.moment(MEETING)),
        80..86 => Act::Verify,
        86..90 => Act::End,
        _ => Act::Work(random.moment(REST)),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Plays a family that obeys: forks succeed, kills kill, images last one round.
    fn play(seed: u64, rounds: usize, most: usize) -> Vec<Vec<(VmId, Act)>> {
        let mut random = Random::new(seed);
        let mut views = vec![View { vm: VmId(1), kind: Kind::Root }];
        let mut next = 2;
        let mut played = Vec::new();
        for _ in 0..rounds {
            let acts = decide(&mut random, &views, most);
            for (vm, act) in &acts {
                let at = views.iter().position(|view| view.vm == *vm).expect("one of them");
                match act {
                    Act::Fork { clones, .. } => {
                        for _ in 0..*clones {
                            views.push(View { vm: VmId(next), kind: Kind::Clone });
                            next += 1;
                        }
                    }
                    Act::Kill(_) | Act::Verify => drop(views.remove(at)),
                    Act::End => views[at].kind = Kind::Image,
                    Act::Pause => {
                        views[at].kind = Kind::Paused { is_clone: views[at].kind == Kind::Clone };
                    }
                    Act::Resume => {
                        let is_clone = views[at].kind == Kind::Paused { is_clone: true };
                        views[at].kind = if is_clone { Kind::Clone } else { Kind::Root };
                    }
                    Act::Work(_) | Act::Reset => {}
                }
            }
            let living = views.iter().filter(|view| view.kind != Kind::Image).count();
            assert!((1..=most).contains(&living), "{living} vms live: {acts:?}");
            played.push(acts);
        }
        played
    }

    #[test]
    fn a_seed_repeats_its_decisions() {
        assert_eq!(play(7, 500, 6), play(7, 500, 6));
        assert_ne!(play(7, 500, 6), play(8, 500, 6));
    }

    #[test]
    fn everything_happens_to_everybody() {
        let acts: Vec<_> = play(1, 2000, 6).concat();
        let names: BTreeSet<_> = acts.iter().map(|(_, act)| std::mem::discriminant(act)).map(hash).collect();
        assert_eq!(names.len(), 8, "acts of one run");
        let kills_in_forks =
            acts.iter().filter(|(_, act)| matches!(act, Act::Fork { kill_after: Some(_), .. })).count();
        assert!(kills_in_forks > 50, "{kills_in_forks} kills in forks");
        for round in play(2, 2000, 4) {
            let whom: BTreeSet<_> = round.iter().map(|(vm, _)| *vm).collect();
            assert_eq!(whom.len(), round.len(), "twice in one round: {round:?}");
        }
    }

    fn hash(what: impl std::hash::Hash) -> u64 {
        use std::hash::{DefaultHasher, Hasher as _};
        let mut hasher = DefaultHasher::new();
        what.hash(&mut hasher);
        hasher.finish()
    }
}
