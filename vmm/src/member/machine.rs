//! The machine around a member's vCPUs: devices on ports and MMIO, and the guest's calls.
//!
//! Console output goes to the keeper by lines; what is left of a line the [`Watch`] sends on.
//!
//! It exists before the VM has a role, since vCPU threads are made ahead: [`MemberMachine::live`]
//! gives it one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use salp_protocol::{call, port};

use super::mailbox::{Mailbox, ResetBell};
use super::messages::{Event, HowEnded, Message, Progress};
use super::start::{is_reset, read_port};
use super::watch::Watch;
use crate::devices::bus::{Bus, Claim};
use crate::family::VmId;
use crate::ipc::{Channel, IpcError};
use crate::kvm::kick::{StopSignal, Woken};
use crate::kvm::vcpu::{has_spare_processor, monotonic_ns};
use crate::kvm::{CallOutcome, CallRegisters, End, Flow, HostDescription, Machine};
use crate::space::Space;
use crate::window::Window;
use crate::words::Gpa;

/// What a VM has once it has a role.
pub struct Live {
    /// Its name.
    pub vm: VmId,
    /// Its devices. Replaced by a reset alone, while the vCPUs are stopped.
    pub bus: RwLock<Bus>,
    /// Its memory.
    pub space: Arc<Space<Window>>,
    /// Whether it is a clone whose first exit has not been reported.
    pub is_fresh: AtomicBool,
}

impl Live {
    /// The devices.
    pub fn bus(&self) -> RwLockReadGuard<'_, Bus> {
        self.bus.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module.
pub struct MemberMachine {
    live: OnceLock<Live>,
    mailboxes: Vec<Mailbox>,
    keeper: Arc<Channel>,
    /// Console output that the keeper has not got.
    line: Mutex<Vec<u8>>,
    reset_asked: ResetBell,
    watch: Watch,
}

/// A line without an end is sent on at this length.
const LINE_LIMIT_BYTES: usize = 256;

impl MemberMachine {
    /// A machine for `vcpus` vCPUs that reports to `keeper`.
    ///
    /// # Errors
    /// No descriptor could be made.
    pub fn new(vcpus: u8, keeper: Arc<Channel>) -> std::io::Result<Self> {
        let mailboxes = (0..vcpus).map(|_| Mailbox::new()).collect::<Result<_, _>>()?;
        Ok(Self {
            live: OnceLock::new(),
            mailboxes,
            keeper,
            line: Mutex::default(),
            reset_asked: ResetBell::new()?,
            watch: Watch::new()?,
        })
    }

    /// Gives the machine its role, once.
    ///
    /// # Errors
    /// It has one.
    pub fn live(&self, live: Live) -> Result<&Live, &'static str> {
        self.live.set(live).map_err(|_| "this member is a VM already")?;
        self.role()
    }

