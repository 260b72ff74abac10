//! The life of a VM in its member: boot or become, cut, report, end.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use super::MemberError;
use super::extents::ArenaExtents;
use super::machine::{Live, MemberMachine};
use super::messages::{
    Description, Event, GuestKind, Order, PuppetOrder, Reply, ResetReply, ResetTimes, Setup, Snapshot,
};
use super::outside::Outside;
use super::ram::SpaceRam;
use super::services::Services;
use super::shell::{MemberFiles, ServedSpace, Shell};
use super::start::{self, ImageFiles};
use super::thread_guest::ThreadGuest;
use super::watch::Due;
use super::wiring::{self, ConsoleSink, MsiLine, NoLine};
use crate::board::Board;
use crate::devices::InterruptLine;
use crate::devices::backing::Backing;
use crate::devices::bus::Bus;
use crate::devices::dma::{BackingKind, DmaEngine};
use crate::devices::exit::ExitPort;
use crate::devices::gate::{CompletionGate, HeldGate};
use crate::devices::identity::{Identity, IdentityDevice, IdentityState};
use crate::devices::serial::SerialPort;
use crate::family::VmId;
use crate::frames::CutId;
use crate::ipc::heap;
use crate::kvm::vcpu::monotonic_ns;
use crate::kvm::{Doing, KvmError, Machine as _, Rest, VcpuThread, Vm, close, rouse_all, stop_all};
use crate::space::{Keep, Space};
use crate::window::{Resolvers, Window};

/// How long vCPUs may take to stop for a cut: one that waits for a page of its page tables comes
/// only when that page does.
pub(super) const STOP_LIMIT: Duration = Duration::from_secs(10);

/// How long they may take to be looked at: whoever waits for a page has not halted.
const LOOK_LIMIT: Duration = Duration::from_millis(200);

/// A member process.
pub struct Member {
    pub(super) setup: Setup,
    board: Board,
    files: Arc<MemberFiles>,
    pub(super) machine: Arc<MemberMachine>,
    pub(super) gate: Arc<CompletionGate>,
    pub(super) vm: Option<Arc<Vm>>,
    pub(super) vcpus: Vec<VcpuThread>,
    /// Until it has a role.
    memory: Option<ServedSpace>,
    life: Option<Life>,
    /// While quiesced.
    pub(super) held: Option<HeldGate>,
    /// Who it is, once it has a role.
    pub(super) identity: Identity,
    /// How often its line was cloned and it was reset.
    pub(super) generation: u64,
    /// How many cuts of it there were.
    pub(super) cuts: u64,
    /// The cut just taken, whose end of the pause is to be reported.
    pub(super) just_cut: Option<CutId>,
    /// What the VM began with, if it is a clone.
    pub(super) origin: Option<Arc<Snapshot>>,
    /// Its tables say what they did then: it has not been cut since.
    pub(super) is_at_origin: bool,
    /// It is stopped for a reset that is not done.
    pub(super) prepared: Option<ResetTimes>,
    /// The reset just done, whose end is to be reported.
    pub(super) just_reset: Option<ResetReply>,
    /// The devices outside, and their pins by order.
    pub(super) outside: Outside,
    /// The guest has halted for good, and that was told.
    pub(super) has_halted: bool,
    /// What the watch looks after.
    pub(super) due: Due,
}

/// What a VM has besides what its vCPUs see.
pub(super) struct Life {
    pub(super) space: Arc<Space<Window>>,
    pub(super) services: Services,
    pub(super) thread_guest: Option<ThreadGuest>,
    pub(super) backing: Arc<Backing>,
    pub(super) extents: Arc<ArenaExtents>,
    pub(super) has_ended: bool,
    // Last: joined after everything that may fault.
    resolvers: Resolvers,
}

pub(super) type Answer = Result<(Reply, Vec<OwnedFd>), MemberError>;

fn done() -> Answer {
    Ok((Reply::Done, Vec::new()))
}

