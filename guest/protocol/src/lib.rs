//! What salp and its built-in guest agree on: the memory map, ports, calls, the devices'
//! registers and descriptors. No state, no dependencies, no `std`.
#![no_std]
#![warn(missing_docs)]

pub mod dma;
pub mod identity;

/// Where things are in the built-in guest's physical memory.
///
/// Every vCPU enters at the image's entry point in 64-bit ring 3, all RAM mapped to itself, with
/// `rdi` = its number, `rsi` = the number of vCPUs, `rdx` = bytes of RAM, and a stack of its own.
pub mod layout {
    /// Where the guest's image is linked and loaded: everything below is the loader's (tables,
    /// descriptor tables, command line).
    pub const IMAGE: u64 = 0x10_0000;
    /// Where the image keeps its entry stubs, one for each of the 256 vectors, each
    /// [`VECTOR_BYTES`] long: the loader's interrupt descriptor table points there.
    pub const VECTORS: u64 = IMAGE;
    /// Bytes of one entry stub.
    pub const VECTOR_BYTES: u64 = 16;
    /// First byte that the image (with its zeroed data) never reaches: the vCPUs' stacks lie from
    /// here to [`FREE`], that of vCPU 0 highest.
    pub const STACKS: u64 = 0x30_0000;
    /// Bytes of one vCPU's stack.
    pub const STACK_BYTES: u64 = 0x1_0000;
    /// The most vCPUs that the built-in guest runs on.
    pub const MAX_VCPUS: u64 = 8;
    /// The NUL-terminated command line, at most [`COMMAND_LINE_BYTES`] bytes with its NUL.
    pub const COMMAND_LINE: u64 = 0x6000;
    /// Room for the command line.
    pub const COMMAND_LINE_BYTES: usize = 4096;
    /// First byte that the guest's image, stacks and static data never use: what the cases write
    /// begins here.
    pub const FREE: u64 = 0x40_0000;
    /// The hole below 4 GiB that holds devices: RAM ends here and goes on at [`HIGH_RAM`].
    pub const DEVICE_HOLE: u64 = 0xc000_0000;
    /// First byte of the RAM above the device hole.
    pub const HIGH_RAM: u64 = 0x1_0000_0000;
    /// The DMA engine's registers (one page).
    pub const DMA_REGISTERS: u64 = 0xd000_0000;
    /// The identity device's registers (one page).
    pub const IDENTITY_REGISTERS: u64 = DMA_REGISTERS + 0x1000;
    /// The local APIC's registers (one page, KVM's own).
    pub const LOCAL_APIC: u64 = 0xfee0_0000;

    const _: () = assert!(STACKS + MAX_VCPUS * STACK_BYTES <= FREE);
}

/// What the built-in guest writes to [`port::EXIT`].
pub mod exit {
    /// The case ended and every check held.
    pub const OK: u32 = 0;
    /// The case ended; some check failed (the serial port says which).
    pub const ERRORS: u32 = 1;
    /// The command line makes no sense, or asks for more memory than there is.
    pub const USAGE: u32 = 0x7e;
    /// The guest panicked (the serial port says where).
    pub const PANIC: u32 = 0x7f;
    /// Added to the vector of an exception that the guest did not expect. Registers then:
    /// `rdi` = instruction pointer, `rsi` = CR2, `rdx` = error code, `r8` = vector.
    pub const EXCEPTION: u32 = 0x80;
}

/// The ports of the machine.
pub mod port {
    /// The 16550 serial port.
    pub const SERIAL: u16 = 0x3f8;
    /// A 32-bit value written here ends the VM; it becomes the exit status.
    pub const EXIT: u16 = 0xf4;
    /// A 32-bit write of a [`call`](crate::call) number here makes a call: arguments in `rdi`,
    /// `rsi`, `rdx`, `r8`, result in `rax`, further results in the argument registers.
    /// The number is below 0x100 so that the instruction holds it and `rdx` is free.
    pub const CALL: u16 = 0xf8;
}

/// Calls from the guest to its host, by [`port::CALL`].
pub mod call {
    /// The result of a call that was interrupted by a cut: make the same call again.
    pub const AGAIN: u64 = u64::MAX;
    /// The result of a call that failed.
    pub const FAILED: u64 = u64::MAX - 1;

