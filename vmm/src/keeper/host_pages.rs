//! Which host pages VMs have: own ones are nobody else's, those of one block are one page, pinned ones are
//! exclusive.

use std::collections::HashMap;
use std::io;

use super::ColonyError;
use super::checker::{CheckFault, Checked};
use crate::family::VmId;
use crate::frames::CutId;
use crate::space::{Backing, LeafReport, SpaceReport};
use crate::window::Pagemap;
use crate::words::{Gfn, LEAF_PAGES, LeafNumber};

/// A VM's window, whose host pages can be looked at from here.
pub(super) struct Watched {
    vm: VmId,
    window: u64,
    pagemap: Pagemap,
}

impl Watched {
    /// Of a VM, its process, and the address of its window there.
    ///
    /// # Errors
    /// The host does not let this process look.
    pub(super) fn new(vm: VmId, process: u32, window: u64) -> io::Result<Self> {
        Ok(Self { vm, window, pagemap: Pagemap::open_of(process)? })
    }

    /// The host frame numbers of a leaf's pages; 0 where there is none, or the host does not show it.
    fn frames(&self, leaf: LeafNumber) -> io::Result<Vec<u64>> {
        self.pagemap.frame_numbers(self.window + leaf.gpa().0, LEAF_PAGES)
    }

    fn frame(&self, gfn: Gfn) -> io::Result<u64> {
        self.pagemap.frame_number_at(self.window + gfn.gpa().0)
    }
}

/// Compares host frame numbers of all VMs, as far as the host shows them. No VM runs, but the host may
/// move pages at any time (compaction, swap), so that what does not add up is looked at again.
///
/// # Errors
/// What does not add up, or a process that cannot be looked at.
pub(super) fn compare(windows: &[(Watched, &SpaceReport)], checked: &mut Checked) -> Result<(), ColonyError> {
    let mut own: HashMap<u64, (&Watched, Gfn)> = HashMap::new();
    let mut shared: HashMap<(CutId, LeafNumber, usize), (&Watched, u64)> = HashMap::new();
    for (watched, report) in windows {
        let vm = watched.vm;
        for leaf in &report.leaves {
            if leaf.backing == Backing::Trapped || leaf.backing == Backing::Lost {
                continue;
            }
            check_pins(vm, leaf)?;
            let frames = watched.frames(leaf.leaf)?;
            for (position, frame) in frames.into_iter().enumerate().filter(|(_, frame)| *frame != 0) {
                let gfn = leaf.leaf.gfn(position);
                checked.pages_compared += 1;
                if leaf.exclusive.contains(position) || leaf.lent.contains(position) {
                    if let Some((other, other_gfn)) = own.insert(frame, (watched, gfn)) {
                        if is_one_page(|| watched.frame(gfn), || other.frame(other_gfn))? == Some(true) {
                            return Err(CheckFault::SamePage { vm, gfn, other: other.vm, other_gfn }.into());
                        }
                        checked.pages_moved += 1;
                    }
                } else if let Backing::Block(cut) = leaf.backing {
                    let (other, first) =
                        *shared.entry((cut, leaf.leaf, position)).or_insert((watched, frame));
                    if first != frame {
                        if is_one_page(|| watched.frame(gfn), || other.frame(gfn))? == Some(false) {
                            return Err(CheckFault::NotShared { vm, gfn }.into());
                        }
                        checked.pages_moved += 1;
                    }
                }
            }
        }
    }
    Ok(())
}

/// How often two pages are looked at that the host moves meanwhile.
const LOOKS: usize = 16;

/// Whether two are the same host page: one is looked at before and after the other. None where one of
/// them is in no memory now, or neither stands still.
fn is_one_page(
    mut one: impl FnMut() -> io::Result<u64>,
    mut other: impl FnMut() -> io::Result<u64>,
) -> io::Result<Option<bool>> {
    for _ in 0..LOOKS {
        let (before, between, after) = (one()?, other()?, one()?);
        if before == after && before != 0 && between != 0 {
            return Ok(Some(before == between));
        }
    }
    Ok(None)
}

