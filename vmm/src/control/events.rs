//! What happens in a colony, for those who listen: `GET /v1/events`, one JSON object a line.
//!
//! Whoever reads too slowly is told how many events were missed. With nobody listening an event costs
//! a lock and a number; with nothing happening nobody wakes.
//!
//! # Pins
//! Each transfer pins, so a guest can pin as often as it likes: only pins that are meant to last are told of,
//! those of registered buffers, and of each VM how many there were in a tenth of a second, not each. Members
//! count them on the board, and say that they did when the keeper has looked since; it looks for those who
//! listen, and not more often than they are told. So a guest that registers for ever costs its keeper one
//! message while nobody listens, and ten a second for each who does.

use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::{broadcast, watch};
use utoipa::ToSchema;

use super::{VmState, lock};

/// Events that one who listens may be behind.
const MOST_BEHIND: usize = 1024;

/// Something that has happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Its number: each event of a colony has the next one, from 1.
    pub number: u64,
    /// When, in milliseconds of Unix time.
    pub at_unix_ms: u64,
    /// What.
    #[serde(flatten)]
    pub what: What,
}

/// A VM that an event is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EventVm {
    /// Its name.
    pub name: String,
    /// Its number in its colony.
    pub id: u64,
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase", tag = "event")]
pub enum What {
    /// The first that one who listens is told: nothing that happens from here on is missed.
    Listening,
    /// A VM began that is no clone.
    Started {
        /// Which.
        vm: EventVm,
    },
    /// Clones of a VM began.
    Forked {
        /// The VM that was cloned.
        vm: EventVm,
        /// The number of the fork in its colony; further clones of a VM that stands still may have the
        /// same.
        fork: u64,
        /// The clones.
        clones: Vec<EventVm>,
        /// How long the source stood still, in microseconds.
        pause_us: f64,
        /// Pages that devices held: they were copied in the pause.
        pinned_pages: u64,
    },
    /// How far what a VM shares with its clones is published, while it is: leaves (2 MiB) that are not
    /// yet.
    Publishing {
        /// Number of the fork.
        fork: u64,
        /// Leaves to go.
        pending_leaves: u64,
    },
    /// All that a VM shares with the clones of this fork is published.
    Published {
        /// The VM that was cloned.
        vm: EventVm,
        /// Number of the fork.
        fork: u64,
    },
    /// A VM's devices were given buffers for long, whose pages are pinned, or gave some up; or its devices
    /// began again, at a fork or reset. Transfers that use a buffer which was given up keep it pinned until
    /// they are over.
    Pins {
        /// Which.
        vm: EventVm,
        /// Buffers registered since the last such event of this VM.
        registered: u32,
        /// Buffers unregistered since then.
        unregistered: u32,
        /// Buffers that are registered now.
        buffers: u32,
        /// Their pages.
        pages: u32,
    },
    /// A user has paused a VM.
    Paused {
        /// Which.
        vm: EventVm,
    },
    /// A user has let a paused VM go on.
    Resumed {
        /// Which.
        vm: EventVm,
    },
    /// A clone has returned to its cut.
    Reset {
        /// Which.
        vm: EventVm,
    },
    /// A VM has ended, or was stopped.
    Ended {
        /// Which.
        vm: EventVm,
        /// In which way.
        #[serde(flatten)]
        state: VmState,
    },
    /// A VM that has ended is not listed any more.
    Removed {
        /// Which.
        vm: EventVm,
    },
    /// Whoever listens was too slow.
    Missed {
        /// How many events were not sent.
        events: u64,
    },
}

impl What {
    /// The VM and the fork that it is about.
    fn about(&self) -> (Option<&EventVm>, Option<u64>) {
        match self {
            Self::Forked { vm, fork, .. } | Self::Published { vm, fork } => (Some(vm), Some(*fork)),
            Self::Publishing { fork, .. } => (None, Some(*fork)),
            Self::Started { vm }
            | Self::Pins { vm, .. }
            | Self::Paused { vm }
            | Self::Resumed { vm }
            | Self::Reset { vm }
            | Self::Ended { vm, .. }
            | Self::Removed { vm } => (Some(vm), None),
            Self::Listening | Self::Missed { .. } => (None, None),
        }
    }

    /// Says it in the log, with the VM and the fork as fields.
    fn log(&self) {
        let (vm, fork) = self.about();
        let (name, id) = (vm.map(|vm| vm.name.as_str()), vm.map(|vm| vm.id));
        tracing::info!(vm = name, id, fork, what = ?self, "event");
    }
}

/// Where events come from and go to.
#[derive(Debug)]
pub struct Hub {
    /// None: the colony is ending.
    sender: Mutex<Option<broadcast::Sender<Event>>>,
    last: Mutex<u64>,
    /// How often some VM's buffers have changed.
    pins: watch::Sender<u64>,
}

impl Default for Hub {
    fn default() -> Self {
        Self {
            sender: Mutex::new(Some(broadcast::Sender::new(MOST_BEHIND))),
            last: Mutex::new(0),
            pins: watch::Sender::default(),
        }
    }
}

impl Hub {
    /// Tells all who listen. In the order of the numbers.
    pub fn tell(&self, what: What) {
        what.log();
        let mut last = lock(&self.last);
        *last += 1;
        let event = Event { number: *last, at_unix_ms: now_unix_ms(), what };
        if let Some(sender) = &*lock(&self.sender) {
            // Nobody may be listening.
            let _ = sender.send(event);
        }
    }

    /// All that happens from now on; none: the colony is ending.
    #[must_use]
    pub fn listen(&self) -> Option<broadcast::Receiver<Event>> {
        lock(&self.sender).as_ref().map(broadcast::Sender::subscribe)
    }

    /// Some VM's buffers have changed.
    pub fn note_pins(&self) {
        self.pins.send_modify(|changes| *changes = changes.wrapping_add(1));
    }

    /// For those who want to know when buffers have changed.
    #[must_use]
    pub fn watch_pins(&self) -> watch::Receiver<u64> {
        self.pins.subscribe()
    }

    /// Nothing more will happen.
    pub fn close(&self) {
        lock(&self.sender).take();
    }

    /// An event for one listener alone: it has the number of the last that all were told.
    #[must_use]
    pub fn aside(&self, what: What) -> Event {
        Event { number: *lock(&self.last), at_unix_ms: now_unix_ms(), what }
    }
}

/// Now, in milliseconds of Unix time.
pub(super) fn now_unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(name: &str) -> What {
        What::Started { vm: EventVm { name: name.to_owned(), id: 1 } }
    }

    #[test]
    fn events_come_in_order_until_the_hub_is_closed() {
        let hub = Hub::default();
        hub.tell(started("unheard"));
        let mut listener = hub.listen().expect("it is open");
        hub.tell(started("a"));
        hub.close();
        let event = listener.blocking_recv().expect("one came");
        assert_eq!((event.number, event.what), (2, started("a")));
        assert!(listener.blocking_recv().is_err() && hub.listen().is_none());
    }

    #[test]
    fn an_event_is_one_flat_object() {
        let vm = EventVm { name: "a".to_owned(), id: 1 };
        let event = Event { number: 1, at_unix_ms: 2, what: What::Ended { vm, state: VmState::Stopped } };
        let text = serde_json::to_string(&event).expect("it is json");
        let vm = r#""vm":{"name":"a","id":1}"#;
        assert_eq!(text, format!(r#"{{"number":1,"at_unix_ms":2,"event":"ended",{vm},"state":"stopped"}}"#));
        assert_eq!(serde_json::from_str::<Event>(&text).expect("it is one"), event);
    }
}
