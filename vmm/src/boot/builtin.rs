//! Loads the built-in guest, which `build.rs` compiled, into fresh memory.

use std::io::Cursor;

use linux_loader::loader::{Elf, KernelLoader};
use salp_protocol::layout;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestUsize};

use super::entry::{GDT, IDT, gdt, idt, task, task_address};
use super::paging::{PageTables, TABLES};
use super::{BootError, EntryState};
use crate::words::{LEAF_BYTES, wide};

/// The least RAM that the built-in guest runs in, in bytes: the cases begin at
/// [`layout::FREE`] and need something to write.
pub const MIN_RAM_BYTES: u64 = 8 << 20;
/// The most RAM that the loader maps, in bytes.
pub const MAX_RAM_BYTES: u64 = 64 << 30;

const _: () = assert!(MIN_RAM_BYTES > layout::FREE);

static IMAGE: &[u8] = include_bytes!(env!("SALP_GUEST_ELF"));

/// Loads the built-in guest for `vcpus` vCPUs with `command_line`. `memory` holds zeros, and has RAM
/// where [`layout`] says: from 0 to the device hole at most, then from [`layout::HIGH_RAM`].
///
/// # Errors
/// Arguments that do not fit the guest (nothing is written then), or memory that cannot be written.
pub fn load_builtin<M: GuestMemoryBackend>(
    memory: &M,
    vcpus: u8,
    command_line: &str,
) -> Result<EntryState, BootError> {
    let ram = Ram::of(memory)?;
    let ram_bytes = ram.bytes();
    if ram_bytes < MIN_RAM_BYTES {
        return Err(BootError::RamTooSmall { ram_bytes });
    }
    if ram_bytes > MAX_RAM_BYTES {
        return Err(BootError::RamTooLarge { ram_bytes });
    }
    if vcpus == 0 || u64::from(vcpus) > layout::MAX_VCPUS {
        return Err(BootError::VcpuCount { vcpus });
    }
    let command_line = terminated(command_line)?;

    let loaded = Elf::load(memory, None, &mut Cursor::new(IMAGE), None).map_err(BootError::Image)?;
    let (entry, end) = (loaded.kernel_load.0, loaded.kernel_end);
    if !(layout::IMAGE..layout::STACKS).contains(&entry) || end > layout::STACKS {
        return Err(BootError::ImageMisplaced { entry, end });
    }
    let write = |what, address, bytes: &[u8]| {
        memory.write_slice(bytes, GuestAddress(address)).map_err(|source| BootError::Memory { what, source })
    };
    let tables = PageTables::identity(ram.low_end, ram.high_end);
    write("page tables", TABLES, &tables.bytes())?;
    write("the GDT", GDT, &gdt())?;
    write("the IDT", IDT, &idt())?;
    write("the command line", layout::COMMAND_LINE, &command_line)?;
    for vcpu in 0..vcpus {
        write("a task state", task_address(vcpu), &task(vcpu))?;
    }
    Ok(EntryState { entry, vcpus, ram_bytes })
}

/// The command line with its NUL.
fn terminated(command_line: &str) -> Result<Vec<u8>, BootError> {
    let mut bytes = command_line.as_bytes().to_vec();
    if let Some(at) = bytes.iter().position(|&byte| byte == 0) {
        return Err(BootError::CommandLineNul { at });
    }
    bytes.push(0);
    if bytes.len() > layout::COMMAND_LINE_BYTES {
        return Err(BootError::CommandLineTooLong { len_bytes: command_line.len() });
    }
    Ok(bytes)
}

/// Where RAM ends below the device hole, and above it (`HIGH_RAM` where nothing is there).
struct Ram {
    low_end: u64,
    high_end: u64,
}

impl Ram {
    fn of<M: GuestMemoryBackend>(memory: &M) -> Result<Self, BootError> {
        let mut ram = Self { low_end: 0, high_end: layout::HIGH_RAM };
        for region in memory.iter() {
            let (start, len_bytes): (u64, GuestUsize) = (region.start_addr().0, region.len());
            let high = ram.low_end == layout::DEVICE_HOLE;
            let (end, room_end) =
                if high { (&mut ram.high_end, u64::MAX) } else { (&mut ram.low_end, layout::DEVICE_HOLE) };
            let fits =
                start == *end && len_bytes.is_multiple_of(wide(LEAF_BYTES)) && len_bytes <= room_end - start;
            if !fits {
                return Err(BootError::RamMisplaced { start, len_bytes, expected: *end });
            }
            *end += len_bytes;
        }
        Ok(ram)
    }

