//! What the screen shows and keys ask for, without a terminal.

use std::collections::BTreeMap;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{Event as Input, KeyCode, KeyEvent, KeyModifiers};

use super::draw::draw;
use super::feed::{Action, Figures, News};
use super::screen::{Screen, Wish};
use crate::cli::map::cell::tests::leaf;
use crate::cli::map::tests::memory;
use crate::cli::ps::tests::vm;
use crate::control::events::{Event, EventVm, What};
use crate::control::resources::{DmaStats, Faults, Pages, PublicationStats, StatsView, VcpuStats};
use crate::control::{VmState, VmView};

fn stats(name: &str, at_unix_ms: u64, cpu_us: u64) -> StatsView {
    StatsView {
        name: name.to_owned(),
        id: 1,
        at_unix_ms,
        cpu_us,
        resident_bytes: 0,
        vcpus: vec![VcpuStats { index: 0, cpu_us: cpu_us / 2 }],
        shared_bytes: 3 << 20,
        unique_bytes: 5 << 20,
        pages: Pages { lent: 7, pinned: 9, ..Pages::default() },
        pins: 0,
        faults: Faults { touch: 0, store: 0, host: 0 },
        publication: PublicationStats { blocks: 0, patches: 0, reused_leaves: 0, dropped_leaves: 0 },
        dma: DmaStats { transfers: 0, failed: 0, in_flight: 0 },
    }
}

/// `a`, its clone `a-1`, and what they use at this time; the memory of whoever is chosen.
fn figures(at_unix_ms: u64, cpu_us: u64, chosen: Option<String>) -> News {
    let paused = VmView { state: VmState::Paused, ..vm("a-1", 2, Some(("a", 1))) };
    let own = Pages { exclusive: 512, ..Pages::default() };
    let leaves = || vec![leaf(0, own, None), leaf(1, Pages::default(), Some((1, 2)))];
    News::Figures(Figures {
        vms: vec![vm("a", 1, None), paused],
        stats: BTreeMap::from([("a".to_owned(), stats("a", at_unix_ms, cpu_us))]),
        memory: chosen.map(|name| memory(&name, leaves())),
    })
}

fn key(code: KeyCode) -> News {
    News::Input(Input::Key(KeyEvent::new(code, KeyModifiers::NONE)))
}

fn event(what: What) -> News {
    News::Event(7, Event { number: 1, at_unix_ms: 3_723_000, what })
}

fn drawn(screen: &Screen, (width, height): (u16, u16)) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("it needs no terminal");
    terminal.draw(|frame| draw(frame, screen)).expect("nothing is written");
    let buffer = terminal.backend().buffer();
    let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
    (0..height).map(|y| line(y).trim_end().to_owned()).collect()
}

/// A screen that has seen two figures, a second apart, in which `a` has used 600 ms.
fn seen() -> Screen {
    let mut screen = Screen::default();
    assert_eq!(screen.take(figures(1000, 0, None)), Some(Wish::Look));
    assert_eq!(screen.take(figures(2000, 600_000, Some("a".to_owned()))), None);
    screen
}