impl Member {
    /// A member that waits for its role.
    #[must_use]
    pub fn new(shell: Shell) -> Self {
        Self {
            setup: shell.setup,
            board: shell.board,
            files: shell.files,
            machine: shell.machine,
            gate: CompletionGate::new(),
            vm: shell.vm,
            vcpus: shell.vcpus,
            memory: Some(shell.memory),
            life: None,
            held: None,
            identity: Identity::default(),
            generation: 0,
            cuts: 0,
            just_cut: None,
            origin: None,
            is_at_origin: false,
            prepared: None,
            just_reset: None,
            outside: Outside::default(),
            has_halted: false,
            due: Due::default(),
        }
    }

    /// Does what the keeper asks.
    ///
    /// # Errors
    /// It could not be done; the VM goes on as before.
    pub fn obey(&mut self, order: Order, descriptors: Vec<OwnedFd>) -> Answer {
        match order {
            Order::Boot { vm, identity, command_line, backing_bytes } => {
                self.boot((vm, identity), (&command_line, None), backing_bytes, descriptors)
            }
            Order::BootImage { vm, identity, command_line, has_initrd, backing_bytes } => {
                let files = ImageFiles::new(descriptors, has_initrd)?;
                self.boot((vm, identity), (&command_line, Some(files)), backing_bytes, Vec::new())
            }
            Order::ConsoleInput(input) => {
                let live = self.machine.role().map_err(MemberError::Protocol)?;
                Ok((Reply::Accepted(live.bus().serial.enqueue(&input)), Vec::new()))
            }
            Order::Become { vm, identity, is_paused, cut, snapshot } => {
                self.become_clone((vm, identity), is_paused, cut, (snapshot.decode()?, descriptors))
            }
            Order::Cut { cut, previous, asked_by } => self.cut(cut, previous, asked_by, descriptors),
            Order::ReleaseCut { cut } => self.release_cut(cut),
            Order::Publish { keep } => {
                self.life()?.services.publish(keep).map_err(MemberError::Window)?;
                done()
            }
            Order::ResolveKnown => {
                self.life()?.services.resolve_known().map_err(MemberError::Window)?;
                done()
            }
            Order::Quiesce => self.quiesce(),
            Order::Resume => self.resume(),
            Order::PrepareReset => self.prepare_reset(monotonic_ns()).and(done()),
            Order::Reset => self.reset(),
            Order::RefuseReset { vcpu } => {
                self.machine.mailbox(vcpu).ok_or(NO_VCPU)?.refuse_reset();
                done()
            }
            Order::Look => self.look(),
            Order::Harvest => Ok((Reply::Harvest(Box::new(self.life()?.space.harvest()?)), Vec::new())),
            Order::Describe => Ok((Reply::Describe(Box::new(self.describe()?)), Vec::new())),
            Order::Puppet { vcpu, order } => self.put_order(vcpu, order),
            Order::Finish => {
                self.machine.mailboxes().iter().for_each(super::mailbox::Mailbox::finish);
                done()
            }
            Order::ForkResult { vcpu, clone } => {
                self.machine.mailbox(vcpu).ok_or(NO_VCPU)?.put_fork(clone);
                done()
            }
            Order::Pin { first, pages, holder } => self.pin(first, pages, holder).and(done()),
            Order::Unpin { first, pages } => self.unpin(first, pages).and(done()),
            Order::DeviceBegin { gfn } => self.device_begin(gfn).and(done()),
            Order::DeviceStore { gfn, value } => self.device_store(gfn, value).and(done()),
            Order::DeviceLoad { gfn } => self.device_load(gfn).map(|word| (Reply::Loaded(word), Vec::new())),
            Order::HandOver { gfn } => self.hand_over(gfn, &descriptors).and(done()),
            Order::Discard { first, pages } => {
                self.life()?.space.discard(first, pages)?;
                done()
            }
            Order::EndVm => self.end_vm(),
            #[cfg(debug_assertions)]
            Order::BreakOut => super::confine::break_out().and(done()),
            Order::Exit => Err(MemberError::Protocol("the exit is not an order to the vm")),
            #[cfg(debug_assertions)]
            Order::Failures(watching) => Ok((Reply::Failures(watching.obey()), Vec::new())),
        }
    }

