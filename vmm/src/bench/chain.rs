//! A clone of a clone of a clone.

use super::BenchError;
use super::measure::{Bench, Cell, with};
use super::report::Unit;
use super::source::Publishing;
use super::work::free_runs;

/// Depths of a chain that are reported.
const DEPTHS: [usize; 5] = [1, 2, 4, 8, 16];
/// Pages that a clone of a chain writes before it is forked: 8 MiB.
const CHAIN_BYTES: u64 = 8 << 20;

impl Bench<'_> {
    /// The benchmark `chain`.
    pub(super) fn chain(&mut self, cell: &Cell<'_>) -> Result<(), BenchError> {
        let source = self.source(cell, Publishing::InBackground)?;
        let runs = free_runs(cell.memory, CHAIN_BYTES);
        for counts in self.runs(u32::MAX) {
            self.check_interrupt()?;
            let (mut vm, mut chain) = (source.root, Vec::new());
            for depth in 1..=DEPTHS[DEPTHS.len() - 1] {
                source.dirty(vm, &runs, self.next_value())?;
                source.settle()?;
                let (forked, times) = source.fork(vm, 1)?;
                source.await_published(&forked)?;
                if counts && DEPTHS.contains(&depth) {
                    let params = with(&cell.params(), "depth", depth);
                    self.add("chain_call", &params, Unit::Microseconds, times.call_us);
                    self.add("chain_pause", &params, Unit::Microseconds, times.pause_us);
                }
                vm = forked.clones[0].vm;
                chain.push(vm);
            }
            for vm in chain.into_iter().rev() {
                source.colony.end(vm)?;
            }
            source.settle()?;
            self.tick();
        }
        Ok(())
    }
}
