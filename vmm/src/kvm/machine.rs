//! What a vCPU's exits are handed to: the [`Machine`], with its ports, MMIO and calls; and the ways
//! in which a guest's run can end.

use std::fmt;

use kvm_bindings::{kvm_regs, kvm_sregs};

use super::host::HostKind;
use super::kick::StopSignal;
use crate::words::Gpa;

/// The machine around the vCPUs of one VM. Its methods run on the vCPUs' threads, several at once,
/// and may be interrupted by a signal whose handler does nothing (`EINTR`).
///
/// None of them may wait for the vCPU that it was called for to stop.
pub trait Machine: Send + Sync {
    /// The guest reads a port. `data` (1, 2 or 4 bytes, or several such) is all ones before.
    fn pio_read(&self, vcpu: usize, port: u16, data: &mut [u8]);

    /// The guest writes to a port.
    fn pio_write(&self, vcpu: usize, port: u16, data: &[u8]) -> Flow;

    /// The guest reads where there is no memory. `data` (1 to 8 bytes) is all ones before.
    fn mmio_read(&self, vcpu: usize, gpa: Gpa, data: &mut [u8]);

    /// The guest writes where there is no memory.
    fn mmio_write(&self, vcpu: usize, gpa: Gpa, data: &[u8]) -> Flow;

    /// The guest makes a call (a 32-bit write to [`CALL`](salp_protocol::port::CALL)). The call may
    /// block; then it must wait for `stop` too and, when that is raised, return
    /// [`CallOutcome::Interrupted`] or [`CallOutcome::InterruptedWith`] soon.
    fn call(&self, vcpu: usize, number: u32, registers: &mut CallRegisters, stop: &StopSignal)
    -> CallOutcome;

    /// Goes on with a call that was left open by [`CallOutcome::InterruptedWith`], after the vCPU
    /// was resumed. `registers` are those of the call.
    fn resume_call(
        &self,
        vcpu: usize,
        number: u32,
        registers: &mut CallRegisters,
        stop: &StopSignal,
    ) -> CallOutcome;

    /// The vCPU enters the guest again after something was done for it. Called very often.
    fn entering(&self) {}

    /// The guest's run has ended on this vCPU, which stays stopped from now on (unless a state is
    /// set into it). The other vCPUs run on until they are stopped. This one counts as stopped
    /// once this method has returned: wait for that before touching its state.
    fn ended(&self, vcpu: usize, end: End);

    /// Reads guest memory for the description of an end. Returns whether it could; a machine that
    /// cannot or will not do this leaves it out.
    fn read_memory(&self, gpa: Gpa, bytes: &mut [u8]) -> bool {
        let _ = (gpa, bytes);
        false
    }
}

/// What happens after a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// The guest goes on.
    Continue,
    /// The guest's run ends with this status.
    Exit(u32),
    /// The guest resets its machine: its run ends.
    Reset,
}

/// The registers of a call: arguments before, results after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CallRegisters {
    /// The result.
    pub rax: u64,
    /// First argument or further result.
    pub rdi: u64,
    /// Second argument or further result.
    pub rsi: u64,
    /// Third argument or further result.
    pub rdx: u64,
    /// Fourth argument or further result.
    pub r8: u64,
}

impl CallRegisters {
    pub(super) const fn of(regs: &kvm_regs) -> Self {
        Self { rax: regs.rax, rdi: regs.rdi, rsi: regs.rsi, rdx: regs.rdx, r8: regs.r8 }
    }

    pub(super) const fn store_into(&self, regs: &mut kvm_regs) {
        regs.rax = self.rax;
        regs.rdi = self.rdi;
        regs.rsi = self.rsi;
        regs.rdx = self.rdx;
        regs.r8 = self.r8;
    }
}

/// How a call came back.
///
/// | outcome | this VM's guest sees | a state saved meanwhile shows |
/// |---|---|---|
/// | `Return` | the registers | the same |
/// | `Interrupted` | [`AGAIN`](salp_protocol::call::AGAIN): it makes the call again | the same |
/// | `InterruptedWith(rax)` | nothing yet: the call is open and goes on with [`Machine::resume_call`] | `rax` |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallOutcome {
    /// The registers hold the results.
    Return,
    /// A stop was asked for, and the call has no effect that must not be repeated.
    Interrupted,
    /// A stop was asked for; the call stays open in this VM, and in states that are saved while the
    /// vCPU is stopped it has returned this value. The value can be changed then by
    /// [`show_result`](super::VcpuThread::show_result): a fork shows 0 in the state of its own
    /// clone, and `AGAIN` in that of a clone which another fork makes.
    InterruptedWith(u64),
}

