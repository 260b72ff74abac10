//! A [`Screen`] on a terminal: the families above, the chosen VM's memory and what happens below. From
//! [`WIDE`] columns on the last two stand side by side.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line as Text, Span};
use ratatui::widgets::{Block, Borders, Cell as TableCell, LineGauge, Paragraph, Row, Table, TableState};

use super::screen::{Line, Publication, Screen};
use crate::cli::inspect::megabytes;
use crate::cli::map::cell::{Cell, merged};
use crate::cli::size;
use crate::control::VmState;
use crate::control::resources::MemoryView;

/// From so many columns on map and events stand side by side.
const WIDE: u16 = 120;
/// Columns of the map's addresses.
const ADDRESS: u16 = 7;
/// Leaves of a line of the map are a multiple of this.
const STEP: u16 = 32;
/// Lines of events where they stand below the map.
const EVENT_LINES: u16 = 5;

const KEYS: &str = "↑↓ choose  f fork  p pause/resume  r reset  s stop  q leave";

/// See the module.
pub(super) fn draw(frame: &mut Frame<'_>, screen: &Screen) {
    let is_publishing = u16::from(!screen.publications.is_empty());
    let vms = u16::try_from(screen.lines.len()).unwrap_or(u16::MAX).saturating_add(2);
    let most = (frame.area().height / 2).max(4);
    let parts = [
        Constraint::Length(1),
        Constraint::Length(vms.clamp(4, most)),
        Constraint::Min(4),
        Constraint::Length(is_publishing),
        Constraint::Length(1),
    ];
    let [title, families, below, progress, keys] = Layout::vertical(parts).areas(frame.area());
    frame.render_widget(Paragraph::new(headline(screen)).style(bold()), title);
    draw_families(frame, screen, families);
    let [map, events] = if below.width >= WIDE {
        Layout::horizontal([Constraint::Percentage(60), Constraint::Percentage(40)]).areas(below)
    } else {
        Layout::vertical([Constraint::Min(4), Constraint::Length(EVENT_LINES)]).areas(below)
    };
    draw_map(frame, screen, map);
    draw_events(frame, screen, events);
    if let Some(publication) = screen.publications.values().next_back() {
        draw_progress(frame, *publication, progress);
    }
    let text = match &screen.question {
        Some(name) => Text::from(format!("stop {name}? y: yes, any other key: no")).style(bold()),
        None => Text::from(KEYS).style(faint()),
    };
    frame.render_widget(text, keys);
}

fn bold() -> Style {
    Style::new().add_modifier(Modifier::BOLD)
}

fn faint() -> Style {
    Style::new().add_modifier(Modifier::DIM)
}

fn headline(screen: &Screen) -> String {
    if !screen.has_figures {
        return "salp top".to_owned();
    }
    let live = || screen.lines.iter().filter(|line| line.vm.state.is_live());
    let mut colonies: Vec<_> = screen.lines.iter().map(|line| line.vm.keeper_pid).collect();
    colonies.sort_unstable();
    colonies.dedup();
    let sum = |of: fn(&Line) -> u64| live().map(of).sum::<u64>();
    let unique = sum(|line| line.stats.as_ref().map_or(0, |stats| stats.unique_bytes));
    let all = sum(|line| line.vm.memory_bytes);
    format!(
        "salp top  {} of {} vms live in {} {}, {} of memory, {} of it unique",
        live().count(),
        screen.lines.len(),
        colonies.len(),
        if colonies.len() == 1 { "colony" } else { "colonies" },
        size::show(all),
        megabytes(unique)
    )
}

fn draw_families(frame: &mut Frame<'_>, screen: &Screen, area: Rect) {
    if screen.has_figures && screen.lines.is_empty() {
        let text = "no vm: `salp run --detach` starts one";
        frame.render_widget(Paragraph::new(text).block(Block::new().borders(Borders::TOP)), area);
        return;
    }
    let head = ["NAME", "STATE", "CPU%", "VCPUS%", "UNIQUE", "SHARED", "LENT", "PINNED"];
    let widths = [
        Constraint::Fill(3),
        Constraint::Fill(2),
        Constraint::Length(5),
        Constraint::Length(10),
        Constraint::Length(9),
        Constraint::Length(9),
        Constraint::Length(7),
        Constraint::Length(6),
    ];
    let rows = screen.lines.iter().map(family_row);
    let table = Table::new(rows, widths)
        .header(Row::new(head).style(bold()))
        .block(Block::new().borders(Borders::TOP))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    let mut state = TableState::new().with_selected((!screen.lines.is_empty()).then_some(screen.chosen));
    frame.render_stateful_widget(table, area, &mut state);
}

