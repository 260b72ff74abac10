//! Other people's kernels: a static ELF64 image or a bzImage, started by the 64-bit boot protocol of
//! Linux (Documentation/arch/x86/boot.rst): long mode, ring 0, interrupts off, `rsi` -> boot_params. An
//! ELF image that asks for the PVH entry gets that instead ([`pvh`](super::pvh)), as other monitors do it,
//! unless it is Linux, which has both.
//!
//! | from | what |
//! |---|---|
//! | 0x500 | GDT |
//! | 0x7000 | boot_params, with the e820 map |
//! | 0x8ff0 | stack, downwards |
//! | 0x9000 | page tables: the first 4 GiB, each byte at its own address, by 2 MiB pages |
//! | 0x20000 | command line |
//! | 0x9fc00 | MP table |
//! | 1 MiB | RAM for the image, where it wants to be |
//! | below the end of low RAM (2 GiB at most) | initrd |
//!
//! The image is checked by [`shape`](super::shape) before a byte of it is written.
//!
//! Known holes: there is no ACPI; the image and the initrd lie below the device hole.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_sregs};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use salp_protocol::layout;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use super::mptable::{MP_TABLE, mp_table};
use super::shape::{Format, Shape, ShapeError};
use super::{pvh, segment};
use crate::words::wide;

/// The longest command line, in bytes without its NUL: what x86 Linux keeps (`COMMAND_LINE_SIZE`).
pub const MAX_COMMAND_LINE_BYTES: usize = 2047;
/// Where RAM begins that an image may lie in.
pub(super) const IMAGE_RAM: u64 = 1 << 20;

pub(super) const GDT: u64 = 0x500;
const ZERO_PAGE: u64 = 0x7000;
const STACK: u64 = 0x8ff0;
const TABLES: u64 = 0x9000;
pub(super) const COMMAND_LINE: u64 = 0x2_0000;
/// No initrd above this: kernels before 2.02 of the protocol, and ELF images, name no other limit.
const INITRD_END: u64 = 0x8000_0000;
const PAGE: u64 = 4096;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Why an image cannot be started. Memory may hold parts of it; the VM never ran.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The image is not what can be started.
    #[error("the kernel image: {0}")]
    Shape(#[from] ShapeError),
    /// The image passed the checks and could not be read into memory all the same.
    #[error("the kernel image cannot be loaded: {0}")]
    Load(#[from] linux_loader::loader::Error),
    /// The image does not lie in RAM.
    #[error(
        "the kernel image takes {start:#x} to {end:#x} in memory: the VM has RAM for it from \
         {IMAGE_RAM:#x} to {ram_end:#x}"
    )]
    NoRoom {
        /// Its first byte.
        start: u64,
        /// The first byte behind it.
        end: u64,
        /// Where low RAM ends.
        ram_end: u64,
    },
    /// The initrd does not fit between the image and the end of low RAM.
    #[error(
        "the initrd has {len_bytes} bytes: between the image's end {image_end:#x} and {limit:#x} is no room"
    )]
    InitrdTooLarge {
        /// Its bytes.
        len_bytes: u64,
        /// Where the image ends.
        image_end: u64,
        /// Where it must end.
        limit: u64,
    },
    /// The command line is too long.
    #[error("the command line has {len_bytes} bytes, {limit_bytes} is the most that this image takes")]
    CommandLineTooLong {
        /// Bytes without the NUL.
        len_bytes: usize,
        /// The most.
        limit_bytes: usize,
    },
    /// The command line holds a NUL, which would end it.
    #[error("the command line holds a NUL at byte {at}")]
    CommandLineNul {
        /// Position of the NUL.
        at: usize,
    },
    /// A file cannot be read.
    #[error("{what} cannot be read: {source}")]
    File {
        /// Which.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// Guest memory cannot be written.
    #[error("the loader cannot write {what}: {source}")]
    Memory {
        /// What was to be written.
        what: &'static str,
        /// Why not.
        source: GuestMemoryError,
    },
}

/// Where a loaded image begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageEntry {
    /// The address of its first instruction.
    pub entry: u64,
    /// How it is entered.
    pub protocol: Protocol,
}

