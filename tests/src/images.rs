//! Images of a few instructions, which run in ring 0 and know nothing but their ports; and what they print.

/// Counts at 3 MiB, and prints the count as eight letters (a = 0 to p = 15) and a newline, for ever.
pub const COUNTER: &[u8] = &[
    0x48, 0xbb, 0x00, 0x00, 0x30, 0x00, 0x00, 0x00, 0x00, 0x00, // mov rbx, 0x300000
    0x48, 0xff, 0x03, // next: inc qword [rbx]
    0x48, 0x8b, 0x33, // mov rsi, [rbx]
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb9, 0x08, 0x00, 0x00, 0x00, // mov ecx, 8
    0x48, 0x89, 0xf0, // digit: mov rax, rsi
    0xc1, 0xe8, 0x1c, // shr eax, 28
    0x04, 0x61, // add al, 'a'
    0xee, // out dx, al
    0xc1, 0xe6, 0x04, // shl esi, 4
    0xff, 0xc9, // dec ecx
    0x75, 0xf0, // jnz digit
    0xb0, 0x0a, // mov al, 10
    0xee, // out dx, al
    0xb9, 0xd0, 0x07, 0x00, 0x00, // mov ecx, 2000
    0xff, 0xc9, // wait: dec ecx
    0x75, 0xfc, // jnz wait
    0xeb, 0xd3, // jmp next
];
/// Prints what it reads.
pub const ECHO: &[u8] = &[
    0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd
    0xec, // poll: in al, dx
    0xa8, 0x01, // test al, 1
    0x74, 0xfb, // jz poll
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xec, // in al, dx
    0xee, // out dx, al
    0xeb, 0xef, // jmp from the start
];
/// Says "?" without a newline, and nothing more.
pub const PROMPT: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, 0x3f, // mov al, '?'
    0xee, // out dx, al
    0xeb, 0xfe, // jmp here
];
/// Halts with interrupts off: nothing tells anybody.
pub const HALT: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd]; // cli; hlt; jmp to the hlt
/// Computes for a while, then halts with interrupts off.
pub const LATE_HALT: &[u8] = &[
    0xb9, 0x00, 0x00, 0x10, 0x00, // mov ecx, 1 << 20
    0xff, 0xc9, // wait: dec ecx
    0x75, 0xfc, // jnz wait
    0xfa, 0xf4, 0xeb, 0xfd, // cli; hlt; jmp to the hlt
];
/// Waits for interrupts, of which none comes.
pub const WAIT: &[u8] = &[0xfb, 0xf4, 0xeb, 0xfc]; // sti; hlt; jmp to the sti
/// Prints "." and halts with interrupts off.
pub const DOT_AND_HALT: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, 0x2e, // mov al, '.'
    0xee, // out dx, al
    0xfa, 0xf4, 0xeb, 0xfd, // cli; hlt; jmp to the hlt
];
/// Prints "." and makes an exception without a table for it.
pub const DOT_AND_FAULT: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, 0x2e, // mov al, '.'
    0xee, // out dx, al
    0x0f, 0x0b, // ud2
];
/// Ends with status 7.
pub const EXIT_7: &[u8] = &[0xb0, 0x07, 0xe6, 0xf4, 0xf4]; // mov al, 7; out 0xf4, al; hlt
/// An instruction that a software KVM does not know; elsewhere an exception without a table for it.
pub const BREAKPOINT: &[u8] = &[0xcc]; // int3
/// Asks the keyboard controller for a reset.
pub const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xf4]; // mov al, 0xfe; out 0x64, al; hlt
/// Asks the chipset for a reset.
pub const RESET_BY_CHIPSET: &[u8] = &[
    0x66, 0xba, 0xf9, 0x0c, // mov dx, 0xcf9
    0xb0, 0x06, // mov al, 6
    0xee, 0xf4, // out dx, al; hlt
];
/// An exception without a table for it.
pub const TRIPLE_FAULT: &[u8] = &[0x0f, 0x0b]; // ud2