#[test]
fn families_figures_map_and_events_are_on_a_small_screen() {
    let mut screen = seen();
    let clone = EventVm { name: "a-1".to_owned(), id: 2 };
    let source = EventVm { name: "a".to_owned(), id: 1 };
    let forked = What::Forked { vm: source, fork: 1, clones: vec![clone], pause_us: 310.4, pinned_pages: 9 };
    assert_eq!(screen.take(event(forked)), None);
    assert_eq!(screen.take(event(What::Publishing { fork: 1, pending_leaves: 20 })), None);
    assert_eq!(screen.take(event(What::Publishing { fork: 1, pending_leaves: 5 })), None);
    let lines = drawn(&screen, (80, 24));
    let has = |words: &[&str]| lines.iter().any(|line| words.iter().all(|word| line.contains(word)));
    for words in [
        &["salp top", "2 of 2 vms", "1 colony", "1G of memory", "5.0M of it unique"][..],
        &["a ", "running", " 60 ", " 30 ", "5.0M", "3.0M", " 7 ", " 9"],
        &["└─a-1", "paused"],
        &["a: exclusive 2M", "shared 2M"],
        &["0  █2"],
        &["01:02:03 fork 1 of a: a-1, pause 310 us, 9 pages pinned"],
        &["publishing fork 1: 15 of 20 leaves"],
        &["f fork", "q leave"],
    ] {
        assert!(has(words), "{words:?} in\n{}", lines.join("\n"));
    }
    // On a large one the events stand beside the map.
    let lines = drawn(&screen, (200, 50));
    let beside = lines.iter().any(|line| line.contains("a: exclusive 2M") && line.contains("events"));
    assert!(beside, "{}", lines.join("\n"));
    // On one that is too small for anything nothing breaks.
    for size in [(1, 1), (20, 5), (300, 2)] {
        drawn(&screen, size);
    }
}

#[test]
fn what_is_published_is_no_progress_any_more() {
    let mut screen = seen();
    screen.take(event(What::Publishing { fork: 1, pending_leaves: 5 }));
    assert!(drawn(&screen, (80, 24)).iter().any(|line| line.contains("publishing fork 1")));
    let vm = EventVm { name: "a".to_owned(), id: 1 };
    screen.take(event(What::Published { vm, fork: 1 }));
    let lines = drawn(&screen, (80, 24));
    assert!(!lines.iter().any(|line| line.contains("publishing")), "{lines:?}");
    assert!(lines.iter().any(|line| line.contains("fork 1 of a is published")), "{lines:?}");
}

#[test]
fn keys_act_on_the_vm_that_is_chosen() {
    let mut screen = seen();
    let act = |action, name: &str| Some(Wish::Act(action, name.to_owned()));
    assert_eq!(screen.take(key(KeyCode::Char('f'))), act(Action::Fork, "a"));
    assert_eq!(screen.take(key(KeyCode::Char('p'))), act(Action::Pause, "a"));
    assert_eq!(screen.take(key(KeyCode::Down)), Some(Wish::Look));
    assert_eq!(screen.take(key(KeyCode::Down)), None, "it is the last one");
    assert_eq!(screen.take(key(KeyCode::Char('p'))), act(Action::Resume, "a-1"));
    assert_eq!(screen.take(key(KeyCode::Char('r'))), act(Action::Reset, "a-1"));
    // To stop one is asked for first.
    assert_eq!(screen.take(key(KeyCode::Char('s'))), None);
    assert!(drawn(&screen, (80, 24)).last().is_some_and(|line| line.contains("stop a-1?")));
    assert_eq!(screen.take(key(KeyCode::Char('n'))), None);
    assert_eq!(screen.take(key(KeyCode::Char('y'))), None, "nothing is asked any more");
    screen.take(key(KeyCode::Char('s')));
    assert_eq!(screen.take(key(KeyCode::Char('y'))), act(Action::Stop, "a-1"));
    assert_eq!(screen.take(key(KeyCode::Char('q'))), Some(Wish::Leave));
}

#[test]
fn the_choice_follows_its_vm() {
    let mut screen = seen();
    screen.take(key(KeyCode::Down));
    let vms = vec![vm("new", 9, None), vm("a", 1, None), vm("a-1", 2, Some(("a", 1)))];
    let all = |vms| News::Figures(Figures { vms, ..Figures::default() });
    assert_eq!(screen.take(all(vms)), None);
    assert_eq!(screen.chosen_name().as_deref(), Some("a-1"));
    assert_eq!(screen.take(all(vec![vm("a", 1, None)])), Some(Wish::Look), "it is gone");
    assert_eq!(screen.chosen_name().as_deref(), Some("a"));
    assert_eq!(screen.take(all(Vec::new())), None);
    assert_eq!(screen.take(key(KeyCode::Char('f'))), None);
    assert!(drawn(&screen, (80, 24)).iter().any(|line| line.contains("no vm")));
}
