//! Those who use the pool, in many orders of their steps; and with each fault planted that is said beside a
//! scenario, it does not hold. How that is done: `space::tests::races`.

use std::sync::atomic::Ordering;

use shuttle::thread::spawn;

use super::*;
use crate::space::tests::races::races;
use crate::sync::AtomicU32;

/// A member without a process.
#[derive(Clone)]
struct Sim {
    place: u32,
    is_alive: Arc<AtomicU32>,
}

impl Shell for Sim {
    fn is_alive(&self) -> bool {
        self.is_alive.load(Ordering::Acquire) == 1
    }

    fn place(&self) -> u32 {
        self.place
    }
}

/// Why there is none: all places are taken.
#[derive(Debug, PartialEq, Eq)]
struct Full;

const LIMIT: Duration = Duration::MAX;

/// A pool with a world around it.
struct Scene {
    pool: Pool<Sim>,
    /// Members that were made and have not died, by place.
    living: Mutex<BTreeSet<u32>>,
    /// What was taken and not given back.
    taken: Mutex<BTreeSet<u32>>,
    places: u32,
}

impl Scene {
    fn new(size: usize, places: u32) -> Arc<Self> {
        let (living, taken) = (Mutex::default(), Mutex::default());
        Arc::new(Self { pool: Pool::new(size, places), living, taken, places })
    }

    fn make(&self) -> Result<Sim, Full> {
        let place = self.pool.claim().ok_or(Full)?;
        let is_new = self.living.lock().expect("no panic").insert(place);
        assert!(is_new, "two members at place {place}");
        Ok(Sim { place, is_alive: Arc::new(AtomicU32::new(1)) })
    }

    fn fill(&self) {
        // All places may be taken for a moment: that is no fault of whoever fills.
        let _ = self.pool.fill(|| false, || self.make());
    }

    fn take(&self) -> Result<Sim, Full> {
        let shell = self.pool.take_or_make(|| self.make(), |Full| true, LIMIT)?;
        let is_new = self.taken.lock().expect("no panic").insert(shell.place);
        assert!(is_new, "the member at place {} is handed out twice", shell.place);
        Ok(shell)
    }

    /// Who is returned dies.
    fn give_back(&self, shell: Sim) {
        self.taken.lock().expect("no panic").remove(&shell.place);
        self.pool.give_back(shell).iter().for_each(|shell| self.kill(shell));
    }

    /// A process ends, once, and that is booked.
    fn kill(&self, shell: &Sim) {
        if shell.is_alive.swap(0, Ordering::AcqRel) == 0 {
            return;
        }
        self.living.lock().expect("no panic").remove(&shell.place);
        self.taken.lock().expect("no panic").remove(&shell.place);
        self.pool.bury(shell.place);
    }

    /// At rest: each place is in one state, and no member is lost or dead in the pool.
    fn check(&self) {
        let (living, taken) = (self.living.lock().expect("no panic"), self.taken.lock().expect("no panic"));
        let books = self.pool.lock();
        assert_eq!(books.growing, 0, "members that nobody makes");
        assert!(books.ready.iter().all(Shell::is_alive), "a dead member is ready");
        let ready: BTreeSet<_> = books.ready.iter().map(Shell::place).collect();
        assert_eq!(ready.len(), books.ready.len(), "a member is ready twice");
        let known: BTreeSet<_> = ready.union(&taken).copied().collect();
        assert_eq!(known.len(), ready.len() + taken.len(), "a member is ready, and is taken");
        assert_eq!(known, *living, "a member is lost, or one is there that nobody made");
        let free: BTreeSet<_> = (0..self.places).filter(|place| !living.contains(place)).collect();
        assert_eq!(free, books.free, "places");
    }
}

/// Two take while the pool is filled, and one gives back what it took.
fn takers_against_filler() {
    let scene = Scene::new(1, 5);
    scene.fill();
    let threads = [false, true].map(|gives_back| {
        let scene = scene.clone();
        spawn(move || {
            let shell = scene.take().expect("there are places");
            if gives_back {
                scene.give_back(shell);
            }
        })
    });
    let filler = spawn({
        let scene = scene.clone();
        move || scene.fill()
    });
    threads.into_iter().chain([filler]).for_each(|thread| thread.join().expect("no panic"));
    scene.check();
    scene.fill();
    assert!(scene.pool.await_full(LIMIT));
    scene.check();
    assert_eq!(scene.pool.drain().len(), 1);
}

/// The last place is that of a member that is being made for the pool: whoever wants one waits for it, and
/// is refused only where none comes.
fn the_last_place() {
    let scene = Scene::new(1, 1);
    let filler = spawn({
        let scene = scene.clone();
        move || scene.fill()
    });
    let taken = scene.take();
    filler.join().expect("no panic");
    assert!(taken.is_ok(), "refused beside a member that comes");
    scene.check();
    assert_eq!(scene.take().err(), Some(Full));
}

/// Members die where they are: while they are made, in the pool, and when they are taken.
fn deaths_in_the_pool() {
    let scene = Scene::new(2, 3);
    let unborn = Arc::new(Mutex::new(Vec::new()));
    let filler = spawn({
        let (scene, unborn) = (scene.clone(), unborn.clone());
        move || {
            let make = || {
                let shell = scene.make()?;
                unborn.lock().expect("no panic").push(shell.clone());
                Ok::<_, Full>(shell)
            };
            // As in `Scene::fill`.
            let _ = scene.pool.fill(|| false, make);
        }
    });
    let killer = spawn({
        let (scene, unborn) = (scene.clone(), unborn.clone());
        move || {
            let victim = unborn.lock().expect("no panic").pop();
            victim.iter().for_each(|victim| scene.kill(victim));
        }
    });
    let taker = spawn({
        let scene = scene.clone();
        move || scene.pool.take(1).iter().for_each(|shell| scene.kill(shell))
    });
    [filler, killer, taker].into_iter().for_each(|thread| thread.join().expect("no panic"));
    scene.check();
}

races! {
    two_take_while_it_is_filled: takers_against_filler, [PoolHandsOutTwice, PoolLosesMember];
    who_finds_no_place_waits: the_last_place, [PoolTellsNobody, PoolOverlooksReady];
    members_die_in_it: deaths_in_the_pool, [PoolKeepsDead];
}

#[test]
fn every_fault_of_the_pool_is_planted() {
    assert_eq!(*PLANTED, Plant::OF_THE_POOL);
}