    /// The role.
    ///
    /// # Errors
    /// The machine has none yet.
    pub fn role(&self) -> Result<&Live, &'static str> {
        self.live.get().ok_or("this member is no VM yet")
    }

    /// The mailbox of a vCPU.
    pub fn mailbox(&self, vcpu: usize) -> Option<&Mailbox> {
        self.mailboxes.get(vcpu)
    }

    /// All mailboxes.
    pub fn mailboxes(&self) -> &[Mailbox] {
        &self.mailboxes
    }

    /// Where a guest's wish to be reset is heard.
    pub fn reset_bell(&self) -> &ResetBell {
        &self.reset_asked
    }

    /// The VM is what it was when it began, and will run: nothing that it did since counts.
    pub fn begin_again(&self) {
        self.flush_line();
        self.mailboxes.iter().for_each(Mailbox::begin_again);
        if let Some(live) = self.live.get() {
            live.is_fresh.store(true, Ordering::Relaxed);
        }
        self.tell(Event::Restarting);
    }

    /// Tells the keeper something. If the keeper is gone, so is this process soon.
    pub fn tell(&self, event: Event) {
        match self.keeper.send_patiently(&Message::Event(event), &[]) {
            Ok(()) | Err(IpcError::Closed) => {}
            Err(error) => tracing::error!(%error, "the keeper cannot be told"),
        }
    }

    /// Sends console output to the keeper, a line at a time.
    pub fn print(&self, bytes: &[u8]) {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        let is_begun = line.is_empty();
        line.extend_from_slice(bytes);
        if bytes.contains(&b'\n') || line.len() >= LINE_LIMIT_BYTES {
            self.tell(Event::Console(std::mem::take(&mut line)));
        } else if is_begun {
            self.watch.line_begun();
        }
    }

    /// Sends what there is of a line, a prompt for one.
    pub(super) fn flush_line(&self) {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        if !line.is_empty() {
            self.tell(Event::Console(std::mem::take(&mut line)));
        }
    }

    /// What looks after this machine.
    pub(super) fn watch(&self) -> &Watch {
        &self.watch
    }

    /// Reports a clone's first exit.
    fn mark_exit(&self) {
        if let Some(live) = self.live.get()
            && live.is_fresh.load(Ordering::Relaxed)
            && live.is_fresh.swap(false, Ordering::Relaxed)
        {
            self.tell(Event::FirstExit { at: monotonic_ns() });
        }
    }

    /// The answer to a report: 1 = verify everything and finish.
    pub fn report(&self, vcpu: usize, registers: &CallRegisters, is_finished: bool) -> u64 {
        let progress = Progress {
            rounds: registers.rdi,
            errors: registers.rsi,
            transfers: registers.rdx,
            figure: registers.r8,
            is_finished,
        };
        self.tell(Event::Progress(progress));
        u64::from(self.mailboxes.get(vcpu).is_some_and(Mailbox::should_stop_counting))
    }

    /// The next order of a puppet, waiting for it.
    fn next_order(&self, vcpu: usize, registers: &mut CallRegisters, stop: &StopSignal) -> CallOutcome {
        let Some(mailbox) = self.mailboxes.get(vcpu) else { return refuse(registers) };
        if mailbox.take_working() {
            self.tell(Event::Puppet { vcpu, result: registers.rdi });
        }
        loop {
            mailbox.hush();
            if let Some(order) = mailbox.take_order() {
                *registers =
                    CallRegisters { rax: order.order, rdi: order.a, rsi: order.b, rdx: order.c, r8: order.d };
                return CallOutcome::Return;
            }
            if let Woken::Stop = stop.wait(Some(std::os::fd::AsFd::as_fd(mailbox)), None) {
                return CallOutcome::Interrupted;
            }
        }
    }

    /// Waits for a reset, which stops this vCPU and takes its place; or for its refusal.
    fn await_reset(&self, vcpu: usize, registers: &mut CallRegisters, stop: &StopSignal) -> CallOutcome {
        let Some(mailbox) = self.mailboxes.get(vcpu) else { return refuse(registers) };
        loop {
            mailbox.hush();
            if mailbox.take_refusal() {
                return refuse(registers);
            }
            if let Woken::Stop = stop.wait(Some(std::os::fd::AsFd::as_fd(mailbox)), None) {
                // In the clone of a cut that comes first: it is not what was to be reset.
                return CallOutcome::InterruptedWith(call::FAILED);
            }
        }
    }

    fn await_fork(&self, vcpu: usize, registers: &mut CallRegisters, stop: &StopSignal) -> CallOutcome {
        let Some(mailbox) = self.mailboxes.get(vcpu) else { return refuse(registers) };
        loop {
            mailbox.hush();
            if let Some(result) = mailbox.take_fork() {
                registers.rax = result.map_or(call::FAILED, |clone| u64::from(clone.0));
                return CallOutcome::Return;
            }
            if let Woken::Stop = stop.wait(Some(std::os::fd::AsFd::as_fd(mailbox)), None) {
                // The cut that this call has asked for shows 0 instead; see `Member::cut`.
                return CallOutcome::InterruptedWith(call::AGAIN);
            }
        }
    }
}

fn refuse(registers: &mut CallRegisters) -> CallOutcome {
    registers.rax = call::FAILED;
    CallOutcome::Return
}

/// Nobody there: reads are all ones (as they are already), writes go nowhere.
fn ignore(claim: Claim) {
    match claim {
        Claim::Taken | Claim::Nobody => {}
    }
}

impl Machine for MemberMachine {
    fn pio_read(&self, _vcpu: usize, port: u16, data: &mut [u8]) {
        self.mark_exit();
        if let Some(live) = self.live.get()
            && live.bus().port_read(port, data) == Claim::Nobody
        {
            read_port(port, data);
        }
        if let Some(live) = self.live.get()
            && live.bus().serial.take_room()
        {
            self.tell(Event::ConsoleRoom);
        }
    }

