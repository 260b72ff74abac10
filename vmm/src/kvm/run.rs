//! The exit loop: enters `KVM_RUN`, hands exits to the [`Machine`], leaves when a stop is raised or
//! the guest's run ends.
//!
//! A vCPU leaves the loop *clean*: KVM finishes a port or MMIO access only at the next entry, so
//! before leaving (and before a call looks at the registers) the loop enters once more with
//! `immediate_exit` set, which finishes the access and runs no instruction. What is left over of an
//! exit is one value, `Due`.
//!
//! Known hole: KVM hands over an access to a string of ports as one block; a `rep outsb` of four
//! bytes to the call port looks like a call.
#![expect(unsafe_code, reason = "reads the union in kvm_run that describes an internal error")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use kvm_ioctls::VcpuExit;
use salp_protocol::{call, port};
use serde::{Deserialize, Serialize};

use super::error::KvmError;
use super::kick::StopSignal;
use super::machine::{CallOutcome, CallRegisters, Dump, End, Flow, Machine};
use super::poison;
use super::state::VcpuState;
use super::times::TimeStamps;
use super::vm::Vcpu;
use crate::words::{Gpa, index};

/// The longest instruction there is (SDM 2A, 2.3.11).
const INSTRUCTION_BYTES: usize = 15;

/// What remains to be done for the last exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    /// Nothing: the state is clean.
    Nothing,
    /// An access, to be finished by the next entry.
    Access,
    /// The access, then this call.
    Call(u32),
    /// The access, then the end with this status.
    Exit(u32),
    /// The access, then the end by a reset.
    Reset,
}

/// A call that outlasts a stop.
#[derive(Clone, Copy, Debug)]
pub(super) struct OpenCall {
    pub(super) number: u32,
    pub(super) registers: CallRegisters,
    /// What a saved state has in `rax`.
    pub(super) shown_rax: u64,
}

/// How many exits of each kind there were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exits {
    /// Port reads.
    pub pio_reads: u64,
    /// Port writes, calls not included.
    pub pio_writes: u64,
    /// MMIO reads.
    pub mmio_reads: u64,
    /// MMIO writes.
    pub mmio_writes: u64,
    /// Calls.
    pub calls: u64,
    /// Returns by a signal or `immediate_exit`.
    pub interrupted: u64,
    /// Everything else.
    pub others: u64,
}

/// [`Exits`], counted by the vCPU's thread and read by any.
#[derive(Debug, Default)]
pub(super) struct ExitCounters([AtomicU64; 7]);

#[derive(Clone, Copy)]
enum Exit {
    PioRead,
    PioWrite,
    MmioRead,
    MmioWrite,
    Call,
    Interrupted,
    Other,
}

impl ExitCounters {
    fn count(&self, exit: Exit) {
        // Relaxed: a figure for reports, nothing is inferred from it.
        self.0[exit as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> Exits {
        let count = |exit: Exit| self.0[exit as usize].load(Ordering::Relaxed);
        Exits {
            pio_reads: count(Exit::PioRead),
            pio_writes: count(Exit::PioWrite),
            mmio_reads: count(Exit::MmioRead),
            mmio_writes: count(Exit::MmioWrite),
            calls: count(Exit::Call),
            interrupted: count(Exit::Interrupted),
            others: count(Exit::Other),
        }
    }
}

/// What the loop works with, apart from the vCPU itself.
pub(super) struct Context<'a> {
    pub(super) machine: &'a dyn Machine,
    pub(super) stop: &'a StopSignal,
    pub(super) times: &'a TimeStamps,
    pub(super) exits: &'a ExitCounters,
    /// See [`VcpuWatch`](super::rest::VcpuWatch).
    pub(super) in_guest: &'a AtomicBool,
}

/// A vCPU that is run: what its thread owns while it runs, and whoever stopped it while it does not.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) vcpu: Vcpu,
    pub(super) open_call: Option<OpenCall>,
    due: Due,
}

/// An exit that ends the run, before the vCPU is described.
enum Cause {
    Shutdown,
    Internal,
    Halted,
    Failed(i32, Option<Gpa>),
    Lost(u64),
    Unexpected(String),
}

impl Running {
    pub(super) const fn new(vcpu: Vcpu) -> Self {
        Self { vcpu, open_call: None, due: Due::Nothing }
    }

