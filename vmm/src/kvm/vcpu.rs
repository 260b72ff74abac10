//! One thread per vCPU, and the protocol that stops it, hands its state over, and resumes it.
//!
//! Key type: [`VcpuThread`], the handle.
//!
//! # Protocol
//! A thread starts *parked*: it has put its vCPU into the shared slot and waits. [`resume`] lets it
//! take the vCPU out and run. [`request_stop`] makes it leave the guest (see `kick`); it finishes
//! pending accesses, puts the vCPU back, and is parked again, which [`wait_stopped`] waits for.
//! While it is parked any thread may save and set the state: the slot's lock is the right to touch
//! the vCPU. To stop a VM, request all, then wait for all ([`stop_all`]).
//!
//! A thread that sleeps needs tens of microseconds to come back. One that has just stopped, or is
//! [roused](rouse_all), waits awake for a moment, because it is to be resumed at once; who waits for one
//! to stop looks for a moment before he sleeps, too. All that only where there are more processors than
//! vCPUs. There [`begin_save`] has the threads save their vCPUs' states, each its own, while whoever has
//! stopped them does something else; [`save`] takes what is there, waits for what is being done, and does
//! itself what nobody has begun.
//!
//! | phase | vCPU is with | left by |
//! |---|---|---|
//! | parked | the slot | `resume`, unless the guest's run has ended; or the handle's drop |
//! | running | the thread | `request_stop`, or the end of the guest's run |
//! | gone | nobody | never |
//!
//! A halted vCPU sits inside `KVM_RUN`; the kick gets it out, and that it was halted is part of the
//! saved state (`mp_state`). A vCPU inside a *call* that blocks is told by its stop signal; what
//! the call then leaves behind is said at [`CallOutcome`](super::CallOutcome).
//!
//! Known hole: a vCPU that waits in the kernel for a page of its page tables (behind a userfaultfd)
//! notices the kick only when that page is resolved.
//!
//! [`resume`]: VcpuThread::resume
//! [`save`]: VcpuThread::save
//! [`request_stop`]: VcpuThread::request_stop
//! [`wait_stopped`]: VcpuThread::wait_stopped

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::error::KvmError;
use super::kick::{self, ImmediateExit, StopSignal};
use super::machine::{End, Machine};
use super::poison;
use super::rest::{Rest, VcpuWatch};
use super::run::{Context, ExitCounters, Exits, Running};
use super::state::VcpuState;
use super::stats::stats;
use super::times::TimeStamps;
pub use super::times::{Times, monotonic_ns};
use super::vm::Vcpu;
use crate::words::wide;

/// How long somebody who expects a change at once looks for it awake.
const AWAKE_LIMIT: Duration = Duration::from_micros(500);

/// Whether somebody may look awake for `vcpus` others that work.
#[must_use]
pub fn has_spare_processor(vcpus: usize) -> bool {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    let count = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    *PROCESSORS.get_or_init(count) > vcpus
}

/// What the thread is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Stop,
    /// Stay parked, but awake.
    Rouse,
    /// Stay parked and awake, and save the state.
    Save,
    Run,
    Quit,
}

#[derive(Debug)]
enum Phase {
    Parked(Box<Running>),
    /// With the kernel's number of the thread.
    Running(i32),
    Gone,
}

/// The state shared by the handle and the thread. Locked for microseconds, or while a state is
/// saved or set.
#[derive(Debug)]
struct Slot {
    order: Order,
    phase: Phase,
    /// The guest's run has ended: resuming does nothing.
    ended: bool,
    /// What the thread was told to save and nobody has taken yet. It goes when the vCPU runs or is set.
    saved: Option<Result<Box<VcpuState>, KvmError>>,
}

impl Slot {
    /// Whether a parked vCPU stays so, and its state may be touched.
    const fn is_stopped(&self) -> bool {
        matches!(self.order, Order::Stop | Order::Rouse | Order::Save) || self.ended
    }

    /// The vCPU is to run: what was saved is past.
    fn release(&mut self) {
        self.saved = None;
        self.order = Order::Run;
    }