    fn bytes(&self) -> u64 {
        self.low_end + (self.high_end - layout::HIGH_RAM)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    const MIB: usize = 1 << 20;

    fn memory(regions: &[(u64, usize)]) -> GuestMemoryMmap {
        let ranges: Vec<_> = regions.iter().map(|&(at, len)| (GuestAddress(at), len)).collect();
        GuestMemoryMmap::from_ranges(&ranges).expect("the host reserves address space freely")
    }

    fn read<const N: usize>(memory: &GuestMemoryMmap, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        memory.read_slice(&mut bytes, GuestAddress(at)).expect("an address in RAM");
        bytes
    }

    #[test]
    fn image_and_command_line_are_in_place() {
        let memory = memory(&[(0, 8 * MIB)]);
        let state = load_builtin(&memory, 2, "case=touch mib=2").expect("a valid machine");
        assert_eq!((state.vcpus, state.ram_bytes), (2, 8 << 20));
        assert_eq!(&read(&memory, layout::COMMAND_LINE), b"case=touch mib=2\0");
        // Stub 0 pushes an error code and its vector.
        assert_eq!(read(&memory, layout::VECTORS), [0x6a, 0, 0x6a, 0]);
        // Stub 14 has an error code from the processor.
        assert_eq!(read(&memory, layout::VECTORS + 14 * layout::VECTOR_BYTES), [0x6a, 14]);
        assert_ne!(read(&memory, state.entry), [0; 8]);
        assert_eq!(read(&memory, layout::FREE), [0; 64], "what is free is untouched");
    }

    #[test]
    fn memory_too_small_or_too_large_is_refused_with_its_size() {
        let error = load_builtin(&memory(&[(0, 6 * MIB)]), 1, "").expect_err("6 MiB");
        assert!(error.to_string().contains("6291456 bytes of RAM are too few"), "{error}");
        assert!(error.to_string().contains("8388608"), "{error}");
        let low = index_of(layout::DEVICE_HOLE);
        let high = index_of(MAX_RAM_BYTES) - low;
        let most = memory(&[(0, low), (layout::HIGH_RAM, high)]);
        assert_eq!(load_builtin(&most, 1, "").expect("64 GiB").ram_bytes, MAX_RAM_BYTES);
        let more = memory(&[(0, low), (layout::HIGH_RAM, high + 2 * MIB)]);
        let error = load_builtin(&more, 1, "").expect_err("too large");
        assert!(matches!(error, BootError::RamTooLarge { .. }), "{error}");
    }

    fn index_of(bytes: u64) -> usize {
        crate::words::index(bytes)
    }

    #[test]
    fn ram_outside_the_memory_map_is_refused() {
        for regions in [
            &[(0, 8 * MIB + 4096)][..],
            &[(2 << 20, 8 * MIB)],
            &[(0, 8 * MIB), (layout::HIGH_RAM, 2 * MIB)],
            &[(0, 8 * MIB), (16 << 20, 2 * MIB)],
            &[(0, index_of(layout::DEVICE_HOLE) + 2 * MIB)],
        ] {
            let error = load_builtin(&memory(regions), 1, "").expect_err("misplaced RAM");
            assert!(matches!(error, BootError::RamMisplaced { .. }), "{regions:?}: {error}");
        }
    }

    #[test]
    fn a_command_line_must_fit_with_its_nul() {
        let memory = memory(&[(0, 8 * MIB)]);
        let longest = "x".repeat(layout::COMMAND_LINE_BYTES - 1);
        load_builtin(&memory, 1, &longest).expect("the longest command line");
        let error = load_builtin(&memory, 1, &(longest + "x")).expect_err("one byte more");
        assert!(matches!(error, BootError::CommandLineTooLong { len_bytes: 4096 }), "{error}");
        let error = load_builtin(&memory, 1, "a\0b").expect_err("a NUL");
        assert!(matches!(error, BootError::CommandLineNul { at: 1 }), "{error}");
    }

    #[test]
    fn vcpus_are_limited() {
        let memory = memory(&[(0, 8 * MIB)]);
        for vcpus in [0, 9] {
            let error = load_builtin(&memory, vcpus, "").expect_err("a wrong number");
            assert!(matches!(error, BootError::VcpuCount { .. }), "{error}");
        }
        load_builtin(&memory, 8, "").expect("eight vCPUs");
    }
}
