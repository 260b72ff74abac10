//! A colony in its keeper's process, and its end of the control socket.
//!
//! [`Keeper::start`] takes a name, listens, boots; [`Keeper::run`] does what follows from events until
//! the last VM has ended or a signal comes, and leaves nothing behind.

use std::cell::OnceCell;
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::config::VmConfig;
use super::console::Console;
use super::events::{EventVm, What};
use super::metrics::Counts;
use super::place::{Locked, Place};
use super::registry::{Entry, Happening, Registry};
use super::server::Server;
use super::terminal::{self, Source, deliver};
use super::{ControlError, VmState, lock};
use crate::family::VmId;
use crate::keeper::fork::{Cloned, ForkTimes, Forked};
use crate::keeper::limits::Limits;
use crate::keeper::observe::Observer;
use crate::keeper::{Colony, ColonyConfig, ColonyError};
use crate::kvm::Irqchip;
use crate::member::confine::Confinement;
use crate::words::MemoryShape;

/// What a colony's first VM is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Settings {
    /// Its name, if it was given one.
    pub name: Option<String>,
    /// Memory of each VM of the colony.
    pub memory_bytes: u64,
    /// vCPUs of each VM of the colony.
    pub cpus: u8,
    /// What the guest is told.
    pub command_line: String,
    /// A kernel image; none is the built-in guest.
    pub kernel: Option<PathBuf>,
    /// The kernel's initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// How much there may be of all VMs of the colony.
    #[serde(default)]
    pub limits: Limits,
    /// The file that the DMA engine's backing begins with.
    pub dma_backing: Option<PathBuf>,
    /// What members may ask of the host.
    #[serde(default)]
    pub seccomp: Confinement,
    /// Nobody sees the keeper's standard error: it is a file beside the socket.
    pub is_background: bool,
    /// Where names and the socket are; none is the user's directory.
    #[serde(skip)]
    pub place: Option<Place>,
    /// The salp binary that members run; none is this one.
    #[serde(skip)]
    pub program: Option<PathBuf>,
}

/// How a colony ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
    /// The first VM.
    pub root: VmState,
    /// The end of its console output, if nothing else was ever in the colony.
    pub last_output: Option<String>,
}

/// Members beyond the VMs that a colony may have: its pool, and VMs that have just ended.
const SPARE_MEMBERS: u32 = 16;
/// How long a VM's end may take.
const END_LIMIT: Duration = Duration::from_secs(20);
/// How long whoever reads standard output may take to read the rest.
const OUTPUT_LIMIT: Duration = Duration::from_secs(2);

/// How many clones that have ended are kept for a reset; then the one that ended first is let go.
pub const KEPT_LIMIT: usize = 64;

/// How much of its last output a colony leaves.
const LAST_OUTPUT_BYTES: u64 = 2048;

/// What belongs to a colony in the directory of names; dropping it removes all that.
struct Presence {
    place: Place,
    socket: String,
}

impl Drop for Presence {
    fn drop(&mut self) {
        let left = self.place.lock().and_then(|locked| {
            locked.remove_colony(&self.socket)?;
            locked.leave();
            Ok(())
        });
        if let Err(error) = left {
            tracing::error!(%error, "names and a socket stay");
        }
    }
}

/// What all threads of a keeper share.
pub(super) struct Service {
    pub(super) registry: Arc<Registry>,
    pub(super) counts: Counts,
    /// None: it is ending.
    pub(super) colony: RwLock<Option<Colony>>,
    pub(super) place: Place,
    pub(super) socket: String,
    /// What the first VM is; much of it holds for all.
    pub(super) settings: Settings,
    /// Forks and resets on their way.
    pub(super) under_way: Mutex<usize>,
    /// Held while a VM is booted: it is not known before, and may fork itself at once.
    pub(super) booting: Mutex<()>,
    /// Clones whose guests have ended and that can be reset, the longest ended first.
    pub(super) kept: Mutex<VecDeque<VmId>>,
}

/// A running colony.
pub struct Keeper {
    service: Arc<Service>,
    root: VmId,
    happenings: Receiver<Happening>,
    /// Says when standard output has got everything.
    shown: OnceCell<Receiver<()>>,
    presence: Presence,
    server: Server,
    _signals: SignalWatch,
}

