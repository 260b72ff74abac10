//! HTTP/1.1 as one speaks it who trusts nobody: what is sent goes out as it is, what comes back is taken
//! apart and doubted.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long an answer may take.
pub(super) const LIMIT: Duration = Duration::from_secs(20);
/// The longest answer: the API's document has some 60 KiB.
const LONGEST_ANSWER: usize = 1 << 20;

/// A connection to a colony.
pub(super) struct Connection(UnixStream);

/// An answer, or as much of it as has come.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// Its media type.
    pub(super) kind: String,
    pub(super) body: Vec<u8>,
    /// It is one that goes on until its source ends.
    pub(super) is_stream: bool,
}

impl Connection {
    /// None: nobody listens there.
    pub(super) fn open(socket: &Path) -> Option<Self> {
        let stream = match UnixStream::connect(socket) {
            Ok(stream) => stream,
            Err(error) if [ErrorKind::NotFound, ErrorKind::ConnectionRefused].contains(&error.kind()) => {
                return None;
            }
            Err(error) => panic!("{}: {error}", socket.display()),
        };
        stream.set_read_timeout(Some(LIMIT)).expect("a time is no zero");
        stream.set_write_timeout(Some(LIMIT)).expect("a time is no zero");
        Some(Self(stream))
    }

    /// Sends bytes. A server may have heard enough before their end.
    pub(super) fn send(&mut self, bytes: &[u8]) {
        match self.0.write_all(bytes) {
            Ok(()) => {}
            Err(error) if is_hang_up(&error) => {}
            Err(error) => panic!("a request is not taken: {error}"),
        }
    }

    /// Nothing more will be sent.
    pub(super) fn send_end(&mut self) {
        // A server that has gone needs no end.
        let _ = self.0.shutdown(Shutdown::Write);
    }

    /// Whether there is something to read, be it the end.
    pub(super) fn has_answer(&self) -> bool {
        let mut stream = [PollFd::new(&self.0, PollFlags::IN)];
        poll(&mut stream, Some(&Timespec::default())).expect("a descriptor that can be asked") > 0
    }

    /// All that comes until the server hangs up.
    pub(super) fn read_to_end(mut self) -> Vec<u8> {
        self.read_until(|_| false)
    }

    /// What comes until there is a head; the rest is not waited for.
    pub(super) fn read_head(mut self) -> Vec<u8> {
        self.read_until(|read| head_len(read).is_some())
    }

    fn read_until(&mut self, is_enough: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let (mut read, mut part) = (Vec::new(), [0; 4096]);
        while !is_enough(&read) {
            match self.0.read(&mut part) {
                Ok(0) => break,
                Ok(count) => read.extend(&part[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if is_hang_up(&error) => break,
                Err(error) => panic!("no whole answer within {LIMIT:?}: {error}: {}", shown(&read)),
            }
            assert!(read.len() <= LONGEST_ANSWER, "an answer without end: {}", shown(&read));
        }
        read
    }
}

fn is_hang_up(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)
}

fn head_len(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4)
}

/// The first kilobyte, for people.
pub(super) fn shown(bytes: &[u8]) -> String {
    bytes[..bytes.len().min(1024)].escape_ascii().to_string()
}

impl Answer {
    /// Takes the first answer off `bytes`. One to HEAD has no body, whatever it says.
    ///
    /// # Panics
    /// It is no HTTP, or less of it than it says.
    pub(super) fn take(bytes: &mut &[u8], has_body: bool) -> Self {
        let wrong = |what: &str| -> ! { panic!("{what}: {}", shown(bytes)) };
        let Some(len) = head_len(bytes) else { wrong("an answer without a whole head") };
        let Ok(head) = str::from_utf8(&bytes[..len]) else { wrong("a head that is no text") };
        let mut lines = head.split("\r\n");
        let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.")?.get(2..5)?.parse().ok());
        let Some(status) = status else { wrong("no HTTP/1") };
        let mut answer = Self { status, kind: String::new(), body: Vec::new(), is_stream: false };
        let mut body_len = 0;
        for line in lines.filter(|line| !line.is_empty()) {
            let Some((name, value)) = line.split_once(": ") else { wrong("a line that is no field") };
            match name.to_ascii_lowercase().as_str() {
                "content-type" => value.clone_into(&mut answer.kind),
                "content-length" => body_len = value.parse().unwrap_or_else(|_| wrong("no length")),
                "transfer-encoding" => answer.is_stream = true,
                _ => {}
            }
        }
        *bytes = &bytes[len..];
        if has_body && !answer.is_stream {
            assert!(bytes.len() >= body_len, "{answer:?} of {body_len} bytes ends after {}", bytes.len());
            let (body, rest) = bytes.split_at(body_len);
            (answer.body, *bytes) = (body.to_owned(), rest);
        }
        answer
    }
}