/// How an image is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// Linux's 64-bit boot protocol.
    Linux64,
    /// PVH.
    Pvh,
}

/// A part of the memory map, of an e820 type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) kind: u32,
}

/// Loads `kernel`, and what it needs to start on `vcpus` vCPUs, into fresh (zero) memory.
///
/// # Errors
/// See [`ImageError`]. The files' bytes are allegations: none of them makes this panic.
pub fn load_image<M: GuestMemoryBackend>(
    memory: &M,
    vcpus: u8,
    kernel: &mut File,
    initrd: Option<&mut File>,
    command_line: &str,
) -> Result<ImageEntry, ImageError> {
    let shape = Shape::read(kernel)?;
    let ram_end = low_ram_end(memory);
    if shape.start < IMAGE_RAM || shape.end > ram_end {
        return Err(ImageError::NoRoom { start: shape.start, end: shape.end, ram_end });
    }
    let command_line = terminated(command_line, &shape)?;
    let (entry, header) = match shape.format {
        Format::Elf => (Elf::load(memory, None, kernel, None)?.kernel_load.0, None),
        Format::BzImage => {
            let loaded = BzImage::load(memory, None, kernel, None)?;
            // The protocol's 64-bit entry lies 0x200 behind the 32-bit one.
            (loaded.kernel_load.0 + 0x200, loaded.setup_header)
        }
    };
    let mut header = header.unwrap_or(setup_header {
        boot_flag: 0xaa55,
        header: 0x5372_6448,
        kernel_alignment: 0x0100_0000,
        ..setup_header::default()
    });
    header.type_of_loader = 0xff;
    header.cmd_line_ptr = low(COMMAND_LINE);
    header.cmdline_size = low(wide(command_line.len()));
    let initrd = initrd.map(|initrd| load_initrd(memory, initrd, shape.end, ram_end)).transpose()?;
    if let Some((start, len_bytes)) = initrd {
        (header.ramdisk_image, header.ramdisk_size) = (low(start), low(len_bytes));
    }
    let map = memory_map(memory);
    let write = |what, address, bytes: &[u8]| {
        let written = memory.write_slice(bytes, GuestAddress(address));
        written.map_err(|source| ImageError::Memory { what, source })
    };
    write("the command line", COMMAND_LINE, &command_line)?;
    write("the mp table", MP_TABLE, &mp_table(vcpus))?;
    if let Some(entry) = shape.pvh_entry {
        pvh::describe(memory, &map, initrd)?;
        return Ok(ImageEntry { entry, protocol: Protocol::Pvh });
    }
    let mut params = boot_params { hdr: header, ..boot_params::default() };
    describe_memory(&map, &mut params);
    write("the GDT", GDT, &gdt())?;
    write("the page tables", TABLES, &tables())?;
    let written = memory.write_obj(params, GuestAddress(ZERO_PAGE));
    written.map_err(|source| ImageError::Memory { what: "boot_params", source })?;
    Ok(ImageEntry { entry, protocol: Protocol::Linux64 })
}

/// An address or length that was checked to be below 4 GiB.
fn low(value: u64) -> u32 {
    u32::try_from(value).expect("what is placed lies below the device hole")
}

fn low_ram_end<M: GuestMemoryBackend>(memory: &M) -> u64 {
    let end = |region: &M::R| region.start_addr().0 + region.len();
    memory.iter().map(end).filter(|&end| end <= layout::DEVICE_HOLE).max().unwrap_or(0)
}

/// The command line with its NUL.
fn terminated(command_line: &str, shape: &Shape) -> Result<Vec<u8>, ImageError> {
    if let Some(at) = command_line.bytes().position(|byte| byte == 0) {
        return Err(ImageError::CommandLineNul { at });
    }
    let limit_bytes = shape.command_line_bytes.min(MAX_COMMAND_LINE_BYTES);
    if command_line.len() > limit_bytes {
        return Err(ImageError::CommandLineTooLong { len_bytes: command_line.len(), limit_bytes });
    }
    Ok([command_line.as_bytes(), &[0]].concat())
}

