//! The PVH entry of other monitors' images (Xen's `docs/misc/pvh.pandoc`): 32-bit protected mode, flat
//! segments, no paging, interrupts off, `ebx` -> start info. An image asks for it by a note.
//!
//! | from | what |
//! |---|---|
//! | 0x500 | GDT |
//! | 0x6000 | start info |
//! | 0x6040 | list of modules: the initrd |
//! | 0x6100 | memory map |
//!
//! Known hole: there is no ACPI, so its pointer is 0; processors are told by the MP table alone.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_sregs};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::image::{COMMAND_LINE, GDT, ImageError, Range};
use super::segment;

const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6040;
const MEMORY_MAP: u64 = 0x6100;
const MAGIC: u32 = 0x336e_c578;

/// Selectors of code, data and task in the GDT.
const CODE: u16 = 0x08;
const DATA: u16 = 0x10;
const TASK: u16 = 0x18;

/// Writes all that the entry is told. `map` and `initrd` are as for Linux.
pub(super) fn describe<M: GuestMemoryBackend>(
    memory: &M,
    map: &[Range],
    initrd: Option<(u64, u64)>,
) -> Result<(), ImageError> {
    let error = |what| move |source: GuestMemoryError| ImageError::Memory { what, source };
    let info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: initrd.map_or(0, |_| MODULES),
        cmdline_paddr: COMMAND_LINE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).expect("a few ranges"),
        ..hvm_start_info::default()
    };
    memory.write_obj(info, GuestAddress(START_INFO)).map_err(error("the start info"))?;
    if let Some((paddr, size)) = initrd {
        let module = hvm_modlist_entry { paddr, size, ..hvm_modlist_entry::default() };
        memory.write_obj(module, GuestAddress(MODULES)).map_err(error("the list of modules"))?;
    }
    let stride = crate::words::wide(size_of::<hvm_memmap_table_entry>());
    for (at, range) in (MEMORY_MAP..).step_by(size_of::<hvm_memmap_table_entry>()).zip(map) {
        debug_assert!(at + stride <= MEMORY_MAP + 0x400, "the map has its place");
        // Its types are those of e820.
        let entry = hvm_memmap_table_entry {
            addr: range.start,
            size: range.end.saturating_sub(range.start),
            type_: range.kind,
            ..hvm_memmap_table_entry::default()
        };
        memory.write_obj(entry, GuestAddress(at)).map_err(error("the memory map"))?;
    }
    memory.write_slice(&gdt(), GuestAddress(GDT)).map_err(error("the GDT"))
}

fn gdt() -> Vec<u8> {
    let entries: [u64; 4] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];
    entries.into_iter().flat_map(u64::to_le_bytes).collect()
}

pub(super) fn registers(entry: u64) -> kvm_regs {
    kvm_regs { rip: entry, rbx: START_INFO, rflags: 2, ..kvm_regs::default() }
}

pub(super) fn special_registers(base: kvm_sregs) -> kvm_sregs {
    let data = segment::flat_data(DATA);
    let (code, task) = (segment::code_beside(data, CODE), segment::task(TASK, 0, 0x67));
    kvm_sregs {
        gdt: kvm_dtable { base: GDT, limit: 4 * 8 - 1, ..kvm_dtable::default() },
        idt: kvm_dtable::default(),
        cr0: 0x11, // ET, PE
        cr3: 0,
        cr4: 0,
        efer: 0,
        ..segment::with_segments(base, code, data, task)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    fn words(memory: &GuestMemoryMmap, at: u64, count: usize) -> Vec<u32> {
        let read = |at| memory.read_obj(GuestAddress(at)).expect("an address in RAM");
        (at..).step_by(4).take(count).map(read).collect()
    }

    #[test]
    fn the_start_info_names_command_line_modules_and_memory() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).expect("address space");
        let map =
            [Range { start: 0, end: 0x9000, kind: 1 }, Range { start: 0x9000, end: 0x10_0000, kind: 2 }];
        describe(&memory, &map, Some((0x12_0000, 77))).expect("there is RAM");
        let info = words(&memory, START_INFO, 13);
        let expected = [MAGIC, 1, 0, 1, 0x6040, 0, 0x2_0000, 0, 0, 0, 0x6100, 0, 2];
        assert_eq!(info, expected);
        assert_eq!(words(&memory, MODULES, 4), [0x12_0000, 0, 77, 0]);
        let entries = words(&memory, MEMORY_MAP, 12);
        assert_eq!(entries, [0, 0, 0x9000, 0, 1, 0, 0x9000, 0, 0xf_7000, 0, 2, 0]);
        describe(&memory, &map, None).expect("there is RAM");
        assert_eq!(words(&memory, START_INFO + 12, 2), [0, 0]);
    }

    #[test]
    fn the_entry_is_flat_and_32_bit_without_paging() {
        let (regs, sregs) = (registers(0x20_0000), special_registers(kvm_sregs::default()));
        assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x20_0000, START_INFO, 2));
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.base, sregs.cs.limit), (0, 1, 0, u32::MAX));
        assert_eq!(gdt().len(), usize::from(sregs.gdt.limit) + 1);
    }
}
