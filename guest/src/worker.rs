//! A vCPU at work on a case: its figures, the reports to the host, the common end.
//!
//! vCPU 0 speaks for all: its report holds the sums, and the host's "finish" reaches the others
//! through [`FINISH`]. A worker that has verified its memory ends; vCPU 0 waits for the others, then
//! ends the VM.

use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use salp_protocol::{exit, layout};

use crate::call::{self, Arguments};
use crate::pattern::Mismatch;
use crate::serial::print;

const MAX_VCPUS: usize = layout::MAX_VCPUS as usize;
/// After so many failed checks of a vCPU the serial port hears no more.
const PRINTED_ERRORS: u64 = 8;

/// One vCPU's figures. Written by that vCPU alone, read by vCPU 0; no order between them matters
/// but that of [`ENDED`].
struct Tally {
    rounds: AtomicU64,
    errors: AtomicU64,
    transfers: AtomicU64,
    figure: AtomicU64,
}

static TALLIES: [Tally; MAX_VCPUS] = [const {
    Tally {
        rounds: AtomicU64::new(0),
        errors: AtomicU64::new(0),
        transfers: AtomicU64::new(0),
        figure: AtomicU64::new(0),
    }
}; MAX_VCPUS];

/// Set once, by vCPU 0: verify everything and end.
static FINISH: AtomicBool = AtomicBool::new(false);
/// How many vCPUs beyond the first have ended (release); vCPU 0 waits for them (acquire).
static ENDED: AtomicU64 = AtomicU64::new(0);
/// The VM's id when vCPU 0 last reported.
static IDENTITY: AtomicU64 = AtomicU64::new(0);

/// One vCPU's part in the case.
#[derive(Debug)]
pub(crate) struct Worker {
    /// Number of this vCPU.
    pub(crate) index: u64,
    /// How many vCPUs work.
    pub(crate) count: u64,
    /// Rounds to do, 0 for no end.
    limit: u64,
    tally: usize,
}

impl Worker {
    pub(crate) fn new(index: u64, count: u64, limit: u64) -> Self {
        let tally = usize::try_from(index).expect("a vCPU number is small");
        if index == 0 {
            IDENTITY.store(call::who(), Ordering::Relaxed);
        }
        Self { index, count, limit, tally }
    }

    /// The same vCPU, with no end of its own: it goes on until vCPU 0 finishes.
    pub(crate) fn unlimited(self) -> Self {
        Self { limit: 0, ..self }
    }

    /// Counts `rounds` more; false when the case has done all that it was asked for.
    pub(crate) fn count_rounds(&self, rounds: u64) -> bool {
        let done = self.tally().rounds.fetch_add(rounds, Ordering::Relaxed) + rounds;
        self.limit == 0 || done < self.limit
    }

    /// Reports if this is vCPU 0; false when it is time to verify everything and end.
    pub(crate) fn report(&self) -> bool {
        if self.index == 0 {
            if call::progress(sums()) {
                FINISH.store(true, Ordering::Relaxed);
            }
            IDENTITY.store(call::who(), Ordering::Relaxed);
        }
        !FINISH.load(Ordering::Relaxed)
    }

    /// The VM's id at the last report.
    pub(crate) fn identity(&self) -> u64 {
        IDENTITY.load(Ordering::Relaxed)
    }

    /// Counts a failed check and, for the first few, says what failed.
    pub(crate) fn error(&self, text: fmt::Arguments<'_>) {
        let errors = self.tally().errors.fetch_add(1, Ordering::Relaxed);
        if errors < PRINTED_ERRORS {
            print(format_args!("vcpu {}: {text}", self.index));
        }
    }

    /// Counts a failed check of memory, if it failed.
    pub(crate) fn check(&self, what: &str, outcome: Result<(), Mismatch>) -> bool {
        if let Err(Mismatch { address, expected, found }) = outcome {
            self.error(format_args!("{what}: {address:#x} holds {found:#x}, not {expected:#x}"));
        }
        outcome.is_ok()
    }

    /// How many checks of this vCPU have failed.
    pub(crate) fn errors(&self) -> u64 {
        self.tally().errors.load(Ordering::Relaxed)
    }

    /// Counts verified transfers of `bytes` each; the case's figure is the bytes of all.
    pub(crate) fn count_transfers(&self, transfers: u64, bytes: u64) {
        self.tally().transfers.fetch_add(transfers, Ordering::Relaxed);
        self.tally().figure.fetch_add(transfers * bytes, Ordering::Relaxed);
    }

    /// Counts transfers from 0 again: this VM is a new one.
    pub(crate) fn reset_transfers(&self) {
        self.tally().transfers.store(0, Ordering::Relaxed);
        self.tally().figure.store(0, Ordering::Relaxed);
    }

    /// Sets the case's own figure; the report holds the sum over all vCPUs.
    pub(crate) fn set_figure(&self, figure: u64) {
        self.tally().figure.store(figure, Ordering::Relaxed);
    }

    /// Tells the other vCPUs to end.
    pub(crate) fn finish_all(&self) {
        FINISH.store(true, Ordering::Relaxed);
    }

    /// This vCPU has verified its part. vCPU 0 ends the VM when all have.
    pub(crate) fn end(self) -> ! {
        if self.index > 0 {
            ENDED.fetch_add(1, Ordering::Release);
            rest();
        }
        while ENDED.load(Ordering::Acquire) + 1 < self.count {
            self.report();
            call::sleep(1000);
        }
        let figures = sums();
        call::finished(figures);
        call::exit(if figures.rsi == 0 { exit::OK } else { exit::ERRORS })
    }

    fn tally(&self) -> &'static Tally {
        &TALLIES[self.tally]
    }
}

/// Sleeps until the VM ends.
pub(crate) fn rest() -> ! {
    loop {
        call::sleep(1_000_000);
    }
}

fn sums() -> Arguments {
    TALLIES.iter().fold(Arguments::default(), |sum, tally| Arguments {
        rdi: sum.rdi + tally.rounds.load(Ordering::Relaxed),
        rsi: sum.rsi + tally.errors.load(Ordering::Relaxed),
        rdx: sum.rdx + tally.transfers.load(Ordering::Relaxed),
        r8: sum.r8.wrapping_add(tally.figure.load(Ordering::Relaxed)),
    })
}
