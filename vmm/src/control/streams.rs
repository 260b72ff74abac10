//! Answers that go on: a console's output, and what happens.
//!
//! A task feeds each; it ends with its source, or when the client has gone.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::mpsc::{self, Sender};
use tokio::sync::watch;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};
use tokio_stream::wrappers::ReceiverStream;

use super::console::Follower;
use super::events::{Event, What};
use super::service::Service;
use crate::board::BufferCounts;
use crate::family::VmId;

/// How often those who listen are told how far publication is, and what is pinned.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// All that a console has and will have.
pub(super) fn console(mut follower: Follower) -> Body {
    let (sender, chunks) = mpsc::channel::<io::Result<Bytes>>(1);
    tokio::spawn(async move {
        loop {
            let next = tokio::select! {
                next = follower.next() => next,
                () = sender.closed() => return,
            };
            let Some(chunk) = next.transpose() else { return };
            if sender.send(chunk.map(Bytes::from)).await.is_err() {
                return;
            }
        }
    });
    Body::from_stream(ReceiverStream::new(chunks))
}

/// All that happens from now on.
pub(super) fn events(service: Arc<Service>, listener: broadcast::Receiver<Event>) -> Body {
    let (sender, lines) = mpsc::channel::<Result<Bytes, Infallible>>(1);
    tokio::spawn(async move {
        tokio::select! {
            () = tell(&service, listener, &sender) => {}
            () = sender.closed() => {}
        }
    });
    Body::from_stream(ReceiverStream::new(lines))
}

type Lines = Sender<Result<Bytes, Infallible>>;

async fn tell(service: &Arc<Service>, mut listener: broadcast::Receiver<Event>, lines: &Lines) {
    let mut pins = Pins::new(service).await;
    if !send(lines, &service.registry.events().aside(What::Listening)).await {
        return;
    }
    // Ticks only while something is being published.
    let mut ticks = Some(progress_ticks());
    loop {
        let event = tokio::select! {
            event = listener.recv() => event,
            () = next(&mut ticks) => {
                if !tell_progress(service, lines).await {
                    ticks = None;
                }
                continue;
            }
            () = pins.change() => {
                if !pins.tell(service, lines).await {
                    return;
                }
                continue;
            }
        };
        let event = match event {
            Ok(event) => event,
            Err(RecvError::Lagged(events)) => service.registry.events().aside(What::Missed { events }),
            Err(RecvError::Closed) => return,
        };
        if matches!(event.what, What::Forked { .. }) {
            ticks = Some(progress_ticks());
        }
        if !send(lines, &event).await {
            return;
        }
    }
}

/// What one who listens knows of the VMs' buffers.
struct Pins {
    changes: watch::Receiver<u64>,
    known: BTreeMap<VmId, BufferCounts>,
    /// Not told before that.
    next: Instant,
}

impl Pins {
    /// What was pinned before is no news.
    async fn new(service: &Arc<Service>) -> Self {
        let changes = service.registry.events().watch_pins();
        Self { changes, known: counts(service).await, next: Instant::now() }
    }

    /// Waits until something has changed and may be told.
    async fn change(&mut self) {
        if self.changes.changed().await.is_err() {
            return std::future::pending().await;
        }
        // Dropped while it sleeps, it would forget the change.
        self.changes.mark_changed();
        tokio::time::sleep_until(self.next).await;
        self.changes.mark_unchanged();
    }

    /// Tells what has changed; false: the client has gone.
    async fn tell(&mut self, service: &Arc<Service>, lines: &Lines) -> bool {
        self.next = Instant::now() + PROGRESS_EVERY;
        let before = std::mem::replace(&mut self.known, counts(service).await);
        for (vm, now) in &mut self.known {
            let old = before.get(vm).copied().unwrap_or_default();
            let (registered, unregistered) = now.since(&old);
            if registered == 0 && unregistered == 0 {
                continue;
            }
            let Some(entry) = service.registry.of(*vm) else {
                // A clone that has no name yet: it is told of when it has.
                *now = old;
                self.changes.mark_changed();
                continue;
            };
            // Its end says enough.
            if !entry.state.is_live() {
                continue;
            }
            let (buffers, pages) = now.held();
            let what = What::Pins { vm: entry.named(), registered, unregistered, buffers, pages };
            if !send(lines, &service.registry.events().aside(what)).await {
                return false;
            }
        }
        true
    }
}

/// The buffers of all VMs; none: the colony is ending.
async fn counts(service: &Arc<Service>) -> BTreeMap<VmId, BufferCounts> {
    let service = Arc::clone(service);
    let look = move || service.with_colony(|colony| Ok(colony.take_buffers()));
    tokio::task::spawn_blocking(look).await.ok().and_then(Result::ok).unwrap_or_default()
}

fn progress_ticks() -> Interval {
    let mut ticks = interval(PROGRESS_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Waits for the next tick; for ever where there is none.
async fn next(ticks: &mut Option<Interval>) {
    match ticks {
        Some(ticks) => drop(ticks.tick().await),
        None => std::future::pending().await,
    }
}

/// Says how far publication is; false: there is nothing to publish.
async fn tell_progress(service: &Arc<Service>, lines: &Lines) -> bool {
    let for_look = Arc::clone(service);
    let backlog = tokio::task::spawn_blocking(move || for_look.backlog()).await;
    let Ok(Ok(backlog)) = backlog else { return false };
    let is_any = !backlog.is_empty();
    for what in backlog {
        if !send(lines, &service.registry.events().aside(what)).await {
            return false;
        }
    }
    is_any
}

/// False: the client has gone.
async fn send(lines: &Lines, event: &Event) -> bool {
    match serde_json::to_vec(event) {
        Ok(mut line) => {
            line.push(b'\n');
            lines.send(Ok(Bytes::from(line))).await.is_ok()
        }
        Err(error) => {
            tracing::error!(%error, "an event cannot be told");
            true
        }
    }
}
