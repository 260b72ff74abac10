//! The cases, one per file. Each takes its vCPU's [`Worker`], the options and all memory, and
//! returns when its part of the memory is verified.

mod churn;
mod counter;
mod dma;
mod fork;
mod identity;
mod idle;
mod puppet;
mod touch;

use crate::memory::{MIB_PAGES, Pages, Supply};
use crate::options::{Options, usage};
use crate::worker::{self, Worker};

/// What a vCPU does: the entry point of all of them.
pub(crate) fn run(vcpu: u64, vcpus: u64, ram_bytes: u64) -> ! {
    let options = Options::read();
    let workers = options.number_in("cpus", vcpus, 1, vcpus);
    if vcpu >= workers {
        worker::rest();
    }
    let case = match options.text("case") {
        Some("touch") => touch::run,
        Some("counter") => counter::run,
        Some("churn") => churn::run,
        Some("dma") => dma::run,
        Some("fork") => fork::run,
        Some("identity") => identity::run,
        Some("idle") => idle::run,
        Some("puppet") => puppet::run,
        Some(other) => usage(format_args!("unknown case {other}")),
        None => usage(format_args!("the command line names no case")),
    };
    let worker = Worker::new(vcpu, workers, options.number("rounds", 0));
    case(worker, options, Supply::new(ram_bytes)).end()
}

/// The pages of `mib=`: all workers' shares together.
fn memory(options: Options, supply: &mut Supply) -> Pages {
    let mib = options.number_in("mib", 8, 1, 1 << 20);
    match supply.take(mib * MIB_PAGES) {
        Some(pages) => pages,
        None => usage(format_args!("mib={mib} is more than there is")),
    }
}
