//! The other end of the socket: what `salp fork`, `ps`, `pause`, `resume`, `reset`, `stop`, `console` and
//! the like do.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use axum::body::{Body, Bytes};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Method, Request, Response, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;

use super::config::VmConfig;
use super::events::Event;
use super::place::{Found, Place};
use super::resources::{ColonyView, MemoryView, RemoveReply, StatsView};
use super::{
    ControlError, ForkReply, ForkRequest, InputReply, Problem, ResetView, StateRequest, StopReply, VmList,
    VmView, WantedState,
};

/// How long the end of a colony may take after its last VM has been stopped.
const END_LIMIT: Duration = Duration::from_secs(30);

/// How long a keeper may take to say what it knows.
const LIST_LIMIT: Duration = Duration::from_secs(5);
/// How long a keeper may take to do something: its own limit for a VM is 60 s.
const ACT_LIMIT: Duration = Duration::from_secs(90);
/// The most input of one request.
const INPUT_BYTES: usize = 64 << 10;

/// All VMs of this user.
#[derive(Debug, Default)]
pub struct Everything {
    /// The VMs, colony by colony.
    pub vms: Vec<VmView>,
    /// The sockets of colonies that were killed; they are cleaned up.
    pub stale: Vec<String>,
    /// What VMs in the background have left that ended badly and alone; this is said once.
    pub last_words: Vec<String>,
    /// Keepers that do not answer: what is wrong.
    pub silent: Vec<ControlError>,
}

/// A user's view of all their colonies.
#[derive(Debug)]
pub struct Client {
    place: Place,
}

impl Client {
    /// For the colonies that have their sockets here.
    #[must_use]
    pub fn new(place: Place) -> Self {
        Self { place }
    }

    /// All VMs of all colonies.
    ///
    /// # Errors
    /// The directory of names cannot be used, or a colony gave no sensible answer.
    pub fn list(&self) -> Result<Everything, ControlError> {
        let mut all = Everything { last_words: self.place.take_last_words()?, ..Everything::default() };
        for socket in self.place.sockets()? {
            match self.place.connect(&socket)? {
                Found::Colony(stream) => match list_of(stream) {
                    Ok(list) => all.vms.extend(list.vms),
                    // It has ended in between.
                    Err(ControlError::Socket(_) | ControlError::Ending) => {}
                    Err(error @ ControlError::Silent { .. }) => all.silent.push(error),
                    Err(error) => return Err(error),
                },
                Found::Stale => all.stale.push(socket),
                Found::Nothing => {}
            }
        }
        Ok(all)
    }

    /// One VM.
    ///
    /// # Errors
    /// There is none of that name, or its colony gave no sensible answer.
    pub fn view(&self, name: &str) -> Result<VmView, ControlError> {
        self.connect(name)?.get(&vm_path(name, ""))
    }

    /// A VM's memory, leaf by leaf.
    ///
    /// # Errors
    /// There is none of that name, or what its colony said.
    pub fn memory(&self, name: &str) -> Result<MemoryView, ControlError> {
        self.connect(name)?.get(&vm_path(name, "/memory"))
    }

    /// What a VM uses and has done.
    ///
    /// # Errors
    /// There is none of that name, or what its colony said.
    pub fn stats(&self, name: &str) -> Result<StatsView, ControlError> {
        self.connect(name)?.get(&vm_path(name, "/stats"))
    }

    /// The colony that a VM is of.
    ///
    /// # Errors
    /// There is none of that name, or what its colony said.
    pub fn colony(&self, name: &str) -> Result<ColonyView, ControlError> {
        self.connect(name)?.get("/v1/colony")
    }

    /// Starts another VM in the colony of this one.
    ///
    /// # Errors
    /// There is none of that name, or what its colony said.
    pub fn start(&self, name: &str, config: &VmConfig) -> Result<VmView, ControlError> {
        self.connect(name)?.act(Method::POST, "/v1/vms", config)
    }

    /// Waits until a VM has ended.
    ///
    /// # Errors
    /// There is none of that name, or its colony was ended or killed before anybody could say how.
    pub fn wait(&self, name: &str) -> Result<VmView, ControlError> {
        let mut text = Vec::new();
        self.connect(name)?.stream(&vm_path(name, "/wait"), None, &mut |chunk| {
            text.extend_from_slice(chunk);
            Ok(ControlFlow::Continue(()))
        })?;
        from_json(&text)
    }

    /// Removes a VM from the list; one that has not ended is stopped first, if `is_forced`. If it was the
    /// last of its colony, waits until nothing is left of that.
    ///
    /// # Errors
    /// There is none of that name, or what its colony said.
    pub fn remove(&self, name: &str, is_forced: bool) -> Result<RemoveReply, ControlError> {
        let mut connection = self.connect(name)?;
        let path = vm_path(name, if is_forced { "?force=true" } else { "" });
        let reply: RemoveReply = connection.act(Method::DELETE, &path, &())?;
        if reply.is_colony_ending {
            connection.wait_for_end()?;
        }
        Ok(reply)
    }