impl Keeper {
    /// Starts a colony with its first VM. From here on SIGINT, SIGTERM, SIGHUP and SIGQUIT end it in order.
    ///
    /// # Errors
    /// The name is taken, or the host refused something. Nothing is left behind.
    pub fn start(settings: Settings) -> Result<Self, ControlError> {
        let (sender, happenings) = channel();
        let place = settings.place.clone().unwrap_or_else(Place::of_user);
        let socket = Place::socket_name(std::process::id());
        let registry = Arc::new(Registry::new(sender, place.clone(), socket.clone()));
        let signals = SignalWatch::start(&registry)?;
        let locked = place.lock()?;
        let prepared = locked.listen(&socket).and_then(|listener| {
            claim_root(&locked, settings.name.clone(), &socket).map(|name| (listener, name))
        });
        drop(locked);
        // From here on whatever fails takes it away again; that needs the lock.
        let presence = Presence { place: place.clone(), socket: socket.clone() };
        let (listener, name) = prepared?;
        if settings.is_background {
            let log = create_log(&place)?;
            rustix::stdio::dup2_stderr(&log).map_err(std::io::Error::from)?;
        }
        let console = Arc::new(create_console(&place, &name)?);
        let colony = Colony::new(config(&settings)?)?;
        let observer: Weak<Registry> = Arc::downgrade(&registry);
        colony.observe(observer as Weak<dyn Observer>);
        let root = boot(&colony, &name, &settings)?;
        // A guest that has ended already has no member any more only if its process was killed.
        let pid = colony.member(root).map_or(0, |member| member.process());
        registry.add(Entry {
            name,
            vm: root,
            parent: None,
            parent_id: None,
            pid,
            state: VmState::Running,
            console,
        });
        let service = Arc::new(Service {
            registry,
            counts: Counts::default(),
            colony: RwLock::new(Some(colony)),
            place,
            socket,
            settings,
            under_way: Mutex::new(0),
            booting: Mutex::default(),
            kept: Mutex::default(),
        });
        let server = Server::start(Arc::clone(&service), listener)?;
        let shown = OnceCell::new();
        Ok(Self { service, root, happenings, shown, presence, server, _signals: signals })
    }

    /// The first VM.
    ///
    /// # Errors
    /// None: it is known from the start on.
    pub fn root(&self) -> Result<Entry, ControlError> {
        self.service.registry.first(self.root).ok_or(ControlError::Ending)
    }

    /// Copies the first VM's console to standard output, in a thread of its own.
    ///
    /// # Errors
    /// The host has no room for a thread.
    pub fn show_console(&self) -> Result<(), ControlError> {
        let follower = self.root()?.console.follow();
        let (done, shown) = channel();
        std::thread::Builder::new().name("terminal".to_owned()).spawn(move || {
            // Whoever reads it may go: the VM does not.
            if let Err(error) = follower.copy_to(&mut std::io::stdout()) {
                tracing::debug!(%error, "the console is not shown any more");
            }
            drop(done);
        })?;
        if self.shown.set(shown).is_err() {
            tracing::error!("the console is shown twice");
        }
        Ok(())
    }

    /// Gives the first VM what comes from standard input, which is no terminal, in a thread of its own.
    ///
    /// # Errors
    /// The host has no room for a thread.
    pub fn feed_console(&self) -> Result<(), ControlError> {
        let (service, name) = (Arc::clone(&self.service), self.root()?.name);
        let run = move || {
            let over = terminal::pump(Source::Plain, |typed| {
                let delivered = deliver(Source::Plain, typed, |rest| service.input(&name, rest));
                delivered.inspect_err(|error| tracing::debug!(%error, "console input ends")).is_ok()
            });
            if let Err(error) = over {
                tracing::warn!(%error, "standard input cannot be read");
            }
        };
        std::thread::Builder::new().name("input".to_owned()).spawn(run)?;
        Ok(())
    }

    /// Ends the colony, from any thread, as the signal does that it is given.
    pub fn ender(&self) -> impl Fn(i32) + Send + use<> {
        let registry = Arc::clone(&self.service.registry);
        move |signal| registry.tell(Happening::Signal(signal))
    }

