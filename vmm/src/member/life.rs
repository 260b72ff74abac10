//! The life of a VM in its member: boot or become, cut, report, end.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use salp_protocol::call;

use super::MemberError;
use super::extents::ArenaExtents;
use super::machine::{Live, MemberMachine};
use super::messages::{
    CutReply, CutTimes, Description, Event, GuestKind, Order, PuppetOrder, Reply, Setup, Snapshot,
};
use super::ram::SpaceRam;
use super::services::Services;
use super::shell::{MemberFiles, Shell};
use super::start::{self, ImageFiles};
use super::thread_guest::ThreadGuest;
use crate::board::Board;
use crate::devices::InterruptLine;
use crate::devices::backing::{Backing, BackingState};
use crate::devices::bus::Bus;
use crate::devices::dma::{BackingKind, DmaEngine};
use crate::devices::exit::ExitPort;
use crate::devices::gate::{CompletionGate, HeldGate};
use crate::devices::serial::SerialPort;
use crate::family::VmId;
use crate::frames::CutId;
use crate::ipc::channel::DESCRIPTOR_LIMIT;
use crate::kvm::vcpu::monotonic_ns;
use crate::kvm::{Msi, VcpuThread, Vm, resume_all, stop_all};
use crate::space::{Access, Space, SpaceError};
use crate::window::{CutFiles, OnFailure, Resolvers, Window};

/// How long vCPUs may take to stop for a cut: one that waits for a page of its page tables comes
/// only when that page does.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// A member process.
pub struct Member {
    setup: Setup,
    board: Board,
    files: Arc<MemberFiles>,
    machine: Arc<MemberMachine>,
    gate: Arc<CompletionGate>,
    vm: Option<Arc<Vm>>,
    vcpus: Arc<Vec<VcpuThread>>,
    window: Option<Window>,
    life: Option<Life>,
    /// While quiesced.
    held: Option<HeldGate>,
    /// The cut just taken, whose end of the pause is to be reported.
    just_cut: Option<CutId>,
}

/// What a VM has besides what its vCPUs see.
struct Life {
    space: Arc<Space<Window>>,
    services: Services,
    thread_guest: Option<ThreadGuest>,
    backing: Arc<Backing>,
    extents: Arc<ArenaExtents>,
    has_ended: bool,
    // Last: joined after everything that may fault.
    _resolvers: Resolvers,
}

/// Interrupts by MSI, to vCPU 0.
struct MsiLine(Arc<Vm>);

impl InterruptLine for MsiLine {
    fn raise(&self, vector: u8) {
        if let Err(error) = self.0.raise_msi(Msi::fixed(0, vector)) {
            tracing::error!(%error, vector, "an interrupt is lost");
        }
    }
}

/// A thread guest polls.
struct NoLine;

impl InterruptLine for NoLine {
    fn raise(&self, _vector: u8) {}
}

/// Console output, to the machine.
struct ConsoleSink(Arc<MemberMachine>);