    /// Clones a VM.
    ///
    /// # Errors
    /// There is none of that name, or what its colony said.
    pub fn fork(&self, name: &str, request: &ForkRequest) -> Result<ForkReply, ControlError> {
        self.connect(name)?.act(Method::POST, &vm_path(name, "/fork"), request)
    }

    /// Pauses a VM, or lets it go on.
    ///
    /// # Errors
    /// There is none of that name, or what its colony said.
    pub fn set_state(&self, name: &str, state: WantedState) -> Result<VmView, ControlError> {
        self.connect(name)?.act(Method::PATCH, &vm_path(name, ""), &StateRequest { state })
    }

    /// Returns a clone to its cut.
    ///
    /// # Errors
    /// There is none of that name, or what its colony said.
    pub fn reset(&self, name: &str) -> Result<ResetView, ControlError> {
        self.connect(name)?.act(Method::POST, &vm_path(name, "/reset"), &())
    }

    /// Stops a VM; if it is the last of its colony, waits until nothing is left of that.
    ///
    /// # Errors
    /// There is none of that name, or what its colony said.
    pub fn stop(&self, name: &str) -> Result<StopReply, ControlError> {
        let mut connection = self.connect(name)?;
        let reply: StopReply = connection.act(Method::POST, &vm_path(name, "/stop"), &())?;
        if reply.is_colony_ending {
            connection.wait_for_end()?;
        }
        Ok(reply)
    }

    /// Writes a VM's console output to `out`, from its beginning to the VM's end.
    ///
    /// # Errors
    /// There is none of that name, `out` refused, or the colony was killed.
    pub fn console(&self, name: &str, out: &mut dyn Write) -> Result<(), ControlError> {
        self.follow_console(name)?.copy_to(out)
    }

    /// A VM's console output, from its beginning to the VM's end: all of it comes, even if the VM ends
    /// before it is read.
    ///
    /// # Errors
    /// There is none of that name, or what its colony said.
    pub fn follow_console(&self, name: &str) -> Result<ConsoleOutput, ControlError> {
        let mut connection = self.connect(name)?;
        let body = connection.open(&vm_path(name, "/console"), Some(LIST_LIMIT))?;
        Ok(ConsoleOutput { connection, body })
    }

    /// Tells what happens in a VM's colony from now on, until `take` has had enough, or the colony ends.
    ///
    /// # Errors
    /// There is no VM of that name, or the colony was killed.
    pub fn events(
        &self,
        name: &str,
        mut take: impl FnMut(Event) -> ControlFlow<()>,
    ) -> Result<(), ControlError> {
        let mut rest = Vec::new();
        self.connect(name)?.stream("/v1/events", Some(LIST_LIMIT), &mut |chunk| {
            rest.extend_from_slice(chunk);
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<_> = rest.drain(..=end).collect();
                if take(from_json(&line)?).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
            Ok(ControlFlow::Continue(()))
        })
    }

    /// Gives a VM console input. Returns how many bytes found room: the rest is to be given again.
    ///
    /// # Errors
    /// There is none of that name, or what its colony said.
    pub fn input(&self, name: &str, input: &[u8]) -> Result<usize, ControlError> {
        // Whatever does not fit a request is part of the rest.
        let body = Bytes::copy_from_slice(&input[..input.len().min(INPUT_BYTES)]);
        let request = request(Method::POST, &vm_path(name, "/console"), Body::from(body))?;
        let reply: InputReply = self.connect(name)?.exchange(LIST_LIMIT, request)?;
        Ok(reply.accepted_bytes)
    }

    fn connect(&self, name: &str) -> Result<Connection, ControlError> {
        match self.place.find(name)? {
            Found::Colony(stream) => Connection::over(stream),
            Found::Stale => Err(ControlError::Stale(name.to_owned())),
            Found::Nothing => Err(ControlError::Unknown(name.to_owned())),
        }
    }
}

/// What a VM writes, as it comes.
pub struct ConsoleOutput {
    connection: Connection,
    body: Incoming,
}

impl ConsoleOutput {
    /// Writes all of it to `out`, until the VM has ended.
    ///
    /// # Errors
    /// `out` refused, or the colony was killed.
    pub fn copy_to(self, out: &mut dyn Write) -> Result<(), ControlError> {
        let Self { mut connection, body } = self;
        connection.read(body, &mut |chunk| {
            out.write_all(chunk)?;
            out.flush()?;
            Ok(ControlFlow::Continue(()))
        })
    }
}

fn list_of(stream: UnixStream) -> Result<VmList, ControlError> {
    Connection::over(stream)?.get("/v1/vms")
}

fn vm_path(name: &str, rest: &str) -> String {
    format!("/v1/vms/{name}{rest}")
}

/// Takes what comes, and says whether it wants more.
type Take<'a> = dyn FnMut(&[u8]) -> Result<ControlFlow<()>, ControlError> + 'a;

