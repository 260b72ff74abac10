//! The guest where there is no KVM: a thread that does what it is told, and a model, kept here, of what
//! its memory and its disk must hold.
//!
//! Tracked pages lie all over the memory; each holds one number in all of its words. Transfers move
//! whole pages between them and the first blocks of the disk. A transfer's page and block are left
//! alone until it is completed; it may be on its way while the VM is forked: then it is its clone's too.

use std::time::Instant;

use salp_protocol::dma::{error, operation, register, status};
use salp_protocol::{layout, order};

use super::script::Random;
use super::subject::{LIMIT, Outcome, Verdict, refused, verdict};
use crate::family::VmId;
use crate::keeper::ColonyError;
use crate::keeper::member_handle::MemberHandle;
use crate::member::messages::{Order, PuppetOrder};
use crate::words::{LEAF_BYTES, MemoryShape, PAGE_BYTES, index, wide};

/// Tracked pages.
const PAGES: u64 = 96;
/// Blocks of the disk that are used, of a page each.
const BLOCKS: u64 = 16;
/// Entries of the ring.
const ENTRIES: u64 = 64;
/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: u64 = 64;
/// Where the ring is: the tracked pages lie behind its leaf.
const RING: u64 = layout::FREE;
const PAGE: u64 = wide(PAGE_BYTES);
const PAGE_WORDS: u64 = PAGE / 8;

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Model {
    /// Bytes from one tracked page to the next.
    stride: u64,
    pages: Vec<u64>,
    blocks: Vec<u64>,
    tail: u64,
    flying: Vec<Flight>,
    /// Transfers to memory that brought what they should; what went to the disk comes back by these.
    pub(super) verified: u64,
}

/// A transfer on its way.
#[derive(Clone, Copy, Debug)]
struct Flight {
    entry: u64,
    page: u64,
    block: u64,
    is_read: bool,
}

/// Why a puppet cannot go on: what its order came to.
type Done<T> = Result<T, Outcome>;

/// A thread guest and its model.
pub(super) struct Puppet<'a> {
    pub(super) vm: VmId,
    pub(super) member: &'a MemberHandle,
    pub(super) model: &'a mut Model,
}

impl Model {
    /// Of memory and a disk that nobody has written.
    pub(super) fn new(memory: MemoryShape) -> Self {
        let stride = (memory.ram_bytes().min(layout::DEVICE_HOLE) - RING - wide(LEAF_BYTES)) / PAGES;
        Self {
            stride: stride / PAGE * PAGE,
            pages: vec![0; index(PAGES)],
            blocks: vec![0; index(BLOCKS)],
            tail: 0,
            flying: Vec::new(),
            verified: 0,
        }
    }

    fn address(&self, page: u64) -> u64 {
        RING + wide(LEAF_BYTES) + page * self.stride
    }

    /// The model of a clone: what was verified was its source's.
    pub(super) fn of_clone(&self) -> Self {
        Self { verified: 0, ..self.clone() }
    }
}

