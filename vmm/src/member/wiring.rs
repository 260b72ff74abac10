//! What a member's devices are wired to: interrupt lines and the console.

use std::io;
use std::sync::{Arc, Weak};

use super::machine::MemberMachine;
use super::messages::Event;
use crate::board::Board;
use crate::devices::InterruptLine;
use crate::devices::dma::BufferBell;
use crate::devices::identity::ReadyBell;
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

/// Tells the keeper that the guest knows who it is.
pub(super) fn ready_bell(machine: &Arc<MemberMachine>) -> ReadyBell {
    let machine = Arc::clone(machine);
    Box::new(move |generation| machine.tell(Event::IsReady { generation }))
}

/// Counts buffers on the board, and tells the keeper where it has not been told since it looked there.
pub(super) fn buffer_bell(board: &Board, slot: u32, machine: &Arc<MemberMachine>) -> BufferBell {
    let (board, machine) = (board.clone(), Arc::clone(machine));
    Box::new(move |is_registered, pages| {
        if board.member(slot).count_buffer(is_registered, pages) {
            machine.tell(Event::BuffersChanged);
        }
    })
}

/// Console output, to the machine.
pub(super) struct ConsoleSink(pub(super) Arc<MemberMachine>);

impl io::Write for ConsoleSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.print(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
