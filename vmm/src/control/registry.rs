//! The VMs of a colony as users know them: names, states, consoles.
//!
//! It observes the colony. What a clone says before its fork has returned is kept until the clone
//! has got its name. What must then be done is told to the colony's main thread, since an observer
//! may not wait for members.

use std::collections::BTreeMap;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

use super::console::Console;
use super::events::{EventVm, Hub, What};
use super::place::Place;
use super::{ControlError, VmState, lock};
use crate::family::VmId;
use crate::frames::CutId;
use crate::keeper::ColonyError;
use crate::keeper::fork::Forked;
use crate::keeper::observe::Observer;
use crate::member::messages::HowEnded;

/// What the colony's main thread is told.
#[derive(Debug)]
pub enum Happening {
    /// This VM does not run any more; or others may be gone: look.
    Ended(Option<VmId>),
    /// A guest has forked itself.
    Forked(Forked),
    /// A signal came.
    Signal(i32),
}

/// One VM.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its number.
    pub vm: VmId,
    /// Its source's name.
    pub parent: Option<String>,
    /// Its source's number.
    pub parent_id: Option<VmId>,
    /// Its process.
    pub pid: u32,
    /// Whether it runs.
    pub state: VmState,
    /// Its console.
    pub console: Arc<Console>,
}

impl Entry {
    /// The VM as events name it.
    #[must_use]
    pub fn named(&self) -> EventVm {
        EventVm { name: self.name.clone(), id: self.vm.0.into() }
    }
}

/// What a VM without a name yet has said.
#[derive(Debug, Default)]
struct Early {
    console: Vec<u8>,
    end: Option<VmState>,
}

#[derive(Debug, Default)]
struct Inner {
    entries: BTreeMap<VmId, Entry>,
    /// The last of the first VM, where it was removed.
    removed_first: Option<Entry>,
    early: BTreeMap<VmId, Early>,
}

/// See the module.
#[derive(Debug)]
pub struct Registry {
    inner: Mutex<Inner>,
    happenings: Sender<Happening>,
    place: Place,
    socket: String,
    /// Told under the lock: events of one VM come in the order of its states.
    events: Hub,
}

impl Registry {
    /// An empty one, that tells what happens. Names that it takes for clones are of the colony at `socket`.
    #[must_use]
    pub fn new(happenings: Sender<Happening>, place: Place, socket: String) -> Self {
        Self { inner: Mutex::default(), happenings, place, socket, events: Hub::default() }
    }

    /// What happens, for those who listen.
    #[must_use]
    pub fn events(&self) -> &Hub {
        &self.events
    }

    /// Tells the main thread.
    pub fn tell(&self, happening: Happening) {
        if self.happenings.send(happening).is_err() {
            tracing::debug!("the colony ends already");
        }
    }

    /// Adds a VM, which has said things before, perhaps.
    pub fn add(&self, mut entry: Entry) {
        let mut inner = lock(&self.inner);
        if entry.parent.is_none() {
            self.events.tell(What::Started { vm: entry.named() });
        }
        if let Some(early) = inner.early.remove(&entry.vm) {
            if !early.console.is_empty() {
                entry.console.append(&early.console);
            }
            if let Some(end) = early.end {
                self.end_entry(&mut entry, end);
            }
        }
        inner.entries.insert(entry.vm, entry);
    }

    /// All VMs.
    #[must_use]
    pub fn all(&self) -> Vec<Entry> {
        lock(&self.inner).entries.values().cloned().collect()
    }

    /// A VM by its number.
    #[must_use]
    pub fn of(&self, vm: VmId) -> Option<Entry> {
        lock(&self.inner).entries.get(&vm).cloned()
    }

    /// The first VM, which may have been removed.
    #[must_use]
    pub fn first(&self, vm: VmId) -> Option<Entry> {
        let inner = lock(&self.inner);
        inner.entries.get(&vm).or(inner.removed_first.as_ref()).cloned()
    }

    /// Forgets a VM that has ended. Returns whether it was known.
    pub fn remove(&self, vm: VmId) -> bool {
        let mut inner = lock(&self.inner);
        let Some(entry) = inner.entries.remove(&vm) else { return false };
        self.events.tell(What::Removed { vm: entry.named() });
        if inner.removed_first.is_none() && entry.parent.is_none() {
            inner.removed_first = Some(entry);
        }
        true
    }

