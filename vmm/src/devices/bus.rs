//! Which port and which address belongs to which device of this machine.

use salp_protocol::{layout, port};

use super::dma::DmaEngine;
use super::exit::ExitPort;
use super::identity::IdentityDevice;
use super::serial::{SERIAL_PORTS, SerialPort};
use crate::words::{Gpa, PAGE_BYTES, wide};

/// Whether an access had somebody to take it. One that had not reads all ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Claim {
    /// A device took it.
    Taken,
    /// There is no device there.
    Nobody,
}

/// The devices of one VM, as its vCPUs reach them. [`port::CALL`] is not a device.
pub struct Bus {
    /// At [`port::SERIAL`].
    pub serial: SerialPort,
    /// At [`port::EXIT`].
    pub exit: ExitPort,
    /// At [`layout::DMA_REGISTERS`], if this VM has one.
    pub dma: Option<DmaEngine>,
    /// At [`layout::IDENTITY_REGISTERS`].
    pub identity: IdentityDevice,
}

/// Whose page of registers an address is in, and where in it.
enum Registers<'a> {
    Dma(&'a DmaEngine, u64),
    Identity(&'a IdentityDevice, u64),
    Nobodys,
}

fn page_offset(gpa: Gpa, page: u64) -> Option<u64> {
    gpa.0.checked_sub(page).filter(|offset| *offset < wide(PAGE_BYTES))
}

// All vCPUs of a VM use one bus.
const fn shareable<T: Send + Sync>() {}
const _: () = shareable::<Bus>();

fn serial_offset(number: u16) -> Option<u8> {
    let offset = number.checked_sub(port::SERIAL)?;
    (offset < SERIAL_PORTS).then_some(offset)?.try_into().ok()
}

impl Bus {
    /// A vCPU reads a port.
    pub fn port_read(&self, number: u16, into: &mut [u8]) -> Claim {
        if let Some(offset) = serial_offset(number) {
            self.serial.read(offset, into);
            return Claim::Taken;
        }
        into.fill(0xff);
        Claim::Nobody
    }

    /// A vCPU writes a port. Look at [`ExitPort::status`] afterwards.
    pub fn port_write(&self, number: u16, from: &[u8]) -> Claim {
        if let Some(offset) = serial_offset(number) {
            self.serial.write(offset, from);
            return Claim::Taken;
        }
        if number == port::EXIT {
            self.exit.write(from);
            return Claim::Taken;
        }
        Claim::Nobody
    }

    fn registers_at(&self, gpa: Gpa) -> Registers<'_> {
        if let Some(offset) = page_offset(gpa, layout::IDENTITY_REGISTERS) {
            return Registers::Identity(&self.identity, offset);
        }
        match (&self.dma, page_offset(gpa, layout::DMA_REGISTERS)) {
            (Some(dma), Some(offset)) => Registers::Dma(dma, offset),
            _ => Registers::Nobodys,
        }
    }

    /// A vCPU loads from an address without memory.
    pub fn mmio_read(&self, gpa: Gpa, into: &mut [u8]) -> Claim {
        match self.registers_at(gpa) {
            Registers::Dma(dma, offset) => dma.mmio_read(offset, into),
            Registers::Identity(identity, offset) => identity.mmio_read(offset, into),
            Registers::Nobodys => {
                into.fill(0xff);
                return Claim::Nobody;
            }
        }
        Claim::Taken
    }

    /// A vCPU stores to an address without memory.
    pub fn mmio_write(&self, gpa: Gpa, from: &[u8]) -> Claim {
        match self.registers_at(gpa) {
            Registers::Dma(dma, offset) => dma.mmio_write(offset, from),
            Registers::Identity(identity, offset) => identity.mmio_write(offset, from),
            Registers::Nobodys => return Claim::Nobody,
        }
        Claim::Taken
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use salp_protocol::dma::{MAGIC, register};

    use super::*;
    use crate::devices::dma::BackingKind;
    use crate::devices::gate::CompletionGate;
    use crate::devices::identity::{Identity, IdentityInterrupt, IdentityState};
    use crate::devices::testing::{CountingLine, SharedSink, TestRam};

    #[test]
    fn accesses_reach_their_device_and_no_other() {
        let (gate, sink) = (CompletionGate::new(), SharedSink::default());
        let ram = Arc::new(TestRam::new(0, 1));
        let dma = DmaEngine::new(ram, CountingLine::new(), BackingKind::Lost, gate.clone());
        let who = Identity { name: "a".to_owned(), ..Identity::default() };
        let wire = IdentityInterrupt { line: CountingLine::new(), pin: None };
        let identity = IdentityDevice::new(&who, IdentityState::default(), wire, Box::new(|_| ()));
        let bus = Bus {
            serial: SerialPort::new(Box::new(sink.clone()), None, gate),
            exit: ExitPort::new(),
            dma: Some(dma),
            identity: identity.expect("a device"),
        };
        assert_eq!(bus.port_write(port::SERIAL, b"s"), Claim::Taken);
        assert_eq!(sink.bytes(), b"s");
        assert_eq!(bus.port_write(port::SERIAL + 8, b"s"), Claim::Nobody);
        assert_eq!(bus.port_write(port::EXIT, &[7]), Claim::Taken);
        assert_eq!(bus.exit.status(), Some(7));
        let mut word = [0; 8];
        assert_eq!(bus.port_read(0, &mut word[..1]), Claim::Nobody);
        assert_eq!(word[0], 0xff);
        let identity = Gpa(layout::DMA_REGISTERS + register::IDENTITY);
        assert_eq!(bus.mmio_read(identity, &mut word), Claim::Taken);
        assert_eq!(u64::from_le_bytes(word), MAGIC);
        let magic = Gpa(layout::IDENTITY_REGISTERS);
        assert_eq!(bus.mmio_read(magic, &mut word), Claim::Taken);
        assert_eq!(u64::from_le_bytes(word), salp_protocol::identity::MAGIC);
        assert_eq!(bus.mmio_write(Gpa(layout::DMA_REGISTERS - 8), &word), Claim::Nobody);
        assert_eq!(bus.mmio_read(Gpa(layout::IDENTITY_REGISTERS + 4096), &mut word), Claim::Nobody);
    }
}
