//! `salp top`: the families, what each VM uses, the chosen VM's memory as a heat map, and what happens, as
//! it happens.
//!
//! | part | what |
//! |---|---|
//! | [`feed`] | threads that find out, each with a channel to the main thread; one a second asks, the others wait |
//! | [`screen`] | what is known and chosen: changed by news alone, and free of input and output |
//! | [`draw`] | a screen on a terminal of any size |
//!
//! The terminal is what it was after any end but SIGKILL: when this ends, at signals, and in a panic.

mod draw;
mod feed;
mod screen;
#[cfg(test)]
mod tests;

use std::io::{self, IsTerminal as _};
use std::process::ExitCode;
use std::sync::mpsc::channel;

use ratatui::DefaultTerminal;

use self::feed::{Feed, News};
use self::screen::{Screen, Wish};
use super::interrupt;

/// `salp top`.
///
/// # Errors
/// There is no terminal, or it refused.
pub fn top() -> io::Result<ExitCode> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        let why = "`salp top` needs a terminal: `salp ps --watch` and `salp stats` do not";
        return Err(io::Error::other(why));
    }
    let (sender, news) = channel();
    let feed = Feed::start(sender)?;
    // It also sees to it that a panic restores the terminal first.
    let mut terminal = Restored(ratatui::try_init()?);
    let mut screen = Screen::default();
    while let Ok(one) = news.recv() {
        let mut next = Some(one);
        // All that has come meanwhile is shown at once.
        while let Some(one) = next {
            if let News::Signal(number) = one {
                return Ok(ExitCode::from(interrupt::status(number)));
            }
            match screen.take(one) {
                Some(Wish::Leave) => return Ok(ExitCode::SUCCESS),
                Some(Wish::Act(action, name)) => feed.act(action, name)?,
                Some(Wish::Look) => feed.look(screen.chosen_name()),
                None => {}
            }
            next = news.try_recv().ok();
        }
        terminal.0.draw(|frame| draw::draw(frame, &screen))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The terminal, which becomes what it was.
struct Restored(DefaultTerminal);

impl Drop for Restored {
    fn drop(&mut self) {
        ratatui::restore();
    }
}