    /// The thread's part of [`begin_save`].
    fn save(&mut self) {
        if let Phase::Parked(running) = &self.phase {
            self.saved = Some(running.save().map(Box::new));
        }
        self.order = Order::Rouse;
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    index: usize,
    slot: Mutex<Slot>,
    /// Order or phase has changed.
    changed: Condvar,
    /// Counts those changes, for those who look awake.
    changes: AtomicU32,
    stop: StopSignal,
    times: TimeStamps,
    exits: ExitCounters,
    /// The thread is in `KVM_RUN`, or as good as there.
    pub(super) in_guest: AtomicBool,
}

impl Shared {
    /// The kernel's number of the thread, while the vCPU is with it.
    pub(super) fn running_thread(&self) -> Option<i32> {
        match self.lock().phase {
            Phase::Running(thread) => Some(thread),
            Phase::Parked(_) | Phase::Gone => None,
        }
    }

    /// The slot. A panic under the lock leaves it whole: all changes are single assignments.
    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells of a change of order or phase.
    fn tell(&self) {
        // Release: pairs with `look`; what matters is under the lock.
        self.changes.fetch_add(1, Ordering::Release);
        self.changed.notify_all();
    }

    /// Looks, awake, until something has changed since `seen`, or the time is over.
    fn look(&self, seen: u32, limit: Duration) {
        let begun = Instant::now();
        while self.changes.load(Ordering::Acquire) == seen && begun.elapsed() < limit {
            std::thread::yield_now();
        }
    }

    /// Parks the vCPU until it is to run; `None` when the thread is to end.
    fn park(&self, running: Box<Running>, ended: bool) -> Option<Box<Running>> {
        let mut slot = self.lock();
        slot.ended |= ended;
        slot.phase = Phase::Parked(running);
        TimeStamps::stamp(&self.times.stopped);
        self.tell();
        let mut slot = loop {
            slot = self
                .changed
                .wait_while(slot, |slot| match slot.order {
                    Order::Stop => true,
                    Order::Run => slot.ended,
                    Order::Rouse | Order::Save | Order::Quit => false,
                })
                .unwrap_or_else(PoisonError::into_inner);
            if slot.order == Order::Save {
                slot.save();
            }
            if slot.order != Order::Rouse {
                break slot;
            }
            let seen = self.changes.load(Ordering::Acquire);
            drop(slot);
            self.look(seen, AWAKE_LIMIT);
            slot = self.lock();
            if slot.order == Order::Rouse {
                slot.order = Order::Stop;
            }
        };
        if slot.order == Order::Quit {
            return None;
        }
        match std::mem::replace(&mut slot.phase, Phase::Running(kick::this_thread())) {
            Phase::Parked(running) => Some(running),
            Phase::Running(_) | Phase::Gone => unreachable!("only this thread unparks"),
        }
    }
}

/// Tells everyone who waits that the thread is leaving, also by a panic.
struct Leaving<'a>(&'a Shared);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        // The vCPU is closed here, outside the lock.
        let phase = std::mem::replace(&mut self.0.lock().phase, Phase::Gone);
        self.0.tell();
        drop(phase);
    }
}

/// The body of a vCPU's thread.
fn thread(shared: &Shared, machine: &dyn Machine, vcpu: Vcpu) {
    let _leaving = Leaving(shared);
    let context = Context {
        machine,
        stop: &shared.stop,
        times: &shared.times,
        exits: &shared.exits,
        in_guest: &shared.in_guest,
    };
    let mut next = shared.park(Box::new(Running::new(vcpu)), false);
    while let Some(mut running) = next {
        let end = running.run(&context);
        let ended = end.is_some();
        if let Some(end) = end {
            machine.ended(shared.index, end);
        }
        next = shared.park(running, ended);
    }
}