/// Prints what it reads; "h" halts it, "r" resets it, "u" and "b" end it badly.
pub const OBEDIENT: &[u8] = &[
    0x66, 0xba, 0xfd, 0x03, // start: mov dx, 0x3fd
    0xec, // poll: in al, dx
    0xa8, 0x01, // test al, 1
    0x74, 0xfb, // jz poll
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xec, // in al, dx
    0x3c, 0x68, 0x74, 0x0f, // cmp al, 'h'; je halt
    0x3c, 0x72, 0x74, 0x0d, // cmp al, 'r'; je reset
    0x3c, 0x75, 0x74, 0x0e, // cmp al, 'u'; je undefined
    0x3c, 0x62, 0x74, 0x0c, // cmp al, 'b'; je breakpoint
    0xee, // out dx, al
    0xeb, 0xdf, // jmp start
    0xfa, 0xf4, // halt: cli; hlt
    0xb0, 0xfe, 0xe6, 0x64, 0xf4, // reset: mov al, 0xfe; out 0x64, al; hlt
    0x0f, 0x0b, // undefined: ud2
    0xcc, // breakpoint: int3
];

/// Where the code of these images lies.
pub const CODE: u64 = 2 << 20;

/// A static ELF64 executable whose one segment is `code`, at 2 MiB.
#[must_use]
pub fn bare_image(code: &[u8]) -> Vec<u8> {
    image(code, CODE, &[])
}

/// As [`bare_image`], with its 64-bit entry elsewhere, and notes.
#[must_use]
pub fn image(code: &[u8], entry: u64, notes: &[u8]) -> Vec<u8> {
    let segments = if notes.is_empty() { 1 } else { 2 };
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    for half in [2_u16, 62] {
        image.extend(half.to_le_bytes());
    }
    image.extend(1_u32.to_le_bytes());
    for word in [entry, 64, 0] {
        image.extend(word.to_le_bytes());
    }
    image.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, segments, 64, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    let wide = |count: usize| u64::try_from(count).expect("a few instructions");
    let (code_at, code_bytes) = (64 + 56 * u64::from(segments), wide(code.len()));
    image.extend([1_u32, 7].into_iter().flat_map(u32::to_le_bytes));
    image.extend([code_at, CODE, CODE, code_bytes, code_bytes, 1].into_iter().flat_map(u64::to_le_bytes));
    if !notes.is_empty() {
        let note_bytes = wide(notes.len());
        image.extend([4_u32, 4].into_iter().flat_map(u32::to_le_bytes));
        let words = [code_at + code_bytes, 0, 0, note_bytes, note_bytes, 4];
        image.extend(words.into_iter().flat_map(u64::to_le_bytes));
    }
    assert_eq!(wide(image.len()), code_at);
    image.extend(code);
    image.extend(notes);
    image
}

/// The note that names a PVH entry (`XEN_ELFNOTE_PHYS32_ENTRY`).
#[must_use]
pub fn pvh_note(entry: u32) -> Vec<u8> {
    let mut note: Vec<u8> = [4_u32, 4, 18].into_iter().flat_map(u32::to_le_bytes).collect();
    note.extend(b"Xen\0");
    note.extend(entry.to_le_bytes());
    note
}

/// The counts in whole lines.
#[must_use]
pub fn counts(text: &str) -> Vec<u32> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let digit = |value: u32, letter: u8| value << 4 | u32::from(letter.wrapping_sub(b'a'));
    // A clone's first line may be the rest of one that its source had begun.
    let whole_lines = whole.lines().filter(|line| line.len() == 8);
    whole_lines.map(|line| line.bytes().fold(0, digit)).collect()
}

/// 32-bit code: prints the command line that PVH's start info names, the first byte of the first module,
/// and how many parts the memory map has; then halts.
pub const PVH_REPORT: &[u8] = &[
    0xba, 0xf8, 0x03, 0x00, 0x00, // mov edx, 0x3f8
    0x81, 0x3b, 0x78, 0xc5, 0x6e, 0x33, // cmp dword [ebx], the magic number
    0x75, 0x21, // jne halt
    0x8b, 0x73, 0x18, // mov esi, [ebx + 24]
    0x8a, 0x06, 0x46, // next: mov al, [esi]; inc esi
    0x84, 0xc0, 0x74, 0x03, // test al, al; jz modules
    0xee, 0xeb, 0xf6, // out dx, al; jmp next
    0x83, 0x7b, 0x0c, 0x01, 0x75, 0x08, // modules: cmp dword [ebx + 12], 1; jne map
    0x8b, 0x73, 0x10, 0x8b, 0x36, // mov esi, [ebx + 16]; mov esi, [esi]
    0x8a, 0x06, 0xee, // mov al, [esi]; out dx, al
    0x8a, 0x43, 0x30, 0x04, 0x30, 0xee, // map: mov al, [ebx + 48]; add al, '0'; out dx, al
    0xfa, 0xf4, 0xeb, 0xfd, // halt: cli; hlt; jmp to the hlt
];
