//! The other end of the socket: what `salp fork`, `ps`, `pause`, `resume`, `reset`, `stop` and `console` do.

use std::io::{self, BufReader, Read as _, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::http::{self, Request, ResponseHead};
use super::place::{Found, Place};
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
                Found::Colony(stream) => match call::<VmList>(stream, LIST_LIMIT, "GET", "/v1/vms", &()) {
                    Ok((list, _)) => all.vms.extend(list.vms),
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
        let path = format!("/v1/vms/{name}");
        call(self.connect(name)?, LIST_LIMIT, "GET", &path, &()).map(|(view, _)| view)
    }

    /// Clones a VM.
    ///
    /// # Errors
    /// There is none of that name, or what its colony said.
    pub fn fork(&self, name: &str, request: &ForkRequest) -> Result<ForkReply, ControlError> {
        let path = format!("/v1/vms/{name}/fork");
        call(self.connect(name)?, ACT_LIMIT, "POST", &path, request).map(|(reply, _)| reply)
    }

    /// Pauses a VM, or lets it go on.
    ///
    /// # Errors
    /// There is none of that name, or what its colony said.
    pub fn set_state(&self, name: &str, state: WantedState) -> Result<VmView, ControlError> {
        let path = format!("/v1/vms/{name}");
        let request = StateRequest { state };
        call(self.connect(name)?, ACT_LIMIT, "PATCH", &path, &request).map(|(view, _)| view)
    }

    /// Returns a clone to its cut.
    ///
    /// # Errors
    /// There is none of that name, or what its colony said.
    pub fn reset(&self, name: &str) -> Result<ResetView, ControlError> {
        let path = format!("/v1/vms/{name}/reset");
        call(self.connect(name)?, ACT_LIMIT, "POST", &path, &()).map(|(view, _)| view)
    }

    /// Stops a VM; if it is the last of its colony, waits until nothing is left of that.
    ///
    /// # Errors
    /// There is none of that name, or what its colony said.
    pub fn stop(&self, name: &str) -> Result<StopReply, ControlError> {
        let path = format!("/v1/vms/{name}/stop");
        let (reply, mut rest) = call::<StopReply>(self.connect(name)?, ACT_LIMIT, "POST", &path, &())?;
        if reply.is_colony_ending {
            rest.get_ref().set_read_timeout(Some(END_LIMIT))?;
            rest.read_to_end(&mut Vec::new())?;
        }
        Ok(reply)
    }

    /// Writes a VM's console output to `out`, from its beginning to the VM's end.
    ///
    /// # Errors
    /// There is none of that name, `out` refused, or the colony was killed.
    pub fn console(&self, name: &str, out: &mut dyn Write) -> Result<(), ControlError> {
        let path = format!("/v1/vms/{name}/console");
        let request = Request { method: "GET".to_owned(), path, body: Vec::new() };
        let (head, mut from) = send(self.connect(name)?, LIST_LIMIT, &request)?;
        if head.status != 200 {
            return Err(problem(&mut from));
        }
        // A guest may be silent for as long as it likes.
        from.get_ref().set_read_timeout(None)?;
        let mut chunk = vec![0; 16 << 10];
        loop {
            let count = match from.read(&mut chunk) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                count => count?,
            };
            if count == 0 {
                return Ok(());
            }
            out.write_all(&chunk[..count])?;
            out.flush()?;
        }
    }

    /// Gives a VM console input. Returns how many bytes found room: the rest is to be given again.
    ///
    /// # Errors
    /// There is none of that name, or what its colony said.
    pub fn input(&self, name: &str, input: &[u8]) -> Result<usize, ControlError> {
        let path = format!("/v1/vms/{name}/console");
        // Whatever does not fit a request is part of the rest.
        let body = input[..input.len().min(INPUT_BYTES)].to_vec();
        let request = Request { method: "POST".to_owned(), path, body };
        let (reply, _) = exchange::<InputReply>(self.connect(name)?, LIST_LIMIT, &request)?;
        Ok(reply.accepted_bytes)
    }

    fn connect(&self, name: &str) -> Result<UnixStream, ControlError> {
        match self.place.find(name)? {
            Found::Colony(stream) => Ok(stream),
            Found::Stale => Err(ControlError::Stale(name.to_owned())),
            Found::Nothing => Err(ControlError::Unknown(name.to_owned())),
        }
    }
}

/// Sends a request and waits for the head of its answer, at most `limit`.
fn send(
    mut stream: UnixStream,
    limit: Duration,
    request: &Request,
) -> Result<(ResponseHead, BufReader<UnixStream>), ControlError> {
    // The process that listens: its keeper.
    let keeper_pid = rustix::net::sockopt::socket_peercred(&stream).map_err(io::Error::from)?.pid;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let written = http::write_request(&mut stream, request).map_err(ControlError::from);
    let mut from = BufReader::new(stream);
    let head = written.and_then(|()| response(&mut from));
    match head {
        Ok(head) => Ok((head, from)),
        Err(ControlError::Socket(error)) if is_timeout(&error) => Err(ControlError::Silent {
            keeper_pid: keeper_pid.as_raw_nonzero().get(),
            seconds: limit.as_secs(),
        }),
        Err(error) => Err(error),
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// A colony that ends closes its connections.
fn response(from: &mut BufReader<UnixStream>) -> Result<ResponseHead, ControlError> {
    match http::has_begun(from) {
        Ok(false) => Err(ControlError::Ending),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Err(ControlError::Ending),
        Err(error) => Err(error.into()),
        Ok(_) => http::read_response(from),
    }
}

fn problem(from: &mut BufReader<UnixStream>) -> ControlError {
    match serde_json::from_reader::<_, Problem>(from) {
        Ok(problem) => ControlError::Problem(problem),
        Err(error) => ControlError::Protocol(format!("an error without a description: {error}")),
    }
}

/// One request and its answer; the connection is returned with it.
fn call<T: DeserializeOwned>(
    stream: UnixStream,
    limit: Duration,
    method: &str,
    path: &str,
    body: &impl Serialize,
) -> Result<(T, BufReader<UnixStream>), ControlError> {
    let body = if method == "GET" { Vec::new() } else { to_json(body)? };
    exchange(stream, limit, &Request { method: method.to_owned(), path: path.to_owned(), body })
}

/// As [`call`], of a whole request.
fn exchange<T: DeserializeOwned>(
    stream: UnixStream,
    limit: Duration,
    request: &Request,
) -> Result<(T, BufReader<UnixStream>), ControlError> {
    let (head, mut from) = send(stream, limit, request)?;
    if !(200..300).contains(&head.status) {
        return Err(problem(&mut from));
    }
    let length = head.body_bytes.ok_or_else(|| ControlError::Protocol("no length".to_owned()))?;
    let mut body = Vec::new();
    from.by_ref().take(length).read_to_end(&mut body)?;
    let value = serde_json::from_slice(&body).map_err(|error| ControlError::Protocol(error.to_string()))?;
    Ok((value, from))
}

fn to_json(body: &impl Serialize) -> Result<Vec<u8>, ControlError> {
    serde_json::to_vec(body).map_err(|error| ControlError::Protocol(error.to_string()))
}