/// A connection to a colony, with the little that drives it.
struct Connection {
    runtime: Runtime,
    sender: SendRequest<Body>,
    driver: JoinHandle<()>,
    keeper_pid: i32,
}

impl Connection {
    fn over(stream: UnixStream) -> Result<Self, ControlError> {
        // The process that listens: its keeper.
        let peer = rustix::net::sockopt::socket_peercred(&stream).map_err(io::Error::from)?;
        stream.set_nonblocking(true)?;
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (sender, connection) = runtime.block_on(async {
            let stream = TokioIo::new(tokio::net::UnixStream::from_std(stream)?);
            http1::handshake(stream).await.map_err(broken)
        })?;
        let driver = runtime.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the connection to a colony has ended");
            }
        });
        Ok(Self { runtime, sender, driver, keeper_pid: peer.pid.as_raw_nonzero().get() })
    }

    fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, ControlError> {
        self.exchange(LIST_LIMIT, request(Method::GET, path, Body::empty())?)
    }

    fn act<T: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ControlError> {
        let body = serde_json::to_vec(body).map_err(|error| ControlError::Protocol(error.to_string()))?;
        self.exchange(ACT_LIMIT, request(method, path, Body::from(body))?)
    }

    /// A request and its answer.
    fn exchange<T: DeserializeOwned>(
        &mut self,
        limit: Duration,
        request: Request<Body>,
    ) -> Result<T, ControlError> {
        let response = self.send(limit, request)?;
        from_json(&self.collect(response)?)
    }

    /// Gives `take` what comes for as long as it likes. The answer begins within `limit`, if there is one.
    fn stream(
        &mut self,
        path: &str,
        limit: Option<Duration>,
        take: &mut Take<'_>,
    ) -> Result<(), ControlError> {
        let body = self.open(path, limit)?;
        self.read(body, take)
    }

    /// Asks for what goes on. The answer begins within `limit`, if there is one.
    fn open(&mut self, path: &str, limit: Option<Duration>) -> Result<Incoming, ControlError> {
        let request = request(Method::GET, path, Body::empty())?;
        Ok(self.send(limit.unwrap_or(Duration::MAX), request)?.into_body())
    }

    /// Gives `take` what comes for as long as it likes.
    fn read(&mut self, mut body: Incoming, take: &mut Take<'_>) -> Result<(), ControlError> {
        while let Some(frame) = self.runtime.block_on(body.frame()) {
            if let Some(chunk) = frame.map_err(broken)?.data_ref()
                && take(chunk)?.is_break()
            {
                break;
            }
        }
        Ok(())
    }

    /// Sends a request and waits for the head of its answer, at most `limit`.
    fn send(&mut self, limit: Duration, request: Request<Body>) -> Result<Response<Incoming>, ControlError> {
        let sent = self.sender.send_request(request);
        let answer = self.runtime.block_on(async { tokio::time::timeout(limit, sent).await });
        let silent = |_| ControlError::Silent { keeper_pid: self.keeper_pid, seconds: limit.as_secs() };
        let response = answer.map_err(silent)?.map_err(broken)?;
        if response.status().is_success() {
            return Ok(response);
        }
        let text = self.collect(response)?;
        let problem: Problem = serde_json::from_slice(&text)
            .map_err(|error| ControlError::Protocol(format!("an error without a description: {error}")))?;
        Err(ControlError::Problem(problem))
    }

    fn collect(&self, response: Response<Incoming>) -> Result<Bytes, ControlError> {
        let body = self.runtime.block_on(response.into_body().collect());
        Ok(body.map_err(broken)?.to_bytes())
    }

    /// Waits until the other side closes the connection.
    fn wait_for_end(self) -> Result<(), ControlError> {
        let ended = self.runtime.block_on(async { tokio::time::timeout(END_LIMIT, self.driver).await });
        match ended {
            Ok(_) => Ok(()),
            Err(_) => Err(ControlError::Silent { keeper_pid: self.keeper_pid, seconds: END_LIMIT.as_secs() }),
        }
    }
}

fn request(method: Method, path: &str, body: Body) -> Result<Request<Body>, ControlError> {
    let request = Request::builder().method(method).uri(path).header(header::HOST, "salp");
    let request = request.header(header::CONTENT_TYPE, "application/json").body(body);
    request.map_err(|error| ControlError::Protocol(error.to_string()))
}

fn from_json<T: DeserializeOwned>(text: &[u8]) -> Result<T, ControlError> {
    serde_json::from_slice(text).map_err(|error| ControlError::Protocol(error.to_string()))
}

/// A colony that ends closes its connections.
fn broken(error: hyper::Error) -> ControlError {
    let is_reset = || {
        let source = std::error::Error::source(&error).and_then(|source| source.downcast_ref::<io::Error>());
        source.is_some_and(|error| {
            matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
        })
    };
    if error.is_incomplete_message() || error.is_canceled() || error.is_closed() || is_reset() {
        ControlError::Ending
    } else if error.is_parse() {
        ControlError::Protocol(error.to_string())
    } else {
        ControlError::Socket(io::Error::other(error))
    }
}
