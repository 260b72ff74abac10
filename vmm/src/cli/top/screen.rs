//! What is known and chosen: [`Screen`]. News change it; a key can be a [`Wish`].

use std::collections::{BTreeMap, VecDeque};

use ratatui::crossterm::event::{Event as Input, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::feed::{Action, Figures, News};
use crate::cli::ps;
use crate::control::events::{Event, What};
use crate::control::resources::{MemoryView, StatsView};
use crate::control::{VmState, VmView};

/// Lines of events that are kept.
const EVENTS: usize = 200;

/// What a key asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// To the shell.
    Leave,
    /// To do something to a VM.
    Act(Action, String),
    /// To see the memory of the VM that is chosen now.
    Look,
}

/// One VM in the list.
#[derive(Clone, Debug)]
pub(super) struct Line {
    /// What leads to its name in the tree.
    pub(super) lead: String,
    pub(super) vm: VmView,
    pub(super) stats: Option<StatsView>,
    /// Percent of a processor that each vCPU has used since the figures before, then the process.
    pub(super) load: Vec<u64>,
}

/// How far a fork's memory is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Publication {
    pub(super) fork: u64,
    pub(super) pending: u64,
    /// As it was when it began.
    pub(super) all: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Screen {
    pub(super) lines: Vec<Line>,
    /// The chosen line.
    pub(super) chosen: usize,
    pub(super) memory: Option<MemoryView>,
    /// The newest last.
    pub(super) events: VecDeque<String>,
    /// Publications on their way, by keeper and fork.
    pub(super) publications: BTreeMap<(u32, u64), Publication>,
    /// What is asked before it is done: to stop this VM.
    pub(super) question: Option<String>,
    /// Whether figures have come at all.
    pub(super) has_figures: bool,
}

impl Screen {
    /// The name of the chosen VM.
    pub(super) fn chosen_name(&self) -> Option<String> {
        self.lines.get(self.chosen).map(|line| line.vm.name.clone())
    }

    /// Takes one piece of news.
    pub(super) fn take(&mut self, news: News) -> Option<Wish> {
        match news {
            News::Input(Input::Key(key)) if key.kind != KeyEventKind::Release => return self.key(key),
            News::Input(_) | News::Signal(_) => {}
            News::Event(keeper, event) => self.event(keeper, &event),
            News::Figures(figures) => return self.figures(figures),
            News::Done(Ok(said)) => self.say(said),
            News::Done(Err(said)) => self.say(format!("failed: {said}")),
        }
        None
    }

    fn say(&mut self, line: String) {
        self.events.push_back(line);
        if self.events.len() > EVENTS {
            self.events.pop_front();
        }
    }

