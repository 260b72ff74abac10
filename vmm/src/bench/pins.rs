//! The copies of pinned pages in the pause, and what the host takes for the same copies alone.

use std::hint::black_box;
use std::time::Instant;

use super::BenchError;
use super::measure::{Bench, Cell, with};
use super::report::{HOST, Unit};
use super::source::Publishing;
use super::work::free_runs;
use crate::member::messages::{Order, PinHolder};
use crate::space::Access;
use crate::words::{Gfn, Gpa, PAGE_BYTES, index};

/// Memory that is stored to before the host's own copies: more than caches hold.
const COLD_BYTES: usize = 128 << 20;

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
        let mut room = None;
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
                let room = room.get_or_insert_with(Room::new);
                let floor_per_page = room.copy_us(index(copied), index(step)) / copied as f64;
                self.samples.add("pin_copy_page", HOST, &params, Unit::MicrosecondsPerPage, floor_per_page);
            }
            self.tick();
        }
        Ok(())
    }
}

/// Plain memory, to copy pages in.
struct Room {
    from: Vec<[u8; PAGE_BYTES]>,
    into: Vec<[u8; PAGE_BYTES]>,
    value: u8,
}

impl Room {
    fn new() -> Self {
        Self { from: vec![[1; PAGE_BYTES]; COLD_BYTES / PAGE_BYTES], into: Vec::new(), value: 1 }
    }

    /// What it takes to copy `pages` pages, each `step` pages after the one before, that were stored to some
    /// time ago.
    fn copy_us(&mut self, pages: usize, step: usize) -> f64 {
        self.value = self.value.wrapping_add(1);
        let (value, cold) = (self.value, self.from.len());
        self.from.iter_mut().for_each(|page| page.fill(value));
        self.into.resize(pages, [1; PAGE_BYTES]);
        let begin = Instant::now();
        for (number, into) in self.into.iter_mut().enumerate() {
            *into = self.from[number * step % cold];
        }
        black_box(&self.into);
        begin.elapsed().as_secs_f64() * 1e6
    }
}
