//! What an image file says of itself, checked before anything is loaded: format, place in memory,
//! entry. Every number in the file is an allegation.

use std::fs::File;
use std::io::{Error, ErrorKind};
use std::os::unix::fs::FileExt as _;

use crate::words::{index, wide};

/// The format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// A static ELF64 executable.
    Elf,
    /// Linux's compressed image, with a 64-bit entry.
    BzImage,
}

/// A checked image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) format: Format,
    /// The first byte that it takes in memory.
    pub(super) start: u64,
    /// The first byte behind it, with what it clears and unpacks into.
    pub(super) end: u64,
    /// Where it is to be entered by PVH, if it asks for that.
    pub(super) pvh_entry: Option<u64>,
    /// The longest command line that it takes, in bytes without the NUL.
    pub(super) command_line_bytes: usize,
}

/// Why an image cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum ShapeError {
    /// Neither format.
    #[error("it is neither an ELF file nor a bzImage")]
    Unknown,
    /// The file ends too early.
    #[error("it is truncated: {what} ends at byte {needed_bytes}, the file at {len_bytes}")]
    Truncated {
        /// What is cut off.
        what: &'static str,
        /// Where that ends.
        needed_bytes: u64,
        /// Where the file ends.
        len_bytes: u64,
    },
    /// An ELF file for 32-bit machines.
    #[error("it is a 32-bit ELF file: a 64-bit one is needed")]
    Not64Bit,
    /// An ELF file for another processor.
    #[error("it is an ELF file for machine {machine}, byte order {order}: x86-64 is 62, 1")]
    OtherMachine {
        /// `e_machine`.
        machine: u16,
        /// `EI_DATA`.
        order: u8,
    },
    /// A shared object, or a program that needs one.
    #[error("it is dynamically linked ({why}): a static executable at fixed addresses is needed")]
    Dynamic {
        /// How that is known.
        why: &'static str,
    },
    /// An ELF file that is no executable.
    #[error("it is an ELF file of type {kind}, not an executable (2)")]
    NotExecutable {
        /// `e_type`.
        kind: u16,
    },
    /// A header contradicts itself.
    #[error("it is broken: {what} is {value:#x}")]
    Broken {
        /// What is wrong.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The entry point is not in the image.
    #[error("its entry {entry:#x} lies in no part of it that is loaded")]
    EntryOutside {
        /// The entry point.
        entry: u64,
    },
    /// A bzImage without a 64-bit entry.
    #[error("it is a bzImage of protocol {version:#x} without a 64-bit entry")]
    No64BitEntry {
        /// The boot protocol's version.
        version: u16,
    },
    /// The file cannot be read.
    #[error("it cannot be read: {0}")]
    File(#[from] Error),
}

const ELF_HEADER_BYTES: u64 = 64;
const PROGRAM_HEADER_BYTES: u16 = 56;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_DYNAMIC: u32 = 2;
const SEGMENT_INTERPRETER: u32 = 3;
const SEGMENT_NOTE: u32 = 4;
/// The longest notes that are read.
const NOTE_BYTES: u64 = 1 << 20;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the PVH entry, of 4 or 8 bytes.
const NOTE_PVH_ENTRY: u32 = 18;

/// Where the setup header of a bzImage ends, as far as it is read here.
const SETUP_END: usize = 0x268;
/// Where a bzImage is put (`code32_start` of every kernel that is loaded high).
const BZIMAGE_START: u64 = 1 << 20;

/// Bytes at a fixed place of a header that is long enough.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes.get(at + i).copied().unwrap_or(0))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(field(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}

impl Shape {
    /// Reads and checks the headers of `file`.
    pub(super) fn read(file: &File) -> Result<Self, ShapeError> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(Error::new(ErrorKind::InvalidInput, "it is no regular file").into());
        }
        let len_bytes = metadata.len();
        let head_bytes = len_bytes.min(wide(SETUP_END));
        let mut head = vec![0; index(head_bytes)];
        file.read_exact_at(&mut head, 0)?;
        if head.starts_with(b"\x7fELF") {
            elf(file, &head, len_bytes)
        } else if head.get(0x202..0x206) == Some(b"HdrS") {
            bzimage(&head, len_bytes)
        } else {
            Err(ShapeError::Unknown)
        }
    }
}