    fn pio_write(&self, _vcpu: usize, port: u16, data: &[u8]) -> Flow {
        self.mark_exit();
        let Some(live) = self.live.get() else { return Flow::Continue };
        if live.bus().port_write(port, data) == Claim::Nobody && is_reset(port, data) {
            return Flow::Reset;
        }
        match live.bus().exit.status() {
            Some(status) if port == port::EXIT => Flow::Exit(status),
            _ => Flow::Continue,
        }
    }

    fn mmio_read(&self, _vcpu: usize, gpa: Gpa, data: &mut [u8]) {
        self.mark_exit();
        if let Some(live) = self.live.get() {
            ignore(live.bus().mmio_read(gpa, data));
        }
    }

    fn mmio_write(&self, _vcpu: usize, gpa: Gpa, data: &[u8]) -> Flow {
        self.mark_exit();
        if let Some(live) = self.live.get() {
            ignore(live.bus().mmio_write(gpa, data));
        }
        Flow::Continue
    }

    fn call(
        &self,
        vcpu: usize,
        number: u32,
        registers: &mut CallRegisters,
        stop: &StopSignal,
    ) -> CallOutcome {
        self.mark_exit();
        match number {
            call::FORK => {
                self.tell(Event::ForkAsked { vcpu });
                self.await_fork(vcpu, registers, stop)
            }
            call::PROGRESS | call::FINISHED => {
                registers.rax = self.report(vcpu, registers, number == call::FINISHED);
                CallOutcome::Return
            }
            call::RESET => {
                self.reset_asked.ring(vcpu);
                if has_spare_processor(self.mailboxes.len()) {
                    stop.look();
                }
                self.await_reset(vcpu, registers, stop)
            }
            call::NEXT => self.next_order(vcpu, registers, stop),
            call::SLEEP => {
                match stop.wait(None, Some(Duration::from_micros(registers.rdi.min(MAX_SLEEP_US)))) {
                    Woken::Stop => CallOutcome::Interrupted,
                    Woken::Ready | Woken::Timeout => {
                        registers.rax = 0;
                        CallOutcome::Return
                    }
                }
            }
            call::WHO => {
                registers.rax = self.live.get().map_or(call::FAILED, |live| u64::from(live.vm.0));
                CallOutcome::Return
            }
            _ => refuse(registers),
        }
    }

    fn resume_call(
        &self,
        vcpu: usize,
        number: u32,
        registers: &mut CallRegisters,
        stop: &StopSignal,
    ) -> CallOutcome {
        // These are the two calls that stay open.
        match number {
            call::RESET => self.await_reset(vcpu, registers, stop),
            _ => self.await_fork(vcpu, registers, stop),
        }
    }

    fn entering(&self) {
        self.watch.guest_acts();
    }

    fn ended(&self, vcpu: usize, end: End) {
        self.mark_exit();
        self.flush_line();
        let (how, status) = match &end {
            End::Exit(status) => (HowEnded::Exited, Some(*status)),
            End::Reset => (HowEnded::Reset, Some(0)),
            End::HaltedForGood(_) => (HowEnded::Halted, None),
            _ => (HowEnded::Crashed, None),
        };
        let mut text = format!("vcpu {vcpu}: {end}");
        if let End::MemoryError { host_address, .. } = end
            && let Some(gfn) = self.live.get().and_then(|live| live.space.host().gfn_at(host_address))
        {
            text.push_str(&format!("\n  {gfn} is lost"));
        }
        if let Some(advice) = end.advice(HostDescription::read().kind) {
            text.push_str("\n  ");
            text.push_str(advice);
        }
        self.tell(Event::Ended { how, status, text });
    }

    fn read_memory(&self, gpa: Gpa, bytes: &mut [u8]) -> bool {
        let Some(live) = self.live.get() else { return false };
        live.space.shape().contains(gpa, bytes.len()) && live.space.host().read(gpa, bytes).is_ok()
    }
}

/// The longest sleep of one call, in microseconds: a guest that asks for more calls again.
const MAX_SLEEP_US: u64 = 10_000_000;
