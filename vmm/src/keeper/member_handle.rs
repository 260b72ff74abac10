//! One member process, seen from its keeper.
//!
//! The [`listener`](super::listener) hears what the member says: answers go to whoever asked, events change
//! the [`MemberState`] that others wait on, and the end of the channel is the end of the process.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use rustix::process::Pid;

use super::pause::Still;
use super::steward::Job;
use super::{ANSWER_LIMIT, ColonyError, Shared};
use crate::devices::identity::Identity;
use crate::family::VmId;
use crate::frames::CutId;
use crate::ipc::spawn::Ending;
use crate::ipc::{Channel, IpcError, spawn};
use crate::member::confine::FORBIDDEN;
use crate::member::messages::{Event, HowEnded, Message, Order, Progress, Reply, Request, ResetReply};
use crate::space::PageCounts;

/// What a member has told of itself.
#[derive(Clone, Debug, Default)]
pub struct MemberState {
    /// The guest's last report.
    pub progress: Progress,
    /// How many reports there were since the guest began.
    pub reports: u64,
    /// Results of a puppet's orders that nobody has taken yet: (vCPU, result).
    pub puppet_results: Vec<(usize, u64)>,
    /// When the clone left the guest for the first time, in nanoseconds of `CLOCK_MONOTONIC`.
    pub first_exit: Option<u64>,
    /// The end of the pause of each cut, and what the memory was then.
    pub reentered: BTreeMap<CutId, (u64, PageCounts)>,
    /// The cuts that this VM has published all of. (One that nobody needed before that is not here.)
    pub finished_cuts: BTreeSet<CutId>,
    /// The generation in which the guest has said that it knows who it is.
    pub ready: Option<u64>,
    /// The guest's run has ended: status and text.
    pub ended: Option<(Option<u32>, String)>,
    /// The last reset.
    pub was_reset: Option<ResetReply>,
    /// How many there were.
    pub resets: u64,
    /// What has gone wrong.
    pub troubles: Vec<String>,
    /// Console output so far.
    pub console: Vec<u8>,
    /// How often there was room for console input again.
    pub console_rooms: u64,
    /// The process is gone.
    pub is_gone: bool,
    /// So it is, and all that follows from that has been done.
    pub is_over: bool,
}

impl MemberState {
    /// What the guest has told is past.
    fn begin_again(&mut self) {
        self.progress = Progress::default();
        self.reports = 0;
        self.puppet_results.clear();
        self.first_exit = None;
        self.ready = None;
        self.ended = None;
    }
}

/// Why there is no member.
const NO_PROCESS: &str = "no process could be had for a vm";

type Answer = Result<(Reply, Vec<OwnedFd>), String>;

/// See the module.
pub struct MemberHandle {
    slot: u32,
    role: OnceLock<(VmId, Identity)>,
    channel: Channel,
    child: spawn::Child,
    next_number: AtomicU64,
    waiting: Mutex<BTreeMap<u64, SyncSender<Answer>>>,
    state: Mutex<MemberState>,
    changing: Mutex<()>,
    still: Mutex<Option<Still>>,
    /// How many orders there were that may have changed the VM.
    changes: AtomicU64,
    pub(super) is_paused: AtomicBool,
    changed: Condvar,
    is_gone: AtomicBool,
    /// It has been told that all it shares is published.
    pub(super) is_told: AtomicBool,
}

