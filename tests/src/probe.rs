//! What the host's kernel says of a member, whatever the member says itself.

use std::fs;

use salp::family::VmId;
use salp::space::PageStates;
use salp::window::Pagemap;
use salp::words::{Gfn, LeafNumber, wide};

use crate::world::World;

/// What a process has that could leak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Mappings.
    pub mappings: usize,
}

impl Holdings {
    /// Those of a process; none of them can be counted after its end.
    #[must_use]
    pub fn of(process: u32) -> Self {
        let count = |what: &str| fs::read_dir(format!("/proc/{process}/{what}")).map_or(0, Iterator::count);
        let maps = fs::read_to_string(format!("/proc/{process}/maps")).unwrap_or_default();
        Self { descriptors: count("fd"), threads: count("task"), mappings: maps.lines().count() }
    }

    /// Whether these are not more than `base`, but for some mappings; threads are the caller's to compare.
    #[must_use]
    pub fn is_within(&self, base: &Self, more_mappings: usize) -> bool {
        self.descriptors <= base.descriptors && self.mappings <= base.mappings + more_mappings
    }

    /// Those of this process.
    #[must_use]
    pub fn own() -> Self {
        Self::of(std::process::id())
    }
}

impl World {
    fn pagemap(&self, vm: VmId) -> Pagemap {
        Pagemap::open_of(self.member(vm).process()).expect("the pagemap of a member")
    }

    /// Host frame numbers of pages of a VM; 0 where none is mapped. None where the host does not show
    /// them to this user.
    #[must_use]
    pub fn frames(&self, vm: VmId, gfns: &[Gfn]) -> Option<Vec<u64>> {
        let pagemap = self.pagemap(vm);
        let window = self.describe(vm).window;
        let frame = |gfn: &Gfn| pagemap.frame_number_at(window + gfn.gpa().0).expect("a pagemap entry");
        let frames: Vec<u64> = gfns.iter().map(frame).collect();
        let is_shown = frames.iter().any(|frame| *frame != 0);
        if !is_shown {
            println!("SKIPPED: frame numbers of {vm}: the host does not show them, or nothing is mapped");
        }
        is_shown.then_some(frames)
    }

    /// The anonymous pages of a VM's window, by leaf, as its host's kernel counts them.
    #[must_use]
    pub fn anonymous(&self, vm: VmId) -> Vec<(LeafNumber, PageStates)> {
        let window = self.describe(vm).window;
        let len_bytes = self.colony.config().memory.span_bytes();
        let pagemap = self.pagemap(vm);
        pagemap.scan_leaves(window, window..window + len_bytes).expect("a scan of a member's window")
    }

    /// How many they are.
    #[must_use]
    pub fn anonymous_pages(&self, vm: VmId) -> u64 {
        self.anonymous(vm).iter().map(|(_, states)| wide(states.anonymous.len())).sum()
    }
}
