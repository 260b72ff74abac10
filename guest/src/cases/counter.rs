//! `counter`: each vCPU counts in two pages far apart, always the first page before the second.
//!
//! A cut must keep that order: a vCPU checks that its own pages hold its last count, and that no
//! other vCPU's second page is newer than its first. Figure: the count.

use core::hint::spin_loop;

use crate::memory::{Pages, Supply, load, store};
use crate::options::Options;
use crate::worker::Worker;

/// A vCPU looks at the others once in so many counts.
const LOOK_AROUND: u64 = 16;

pub(super) fn run(worker: Worker, options: Options, mut supply: Supply) -> Worker {
    let every = options.number_in("every", 1 << 16, 1, u64::MAX);
    let all = super::memory(options, &mut supply);
    let pair = |index| Pair::new(all.share(index, worker.count));
    let own = pair(worker.index);
    let mut count = 0;
    loop {
        own.check_exact(&worker, count);
        count += 1;
        store(own.first, count);
        store(own.second, count);
        if count % LOOK_AROUND == 0 {
            (0..worker.count).for_each(|other| pair(other).check_order(&worker));
        }
        let more = worker.count_rounds(1);
        if count % every == 0 || !more {
            worker.set_figure(count);
            if !(worker.report() && more) {
                break;
            }
        }
        spin_loop();
    }
    own.check_exact(&worker, count);
    worker
}

/// The two pages of one vCPU.
struct Pair {
    first: u64,
    second: u64,
}

impl Pair {
    fn new(pages: Pages) -> Self {
        Self { first: pages.address(0), second: pages.address(pages.count / 2) }
    }

    fn check_exact(&self, worker: &Worker, count: u64) {
        let (first, second) = (load(self.first), load(self.second));
        if (first, second) != (count, count) {
            worker.error(format_args!("counter: pages hold {first} and {second}, not {count}"));
        }
    }

    /// The second page is read first: whatever happens in between makes the first page newer.
    fn check_order(&self, worker: &Worker) {
        let second = load(self.second);
        let first = load(self.first);
        if second > first {
            worker.error(format_args!("counter: second page {second} is newer than {first}"));
        }
    }
}