impl MemberHandle {
    /// Has a member made and waits until it is ready.
    pub(super) fn start(shared: &Arc<Shared>, slot: u32) -> Result<Arc<Self>, ColonyError> {
        let (channel, child) = match Self::hatch(shared, slot)? {
            Some(born) => born,
            // The zygote died with the order: the next is made by another.
            None => Self::hatch(shared, slot)?.ok_or(ColonyError::Unfit(NO_PROCESS.to_owned()))?,
        };
        match channel.receive_within::<Message>(ANSWER_LIMIT)? {
            Some((Message::Ready, _)) => {}
            Some((Message::Unfit(reason), _)) => return Err(ColonyError::Unfit(reason)),
            Some(_) => return Err(ColonyError::Unfit("a member spoke out of turn".to_owned())),
            None => {
                let ending = child.wait()?;
                return Err(ColonyError::Unfit(format!("a member's process {ending} before it was ready")));
            }
        }
        let handle = Arc::new(Self {
            slot,
            role: OnceLock::new(),
            channel,
            child,
            next_number: AtomicU64::new(0),
            waiting: Mutex::default(),
            state: Mutex::default(),
            changing: Mutex::default(),
            still: Mutex::default(),
            changes: AtomicU64::new(0),
            is_paused: AtomicBool::new(false),
            changed: Condvar::new(),
            is_gone: AtomicBool::new(false),
            is_told: AtomicBool::new(false),
        });
        shared.listener.hear(&handle)?;
        Ok(handle)
    }

    /// Has a process made; none: its zygote is gone.
    fn hatch(shared: &Shared, slot: u32) -> Result<Option<(Channel, spawn::Child)>, ColonyError> {
        let (ours, theirs) = Channel::pair()?;
        shared.wish_for_member(slot, theirs)?;
        match ours.receive_within::<Message>(ANSWER_LIMIT)? {
            Some((Message::Born(process), _)) => {
                let process = Pid::from_raw(process).ok_or(ColonyError::Unfit(NO_PROCESS.to_owned()))?;
                Ok(Some((ours, spawn::Child::of(process)?)))
            }
            Some((Message::Unfit(reason), _)) => Err(ColonyError::Unfit(reason)),
            Some(_) => Err(ColonyError::Unfit("a member spoke out of turn".to_owned())),
            None => Ok(None),
        }
    }

    /// The member's slot on the board.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// The process's number.
    pub fn process(&self) -> u32 {
        u32::try_from(self.child.pid().as_raw_nonzero().get()).unwrap_or(0)
    }

    /// Gives the member its VM's name, once. Under the keeper's lock, see `Shared::give_role`.
    pub(super) fn name(&self, vm: VmId, identity: &Identity) {
        let (named, _) = self.role.get_or_init(|| (vm, identity.clone()));
        debug_assert!(*named == vm, "a member is one vm in its life");
    }

    /// The VM's name; 0 before it is one.
    pub fn vm(&self) -> VmId {
        self.named().unwrap_or(VmId(0))
    }

    /// What the VM was told of itself, if the member is one.
    pub fn identity(&self) -> Option<&Identity> {
        self.role.get().map(|(_, identity)| identity)
    }

    /// The VM's name, if it is one.
    pub(super) fn named(&self) -> Option<VmId> {
        self.role.get().map(|(vm, _)| *vm)
    }

