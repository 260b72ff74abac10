//! What finds out: a thread for the keyboard, one for signals, one for the colonies' events each, and one
//! that asks for figures once a second, and at once where something has changed.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use ratatui::crossterm::event::{self, Event as Input};

use crate::cli::client;
use crate::control::events::{Event, What};
use crate::control::resources::{MemoryView, StatsView};
use crate::control::terminal::ENDING_SIGNALS;
use crate::control::{ControlError, ForkRequest, VmView, WantedState};

/// How often figures are asked for where nothing happens.
const INTERVAL: Duration = Duration::from_secs(1);

/// What the main thread is told.
#[derive(Debug)]
pub(super) enum News {
    /// A key, or the terminal's size.
    Input(Input),
    /// Something has happened in the colony of this keeper.
    Event(u32, Event),
    /// All figures.
    Figures(Figures),
    /// What was wished is done, or why not.
    Done(Result<String, String>),
    /// This process is to end.
    Signal(i32),
}

/// All that is asked for.
#[derive(Debug, Default)]
pub(super) struct Figures {
    /// All VMs.
    pub(super) vms: Vec<VmView>,
    /// What those that live use, by name.
    pub(super) stats: BTreeMap<String, StatsView>,
    /// The chosen VM's memory.
    pub(super) memory: Option<MemoryView>,
}

/// What can be done to the chosen VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Fork,
    Pause,
    Resume,
    Reset,
    Stop,
}

/// See the module.
pub(super) struct Feed {
    news: Sender<News>,
    nudge: Sender<()>,
    chosen: Arc<Mutex<Option<String>>>,
}

impl Feed {
    /// Starts the threads; they end with the process.
    pub(super) fn start(news: Sender<News>) -> io::Result<Self> {
        let (nudge, nudges) = channel();
        let chosen = Arc::new(Mutex::new(None));
        let mut signals = signal_hook::iterator::Signals::new(ENDING_SIGNALS)?;
        let tell = news.clone();
        spawn("signals", move || {
            for signal in signals.forever() {
                if tell.send(News::Signal(signal)).is_err() {
                    break;
                }
            }
        })?;
        let tell = news.clone();
        spawn("keyboard", move || {
            while let Ok(input) = event::read() {
                if tell.send(News::Input(input)).is_err() {
                    break;
                }
            }
        })?;
        let asker = Asker { news: news.clone(), nudge: nudge.clone(), chosen: Arc::clone(&chosen) };
        spawn("figures", move || asker.run(&nudges))?;
        Ok(Self { news, nudge, chosen })
    }

    /// The chosen VM's memory is wanted now.
    pub(super) fn look(&self, name: Option<String>) {
        *self.chosen.lock().unwrap_or_else(PoisonError::into_inner) = name;
        self.ask_now();
    }

    fn ask_now(&self) {
        // Nobody there: the program ends.
        let _ = self.nudge.send(());
    }

    /// Does something to a VM, in a thread of its own.
    pub(super) fn act(&self, action: Action, name: String) -> io::Result<()> {
        let (news, nudge) = (self.news.clone(), self.nudge.clone());
        spawn("action", move || {
            let done = act(action, &name).map_err(|error| error.to_string());
            // As above.
            let _ = news.send(News::Done(done));
            let _ = nudge.send(());
        })
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    Builder::new().name(name.to_owned()).spawn(run).map(|_| ())
}

fn act(action: Action, name: &str) -> Result<String, ControlError> {
    let client = client();
    Ok(match action {
        Action::Fork => {
            let reply = client.fork(name, &ForkRequest::default())?;
            let clones = reply.clones.iter();
            let said = clones.map(|clone| format!("{} (pause {:.0} us)", clone.name, clone.pause_us));
            format!("forked {name}: {}", said.collect::<Vec<_>>().join(", "))
        }
        Action::Pause => client.set_state(name, WantedState::Paused).map(|_| format!("paused {name}"))?,
        Action::Resume => client.set_state(name, WantedState::Running).map(|_| format!("resumed {name}"))?,
        Action::Reset => {
            client.reset(name).map(|reset| format!("reset {name} in {:.0} us", reset.reset_us))?
        }
        Action::Stop => client.stop(name).map(|_| format!("stopped {name}"))?,
    })
}

/// Asks for figures.
struct Asker {
    news: Sender<News>,
    nudge: Sender<()>,
    chosen: Arc<Mutex<Option<String>>>,
}

impl Asker {
    fn run(&self, nudges: &Receiver<()>) {
        let mut followed = BTreeSet::new();
        loop {
            let figures = self.ask();
            let keepers: BTreeMap<_, _> = figures.vms.iter().map(|vm| (vm.keeper_pid, &vm.name)).collect();
            followed.retain(|keeper| keepers.contains_key(keeper));
            for (keeper, name) in keepers {
                if followed.insert(keeper) {
                    self.follow(keeper, name.clone());
                }
            }
            if self.news.send(News::Figures(figures)).is_err() {
                return;
            }
            if nudges.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Disconnected) {
                return;
            }
            // One answer is enough for all who ask now.
            while nudges.try_recv().is_ok() {}
        }
    }

    /// What cannot be had is not there: it will be asked for again.
    fn ask(&self) -> Figures {
        let client = client();
        let vms = match client.list() {
            Ok(all) => all.vms,
            Err(error) => {
                let _ = self.news.send(News::Done(Err(error.to_string())));
                Vec::new()
            }
        };
        let live = vms.iter().filter(|vm| vm.state.is_live());
        let stats = live.filter_map(|vm| Some((vm.name.clone(), client.stats(&vm.name).ok()?))).collect();
        let chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let memory = chosen.and_then(|name| client.memory(&name).ok());
        Figures { vms, stats, memory }
    }

    /// Follows the events of a colony until it ends.
    fn follow(&self, keeper: u32, name: String) {
        let (news, nudge) = (self.news.clone(), self.nudge.clone());
        let follow = move || {
            let followed = client().events(&name, |event| {
                // What comes ten times a second is no reason to ask for everything.
                let is_change =
                    !matches!(event.what, What::Publishing { .. } | What::Pins { .. } | What::Listening);
                let told = news.send(News::Event(keeper, event)).is_ok();
                match told && (!is_change || nudge.send(()).is_ok()) {
                    true => ControlFlow::Continue(()),
                    false => ControlFlow::Break(()),
                }
            });
            tracing::debug!(?followed, keeper, "a colony tells nothing more");
        };
        if let Err(error) = spawn("events", follow) {
            let _ = self.news.send(News::Done(Err(format!("events are not followed: {error}"))));
        }
    }
}
