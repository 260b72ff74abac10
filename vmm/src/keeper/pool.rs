//! The pool: members that are ready before they are wanted, and the places that all members have.
//!
//! [`Pool`] keeps the books, and knows nothing of processes: who uses it says how a member is made, which
//! takes a place that he has claimed. A place is free again when the member there has died ([`Pool::bury`])
//! or has not come to be.
//!
//! | what | where a place is |
//! |---|---|
//! | free | in the books |
//! | being made | whoever claimed it has it |
//! | ready | in the books, with the member; it may die there |
//! | taken | whoever took the member has it |
//!
//! A place is in one of them, and nobody waits where a member is ready or has ceased to come: the tests run
//! this by threads in many orders ([`crate::sync`]).

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use super::member_handle::MemberHandle;
use crate::plants::{Plant, is_planted};
use crate::sync::{Condvar, Mutex, wait_while};

/// A member without a role.
pub(super) trait Shell {
    /// Whether its process is there.
    fn is_alive(&self) -> bool;
    /// Its place.
    fn place(&self) -> u32;
}

impl Shell for Arc<MemberHandle> {
    fn is_alive(&self) -> bool {
        MemberHandle::is_alive(self)
    }

    fn place(&self) -> u32 {
        self.slot()
    }
}

struct Books<S> {
    /// The next to be taken first.
    ready: VecDeque<S>,
    /// Members being made for the pool.
    growing: usize,
    free: BTreeSet<u32>,
}

/// See the module.
pub(super) struct Pool<S> {
    books: Mutex<Books<S>>,
    /// One has become ready, or ceased to come.
    changed: Condvar,
    /// Members that are to be ready.
    size: usize,
}

impl<S: Shell + Clone> Pool<S> {
    /// An empty pool that is to have `size` members, and so many places for all.
    pub(super) fn new(size: usize, places: u32) -> Self {
        let books = Books { ready: VecDeque::new(), growing: 0, free: (0..places).collect() };
        Self { books: Mutex::new(books), changed: Condvar::new(), size }
    }

    fn lock(&self) -> MutexGuard<'_, Books<S>> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ready members, the next to be taken first.
    pub(super) fn ready(&self) -> Vec<S> {
        self.lock().ready.iter().cloned().collect()
    }

    /// How many are ready.
    pub(super) fn count(&self) -> usize {
        self.lock().ready.len()
    }

    /// Takes up to `count` members.
    pub(super) fn take(&self, count: usize) -> Vec<S> {
        let mut books = self.lock();
        books.ready.retain(Shell::is_alive);
        let count = count.min(books.ready.len());
        if is_planted(Plant::PoolHandsOutTwice) {
            let taken: Vec<_> = books.ready.iter().take(count).cloned().collect();
            drop(books);
            let is_taken = |shell: &S| taken.iter().any(|taken| taken.place() == shell.place());
            self.lock().ready.retain(|shell| !is_taken(shell));
            return taken;
        }
        books.ready.drain(..count).collect()
    }

    /// Takes a member, or makes one. Where that fails because all places are taken, the last may be those of
    /// members that are being made for the pool: these are waited for.
    pub(super) fn take_or_make<E>(
        &self,
        mut make: impl FnMut() -> Result<S, E>,
        is_full: impl Fn(&E) -> bool,
        limit: Duration,
    ) -> Result<S, E> {
        loop {
            if let Some(shell) = self.take(1).pop() {
                return Ok(shell);
            }
            match make() {
                Err(error) if is_full(&error) && self.await_one(limit) => {}
                made => return made,
            }
        }
    }

    /// Waits while none is ready and some are being made. Whether it is worth another try.
    fn await_one(&self, limit: Duration) -> bool {
        {
            let books = self.lock();
            let is_ready = !books.ready.is_empty() && !is_planted(Plant::PoolOverlooksReady);
            if books.growing == 0 && !is_ready {
                return false;
            }
        }
        drop(wait_while((&self.books, &self.changed), limit, |books| {
            books.growing > 0 && books.ready.is_empty()
        }));
        true
    }

    /// Makes members until the pool is full, or is not to be filled any more. The first that cannot be made
    /// is the last that is tried.
    pub(super) fn fill<E>(
        &self,
        is_closing: impl Fn() -> bool,
        mut make: impl FnMut() -> Result<S, E>,
    ) -> Result<(), E> {
        loop {
            {
                let mut books = self.lock();
                books.ready.retain(Shell::is_alive);
                if is_closing() || books.ready.len() + books.growing >= self.size {
                    return Ok(());
                }
                books.growing += 1;
            }
            let made = make();
            let mut books = self.lock();
            books.growing -= 1;
            let result = made.map(|shell| {
                // Its death may have been booked already.
                if shell.is_alive() {
                    books.ready.push_back(shell);
                }
            });
            drop(books);
            self.tell();
            result?;
        }
    }

    /// Also if one could not be made: some wait while it may come.
    fn tell(&self) {
        if !is_planted(Plant::PoolTellsNobody) {
            self.changed.notify_all();
        }
    }

    /// Waits while members are being made for the pool. Whether it is full then.
    pub(super) fn await_full(&self, limit: Duration) -> bool {
        let mut books = wait_while((&self.books, &self.changed), limit, |books| books.growing > 0);
        books.ready.retain(Shell::is_alive);
        books.ready.len() >= self.size
    }

    /// Takes a member that has got no role. Returns it if there are enough.
    pub(super) fn give_back(&self, shell: S) -> Option<S> {
        let mut books = self.lock();
        if books.ready.len() + books.growing >= self.size {
            return (!is_planted(Plant::PoolLosesMember)).then_some(shell);
        }
        // As in `fill`.
        if shell.is_alive() {
            books.ready.push_front(shell);
        }
        drop(books);
        self.tell();
        None
    }

    /// A place for a member that is to be made.
    pub(super) fn claim(&self) -> Option<u32> {
        self.lock().free.pop_first()
    }

    /// No member has come to be at this place.
    pub(super) fn free(&self, place: u32) {
        self.lock().free.insert(place);
    }

    /// The member at this place has died, wherever it was. It says so itself before.
    pub(super) fn bury(&self, place: u32) {
        let mut books = self.lock();
        if !is_planted(Plant::PoolKeepsDead) {
            books.ready.retain(|shell| shell.place() != place);
        }
        books.free.insert(place);
    }

    /// All that are ready, for their end.
    pub(super) fn drain(&self) -> VecDeque<S> {
        std::mem::take(&mut self.lock().ready)
    }
}

#[cfg(test)]
mod tests;