    /// What comes after an answer has been sent: it need not wait for this.
    pub fn after(&mut self) {
        if let Some(cut) = self.just_cut.take() {
            self.report_reentry(cut);
            if self.setup.publication.in_background
                && let Ok(life) = self.life()
                && let Err(error) = life.services.publish(self.keep())
            {
                // What somebody needs is published all the same.
                self.machine.tell(Event::Trouble(format!("nothing is published ahead: {error}")));
            }
        }
        if let Some(mut reset) = self.just_reset.take() {
            reset.times.entered = self.await_reentry();
            self.machine.tell(Event::WasReset(reset));
        }
        if let Some(life) = &self.life {
            life.services.reap();
        }
    }

    /// Threads of the VM have ended: it has become quieter, and gives back what only they needed. One that
    /// has been forked will need as much again.
    pub(super) fn join_ended_threads(&mut self) {
        if let Some(life) = &mut self.life {
            life.services.join_ended();
            life.resolvers.join_ended();
        }
        if self.cuts == 0 {
            heap::give_back();
        }
    }

    /// What the VM does with its own copies of what is published.
    fn keep(&self) -> Keep {
        let publication = &self.setup.publication;
        if self.cuts > 1 { publication.keep_later } else { publication.keep }
    }

    pub(super) fn life(&self) -> Result<&Life, MemberError> {
        self.life.as_ref().ok_or(MemberError::Protocol("this member is no vm yet"))
    }

    pub(super) fn life_mut(&mut self) -> Result<&mut Life, MemberError> {
        self.life.as_mut().ok_or(MemberError::Protocol("this member is no vm yet"))
    }

    fn memory(&mut self) -> Result<ServedSpace, MemberError> {
        self.memory.take().ok_or(MemberError::Protocol("this member is a vm already"))
    }

    fn boot(
        &mut self,
        (vm, identity): (VmId, Identity),
        (command_line, files): (&str, Option<ImageFiles>),
        backing_bytes: u64,
        descriptors: Vec<OwnedFd>,
    ) -> Answer {
        self.identity = identity;
        let memory = self.memory()?;
        let space = Arc::clone(&memory.space);
        space.host().become_root().map_err(MemberError::Window)?;
        space.begin_as_root();
        let base = descriptors.into_iter().next().map(std::fs::File::from);
        let extents = ArenaExtents::new(&self.files, []);
        let backing = Backing::new(base, backing_bytes, Arc::<ArenaExtents>::clone(&extents))?;
        let bus = self.bus(&space, &backing, None)?;
        self.begin(vm, memory, (backing, extents), bus, false)?;
        match files {
            Some(files) => {
                start::enter_image(&self.vcpus, &files.load(&space, self.setup.vcpus, command_line)?)?
            }
            None if self.setup.guest == GuestKind::Thread => {}
            None => start::enter_builtin(
                &self.vcpus,
                &start::load_builtin_guest(&space, self.setup.vcpus, command_line)?,
            )?,
        }
        let at = self.go()?;
        Ok((Reply::Running { at, window_ns: 0 }, Vec::new()))
    }

