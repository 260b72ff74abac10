//! `dma`: keeps `depth=` transfers in flight and verifies each, while memory is written between.
//!
//! Every [`Lane`] writes a pattern to its own part of the backing, reads it back into a second
//! buffer and copies that one to the first: each transfer is checked by the data it moved. Lanes use
//! registered buffers where `pins=` gives room, and the `KERNEL` flag as `kernel=` says. Between two
//! reports `dirty=` pages of the memory pattern (`mib=`) are checked and rewritten. Rounds are
//! cycles of three transfers. Figure: bytes of the verified transfers.
//!
//! A cut may come at any instruction: transfers under way are the clone's too. When the VM's id has
//! changed, the count of verified transfers starts at 0, and patterns part from the source's.
//!
//! At the end every lane finishes its cycle; then memory, the rest of the registered pages, the
//! engine's count of completions (none lost, none done twice) and the interrupts are checked.

mod lane;
mod pins;

use salp_protocol::dma::{flag, register};
use salp_protocol::exit;

use self::lane::{Lane, Plan};
use self::pins::Pins;
use crate::call;
use crate::checked::Summed;
use crate::engine::{self, Engine, EngineError};
use crate::entry;
use crate::memory::Supply;
use crate::options::{Options, usage};
use crate::serial::print;
use crate::worker::Worker;

/// The engine's interrupt.
const VECTOR: u8 = 0x40;
const INTERRUPT_ENABLE: u64 = 1 << 8;
const MAX_LANES: usize = 128;
/// What one wait without interrupts takes, in microseconds.
const WAIT_US: u64 = 100;
/// Waits after which the host hears of us even if nothing was completed.
const WAITS_PER_REPORT: u64 = 50;
/// Completed transfers after which the host hears of us.
const TRANSFERS_PER_REPORT: u64 = 16;
/// Failed checks after which there is no use in going on.
const MAX_ERRORS: u64 = 1000;

pub(super) fn run(worker: Worker, options: Options, mut supply: Supply) -> Worker {
    let pages = super::memory(options, &mut supply).share(worker.index, worker.count);
    if worker.index > 0 {
        return super::churn::accompany(worker, options, pages);
    }
    let mut case = match Case::set_up(&worker, options, supply) {
        Ok(case) => case,
        Err(error) => {
            print(format_args!("dma: {error:?}"));
            call::exit(match error {
                EngineError::OutOfMemory => exit::USAGE,
                _ => exit::ERRORS,
            })
        }
    };
    let mut memory = Summed::new(pages, &worker);
    case.drive(&worker, &mut memory);
    worker.finish_all();
    case.check_end(&worker);
    memory.check_all(&worker);
    worker
}

struct Case {
    engine: Engine,
    lanes: [Option<Lane>; MAX_LANES],
    pins: Pins,
    interrupt: bool,
    /// Pages rewritten between reports.
    dirty: u64,
    /// The next page to rewrite.
    cursor: u64,
}