    /// A VM by its name.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, name: &str) -> Result<Entry, ControlError> {
        let inner = lock(&self.inner);
        let entry = inner.entries.values().find(|entry| entry.name == name);
        entry.cloned().ok_or_else(|| ControlError::Unknown(name.to_owned()))
    }

    /// A VM by its name, which runs or is paused.
    ///
    /// # Errors
    /// There is none, or it has ended.
    pub fn find_live(&self, name: &str) -> Result<Entry, ControlError> {
        let entry = self.find(name)?;
        match entry.state {
            VmState::Running | VmState::Paused => Ok(entry),
            ended => Err(ControlError::NotRunning { name: entry.name, how: ended.describe() }),
        }
    }

    /// Whether a VM is known to have ended, with a name or before it has got one.
    #[must_use]
    pub fn has_ended(&self, vm: VmId) -> bool {
        let inner = lock(&self.inner);
        match inner.entries.get(&vm) {
            Some(entry) => !entry.state.is_live(),
            None => inner.early.get(&vm).is_some_and(|early| early.end.is_some()),
        }
    }

    /// Notes whether a VM that has not ended is paused. `is_paused` is asked here and not before, so that
    /// of several who do this at the same time the last one notes what is true.
    pub fn note_pause(&self, vm: VmId, is_paused: impl FnOnce() -> bool) {
        let mut inner = lock(&self.inner);
        if let Some(entry) = inner.entries.get_mut(&vm).filter(|entry| entry.state.is_live()) {
            let before = std::mem::replace(
                &mut entry.state,
                if is_paused() { VmState::Paused } else { VmState::Running },
            );
            if before != entry.state {
                let vm = entry.named();
                let is_paused = entry.state == VmState::Paused;
                self.events.tell(if is_paused { What::Paused { vm } } else { What::Resumed { vm } });
            }
        }
    }

    /// A VM does not run any more. Returns whether it did until now: the first end counts.
    pub fn end(&self, vm: VmId, state: VmState) -> bool {
        let mut inner = lock(&self.inner);
        match inner.entries.get_mut(&vm) {
            Some(entry) if entry.state.is_live() => {
                self.end_entry(entry, state);
                true
            }
            Some(_) => false,
            None => {
                let early = inner.early.entry(vm).or_default();
                let is_first = early.end.is_none();
                early.end.get_or_insert(state);
                is_first
            }
        }
    }
}

impl Registry {
    fn end_entry(&self, entry: &mut Entry, state: VmState) {
        entry.state = state.clone();
        entry.console.close();
        self.events.tell(What::Ended { vm: entry.named(), state });
    }
}

impl Observer for Registry {
    fn console(&self, vm: VmId, bytes: &[u8]) {
        let mut inner = lock(&self.inner);
        match inner.entries.get(&vm) {
            Some(entry) => entry.console.append(bytes),
            None => inner.early.entry(vm).or_default().console.extend(bytes),
        }
    }

    fn ended(&self, vm: VmId, how: HowEnded, status: Option<u32>, text: &str) {
        self.end(vm, VmState::Ended { how, status, text: text.to_owned() });
        self.tell(Happening::Ended(Some(vm)));
    }

    fn restarted(&self, vm: VmId) {
        let mut inner = lock(&self.inner);
        match inner.entries.get_mut(&vm) {
            // It is being ended.
            Some(entry) if entry.state == VmState::Stopped => {}
            Some(entry) => {
                entry.state = VmState::Running;
                entry.console.reopen();
                self.events.tell(What::Reset { vm: entry.named() });
            }
            None => {
                inner.early.entry(vm).or_default().end = None;
            }
        }
    }

    fn gone(&self, vm: VmId) {
        let text = "its process was killed".to_owned();
        self.end(vm, VmState::Ended { how: HowEnded::Killed, status: None, text });
        self.tell(Happening::Ended(None));
    }

    fn published(&self, vm: VmId, cuts: &[CutId]) {
        let inner = lock(&self.inner);
        let Some(entry) = inner.entries.get(&vm) else { return };
        for cut in cuts {
            self.events.tell(What::Published { vm: entry.named(), fork: cut.get().into() });
        }
    }

    fn buffers_changed(&self) {
        self.events.note_pins();
    }

    fn name_clone(&self, source: &str) -> Result<Option<String>, ColonyError> {
        let nameless = |error: ControlError| ColonyError::Nameless(error.to_string());
        let locked = self.place.lock().map_err(nameless)?;
        let names = locked.free_names(source, 1);
        locked.claim(&names, &self.socket).map_err(nameless)?;
        Ok(names.into_iter().next())
    }

    fn forget_name(&self, name: &str) {
        match self.place.lock() {
            Ok(locked) => locked.release(&[name.to_owned()]),
            Err(error) => tracing::error!(%name, %error, "a name stays taken"),
        }
    }

    fn forked(&self, forked: Forked) {
        self.tell(Happening::Forked(forked));
    }
}
