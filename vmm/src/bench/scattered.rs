//! The pause of a running source whose memory lies in the arena: a clone, or a VM that was published
//! and dropped its own copies. What it has written since lies about in single pages, and what it
//! writes all the time is opened again after it was protected ahead.

use super::BenchError;
use super::measure::{Bench, Cell, with};
use super::report::{Params, Unit};
use super::source::{Publishing, Source};
use super::work::{PageRun, free_runs};
use crate::family::VmId;
use crate::member::messages::GuestKind;
use crate::space::Keep;

/// Dirty pages, spread evenly.
const DIRTY_PAGES: [u64; 3] = [0, 1_000, 10_000];
/// Leaves that are written all the time.
const HOT_LEAVES: u64 = 64;
/// Stores of the hot source between two exits.
const STORES: u64 = 1 << 20;
/// Each run makes its source anew.
const RUNS: u32 = 10;

/// How the source came to have its memory in the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Cloned,
    Dropped,
}

/// What the source writes before its fork, and while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    Scattered(u64),
    Hot(u64),
}

impl Bench<'_> {
    /// The benchmark `scattered`.
    pub(super) fn scattered(&mut self, cell: &Cell<'_>) -> Result<(), BenchError> {
        let Some(run) = free_runs(cell.memory, u64::MAX).first().copied() else { return Ok(()) };
        let mut loads: Vec<_> =
            DIRTY_PAGES.iter().map(|pages| Load::Scattered((*pages).min(run.pages))).collect();
        // A small memory has fewer.
        loads.dedup();
        loads.push(Load::Hot(HOT_LEAVES.min(run.leaves())));
        for (origin, keep) in [(Origin::Cloned, Keep::Own), (Origin::Dropped, Keep::Shared)] {
            let origin_name = if origin == Origin::Cloned { "clone" } else { "dropped" };
            let params = with(&cell.params(), "source", origin_name);
            let source = self.source_with(cell, Publishing::InBackground, keep, 2)?;
            for load in &loads {
                let params = match load {
                    Load::Scattered(pages) => with(&params, "dirty_pages", *pages),
                    Load::Hot(leaves) => with(&params, "hot_leaves", *leaves),
                };
                for counts in self.runs(RUNS) {
                    self.check_interrupt()?;
                    let counted = counts.then_some(&params);
                    self.fork_scattered(&source, origin, *load, run, counted)?;
                    self.tick();
                }
            }
        }
        Ok(())
    }

    fn fork_scattered(
        &mut self,
        source: &Source,
        origin: Origin,
        load: Load,
        run: PageRun,
        counted: Option<&Params>,
    ) -> Result<(), BenchError> {
        source.dirty(source.root, &[run], self.next_value())?;
        let clone = source.cloned_from_root()?;
        let vm = if origin == Origin::Cloned { clone } else { source.root };
        if let Load::Scattered(pages @ 1..) = load {
            source.order_store(vm, run.store_scattered(pages, self.next_value()))?;
            source.settle()?;
        }
        let (call_us, pause_us, protect_us) = self.fork_while_it_runs(source, vm, load, run)?;
        source.colony.end(clone)?;
        source.settle()?;
        if let Some(params) = counted {
            self.add("scattered_pause", params, Unit::Microseconds, pause_us);
            self.add("scattered_call", params, Unit::Microseconds, call_us);
            self.add("scattered_protect", params, Unit::Microseconds, protect_us);
        }
        Ok(())
    }

    /// Without KVM nothing runs that could be reported on: the source waits.
    fn fork_while_it_runs(
        &self,
        source: &Source,
        vm: VmId,
        load: Load,
        run: PageRun,
    ) -> Result<(f64, f64, f64), BenchError> {
        let runs = self.plan.guest == GuestKind::Kvm;
        match load {
            _ if !runs => {}
            Load::Scattered(_) => source.start_counting(vm)?,
            Load::Hot(leaves) => source.start_walking(vm, run.walk_leaves(leaves, STORES))?,
        }
        let (forked, times) = source.fork_as_it_is(vm, 1)?;
        if runs {
            source.stop_counting(vm)?;
        }
        source.end_clones(&forked)?;
        Ok((times.call_us, times.pause_us, times.stages_us.protect))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_memories_have_no_case_twice() {
        let mut loads: Vec<_> = DIRTY_PAGES.iter().map(|pages| Load::Scattered((*pages).min(500))).collect();
        loads.dedup();
        assert_eq!(loads, [Load::Scattered(0), Load::Scattered(500)]);
    }
}