/// Why a guest's run ended.
#[derive(Clone, Debug)]
pub enum End {
    /// The guest asked for it, with this status.
    Exit(u32),
    /// The guest asked for a reset of the machine.
    Reset,
    /// An exception while delivering an exception while delivering an exception, or a shutdown.
    TripleFault(Box<Dump>),
    /// KVM could not emulate an instruction or deliver an event.
    EmulationError {
        /// `kvm_run.internal.suberror`.
        suberror: u32,
        /// `kvm_run.internal.data`.
        data: Vec<u64>,
        /// The vCPU at that moment.
        dump: Box<Dump>,
    },
    /// `HLT` with interrupts off on all vCPUs that were started: nothing can wake them.
    HaltedForGood(Box<Dump>),
    /// The guest touched memory that is lost (poisoned, or a hardware memory error).
    MemoryError {
        /// Where it is in this process.
        host_address: u64,
        /// The vCPU at that moment.
        dump: Box<Dump>,
    },
    /// `KVM_RUN` failed.
    RunFailed {
        /// The error.
        errno: i32,
        /// The guest memory that it concerned, where KVM tells.
        gpa: Option<Gpa>,
        /// The vCPU at that moment.
        dump: Box<Dump>,
    },
    /// An exit that salp knows nothing about.
    Unexpected {
        /// Its name.
        exit: String,
        /// The vCPU at that moment.
        dump: Box<Dump>,
    },
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit(status) => write!(f, "exit with status {status}"),
            Self::Reset => write!(f, "reset by the guest"),
            Self::TripleFault(dump) => write!(f, "triple fault\n{dump}"),
            Self::EmulationError { suberror, data, dump } => {
                write!(f, "kvm internal error {suberror}, data {data:x?}\n{dump}")
            }
            Self::HaltedForGood(dump) => write!(f, "halted with interrupts off, for good\n{dump}"),
            Self::MemoryError { host_address, dump } => {
                write!(f, "lost memory at host address {host_address:#x}\n{dump}")
            }
            Self::RunFailed { errno, gpa, dump } => {
                let error = std::io::Error::from_raw_os_error(*errno);
                write!(f, "KVM_RUN failed: {error}")?;
                if let Some(gpa) = gpa {
                    write!(f, " at {gpa}")?;
                }
                write!(f, "\n{dump}")
            }
            Self::Unexpected { exit, dump } => write!(f, "unexpected exit {exit}\n{dump}"),
        }
    }
}

impl End {
    /// What whoever runs the guest could try, where there is something.
    #[must_use]
    pub const fn advice(&self, host: HostKind) -> Option<&'static str> {
        match (self, host.is_hardware()) {
            (Self::EmulationError { .. }, false) => Some(
                "this KVM emulates all of ring 0 and does not know every instruction: build the kernel \
                 without this one (`make linux-guest` has a recipe), or use a host with VMX or SVM",
            ),
            (Self::EmulationError { .. }, true) => {
                Some("KVM does not know the instruction, or what it accesses is no memory")
            }
            (Self::TripleFault(_), _) => {
                Some("an exception without a handler: look at cr2 and at the code around rip")
            }
            (Self::MemoryError { .. }, _) => {
                Some("the VM that had this memory was killed before it was published")
            }
            _ => None,
        }
    }
}

/// A vCPU's registers and the instruction it stood at, for a human.
#[derive(Clone, Debug, Default)]
pub struct Dump {
    /// General registers, where they could be read.
    pub regs: Option<kvm_regs>,
    /// System registers, where they could be read.
    pub sregs: Option<kvm_sregs>,
    /// Bytes at `rip`, empty where they could not be read.
    pub instruction: Vec<u8>,
}

impl fmt::Display for Dump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(r) = &self.regs {
            writeln!(f, "  rip {:016x} rflags {:08x} rsp {:016x}", r.rip, r.rflags, r.rsp)?;
            writeln!(f, "  rax {:016x} rbx {:016x} rcx {:016x}", r.rax, r.rbx, r.rcx)?;
            writeln!(f, "  rdx {:016x} rsi {:016x} rdi {:016x}", r.rdx, r.rsi, r.rdi)?;
            writeln!(f, "  rbp {:016x} r8  {:016x} r9  {:016x}", r.rbp, r.r8, r.r9)?;
            writeln!(f, "  r10 {:016x} r11 {:016x} r12 {:016x}", r.r10, r.r11, r.r12)?;
            writeln!(f, "  r13 {:016x} r14 {:016x} r15 {:016x}", r.r13, r.r14, r.r15)?;
        }
        if let Some(s) = &self.sregs {
            writeln!(f, "  cr0 {:x} cr2 {:x} cr3 {:x} cr4 {:x}", s.cr0, s.cr2, s.cr3, s.cr4)?;
            writeln!(f, "  efer {:x} cs {:x} ss {:x}", s.efer, s.cs.selector, s.ss.selector)?;
        }
        write!(f, "  at rip: {:02x?}", self.instruction)
    }
}