impl Puppet<'_> {
    /// Sets the ring up and writes all tracked pages.
    pub(super) fn begin(&mut self, random: &mut Random) -> Outcome {
        ended(
            self.begin_ring().and_then(|()| (0..PAGES).try_for_each(|page| self.store(page, random.draw()))),
        )
    }

    fn begin_ring(&mut self) -> Done<()> {
        self.configure(register::RING_BASE, RING)?;
        self.configure(register::RING_ENTRIES, ENTRIES)?;
        // Long enough to be on its way at the next fork, now and then.
        self.configure(register::DELAY_US, 2000)
    }

    /// Completes what is on its way, changes and checks some pages, and sends new transfers on theirs.
    pub(super) fn work(&mut self, random: &mut Random) -> Outcome {
        ended(self.try_work(random))
    }

    fn try_work(&mut self, random: &mut Random) -> Done<()> {
        self.land()?;
        let (first, count) = (random.below(PAGES), 1 + random.below(12));
        for page in first..(first + count).min(PAGES) {
            self.store(page, random.draw())?;
        }
        let first = random.below(PAGES - 16);
        (first..first + 16).try_for_each(|page| self.check(page))?;
        for _ in 0..random.below(6) {
            let (page, block) = (random.below(PAGES), random.below(BLOCKS));
            let is_read = random.is_in(50);
            if !self.model.flying.iter().any(|flight| flight.page == page || flight.block == block) {
                self.submit(page, block, is_read)?;
            }
        }
        Ok(())
    }

    /// Compares everything with the model.
    pub(super) fn verify(&mut self) -> Outcome {
        let result = self.try_verify();
        result.map_or_else(|outcome| outcome, |()| Outcome::Verified)
    }

    fn try_verify(&mut self) -> Done<()> {
        self.land()?;
        (0..PAGES).try_for_each(|page| self.check(page))?;
        (0..BLOCKS).try_for_each(|block| self.submit(block, block, true))?;
        self.land()
    }

    fn submit(&mut self, page: u64, block: u64, is_read: bool) -> Done<()> {
        let entry = self.model.tail % ENTRIES;
        let (memory, disk) = (self.model.address(page), block * PAGE);
        let (operation, source, destination) = match is_read {
            true => (operation::READ, disk, memory),
            false => (operation::WRITE, memory, disk),
        };
        let head = u64::from(operation) | PAGE << 32;
        let at = RING + entry * DESCRIPTOR_BYTES;
        // Then slot, cookie, result and status (pending), padding.
        for (word, value) in (0..).zip([head, source, destination, 0, 0, 0, 0, 0]) {
            self.order(PuppetOrder { order: order::STORE64, a: at + 8 * word, b: value, c: 0, d: 0 })?;
        }
        self.model.tail += 1;
        self.configure(register::DOORBELL, self.model.tail)?;
        self.model.flying.push(Flight { entry, page, block, is_read });
        Ok(())
    }

    /// Waits for what is on its way.
    fn land(&mut self) -> Done<()> {
        let begun = Instant::now();
        while let Some(flight) = self.model.flying.first().copied() {
            let at = RING + flight.entry * DESCRIPTOR_BYTES + 40;
            let state = self.order(PuppetOrder { order: order::LOAD64, a: at, ..PuppetOrder::default() })?;
            match u32::try_from(state >> 32).unwrap_or(u32::MAX) {
                status::PENDING if begun.elapsed() < LIMIT => continue,
                status::OK => {}
                status::FAILED => return Err(Outcome::Told),
                status::PENDING => return Err(Outcome::Wrong("a transfer hangs".to_owned())),
                status => return Err(Outcome::Wrong(format!("a transfer ended with status {status}"))),
            }
            self.model.flying.remove(0);
            let (page, block) = (index(flight.page), index(flight.block));
            if flight.is_read {
                self.model.pages[page] = self.model.blocks[block];
                self.check(flight.page)?;
                self.model.verified += 1;
            } else {
                self.model.blocks[block] = self.model.pages[page];
            }
        }
        Ok(())
    }

    fn store(&mut self, page: u64, value: u64) -> Done<()> {
        let a = self.model.address(page);
        self.order(PuppetOrder { order: order::STORE_STRIDE, a, b: value, c: PAGE_WORDS, d: 8 })?;
        self.model.pages[index(page)] = value;
        Ok(())
    }

    fn check(&mut self, page: u64) -> Done<()> {
        let (a, value) = (self.model.address(page), self.model.pages[index(page)]);
        let sum = self.order(PuppetOrder { order: order::SUM_STRIDE, a, b: 0, c: PAGE_WORDS, d: 8 })?;
        let expected = value.wrapping_mul(PAGE_WORDS);
        if sum == expected {
            return Ok(());
        }
        Err(Outcome::Wrong(format!("the words of page {a:#x} have the sum {sum:#x}, not {expected:#x}")))
    }

    fn configure(&mut self, register: u64, value: u64) -> Done<()> {
        let write = PuppetOrder { order: order::DMA_WRITE, a: register, b: value, ..PuppetOrder::default() };
        self.order(write)?;
        let read = PuppetOrder { order: order::DMA_READ, a: register::ERROR, ..PuppetOrder::default() };
        match self.order(read)? {
            error::NONE => Ok(()),
            error => Err(Outcome::Wrong(format!("the engine refuses {value:#x}: error {error}"))),
        }
    }

    /// Has the guest do something.
    fn order(&mut self, order: PuppetOrder) -> Done<u64> {
        self.member.ask(Order::Puppet { vcpu: 0, order }, &[]).map_err(refused)?;
        let mut last = Verdict::Fine;
        let found = self.member.wait_for(LIMIT, |state| {
            if !state.puppet_results.is_empty() {
                return Some(Ok(state.puppet_results.remove(0).1));
            }
            last = verdict(state);
            match &last {
                Verdict::Fine | Verdict::Unexplained(_) | Verdict::Begun(_) => None,
                Verdict::Told => Some(Err(Outcome::Told)),
                Verdict::Verified => Some(Err(Outcome::Wrong(format!("{} ended by itself", self.vm)))),
                Verdict::Wrong(text) => Some(Err(Outcome::Wrong(text.clone()))),
            }
        });
        found.map_err(|error| match (error, last) {
            (ColonyError::Silent { .. }, Verdict::Unexplained(text) | Verdict::Begun(text)) => {
                Outcome::Wrong(text)
            }
            (error, _) => refused(error),
        })?
    }
}

fn ended(result: Done<()>) -> Outcome {
    result.map_or_else(|outcome| outcome, |()| Outcome::Done)
}