/// That `len_bytes` from `start` on are in a file of `file_bytes`; returns where they end.
fn inside(what: &'static str, start: u64, len_bytes: u64, file_bytes: u64) -> Result<u64, ShapeError> {
    let needed_bytes = start.saturating_add(len_bytes);
    if needed_bytes > file_bytes {
        return Err(ShapeError::Truncated { what, needed_bytes, len_bytes: file_bytes });
    }
    Ok(needed_bytes)
}

fn elf(file: &File, head: &[u8], file_bytes: u64) -> Result<Shape, ShapeError> {
    inside("the identification", 0, 16, file_bytes)?;
    if head[4] != 2 {
        return Err(ShapeError::Not64Bit);
    }
    inside("the ELF header", 0, ELF_HEADER_BYTES, file_bytes)?;
    let (kind, machine, order) = (u16_at(head, 16), u16_at(head, 18), head[5]);
    if machine != MACHINE_X86_64 || order != 1 {
        return Err(ShapeError::OtherMachine { machine, order });
    }
    match kind {
        TYPE_EXECUTABLE => {}
        TYPE_SHARED => return Err(ShapeError::Dynamic { why: "its type is ET_DYN" }),
        kind => return Err(ShapeError::NotExecutable { kind }),
    }
    let (entry, headers, size, count) =
        (u64_at(head, 24), u64_at(head, 32), u16_at(head, 54), u16_at(head, 56));
    if size != PROGRAM_HEADER_BYTES {
        return Err(ShapeError::Broken { what: "the size of its program headers", value: size.into() });
    }
    if headers < ELF_HEADER_BYTES {
        return Err(ShapeError::Broken { what: "the place of its program headers", value: headers });
    }
    let table_bytes = u64::from(size) * u64::from(count);
    inside("the table of program headers", headers, table_bytes, file_bytes)?;
    let mut table = vec![0; index(table_bytes)];
    file.read_exact_at(&mut table, headers)?;

    let notes = read_notes(file, &table, file_bytes)?;
    let pvh_entry = pvh_entry(&notes)?;
    let entry = pvh_entry.unwrap_or(entry);
    let (mut start, mut end, mut has_entry) = (u64::MAX, 0, false);
    for header in table.chunks_exact(usize::from(size)) {
        match u32_at(header, 0) {
            SEGMENT_INTERPRETER => return Err(ShapeError::Dynamic { why: "it names an interpreter" }),
            SEGMENT_DYNAMIC => return Err(ShapeError::Dynamic { why: "it has a dynamic section" }),
            _ => {}
        }
        let (offset, address) = (u64_at(header, 8), u64_at(header, 24));
        let (file_part, memory_part) = (u64_at(header, 32), u64_at(header, 40));
        inside("a segment", offset, file_part, file_bytes)?;
        if u32_at(header, 0) != SEGMENT_LOAD || memory_part == 0 {
            continue;
        }
        if file_part > memory_part {
            return Err(ShapeError::Broken { what: "a segment's size in memory", value: memory_part });
        }
        let segment_end = address.checked_add(memory_part);
        let segment_end =
            segment_end.ok_or(ShapeError::Broken { what: "a segment's address", value: address })?;
        has_entry |= (address..segment_end).contains(&entry);
        (start, end) = (start.min(address), end.max(segment_end));
    }
    if !has_entry {
        return Err(ShapeError::EntryOutside { entry });
    }
    Ok(Shape { format: Format::Elf, start, end, pvh_entry, command_line_bytes: usize::MAX })
}

/// A segment of notes: each part of one is filled up to `alignment` bytes.
struct Notes {
    bytes: Vec<u8>,
    alignment: usize,
}

