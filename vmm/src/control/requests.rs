//! The colony's end of the control socket: connections, routes, answers.

use std::io::{self, BufReader, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;

use super::http::{self, Request};
use super::registry::{Entry, Happening};
use super::service::{Service, Work};
use super::{
    CloneView, ControlError, ForkReply, ForkRequest, InputReply, MOST_CLONES, Problem, ResetStages,
    ResetView, StateRequest, StopReply, VmList, VmState, VmView, WantedState, lock,
};
use crate::family::{FamilyError, VmId};
use crate::keeper::spec::ForkSpec;
use crate::keeper::{Colony, ColonyError};
use crate::member::messages::ResetReply;

/// How long a client may take to say what it wants.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// How long a list may wait for VMs that are looked at.
const LOOK_LIMIT: Duration = Duration::from_millis(500);
/// How long console input may wait for room.
const ROOM_LIMIT: Duration = Duration::from_secs(1);
/// Connections served at one time.
const MOST_CONNECTIONS: usize = 256;
/// How long to wait where the host has no descriptor left.
const REFUSED_PAUSE: Duration = Duration::from_millis(100);

/// Serves connections for as long as the process lives.
pub(super) fn accept(service: &Arc<Service>, listener: &UnixListener) {
    for stream in listener.incoming() {
        let accepted = stream.and_then(|stream| {
            let work = Work::begin(service);
            if *lock(&service.working) > MOST_CONNECTIONS {
                return refuse(&stream, &ControlError::Ending);
            }
            let service = Arc::clone(service);
            std::thread::Builder::new().name("client".to_owned()).spawn(move || {
                if let Err(error) = serve(&service, &stream) {
                    tracing::debug!(%error, "a client has gone");
                }
                drop(stream);
                drop(work);
            })?;
            Ok(())
        });
        if let Err(error) = accepted {
            tracing::warn!(%error, "a client cannot be served");
            std::thread::sleep(REFUSED_PAUSE);
        }
    }
}

fn serve(service: &Service, stream: &UnixStream) -> io::Result<()> {
    let peer = rustix::net::sockopt::socket_peercred(stream)?.uid;
    if peer != rustix::process::geteuid() && !peer.is_root() {
        let detail = format!("this colony is not one of user {}", peer.as_raw());
        return http::write_problem(&mut &*stream, &described(403, "not-yours", detail));
    }
    stream.set_read_timeout(Some(REQUEST_LIMIT))?;
    let request = match http::read_request(&mut BufReader::new(stream)) {
        Ok(Some(request)) => request,
        Ok(None) => return Ok(()),
        Err(error) => return refuse(stream, &error),
    };
    match route(service, stream, &request) {
        Err(RouteError::Control(error)) => refuse(stream, &error),
        Err(RouteError::Problem(problem)) => http::write_problem(&mut &*stream, &problem),
        Err(RouteError::Connection(error)) => Err(error),
        Ok(()) => Ok(()),
    }
}

/// Why a request was not answered as it wished.
enum RouteError {
    Control(ControlError),
    Problem(Problem),
    /// Nobody is there to be told.
    Connection(io::Error),
}

impl From<ControlError> for RouteError {
    fn from(error: ControlError) -> Self {
        Self::Control(error)
    }
}

impl From<io::Error> for RouteError {
    fn from(error: io::Error) -> Self {
        Self::Connection(error)
    }
}

fn route(service: &Service, stream: &UnixStream, request: &Request) -> Result<(), RouteError> {
    let mut out = stream;
    let parts: Vec<_> = request.path.split('/').skip(1).collect();
    match (request.method.as_str(), parts.as_slice()) {
        ("GET", ["v1", "vms"]) => {
            service.look();
            let vms = service.registry.all().iter().map(|entry| service.view(entry)).collect();
            Ok(http::write_json(&mut out, 200, &VmList { vms })?)
        }
        ("GET", ["v1", "vms", name]) => {
            service.look();
            let entry = service.registry.find(name)?;
            Ok(http::write_json(&mut out, 200, &service.view(&entry))?)
        }
        ("GET", ["v1", "vms", name, "console"]) => {
            let console = service.registry.find(name)?.console;
            http::write_stream_head(&mut out)?;
            Ok(console.follow(&mut out, Some(stream.as_fd()))?)
        }
        ("PATCH", ["v1", "vms", name]) => {
            let entry = service.set_state(name, parse(&request.body)?)?;
            Ok(http::write_json(&mut out, 200, &service.view(&entry))?)
        }
        ("POST", ["v1", "vms", name, "reset"]) => Ok(http::write_json(&mut out, 200, &service.reset(name)?)?),
        ("POST", ["v1", "vms", name, "fork"]) => {
            let clones = service.fork(name, &parse(&request.body)?)?;
            Ok(http::write_json(&mut out, 201, &ForkReply { clones })?)
        }
        ("POST", ["v1", "vms", name, "stop"]) => {
            let reply = service.stop(name)?;
            let answered = http::write_json(&mut out, 200, &reply);
            if reply.is_colony_ending {
                lock(&service.farewells).push(stream.try_clone()?);
            }
            // After the connection is kept: the main thread may end everything at once.
            service.registry.tell(Happening::Ended(None));
            Ok(answered?)
        }
        ("POST", ["v1", "vms", name, "console"]) => {
            let accepted_bytes = service.input(name, &request.body)?;
            Ok(http::write_json(&mut out, 200, &InputReply { accepted_bytes })?)
        }
        (_, ["v1", "vms"] | ["v1", "vms", _] | ["v1", "vms", _, "console" | "fork" | "reset" | "stop"]) => {
            let detail = format!("{} cannot be done with {}", request.method, request.path);
            Err(RouteError::Problem(described(405, "wrong-method", detail)))
        }
        _ => {
            let detail = format!("there is nothing at {}", request.path);
            Err(RouteError::Problem(described(404, "unknown-path", detail)))
        }
    }
}

impl Service {
    fn view(&self, entry: &Entry) -> VmView {
        VmView {
            name: entry.name.clone(),
            id: entry.vm.0.into(),
            parent: entry.parent.clone(),
            state: entry.state.clone(),
            memory_bytes: self.memory_bytes,
            cpus: self.cpus,
            pid: entry.state.is_live().then_some(entry.pid),
            keeper_pid: std::process::id(),
            console: entry.console.path().to_owned(),
        }
    }

    /// Finds out which guests have halted.
    fn look(&self) {
        if let Some(colony) = &*self.colony.read().unwrap_or_else(PoisonError::into_inner) {
            colony.look_for_ends(LOOK_LIMIT);
        }
    }

    fn with_colony<T>(
        &self,
        act: impl FnOnce(&Colony) -> Result<T, ControlError>,
    ) -> Result<T, ControlError> {
        let colony = self.colony.read().unwrap_or_else(PoisonError::into_inner);
        act(colony.as_ref().ok_or(ControlError::Ending)?)
    }

    fn fork(&self, name: &str, request: &ForkRequest) -> Result<Vec<CloneView>, ControlError> {
        let source = self.registry.find_live(name)?;
        let count =
            usize::try_from(request.count).ok().filter(|_| (1..=MOST_CLONES).contains(&request.count));
        let count = count.ok_or(ControlError::Count(request.count))?;
        let result =
            self.under_way(|| self.with_colony(|colony| self.fork_in(colony, &source, request, count)));
        match result {
            // It ended, which says more.
            Err(ControlError::Colony(
                ColonyError::NoVm(_) | ColonyError::Died(_) | ColonyError::Refused { .. },
            )) => {
                self.registry.find_live(name)?;
                result
            }
            result => result,
        }
    }

    /// Does what makes VMs run: the colony does not end meanwhile.
    fn under_way<T>(&self, act: impl FnOnce() -> T) -> T {
        *lock(&self.under_way) += 1;
        let result = act();
        *lock(&self.under_way) -= 1;
        // All may have ended meanwhile, and the colony waited for this.
        self.registry.tell(Happening::Ended(None));
        result
    }

    /// Pauses a VM or lets it go on; one that does so already stays as it is.
    fn set_state(&self, name: &str, request: StateRequest) -> Result<Entry, ControlError> {
        let vm = self.registry.find_live(name)?.vm;
        let result = self.with_colony(|colony| {
            let result = match request.state {
                WantedState::Paused => colony.pause(vm),
                WantedState::Running => colony.resume(vm),
            };
            // Also after a failure. One that is gone is not paused.
            self.registry.note_pause(vm, || colony.is_paused(vm).unwrap_or(false));
            Ok(result?)
        });
        // That it has ended meanwhile says more than any error.
        let entry = self.registry.find_live(name)?;
        result.map(|()| entry)
    }

    /// Returns a clone to its cut, also one whose guest has ended.
    fn reset(&self, name: &str) -> Result<ResetView, ControlError> {
        let entry = self.registry.find(name)?;
        if entry.state == VmState::Stopped {
            return Err(self.not_running(entry));
        }
        let result = self.under_way(|| {
            self.with_colony(|colony| {
                self.take_kept(entry.vm);
                let result = colony.reset(entry.vm);
                // Also if its end was noted in between.
                self.take_kept(entry.vm);
                Ok(result?)
            })
        });
        match result {
            Ok(reply) => Ok(reset_view(entry.name, &reply)),
            Err(ControlError::Colony(ColonyError::Family(FamilyError::NoOrigin(_)))) => {
                let reason = "it is no clone, so that there is no cut to return to".to_owned();
                Err(ControlError::NotResettable { name: entry.name, reason })
            }
            Err(ControlError::Colony(ColonyError::Refused { reason, .. })) => {
                Err(ControlError::NotResettable { name: entry.name, reason })
            }
            Err(ControlError::Colony(ColonyError::NoVm(_) | ColonyError::Died(_))) => {
                Err(self.not_running(self.registry.find(name)?))
            }
            Err(error) => Err(error),
        }
    }

    /// A clone that has ended is not to be kept any more. Returns whether it was.
    fn take_kept(&self, vm: VmId) -> bool {
        let mut kept = lock(&self.kept);
        let at = kept.iter().position(|other| *other == vm);
        at.and_then(|at| kept.remove(at)).is_some()
    }

    fn not_running(&self, entry: Entry) -> ControlError {
        ControlError::NotRunning { how: entry.state.describe(), name: entry.name }
    }

    /// Gives a guest console input. Returns how much found room: a part at least, unless the guest reads
    /// nothing for a while.
    pub(super) fn input(&self, name: &str, input: &[u8]) -> Result<usize, ControlError> {
        let entry = self.registry.find_live(name)?;
        let given = self.give_input(entry.vm, input);
        if given.is_err() {
            // That it has ended says more.
            self.registry.find_live(name)?;
        }
        given
    }

    fn give_input(&self, vm: VmId, input: &[u8]) -> Result<usize, ControlError> {
        let member = self.with_colony(|colony| Ok(colony.member(vm)?))?;
        let give = || self.with_colony(|colony| Ok(colony.console_input(vm, input)?));
        let rooms = member.state().console_rooms;
        let accepted = give()?;
        if accepted > 0 || input.is_empty() {
            return Ok(accepted);
        }
        match member.wait_for(ROOM_LIMIT, |state| (state.console_rooms != rooms).then_some(())) {
            Ok(()) => give(),
            Err(ColonyError::Silent { .. }) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    fn fork_in(
        &self,
        colony: &Colony,
        source: &Entry,
        request: &ForkRequest,
        count: usize,
    ) -> Result<Vec<CloneView>, ControlError> {
        let names = self.claim_clones(&source.name, request.name.as_deref(), count)?;
        let consoles = self.create_consoles(&names)?;
        let mut spec = ForkSpec::plain(count);
        for (clone, name) in spec.clones.iter_mut().zip(&names) {
            clone.name = Some(name.clone());
        }
        let forked = match colony.fork_as(source.vm, &spec) {
            Ok(forked) => forked,
            Err(error) => {
                self.place.lock()?.release(&names);
                return Err(error.into());
            }
        };
        let paths: Vec<_> = consoles.iter().map(|(_, console)| console.path().to_owned()).collect();
        for (clone, console) in forked.clones.iter().zip(consoles) {
            self.add_clone(colony, clone.vm, &source.name, console);
        }
        let mut views = Vec::new();
        for ((clone, name), console) in forked.clones.iter().zip(names).zip(paths) {
            // One that has ended by now was forked all the same: its times are those that are known.
            let known =
                (us(forked.times.reserved, forked.times.resumed), us(forked.asked_at, clone.running_at));
            let (pause_us, call_us) = colony.fork_pause_and_call(&forked, clone).unwrap_or(known);
            views.push(CloneView { name, id: clone.vm.0.into(), pause_us, call_us, console });
        }
        Ok(views)
    }

    fn stop(&self, name: &str) -> Result<StopReply, ControlError> {
        let entry = self.registry.find(name)?;
        self.with_colony(|colony| {
            if !self.registry.end(entry.vm, VmState::Stopped) && !self.take_kept(entry.vm) {
                // It has ended by itself, and is not kept for a reset.
                self.registry.find_live(name)?;
            }
            match colony.end(entry.vm) {
                Ok(()) | Err(ColonyError::NoVm(_)) => {}
                Err(error) => return Err(error.into()),
            }
            let is_colony_ending = self.is_over(colony);
            Ok(StopReply { name: entry.name.clone(), is_colony_ending })
        })
    }
}

fn reset_view(name: String, reply: &ResetReply) -> ResetView {
    let times = &reply.times;
    ResetView {
        name,
        restored_pages: reply.figures.restored_pages,
        remapped_leaves: reply.figures.dropped_leaves,
        reset_us: us(times.begun, times.resumed),
        stages_us: ResetStages {
            stop: us(times.begun, times.stopped),
            drain: us(times.stopped, times.drained),
            memory: us(times.drained, times.restored),
            state: us(times.restored, times.set),
            resume: us(times.set, times.resumed),
        },
    }
}

fn us(from: u64, to: u64) -> f64 {
    Duration::from_nanos(to.saturating_sub(from)).as_secs_f64() * 1e6
}

/// A body in JSON; none at all is an object without fields.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ControlError> {
    let body = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(body).map_err(|error| ControlError::Protocol(error.to_string()))
}

fn described(status: u16, code: &str, detail: String) -> Problem {
    Problem { title: http::reason(status).to_owned(), status, detail, code: code.to_owned() }
}

fn refuse(mut stream: &UnixStream, error: &ControlError) -> io::Result<()> {
    let (status, code) = error.status();
    http::write_problem(&mut stream, &described(status, code, error.to_string()))?;
    stream.flush()
}
