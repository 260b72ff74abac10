//! One lane: two buffers and a part of the backing, one transfer at a time.
//!
//! A cycle is WRITE (first buffer to backing), READ (backing to second buffer), COPY (second to
//! first). What each leaves behind is compared with the cycle's pattern, and the bytes right
//! behind it with what was there before: a transfer must not move more than it was asked for.

use salp_protocol::dma::{flag, operation, status};

use crate::engine::{Completion, Engine, Request};
use crate::memory::{load, store};
use crate::pattern::{Random, check_bytes, fill, mix};
use crate::worker::Worker;

/// What is in a buffer before the engine writes to it.
const BEFORE: u64 = 0xdead_beef_dead_beef;
/// Transfers begin up to so many words behind the buffer's start.
const MAX_SKEW_WORDS: u64 = 64;

/// What a lane has to work with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) index: u64,
    /// Address of the two buffers, side by side.
    pub(super) buffers: u64,
    /// Bytes of each buffer, at least a page.
    pub(super) capacity: u64,
    /// Offset of the lane's part of the backing; as long as a buffer.
    pub(super) disk: u64,
    /// The slot where the buffers are registered.
    pub(super) slot: Option<u32>,
    /// When the host kernel does the transfer: see the `kernel` option.
    pub(super) kernel: u64,
    /// Flags of every descriptor.
    pub(super) flags: u16,
    pub(super) seed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Write,
    Read,
    Copy,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Between two cycles.
    Resting,
    /// The buffers are prepared; the ring was full so far.
    Ready(Stage),
    /// In the ring, at this entry.
    Flying(Stage, usize),
}

/// What [`Lane::advance`] saw.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Progress {
    /// Transfers completed.
    pub(super) completed: u64,
    /// A cycle ended.
    pub(super) cycle_done: bool,
    /// Nothing is under way.
    pub(super) resting: bool,
}

#[derive(Debug)]
pub(super) struct Lane {
    plan: Plan,
    random: Random,
    state: State,
    /// This cycle's number, pattern, first byte within the buffers, and bytes.
    cycle: u64,
    pattern: u64,
    skew: u64,
    length: u64,
}

impl Lane {
    pub(super) fn new(plan: Plan) -> Self {
        let random = Random::new(mix(plan.seed, plan.index));
        Self { plan, random, state: State::Resting, cycle: 0, pattern: 0, skew: 0, length: 0 }
    }

    /// From the next cycle on, other patterns than the source's.
    pub(super) fn diverge(&mut self, identity: u64) {
        self.random = Random::new(mix(identity, self.random.next()));
    }

    /// Takes a completion, checks it, and submits what comes next; a new cycle only if `more`.
    pub(super) fn advance(&mut self, engine: &mut Engine, worker: &Worker, more: bool) -> Progress {
        let mut progress = Progress::default();
        if let State::Flying(stage, entry) = self.state
            && let Some(completion) = engine.take_completion(entry)
        {
            progress.completed = 1;
            self.state = self.complete(stage, completion, worker);
            progress.cycle_done = matches!(self.state, State::Resting);
        }
        if matches!(self.state, State::Resting) && more {
            self.begin();
        }
        if let State::Ready(stage) = self.state
            && let Some(entry) = engine.submit(&self.request(stage))
        {
            self.state = State::Flying(stage, entry);
        }
        progress.resting = matches!(self.state, State::Resting);
        progress
    }

    fn begin(&mut self) {
        self.cycle += 1;
        self.pattern = self.random.next();
        self.skew = 8 * self.random.below(MAX_SKEW_WORDS);
        // 16 bytes less, so that there is always a word behind the transfer.
        self.length = 1 + self.random.below(self.plan.capacity - self.skew - 16);
        fill(self.first(), self.length.div_ceil(8), self.pattern);
        self.state = State::Ready(Stage::Write);
    }

    /// Checks what a transfer did; returns the state after it.
    fn complete(&self, stage: Stage, completion: Completion, worker: &Worker) -> State {
        let Completion { status, length, cookie } = completion;
        if status == status::LOST_AT_FORK {
            self.prepare(stage);
            return State::Ready(stage);
        }
        if (status, u64::from(length), cookie) != (status::OK, self.length, self.cookie(stage)) {
            worker.error(format_args!(
                "dma: lane {} {stage:?}: status {status}, {length} bytes of {}, cookie {cookie:#x} for {:#x}",
                self.plan.index,
                self.length,
                self.cookie(stage)
            ));
            return State::Resting;
        }
        let next = match stage {
            Stage::Write => Stage::Read,
            Stage::Read => {
                if self.moved(self.second(), "dma read of a write", worker) {
                    worker.count_transfers(2, self.length);
                }
                Stage::Copy
            }
            Stage::Copy => {
                if self.moved(self.first(), "dma copy", worker) {
                    worker.count_transfers(1, self.length);
                }
                return State::Resting;
            }
        };
        self.prepare(next);
        State::Ready(next)
    }

    /// Overwrites what the stage's transfer will write.
    fn prepare(&self, stage: Stage) {
        let target = match stage {
            Stage::Write => return,
            Stage::Read => self.second(),
            Stage::Copy => self.first(),
        };
        for i in 0..=self.length.div_ceil(8) {
            store(target + 8 * i, BEFORE);
        }
    }

    /// Whether the transfer left the pattern at `target`, and nothing behind it.
    fn moved(&self, target: u64, what: &str, worker: &Worker) -> bool {
        let whole = worker.check(what, check_bytes(target, self.length, self.pattern));
        // The rest of the last word (all of it where the length is a multiple of 8).
        let last = target + (self.length & !7);
        let mask = u64::MAX << (8 * (self.length & 7));
        let found = load(last) & mask;
        if found != BEFORE & mask {
            worker.error(format_args!("{what}: {found:#x} behind {:#x}", target + self.length));
            return false;
        }
        whole
    }

    fn request(&self, stage: Stage) -> Request {
        let (operation, source, destination) = match stage {
            Stage::Write => (operation::WRITE, self.first(), self.plan.disk),
            Stage::Read => (operation::READ, self.plan.disk, self.second()),
            Stage::Copy => (operation::COPY, self.second(), self.first()),
        };
        let mut flags = self.plan.flags;
        if stage != Stage::Copy {
            let registered = self.plan.slot.is_some();
            let by_kernel = match self.plan.kernel {
                0 => false,
                1 => registered && self.cycle.is_multiple_of(2),
                _ => true,
            };
            flags |= if registered { flag::REGISTERED } else { 0 };
            flags |= if by_kernel { flag::KERNEL } else { 0 };
        }
        Request {
            operation,
            flags,
            length: self.length as u32,
            source,
            destination,
            slot: self.plan.slot.unwrap_or(0),
            cookie: self.cookie(stage),
        }
    }

    fn cookie(&self, stage: Stage) -> u64 {
        mix(self.pattern, stage as u64)
    }

    fn first(&self) -> u64 {
        self.plan.buffers + self.skew
    }

    fn second(&self) -> u64 {
        self.plan.buffers + self.plan.capacity + self.skew
    }
}
