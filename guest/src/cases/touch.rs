//! `touch`: writes a pattern over `mib=` MiB, round after round, and checks each page before it is
//! written anew. The pattern of a round follows from the VM's id at its start, so source and clone
//! part. Figure: pages written.

use crate::checked::Patterned;
use crate::memory::{MIB_PAGES, Supply};
use crate::options::Options;
use crate::pattern::mix;
use crate::worker::Worker;

/// Pages between two reports: 16 MiB.
const REPORT_PAGES: u64 = 16 * MIB_PAGES;

pub(super) fn run(worker: Worker, options: Options, mut supply: Supply) -> Worker {
    let pages = super::memory(options, &mut supply).share(worker.index, worker.count);
    let area = Patterned { pages, words: options.number_in("words", 512, 1, 512) };
    // Pages below `cursor` hold the pattern of `salt`, the others that of `old` (none at first).
    let (mut old, mut cursor, mut written) = (None, 0, 0);
    let mut salt = mix(worker.identity(), 0);
    loop {
        if let Some(old) = old {
            worker.check("touch", area.check(cursor, old));
        }
        area.fill(cursor, salt);
        cursor += 1;
        written += 1;
        if cursor == pages.count {
            worker.set_figure(written);
            let more = worker.count_rounds(1) & worker.report();
            (old, cursor) = (Some(salt), 0);
            salt = mix(worker.identity(), written);
            if !more {
                break;
            }
        } else if cursor % REPORT_PAGES == 0 && !worker.report() {
            break;
        }
    }
    for index in 0..pages.count {
        let held = if index < cursor { Some(salt) } else { old };
        if let Some(salt) = held {
            worker.check("touch, at the end", area.check(index, salt));
        }
    }
    worker
}