    /// Whether the process exists.
    pub fn is_alive(&self) -> bool {
        !self.is_gone.load(Ordering::SeqCst)
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The member refused, ended, or did not answer in time.
    pub fn ask(&self, order: Order, descriptors: &[BorrowedFd<'_>]) -> Result<Reply, ColonyError> {
        self.begin(order, descriptors)?.wait()
    }

    /// Asks, and leaves the waiting to [`Asked::wait`].
    ///
    /// # Errors
    /// The member has ended, or the order could not be sent.
    pub fn begin(&self, order: Order, descriptors: &[BorrowedFd<'_>]) -> Result<Asked<'_>, ColonyError> {
        let may_change_vm = order.may_change_vm();
        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = sync_channel(1);
        self.waiting().insert(number, sender);
        // After the insertion: the listener empties the list when the process is gone.
        let sent = match self.is_alive() {
            true => self.channel.send(&Request { number, order }, descriptors),
            false => Err(IpcError::Closed),
        };
        // After the sending: an order that reaches the VM after a cut is not in the count read before it.
        if may_change_vm {
            self.changes.fetch_add(1, Ordering::SeqCst);
            self.forget_still();
        }
        if let Err(error) = sent {
            self.waiting().remove(&number);
            return Err(match error {
                IpcError::Closed => ColonyError::Died(self.vm()),
                refused => refused.into(),
            });
        }
        Ok(Asked { member: self, number, answer })
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeMap<u64, SyncSender<Answer>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the orders that may have changed the VM.
    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Ordering::SeqCst)
    }

    /// Held while the VM is cut, reset, paused or resumed, which exclude each other.
    pub(super) fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The cut that can be used again. Held for a moment, and no other lock is taken meanwhile.
    pub(super) fn still(&self) -> MutexGuard<'_, Option<Still>> {
        self.still.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the member has told.
    pub fn state(&self) -> MutexGuard<'_, MemberState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `is` holds of what the member has told; returns what that gives.
    ///
    /// # Errors
    /// The process ended, or the time is over.
    pub fn wait_for<T>(
        &self,
        limit: Duration,
        mut is: impl FnMut(&mut MemberState) -> Option<T>,
    ) -> Result<T, ColonyError> {
        let deadline = std::time::Instant::now() + limit;
        let mut state = self.state();
        loop {
            if let Some(found) = is(&mut state) {
                return Ok(found);
            }
            if state.is_gone {
                return Err(ColonyError::Died(self.vm()));
            }
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return Err(ColonyError::Silent { vm: self.vm(), seconds: limit.as_secs() });
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Kills the process.
    pub fn kill(&self) {
        if let Err(error) = self.child.kill() {
            tracing::error!(vm = %self.vm(), %error, "a member cannot be killed");
        }
    }

    /// Waits until the process is gone and reaped, and everybody has been told.
    pub fn wait_end(&self) {
        let is_on = |state: &mut MemberState| !state.is_over;
        drop(self.changed.wait_while(self.state(), is_on).unwrap_or_else(PoisonError::into_inner));
    }

    /// The channel, readable when the member has said something or ended, and the process, which is when it
    /// can be reaped.
    pub(super) fn ends(&self) -> [BorrowedFd<'_>; 2] {
        [self.channel.as_fd(), self.child.as_fd()]
    }

    /// Takes the next message, which is there. Whether more may come.
    pub(super) fn hear(&self, keeper: &Shared) -> bool {
        match self.channel.receive::<Message>() {
            Ok(Some((message, descriptors))) => {
                self.take(message, descriptors, keeper);
                true
            }
            Ok(None) => false,
            Err(error) => {
                tracing::error!(vm = %self.vm(), %error, "a member cannot be understood");
                self.kill();
                false
            }
        }
    }

    /// The process can be reaped, and nothing more will be heard.
    pub(super) fn bury(&self, keeper: &Shared) {
        match self.child.wait() {
            Ok(Ending::Killed(FORBIDDEN)) => self.note_forbidden_call(keeper),
            Ok(_) => {}
            Err(error) => tracing::error!(vm = %self.vm(), %error, "a member cannot be reaped"),
        }
        self.is_gone.store(true, Ordering::SeqCst);
        // Here and not by the steward, who may be waiting for one that waits for what is lost now. And
        // before anybody is told, who could then find the VM still there.
        keeper.book_death(self);
        // Dropping the senders tells those who wait.
        self.waiting().clear();
        self.state().is_gone = true;
        self.changed.notify_all();
        self.forget_still();
        if let (Some(observer), Some(vm)) = (keeper.observer(), self.named()) {
            observer.gone(vm);
        }
        self.state().is_over = true;
        self.changed.notify_all();
    }

    fn note_forbidden_call(&self, keeper: &Shared) {
        let text = "its process made a forbidden system call, and was killed".to_owned();
        tracing::error!(vm = %self.vm(), %text);
        if self.named().is_some() {
            self.note(Event::Ended { how: HowEnded::Killed, status: None, text }, keeper);
        }
    }

    fn take(&self, message: Message, descriptors: Vec<OwnedFd>, keeper: &Shared) {
        match message {
            Message::Answer { number, result } => {
                if let Some(waiting) = self.waiting().remove(&number) {
                    // Whoever asked may have given up.
                    let _ = waiting.send(result.map(|reply| (reply, descriptors)));
                }
            }
            Message::Event(event) => self.note(event, keeper),
            Message::Born(_) | Message::Ready | Message::Unfit(_) => {
                tracing::error!(vm = %self.vm(), "a member is ready twice");
            }
        }
    }

    fn note(&self, event: Event, keeper: &Shared) {
        let post = |job: Job| keeper.post(job);
        let observer = || keeper.observer();
        let mut state = self.state();
        match event {
            Event::Progress(progress) => {
                state.progress = progress;
                state.reports += 1;
            }
            Event::Puppet { vcpu, result } => state.puppet_results.push((vcpu, result)),
            Event::IsReady { generation } => state.ready = Some(generation),
            Event::ForkAsked { vcpu } => post(Job::ForkAsked { vm: self.vm(), vcpu }),
            Event::ResetAsked { vcpu } => post(Job::ResetAsked { vm: self.vm(), vcpu }),
            Event::Restarting => {
                // Before anybody is told, who could ask: it runs.
                self.is_paused.store(false, Ordering::SeqCst);
                if let Some(observer) = observer() {
                    observer.restarted(self.vm());
                }
                state.begin_again();
            }
            Event::WasReset(reset) => {
                state.was_reset = Some(reset);
                state.resets += 1;
            }
            Event::FirstExit { at } => state.first_exit = Some(at),
            Event::Reentered { cut, at, pages } => {
                state.reentered.insert(cut, (at, pages));
            }
            Event::CutsFinished(cuts) => {
                if let Some(observer) = observer() {
                    observer.published(self.vm(), &cuts);
                }
                state.finished_cuts.extend(cuts);
                post(Job::Sweep);
                post(Job::FillPool);
            }
            Event::BuffersChanged => {
                if let Some(observer) = observer() {
                    observer.buffers_changed();
                }
            }
            Event::Quiet => post(Job::Look { vm: self.vm() }),
            Event::Ended { how, status, text } => {
                if let Some(observer) = observer() {
                    observer.ended(self.vm(), how, status, &text);
                }
                state.ended = Some((status, text));
            }
            Event::Trouble(text) => {
                tracing::warn!(vm = %self.vm(), %text, "a member is in trouble");
                state.troubles.push(text);
            }
            Event::ConsoleRoom => state.console_rooms += 1,
            Event::Console(bytes) => match observer() {
                Some(observer) => observer.console(self.vm(), &bytes),
                None => state.console.extend(bytes),
            },
        }
        drop(state);
        self.changed.notify_all();
    }
}

/// A request that has been sent.
pub struct Asked<'a> {
    member: &'a MemberHandle,
    number: u64,
    answer: std::sync::mpsc::Receiver<Answer>,
}

impl Asked<'_> {
    /// Waits for the answer.
    ///
    /// # Errors
    /// The member refused, ended, or did not answer in time.
    pub fn wait(self) -> Result<Reply, ColonyError> {
        self.wait_with_descriptors().map(|(reply, _)| reply)
    }

    /// As [`wait`](Self::wait), for as long as the caller likes.
    ///
    /// # Errors
    /// As there.
    pub fn wait_within(self, limit: Duration) -> Result<Reply, ColonyError> {
        self.wait_at_most(limit).map(|(reply, _)| reply)
    }

    /// As [`wait`](Self::wait), with the descriptors that came with the answer.
    ///
    /// # Errors
    /// As there.
    pub fn wait_with_descriptors(self) -> Result<(Reply, Vec<OwnedFd>), ColonyError> {
        self.wait_at_most(ANSWER_LIMIT)
    }

    fn wait_at_most(self, limit: Duration) -> Result<(Reply, Vec<OwnedFd>), ColonyError> {
        let vm = self.member.vm();
        match self.answer.recv_timeout(limit) {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(reason)) => Err(ColonyError::Refused { vm, reason }),
            Err(RecvTimeoutError::Disconnected) => Err(ColonyError::Died(vm)),
            Err(RecvTimeoutError::Timeout) => {
                self.member.waiting().remove(&self.number);
                Err(ColonyError::Silent { vm, seconds: limit.as_secs() })
            }
        }
    }
}
