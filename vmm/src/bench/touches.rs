//! First reads and writes of a clone, page after page.

use super::BenchError;
use super::baseline::Method;
use super::measure::{Bench, Cell, with};
use super::report::{Params, SALP, Unit};
use super::source::{Publishing, Source};
use super::work::{Task, Work, WorkTimes};
use crate::family::VmId;
use crate::space::Keep;

/// The most pages that one order of the work goes over: 512 MiB.
const WORK_PAGES: u64 = 1 << 17;
/// Runs with many others alive: each of them is made anew.
const CROWDED_RUNS: u32 = 3;
/// The largest memory of VMs of which there are many.
const CROWD_BYTES: u64 = 256 << 20;

impl Bench<'_> {
    /// The benchmark `fault`.
    pub(super) fn fault(&mut self, cell: &Cell<'_>) -> Result<(), BenchError> {
        let params = cell.params();
        let methods = self.methods(cell);
        for sitting in cell.sittings() {
            let (source, mut baselines) = self.subjects(cell, sitting, &methods)?;
            for counts in self.runs(Self::most_runs(cell)) {
                self.check_interrupt()?;
                let value = self.next_value();
                let Some(work) = Work::over(cell.memory, WORK_PAGES, value) else { return Ok(()) };
                if let Some(source) = &source {
                    self.touches_of_salp(source, &work, &params, counts)?;
                }
                for method in &methods {
                    let Some(baselines) = &mut baselines else { break };
                    baselines.dirty(&work.dirty(), value)?;
                    let task = Task { first: None, work: Some(work) };
                    let outcome = baselines.clone_once(*method, task)?;
                    if let (true, Some(times)) = (counts, outcome.work) {
                        self.add_work(Method::name(*method), &params, true, &times);
                    }
                }
                self.tick();
            }
        }
        if self.plan.alive > 0 && cell.memory.ram_bytes() <= CROWD_BYTES {
            self.touches_in_a_crowd(cell)?;
        }
        Ok(())
    }

    fn touches_of_salp(
        &mut self,
        source: &Source,
        work: &Work,
        params: &Params,
        counts: bool,
    ) -> Result<(), BenchError> {
        for is_published in [true, false] {
            source.dirty(source.root, &work.dirty(), work.value)?;
            source.settle()?;
            let (forked, _) = source.fork(source.root, 1)?;
            if is_published {
                source.await_published(&forked)?;
                source.settle()?;
            }
            let times = source.work(forked.clones[0].vm, work)?;
            source.end_clones(&forked)?;
            if counts {
                self.add_work(SALP, params, is_published, &times);
            }
        }
        Ok(())
    }

    /// The same with many other clones of the cut alive, which sleep.
    fn touches_in_a_crowd(&mut self, cell: &Cell<'_>) -> Result<(), BenchError> {
        let others = self.plan.alive;
        let params = with(&cell.params(), "others", others);
        let source = self.source_with(cell, Publishing::InBackground, Keep::Own, 1)?;
        for counts in self.runs(CROWDED_RUNS) {
            self.check_interrupt()?;
            let value = self.next_value();
            let Some(work) = Work::over(cell.memory, WORK_PAGES, value) else { return Ok(()) };
            source.dirty(source.root, &work.dirty(), value)?;
            source.settle()?;
            let (forked, _) = source.fork(source.root, others + 1)?;
            source.await_published(&forked)?;
            source.settle()?;
            let clone: VmId = forked.clones[0].vm;
            let times = source.work(clone, &work)?;
            source.end_clones(&forked)?;
            if counts {
                self.add_work(SALP, &params, true, &times);
            }
            self.tick();
        }
        Ok(())
    }

    fn add_work(&mut self, subject: &str, params: &Params, is_published: bool, times: &WorkTimes) {
        let mut add = |quantity: &str, unit, us| self.samples.add(quantity, subject, params, unit, us);
        let suffix = if is_published { "" } else { "_at_once" };
        let unit = Unit::MicrosecondsPerPage;
        add(&format!("first_read_page{suffix}"), unit, times.read_us);
        add(&format!("first_write_leaf{suffix}"), unit, times.leaf_write_us);
        add(&format!("first_write_page{suffix}"), unit, times.write_us);
        if is_published {
            add("fresh_write_page", unit, times.fresh_us);
            add("order_trip", Unit::Microseconds, times.trip_us);
        }
    }
}
