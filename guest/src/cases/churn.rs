//! `churn`: writes random pages at a `rate=`, keeps each page's checksum in a table, and checks a
//! page before it is written anew and all pages at the end. Figure: pages written.

use crate::call;
use crate::checked::Summed;
use crate::memory::{Pages, Supply};
use crate::options::Options;
use crate::worker::Worker;

/// Page writes between two looks at the host where no rate is set.
const UNLIMITED_BATCH: u64 = 1024;
/// Batches a second where a rate is set.
const BATCHES_PER_SECOND: u64 = 100;

pub(super) fn run(worker: Worker, options: Options, mut supply: Supply) -> Worker {
    let pages = super::memory(options, &mut supply).share(worker.index, worker.count);
    churn(&worker, pages, options.number("rate", 0), true);
    worker
}

/// Accompanies another case on `pages` until vCPU 0 ends it; the figure is that case's.
pub(super) fn accompany(worker: Worker, options: Options, pages: Pages) -> Worker {
    let worker = worker.unlimited();
    churn(&worker, pages, options.number("companion_rate", 10_000), false);
    worker
}

/// Rounds are page writes.
fn churn(worker: &Worker, pages: Pages, rate: u64, has_figure: bool) {
    let mut memory = Summed::new(pages, worker);
    let batch = match rate {
        0 => UNLIMITED_BATCH,
        rate => (rate / BATCHES_PER_SECOND).max(1),
    };
    let mut written = 0;
    loop {
        let mut more = true;
        for _ in 0..batch {
            memory.rewrite_random(worker);
            written += 1;
            more = worker.count_rounds(1);
            if !more {
                break;
            }
        }
        if has_figure {
            worker.set_figure(written);
        }
        if !(worker.report() && more) {
            break;
        }
        memory.diverge(worker.identity());
        if let Some(pause_us) = (batch * 1_000_000).checked_div(rate) {
            call::sleep(pause_us);
        }
    }
    memory.check_all(worker);
}