impl io::Write for ConsoleSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.print(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Answer = Result<(Reply, Vec<OwnedFd>), MemberError>;

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
            vcpus: Arc::new(shell.vcpus),
            window: Some(shell.window),
            life: None,
            held: None,
            just_cut: None,
        }
    }

    /// Does what the keeper asks.
    ///
    /// # Errors
    /// It could not be done; the VM goes on as before.
    pub fn obey(&mut self, order: Order, descriptors: Vec<OwnedFd>) -> Answer {
        match order {
            Order::Boot { vm, command_line, backing_bytes } => {
                self.boot(vm, (&command_line, None), backing_bytes, descriptors)
            }
            Order::BootImage { vm, command_line, has_initrd, backing_bytes } => {
                let files = ImageFiles::new(descriptors, has_initrd)?;
                self.boot(vm, (&command_line, Some(files)), backing_bytes, Vec::new())
            }
            Order::ConsoleInput(input) => {
                let live = self.machine.role().map_err(MemberError::Protocol)?;
                Ok((Reply::Accepted(live.bus.serial.enqueue(&input)), Vec::new()))
            }
            Order::Become { vm, cut, snapshot } => self.become_clone(vm, cut, &snapshot, descriptors),
            Order::Cut { cut, previous, asked_by } => self.cut(cut, previous, asked_by, descriptors),
            Order::ReleaseCut { cut } => self.release_cut(cut),
            Order::Publish { keep } => {
                self.life()?.services.publish(keep);
                done()
            }
            Order::Quiesce => self.quiesce(),
            Order::Resume => self.resume(),
            Order::Harvest => Ok((Reply::Harvest(Box::new(self.life()?.space.harvest()?)), Vec::new())),
            Order::Describe => Ok((Reply::Describe(Box::new(self.describe()?)), Vec::new())),
            Order::Puppet { vcpu, order } => self.put_order(vcpu, order),
            Order::Finish => {
                self.machine.mailboxes().iter().for_each(super::mailbox::Mailbox::finish);
                done()
            }
            Order::ForkResult { vcpu, clone } => {
                let no_vcpu = MemberError::Protocol("there is no such vcpu");
                self.machine.mailbox(vcpu).ok_or(no_vcpu)?.put_fork(clone);
                done()
            }
            Order::Pin { first, pages } => {
                self.life()?.space.pin(first, pages, Access::ReadWrite)?;
                done()
            }
            Order::Unpin { first, pages } => {
                self.life()?.space.unpin(first, pages)?;
                done()
            }
            Order::DeviceStore { gfn, value } => self.device_store(gfn, value),
            Order::DeviceLoad { gfn } => self.device_load(gfn),
            Order::Discard { first, pages } => {
                self.life()?.space.discard(first, pages)?;
                done()
            }
            Order::EndVm => self.end_vm(),
            Order::Exit => Err(MemberError::Protocol("the exit is not an order to the vm")),
        }
    }

    /// What comes after an answer has been sent: it need not wait for this.
    pub fn after(&mut self) {
        if let Some(cut) = self.just_cut.take() {
            self.report_reentry(cut);
            if self.setup.publication.in_background
                && let Ok(life) = self.life()
            {
                life.services.publish(self.setup.publication.keep);
            }
        }
        if let Some(life) = &self.life {
            life.services.reap();
        }
    }

    fn life(&self) -> Result<&Life, MemberError> {
        self.life.as_ref().ok_or(MemberError::Protocol("this member is no vm yet"))
    }

    fn window(&mut self) -> Result<Window, MemberError> {
        self.window.take().ok_or(MemberError::Protocol("this member is a vm already"))
    }

    fn boot(
        &mut self,
        vm: VmId,
        (command_line, files): (&str, Option<ImageFiles>),
        backing_bytes: u64,
        descriptors: Vec<OwnedFd>,
    ) -> Answer {
        let window = self.window()?;
        let base = descriptors.into_iter().next().map(std::fs::File::from);
        let extents = ArenaExtents::new(&self.files, []);
        let backing = Backing::new(base, backing_bytes, Arc::<ArenaExtents>::clone(&extents))?;
        let space = Space::new(window, self.board.clone(), self.setup.slot, self.setup.memory);
        let space = Arc::new(space);
        let bus = self.bus(&space, &backing, None)?;
        self.begin(vm, Arc::clone(&space), (backing, extents), bus, false)?;
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
        self.go()
    }

    fn become_clone(
        &mut self,
        vm: VmId,
        cut: CutId,
        snapshot: &Snapshot,
        descriptors: Vec<OwnedFd>,
    ) -> Answer {
        let window = self.window()?;
        window.become_clone(cut).map_err(MemberError::Window)?;
        let mut descriptors = descriptors;
        let Some(bases) = descriptors.len().checked_sub(snapshot.extents.len()) else {
            return Err(MemberError::Protocol("a snapshot comes with its extent files"));
        };
        let extents = snapshot.extents.iter().copied().zip(descriptors.split_off(bases));
        let extents = ArenaExtents::new(&self.files, extents);
        let base = descriptors.into_iter().next().map(std::fs::File::from);
        let no_backing = MemberError::Protocol("the snapshot has no backing");
        let state = snapshot.backing.as_ref().ok_or(no_backing)?;
        let backing = Backing::restore(state, base, Arc::<ArenaExtents>::clone(&extents))?;
        let space = Space::new_clone(window, self.board.clone(), self.setup.slot, self.setup.memory, cut);
        let space = Arc::new(space);
        let bus = self.bus(&space, &backing, Some(snapshot))?;
        // The fault readers run before vCPU state is set: setting some of it touches memory.
        self.begin(vm, space, (backing, extents), bus, true)?;
        if let (Some(kvm), Some(state)) = (&self.vm, &snapshot.vm) {
            kvm.set(state)?;
        }
        for (vcpu, state) in self.vcpus.iter().zip(&snapshot.vcpus) {
            vcpu.set(state)?;
        }
        let answer = self.go()?;
        // After the vCPUs: a registered buffer is pinned again, which waits for its pages.
        if let Some(dma) = &self.machine.role().map_err(MemberError::Protocol)?.bus.dma {
            dma.start().map_err(MemberError::Window)?;
        }
        Ok(answer)
    }

    fn bus(
        &self,
        space: &Arc<Space<Window>>,
        backing: &Arc<Backing>,
        snapshot: Option<&Snapshot>,
    ) -> Result<Bus, MemberError> {
        let ram = Arc::new(SpaceRam(Arc::clone(space)));
        let line: Arc<dyn InterruptLine> = match &self.vm {
            Some(vm) => Arc::new(MsiLine(Arc::clone(vm))),
            None => Arc::new(NoLine),
        };
        let storage = BackingKind::Storage(Arc::clone(backing));
        let gate = || Arc::clone(&self.gate);
        let interrupt = start::serial_interrupt(self.vm.as_ref());
        let sink = Box::new(ConsoleSink(Arc::clone(&self.machine)));
        let (dma, serial) = match snapshot {
            Some(snapshot) => (
                DmaEngine::restore(&snapshot.dma, ram, line, storage, gate()),
                SerialPort::restore(&snapshot.serial, sink, interrupt, gate())?,
            ),
            None => (DmaEngine::new(ram, line, storage, gate()), SerialPort::new(sink, interrupt, gate())),
        };
        Ok(Bus { serial, exit: ExitPort::new(), dma: Some(dma) })
    }

    /// Gives the machine its role, and starts the threads that serve its memory.
    fn begin(
        &mut self,
        vm: VmId,
        space: Arc<Space<Window>>,
        (backing, extents): (Arc<Backing>, Arc<ArenaExtents>),
        bus: Bus,
        is_clone: bool,
    ) -> Result<(), MemberError> {
        let machine = Arc::clone(&self.machine);
        let on_failure: OnFailure = Arc::new(move |error: SpaceError| {
            // After the end of a VM its faults stay open, and concern nobody.
            if !matches!(error, SpaceError::Stopping) {
                machine.tell(Event::Trouble(error.to_string()));
            }
        });
        // One more than can wait for another process at one time, and one for the devices.
        let resolvers = Resolvers::start(&space, usize::from(self.setup.vcpus) + 2, &on_failure)
            .map_err(MemberError::Window)?;
        let services = Services::start(
            &space,
            &self.machine,
            self.board.clone(),
            self.setup.slot,
            self.setup.publication.keep,
        )
        .map_err(MemberError::Window)?;
        if is_clone {
            self.machine.mailboxes().iter().for_each(super::mailbox::Mailbox::inherit_work);
        }
        let live = Live { vm, bus, space: Arc::clone(&space), is_fresh: AtomicBool::new(is_clone) };
        self.machine.live(live).map_err(MemberError::Protocol)?;
        self.life = Some(Life {
            space,
            services,
            thread_guest: None,
            backing,
            extents,
            has_ended: false,
            _resolvers: resolvers,
        });
        Ok(())
    }

    /// Lets the guest run.
    fn go(&mut self) -> Answer {
        if self.setup.guest == GuestKind::Thread {
            let guest = ThreadGuest::start(&self.machine).map_err(MemberError::Window)?;
            if let Some(life) = &mut self.life {
                life.thread_guest = Some(guest);
            }
        }
        let at = monotonic_ns();
        resume_all(&self.vcpus)?;
        Ok((Reply::Running { at }, Vec::new()))
    }

    fn cut(
        &mut self,
        cut: CutId,
        previous: Option<CutId>,
        asked_by: Option<usize>,
        descriptors: Vec<OwnedFd>,
    ) -> Answer {
        let no_files = |_| MemberError::Protocol("a cut comes with two files");
        let [blocks, patches] = <[OwnedFd; 2]>::try_from(descriptors).map_err(no_files)?;
        let life = self.life()?;
        if life.has_ended {
            return Err(MemberError::Protocol("this vm has ended"));
        }
        let space = Arc::clone(&life.space);
        let backing = Arc::clone(&life.backing);
        space.host().attach_cut(cut, CutFiles { blocks, patches });
        let result = self.take_cut(&space, &backing, cut, previous, asked_by);
        match result {
            Ok((reply, extents)) => {
                self.just_cut = Some(cut);
                Ok((Reply::Cut(Box::new(reply)), extents))
            }
            Err(error) => {
                space.host().detach_cut(cut);
                Err(error)
            }
        }
    }

    fn take_cut(
        &self,
        space: &Space<Window>,
        backing: &Backing,
        cut: CutId,
        previous: Option<CutId>,
        asked_by: Option<usize>,
    ) -> Result<(CutReply, Vec<OwnedFd>), MemberError> {
        let mut times = CutTimes { begun: monotonic_ns(), ..CutTimes::default() };
        let reserved = space.reserve_cut(cut)?;
        times.reserved = monotonic_ns();
        let stopped = stop_all(&self.vcpus, STOP_LIMIT);
        times.stopped = monotonic_ns();
        let held = self.gate.hold();
        times.held = monotonic_ns();
        let result = stopped.map_err(MemberError::from).and_then(|()| {
            let mut snapshot = self.save(&held, backing, asked_by)?;
            let extents = self.extents_of(&mut snapshot)?;
            times.saved = monotonic_ns();
            let figures = reserved.perform(previous)?;
            times.protected = monotonic_ns();
            Ok((snapshot, extents, figures))
        });
        // Also after a failure: the VM goes on.
        let resumed = if self.held.is_none() { resume_all(&self.vcpus) } else { Ok(()) };
        times.resumed = monotonic_ns();
        drop(held);
        let (snapshot, extents, figures) = result?;
        resumed?;
        Ok((CutReply { snapshot, figures, times }, extents))
    }

    /// Names the extent files that a snapshot needs, and returns them in that order.
    fn extents_of(&self, snapshot: &mut Snapshot) -> Result<Vec<OwnedFd>, MemberError> {
        let extents = &self.life()?.extents;
        snapshot.extents = snapshot.backing.iter().flat_map(BackingState::extent_files).collect();
        if snapshot.extents.len() >= DESCRIPTOR_LIMIT {
            return Err(MemberError::Protocol("the backing is in too many files of its ancestors"));
        }
        let files = snapshot.extents.iter().map(|id| extents.get(*id)).collect::<io::Result<_>>();
        files.map_err(MemberError::Window)
    }

    fn save(
        &self,
        held: &HeldGate,
        backing: &Backing,
        asked_by: Option<usize>,
    ) -> Result<Snapshot, MemberError> {
        let live = self.machine.role().map_err(MemberError::Protocol)?;
        for vcpu in self.vcpus.iter() {
            if vcpu.open_call()?.is_some() {
                let is_asked = asked_by == Some(vcpu.index());
                vcpu.show_result(if is_asked { 0 } else { call::AGAIN })?;
            }
        }
        let no_engine = MemberError::Protocol("this vm has no dma engine");
        let dma = live.bus.dma.as_ref().ok_or(no_engine)?;
        Ok(Snapshot {
            vcpus: self.vcpus.iter().map(VcpuThread::save).collect::<Result<_, _>>()?,
            vm: self.vm.as_ref().map(|vm| vm.save()).transpose()?,
            dma: dma.save(held),
            backing: Some(backing.freeze(held)),
            extents: Vec::new(),
            serial: live.bus.serial.save(held),
        })
    }

    /// Reports when the last vCPU entered the guest again. One that is inside a call of its own, or
    /// has ended, went on at the order to resume.
    fn report_reentry(&self, cut: CutId) {
        let limit = Instant::now() + REENTRY_LIMIT;
        let mut at = 0;
        for vcpu in self.vcpus.iter() {
            let entered = loop {
                let times = vcpu.times();
                if times.entered_ns != 0 {
                    break times.entered_ns;
                }
                if vcpu.has_ended() || Instant::now() > limit {
                    break times.resumed_ns;
                }
                std::thread::yield_now();
            };
            at = at.max(entered);
        }
        let harvest = self.life().and_then(|life| Ok(life.space.harvest()?));
        match harvest {
            Ok(report) => self.machine.tell(Event::Reentered { cut, at, pages: report.counts }),
            Err(error) => self.machine.tell(Event::Trouble(error.to_string())),
        }
    }

    fn release_cut(&self, cut: CutId) -> Answer {
        let life = self.life()?;
        life.space.release_cut(cut)?;
        life.space.host().detach_cut(cut);
        done()
    }

    fn quiesce(&mut self) -> Answer {
        stop_all(&self.vcpus, STOP_LIMIT)?;
        if self.held.is_none() {
            self.held = Some(self.gate.hold());
        }
        done()
    }

    fn resume(&mut self) -> Answer {
        if !self.life()?.has_ended {
            resume_all(&self.vcpus)?;
        }
        self.held = None;
        done()
    }

    fn put_order(&self, vcpu: usize, order: PuppetOrder) -> Answer {
        self.life()?;
        let no_vcpu = MemberError::Protocol("there is no such vcpu");
        self.machine.mailbox(vcpu).ok_or(no_vcpu)?.put_order(order);
        done()
    }

    fn device_word(&self, gfn: crate::words::Gfn) -> Result<[&std::sync::atomic::AtomicU32; 2], MemberError> {
        let space = &self.life()?.space;
        if !space.pinned_gfns().contains(&gfn) {
            return Err(SpaceError::NotPinned { gfn }.into());
        }
        let word = |offset: u64| space.host().word(crate::words::Gpa(gfn.gpa().0 + offset));
        match (word(0), word(4)) {
            (Some(low), Some(high)) => Ok([low, high]),
            _ => Err(SpaceError::NotMemory { gfn }.into()),
        }
    }

    fn device_store(&self, gfn: crate::words::Gfn, value: u64) -> Answer {
        for (word, half) in self.device_word(gfn)?.iter().zip([value, value >> 32]) {
            word.store((half & u64::from(u32::MAX)) as u32, Ordering::Release);
        }
        done()
    }

    fn device_load(&self, gfn: crate::words::Gfn) -> Answer {
        let [low, high] = self.device_word(gfn)?.map(|word| u64::from(word.load(Ordering::Acquire)));
        Ok((Reply::Loaded(high << 32 | low), Vec::new()))
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
        if let Some(dma) = &live.bus.dma {
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
        self.vcpus.iter().for_each(VcpuThread::request_stop);
        life.thread_guest = None;
        if let Some(dma) = &self.machine.role().map_err(MemberError::Protocol)?.bus.dma {
            dma.stop();
        }
        // After what had to be joined. The tables of this VM go when this is answered.
        life.space.stop();
        done()
    }
}

/// How long to look for the vCPUs' re-entry.
const REENTRY_LIMIT: Duration = Duration::from_millis(50);

/// `minflt` of this process, the tenth field of its `stat` (proc(5)); its name may have spaces, so the
/// fields are counted from the parenthesis that ends it.
fn minor_faults() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    after_name.split_whitespace().nth(7).and_then(|field| field.parse().ok()).unwrap_or(0)
}
