//! The copies of pinned pages in the pause.

use super::BenchError;
use super::measure::{Bench, Cell, with};
use super::report::Unit;
use super::source::Publishing;
use super::work::free_runs;
use crate::member::messages::{Order, PinHolder};
use crate::space::Access;
use crate::words::{Gfn, Gpa};

impl Bench<'_> {
    /// The benchmark `pins`.
    pub(super) fn pins(&mut self, cell: &Cell<'_>) -> Result<(), BenchError> {
        let plan = self.plan;
        for pins in &plan.pins {
            // Scattered: one page in four.
            for (step, layout) in [(1, "together"), (4, "scattered")] {
                self.pins_laid_out(cell, *pins, step, layout)?;
            }
        }
        Ok(())
    }

    fn pins_laid_out(
        &mut self,
        cell: &Cell<'_>,
        pins: u64,
        step: u64,
        layout: &str,
    ) -> Result<(), BenchError> {
        let Some(run) = free_runs(cell.memory, cell.memory.ram_bytes()).first().copied() else {
            return Ok(());
        };
        let source = self.source(cell, Publishing::InBackground)?;
        let params = with(&cell.params(), "pins", pins);
        let params = with(&params, "layout", layout);
        source.dirty(source.root, &[run], self.next_value())?;
        for pin in (0..pins).map(|pin| pin * step).take_while(|page| *page < run.pages) {
            let first = Gfn(Gpa(run.start).gfn().0 + pin);
            source.colony.ask(
                source.root,
                Order::Pin { first, pages: 1, holder: PinHolder::Salp(Access::ReadWrite) },
            )?;
        }
        for counts in self.runs(u32::MAX) {
            self.check_interrupt()?;
            source.dirty(source.root, &[run], self.next_value())?;
            source.settle()?;
            let (forked, times) = source.fork(source.root, 1)?;
            source.end_clones(&forked)?;
            let copied = forked.figures.copied_pages;
            if counts {
                self.add("pin_pause", &params, Unit::Microseconds, times.pause_us);
            }
            if counts && copied > 0 {
                let per_page = forked.figures.copy.as_secs_f64() * 1e6 / copied as f64;
                self.add("pin_copy_page", &params, Unit::MicrosecondsPerPage, per_page);
            }
            self.tick();
        }
        Ok(())
    }
}