    /// A new file for what this process has to say when no terminal shows it. It goes with the colony.
    ///
    /// # Errors
    /// The host refused.
    pub fn log(&self) -> Result<File, ControlError> {
        create_log(&self.service.place)
    }

    /// Keeps the colony until its last VM has ended, or a signal comes. `on_root_end` is told when the
    /// first VM has ended and others go on.
    ///
    /// # Errors
    /// The colony could not be ended in order.
    pub fn run(self, on_root_end: impl Fn(&Entry)) -> Result<Outcome, ControlError> {
        let mut signal = None;
        while let Ok(happening) = self.happenings.recv() {
            let mut ended = None;
            match happening {
                Happening::Signal(number) => {
                    signal = Some(number);
                    break;
                }
                Happening::Forked(forked) => self.service.name_clones(&forked),
                Happening::Ended(vm) => {
                    vm.into_iter().for_each(|vm| self.service.keep_or_let_go(vm));
                    ended = vm;
                }
            }
            if self.service.is_empty() {
                break;
            }
            if ended == Some(self.root) {
                self.service.registry.of(self.root).iter().for_each(&on_root_end);
            }
        }
        self.finish(signal)
    }

    fn finish(self, signal: Option<i32>) -> Result<Outcome, ControlError> {
        let colony = self.service.colony.write().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(colony) = colony {
            for vm in colony.vms() {
                self.service.registry.end(vm, VmState::Stopped);
                if let Err(error) = colony.end(vm) {
                    tracing::debug!(%error, "a vm was gone before it could be ended");
                }
            }
            if let Err(error) = colony.wait_until_gone(END_LIMIT) {
                tracing::warn!(%error, "a process is killed");
            }
        }
        let root = self.root()?;
        let is_alone = self.service.registry.all().len() == 1;
        let last_output = is_alone.then(|| root.console.tail(LAST_OUTPUT_BYTES)).transpose()?;
        // It says nothing: its end is what counts.
        if let Some(Err(RecvTimeoutError::Timeout)) =
            self.shown.get().map(|shown| shown.recv_timeout(OUTPUT_LIMIT))
        {
            tracing::debug!("nobody reads standard output");
        }
        self.service.registry.events().close();
        // Whoever waits for the end is told by the end of the connection: the names are gone by then.
        drop(self.presence);
        self.server.end();
        Ok(Outcome { signal, root: root.state, last_output })
    }
}

impl Service {
    /// A clone whose guest has ended stands still from now on, for a reset. Any other VM is let go: its
    /// process ends when nobody needs its pages.
    fn keep_or_let_go(&self, vm: VmId) {
        let colony = self.colony.read().unwrap_or_else(PoisonError::into_inner);
        let Some(colony) = &*colony else { return };
        let mut kept = lock(&self.kept);
        // Otherwise it has been reset meanwhile.
        if !self.registry.has_ended(vm) {
            return;
        }
        if colony.parent(vm).is_none() {
            return let_go(colony, vm);
        }
        // Its other vCPUs may run still.
        if let Err(error) = colony.pause(vm) {
            tracing::debug!(%vm, %error, "a clone that has ended is not kept");
            return let_go(colony, vm);
        }
        // A reset that came first has let it run again, and it was that which has just been paused.
        if !self.registry.has_ended(vm) {
            if let Err(error) = colony.resume(vm) {
                tracing::debug!(%vm, %error, "a clone is gone that was just reset");
            }
            return;
        }
        kept.push_back(vm);
        if kept.len() > KEPT_LIMIT
            && let Some(oldest) = kept.pop_front()
        {
            let_go(colony, oldest);
        }
    }

    /// No VM runs or is paused, and none is on its way. Clones that have ended are no reason to stay.
    fn is_empty(&self) -> bool {
        let colony = self.colony.read().unwrap_or_else(PoisonError::into_inner);
        colony.as_ref().is_none_or(|colony| self.is_over(colony))
    }

    /// As [`is_empty`](Self::is_empty).
    pub(super) fn is_over(&self, colony: &Colony) -> bool {
        // In this order: a fork on its way makes VMs before it is counted off.
        *lock(&self.under_way) == 0 && colony.vms().iter().all(|vm| self.registry.has_ended(*vm))
    }