    fn key(&mut self, key: KeyEvent) -> Option<Wish> {
        if let Some(name) = self.question.take() {
            return matches!(key.code, KeyCode::Char('y')).then_some(Wish::Act(Action::Stop, name));
        }
        let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c') if is_control => Some(Wish::Leave),
            KeyCode::Char('q') | KeyCode::Esc => Some(Wish::Leave),
            KeyCode::Up | KeyCode::Char('k') => self.choose(self.chosen.saturating_sub(1)),
            KeyCode::Down | KeyCode::Char('j') => self.choose(self.chosen + 1),
            KeyCode::Home => self.choose(0),
            KeyCode::End => self.choose(usize::MAX),
            KeyCode::Char('f') => Some(Wish::Act(Action::Fork, self.chosen_name()?)),
            KeyCode::Char('p') => {
                let is_paused = self.lines.get(self.chosen)?.vm.state == VmState::Paused;
                let action = if is_paused { Action::Resume } else { Action::Pause };
                Some(Wish::Act(action, self.chosen_name()?))
            }
            KeyCode::Char('r') => Some(Wish::Act(Action::Reset, self.chosen_name()?)),
            KeyCode::Char('s') => {
                self.question = self.chosen_name();
                None
            }
            _ => None,
        }
    }

    fn choose(&mut self, line: usize) -> Option<Wish> {
        let line = line.min(self.lines.len().saturating_sub(1));
        if line == self.chosen {
            return None;
        }
        self.chosen = line;
        self.memory = None;
        Some(Wish::Look)
    }

    /// The VM that was chosen stays so, wherever it is in the list now.
    fn figures(&mut self, figures: Figures) -> Option<Wish> {
        let Figures { vms, mut stats, memory } = figures;
        let (before, chosen) = (std::mem::take(&mut self.lines), self.chosen);
        let of = |vm: &VmView| (vm.keeper_pid, vm.id);
        let was_chosen = before.get(chosen).map(|line| of(&line.vm));
        let line = |(lead, vm): (String, &VmView)| {
            let stats = stats.remove(&vm.name);
            let old = before.iter().find(|line| of(&line.vm) == of(vm));
            let old_stats = old.and_then(|line| line.stats.as_ref());
            let load = old_stats.zip(stats.as_ref()).and_then(|(old, new)| load(old, new));
            // Asked again within a tick of the clock: what was known is true still.
            let load = load.or_else(|| old.map(|line| line.load.clone())).unwrap_or_default();
            Line { lead, vm: vm.clone(), stats, load }
        };
        self.lines = ps::tree(&vms).into_iter().map(line).collect();
        let place = self.lines.iter().position(|line| Some(of(&line.vm)) == was_chosen);
        self.chosen = place.unwrap_or_else(|| chosen.min(self.lines.len().saturating_sub(1)));
        let chosen_name = self.chosen_name();
        self.memory = memory.filter(|memory| Some(&memory.name) == chosen_name.as_ref());
        let is_first = !std::mem::replace(&mut self.has_figures, true);
        // Somebody else is chosen now, whose memory is not known yet.
        (is_first || place.is_none()).then_some(Wish::Look).filter(|_| chosen_name.is_some())
    }

    fn event(&mut self, keeper: u32, event: &Event) {
        match &event.what {
            What::Publishing { fork, pending_leaves } => {
                let (fork, pending) = (*fork, *pending_leaves);
                let new = Publication { fork, pending, all: pending };
                let known = self.publications.entry((keeper, fork)).or_insert(new);
                known.pending = pending;
                known.all = known.all.max(pending);
                if pending == 0 {
                    self.publications.remove(&(keeper, fork));
                }
                return;
            }
            What::Published { fork, .. } => {
                self.publications.remove(&(keeper, *fork));
            }
            What::Listening => return,
            _ => {}
        }
        self.say(format!("{} {}", clock(event.at_unix_ms), describe(&event.what)));
    }
}

/// What each vCPU, and last the process, has used between two figures, in percent of a processor; none if
/// these are not 100 ms apart.
fn load(old: &StatsView, new: &StatsView) -> Option<Vec<u64>> {
    let elapsed_us = new.at_unix_ms.saturating_sub(old.at_unix_ms).saturating_mul(1000);
    if elapsed_us < 100_000 {
        return None;
    }
    let percent = |old: u64, new: u64| new.saturating_sub(old) * 100 / elapsed_us;
    let vcpus = new.vcpus.iter().map(|vcpu| {
        let before = old.vcpus.iter().find(|before| before.index == vcpu.index);
        percent(before.map_or(vcpu.cpu_us, |before| before.cpu_us), vcpu.cpu_us)
    });
    Some(vcpus.chain([percent(old.cpu_us, new.cpu_us)]).collect())
}

/// The time of day, of the world's clock.
fn clock(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000 % 86_400;
    format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

fn describe(what: &What) -> String {
    match what {
        What::Listening => "listening".to_owned(),
        What::Started { vm } => format!("{} started", vm.name),
        What::Forked { vm, fork, clones, pause_us, pinned_pages } => {
            let names: Vec<_> = clones.iter().map(|clone| clone.name.as_str()).collect();
            let (name, names) = (&vm.name, names.join(", "));
            format!("fork {fork} of {name}: {names}, pause {pause_us:.0} us, {pinned_pages} pages pinned")
        }
        What::Publishing { fork, pending_leaves } => format!("fork {fork}: {pending_leaves} leaves to go"),
        What::Published { vm, fork } => format!("fork {fork} of {} is published", vm.name),
        What::Pins { vm, registered, unregistered, buffers, pages } => {
            let name = &vm.name;
            format!(
                "{name} pins {pages} pages in registered buffers: {buffers} (+{registered}, -{unregistered})"
            )
        }
        What::Paused { vm } => format!("{} paused", vm.name),
        What::Resumed { vm } => format!("{} goes on", vm.name),
        What::Reset { vm } => format!("{} was reset", vm.name),
        What::Ended { vm, state } => format!("{} {}", vm.name, state.describe()),
        What::Removed { vm } => format!("{} removed", vm.name),
        What::Missed { events } => format!("{events} events missed"),
    }
}
