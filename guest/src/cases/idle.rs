//! `idle`: fills its memory once, then sleeps, `us=` microseconds a round, using no CPU. By call, or
//! with `wait=hlt` in HLT until the local APIC's timer interrupts. Memory is checked at the end.
//! With `say=` it prints a line now and then, with `who=1` who it is.

use salp_protocol::identity::register;

use crate::call;
use crate::checked::Patterned;
use crate::entry;
use crate::identity::{self, Known};
use crate::memory::{PAGE_WORDS, Supply};
use crate::options::{Options, usage};
use crate::serial::print;
use crate::worker::Worker;

/// The timer's vector on vCPU 0; each vCPU has its own.
const TIMER_VECTOR: u8 = 0x50;
const SALT: u64 = 1;

pub(super) fn run(worker: Worker, options: Options, mut supply: Supply) -> Worker {
    let pages = super::memory(options, &mut supply).share(worker.index, worker.count);
    let time_us = options.number_in("us", 100_000, 1, 4_000_000);
    let halting = match options.text("wait") {
        None | Some("sleep") => false,
        Some("hlt") => true,
        Some(other) => usage(format_args!("wait={other} is neither sleep nor hlt")),
    };
    let vector = TIMER_VECTOR + worker.index as u8;
    if halting {
        entry::enable_interrupts();
    }
    let every = options.number("say", 0);
    let is_asked_who = options.number_in("who", 0, 0, 1) == 1 && worker.index == 0 && Known::is_there();
    let mut known = is_asked_who.then(introduce);
    let mut round = 0;
    let area = Patterned { pages, words: PAGE_WORDS };
    area.fill_all(SALT);
    loop {
        if halting {
            let seen = entry::interrupts(vector);
            entry::start_timer(vector, time_us as u32);
            while entry::interrupts(vector) == seen {
                entry::wait_for_interrupt(vector, seen);
            }
        } else {
            call::sleep(time_us);
        }
        if let Some(known) = &mut known
            && identity::read(register::GENERATION) != known.generation
        {
            *known = introduce();
        }
        round += 1;
        if every > 0 && round % every == 0 {
            // The number of rounds is the guest's own memory: a clone's goes on where its source's was.
            print(format_args!("vm {} round {round}", call::who()));
        }
        if !(worker.count_rounds(1) & worker.report()) {
            break;
        }
    }
    area.check_all(&worker, "idle", SALT);
    worker
}

/// Says who this VM is, on the console and to whoever waits for it.
fn introduce() -> Known {
    let known = Known::now();
    print(format_args!("{known}"));
    known.say_ready();
    known
}
