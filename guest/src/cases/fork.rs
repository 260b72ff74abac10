//! `fork`: asks for its own fork, `rounds=` times (at least once). Source and clone both check that
//! memory is as it was, write it anew with patterns of their own, and check that. Figure: clones.
//!
//! A clone ends after its first check, or with `nest=` above 0 forks in its turn as often as the
//! source does, one level less.

use crate::call;
use crate::checked::Patterned;
use crate::memory::{PAGE_WORDS, Supply};
use crate::options::Options;
use crate::pattern::mix;
use crate::worker::Worker;

pub(super) fn run(worker: Worker, options: Options, mut supply: Supply) -> Worker {
    let pages = super::memory(options, &mut supply).share(worker.index, worker.count);
    if worker.index > 0 {
        return super::churn::accompany(worker, options, pages);
    }
    let area = Patterned { pages, words: PAGE_WORDS };
    let rounds = options.number("rounds", 1).max(1);
    let mut levels = options.number("nest", 0);
    let mut identity = call::who();
    let mut salt = mix(identity, 0);
    area.fill_all(salt);
    let (mut round, mut clones) = (0, 0);
    while round < rounds {
        round += 1;
        worker.count_rounds(1);
        let Ok(answer) = call::fork() else {
            worker.error(format_args!("fork: refused in round {round}"));
            break;
        };
        let now = call::who();
        area.check_all(&worker, "fork", salt);
        if (now == identity) == (answer == 0) {
            worker.error(format_args!("fork: answer {answer} to {identity}, who is {now} now"));
        }
        if answer == 0 {
            (round, clones) = if levels > 0 { (0, 0) } else { (rounds, 0) };
            levels = levels.saturating_sub(1);
            identity = now;
        } else {
            clones += 1;
        }
        salt = mix(identity, mix(round, clones));
        area.fill_all(salt);
        worker.set_figure(clones);
        let more = worker.report();
        area.check_all(&worker, "fork, own pattern", salt);
        if !more {
            break;
        }
    }
    worker.finish_all();
    worker
}