    /// Gives the clones of a guest's own fork consoles.
    fn name_clones(&self, forked: &Forked) {
        if let Err(error) = self.try_name_clones(forked) {
            tracing::error!(%error, "a clone that a guest has asked for has no name");
        }
    }

    fn try_name_clones(&self, forked: &Forked) -> Result<(), ControlError> {
        drop(lock(&self.booting));
        let Some(source) = self.registry.of(forked.source) else { return Err(ControlError::Ending) };
        let colony = self.colony.read().unwrap_or_else(PoisonError::into_inner);
        let colony = colony.as_ref().ok_or(ControlError::Ending)?;
        let names: Vec<_> = forked.clones.iter().map(|clone| clone.name.clone()).collect();
        let consoles = self.create_consoles(&names)?;
        self.tell_forked(&source, forked);
        for (clone, console) in forked.clones.iter().zip(consoles) {
            self.add_clone(colony, clone.vm, &source, console);
        }
        self.count_fork(colony, forked);
        Ok(())
    }

    /// Tells those who listen of a fork, before its clones can be seen.
    pub(super) fn tell_forked(&self, source: &Entry, forked: &Forked) {
        let times = &forked.times;
        let pause = Duration::from_nanos(times.resumed.saturating_sub(times.reserved));
        let named = |clone: &Cloned| EventVm { name: clone.name.clone(), id: clone.vm.0.into() };
        self.registry.events().tell(What::Forked {
            vm: source.named(),
            fork: forked.cut.get().into(),
            clones: forked.clones.iter().map(named).collect(),
            pause_us: pause.as_secs_f64() * 1e6,
            pinned_pages: forked.figures.copied_pages,
        });
    }

    /// Counts a fork. Returns what is known of each clone that has not ended.
    pub(super) fn count_fork(&self, colony: &Colony, forked: &Forked) -> Vec<Option<ForkTimes>> {
        let known = |clone| colony.known_fork_times(forked, clone).ok();
        let times: Vec<_> = forked.clones.iter().map(known).collect();
        self.counts.note_fork(&times.iter().flatten().copied().collect::<Vec<_>>());
        times
    }

    /// Starts another VM that is no clone.
    pub(super) fn start_vm(&self, config: &VmConfig) -> Result<Entry, ControlError> {
        let settings = config.beside(&self.settings)?;
        let locked = self.place.lock()?;
        let name = claim_root(&locked, settings.name.clone(), &self.socket)?;
        drop(locked);
        let started = self.under_way(|| {
            let console = Arc::new(create_console(&self.place, &name)?);
            let _booting = lock(&self.booting);
            self.with_colony(|colony| {
                let vm = boot(colony, &name, &settings)?;
                let pid = colony.member(vm).map_or(0, |member| member.process());
                let state = VmState::Running;
                let entry =
                    Entry { name: name.clone(), vm, parent: None, parent_id: None, pid, state, console };
                self.registry.add(entry.clone());
                Ok(entry)
            })
        });
        if started.is_err() {
            self.place.lock()?.release(&[name]);
        }
        started
    }

    /// Takes names for clones: the given one, or for several or with a prefix what begins with it, else
    /// what begins with the source's.
    pub(super) fn claim_clones(
        &self,
        source: &str,
        name: Option<&str>,
        prefix: Option<&str>,
        count: usize,
    ) -> Result<Vec<String>, ControlError> {
        let locked = self.place.lock()?;
        let names = match (name, prefix) {
            (Some(name), None) if count == 1 => vec![name.to_owned()],
            (Some(prefix), _) | (None, Some(prefix)) => {
                (1..=count).map(|number| format!("{prefix}-{number}")).collect()
            }
            (None, None) => locked.free_names(source, count),
        };
        locked.claim(&names, &self.socket)?;
        Ok(names)
    }

    /// Consoles for names just taken, which are given up if that fails.
    pub(super) fn create_consoles(
        &self,
        names: &[String],
    ) -> Result<Vec<(String, Arc<Console>)>, ControlError> {
        let create = |name: &String| Ok((name.clone(), Arc::new(create_console(&self.place, name)?)));
        let consoles: Result<Vec<_>, ControlError> = names.iter().map(create).collect();
        if consoles.is_err() {
            self.place.lock()?.release(names);
        }
        consoles
    }