    fn become_clone(
        &mut self,
        (vm, identity): (VmId, Identity),
        is_paused: bool,
        cut: CutId,
        (snapshot, mut descriptors): (Snapshot, Vec<OwnedFd>),
    ) -> Answer {
        let memory = self.memory()?;
        self.identity = identity;
        self.generation = snapshot.identity.generation + 1;
        let begun = monotonic_ns();
        memory.space.host().become_clone(cut).map_err(MemberError::Window)?;
        memory.space.begin_as_clone(cut);
        let window_ns = monotonic_ns() - begun;
        let Some(bases) = descriptors.len().checked_sub(snapshot.extents.len()) else {
            return Err(MemberError::Protocol("a snapshot comes with its extent files"));
        };
        let extents = snapshot.extents.iter().copied().zip(descriptors.split_off(bases));
        let extents = ArenaExtents::new(&self.files, extents);
        let base = descriptors.into_iter().next().map(std::fs::File::from);
        let no_backing = MemberError::Protocol("the snapshot has no backing");
        let state = snapshot.backing.as_ref().ok_or(no_backing)?;
        let backing = Backing::restore(state, base, Arc::<ArenaExtents>::clone(&extents))?;
        let bus = self.bus(&memory.space, &backing, Some(&snapshot))?;
        // The fault readers run before vCPU state is set: setting some of it touches memory.
        self.begin(vm, memory, (backing, extents), bus, true)?;
        if let (Some(kvm), Some(state)) = (&self.vm, &snapshot.vm) {
            kvm.set(state)?;
        }
        self.set_vcpus(&snapshot)?;
        let at = if is_paused {
            self.held = Some(self.gate.hold());
            monotonic_ns()
        } else {
            self.go()?
        };
        self.begin_as_clone(&snapshot)?;
        self.origin = Some(Arc::new(snapshot));
        self.is_at_origin = true;
        Ok((Reply::Running { at, window_ns }, Vec::new()))
    }

    /// Makes the vCPUs, which are stopped and about to be resumed, what they were at a cut: after the VM.
    pub(super) fn set_vcpus(&self, snapshot: &Snapshot) -> Result<(), MemberError> {
        rouse_all(&self.vcpus);
        for (vcpu, state) in self.vcpus.iter().zip(&snapshot.vcpus) {
            vcpu.set(state)?;
        }
        // After the interrupt controllers have their state, before a vCPU runs.
        self.machine.role().map_err(MemberError::Protocol)?.bus().identity.announce();
        Ok(())
    }

    /// What comes once a clone runs, or runs again.
    pub(super) fn begin_as_clone(&self, snapshot: &Snapshot) -> Result<(), MemberError> {
        if let (GuestKind::Thread, Some(vcpu)) = (self.setup.guest, snapshot.asked_by) {
            self.machine.tell(Event::Puppet { vcpu, result: 0 });
        }
        // After the vCPUs: a registered buffer is pinned again, which waits for its pages.
        if let Some(dma) = &self.machine.role().map_err(MemberError::Protocol)?.bus().dma {
            dma.start().map_err(MemberError::Window)?;
        }
        Ok(())
    }

    pub(super) fn bus(
        &self,
        space: &Arc<Space<Window>>,
        backing: &Arc<Backing>,
        snapshot: Option<&Snapshot>,
    ) -> Result<Bus, MemberError> {
        let ram = Arc::new(SpaceRam(Arc::clone(space)));
        let line: Arc<dyn InterruptLine> = match &self.vm {
            Some(vm) => Arc::new(MsiLine(Arc::downgrade(vm))),
            None => Arc::new(NoLine),
        };
        let storage = BackingKind::Storage(Arc::clone(backing));
        let gate = || Arc::clone(&self.gate);
        let interrupt = start::serial_interrupt(self.vm.as_ref());
        let set = snapshot.map_or(0, |snapshot| snapshot.identity.interrupt);
        let identity = IdentityDevice::new(
            &self.identity,
            IdentityState { generation: self.generation, interrupt: set },
            start::identity_interrupt(self.vm.as_ref(), &line),
            wiring::ready_bell(&self.machine),
        )?;
        let sink = Box::new(ConsoleSink(Arc::clone(&self.machine)));
        let (dma, serial) = match snapshot {
            Some(snapshot) => (
                DmaEngine::restore(&snapshot.dma, ram, line, storage, gate()),
                SerialPort::restore(&snapshot.serial, sink, interrupt, gate())?,
            ),
            None => (DmaEngine::new(ram, line, storage, gate()), SerialPort::new(sink, interrupt, gate())),
        };
        dma.watch_buffers(wiring::buffer_bell(&self.board, self.files.slot, &self.machine));
        Ok(Bus { serial, exit: ExitPort::new(), dma: Some(dma), identity })
    }