/// Puts the initrd at the end of low RAM, on a page. Returns its place and length.
fn load_initrd<M: GuestMemoryBackend>(
    memory: &M,
    initrd: &mut File,
    image_end: u64,
    ram_end: u64,
) -> Result<(u64, u64), ImageError> {
    let unreadable = |source| ImageError::File { what: "the initrd", source };
    let len_bytes = initrd.seek(SeekFrom::End(0)).map_err(unreadable)?;
    initrd.rewind().map_err(unreadable)?;
    let limit = ram_end.min(INITRD_END);
    let start = limit.checked_sub(len_bytes).map(|start| start & !(PAGE - 1));
    let Some(start) = start.filter(|&start| start >= image_end) else {
        return Err(ImageError::InitrdTooLarge { len_bytes, image_end, limit });
    };
    let count = usize::try_from(len_bytes).expect("below 2 GiB");
    memory
        .read_exact_volatile_from(GuestAddress(start), initrd, count)
        .map_err(|source| ImageError::Memory { what: "the initrd", source })?;
    Ok((start, len_bytes))
}

/// RAM but for the MP table's page and what lies up to 1 MiB.
fn memory_map<M: GuestMemoryBackend>(memory: &M) -> Vec<Range> {
    let mut map = vec![
        Range { start: 0, end: MP_TABLE, kind: E820_RAM },
        Range { start: MP_TABLE, end: IMAGE_RAM, kind: E820_RESERVED },
    ];
    for region in memory.iter() {
        let (start, end) = (region.start_addr().0, region.start_addr().0 + region.len());
        map.push(Range { start: start.max(IMAGE_RAM), end, kind: E820_RAM });
    }
    map
}

fn describe_memory(map: &[Range], params: &mut boot_params) {
    let mut count = 0;
    let mut table = params.e820_table;
    for (place, range) in table.iter_mut().zip(map) {
        let size = range.end.saturating_sub(range.start);
        *place = boot_e820_entry { addr: range.start, size, r#type: range.kind };
        count += 1;
    }
    params.e820_table = table;
    params.e820_entries = count;
}

/// Selectors that the protocol asks for: `__BOOT_CS` and `__BOOT_DS`; and a task.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

fn gdt() -> Vec<u8> {
    let entries: [u64; 6] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067, 0];
    entries.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// One page of the top level, one of the second, four directories. Accessed and dirty bits are set.
fn tables() -> Vec<u8> {
    const TABLE: u64 = 0x23;
    const LARGE: u64 = 0xe3;
    let mut entries = vec![0_u64; 2 * 512];
    entries[0] = (TABLES + PAGE) | TABLE;
    for gib in 0..4 {
        entries[512 + gib] = (TABLES + (2 + wide(gib)) * PAGE) | TABLE;
    }
    entries.extend((0..4 * 512).map(|leaf: u64| leaf << 21 | LARGE));
    entries.into_iter().flat_map(u64::to_le_bytes).collect()
}

impl ImageEntry {
    /// The general registers of vCPU 0. The others wait for their start-up interrupt.
    #[must_use]
    pub fn registers(&self) -> kvm_regs {
        if self.protocol == Protocol::Pvh {
            return pvh::registers(self.entry);
        }
        kvm_regs { rip: self.entry, rsp: STACK, rbp: STACK, rsi: ZERO_PAGE, rflags: 2, ..kvm_regs::default() }
    }

    /// The special registers of vCPU 0; what does not matter here is taken from `base`, the vCPU's
    /// state as KVM created it.
    #[must_use]
    pub fn special_registers(&self, base: kvm_sregs) -> kvm_sregs {
        if self.protocol == Protocol::Pvh {
            return pvh::special_registers(base);
        }
        let data = segment::flat_data(DATA);
        let (code, task) = (segment::long_code_beside(data, CODE), segment::task(TASK, 0, 0x67));
        kvm_sregs {
            gdt: kvm_dtable { base: GDT, limit: 6 * 8 - 1, ..kvm_dtable::default() },
            // Any exception before the image has a table of its own is a triple fault.
            idt: kvm_dtable::default(),
            cr0: 0x8005_0033, // PG, AM, WP, NE, ET, MP, PE
            cr3: TABLES,
            cr4: 0x620,  // PAE, OSFXSR, OSXMMEXCPT
            efer: 0x500, // LME, LMA
            ..segment::with_segments(base, code, data, task)
        }
    }
}
