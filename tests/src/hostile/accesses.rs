//! A guest that reads and writes any port and any address without memory, in any width.
//!
//! Besides what all targets hold: where nobody is, a load gives all ones; and the serial port's state
//! can be saved at any moment and makes a port again.

use std::io;
use std::sync::Arc;

use salp::devices::bus::{Bus, Claim};
use salp::devices::exit::ExitPort;
use salp::devices::gate::CompletionGate;
use salp::devices::identity::{Identity, IdentityDevice, IdentityInterrupt, IdentityState};
use salp::devices::serial::SerialPort;
use salp::words::Gpa;
use salp_protocol::{layout, port};

use super::bytes::Bytes;
use super::memory::CanaryRam;
use super::rings::{DeadLine, engine};

const PAGES: usize = 16;
/// The most accesses of one input.
const STEPS: usize = 1000;

/// The input is a list of accesses: how, where, and what.
///
/// # Panics
/// A property does not hold, see [`super`].
pub fn accesses(input: &[u8]) {
    let ram = Arc::new(CanaryRam::new(PAGES));
    let gate = CompletionGate::new();
    let who = Identity { name: "a".to_owned(), ..Identity::default() };
    let wire = IdentityInterrupt { line: Arc::new(DeadLine), pin: None };
    let identity = IdentityDevice::new(&who, IdentityState::default(), wire, Box::new(|_| ()));
    let bus = Bus {
        serial: SerialPort::new(Box::new(io::sink()), None, Arc::clone(&gate)),
        exit: ExitPort::new(),
        dma: Some(engine(&ram, Arc::clone(&gate))),
        identity: identity.expect("a device"),
    };
    let mut bytes = Bytes::new(input);
    for _ in 0..STEPS {
        if step(&mut bytes, &bus).is_none() {
            break;
        }
    }
    let state = bus.serial.save(&gate.hold());
    assert!(SerialPort::restore(&state, Box::new(io::sink()), None, gate).is_ok(), "{state:?}");
    drop(bus);
    ram.expect_whole();
}

fn step(bytes: &mut Bytes<'_>, bus: &Bus) -> Option<()> {
    let how = bytes.byte()?;
    let len_bytes = usize::from(how >> 4 & 7) + 1;
    let place = bytes.half()?;
    // Near the devices, or anywhere.
    let number = match how & 0x0c {
        0 => port::SERIAL.wrapping_add(place & 15).wrapping_sub(4),
        4 => port::EXIT.wrapping_add(place & 7).wrapping_sub(4),
        _ => place,
    };
    let gpa = match how & 0x0c {
        0..=8 => Gpa(layout::DMA_REGISTERS.wrapping_add(u64::from(place)).wrapping_sub(64)),
        _ => Gpa(u64::from(place) << 20),
    };
    let mut word = [0; 8];
    match how & 3 {
        0 => expect_ones(bus.port_read(number, &mut word[..len_bytes]), &word[..len_bytes]),
        1 => {
            let value = bytes.number()?.to_le_bytes();
            expect_claim(bus.port_write(number, &value[..len_bytes]));
        }
        2 => expect_ones(bus.mmio_read(gpa, &mut word[..len_bytes]), &word[..len_bytes]),
        _ if how & 0x80 != 0 => {
            let input = [bytes.byte()?; 100];
            assert!(bus.serial.enqueue(&input) <= input.len());
        }
        _ => {
            let value = bytes.number()?.to_le_bytes();
            expect_claim(bus.mmio_write(gpa, &value[..len_bytes]));
        }
    }
    Some(())
}

fn expect_ones(claim: Claim, read: &[u8]) {
    assert!(claim == Claim::Taken || read.iter().all(|byte| *byte == 0xff), "nobody read {read:x?}");
}

/// Somebody or nobody: a store has no answer.
fn expect_claim(claim: Claim) {
    assert!(matches!(claim, Claim::Taken | Claim::Nobody));
}