    /// Gives the machine its role.
    fn begin(
        &mut self,
        vm: VmId,
        memory: ServedSpace,
        (backing, extents): (Arc<Backing>, Arc<ArenaExtents>),
        bus: Bus,
        is_clone: bool,
    ) -> Result<(), MemberError> {
        if is_clone {
            self.machine.mailboxes().iter().for_each(super::mailbox::Mailbox::begin_again);
        }
        let live = Live {
            vm,
            bus: RwLock::new(bus),
            space: Arc::clone(&memory.space),
            is_fresh: AtomicBool::new(is_clone),
        };
        self.machine.live(live).map_err(MemberError::Protocol)?;
        self.life = Some(Life {
            space: memory.space,
            services: memory.services,
            thread_guest: None,
            backing,
            extents,
            has_ended: false,
            resolvers: memory.resolvers,
        });
        Ok(())
    }

    /// Lets the guest run. Returns when that was ordered, in nanoseconds of `CLOCK_MONOTONIC`.
    pub(super) fn go(&mut self) -> Result<u64, MemberError> {
        self.start_thread_guest()?;
        let at = monotonic_ns();
        self.resume_vcpus()?;
        Ok(at)
    }

    /// Starts the thread that is the guest, if it is one and has not begun.
    fn start_thread_guest(&mut self) -> Result<(), MemberError> {
        let is_due = self.life()?.thread_guest.is_none() && self.setup.guest == GuestKind::Thread;
        if is_due {
            let guest = ThreadGuest::start(&self.machine).map_err(MemberError::Window)?;
            if let Some(life) = &mut self.life {
                life.thread_guest = Some(guest);
            }
        }
        Ok(())
    }

    fn release_cut(&self, cut: CutId) -> Answer {
        let life = self.life()?;
        life.space.release_cut(cut);
        life.space.host().detach_cut(cut);
        done()
    }

    fn quiesce(&mut self) -> Answer {
        if let Err(error) = stop_all(&self.vcpus, STOP_LIMIT) {
            if self.held.is_none() {
                self.resume_vcpus()?;
            }
            return Err(error.into());
        }
        if self.held.is_none() {
            self.held = Some(self.gate.hold());
        }
        done()
    }

    fn resume(&mut self) -> Answer {
        if self.prepared.is_some() {
            return Err(RESET_OPEN);
        }
        if !self.life()?.has_ended {
            self.go()?;
        }
        self.held = None;
        done()
    }

    /// Lets the vCPUs go on, those too that have not stopped yet.
    fn go_on(&self) -> Result<(), KvmError> {
        self.vcpus.iter().try_for_each(|vcpu| match vcpu.resume() {
            Err(KvmError::NotStopped { .. }) => vcpu.take_back_stop(),
            resumed => resumed,
        })
    }

    /// As [`go_on`](Self::go_on); the watch may have seen them stand still.
    pub(super) fn resume_vcpus(&self) -> Result<(), KvmError> {
        let resumed = self.go_on();
        self.machine.watch().guest_acts();
        resumed
    }