    /// Makes a clone known. Returns its process.
    pub(super) fn add_clone(
        &self,
        colony: &Colony,
        vm: VmId,
        source: &Entry,
        (name, console): (String, Arc<Console>),
    ) {
        // One that is gone has none, and its end is known already.
        let pid = colony.member(vm).map_or(0, |member| member.process());
        let (parent, parent_id) = (Some(source.name.clone()), Some(source.vm));
        let state = VmState::Running;
        self.registry.add(Entry { name, vm, parent, parent_id, pid, state, console });
        self.registry.note_pause(vm, || colony.is_paused(vm).unwrap_or(false));
    }
}

fn let_go(colony: &Colony, vm: VmId) {
    if let Err(error) = colony.end(vm) {
        tracing::debug!(%error, "a vm that had ended was gone already");
    }
}

/// Signals are told to the main thread; a second one ends the process at once, and with it all VMs.
struct SignalWatch {
    signals: signal_hook::iterator::Handle,
    thread: Option<JoinHandle<()>>,
}

impl SignalWatch {
    fn start(registry: &Arc<Registry>) -> Result<Self, ControlError> {
        let mut signals = signal_hook::iterator::Signals::new(terminal::ENDING_SIGNALS)?;
        let (handle, registry) = (signals.handle(), Arc::clone(registry));
        let thread = std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            for (seen, signal) in signals.forever().enumerate() {
                if seen > 0 {
                    std::process::exit(128 + signal);
                }
                registry.tell(Happening::Signal(signal));
            }
        })?;
        Ok(Self { signals: handle, thread: Some(thread) })
    }
}

impl Drop for SignalWatch {
    fn drop(&mut self) {
        self.signals.close();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that notes signals panicked");
        }
    }
}

fn claim_root(locked: &Locked<'_>, name: Option<String>, socket: &str) -> Result<String, ControlError> {
    let name = name.unwrap_or_else(|| locked.free_names("salp", 1).concat());
    locked.claim(std::slice::from_ref(&name), socket)?;
    Ok(name)
}

pub(super) fn create_console(place: &Place, name: &str) -> Result<Console, ControlError> {
    let path = place.console(name);
    // The name is ours, so whatever is there was left by a process that was killed.
    let _ = std::fs::remove_file(&path);
    Console::create(path.clone()).map_err(|source| ControlError::Host { action: "make", path, source })
}

fn create_log(place: &Place) -> Result<File, ControlError> {
    let path = place.log(std::process::id());
    let log = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&path);
    log.map_err(|source| ControlError::Host { action: "make", path, source })
}

fn config(settings: &Settings) -> Result<ColonyConfig, ControlError> {
    let mut config = ColonyConfig::new(MemoryShape::new(settings.memory_bytes)?);
    config.vcpus = settings.cpus;
    config.limits = settings.limits;
    if let Some(vms) = settings.limits.vms.and_then(|vms| u32::try_from(vms).ok()) {
        // Some have ended, and others need their pages.
        config.members = config.members.max(vms + vms / 4 + SPARE_MEMBERS);
    }
    config.confinement = settings.seccomp;
    config.program = settings.program.clone();
    if settings.kernel.is_some() {
        config.irqchip = Irqchip::Full;
    }
    if let Some(path) = &settings.dma_backing {
        config.backing_base = Some(Arc::new(open(path)?));
    }
    Ok(config)
}

/// Starts a VM that is no clone.
pub(super) fn boot(colony: &Colony, name: &str, settings: &Settings) -> Result<VmId, ControlError> {
    let Some(kernel) = &settings.kernel else {
        return Ok(colony.boot_as(Some(name), &settings.command_line)?);
    };
    let image = open(kernel)?;
    let initrd = settings.initrd.as_deref().map(open).transpose()?;
    match colony.boot_image_as(Some(name), &image, initrd.as_ref(), &settings.command_line) {
        Err(ColonyError::Refused { reason, .. }) => {
            Err(ControlError::Kernel { path: kernel.clone(), reason })
        }
        booted => Ok(booted?),
    }
}

fn open(path: &Path) -> Result<File, ControlError> {
    File::open(path).map_err(|source| ControlError::Host { action: "open", path: path.to_owned(), source })
}