    /// The state, with an open call shown as returned.
    pub(super) fn save(&self) -> Result<VcpuState, KvmError> {
        let mut state = self.vcpu.save()?;
        if let Some(open) = self.open_call {
            state.regs.rax = open.shown_rax;
        }
        Ok(state)
    }

    /// The vCPU has got another state: what was left of its last exit is of no account.
    pub(super) const fn forget_exit(&mut self) {
        self.open_call = None;
        self.due = Due::Nothing;
    }

    /// Runs the guest until a stop is raised (`None`) or its run ends. The state is clean after a
    /// stop and after [`End::Exit`].
    pub(super) fn run(&mut self, context: &Context<'_>) -> Option<End> {
        self.vcpu.forget();
        self.run_until_end(context).err()
    }

    fn run_until_end(&mut self, context: &Context<'_>) -> Result<(), End> {
        loop {
            if let Some(open) = self.open_call {
                // A stop that comes again before the call has gone on leaves it open.
                if context.stop.is_raised() {
                    return Ok(());
                }
                self.open_call = None;
                // It goes on there, and not in the guest.
                context.times.entering();
                self.make_call(context, open.number, Some(open.registers))?;
                context.machine.entering();
                continue;
            }
            self.vcpu.fd.set_kvm_immediate_exit(0);
            // Orders that store before the look at the stop signal: see `kick`.
            fence(Ordering::SeqCst);
            match self.due {
                Due::Call(number) => {
                    self.finish_access(context)?;
                    self.make_call(context, number, None)?;
                    context.machine.entering();
                }
                Due::Exit(status) => {
                    self.finish_access(context)?;
                    return Err(End::Exit(status));
                }
                Due::Reset => {
                    self.finish_access(context)?;
                    return Err(End::Reset);
                }
                Due::Access if context.stop.is_raised() => self.finish_access(context)?,
                Due::Nothing if context.stop.is_raised() => return Ok(()),
                Due::Access | Due::Nothing => {
                    if self.due == Due::Access {
                        context.machine.entering();
                    }
                    context.times.entering();
                    self.due = self.enter(context)?;
                    context.times.left();
                }
            }
        }
    }

    /// Finishes what the last exit left without running an instruction. A wide access can exit
    /// again on the way; what is due then remains.
    fn finish_access(&mut self, context: &Context<'_>) -> Result<(), End> {
        self.due = Due::Access;
        while self.due == Due::Access {
            self.vcpu.fd.set_kvm_immediate_exit(1);
            self.due = self.enter(context)?;
        }
        Ok(())
    }