    /// Looks whether the guest has halted for good. One that does anything is not disturbed.
    fn look(&mut self) -> Answer {
        let sleeps = |vcpu: &VcpuThread| vcpu.watch().doing() == Doing::Sleeps;
        if self.life()?.has_ended || self.has_halted || self.held.is_some() || self.vcpus.is_empty() {
            return done();
        }
        if !self.vcpus.iter().all(sleeps) {
            self.machine.watch().guest_acts();
            return done();
        }
        let rests = stop_all(&self.vcpus, LOOK_LIMIT)
            .and_then(|()| self.vcpus.iter().map(VcpuThread::rest).collect::<Result<Vec<_>, _>>());
        if let Ok(rests) = &rests
            && Rest::is_for_good(rests)
            && let Some(at) = rests.iter().position(|&rest| rest == Rest::Halted)
        {
            self.has_halted = true;
            self.machine.ended(at, self.vcpus[at].halted(self.machine.as_ref())?);
        }
        // Also one that has halted: it may be cut, as any other.
        self.go_on()?;
        // It slept for another reason, waiting for a page perhaps: it is to be looked at again.
        match rests {
            Ok(rests) if !rests.contains(&Rest::Awake) => {}
            Ok(_) | Err(KvmError::StopTimeout { .. }) => self.machine.watch().guest_acts(),
            Err(error) => return Err(error.into()),
        }
        done()
    }

    fn put_order(&self, vcpu: usize, order: PuppetOrder) -> Answer {
        self.life()?;
        self.machine.mailbox(vcpu).ok_or(NO_VCPU)?.put_order(order);
        done()
    }

    fn describe(&self) -> Result<Description, MemberError> {
        let life = self.life()?;
        let live = self.machine.role().map_err(MemberError::Protocol)?;
        let counters = life.space.counters();
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let mut description = Description {
            window: life.space.host().host_address(crate::words::Gpa(0)).get(),
            leaves_resolved: read(&counters.leaves_resolved),
            store_faults: read(&counters.store_faults),
            blocks_published: read(&counters.blocks_published),
            patches_published: read(&counters.patches_published),
            leaves_reused: read(&counters.leaves_reused),
            leaves_dropped: read(&counters.leaves_dropped),
            minor_faults: minor_faults(),
            vcpus: self.vcpus.iter().map(VcpuThread::times).collect(),
            // Only a stopped vCPU tells.
            kvm: self.vcpus.first().and_then(|vcpu| vcpu.stats().ok()).unwrap_or_default(),
            ..Description::default()
        };
        if let Some(dma) = &live.bus().dma {
            description.count_dma(dma.counters(), dma.in_flight());
        }
        Ok(description)
    }

    /// Stops the guest and its devices. The window stays, and with it what others need.
    fn end_vm(&mut self) -> Answer {
        let Some(life) = &mut self.life else {
            return Err(MemberError::Protocol("this member is no vm yet"));
        };
        life.has_ended = true;
        self.held = None;
        life.thread_guest = None;
        let vcpus = std::mem::take(&mut self.vcpus);
        vcpus.iter().for_each(VcpuThread::request_stop);
        if let Some(dma) = &self.machine.role().map_err(MemberError::Protocol)?.bus().dma {
            dma.stop();
        }
        if let Some(vm) = self.vm.take() {
            let space = Arc::clone(&life.space);
            // In the background: what it takes, up to 20 ms, nobody need wait for.
            let closing = close(vcpus, vm, move || {
                if let Err(error) = space.free_waiters() {
                    tracing::warn!(%error, "a vcpu may wait for a page for ever");
                }
            });
            if let Err(error) = closing {
                // Then it was closed here, while faults are still resolved. The VM has ended all the same.
                tracing::warn!(%error, "a vm is not closed in the background");
            }
        }
        // After what had to be joined. The tables of this VM go when this is answered.
        life.space.stop();
        done()
    }
}

pub(super) const RESET_OPEN: MemberError =
    MemberError::Protocol("a reset of this vm is not finished: reset it again, or end it");
const NO_VCPU: MemberError = MemberError::Protocol("there is no such vcpu");
/// `minflt` of this process, the tenth field of its `stat` (proc(5)); its name may have spaces, so the
/// fields are counted from the parenthesis that ends it.
fn minor_faults() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    after_name.split_whitespace().nth(7).and_then(|field| field.parse().ok()).unwrap_or(0)
}
