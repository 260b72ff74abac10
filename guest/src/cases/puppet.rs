//! `puppet`: does what the host orders ([`salp_protocol::order`]), every vCPU by itself, so that a
//! test decides each store, load and fork. An address that is not mapped ends the VM with the page
//! fault's status.
#![expect(unsafe_code, reason = "orders are single instructions on any address")]

use core::arch::{asm, global_asm};

use salp_protocol::dma::register;
use salp_protocol::{call as calls, order};

use crate::call::{self, Arguments};
use crate::engine::{read_register, write_register};
use crate::entry;
use crate::identity;
use crate::memory::Supply;
use crate::options::Options;
use crate::serial::print;
use crate::worker::Worker;

pub(super) fn run(_worker: Worker, _options: Options, _supply: Supply) -> Worker {
    let mut result = 0;
    loop {
        let (order, operands) = call::next_order(result);
        result = obey(order, operands);
    }
}

fn obey(order: u64, operands: Arguments) -> u64 {
    let Arguments { rdi, rsi, rdx, r8 } = operands;
    match order {
        order::NOTHING => 0,
        order::STORE64 => store64(rdi, rsi),
        order::LOAD64 => load64(rdi),
        order::STORE8 => store8(rdi, rsi as u8),
        order::STORE_STRIDE => {
            for i in 0..rdx {
                store64(rdi.wrapping_add(i.wrapping_mul(r8)), rsi);
            }
            0
        }
        order::SUM_STRIDE => {
            (0..rdx).fold(0, |sum: u64, i| sum.wrapping_add(load64(rdi.wrapping_add(i.wrapping_mul(r8)))))
        }
        order::ATOMIC_ADD => atomic_add(rdi, rsi),
        order::FILL => fill(rdi, rsi as u8, rdx),
        order::DMA_WRITE => {
            write_register(rdi, rsi);
            0
        }
        order::DMA_READ => read_register(rdi),
        order::DMA_FLOOD => flood(rdi, rsi),
        order::IDENTITY_READ => identity::read(rdi),
        order::IDENTITY_WRITE => {
            identity::write(rdi, rsi);
            0
        }
        order::COUNT => count(rdi, rsi, rdx),
        order::COUNT_STRIDE => count_stride(rdi, rsi, rdx, r8),
        order::FORK => call::fork().unwrap_or(calls::FAILED),
        order::RUN_AND_WRITE => run_and_write(rdi, rsi),
        order::RESET => call::reset(),
        order::INTERRUPTS => {
            entry::enable_interrupts();
            entry::interrupts(rdi as u8)
        }
        order::QUIT => call::exit(rdi as u32),
        unknown => {
            print(format_args!("unknown order {unknown}"));
            calls::FAILED
        }
    }
}

// The orders below are instructions on an address that the host chose. It answers for the address
// (its tests use free memory only); whatever it is, Rust's own objects are not relied on after a
// wrong one, and an unmapped one ends the VM.

fn store64(address: u64, value: u64) -> u64 {
    // SAFETY: see above.
    unsafe { asm!("mov [{}], {}", in(reg) address, in(reg) value, options(nostack)) }
    0
}

fn load64(address: u64) -> u64 {
    let value;
    // SAFETY: see above.
    unsafe { asm!("mov {}, [{}]", out(reg) value, in(reg) address, options(nostack)) }
    value
}

fn store8(address: u64, value: u8) -> u64 {
    // SAFETY: see above.
    unsafe { asm!("mov [{}], {}", in(reg) address, in(reg_byte) value, options(nostack)) }
    0
}

fn atomic_add(address: u64, value: u64) -> u64 {
    let old;
    // SAFETY: see above.
    unsafe { asm!("lock xadd [{}], {}", in(reg) address, inout(reg) value => old, options(nostack)) }
    old
}

fn fill(address: u64, value: u8, count: u64) -> u64 {
    // SAFETY: see above.
    unsafe {
        asm!("rep stosb", inout("rdi") address => _, in("al") value, inout("rcx") count => _,
            options(nostack, preserves_flags));
    }
    0
}

/// Counts in two places until the host has the next order.
fn count(first: u64, second: u64, every: u64) -> u64 {
    let mut k = 0;
    loop {
        k += 1;
        store64(first, k);
        store64(second, k);
        if k % every.max(1) == 0 && call::progress(Arguments { rdi: k, ..Arguments::default() }) {
            return k;
        }
    }
}

/// Goes over pages until the host has the next order.
fn count_stride(first: u64, every: u64, pages: u64, stride: u64) -> u64 {
    let (mut round, mut stores, mut next) = (0, 0, every.max(1));
    loop {
        round += 1;
        for i in 0..pages {
            store64(first.wrapping_add(i.wrapping_mul(stride)), round);
            stores += 1;
            if stores == next {
                next += every.max(1);
                if call::progress(Arguments { rdi: stores, ..Arguments::default() }) {
                    return stores;
                }
            }
        }
    }
}

/// Keeps a ring full, whatever is in it, until the host has the next order.
fn flood(entries: u64, every: u64) -> u64 {
    let mut rings = 0;
    loop {
        rings += 1;
        write_register(register::DOORBELL, read_register(register::COMPLETED).wrapping_add(entries));
        if rings % every.max(1) == 0 && call::progress(Arguments { rdi: rings, ..Arguments::default() }) {
            return rings;
        }
    }
}

// Position-independent: increments the word 256 bytes behind its start `rdi` times.
global_asm!(
    ".text",
    ".balign 64",
    "walker:",
    ".globl walker",
    "test rdi, rdi",
    "jz 3f",
    "2:",
    "inc qword ptr [rip + walker + 256]",
    "dec rdi",
    "jnz 2b",
    "3:",
    "mov rax, [rip + walker + 256]",
    "ret",
    ".org walker + 256",
    ".quad 0",
);

/// Bytes of `walker`, its word included.
const WALKER_BYTES: usize = 264;

unsafe extern "C" {
    fn walker(times: u64) -> u64;
}

/// Copies `walker` to `page` and runs it there: code in a page that it writes.
fn run_and_write(page: u64, times: u64) -> u64 {
    let from = walker as *const () as *const u8;
    // SAFETY: the routine's bytes are there and hold its word as 0; for the target, see above.
    unsafe { fill_from(page, from) };
    let at = core::ptr::with_exposed_provenance::<()>(page as usize);
    // SAFETY: the routine was just copied there; it uses no address of its old place, and memory
    // is executable.
    let routine: unsafe extern "C" fn(u64) -> u64 = unsafe { core::mem::transmute(at) };
    // SAFETY: as above.
    unsafe { routine(times) }
}

/// Copies the routine's bytes to `address`.
///
/// # Safety
/// `from` must be the routine; `address` free memory.
unsafe fn fill_from(address: u64, from: *const u8) {
    // SAFETY: the caller answers for both.
    unsafe {
        asm!("rep movsb", inout("rdi") address => _, inout("rsi") from => _,
            inout("rcx") WALKER_BYTES => _, options(nostack, preserves_flags));
    }
}
