//! Calls to the host, by [`port::CALL`]. A call that a cut interrupted is made again in here.
#![expect(unsafe_code, reason = "a call is an instruction")]

use core::arch::asm;

use salp_protocol::{call, port};

/// Arguments and further results of a call: `rdi`, `rsi`, `rdx`, `r8`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Arguments {
    pub(crate) rdi: u64,
    pub(crate) rsi: u64,
    pub(crate) rdx: u64,
    pub(crate) r8: u64,
}

/// Makes the call `number` until it is answered; returns `rax` and the registers.
fn call(number: u32, arguments: Arguments) -> (u64, Arguments) {
    loop {
        let Arguments { mut rdi, mut rsi, mut rdx, mut r8 } = arguments;
        let mut rax = u64::from(number);
        // SAFETY: an exit to the host, which reads and writes the registers named here, and
        // memory only where the guest's own model allows it (no `nomem`).
        unsafe {
            asm!("out {port}, eax", port = const port::CALL,
                inout("rax") rax, inout("rdi") rdi, inout("rsi") rsi, inout("rdx") rdx,
                inout("r8") r8, options(nostack));
        }
        if rax != call::AGAIN {
            return (rax, Arguments { rdi, rsi, rdx, r8 });
        }
    }
}

/// Asks for a fork: `Ok(0)` in the clone, `Ok(clone's id)` in the source.
pub(crate) fn fork() -> Result<u64, ForkRefused> {
    match call(call::FORK, Arguments::default()).0 {
        call::FAILED => Err(ForkRefused),
        id => Ok(id),
    }
}

/// Asks for this VM's return to its cut; comes back only where that cannot be.
pub(crate) fn reset() -> u64 {
    call(call::RESET, Arguments::default()).0
}

/// The host could not fork.
#[derive(Debug)]
pub(crate) struct ForkRefused;

/// Reports progress; true to finish.
pub(crate) fn progress(figures: Arguments) -> bool {
    call(call::PROGRESS, figures).0 == 1
}

/// Reports the final figures.
pub(crate) fn finished(figures: Arguments) {
    call(call::FINISHED, figures);
}

/// Gives in the last order's result; returns the next order and its operands.
pub(crate) fn next_order(result: u64) -> (u64, Arguments) {
    call(call::NEXT, Arguments { rdi: result, ..Arguments::default() })
}

/// Sleeps at most `time_us` microseconds.
pub(crate) fn sleep(time_us: u64) {
    call(call::SLEEP, Arguments { rdi: time_us, ..Arguments::default() });
}

/// This VM's id.
pub(crate) fn who() -> u64 {
    call(call::WHO, Arguments::default()).0
}

/// Ends the VM.
pub(crate) fn exit(status: u32) -> ! {
    loop {
        // SAFETY: the host does not resume this vCPU; if it does, ask again.
        unsafe { asm!("out {port}, eax", port = const port::EXIT, in("eax") status, options(nostack)) }
    }
}
