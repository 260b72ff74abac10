//! The keeper: the process of a colony.
//!
//! A colony is a VM and all its descendants, one trust domain. Its keeper holds what they have in
//! common: names, tables ([`Family`]), the arena's files, the board, and a pool of ready members.
//! It alone writes structure; members write only their own words of the board.
//!
//! | module | what |
//! |---|---|
//! | [`member_handle`] | one member process, seen from here: requests, answers, events, death |
//! | `listener` | hears all of them |
//! | [`spec`] | what a fork is to make |
//! | [`fork`] | a cut and its clones |
//! | [`config`] | what a colony is made of, and what its host has |
//! | [`limits`] | how much of it there may be |
//! | [`pause`] | VMs that stand still, and cuts that are used again |
//! | [`reset`] | a clone's return to its cut |
//! | [`boot`] | first VMs: the built-in guest, or another kernel |
//! | `nursery` | has members made |
//! | `pool` | those that are ready before they are wanted, and the places that all have |
//! | [`map`] | what each leaf of a VM is, and who shares it |
//! | [`steward`] | what happens on its own: sweeps, images, the pool, deaths |
//! | [`usage`] | what VMs use and have done |
//! | [`checker`] | the whole state, recomputed |
//! | `host_pages` | which host pages VMs have, compared |
//! | [`observe`] | who is told what happens on its own |
//!
//! # Locks
//! `inner` (family, names, files) is never held while a member is asked something. The pool's lock comes
//! after it, and after all others.

mod boot;
pub mod checker;
mod config;
pub mod fork;
mod host_pages;
pub mod limits;
mod listener;
pub mod map;
pub mod member_handle;
mod nursery;
pub mod observe;
mod pause;
mod pool;
mod reset;
pub mod spec;
pub mod steward;
pub mod usage;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use thiserror::Error;

pub use self::config::{ColonyConfig, available_memory_bytes, raise_limits, shorten_slices};

use self::config::arena_budget_bytes;
use self::limits::Admission;
use self::listener::Listener;
use self::member_handle::MemberHandle;
use self::nursery::Wish;
use self::pool::Pool;
use self::spec::CloneSpec;
use self::steward::{Job, Leftovers};
use crate::arena_files::{ArenaDir, ArenaError};
use crate::board::{Board, BoardShape};
use crate::devices::identity::{Identity, IdentityError};
use crate::failure::{self, Injected};
use crate::family::{Family, FamilyError, FamilyFault, VmId};
use crate::frames::CutId;
use crate::ipc::shared::SharedMemoryError;
use crate::ipc::{IpcError, SharedMemory, spawn};
use crate::member::messages::Order;
use crate::member::shell::SharedWords;
use crate::words::wide;

