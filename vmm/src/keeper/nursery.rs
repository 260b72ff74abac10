//! The nursery: the keeper's thread that has members made, by a [`zygote`](crate::member::zygote).
//!
//! Members and zygote get a signal at the end of the *thread* that started the zygote, which is therefore
//! one that lives as long as the colony. A zygote is started when the first member is wanted, and another
//! one when it turns out to have died.

use std::ffi::OsStr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::PoisonError;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::{ColonyError, Shared};
use crate::ipc::{Channel, IpcError, spawn};
use crate::member::messages::{Hatch, Setup};
use crate::member::zygote::{CHANNEL_NUMBER, ZYGOTE_ARGUMENT};

/// What a zygote's environment says to the libraries of its members, of which there are many: small
/// stacks share tables of pages, one heap does for all threads, and what threads leave is given back.
const THRIFT: [(&str, &str); 2] = [
    ("RUST_MIN_STACK", "262144"),
    ("GLIBC_TUNABLES", "glibc.malloc.arena_max=1:glibc.pthread.stack_cache_size=0"),
];

/// What the nursery is to do.
pub(super) enum Wish {
    /// Have a member made.
    Member {
        /// Its place on the board.
        slot: u32,
        /// Its end of its channel.
        channel: OwnedFd,
        /// Says that the zygote has been asked.
        asked: Sender<Result<(), ColonyError>>,
    },
    /// Go home, and let the zygote go.
    Close,
}

/// A zygote that has got what its members have in common.
struct Zygote {
    orders: Channel,
    // Killed and reaped when it is dropped.
    _child: spawn::Child,
}

/// The nursery's thread.
pub(super) fn run(shared: &Shared, wishes: &Receiver<Wish>) {
    let mut zygote = None;
    while let Ok(Wish::Member { slot, channel, asked }) = wishes.recv() {
        // Whoever asked may have given up.
        let _ = asked.send(shared.hatch(&mut zygote, slot, &channel));
    }
}

impl Shared {
    /// Asks a zygote for a member, which takes one end of its channel.
    pub(super) fn wish_for_member(&self, slot: u32, channel_end: Channel) -> Result<(), ColonyError> {
        let (asked, answer) = channel();
        let wish = Wish::Member { slot, channel: channel_end.into_fd(), asked };
        let sent = self.wishes.lock().unwrap_or_else(PoisonError::into_inner).send(wish);
        let gone = || ColonyError::Unfit("the colony is closing".to_owned());
        sent.map_err(|_| gone())?;
        answer.recv().map_err(|_| gone())?
    }

    fn hatch(&self, zygote: &mut Option<Zygote>, slot: u32, channel: &OwnedFd) -> Result<(), ColonyError> {
        loop {
            let (is_new, living) = match zygote.take() {
                Some(zygote) => (false, zygote),
                None => (true, self.start_zygote()?),
            };
            let living = zygote.insert(living);
            match living.orders.send(&Hatch { slot }, &[channel.as_fd()]) {
                Err(IpcError::Closed) if !is_new => {
                    tracing::warn!("the zygote has died: another is started");
                    *zygote = None;
                }
                sent => return Ok(sent?),
            }
        }
    }

    fn start_zygote(&self) -> Result<Zygote, ColonyError> {
        let (orders, theirs) = Channel::pair()?;
        let arguments = [OsStr::new(ZYGOTE_ARGUMENT)];
        let handed_over = [(theirs.as_fd(), CHANNEL_NUMBER)];
        let variables = THRIFT.map(|(name, value)| (name, OsStr::new(value)));
        let child = match &self.config.program {
            Some(program) => spawn::spawn_program(program, &arguments, &variables, &handed_over)?,
            None => spawn::spawn_self(&arguments, &variables, &handed_over)?,
        };
        let (arena, arena_descriptors) = self.arena.share_with_member();
        let setup = Setup {
            board: self.board.shape(),
            arena,
            memory: self.config.memory,
            is_huge: self.config.is_huge,
            vcpus: self.config.vcpus,
            irqchip: self.config.irqchip,
            guest: self.config.guest,
            publication: self.config.publication,
            confinement: self.config.confinement,
        };
        let mut descriptors = vec![self.words.memory().fd()];
        descriptors.extend(arena_descriptors);
        orders.send(&setup, &descriptors)?;
        Ok(Zygote { orders, _child: child })
    }
}