/// The handle of a vCPU's thread. Dropping it stops the vCPU, closes it and waits for the thread.
#[derive(Debug)]
pub struct VcpuThread {
    shared: Arc<Shared>,
    immediate_exit: ImmediateExit,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Starts the thread of a vCPU, parked.
    ///
    /// # Errors
    /// No thread, mapping, signal handler or descriptor could be had.
    pub fn spawn(vcpu: Vcpu, machine: Arc<dyn Machine>) -> Result<Self, KvmError> {
        let index = vcpu.index;
        let immediate_exit = ImmediateExit::map(&vcpu.fd)?;
        let shared = Arc::new(Shared {
            index,
            // As if the thread were on its way to be parked: whoever waits for that, waits.
            slot: Mutex::new(Slot {
                order: Order::Stop,
                phase: Phase::Running(0),
                ended: false,
                saved: None,
            }),
            changed: Condvar::new(),
            changes: AtomicU32::new(0),
            stop: StopSignal::new()?,
            times: TimeStamps::default(),
            exits: ExitCounters::default(),
            in_guest: AtomicBool::new(false),
        });
        // Held until the thread has parked, so that nobody signals a thread that has no number yet.
        let (ready, prepared) = std::sync::mpsc::sync_channel(1);
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || {
                let result = poison::install().and_then(|()| kick::prepare_this_thread());
                let failed = result.is_err();
                if ready.send(result).is_ok() && !failed {
                    thread(&for_thread, machine.as_ref(), vcpu);
                }
            })
            .map_err(|source| KvmError::Ioctl { name: "starting a vcpu thread", source })?;
        let gone = Err(KvmError::Gone { vcpu: index });
        prepared.recv().unwrap_or(gone)?;
        let this = Self { shared, immediate_exit, thread: Some(thread) };
        this.wait_parked(None, false)?;
        Ok(this)
    }

    /// The vCPU's index in its VM.
    #[must_use]
    pub fn index(&self) -> usize {
        self.shared.index
    }

    /// Asks the vCPU to stop; does not wait.
    pub fn request_stop(&self) {
        self.order(Order::Stop);
    }

    /// Gives an order other than to run.
    fn order(&self, order: Order) {
        let mut slot = self.shared.lock();
        let times = &self.shared.times;
        TimeStamps::stamp(&times.requested);
        slot.order = order;
        self.shared.stop.raise();
        self.immediate_exit.set();
        match slot.phase {
            // Under the lock, so that the thread is still there.
            Phase::Running(thread) => kick::kick(thread),
            // Also where a resume has not reached the thread yet.
            Phase::Parked(_) => times.stopped.store(times.read().requested_ns, Ordering::Relaxed),
            Phase::Gone => {}
        }
        self.shared.tell();
    }

    /// Waits until the vCPU is stopped, because it was asked to or because its run has ended.
    ///
    /// # Errors
    /// It did not stop in time, or its thread is gone.
    pub fn wait_stopped(&self, timeout: Duration) -> Result<(), KvmError> {
        self.wait_parked(Some(timeout), false)
    }

    fn wait_parked(&self, timeout: Option<Duration>, mut may_look: bool) -> Result<(), KvmError> {
        let vcpu = self.index();
        let start = Instant::now();
        let mut slot = self.shared.lock();
        loop {
            match slot.phase {
                Phase::Parked(_) if slot.is_stopped() => return Ok(()),
                Phase::Gone => return Err(KvmError::Gone { vcpu }),
                Phase::Parked(_) | Phase::Running(_) => {}
            }
            let left = timeout.map_or(Duration::MAX, |t| t.saturating_sub(start.elapsed()));
            if left.is_zero() {
                let waited_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
                return Err(KvmError::StopTimeout { vcpu, waited_ms });
            }
            if std::mem::take(&mut may_look) {
                let seen = self.shared.changes.load(Ordering::Acquire);
                drop(slot);
                self.shared.look(seen, left.min(AWAKE_LIMIT));
                slot = self.shared.lock();
                continue;
            }
            let waited = self.shared.changed.wait_timeout(slot, left);
            slot = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets a stopped vCPU go on. One whose run has ended stays stopped.
    ///
    /// # Errors
    /// It is not stopped, or its thread is gone.
    pub fn resume(&self) -> Result<(), KvmError> {
        self.with_stopped(|slot| {
            slot.release();
            self.shared.stop.lower();
            let times = &self.shared.times;
            times.entered.store(0, Ordering::Relaxed);
            times.first_exit.store(0, Ordering::Relaxed);
            TimeStamps::stamp(&times.resumed);
        })?;
        self.shared.tell();
        Ok(())
    }

    /// Has a stopped vCPU's thread wait awake for a moment.
    fn rouse(&self) {
        let mut slot = self.shared.lock();
        if slot.order == Order::Stop && matches!(slot.phase, Phase::Parked(_)) && !slot.ended {
            slot.order = Order::Rouse;
            self.shared.tell();
        }
    }

    /// Takes a stop back, whether the vCPU has followed it or not: for one that did not stop in time, and
    /// would do so when nobody waits for it any more.
    ///
    /// # Errors
    /// Its thread is gone.
    pub fn take_back_stop(&self) -> Result<(), KvmError> {
        {
            let mut slot = self.shared.lock();
            if matches!(slot.phase, Phase::Gone) {
                return Err(KvmError::Gone { vcpu: self.index() });
            }
            // Under the lock, as they are raised: the thread sees both or neither when it looks at its order.
            slot.release();
            self.shared.stop.lower();
        }
        self.shared.tell();
        Ok(())
    }

    /// Runs `work` on the slot of a stopped vCPU.
    fn with_stopped<R>(&self, work: impl FnOnce(&mut Slot) -> R) -> Result<R, KvmError> {
        let vcpu = self.index();
        let mut slot = self.shared.lock();
        match slot.phase {
            Phase::Gone => Err(KvmError::Gone { vcpu }),
            Phase::Parked(_) if slot.is_stopped() => Ok(work(&mut slot)),
            Phase::Parked(_) | Phase::Running(_) => Err(KvmError::NotStopped { vcpu }),
        }
    }

    fn with_vcpu<R>(&self, work: impl FnOnce(&mut Running) -> R) -> Result<R, KvmError> {
        self.with_stopped(|slot| match &mut slot.phase {
            Phase::Parked(running) => work(running),
            Phase::Running(_) | Phase::Gone => unreachable!("a stopped vcpu is parked"),
        })
    }

    /// Has the thread of a stopped vCPU save its state, for the next [`save`](Self::save).
    pub(super) fn begin_save(&self) {
        let mut slot = self.shared.lock();
        if matches!(slot.phase, Phase::Parked(_)) && slot.is_stopped() {
            slot.saved = None;
            slot.order = Order::Save;
            self.shared.tell();
        }
    }

    /// Whether its thread has saved a state that nobody has taken.
    #[cfg(test)]
    pub(super) fn has_saved(&self) -> bool {
        self.shared.lock().saved.is_some()
    }

    /// Saves the state of a stopped vCPU, or takes it where its thread has saved it. If it is inside an
    /// open call, the state shows that call as returned with what the machine chose, see
    /// [`CallOutcome`](super::CallOutcome).
    ///
    /// # Errors
    /// It is not stopped, or an ioctl failed.
    pub fn save(&self) -> Result<VcpuState, KvmError> {
        self.with_stopped(|slot| {
            if slot.order == Order::Save {
                slot.save();
            }
            match (slot.saved.take(), &slot.phase) {
                (Some(saved), _) => saved.map(|state| *state),
                (None, Phase::Parked(running)) => running.save(),
                (None, Phase::Running(_) | Phase::Gone) => unreachable!("a stopped vcpu is parked"),
            }
        })?
    }

    /// Sets the state of a stopped vCPU. It can be resumed then even if its run had ended; an open
    /// call is forgotten.
    ///
    /// # Errors
    /// It is not stopped, or the state was refused (see [`VcpuState::set`]): then it must be set
    /// again.
    pub fn set(&self, state: &VcpuState) -> Result<(), KvmError> {
        self.with_stopped(|slot| {
            let Phase::Parked(running) = &mut slot.phase else { unreachable!("a stopped vcpu is parked") };
            if running.open_call.is_some() {
                running.vcpu.note_awake();
            }
            running.vcpu.set(state)?;
            running.forget_exit();
            slot.saved = None;
            slot.ended = false;
            // An ended vCPU may still have the order to run; it waits for a new one.
            if slot.order == Order::Run {
                slot.order = Order::Stop;
            }
            Ok(())
        })?
    }

    /// The number of the call that a stopped vCPU is inside, if it is inside one that stays open.
    ///
    /// # Errors
    /// It is not stopped.
    pub fn open_call(&self) -> Result<Option<u32>, KvmError> {
        self.with_vcpu(|running| running.open_call.map(|open| open.number))
    }

    /// Chooses the result that states saved from now on show for the open call. The call itself
    /// stays open here and gets its own result after the resume.
    ///
    /// # Errors
    /// The vCPU is not stopped, or is in no open call.
    pub fn show_result(&self, rax: u64) -> Result<(), KvmError> {
        let vcpu = self.index();
        self.with_vcpu(|running| {
            let open = running.open_call.as_mut().ok_or(KvmError::NoOpenCall { vcpu })?;
            open.shown_rax = rax;
            Ok(())
        })?
    }

    /// What can wake a stopped vCPU.
    ///
    /// # Errors
    /// It is not stopped, or an ioctl failed.
    pub fn rest(&self) -> Result<Rest, KvmError> {
        self.with_vcpu(|running| Rest::of(&running.vcpu.fd))?
    }

    /// Describes a stopped vCPU, which has halted for good.
    ///
    /// # Errors
    /// It is not stopped.
    pub fn halted(&self, machine: &dyn Machine) -> Result<End, KvmError> {
        self.with_vcpu(|running| running.halted(machine))
    }

    /// To look at it from another thread.
    #[must_use]
    pub fn watch(&self) -> VcpuWatch {
        VcpuWatch(Arc::clone(&self.shared))
    }

    /// Whether the guest's run has ended on this vCPU.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.shared.lock().ended
    }

    /// When it was last stopped and resumed.
    #[must_use]
    pub fn times(&self) -> Times {
        self.shared.times.read()
    }

    /// How often it has left the guest, by kind.
    #[must_use]
    pub fn exits(&self) -> Exits {
        self.shared.exits.read()
    }

    /// The kernel's counters of a stopped vCPU, by name.
    ///
    /// # Errors
    /// It is not stopped, or the kernel has no such counters.
    pub fn stats(&self) -> Result<BTreeMap<String, u64>, KvmError> {
        self.with_vcpu(|running| stats(&running.vcpu.fd))?
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.order(Order::Quit);
        let Some(thread) = self.thread.take() else {
            return;
        };
        // The last handle can be dropped by the machine, on the vCPU's own thread.
        if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
            tracing::error!(vcpu = wide(self.index()), "a vcpu thread panicked");
        }
    }
}

