//! `identity`: looks all the time who it is. When it has become somebody else, by a fork or a reset, the
//! interrupt must have come before it could see that, generation and seed must be new, and it says so on
//! the console and to whoever waits for it. The figure of its reports tells its seed from others.

use salp_protocol::identity::{INTERRUPT_ENABLE, register};

use crate::call;
use crate::entry;
use crate::identity::{Known, read, write};
use crate::memory::Supply;
use crate::options::Options;
use crate::serial::print;
use crate::worker::Worker;

const VECTOR: u8 = 0x61;
/// Looks between two sleeps.
const LOOKS: u64 = 32;

pub(super) fn run(worker: Worker, options: Options, _supply: Supply) -> Worker {
    // The interrupt comes to vCPU 0.
    if worker.index > 0 {
        return worker;
    }
    let time_us = options.number_in("us", 1000, 1, 4_000_000);
    if !Known::is_there() {
        worker.error(format_args!("identity: there is no device"));
        return worker;
    }
    entry::enable_interrupts();
    write(register::INTERRUPT, INTERRUPT_ENABLE | u64::from(VECTOR));
    let (mut known, mut arrived) = settled();
    introduce(&worker, &known);
    loop {
        for _ in 0..LOOKS {
            look(&worker, &mut known, &mut arrived);
        }
        if !(worker.count_rounds(1) & worker.report()) {
            return worker;
        }
        call::sleep(time_us);
    }
}

/// Compares what the device says and which interrupts came with what was known.
fn look(worker: &Worker, known: &mut Known, arrived: &mut u64) {
    let before = entry::interrupts(VECTOR);
    let generation = read(register::GENERATION);
    let after = entry::interrupts(VECTOR);
    if generation == known.generation {
        if before != *arrived {
            worker.error(format_args!("identity: an interrupt came in generation {generation}"));
            *arrived = before;
        }
        return;
    }
    if after == *arrived {
        worker.error(format_args!("identity: generation {generation} came without an interrupt"));
    }
    let now;
    (now, *arrived) = settled();
    if now.generation <= known.generation || now.seed == known.seed {
        worker.error(format_args!("identity: {} and {generation}, or their seeds", known.generation));
    }
    *known = now;
    introduce(worker, known);
}

/// Who this VM is, and how many interrupts came until it was. What comes in between is a change.
fn settled() -> (Known, u64) {
    loop {
        let arrived = entry::interrupts(VECTOR);
        let known = Known::now();
        if entry::interrupts(VECTOR) == arrived {
            return (known, arrived);
        }
    }
}

fn introduce(worker: &Worker, known: &Known) {
    worker.set_figure(known.digest());
    print(format_args!("{known}"));
    known.say_ready();
}
