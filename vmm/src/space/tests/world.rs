//! What all simulated hosts of a colony share: the arena's files, the failures to come, how one waits,
//! and the faults planted to prove that the tests can fail.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::board::Patches;
use crate::frames::CutId;
use crate::space::tests::host::SimHost;
use crate::space::{Keep, Space};
use crate::sync::{self, AtomicU32};
use crate::words::{LEAF_PAGES, LeafNumber};

/// A host that breaks what the rules rely on, to show that the checks find it. Broken rules are
/// [`crate::plants::Plant`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HostPlant {
    /// All is as it should be.
    None,
    /// A protection leaves one page of each leaf open.
    ProtectSkipsAPage,
    /// Protections are laid and never trap: as if no TLB were flushed.
    StoresPassProtection,
    /// A force takes the window's bytes of a page that was pinned at the cut.
    ForceReadsTheWindow,
    /// A block shows only its first half, as after a short write that nobody noticed.
    HalfABlock,
    /// The sweep punches a block that is in use.
    SweepFreesTooMuch,
    /// Discarded pages keep their bytes.
    DiscardForgets,
    /// A patch goes to the page beside its own.
    PatchAstray,
    /// A reset leaves the bytes of pages as they are.
    ResetForgets,
    /// The host moves a page that a device holds.
    MovesHeldPages,
    /// A page is copied to another place when its protection goes.
    CopiesWhatIsOpened,
    /// A page that was moved has lost its bytes.
    MoveForgets,
}

/// The calls that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Call {
    MapAnonymous,
    MapBlock,
    Register,
    Unregister,
    Protect,
    Unprotect,
    Scan,
    Populate,
    Zero,
    PublishBlock,
    PublishPatches,
    Restore,
}

/// One failure to come: the call of this kind after so many of them.
#[derive(Clone, Copy, Debug)]
struct Failure {
    call: Call,
    after: u32,
}

/// The files of one cut.
#[derive(Default)]
pub(super) struct CutFile {
    pub(super) blocks: BTreeMap<LeafNumber, Arc<[u64]>>,
    pub(super) punched: BTreeSet<LeafNumber>,
    pub(super) patches: BTreeMap<u32, u64>,
}

pub(super) type Files = BTreeMap<CutId, CutFile>;

pub(super) struct World {
    pub(super) plant: HostPlant,
    next_frame: AtomicU64,
    waits: Waits,
    files: Mutex<Files>,
    spaces: Mutex<Vec<Weak<Space<SimHost>>>>,
    failure: Mutex<Option<Failure>>,
    fired: Mutex<Vec<Call>>,
    keep: Mutex<Keep>,
}

/// How one waits for a word.
pub(super) enum Waits {
    /// There is one thread: whoever is waited for does now what he is asked for.
    Serves,
    /// By looking again and again, as if each wait came to the end of its time.
    Looks,
    /// Until it is woken, and never less long: a wake-up that is missing is found.
    Sleeps(Box<Futexes>),
}

/// The sleepers of all words: the numbers of wake-ups, by address.
#[derive(Default)]
pub(super) struct Futexes {
    wakes: shuttle::sync::Mutex<BTreeMap<usize, u64>>,
    changed: shuttle::sync::Condvar,
}

impl Futexes {
    /// Sleeps while `word` is `value`, as the kernel does: it looks under the lock that wakers take.
    pub(super) fn wait(&self, word: &AtomicU32, value: u32) {
        let at = std::ptr::from_ref(word).addr();
        let wakes_of = |wakes: &BTreeMap<usize, u64>| wakes.get(&at).copied().unwrap_or(0);
        let wakes = self.wakes.lock().unwrap_or_else(PoisonError::into_inner);
        if sync::plain(word).load(Ordering::Acquire) == value {
            let before = wakes_of(&wakes);
            let woken = self.changed.wait_while(wakes, |wakes| wakes_of(wakes) == before);
            drop(woken.unwrap_or_else(PoisonError::into_inner));
        }
    }