/// Stops all vCPUs of a VM: requests all, then waits for all. For a moment they wait awake, where there are
/// processors for it, since most stops are short.
///
/// # Errors
/// As [`VcpuThread::wait_stopped`], of the first that fails; the others are stopping or stopped.
pub fn stop_all(vcpus: &[VcpuThread], timeout: Duration) -> Result<(), KvmError> {
    let is_spare = has_spare_processor(vcpus.len());
    for vcpu in vcpus {
        vcpu.order(if is_spare { Order::Rouse } else { Order::Stop });
    }
    let start = Instant::now();
    for vcpu in vcpus {
        let left = timeout.saturating_sub(start.elapsed());
        vcpu.wait_parked(Some(left), is_spare)?;
    }
    Ok(())
}

/// Has the threads of stopped vCPUs save their states while the caller does something else, where there are
/// processors for it. [`VcpuThread::save`] gives them.
pub fn begin_save(vcpus: &[VcpuThread]) {
    if has_spare_processor(vcpus.len()) {
        vcpus.iter().for_each(VcpuThread::begin_save);
    }
}

/// The stopped vCPUs of a VM are about to be resumed: they wait for it awake, for a moment, where there
/// are processors for it.
pub fn rouse_all(vcpus: &[VcpuThread]) {
    if has_spare_processor(vcpus.len()) {
        vcpus.iter().for_each(VcpuThread::rouse);
    }
}

/// Resumes all vCPUs of a VM.
///
/// # Errors
/// As [`VcpuThread::resume`], of the first that fails.
pub fn resume_all(vcpus: &[VcpuThread]) -> Result<(), KvmError> {
    vcpus.iter().try_for_each(VcpuThread::resume)
}
