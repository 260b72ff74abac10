//! Failure injection: fallible steps have a name, and can be made to fail.
//!
//! A [`point`] stands right before a step that the host may refuse: an ioctl, a mapping, a file, a
//! message, an allocation of some size. In a release build it is nothing. In a debug build it is one
//! relaxed load, until somebody watches: then it is counted, and fails once, at the hit that was
//! asked for. So a test can run an operation, learn which points it reaches, and run it again for
//! each of them with that one failing.
//!
//! | whose points | watched by |
//! |---|---|
//! | of the whole process | [`watch`] until [`take`]; in a member by order of its keeper |
//! | of one thread | [`watch_here`]: tests of one process beside each other |
//!
//! A point's name says where it is and what fails there, and is used once in the tree.
//!
//! Known hole: a point fails *instead* of its step. A step that fails half way is to be argued where
//! it is.

use std::io;

#[cfg(debug_assertions)]
use std::cell::RefCell;
#[cfg(debug_assertions)]
use std::collections::BTreeMap;
#[cfg(debug_assertions)]
use std::sync::atomic::{AtomicU32, Ordering};
#[cfg(debug_assertions)]
use std::sync::{Mutex, MutexGuard, PoisonError};

use thiserror::Error;

/// The failure of a point that was armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("injected failure at {0}")]
pub struct Injected(&'static str);

impl From<Injected> for io::Error {
    fn from(injected: Injected) -> Self {
        Self::other(injected)
    }
}

/// The step that follows may fail here.
///
/// # Errors
/// The point is armed, and this is the hit that is to fail.
#[inline]
#[cfg_attr(not(debug_assertions), expect(unused_variables, reason = "a release build has no points"))]
pub fn point(name: &'static str) -> Result<(), Injected> {
    #[cfg(debug_assertions)]
    // Relaxed: whoever watches does so before he gives the order whose steps he wants to see.
    if WATCHERS.load(Ordering::Relaxed) != 0 {
        return hit(name);
    }
    Ok(())
}

/// Which point is to fail, and when.
#[cfg(debug_assertions)]
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Armed {
    /// Its name.
    pub point: String,
    /// It fails at this hit, from 1, and at no other.
    pub hit: u64,
}

/// An order to a process about its watch.
#[cfg(debug_assertions)]
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Watching {
    /// Count from now on, and have a point fail.
    Begin(Option<Armed>),
    /// Say what was reached, and count no more.
    End,
}

#[cfg(debug_assertions)]
impl Watching {
    /// Does so. Nothing was reached where it begins.
    #[must_use]
    pub fn obey(self) -> Reached {
        match self {
            Self::Begin(armed) => {
                watch(armed);
                Reached::default()
            }
            Self::End => take(),
        }
    }
}

/// What was reached while somebody watched.
#[cfg(debug_assertions)]
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Reached {
    /// How often each point was.
    pub points: BTreeMap<String, u64>,
    /// The armed point has failed.
    pub has_failed: bool,
}

/// A watch that is on.
#[cfg(debug_assertions)]
#[derive(Debug, Default)]
struct Watch {
    points: BTreeMap<&'static str, u64>,
    armed: Option<Armed>,
    has_failed: bool,
}

/// The process's watch counts as one, each thread's as one.
#[cfg(debug_assertions)]
static WATCHERS: AtomicU32 = AtomicU32::new(0);
#[cfg(debug_assertions)]
static PROCESS: Mutex<Option<Watch>> = Mutex::new(None);

#[cfg(debug_assertions)]
thread_local! {
    static THREAD: RefCell<Option<Watch>> = const { RefCell::new(None) };
}

#[cfg(debug_assertions)]
impl Watch {
    fn new(armed: Option<Armed>) -> Self {
        Self { armed, ..Self::default() }
    }

    fn hit(&mut self, name: &'static str) -> Result<(), Injected> {
        let count = self.points.entry(name).or_default();
        *count += 1;
        if self.armed.as_ref().is_some_and(|armed| armed.point == name && armed.hit == *count) {
            self.has_failed = true;
            return Err(Injected(name));
        }
        Ok(())
    }

    fn into_reached(self) -> Reached {
        let points = self.points.into_iter().map(|(name, count)| (name.to_owned(), count)).collect();
        Reached { points, has_failed: self.has_failed }
    }
}

#[cfg(debug_assertions)]
fn process() -> MutexGuard<'static, Option<Watch>> {
    PROCESS.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(debug_assertions)]
