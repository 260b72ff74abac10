//! The serial port: vm-superio's 16550, with its output to a sink, its input from the host, and a
//! state that goes to a clone.
//!
//! The port has room for 64 bytes of input; what comes beyond that waits behind it, up to
//! [`BACKLOG_BYTES`], and is part of the state. Whoever was refused some is told when there is room again.
//!
//! Input and its interrupt are written inside the completion gate, so a cut has both or neither.
//! Guest accesses need no gate: the vCPUs stand still at a cut.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{Error, NoEvents};
use vm_superio::{Serial, SerialState as RawState, Trigger};

use super::gate::{CompletionGate, HeldGate};
use super::{InterruptLine, lock};

/// Ports of the device.
pub const SERIAL_PORTS: u16 = 8;

/// The most input that waits for room in the port.
pub const BACKLOG_BYTES: usize = 4096;
/// What vm-superio's port holds itself.
const PORT_BYTES: usize = 64;
/// The port's data register.
const DATA: u8 = 0;

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
    /// Input behind that, [`BACKLOG_BYTES`] at most.
    pub backlog: Vec<u8>,
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
            backlog: Vec::new(),
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
    inner: Mutex<Inner>,
    gate: Arc<CompletionGate>,
    /// Input was refused that would find room now.
    has_room: AtomicBool,
}

struct Inner {
    serial: Serial<Line, NoEvents, Sink>,
    backlog: VecDeque<u8>,
    /// Some input has found no room.
    is_refusing: bool,
}

impl Inner {
    /// Moves input into the port as far as there is room.
    fn refill(&mut self) {
        while !self.backlog.is_empty() {
            let (first, _) = self.backlog.as_slices();
            let accepted = match self.serial.enqueue_raw_bytes(first) {
                Ok(accepted) => accepted,
                Err(Error::FullFifo | Error::IOError(_)) => 0,
                Err(Error::Trigger(never)) => match never {},
            };
            if accepted == 0 {
                return;
            }
            self.backlog.drain(..accepted);
        }
    }
}

impl SerialPort {
    /// A port after reset.
    #[must_use]
    pub fn new(sink: Sink, interrupt: Option<SerialInterrupt>, gate: Arc<CompletionGate>) -> Self {
        Self::with(Serial::new(Line(interrupt), sink), VecDeque::new(), gate)
    }

    fn with(serial: Serial<Line, NoEvents, Sink>, backlog: VecDeque<u8>, gate: Arc<CompletionGate>) -> Self {
        let inner = Mutex::new(Inner { serial, backlog, is_refusing: false });
        Self { inner, gate, has_room: AtomicBool::new(false) }
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
        let error = || SerialStateError { input_bytes: state.input.len() + state.backlog.len() };
        if state.backlog.len() > BACKLOG_BYTES {
            return Err(error());
        }
        let serial = Serial::from_state(&raw, Line(interrupt), NoEvents, sink).map_err(|_| error())?;
        Ok(Self::with(serial, state.backlog.iter().copied().collect(), gate))
    }

    /// A guest's read of port `SERIAL + offset`.
    pub fn read(&self, offset: u8, into: &mut [u8]) {
        into.fill(0);
        if let [value] = into {
            let mut inner = lock(&self.inner);
            *value = inner.serial.read(offset);
            if offset == DATA {
                self.read_data(&mut inner);
            }
        }
    }

    /// Something may have been read: an empty port takes what waits, with one interrupt for all of it.
    fn read_data(&self, inner: &mut Inner) {
        if inner.serial.fifo_capacity() == PORT_BYTES {
            inner.refill();
        }
        if inner.backlog.is_empty() && std::mem::take(&mut inner.is_refusing) {
            self.has_room.store(true, Ordering::Relaxed);
        }
    }

    /// Whether there is room again where there was none: true the first time.
    pub fn take_room(&self) -> bool {
        self.has_room.load(Ordering::Relaxed) && self.has_room.swap(false, Ordering::Relaxed)
    }

    /// A guest's write to port `SERIAL + offset`.
    pub fn write(&self, offset: u8, from: &[u8]) {
        if let [value] = *from
            && let Err(error) = lock(&self.inner).serial.write(offset, value)
        {
            // A real line loses bytes too; the guest goes on.
            tracing::debug!(%error, "serial output is lost");
        }
    }

    /// Gives the guest input. Returns how many bytes found room.
    pub fn enqueue(&self, input: &[u8]) -> usize {
        let _inside = self.gate.enter();
        let mut inner = lock(&self.inner);
        let accepted = input.len().min(BACKLOG_BYTES - inner.backlog.len());
        inner.backlog.extend(&input[..accepted]);
        inner.refill();
        inner.is_refusing |= accepted < input.len();
        accepted
    }

    /// The port's state for a clone. The gate must be held and the vCPUs stopped.
    #[must_use]
    pub fn save(&self, _held: &HeldGate) -> SerialState {
        let inner = lock(&self.inner);
        let mut state = SerialState::from(inner.serial.state());
        state.backlog = inner.backlog.iter().copied().collect();
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::{CountingLine, SharedSink};

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
    fn long_input_waits_with_one_interrupt_for_each_portful() {
        let (gate, line) = (CompletionGate::new(), CountingLine::new());
        let interrupt = Some(SerialInterrupt { line: line.clone(), vector: 4 });
        let port = SerialPort::new(Box::new(SharedSink::default()), interrupt, gate.clone());
        port.write(INTERRUPT_ENABLE, &[1]);
        let text: Vec<u8> = (0..=255).cycle().take(PORT_BYTES + BACKLOG_BYTES + 100).collect();
        let first = port.enqueue(&text);
        // Whether the port takes its part before or after is of no account to whoever sends the rest.
        assert!((BACKLOG_BYTES..=PORT_BYTES + BACKLOG_BYTES).contains(&first));
        assert!(!port.take_room());
        let state = port.save(&gate.hold());
        let own = CompletionGate::new();
        let clone = SerialPort::restore(&state, Box::new(SharedSink::default()), None, own);
        for port in [&clone.expect("the state was just saved"), &port] {
            for expected in &text[..first] {
                let mut byte = [0];
                port.read(DATA, &mut byte);
                assert_eq!(byte[0], *expected);
            }
        }
        assert!(port.take_room() && !port.take_room());
        assert_eq!(port.enqueue(&text[first..]), text.len() - first);
        assert!(line.raised(4) <= first.div_ceil(PORT_BYTES) + 1);
        let too_much = SerialState { backlog: vec![0; BACKLOG_BYTES + 1], ..state };
        let refused = SerialPort::restore(&too_much, Box::new(SharedSink::default()), None, gate);
        assert!(refused.is_err());
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
