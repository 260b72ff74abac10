//! How far a benchmark is: a line that moves on a terminal, else a line for each part.

use std::cell::RefCell;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::bench::Progress;

/// How often the moving line moves where nothing happens.
const TICK: Duration = Duration::from_millis(200);

/// See the module.
pub(super) struct Display {
    bar: Option<ProgressBar>,
    part: RefCell<Part>,
}

/// What is measured now.
struct Part {
    title: String,
    begun: Instant,
    runs: u64,
}

impl Display {
    pub(super) fn new() -> Self {
        let style = ProgressStyle::with_template("{spinner} {bar:24} {pos}/{len}  {elapsed_precise}  {msg}");
        // The template is a constant: without it there is a plainer line.
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(0).with_style(style));
        if let Some(bar) = &bar {
            bar.enable_steady_tick(TICK);
        }
        let part = Part { title: String::new(), begun: Instant::now(), runs: 0 };
        Self { bar, part: RefCell::new(part) }
    }

    /// Shows what has happened.
    pub(super) fn show(&self, progress: Progress<'_>) {
        let mut part = self.part.borrow_mut();
        match progress {
            Progress::Begin(cells) => {
                if let Some(bar) = &self.bar {
                    bar.set_length(u64::try_from(cells).unwrap_or(u64::MAX));
                }
            }
            Progress::Cell(title) => {
                self.leave(&part);
                *part = Part { title: title.to_owned(), begun: Instant::now(), runs: 0 };
                if self.bar.is_none() {
                    eprintln!("salp: {title}");
                }
            }
            Progress::Run => part.runs += 1,
            Progress::Skipped(text) => match &self.bar {
                Some(bar) => bar.println(format!("salp: SKIPPED: {text}")),
                None => eprintln!("salp: SKIPPED: {text}"),
            },
        }
        if let (Some(bar), false) = (&self.bar, part.title.is_empty()) {
            bar.set_message(format!("{}: {} runs", part.title, part.runs));
        }
    }

    /// What is done stays above the line that moves.
    fn leave(&self, part: &Part) {
        if let (Some(bar), false) = (&self.bar, part.title.is_empty()) {
            let seconds = part.begun.elapsed().as_secs_f64();
            bar.inc(1);
            bar.println(format!("salp: {}: {} runs, {seconds:.1} s", part.title, part.runs));
        }
    }

    /// Nothing more will happen.
    pub(super) fn end(&self) {
        self.leave(&self.part.borrow());
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