    /// Fork this VM. Result: 0 in the clone, the clone's id (above 0) in the source,
    /// [`FAILED`] where no fork was possible.
    pub const FORK: u32 = 1;
    /// Report progress of the running case: `rdi` = rounds done, `rsi` = errors found so far,
    /// `rdx` = transfers verified, `r8` = checksum or other figure of the case. Result 0 to go on,
    /// 1 to verify everything that the case has written and to finish (see [`FINISHED`]).
    pub const PROGRESS: u32 = 2;
    /// The case has ended, arguments as for [`PROGRESS`]. Result 0. The guest then writes its
    /// status to [`port::EXIT`](crate::port::EXIT).
    pub const FINISHED: u32 = 3;
    /// Fetch the next order of the `puppet` case. `rdi` = result of the last order. Returns when
    /// there is one: `rax` = an [`order`](crate::order), operands in `rdi`, `rsi`, `rdx`, `r8`.
    pub const NEXT: u32 = 4;
    /// Sleep until the host has something to say or the given time has passed: `rdi` =
    /// microseconds. Result 0. Costs no CPU.
    pub const SLEEP: u32 = 5;
    /// Return this VM to the cut that it is a clone of. It does not come back: the VM goes on from
    /// there. Result only where that cannot be: [`FAILED`].
    pub const RESET: u32 = 7;
    /// What VM am I? Result: this VM's id, 1 for a colony's first VM.
    pub const WHO: u32 = 6;
}

/// Orders of the `puppet` case: the guest does what it is told and returns a result.
pub mod order {
    /// Nothing; result 0.
    pub const NOTHING: u64 = 0;
    /// Store `rsi` (8 bytes) at address `rdi`; result 0. The address may be unaligned.
    pub const STORE64: u64 = 1;
    /// Result: the 8 bytes at address `rdi`.
    pub const LOAD64: u64 = 2;
    /// Store the byte `rsi` at address `rdi`; result 0.
    pub const STORE8: u64 = 3;
    /// Store `rsi` to the first 8 bytes of `rdx` pages, the first at `rdi`, `r8` bytes apart.
    pub const STORE_STRIDE: u64 = 4;
    /// Result: the wrapping sum of the first 8 bytes of `rdx` pages, the first at `rdi`, `r8`
    /// bytes apart.
    pub const SUM_STRIDE: u64 = 5;
    /// Add `rsi` atomically to the 8 bytes at `rdi`; result: the old value.
    pub const ATOMIC_ADD: u64 = 6;
    /// Fill `rdx` bytes at `rdi` with the byte `rsi` by a string store; result 0.
    pub const FILL: u64 = 7;
    /// Write the DMA engine's register `rdi` (offset) with the 8-byte value `rsi`; result 0.
    pub const DMA_WRITE: u64 = 8;
    /// Result: the DMA engine's 8-byte register at offset `rdi`.
    pub const DMA_READ: u64 = 9;
    /// Count for ever: store k to `rdi`, then k to `rsi`, for k = 1, 2, ...; look for the next
    /// order after each `rdx` rounds by [`call::PROGRESS`](crate::call::PROGRESS) (result 1 ends
    /// the count). Result: the last k.
    pub const COUNT: u64 = 10;
    /// Ask for a fork ([`call::FORK`](crate::call::FORK)); result: that call's result.
    pub const FORK: u64 = 11;
    /// Copy a small routine into the page at `rdi`, then run it from there while it increments a
    /// word in its own page `rsi` times. Result: the word.
    pub const RUN_AND_WRITE: u64 = 12;
    /// Ask for a reset ([`call::RESET`](crate::call::RESET)); result: that call's result, if it has
    /// one.
    pub const RESET: u64 = 15;
    /// Result: the identity device's 8 bytes at offset `rdi`.
    pub const IDENTITY_READ: u64 = 16;
    /// Write the identity device's 8 bytes at offset `rdi` with `rsi`; result 0.
    pub const IDENTITY_WRITE: u64 = 17;
    /// Result: how often the interrupt `rdi` has arrived. From the first time on the vCPU's local APIC
    /// accepts interrupts.
    pub const INTERRUPTS: u64 = 18;
    /// Ring the DMA engine's doorbell for ever: each time so that all of its `rdi` entries are taken, done
    /// or not; look for the next order after each `rsi` rings, as in [`COUNT`], and report their number.
    /// Result: that number.
    pub const DMA_FLOOD: u64 = 19;
    /// Leave the puppet case with status `rdi`.
    pub const QUIT: u64 = 13;
    /// Go over pages for ever: store k to the first 8 bytes of `rdx` pages, the first at `rdi`, `r8`
    /// bytes apart, for k = 1, 2, ...; look for the next order after each `rsi` stores, as in [`COUNT`],
    /// and report their number. Result: that number.
    pub const COUNT_STRIDE: u64 = 14;
}