fn read_notes(file: &File, table: &[u8], file_bytes: u64) -> Result<Vec<Notes>, ShapeError> {
    let mut notes = Vec::new();
    for header in table.chunks_exact(PROGRAM_HEADER_BYTES.into()) {
        let (offset, len_bytes) = (u64_at(header, 8), u64_at(header, 32));
        if u32_at(header, 0) != SEGMENT_NOTE {
            continue;
        }
        inside("a segment of notes", offset, len_bytes, file_bytes)?;
        if len_bytes > NOTE_BYTES {
            return Err(ShapeError::Broken { what: "the size of its notes", value: len_bytes });
        }
        let mut bytes = vec![0; index(len_bytes)];
        file.read_exact_at(&mut bytes, offset)?;
        notes.push(Notes { bytes, alignment: if u64_at(header, 48) == 8 { 8 } else { 4 } });
    }
    Ok(notes)
}

impl Notes {
    /// Owner, type and value of each, up to the first that does not fit.
    fn each(&self) -> impl Iterator<Item = (&[u8], u32, &[u8])> {
        let mut rest = self.bytes.as_slice();
        std::iter::from_fn(move || {
            let head = rest.get(..12)?;
            let [owner_bytes, value_bytes] = [0, 4].map(|at| index(u32_at(head, at).into()));
            let value_at = (12 + owner_bytes).next_multiple_of(self.alignment);
            let note = (
                rest.get(12..12 + owner_bytes)?,
                u32_at(head, 8),
                rest.get(value_at..value_at + value_bytes)?,
            );
            let next = (value_at + value_bytes).next_multiple_of(self.alignment);
            rest = rest.get(next..).unwrap_or_default();
            Some(note)
        })
    }
}

/// The PVH entry that the notes ask for. Linux has a 64-bit entry too, which is preferred: a KVM without
/// hardware virtualization emulates 32-bit code.
fn pvh_entry(segments: &[Notes]) -> Result<Option<u64>, ShapeError> {
    let mut entry = None;
    for (owner, kind, value) in segments.iter().flat_map(Notes::each) {
        match (owner, kind) {
            (b"Linux\0", _) => return Ok(None),
            (b"Xen\0", NOTE_PVH_ENTRY) if ![4, 8].contains(&value.len()) => {
                return Err(ShapeError::Broken {
                    what: "the size of its PVH entry",
                    value: wide(value.len()),
                });
            }
            (b"Xen\0", NOTE_PVH_ENTRY) => entry = Some(u64::from(u32_at(value, 0))),
            _ => {}
        }
    }
    Ok(entry)
}

fn bzimage(head: &[u8], file_bytes: u64) -> Result<Shape, ShapeError> {
    inside("the setup header", 0, wide(SETUP_END), file_bytes)?;
    let (version, flags) = (u16_at(head, 0x206), u16_at(head, 0x236));
    // 2.12 is the first version with a 64-bit entry, said to be there by XLF_KERNEL_64.
    if version < 0x20c || flags & 1 == 0 {
        return Err(ShapeError::No64BitEntry { version });
    }
    let code_start = u64::from(u32_at(head, 0x214));
    if code_start != BZIMAGE_START || head[0x211] & 1 == 0 {
        return Err(ShapeError::Broken { what: "the address of its code", value: code_start });
    }
    let sectors = if head[0x1f1] == 0 { 4 } else { u64::from(head[0x1f1]) };
    // `syssize`, in paragraphs of 16 bytes.
    let code_bytes = u64::from(u32_at(head, 0x1f4)) * 16;
    inside("its code", (sectors + 1) * 512, code_bytes, file_bytes)?;
    let (preferred, unpacked_bytes) = (u64_at(head, 0x258), u64::from(u32_at(head, 0x260)));
    // All of the file behind the setup part is loaded.
    let loaded = code_start.saturating_add(file_bytes);
    let end = preferred.max(code_start).saturating_add(unpacked_bytes).max(loaded);
    let command_line_bytes = index(u64::from(u32_at(head, 0x238)));
    Ok(Shape { format: Format::BzImage, start: code_start, end, pvh_entry: None, command_line_bytes })
}
