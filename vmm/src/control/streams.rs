//! Answers that go on: a console's output, and what happens.
//!
//! A task feeds each; it ends with its source, or when the client has gone.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::mpsc::{self, Sender};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_stream::wrappers::ReceiverStream;

use super::console::Follower;
use super::events::{Event, What};
use super::service::Service;

/// How often those who listen are told how far publication is.
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
