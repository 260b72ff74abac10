//! What a member's devices are wired to: interrupt lines and the console.

use std::io;
use std::sync::{Arc, Weak};

use super::machine::MemberMachine;
use super::messages::Event;
use crate::devices::InterruptLine;
use crate::kvm::{Msi, Vm};

/// Interrupts by MSI, to vCPU 0.
pub(super) struct MsiLine(pub(super) Weak<Vm>);

impl InterruptLine for MsiLine {
    fn raise(&self, vector: u8) {
        // A VM that is gone has ended, and its guest misses no interrupt.
        let raised = self.0.upgrade().map(|vm| vm.raise_msi(Msi::fixed(0, vector)));
        if let Some(Err(error)) = raised {
            tracing::error!(%error, vector, "an interrupt is lost");
        }
    }
}

/// A thread guest polls.
pub(super) struct NoLine;

impl InterruptLine for NoLine {
    fn raise(&self, _vector: u8) {}
}

/// Console output, a line at a time, to the keeper.
pub(super) struct ConsoleSink {
    machine: Arc<MemberMachine>,
    line: Vec<u8>,
}

impl ConsoleSink {
    pub(super) fn new(machine: &Arc<MemberMachine>) -> Self {
        Self { machine: Arc::clone(machine), line: Vec::new() }
    }
}

/// A line without an end is sent on at this length.
const LINE_LIMIT: usize = 256;

impl io::Write for ConsoleSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.line.extend_from_slice(bytes);
        if bytes.contains(&b'\n') || self.line.len() >= LINE_LIMIT {
            self.machine.tell(Event::Console(std::mem::take(&mut self.line)));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