/// Why a colony could not do something.
#[derive(Debug, Error)]
pub enum ColonyError {
    /// No room for a table, no cut to return to, and the like.
    #[error("{0}")]
    Family(#[source] FamilyError),
    /// The arena.
    #[error("{0}")]
    Arena(#[from] ArenaError),
    /// Shared memory.
    #[error("{0}")]
    Shared(#[from] SharedMemoryError),
    /// A channel.
    #[error("{0}")]
    Ipc(#[from] IpcError),
    /// A process could not be started.
    #[error("{0}")]
    Spawn(#[from] spawn::SpawnError),
    /// A member could not be made ready.
    #[error("{0}")]
    Unfit(String),
    /// A member refused.
    #[error("{vm}: {reason}")]
    Refused {
        /// Whose member.
        vm: VmId,
        /// Why.
        reason: String,
    },
    /// A member's process ended while it was asked something.
    #[error("the process of {0} has ended")]
    Died(VmId),
    /// A member did not answer in time.
    #[error("the process of {vm} did not answer within {seconds} s")]
    Silent {
        /// Whose member.
        vm: VmId,
        /// How long it was waited for.
        seconds: u64,
    },
    /// A guest has not said that it knows who it is.
    #[error("{vm} is not ready: {why}")]
    NotReady {
        /// Whose guest.
        vm: VmId,
        /// Why not.
        why: String,
    },
    /// There is no such VM.
    #[error("{0} does not exist")]
    NoVm(VmId),
    /// All places for members are taken.
    #[error("all {0} places for vms are taken: stop one, or run the colony with --max-vms")]
    Members(u32),
    /// A limit is in the way.
    #[error("{0}")]
    Limit(#[from] limits::LimitError),
    /// What a clone is to be told.
    #[error("{0}")]
    Identity(#[from] IdentityError),
    /// No name could be had for a clone.
    #[error("a clone gets no name: {0}")]
    Nameless(String),
    /// The host refused a thread or descriptor.
    #[error("{0}")]
    Host(#[from] std::io::Error),
    /// The whole state does not add up.
    #[error("the checker found: {0}")]
    Check(#[from] checker::CheckFault),
    /// The tables do not add up.
    #[error("the checker found: {0}")]
    Tables(#[from] FamilyFault),
}

impl From<FamilyError> for ColonyError {
    /// That there is no such VM is one error, whoever finds it out.
    fn from(error: FamilyError) -> Self {
        match error {
            FamilyError::NoVm(vm) => Self::NoVm(vm),
            other => Self::Family(other),
        }
    }
}

impl From<Injected> for ColonyError {
    fn from(injected: Injected) -> Self {
        Self::Host(injected.into())
    }
}

impl ColonyError {
    /// A member's answer is not one to its order.
    fn unexpected(vm: VmId) -> Self {
        Self::Refused { vm, reason: "it answered something else".to_owned() }
    }
}

/// What the keeper knows, under one lock.
struct Inner {
    family: Family,
    vms: BTreeMap<VmId, Arc<MemberHandle>>,
    /// Ended VMs whose processes others may still need.
    images: BTreeMap<VmId, Arc<MemberHandle>>,
    /// VMs that are promised and not made.
    promised: usize,
    /// Each cut's block file and patch file.
    files: BTreeMap<CutId, [OwnedFd; 2]>,
    /// What the host did not give back when it was asked to: it is asked again.
    leftovers: Leftovers,
    last_cut: BTreeMap<VmId, CutId>,
    parents: BTreeMap<VmId, VmId>,
}

/// What all threads of a keeper share.
pub(crate) struct Shared {
    config: ColonyConfig,
    board: Board,
    words: Arc<SharedWords>,
    arena: ArenaDir,
    inner: Mutex<Inner>,
    /// The images or the family changed.
    changed: Condvar,
    pool: Pool<Arc<MemberHandle>>,
    jobs: Mutex<Sender<Job>>,
    wishes: Mutex<Sender<Wish>>,
    listener: Listener,
    is_closing: AtomicBool,
    observer: OnceLock<Weak<dyn observe::Observer>>,
}

/// A colony, from the inside of its keeper. Dropping it ends every VM and process.
pub struct Colony {
    shared: Arc<Shared>,
    steward: Option<JoinHandle<()>>,
    nursery: Option<JoinHandle<()>>,
    listening: Option<JoinHandle<()>>,
}

/// How long a member may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

impl Colony {
    /// A colony without VMs, whose pool begins to fill.
    ///
    /// # Errors
    /// The host has no room for the board or the arena.
    pub fn new(config: ColonyConfig) -> Result<Self, ColonyError> {
        raise_limits();
        shorten_slices();
        let leaves = config.memory.span_leaves();
        let (members, pool_size) = (config.members, config.pool);
        // A cut a member and its retries; tables and records in proportion. Untouched parts cost nothing.
        let shape = BoardShape {
            leaves,
            cuts: (members * 8).max(1024),
            members,
            nodes: 1 << 16,
            records: (leaves * members).clamp(1 << 16, 1 << 22),
        };
        let bytes = shape.total_words() * size_of::<u32>();
        let words = Arc::new(SharedWords::over(SharedMemory::create("salp-board", bytes)?));
        let board = Board::new(shape, Arc::<SharedWords>::clone(&words));
        let arena = ArenaDir::create_as(config.arena, arena_budget_bytes(&config))?;
        let ((jobs, todo), (wishes, wished)) = (channel(), channel());
        let mut family = Family::new(board.clone());
        family.share_at(config.share_level);
        let inner = Inner {
            family,
            vms: BTreeMap::new(),
            images: BTreeMap::new(),
            promised: 0,
            files: BTreeMap::new(),
            leftovers: Leftovers::default(),
            last_cut: BTreeMap::new(),
            parents: BTreeMap::new(),
        };
        let shared = Arc::new(Shared {
            config,
            board,
            words,
            arena,
            inner: Mutex::new(inner),
            changed: Condvar::new(),
            pool: Pool::new(pool_size, members),
            jobs: Mutex::new(jobs),
            wishes: Mutex::new(wishes),
            listener: Listener::new()?,
            is_closing: AtomicBool::new(false),
            observer: OnceLock::new(),
        });
        let mut colony = Self { shared, steward: None, nursery: None, listening: None };
        let for_steward = Arc::clone(&colony.shared);
        colony.steward = Some(start("steward", move || steward::run(&for_steward, &todo))?);
        let for_nursery = Arc::clone(&colony.shared);
        colony.nursery = Some(start("nursery", move || nursery::run(&for_nursery, &wished))?);
        let for_listener = Arc::clone(&colony.shared);
        let listen = move || for_listener.listener.run(&for_listener);
        colony.listening = Some(start("listener", listen)?);
        colony.shared.post(Job::FillPool);
        Ok(colony)
    }

    /// The colony's configuration.
    #[must_use]
    pub fn config(&self) -> &ColonyConfig {
        &self.shared.config
    }

    /// What kind of arena the host allowed.
    #[must_use]
    pub fn arena_kind(&self) -> crate::arena_files::ArenaKind {
        self.shared.arena.kind()
    }

    /// Bytes of memory in the arena.
    ///
    /// # Errors
    /// The host refused to say.
    pub fn arena_used_bytes(&self) -> Result<u64, ColonyError> {
        Ok(self.shared.arena.used_bytes()?)
    }

    /// The ready members, the next to be taken first.
    #[must_use]
    pub fn pooled(&self) -> Vec<Arc<MemberHandle>> {
        self.shared.pool.ready()
    }

    /// Waits until the pool is full.
    ///
    /// # Errors
    /// A member could not be made.
    pub fn warm(&self) -> Result<(), ColonyError> {
        loop {
            self.shared.fill_pool()?;
            // Others may be making the last ones, and may fail.
            if self.shared.pool.await_full(ANSWER_LIMIT) {
                return Ok(());
            }
        }
    }

    /// The member of a VM.
    ///
    /// # Errors
    /// There is no such VM.
    pub fn member(&self, vm: VmId) -> Result<Arc<MemberHandle>, ColonyError> {
        self.shared.member(vm)
    }

    /// The running VMs.
    #[must_use]
    pub fn vms(&self) -> Vec<VmId> {
        self.shared.lock().vms.keys().copied().collect()
    }

    /// The VM that this one was cloned from.
    #[must_use]
    pub fn parent(&self, vm: VmId) -> Option<VmId> {
        self.shared.lock().parents.get(&vm).copied()
    }

    /// Ends a VM. Its process goes when nobody needs its pages any more.
    ///
    /// # Errors
    /// There is no such VM.
    pub fn end(&self, vm: VmId) -> Result<(), ColonyError> {
        let member = self.member(vm)?;
        let _changing = member.changing();
        // A member that died by itself has ended too. Where order or answer did not get through, once
        // more: it does no harm twice.
        let result = match member.ask(Order::EndVm, &[]) {
            Err(ColonyError::Ipc(_) | ColonyError::Refused { .. }) => member.ask(Order::EndVm, &[]),
            result => result,
        };
        {
            let mut inner = self.shared.lock();
            inner.family.end_vm(vm);
            if let Some(member) = inner.vms.remove(&vm) {
                inner.images.insert(vm, member);
            }
        }
        self.shared.post(Job::Sweep);
        match result {
            Ok(_) | Err(ColonyError::Died(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Kills a VM's process. What others still need of it is lost to them.
    ///
    /// # Errors
    /// There is no such VM.
    pub fn kill(&self, vm: VmId) -> Result<(), ColonyError> {
        self.member(vm)?.kill();
        Ok(())
    }

    /// Waits until everything that follows from what has happened so far has been done: sweeps,
    /// images let go, deaths booked.
    pub fn settle(&self) {
        let (done, wait) = channel();
        self.shared.post(Job::Echo(done));
        // The steward gone: nothing is left to be done.
        let _ = wait.recv();
    }

    /// Waits until no VM or image of these is left, and nothing is pending. For tests and orderly
    /// ends.
    ///
    /// # Errors
    /// It took longer than `limit`.
    pub fn wait_until_gone(&self, limit: Duration) -> Result<(), ColonyError> {
        let inner = self.shared.lock();
        let gone = |inner: &mut Inner| inner.vms.is_empty() && inner.images.is_empty();
        let (inner, timeout) = self
            .shared
            .changed
            .wait_timeout_while(inner, limit, |inner| !gone(inner))
            .unwrap_or_else(PoisonError::into_inner);
        let left = inner.vms.keys().chain(inner.images.keys()).next().copied();
        match left {
            Some(vm) if timeout.timed_out() => Err(ColonyError::Silent { vm, seconds: limit.as_secs() }),
            _ => Ok(()),
        }
    }

    /// Cuts that exist in any form, and nodes and records in use: what must fall back to 0.
    #[must_use]
    pub fn structure_counts(&self) -> (usize, usize, usize) {
        let inner = self.shared.lock();
        let counts = inner.family.table_counts();
        (inner.family.open_cuts(), counts.nodes, counts.records)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn post(&self, job: Job) {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if jobs.send(job).is_err() {
            tracing::debug!("the steward has gone home");
        }
    }

    fn member(&self, vm: VmId) -> Result<Arc<MemberHandle>, ColonyError> {
        self.lock().vms.get(&vm).cloned().ok_or(ColonyError::NoVm(vm))
    }

    fn is_closing(&self) -> bool {
        self.is_closing.load(Ordering::SeqCst)
    }

    /// A ready member: from the pool, or made now. Whoever has taken all that he needs asks for the
    /// pool to be filled again: not before, for that takes processor time from what he does.
    fn take_member(self: &Arc<Self>) -> Result<Arc<MemberHandle>, ColonyError> {
        let is_full = |error: &ColonyError| matches!(error, ColonyError::Members(_));
        self.pool.take_or_make(|| self.make_member(), is_full, ANSWER_LIMIT)
    }

    /// Gives back a member that has got no role. Returns it if nobody needs it: its end, when its place is
    /// free again, is to be waited for.
    fn give_back(&self, member: Arc<MemberHandle>) -> Option<Arc<MemberHandle>> {
        let member = self.pool.give_back(member)?;
        member.kill();
        Some(member)
    }

    /// Makes a member a VM, as `make` and `spec` say. Naming it and booking its death exclude each other: a
    /// death that is booked before this is seen here, any later one sees the name.
    fn give_role(
        &self,
        member: &Arc<MemberHandle>,
        parent: Option<VmId>,
        (spec, admission): (&CloneSpec, &Admission<'_>),
        make: impl FnOnce(&mut Family, u32) -> Result<VmId, FamilyError>,
    ) -> Result<(VmId, Identity), ColonyError> {
        let mut inner = self.lock();
        if !member.is_alive() {
            return Err(ColonyError::Died(member.vm()));
        }
        // no failure point: what it does has them
        let vm = make(&mut inner.family, member.slot())?;
        let identity = spec.identity(vm);
        member.name(vm, &identity);
        inner.vms.insert(vm, Arc::clone(member));
        admission.spend(&mut inner);
        if let Some(parent) = parent {
            inner.parents.insert(vm, parent);
        }
        Ok((vm, identity))
    }

    fn make_member(self: &Arc<Self>) -> Result<Arc<MemberHandle>, ColonyError> {
        let slot = self.pool.claim().ok_or(ColonyError::Members(self.config.members))?;
        let result = self.make_member_in(slot);
        if result.is_err() {
            self.pool.free(slot);
        }
        result
    }

    fn make_member_in(self: &Arc<Self>, slot: u32) -> Result<Arc<MemberHandle>, ColonyError> {
        self.board.open_member(slot)?;
        failure::point("keeper.member")?;
        MemberHandle::start(self, slot)
    }

    fn fill_pool(self: &Arc<Self>) -> Result<(), ColonyError> {
        self.pool.fill(|| self.is_closing(), || self.make_member())
    }

    /// A new file pair for a cut.
    fn make_cut_files(&self, cut: CutId) -> Result<[OwnedFd; 2], ColonyError> {
        let blocks = self.arena.create_file(&cut.block_file(), self.config.memory.span_bytes())?;
        let room = wide(crate::words::LEAF_PAGES) * u64::from(self.config.memory.span_leaves());
        match self.arena.create_small_file(&cut.patch_file(), room * wide(crate::words::PAGE_BYTES)) {
            Ok(patches) => Ok([blocks, patches]),
            // The first goes with the cut.
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Colony {
    fn drop(&mut self) {
        self.shared.is_closing.store(true, Ordering::SeqCst);
        self.shared.post(Job::Close);
        if let Some(steward) = self.steward.take()
            && steward.join().is_err()
        {
            tracing::error!("the steward panicked");
        }
        let members: Vec<_> = {
            let mut inner = self.shared.lock();
            let vms = std::mem::take(&mut inner.vms);
            let images = std::mem::take(&mut inner.images);
            vms.into_values().chain(images.into_values()).chain(self.shared.pool.drain()).collect()
        };
        // All at once, then one by one: none needs another any more.
        members.iter().for_each(|member| member.kill());
        members.iter().for_each(|member| member.wait_end());
        let is_told = self.shared.listener.close();
        if let Some(listening) = self.listening.take().filter(|_| is_told.is_ok())
            && listening.join().is_err()
        {
            tracing::error!("the listener panicked");
        }
        // After the members: the end of its thread kills them.
        let wishes = self.shared.wishes.lock().unwrap_or_else(PoisonError::into_inner);
        let is_told = wishes.send(Wish::Close).is_ok();
        drop(wishes);
        if let Some(nursery) = self.nursery.take().filter(|_| is_told)
            && nursery.join().is_err()
        {
            tracing::error!("the nursery panicked");
        }
    }
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work)
}

/// Borrows descriptors for a message.
fn borrow(descriptors: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    descriptors.iter().map(AsFd::as_fd).collect()
}
