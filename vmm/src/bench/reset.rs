//! A clone's return to its cut, asked for from outside and by the guest: after so many pages were
//! written, beside each other or one here and one there, alone or beside other clones.

use super::BenchError;
use super::measure::{Bench, Cell, with};
use super::report::{Params, Unit};
use super::source::{Publishing, Source};
use super::work::{PageRun, free_runs};
use crate::family::VmId;
use crate::member::messages::ResetReply;

/// Pages written since the cut or the last reset.
const DIRTY_PAGES: [u64; 3] = [0, 50, 1_000];
/// Other clones of the same cut that are alive.
const OTHERS: [usize; 2] = [0, 16];

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Order,
    Guest,
}

/// How the written pages lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spread {
    Adjacent,
    Scattered,
}

struct Case {
    by: By,
    spread: Spread,
    pages: u64,
    others: usize,
}

impl Case {
    fn params(&self, cell: &Cell<'_>) -> Params {
        let by = if self.by == By::Order { "order" } else { "guest" };
        let spread = if self.spread == Spread::Adjacent { "adjacent" } else { "scattered" };
        let params = with(&with(&cell.params(), "by", by), "spread", spread);
        with(&params, "others", self.others)
    }
}

impl Bench<'_> {
    /// The benchmark `reset`.
    pub(super) fn reset(&mut self, cell: &Cell<'_>) -> Result<(), BenchError> {
        let Some(run) = free_runs(cell.memory, u64::MAX).first().copied() else { return Ok(()) };
        let source = self.source(cell, Publishing::InBackground)?;
        let clone = source.cloned_from_root()?;
        for others in OTHERS {
            let beside = (others > 0).then(|| source.fork(source.root, others)).transpose()?;
            for case in cases(others, run) {
                let params = case.params(cell);
                for counts in self.runs(u32::MAX) {
                    self.check_interrupt()?;
                    let (reply, us) = self.reset_once(&source, clone, &case, run)?;
                    if counts {
                        self.add_reset(&case, &params, &reply, us);
                    }
                    self.tick();
                }
            }
            if let Some((forked, _)) = beside {
                source.end_clones(&forked)?;
            }
        }
        Ok(())
    }

    fn reset_once(
        &mut self,
        source: &Source,
        clone: VmId,
        case: &Case,
        run: PageRun,
    ) -> Result<(ResetReply, f64), BenchError> {
        let value = self.next_value();
        let order = match case.spread {
            Spread::Adjacent => run.part(0, case.pages).store(value),
            Spread::Scattered => run.store_scattered(case.pages, value),
        };
        source.order_store(clone, order)?;
        let (reply, asked_at) = match case.by {
            By::Order => source.reset(clone)?,
            By::Guest => source.reset_by_guest(clone)?,
        };
        // A thread guest does not say when it goes on.
        let end = reply.times.entered.max(reply.times.resumed);
        Ok((reply, end.saturating_sub(asked_at) as f64 / 1e3))
    }

    fn add_reset(&mut self, case: &Case, params: &Params, reply: &ResetReply, us: f64) {
        let times = &reply.times;
        let mut add = |quantity: &str, us: f64| self.add(quantity, params, Unit::Microseconds, us);
        add(&format!("reset_{}", case.pages), us);
        if case.pages == 50 {
            let us = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e3;
            add("reset_stage.stop", us(times.begun, times.stopped));
            add("reset_stage.drain", us(times.stopped, times.drained));
            add("reset_stage.memory", us(times.drained, times.restored));
            add("reset_stage.set", us(times.restored, times.set));
            add("reset_stage.enter", us(times.set, times.entered.max(times.resumed)));
        }
    }
}

fn cases(others: usize, run: PageRun) -> Vec<Case> {
    let mut cases = Vec::new();
    for by in [By::Order, By::Guest] {
        for pages in DIRTY_PAGES.map(|pages| pages.min(run.pages)) {
            for spread in [Spread::Adjacent, Spread::Scattered] {
                // Nothing written lies nowhere; and beside others one case tells.
                if (pages > 0 || spread == Spread::Adjacent) && (others == 0 || pages == 50) {
                    cases.push(Case { by, spread, pages, others });
                }
            }
        }
    }
    cases
}

impl Source {
    /// Resets a clone; when that was asked for, in nanoseconds.
    fn reset(&self, vm: VmId) -> Result<(ResetReply, u64), BenchError> {
        let before = self.colony.member(vm)?.state().resets;
        let asked_at = crate::kvm::vcpu::monotonic_ns();
        self.colony.reset(vm)?;
        Ok((self.await_reset(vm, before)?, asked_at))
    }

    /// Has a guest ask for its reset; the moment of its asking is the beginning of the reset.
    fn reset_by_guest(&self, vm: VmId) -> Result<(ResetReply, u64), BenchError> {
        let before = self.colony.member(vm)?.state().resets;
        self.begin_reset(vm)?;
        let reply = self.await_reset(vm, before)?;
        Ok((reply, reply.times.begun))
    }

    fn await_reset(&self, vm: VmId, before: u64) -> Result<ResetReply, BenchError> {
        let is_done = |state: &mut crate::keeper::member_handle::MemberState| {
            state.was_reset.filter(|_| state.resets > before)
        };
        let reply = self.colony.member(vm)?.wait_for(super::source::LIMIT, is_done)?;
        self.take_results_at_cut(vm)?;
        Ok(reply)
    }
}
