//! The listener: the keeper's thread that hears all members. What it does waits for nobody, and each member
//! in turn gets one message through.
//!
//! One thread for all: a thread for each would cost each VM some 40 KiB.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};

use super::Shared;
use super::member_handle::MemberHandle;
use crate::failure;
use crate::words::index;

/// A channel's number is its member's doubled; that of the member's process is one more.
const NUMBERS_OF_A_MEMBER: u64 = 2;
/// The bell's number; a member's is no smaller than 1.
const BELL: u64 = 0;
/// Of so many the listener is told at once.
const BATCH: usize = 64;

/// A member that is listened to.
struct Heard {
    member: Arc<MemberHandle>,
    /// Whether its channel and its process have ended.
    has_ended: [bool; 2],
}

/// See the module.
pub(super) struct Listener {
    epoll: OwnedFd,
    /// Rings when it is to go home.
    bell: OwnedFd,
    members: Mutex<BTreeMap<u64, Heard>>,
    last: AtomicU64,
}

impl Listener {
    /// One that hears nobody yet.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub(super) fn new() -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &bell, EventData::new_u64(BELL), EventFlags::IN)?;
        Ok(Self { epoll, bell, members: Mutex::default(), last: AtomicU64::new(0) })
    }

    /// Hears a member from now on until its end.
    ///
    /// # Errors
    /// The host refused: the member is not heard.
    pub(super) fn hear(&self, member: &Arc<MemberHandle>) -> io::Result<()> {
        failure::point("listener.hear")?;
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let heard = Heard { member: Arc::clone(member), has_ended: [false; 2] };
        self.members().insert(number, heard);
        for (end, data) in member.ends().into_iter().zip(number * NUMBERS_OF_A_MEMBER..) {
            // no failure point: listener.hear stands for both
            epoll::add(&self.epoll, end, EventData::new_u64(data), EventFlags::IN).inspect_err(|_| {
                self.members().remove(&number);
            })?;
        }
        Ok(())
    }

    fn members(&self) -> MutexGuard<'_, BTreeMap<u64, Heard>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has [`run`](Self::run) return.
    ///
    /// # Errors
    /// The host refused.
    pub(super) fn close(&self) -> io::Result<()> {
        Ok(rustix::io::write(&self.bell, &1u64.to_ne_bytes()).map(|_| ())?)
    }

    /// The thread.
    pub(super) fn run(&self, keeper: &Shared) {
        let mut events = Vec::with_capacity(BATCH);
        loop {
            match epoll::wait(&self.epoll, spare_capacity(&mut events), None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "no member can be heard any more");
                    return;
                }
            }
            for event in events.drain(..) {
                match event.data.u64() {
                    BELL => return,
                    number => self.attend(number, keeper),
                }
            }
        }
    }

    /// A member has something to say, or has ended.
    fn attend(&self, number: u64, keeper: &Shared) {
        let key = number / NUMBERS_OF_A_MEMBER;
        let end = index(number % NUMBERS_OF_A_MEMBER);
        let Some(member) = self.members().get(&key).map(|heard| Arc::clone(&heard.member)) else { return };
        if end == 0 && member.hear(keeper) {
            return;
        }
        if let Err(error) = epoll::delete(&self.epoll, member.ends()[end]) {
            tracing::error!(vm = %member.vm(), %error, "a member that has ended is listened to");
        }
        let mut members = self.members();
        let is_over = members.get_mut(&key).is_some_and(|heard| {
            heard.has_ended[end] = true;
            heard.has_ended == [true; 2]
        });
        if is_over {
            members.remove(&key);
            drop(members);
            member.bury(keeper);
        }
    }
}