    pub(super) fn wake(&self, word: &AtomicU32) {
        let at = std::ptr::from_ref(word).addr();
        *self.wakes.lock().unwrap_or_else(PoisonError::into_inner).entry(at).or_default() += 1;
        self.changed.notify_all();
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    /// The world of one thread.
    pub(super) fn new(plant: HostPlant) -> Arc<Self> {
        Self::with(plant, Waits::Serves)
    }

    /// The world of threads that shuttle runs.
    pub(super) fn of_threads(waits: Waits) -> Arc<Self> {
        Self::with(HostPlant::None, waits)
    }

    /// How one waits in it.
    pub(super) fn waits(&self) -> &Waits {
        &self.waits
    }

    fn with(plant: HostPlant, waits: Waits) -> Arc<Self> {
        Arc::new(Self {
            plant,
            next_frame: AtomicU64::new(1),
            waits,
            files: Mutex::default(),
            spaces: Mutex::default(),
            failure: Mutex::default(),
            fired: Mutex::default(),
            keep: Mutex::new(Keep::Own),
        })
    }

    /// A host page that is nobody's.
    pub(super) fn new_frame(&self) -> u64 {
        self.next_frame.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn files(&self) -> MutexGuard<'_, Files> {
        locked(&self.files)
    }

    pub(super) fn add_space(&self, space: &Arc<Space<SimHost>>) {
        let mut spaces = locked(&self.spaces);
        spaces.retain(|space| space.strong_count() > 0);
        spaces.push(Arc::downgrade(space));
    }

    pub(super) fn set_keep(&self, keep: Keep) {
        *locked(&self.keep) = keep;
    }

    /// Every source answers what it has been asked, as its threads would.
    pub(super) fn serve_all(&self) {
        let keep = *locked(&self.keep);
        let spaces: Vec<_> = locked(&self.spaces).iter().filter_map(Weak::upgrade).collect();
        for space in spaces {
            if let Err(error) = space.serve_requests(keep) {
                assert!(!self.fired().is_empty(), "a request failed: {error}");
            }
        }
    }

    pub(super) fn arm(&self, call: Call, after: u32) {
        *locked(&self.failure) = Some(Failure { call, after });
    }

    pub(super) fn disarm(&self) {
        *locked(&self.failure) = None;
    }

    /// Whether this call is the one that fails.
    pub(super) fn fails(&self, call: Call) -> bool {
        let mut failure = locked(&self.failure);
        match &mut *failure {
            Some(next) if next.call == call && next.after == 0 => {
                locked(&self.fired).push(call);
                *failure = None;
                true
            }
            Some(next) if next.call == call => {
                next.after -= 1;
                false
            }
            _ => false,
        }
    }

    /// The calls that failed so far.
    pub(super) fn fired(&self) -> Vec<Call> {
        locked(&self.fired).clone()
    }

    /// Punches a block. It must be there, and nobody may map it: the caller has looked.
    pub(super) fn punch_block(&self, cut: CutId, leaf: LeafNumber) {
        let mut files = self.files();
        let file = files.get_mut(&cut).expect("a block is punched before its file is removed");
        // A block named by a word and never written does not exist; one is written once.
        assert!(file.blocks.remove(&leaf).is_some(), "{cut} {leaf}: freed twice, or never written");
        file.punched.insert(leaf);
    }

    pub(super) fn punch_patches(&self, cut: CutId, patches: &Patches) {
        let mut files = self.files();
        let file = files.get_mut(&cut).expect("patches are punched before their file is removed");
        for frame in (patches.first_frame..).take(patches.pages.len()) {
            assert!(file.patches.remove(&frame).is_some(), "{cut}: patch {frame} freed twice");
        }
    }

    /// The block of a leaf as a window sees it.
    pub(super) fn block(&self, cut: CutId, leaf: LeafNumber) -> Arc<[u64]> {
        let files = self.files();
        let file = files.get(&cut).unwrap_or_else(|| panic!("{cut}: its file is gone and still in use"));
        match file.blocks.get(&leaf) {
            Some(block) => block.clone(),
            None => {
                assert!(!file.punched.contains(&leaf), "{cut} {leaf}: punched and still in use");
                panic!("{cut} {leaf}: never written and in use")
            }
        }
    }

    pub(super) fn write_block(&self, cut: CutId, leaf: LeafNumber, mut pages: Vec<u64>) {
        assert!(pages.len() == LEAF_PAGES);
        if self.plant == HostPlant::HalfABlock {
            pages[LEAF_PAGES / 2..].fill(0);
        }
        let mut files = self.files();
        let file = files.get_mut(&cut).expect("a source writes files that exist");
        assert!(!file.punched.contains(&leaf), "{cut} {leaf}: written after it was punched");
        assert!(file.blocks.insert(leaf, pages.into()).is_none(), "{cut} {leaf}: written twice");
    }

    pub(super) fn write_patch(&self, cut: CutId, frame: u32, value: u64) {
        let mut files = self.files();
        let file = files.get_mut(&cut).expect("a source writes files that exist");
        assert!(file.patches.insert(frame, value).is_none(), "{cut}: patch {frame} written twice");
    }

    pub(super) fn patch(&self, cut: CutId, frame: u32) -> u64 {
        let files = self.files();
        let value = files.get(&cut).and_then(|file| file.patches.get(&frame));
        *value.unwrap_or_else(|| panic!("{cut}: patch {frame} is in use and not there"))
    }
}
