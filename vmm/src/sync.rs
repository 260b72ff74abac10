//! The words and locks of the memory manager's core.
//!
//! In a build that is no test these are the standard library's. In a test they are too, and each
//! operation on them is besides a point at which shuttle may go on with another thread, where it is
//! shuttle that runs the test: `space::tests::races`, `keeper::pool`. A word has the size and the place
//! of the standard library's in both, so that shared memory can hold it.
//!
//! Known hole: shuttle keeps to one order of all operations. What weaker memory orders permit is not
//! seen; that each atomic names its partner is for the reader.

#[cfg(not(test))]
pub use std::sync::atomic::AtomicU32;
#[cfg(not(test))]
pub(crate) use std::sync::{Condvar, Mutex, RwLock};

#[cfg(test)]
pub use self::interleaved::AtomicU32;
#[cfg(test)]
pub(crate) use self::interleaved::{Condvar, Mutex, RwLock, point, wait_while};

/// Takes `lock`, waiting on `changed` while what it guards `is_awaited`, for `limit` at most. What is behind
/// it stays usable after a panic elsewhere.
#[cfg(not(test))]
pub(crate) fn wait_while<'a, T>(
    (lock, changed): (&'a Mutex<T>, &Condvar),
    limit: std::time::Duration,
    is_awaited: impl FnMut(&mut T) -> bool,
) -> std::sync::MutexGuard<'a, T> {
    let guard = lock.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let waited = changed.wait_timeout_while(guard, limit, is_awaited);
    waited.unwrap_or_else(std::sync::PoisonError::into_inner).0
}

/// The standard library's word.
#[cfg(not(test))]
#[must_use]
pub const fn plain(word: &AtomicU32) -> &AtomicU32 {
    word
}

/// The standard library's word in a word.
#[cfg(test)]
#[must_use]
pub const fn plain(word: &AtomicU32) -> &std::sync::atomic::AtomicU32 {
    word.plain()
}

#[cfg(test)]
mod interleaved {
    use std::sync::atomic::Ordering;
    use std::sync::{
        LockResult, MutexGuard, PoisonError, RwLockReadGuard, RwLockWriteGuard, TryLockError, TryLockResult,
    };
    use std::time::Duration;

    /// Another thread may go on here, if shuttle runs them.
    pub(crate) fn point() {
        // A thread that unwinds must not be left: the count of panics is of all that shuttle runs.
        if is_interleaved() && !std::thread::panicking() {
            shuttle::thread::sleep(Duration::ZERO);
        }
    }

    fn is_interleaved() -> bool {
        shuttle::current::try_get_current_task().is_some()
    }

    /// A lock of the standard library; where shuttle runs the threads, one waits by letting others go on.
    fn acquire<G>(
        wait: impl FnOnce() -> LockResult<G>,
        attempt: impl Fn() -> TryLockResult<G>,
    ) -> LockResult<G> {
        if !is_interleaved() {
            return wait();
        }
        point();
        loop {
            match attempt() {
                Ok(guard) => return Ok(guard),
                Err(TryLockError::Poisoned(error)) => return Err(error),
                Err(TryLockError::WouldBlock) if std::thread::panicking() => {
                    eprintln!("a thread that panics wants a lock that another holds");
                    std::process::abort();
                }
                Err(TryLockError::WouldBlock) => shuttle::thread::yield_now(),
            }
        }
    }

    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(std::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) const fn new(value: T) -> Self {
            Self(std::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
            acquire(|| self.0.lock(), || self.0.try_lock())
        }
    }

    /// The standard library's, and how often it was signalled: shuttle's threads look at that.
    #[derive(Debug, Default)]
    pub(crate) struct Condvar {
        real: std::sync::Condvar,
        signals: std::sync::atomic::AtomicU32,
    }

    impl Condvar {
        pub(crate) const fn new() -> Self {
            Self { real: std::sync::Condvar::new(), signals: std::sync::atomic::AtomicU32::new(0) }
        }

        pub(crate) fn notify_all(&self) {
            point();
            self.signals.fetch_add(1, Ordering::SeqCst);
            self.real.notify_all();
        }
    }

    /// As in a build that is no test. Where shuttle runs the threads, nobody's time runs out: who is not
    /// woken waits for ever.
    pub(crate) fn wait_while<'a, T>(
        (lock, changed): (&'a Mutex<T>, &Condvar),
        limit: Duration,
        mut is_awaited: impl FnMut(&mut T) -> bool,
    ) -> MutexGuard<'a, T> {
        loop {
            let mut guard = lock.lock().unwrap_or_else(PoisonError::into_inner);
            if !is_interleaved() {
                let waited = changed.real.wait_timeout_while(guard, limit, is_awaited);
                return waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            if !is_awaited(&mut guard) {
                return guard;
            }
            // No thread goes on between this look and the wait.
            let seen = changed.signals.load(Ordering::SeqCst);
            drop(guard);
            while changed.signals.load(Ordering::SeqCst) == seen {
                shuttle::thread::yield_now();
            }
        }
    }

    #[derive(Debug, Default)]
    pub(crate) struct RwLock<T>(std::sync::RwLock<T>);

    impl<T> RwLock<T> {
        pub(crate) const fn new(value: T) -> Self {
            Self(std::sync::RwLock::new(value))
        }

        pub(crate) fn read(&self) -> LockResult<RwLockReadGuard<'_, T>> {
            acquire(|| self.0.read(), || self.0.try_read())
        }

        pub(crate) fn write(&self) -> LockResult<RwLockWriteGuard<'_, T>> {
            acquire(|| self.0.write(), || self.0.try_write())
        }
    }

    /// A word of 32 bits.
    #[derive(Debug, Default)]
    #[repr(transparent)]
    pub struct AtomicU32(std::sync::atomic::AtomicU32);

    impl AtomicU32 {
        /// As the standard library's.
        #[must_use]
        pub const fn new(value: u32) -> Self {
            Self(std::sync::atomic::AtomicU32::new(value))
        }

        pub(super) const fn plain(&self) -> &std::sync::atomic::AtomicU32 {
            &self.0
        }

        /// As the standard library's. Who loads without any order looks at what he alone writes, or at
        /// what an ordered load has shown him: no point.
        #[must_use]
        pub fn load(&self, order: Ordering) -> u32 {
            if order != Ordering::Relaxed {
                point();
            }
            self.0.load(order)
        }

        /// As the standard library's. What is stored without any order another store makes known: no
        /// point.
        pub fn store(&self, value: u32, order: Ordering) {
            if order != Ordering::Relaxed {
                point();
            }
            self.0.store(value, order);
        }

        /// As the standard library's.
        pub fn swap(&self, value: u32, order: Ordering) -> u32 {
            point();
            self.0.swap(value, order)
        }

        /// As the standard library's.
        pub fn fetch_add(&self, value: u32, order: Ordering) -> u32 {
            point();
            self.0.fetch_add(value, order)
        }

        /// As the standard library's.
        pub fn fetch_sub(&self, value: u32, order: Ordering) -> u32 {
            point();
            self.0.fetch_sub(value, order)
        }

        /// As the standard library's.
        pub fn fetch_or(&self, value: u32, order: Ordering) -> u32 {
            point();
            self.0.fetch_or(value, order)
        }
    }
}