    /// One `KVM_RUN`.
    fn enter(&mut self, context: &Context<'_>) -> Result<Due, End> {
        let (machine, vcpu) = (context.machine, self.vcpu.index);
        let count = |exit| context.exits.count(exit);
        let after = |flow| match flow {
            Flow::Continue => Ok(Due::Access),
            Flow::Exit(status) => Ok(Due::Exit(status)),
            Flow::Reset => Ok(Due::Reset),
        };
        // Relaxed: for those who look from outside.
        context.in_guest.store(true, Ordering::Relaxed);
        let (exit, lost) = poison::watch(|| self.vcpu.fd.run());
        context.in_guest.store(false, Ordering::Relaxed);
        if let Some(host_address) = lost {
            count(Exit::Other);
            return Err(self.end(Cause::Lost(host_address), machine));
        }
        let cause = match exit {
            Ok(VcpuExit::IoOut(port::CALL, &[a, b, c, d])) => {
                count(Exit::Call);
                return Ok(Due::Call(u32::from_le_bytes([a, b, c, d])));
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                count(Exit::PioWrite);
                return after(machine.pio_write(vcpu, port, data));
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                count(Exit::PioRead);
                data.fill(0xff);
                machine.pio_read(vcpu, port, data);
                return Ok(Due::Access);
            }
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                count(Exit::MmioRead);
                data.fill(0xff);
                machine.mmio_read(vcpu, Gpa(gpa), data);
                return Ok(Due::Access);
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                count(Exit::MmioWrite);
                return after(machine.mmio_write(vcpu, Gpa(gpa), data));
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_)) => {
                count(Exit::Other);
                return Ok(Due::Nothing);
            }
            // EAGAIN: a vCPU that waited for its start-up interrupt got one.
            Err(errno) if [libc::EINTR, libc::EAGAIN].contains(&errno.errno()) => {
                count(Exit::Interrupted);
                return Ok(Due::Nothing);
            }
            Ok(VcpuExit::Shutdown) => Cause::Shutdown,
            Ok(VcpuExit::InternalError) => Cause::Internal,
            Ok(VcpuExit::Hlt) => Cause::Halted,
            Ok(VcpuExit::MemoryFault { gpa, .. }) => {
                // Comes with EFAULT or EHWPOISON; kvm-ioctls leaves it where the C library has it.
                let errno = std::io::Error::last_os_error().raw_os_error();
                Cause::Failed(errno.unwrap_or(libc::EFAULT), Some(Gpa(gpa)))
            }
            Ok(other) => Cause::Unexpected(format!("{other:?}")),
            Err(errno) => Cause::Failed(errno.errno(), None),
        };
        count(Exit::Other);
        Err(self.end(cause, machine))
    }

    /// Makes a call, or goes on with one that was open (its registers are `again`).
    fn make_call(
        &mut self,
        context: &Context<'_>,
        number: u32,
        again: Option<CallRegisters>,
    ) -> Result<(), End> {
        let (machine, vcpu, stop) = (context.machine, self.vcpu.index, context.stop);
        let failed = |errno: kvm_ioctls::Error| Cause::Failed(errno.errno(), None);
        let mut regs = match self.vcpu.fd.get_regs() {
            Ok(regs) => regs,
            Err(errno) => return Err(self.end(failed(errno), machine)),
        };
        let before = again.unwrap_or_else(|| CallRegisters::of(&regs));
        let mut registers = before;
        let outcome = match again {
            None => machine.call(vcpu, number, &mut registers, stop),
            Some(_) => machine.resume_call(vcpu, number, &mut registers, stop),
        };
        match outcome {
            CallOutcome::Return => registers.store_into(&mut regs),
            CallOutcome::Interrupted => regs.rax = call::AGAIN,
            CallOutcome::InterruptedWith(shown_rax) => {
                self.open_call = Some(OpenCall { number, registers: before, shown_rax });
                return Ok(());
            }
        }
        match self.vcpu.fd.set_regs(&regs) {
            Ok(()) => Ok(()),
            Err(errno) => Err(self.end(failed(errno), machine)),
        }
    }

    fn end(&mut self, cause: Cause, machine: &dyn Machine) -> End {
        let mut dump = Box::new(self.dump());
        // What was lost may be the instruction: then nobody may read it.
        if !matches!(cause, Cause::Lost(_)) {
            dump.instruction = self.instruction(machine).unwrap_or_default();
        }
        match cause {
            Cause::Shutdown => End::TripleFault(dump),
            Cause::Halted => End::HaltedForGood(dump),
            Cause::Failed(errno, gpa) => End::RunFailed { errno, gpa, dump },
            Cause::Lost(host_address) => End::MemoryError { host_address, dump },
            Cause::Unexpected(exit) => End::Unexpected { exit, dump },
            Cause::Internal => {
                // SAFETY: the exit reason says that this is the union's valid part; it is plain
                // numbers, for which all bytes are valid.
                let internal = unsafe { self.vcpu.fd.get_kvm_run().__bindgen_anon_1.internal };
                let count = index(internal.ndata.into());
                End::EmulationError {
                    suberror: internal.suberror,
                    data: internal.data.iter().copied().take(count).collect(),
                    dump,
                }
            }
        }
    }

    /// The end of a vCPU that stands at a `HLT` which nothing will end.
    pub(super) fn halted(&mut self, machine: &dyn Machine) -> End {
        self.end(Cause::Halted, machine)
    }

    /// Describes the vCPU as far as it lets itself be described.
    fn dump(&self) -> Dump {
        Dump {
            regs: self.vcpu.fd.get_regs().ok(),
            sregs: self.vcpu.fd.get_sregs().ok(),
            instruction: Vec::new(),
        }
    }

    /// The bytes at `rip`, if they are mapped and the machine lets them be read.
    fn instruction(&self, machine: &dyn Machine) -> Option<Vec<u8>> {
        let rip = self.vcpu.fd.get_regs().ok()?.rip;
        let at = self.vcpu.fd.translate_gva(rip).ok()?;
        let mut bytes = vec![0; INSTRUCTION_BYTES];
        let is_read = at.valid != 0 && machine.read_memory(Gpa(at.physical_address), &mut bytes);
        is_read.then_some(bytes)
    }
}
