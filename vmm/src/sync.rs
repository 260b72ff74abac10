//! The words and locks of the memory manager's core.
//!
//! In a build that is no test these are the standard library's. In a test they are too, and each
//! operation on them is besides a point at which shuttle may go on with another thread, where it is
//! shuttle that runs the test: `space::tests::races`. A word has the size and the place of the
//! standard library's in both, so that shared memory can hold it.
//!
//! Known hole: shuttle keeps to one order of all operations. What weaker memory orders permit is not
//! seen; that each atomic names its partner is for the reader.

#[cfg(not(test))]
pub use std::sync::atomic::AtomicU32;
#[cfg(not(test))]
pub(crate) use std::sync::{Mutex, RwLock};

#[cfg(test)]
pub use self::interleaved::AtomicU32;
#[cfg(test)]
pub(crate) use self::interleaved::{Mutex, RwLock, point};

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
    use std::sync::{LockResult, MutexGuard, RwLockReadGuard, RwLockWriteGuard, TryLockError, TryLockResult};
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
