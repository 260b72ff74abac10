//! The MP table (Intel MultiProcessor Specification 1.4), by which kernels without ACPI find their
//! processors and the I/O APIC.

use super::image::IMAGE_RAM;
use crate::words::wide;

/// Where it lies: the last KiB of the first 640, where kernels look for it.
pub(super) const MP_TABLE: u64 = 0x9_fc00;

const POINTER_BYTES: u64 = 16;
const HEADER_BYTES: usize = 44;
const IO_APIC: u32 = 0xfec0_0000;
const LOCAL_APIC: u32 = 0xfee0_0000;
/// Interrupts of the ISA bus, pin by pin.
const ISA_INTERRUPTS: u8 = 16;
/// Interrupt types: vectored, NMI, that of the first PIC.
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXTERNAL: u8 = 3;

/// The pointer, then the table, for `vcpus` vCPUs whose APIC ids count from 0.
pub(super) fn mp_table(vcpus: u8) -> Vec<u8> {
    let io_apic = vcpus;
    let mut entries: Vec<Vec<u8>> = (0..vcpus).map(processor).collect();
    entries.push([&[1, 0][..], b"ISA   "].concat());
    entries.push([&[2, io_apic, 0x11, 1][..], &IO_APIC.to_le_bytes()].concat());
    entries.extend((0..ISA_INTERRUPTS).map(|pin| vec![3, VECTORED, 0, 0, 0, pin, io_apic, pin]));
    entries.push(vec![4, EXTERNAL, 0, 0, 0, 0, 0, 0]);
    entries.push(vec![4, NMI, 0, 0, 0, 0, 0xff, 1]);

    let body = entries.concat();
    let number = |value: usize| u16::try_from(value).expect("the table has less than a KiB").to_le_bytes();
    let mut table = Vec::with_capacity(HEADER_BYTES + body.len());
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&number(HEADER_BYTES + body.len()));
    table.extend_from_slice(&[4, 0]);
    table.extend_from_slice(b"SALP    microVM     ");
    table.extend_from_slice(&[0; 6]);
    table.extend_from_slice(&number(entries.len()));
    table.extend_from_slice(&LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&[0; 4]);
    table.extend_from_slice(&body);
    table[7] = complement(&table);

    let mut pointer = b"_MP_".to_vec();
    let address = u32::try_from(MP_TABLE + POINTER_BYTES).expect("in the first MiB");
    pointer.extend_from_slice(&address.to_le_bytes());
    pointer.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = complement(&pointer);
    pointer.extend(table);
    debug_assert!(MP_TABLE + wide(pointer.len()) <= IMAGE_RAM);
    pointer
}

fn processor(vcpu: u8) -> Vec<u8> {
    // Enabled; the first one starts the others. An APIC and an FPU.
    let flags = if vcpu == 0 { 3 } else { 1 };
    [&[0, vcpu, 0x14, flags][..], &0x600_u32.to_le_bytes(), &0x201_u32.to_le_bytes(), &[0; 8]].concat()
}

/// The byte that makes the sum of all 0.
fn complement(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_lengths_and_counts_are_right() {
        for vcpus in [1, 2, 8] {
            let all = mp_table(vcpus);
            let (pointer, table) = all.split_at(16);
            assert_eq!((complement(pointer), complement(table)), (0, 0));
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            let count = u16::from_le_bytes([table[34], table[35]]);
            assert_eq!(count, u16::from(vcpus) + 1 + 1 + 16 + 2);
            assert_eq!(table.len(), 44 + usize::from(vcpus) * 20 + 20 * 8);
            assert!(all.len() <= 1024);
        }
    }
}