#[cold]
fn hit(name: &'static str) -> Result<(), Injected> {
    // A thread that is being torn down has no watch of its own any more.
    let own = THREAD.try_with(|watch| watch.borrow_mut().as_mut().map(|watch| watch.hit(name)));
    match own {
        Ok(Some(result)) => result,
        _ => process().as_mut().map_or(Ok(()), |watch| watch.hit(name)),
    }
}

/// Counts the points that any thread of this process reaches from now on, and has one fail.
#[cfg(debug_assertions)]
pub fn watch(armed: Option<Armed>) {
    let mut process = process();
    if process.replace(Watch::new(armed)).is_none() {
        WATCHERS.fetch_add(1, Ordering::Relaxed);
    }
}

/// What has been reached since [`watch`]. Nothing is counted, and nothing fails, any more.
#[cfg(debug_assertions)]
pub fn take() -> Reached {
    let watch = process().take();
    if watch.is_some() {
        WATCHERS.fetch_sub(1, Ordering::Relaxed);
    }
    watch.map(Watch::into_reached).unwrap_or_default()
}

/// Runs `work`, counts the points that this thread reaches meanwhile, and has one fail. The process's
/// watch does not see them.
#[cfg(debug_assertions)]
pub fn watch_here<T>(armed: Option<Armed>, work: impl FnOnce() -> T) -> (T, Reached) {
    /// Ends the watch also where `work` panics.
    struct End;
    impl Drop for End {
        fn drop(&mut self) {
            THREAD.with(|thread| thread.borrow_mut().take());
            WATCHERS.fetch_sub(1, Ordering::Relaxed);
        }
    }
    let before = THREAD.with(|thread| thread.borrow_mut().replace(Watch::new(armed)));
    assert!(before.is_none(), "a thread is watched once at a time");
    WATCHERS.fetch_add(1, Ordering::Relaxed);
    let end = End;
    let result = work();
    let watch = THREAD.with(|thread| thread.borrow_mut().take());
    drop(end);
    (result, watch.map(Watch::into_reached).unwrap_or_default())
}

#[cfg(all(test, debug_assertions))]
mod tests {
    use super::*;

    fn step() -> io::Result<u32> {
        point("failure.test.first")?;
        point("failure.test.second")?;
        Ok(1)
    }

    fn at(point: &str, hit: u64) -> Option<Armed> {
        Some(Armed { point: point.to_owned(), hit })
    }

    #[test]
    fn points_are_counted_and_fail_once_at_their_hit() {
        let work = || [step(), step(), step()].map(|result| result.map_err(|error| error.to_string()));
        let (results, reached) = watch_here(at("failure.test.second", 2), work);
        assert_eq!(results, [Ok(1), Err("injected failure at failure.test.second".to_owned()), Ok(1)]);
        let count = |name: &str| reached.points.get(name).copied();
        assert_eq!((count("failure.test.first"), count("failure.test.second")), (Some(3), Some(3)));
        assert!(reached.has_failed);
        assert_eq!(step().expect("nobody watches"), 1);
        let (_, reached) = watch_here(at("failure.test.second", 2), step);
        assert!(!reached.has_failed, "the second hit was not reached");
    }

    #[test]
    fn a_watch_ends_with_a_panic() {
        let panicked = std::panic::catch_unwind(|| watch_here(at("failure.test.first", 1), || panic!("so")));
        assert!(panicked.is_err());
        assert_eq!(step().expect("nobody watches any more"), 1);
    }

    #[test]
    fn other_threads_are_not_watched_here() {
        let (result, reached) = watch_here(at("failure.test.first", 1), || {
            std::thread::scope(|scope| scope.spawn(step).join().expect("no panic"))
        });
        assert_eq!(result.expect("that thread is its own"), 1);
        assert_eq!(reached, Reached::default());
    }
}
