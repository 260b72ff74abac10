//! The serial port: vm-superio's 16550, with its output to a sink, its input from the host, and a
//! state that goes to a clone.
//!
//! Input and its interrupt are written inside the completion gate, so a cut has both or neither.
//! Guest accesses need no gate: the vCPUs stand still at a cut.

use std::convert::Infallible;
use std::io::Write;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{Error, NoEvents};
use vm_superio::{Serial, SerialState as RawState, Trigger};

use super::gate::{CompletionGate, HeldGate};
use super::{InterruptLine, lock};

/// Ports of the device.
pub const SERIAL_PORTS: u16 = 8;

/// Where the guest's output goes.
pub type Sink = Box<dyn Write + Send>;

/// The interrupt of the port, if it has one.
#[derive(Clone)]
pub struct SerialInterrupt {
    /// The line.
    pub line: Arc<dyn InterruptLine>,
    /// The vector raised on it.
    pub vector: u8,
}

struct Line(Option<SerialInterrupt>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        if let Some(interrupt) = &self.0 {
            interrupt.line.raise(interrupt.vector);
        }
        Ok(())
    }
}

/// The port's registers and unread input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch (low, high), interrupt enable, interrupt identification, line control, line
    /// status, modem control, modem status, scratch.
    pub registers: [u8; 9],
    /// Input that the guest has not read, 64 bytes at most.
    pub input: Vec<u8>,
}

impl From<RawState> for SerialState {
    fn from(raw: RawState) -> Self {
        Self {
            registers: [
                raw.baud_divisor_low,
                raw.baud_divisor_high,
                raw.interrupt_enable,
                raw.interrupt_identification,
                raw.line_control,
                raw.line_status,
                raw.modem_control,
                raw.modem_status,
                raw.scratch,
            ],
            input: raw.in_buffer,
        }
    }
}

impl From<&SerialState> for RawState {
    fn from(state: &SerialState) -> Self {
        let [low, high, enable, identification, line, line_status, modem, modem_status, scratch] =
            state.registers;
        Self {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: line,
            line_status,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer: state.input.clone(),
        }
    }
}

/// Why a saved port is not accepted.
#[derive(Debug, thiserror::Error)]
#[error("a saved serial port has {input_bytes} bytes of input, more than its queue")]
pub struct SerialStateError {
    /// Bytes in the state.
    pub input_bytes: usize,
}

/// The port.
pub struct SerialPort {
    serial: Mutex<Serial<Line, NoEvents, Sink>>,
    gate: Arc<CompletionGate>,
}

impl SerialPort {
    /// A port after reset.
    #[must_use]
    pub fn new(sink: Sink, interrupt: Option<SerialInterrupt>, gate: Arc<CompletionGate>) -> Self {
        let serial = Mutex::new(Serial::new(Line(interrupt), sink));
        Self { serial, gate }
    }

    /// A clone's port. If an interrupt is pending in the state it is raised again, so the line
    /// must be ready.
    ///
    /// # Errors
    /// [`SerialStateError`] if the state has more input than the port can hold.
    pub fn restore(
        state: &SerialState,
        sink: Sink,
        interrupt: Option<SerialInterrupt>,
        gate: Arc<CompletionGate>,
    ) -> Result<Self, SerialStateError> {
        let raw = RawState::from(state);
        let serial = Serial::from_state(&raw, Line(interrupt), NoEvents, sink);
        let serial = serial.map_err(|_| SerialStateError { input_bytes: state.input.len() })?;
        Ok(Self { serial: Mutex::new(serial), gate })
    }

    /// A guest's read of port `SERIAL + offset`.
    pub fn read(&self, offset: u8, into: &mut [u8]) {
        into.fill(0);
        if let [value] = into {
            *value = lock(&self.serial).read(offset);
        }
    }

    /// A guest's write to port `SERIAL + offset`.
    pub fn write(&self, offset: u8, from: &[u8]) {
        if let [value] = *from
            && let Err(error) = lock(&self.serial).write(offset, value)
        {
            // A real line loses bytes too; the guest goes on.
            tracing::debug!(%error, "serial output is lost");
        }
    }

    /// Gives the guest input. Returns how many bytes found room (the queue holds 64).
    pub fn enqueue(&self, input: &[u8]) -> usize {
        let _inside = self.gate.enter();
        match lock(&self.serial).enqueue_raw_bytes(input) {
            Ok(accepted) => accepted,
            Err(Error::FullFifo | Error::IOError(_)) => 0,
            Err(Error::Trigger(never)) => match never {},
        }
    }

    /// The port's state for a clone. The gate must be held and the vCPUs stopped.
    #[must_use]
    pub fn save(&self, _held: &HeldGate) -> SerialState {
        lock(&self.serial).state().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::{CountingLine, SharedSink};

    const DATA: u8 = 0;
    const INTERRUPT_ENABLE: u8 = 1;
    const SCRATCH: u8 = 7;

    #[test]
    fn output_goes_to_the_sink_and_input_with_an_interrupt_to_the_guest() {
        let (gate, sink, line) = (CompletionGate::new(), SharedSink::default(), CountingLine::new());
        let interrupt = Some(SerialInterrupt { line: line.clone(), vector: 0x24 });
        let port = SerialPort::new(Box::new(sink.clone()), interrupt, gate);
        for byte in b"hello" {
            port.write(DATA, &[*byte]);
        }
        port.write(DATA, b"two");
        assert_eq!(sink.bytes(), b"hello");
        port.write(INTERRUPT_ENABLE, &[1]);
        assert_eq!(port.enqueue(b"ab"), 2);
        assert_eq!(line.raised(0x24), 1);
        let mut byte = [0];
        port.read(DATA, &mut byte);
        assert_eq!(byte, *b"a");
    }

    #[test]
    fn a_restored_port_has_registers_unread_input_and_its_own_sink() {
        let (gate, sink) = (CompletionGate::new(), SharedSink::default());
        let port = SerialPort::new(Box::new(sink.clone()), None, gate.clone());
        port.write(SCRATCH, &[0x5a]);
        port.write(INTERRUPT_ENABLE, &[1]);
        assert_eq!(port.enqueue(b"xyz"), 3);
        let state = port.save(&gate.hold());
        let bytes = postcard::to_stdvec(&state).expect("a state is plain data");
        let state: SerialState = postcard::from_bytes(&bytes).expect("just serialised");

        let (own, line) = (SharedSink::default(), CountingLine::new());
        let interrupt = Some(SerialInterrupt { line: line.clone(), vector: 9 });
        let clone = SerialPort::restore(&state, Box::new(own.clone()), interrupt, CompletionGate::new())
            .expect("the state was just saved");
        assert_eq!(line.raised(9), 1, "the pending input is announced again");
        let mut read = [0];
        clone.read(SCRATCH, &mut read);
        assert_eq!(read, [0x5a]);
        clone.read(DATA, &mut read);
        assert_eq!(read, *b"x");
        clone.write(DATA, b"c");
        assert_eq!((own.bytes(), sink.bytes()), (b"c".to_vec(), Vec::new()));
        let full = SerialState { input: vec![0; 65], ..state };
        assert!(SerialPort::restore(&full, Box::new(own), None, gate).is_err());
    }
}