fn family_row(line: &Line) -> Row<'static> {
    let style = match &line.vm.state {
        VmState::Running => Style::new(),
        VmState::Paused => Style::new().fg(Color::Yellow),
        VmState::Stopped | VmState::Ended { .. } => faint(),
    };
    let of = |text: fn(&crate::control::resources::StatsView) -> String| {
        line.stats.as_ref().map_or_else(|| "-".to_owned(), text)
    };
    let (cpu, vcpus) = match line.load.split_last() {
        Some((all, vcpus)) => {
            let each: Vec<_> = vcpus.iter().map(u64::to_string).collect();
            (all.to_string(), each.join(" "))
        }
        None => ("-".to_owned(), "-".to_owned()),
    };
    let cells = [
        format!("{}{}", line.lead, line.vm.name),
        line.vm.state.describe(),
        cpu,
        vcpus,
        of(|stats| megabytes(stats.unique_bytes)),
        of(|stats| megabytes(stats.shared_bytes)),
        of(|stats| stats.pages.lent.to_string()),
        of(|stats| stats.pages.pinned.to_string()),
    ];
    Row::new(cells.map(TableCell::from)).style(style)
}

fn draw_map(frame: &mut Frame<'_>, screen: &Screen, area: Rect) {
    let title = match (&screen.memory, screen.chosen_name()) {
        (Some(memory), Some(name)) => {
            let show = |pages: u64| size::show(pages * memory.page_bytes);
            let pages = memory.pages;
            format!(
                " {name}: exclusive {}  lent {}  shared {}  zero {}  pinned {} ",
                show(pages.exclusive),
                show(pages.lent),
                show(pages.shared),
                show(pages.zero),
                pages.pinned
            )
        }
        (None, Some(name)) => format!(" {name} "),
        (_, None) => String::new(),
    };
    let block = Block::new().borders(Borders::TOP).title(title);
    let inner = block.inner(area);
    frame.render_widget(block, area);
    if let Some(memory) = &screen.memory {
        frame.render_widget(Paragraph::new(map_lines(memory, inner)), inner);
    }
}

/// One cell a leaf, or for so many leaves that all have room; the last line says what they mean.
fn map_lines(memory: &MemoryView, area: Rect) -> Vec<Text<'static>> {
    let columns = usize::from((area.width.saturating_sub(ADDRESS) / STEP).max(1) * STEP);
    let lines = usize::from(area.height.saturating_sub(1).max(1));
    let leaves = memory.leaves.len();
    let cell_leaves = leaves.div_ceil(columns * lines).max(1).next_power_of_two();
    let cells: Vec<_> = memory.leaves.chunks(cell_leaves).filter_map(merged).collect();
    let mut text: Vec<_> = cells
        .chunks(columns)
        .map(|line| {
            let address = u64::from(line.first().map_or(0, |leaf| leaf.leaf)) * memory.leaf_bytes;
            let head = Span::styled(format!("{:>5}  ", size::show(address)), faint());
            Text::from_iter(std::iter::once(head).chain(line.iter().map(|leaf| span(Cell::of(leaf)))))
        })
        .collect();
    let legend = format!(
        "a cell is {}: ▁-█ own  ▒ lent  1-9+ shared by  P pinned  · zero  X lost",
        size::show(memory.leaf_bytes * crate::words::wide(cell_leaves))
    );
    text.push(Text::from(legend).style(faint()));
    text
}

fn span(cell: Cell) -> Span<'static> {
    let style = Style::new().fg(Color::Indexed(cell.fore.index)).bg(Color::Indexed(cell.back.index));
    Span::styled(cell.glyph.to_string(), style)
}

fn draw_events(frame: &mut Frame<'_>, screen: &Screen, area: Rect) {
    let block = Block::new().borders(Borders::TOP).title(" events ");
    let inner = block.inner(area);
    let first = screen.events.len().saturating_sub(inner.height.into());
    let lines: Vec<_> = screen.events.iter().skip(first).map(|line| Text::from(line.as_str())).collect();
    frame.render_widget(Paragraph::new(lines).block(block), area);
}

fn draw_progress(frame: &mut Frame<'_>, publication: Publication, area: Rect) {
    let Publication { fork, pending, all } = publication;
    let done = all.saturating_sub(pending);
    let ratio = if all == 0 { 1.0 } else { done as f64 / all as f64 };
    let gauge = LineGauge::default()
        .label(format!("publishing fork {fork}: {done} of {all} leaves"))
        .filled_style(Style::new().fg(Color::Green))
        .ratio(ratio.clamp(0.0, 1.0));
    frame.render_widget(gauge, area);
}