impl Case {
    fn set_up(worker: &Worker, options: Options, mut supply: Supply) -> Result<Self, EngineError> {
        let depth = options.number_in("depth", 4, 1, MAX_LANES as u64);
        let bytes = options.number_in("bytes", 65536, 4096, 1 << 20) & !0xfff;
        let interrupt = options.number_in("interrupt", 0, 0, 1) == 1;
        let kernel = options.number_in("kernel", 1, 0, 2);
        let dirty = match options.text("dirty") {
            Some("all") => u64::MAX,
            _ => options.number("dirty", 16),
        };
        // Twice the entries, so that one slow transfer does not hold up the others.
        let engine = Engine::set_up(&mut supply, (2 * depth).next_power_of_two())?;
        engine::configure(register::DELAY_US, options.number("delay_us", 0))?;
        engine::configure(register::RATE, options.number("rate", 0))?;
        if interrupt {
            entry::enable_interrupts();
            engine::configure(register::INTERRUPT, INTERRUPT_ENABLE | u64::from(VECTOR))?;
        }
        let mut pins = Pins::register(&mut supply, options.number("pins", 0))?;
        let disk_bytes = engine::read_register(register::BACKING_BYTES) / depth;
        if disk_bytes < 4096 {
            usage(format_args!("depth={depth}: the backing has {disk_bytes} bytes for each"));
        }
        let mut lanes = [const { None }; MAX_LANES];
        for (index, place) in lanes.iter_mut().enumerate().take(depth as usize) {
            let index = index as u64;
            // The first half of the lanes (rounded up), as far as there is room, is registered.
            let registered = if index < depth.div_ceil(2) { pins.take_buffers(bytes) } else { None };
            let (buffers, capacity, slot) = match registered {
                Some((address, capacity, slot)) => (address, capacity, Some(slot)),
                None => {
                    let buffers = supply.take_contiguous(2 * bytes / 4096);
                    (buffers.ok_or(EngineError::OutOfMemory)?, bytes, None)
                }
            };
            *place = Some(Lane::new(Plan {
                index,
                buffers,
                capacity: capacity.min(disk_bytes & !0xfff),
                disk: (index * disk_bytes) & !0xfff,
                slot,
                kernel,
                flags: if interrupt { flag::INTERRUPT } else { 0 },
                seed: worker.identity(),
            }));
        }
        pins.fill_rest();
        Ok(Self { engine, lanes, pins, interrupt, dirty, cursor: 0 })
    }

    /// Works until the rounds are done or the host says so, then until nothing is under way.
    fn drive(&mut self, worker: &Worker, memory: &mut Summed) {
        let mut identity = worker.identity();
        let (mut more, mut waits, mut completed) = (true, 0, 0);
        loop {
            let seen = entry::interrupts(VECTOR);
            let (mut moved, mut resting) = (0, true);
            for lane in self.lanes.iter_mut().flatten() {
                let progress = lane.advance(&mut self.engine, worker, more);
                moved += progress.completed;
                resting &= progress.resting;
                if progress.cycle_done {
                    more &= worker.count_rounds(1);
                }
            }
            self.engine.ring_doorbell();
            if resting && !more {
                return;
            }
            completed += moved;
            if moved == 0 {
                waits += 1;
                self.wait(seen);
            }
            if completed >= TRANSFERS_PER_REPORT || waits >= WAITS_PER_REPORT {
                (completed, waits) = (0, 0);
                more &= worker.report() && worker.errors() < MAX_ERRORS;
                if identity != worker.identity() {
                    identity = worker.identity();
                    worker.reset_transfers();
                    memory.diverge(identity);
                    self.lanes.iter_mut().flatten().for_each(|lane| lane.diverge(identity));
                }
                self.rewrite_some(memory, worker);
            }
        }
    }

    fn rewrite_some(&mut self, memory: &mut Summed, worker: &Worker) {
        for _ in 0..self.dirty.min(memory.count()) {
            memory.rewrite(self.cursor, worker);
            self.cursor = (self.cursor + 1) % memory.count();
        }
    }

    /// `seen` was read before the lanes were looked at, so no completion is slept over.
    fn wait(&self, seen: u64) {
        if self.interrupt {
            entry::wait_for_interrupt(VECTOR, seen);
        } else {
            call::sleep(WAIT_US);
        }
    }

    fn check_end(&self, worker: &Worker) {
        let submitted = self.engine.submitted();
        let completed = || engine::read_register(register::COMPLETED);
        // The count may come a moment after the status.
        let mut tries = 0;
        while completed() != submitted && tries < 1000 {
            tries += 1;
            call::sleep(WAIT_US);
        }
        if completed() != submitted {
            worker.error(format_args!("dma: {} of {submitted} completed", completed()));
        }
        if self.interrupt && submitted > 0 && entry::interrupts(VECTOR) == 0 {
            worker.error(format_args!("dma: no interrupt came"));
        }
        self.pins.check_rest_and_unregister(worker);
    }
}