fn check_pins(vm: VmId, leaf: &LeafReport) -> Result<(), CheckFault> {
    match leaf.pinned.minus(&leaf.exclusive).iter().next() {
        Some(position) => Err(CheckFault::PinnedNotExclusive { vm, gfn: leaf.leaf.gfn(position) }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::ipc::SharedMemory;
    use crate::words::{LEAF_BYTES, PAGE_BYTES, PageSet};

    /// A leaf of memory, written at its first two pages; it and what else maps it are two windows.
    fn leaf_mapped_twice() -> [SharedMemory; 2] {
        let here = SharedMemory::create("host-pages-test", LEAF_BYTES).expect("create");
        let there = SharedMemory::from_fd(here.fd().try_clone_to_owned().expect("dup")).expect("map");
        for memory in [&here, &there] {
            for position in 0..2 {
                memory.words_u64(position * PAGE_BYTES, 1).expect("in range")[0].store(1, Ordering::Relaxed);
            }
        }
        [here, there]
    }

    /// What the checker says of these windows of this process.
    fn judge<const N: usize>(windows: [(&SharedMemory, LeafReport); N]) -> Result<Checked, ColonyError> {
        let reports = windows
            .each_ref()
            .map(|(_, leaf)| SpaceReport { leaves: vec![leaf.clone()], ..SpaceReport::default() });
        let watched = windows.iter().zip(&reports).enumerate().map(|(number, ((memory, _), report))| {
            let window = memory.words_u64(0, 1).expect("in range")[0].as_ptr() as u64;
            let vm = VmId(u32::try_from(number).expect("few") + 1);
            (Watched::new(vm, std::process::id(), window).expect("this process"), report)
        });
        let mut checked = Checked::default();
        compare(&watched.collect::<Vec<_>>(), &mut checked).map(|()| checked)
    }

    fn leaf(backing: Backing, exclusive: &[usize], pinned: &[usize]) -> LeafReport {
        let [exclusive, pinned] = [exclusive, pinned].map(|positions| {
            let mut pages = PageSet::default();
            positions.iter().for_each(|position| pages.insert(*position));
            pages
        });
        let pins = u32::try_from(pinned.len()).expect("few");
        LeafReport { leaf: LeafNumber(0), backing, exclusive, lent: PageSet::default(), pinned, pins }
    }

    /// Whether this host shows frame numbers to this process; if not, says so.
    fn shows_frames(test: &str, memory: &SharedMemory) -> bool {
        let pagemap = Pagemap::open_of(std::process::id()).expect("this process");
        let address = memory.words_u64(0, 1).expect("in range")[0].as_ptr() as u64;
        let is_shown = pagemap.frame_number_at(address).expect("a look") != 0;
        if !is_shown {
            println!("SKIPPED: {test} needs CAP_SYS_ADMIN: the host does not show its frames' numbers");
        }
        is_shown
    }

    #[test]
    fn one_page_that_two_vms_call_their_own_is_found() {
        let [here, there] = leaf_mapped_twice();
        if !shows_frames("one_page_that_two_vms_call_their_own_is_found", &here) {
            return;
        }
        let own = |position| leaf(Backing::Anonymous, &[position], &[]);
        let fault = judge([(&here, own(1)), (&there, own(1))]).expect_err("it is one page");
        assert_eq!(
            fault.to_string(),
            "the checker found: gfn 0x1 of vm 2 and gfn 0x1 of vm 1 are the same host page"
        );
        let checked = judge([(&here, own(0)), (&there, own(1))]).expect("two pages");
        assert_eq!((checked.pages_compared, checked.pages_moved), (4, 0));
    }

    #[test]
    fn two_pages_that_should_be_one_of_a_block_are_found() {
        let ([here, there], [other, _]) = (leaf_mapped_twice(), leaf_mapped_twice());
        if !shows_frames("two_pages_that_should_be_one_of_a_block_are_found", &here) {
            return;
        }
        let block = Backing::Block(CutId::new(3).expect("a cut"));
        let shared = || leaf(block, &[], &[]);
        judge([(&here, shared()), (&there, shared())]).expect("one page");
        let fault = judge([(&here, shared()), (&other, shared())]).expect_err("two pages");
        assert_eq!(
            fault.to_string(),
            "the checker found: gfn 0x0 of vm 2 is not the page of its block that others map"
        );
        // Its own pages may be others.
        judge([(&here, shared()), (&other, leaf(block, &[0, 1], &[]))]).expect("own pages");
    }

    #[test]
    fn a_pinned_page_that_is_not_exclusive_is_found() {
        let [here, _] = leaf_mapped_twice();
        judge([(&here, leaf(Backing::Anonymous, &[0], &[0]))]).expect("it is exclusive");
        let fault = judge([(&here, leaf(Backing::Anonymous, &[0], &[0, 1]))]).expect_err("one is not");
        assert_eq!(fault.to_string(), "the checker found: gfn 0x1 of vm 1 is pinned and not exclusive");
    }

    fn looks<const N: usize>(frames: [u64; N]) -> impl FnMut() -> io::Result<u64> {
        let mut frames = frames.into_iter();
        move || frames.next().ok_or_else(|| io::Error::other("one look too many"))
    }

    #[test]
    fn pages_that_the_host_moves_are_looked_at_until_they_stand_still() {
        let judge = |one, other| is_one_page(looks::<4>(one), looks::<2>(other)).expect("enough looks");
        assert_eq!(judge([7, 7, 0, 0], [7, 0]), Some(true));
        assert_eq!(judge([7, 7, 0, 0], [8, 0]), Some(false));
        // The first was 7 once, and the second is now.
        assert_eq!(judge([7, 9, 9, 9], [7, 7]), Some(false));
        assert_eq!(judge([7, 9, 9, 9], [7, 9]), Some(true));
        // Both in swap at the first look.
        assert_eq!(judge([0, 0, 9, 9], [0, 8]), Some(false));
    }

    #[test]
    fn pages_that_are_in_no_memory_are_not_judged() {
        assert_eq!(is_one_page(|| Ok(0), || Ok(0)).expect("looks"), None);
        assert_eq!(is_one_page(|| Ok(7), || Ok(0)).expect("looks"), None);
    }
}
