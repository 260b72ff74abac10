//! A VM's console: a file that has all of its output, and those who follow it.
//!
//! One thread appends; followers read the file at their own pace, so one that does not read (a
//! terminal that stands still) holds up nobody. A follower waits on an eventfd of its own, together
//! with the end of its connection.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::lock;

/// Read at once by a follower.
const CHUNK_BYTES: usize = 16 << 10;

#[derive(Debug, Default)]
struct Progress {
    len_bytes: u64,
    is_closed: bool,
    bells: Vec<Arc<OwnedFd>>,
}

/// See the module.
#[derive(Debug)]
pub struct Console {
    path: PathBuf,
    file: File,
    progress: Mutex<Progress>,
}

impl Console {
    /// A console whose output goes to a new file at `path`, readable by its owner only.
    ///
    /// # Errors
    /// The host refused the file; also where there is one.
    pub fn create(path: PathBuf) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).append(true).create_new(true).mode(0o600).open(&path)?;
        Ok(Self { path, file, progress: Mutex::default() })
    }

    /// Where its file is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The last output, `most_bytes` at most.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn tail(&self, most_bytes: u64) -> io::Result<String> {
        let len_bytes = lock(&self.progress).len_bytes;
        let mut bytes = vec![0; crate::words::index(len_bytes.min(most_bytes))];
        self.file.read_exact_at(&mut bytes, len_bytes.saturating_sub(most_bytes))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Adds output. What the host has no room for is lost, and said in the log.
    pub fn append(&self, bytes: &[u8]) {
        let mut progress = lock(&self.progress);
        if let Err(error) = (&self.file).write_all(bytes) {
            tracing::error!(path = %self.path.display(), %error, "console output is lost");
        }
        // Also after a failure: part of it may have been written.
        match self.file.metadata() {
            Ok(metadata) => progress.len_bytes = metadata.len(),
            Err(error) => tracing::error!(path = %self.path.display(), %error, "no length of a console"),
        }
        ring(&progress.bells);
    }

    /// Nothing more will come: followers end when they have read all.
    pub fn close(&self) {
        let mut progress = lock(&self.progress);
        progress.is_closed = true;
        ring(&progress.bells);
    }

    /// More will come after all: the VM begins again.
    pub fn reopen(&self) {
        lock(&self.progress).is_closed = false;
    }

    /// Writes everything from the beginning on to `out`, as it comes, until the console is closed, or
    /// the other side of `connection` hangs up.
    ///
    /// # Errors
    /// `out` or the file refused.
    pub fn follow(&self, out: &mut dyn Write, connection: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        lock(&self.progress).bells.push(Arc::clone(&bell));
        let result = self.follow_with(&bell, out, connection);
        lock(&self.progress).bells.retain(|other| !Arc::ptr_eq(other, &bell));
        result
    }

    fn follow_with(
        &self,
        bell: &OwnedFd,
        out: &mut dyn Write,
        connection: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let mut at = 0;
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let (len_bytes, is_closed) = {
                let progress = lock(&self.progress);
                (progress.len_bytes, progress.is_closed)
            };
            while at < len_bytes {
                let most = usize::try_from(len_bytes - at).unwrap_or(usize::MAX).min(CHUNK_BYTES);
                let count = self.file.read_at(&mut chunk[..most], at)?;
                if count == 0 {
                    // Somebody has cut the file off: what was there is gone.
                    at = len_bytes;
                    break;
                }
                out.write_all(&chunk[..count])?;
                at += crate::words::wide(count);
            }
            out.flush()?;
            if is_closed {
                return Ok(());
            }
            if !wait(bell, connection)? {
                return Ok(());
            }
        }
    }
}

/// Waits for the bell; false: the connection's other side is gone.
fn wait(bell: &OwnedFd, connection: Option<BorrowedFd<'_>>) -> io::Result<bool> {
    let mut ends = vec![PollFd::new(bell, PollFlags::IN)];
    // Its hanging up is told in any case.
    ends.extend(connection.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::RDHUP)));
    match poll(&mut ends, None) {
        Ok(_) => {}
        Err(Errno::INTR) => return Ok(true),
        Err(error) => return Err(error.into()),
    }
    if ends.get(1).is_some_and(|end| !end.revents().is_empty()) {
        return Ok(false);
    }
    match rustix::io::read(bell, &mut [0; 8]) {
        Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

fn ring(bells: &[Arc<OwnedFd>]) {
    for bell in bells {
        match rustix::io::write(bell, &1_u64.to_ne_bytes()) {
            // Full: it rings already.
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(error) => tracing::error!(%error, "a follower of a console cannot be woken"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn console(name: &str) -> (Arc<Console>, PathBuf) {
        let path = std::env::temp_dir().join(format!("salp-console-{name}-{}", std::process::id()));
        (Arc::new(Console::create(path.clone()).expect("a new file")), path)
    }

    #[test]
    fn a_follower_gets_what_is_there_and_what_comes() {
        let (console, path) = console("follow");
        console.append(b"before ");
        let (mut ours, theirs) = UnixStream::pair().expect("a pair");
        let for_follower = Arc::clone(&console);
        let follower = std::thread::spawn(move || {
            let mut out = theirs.try_clone().expect("a descriptor");
            for_follower.follow(&mut out, Some(theirs.as_fd()))
        });
        let mut seen = [0; 7];
        ours.read_exact(&mut seen).expect("what was there");
        assert_eq!(&seen, b"before ");
        console.append(b"after");
        let mut seen = [0; 5];
        ours.read_exact(&mut seen).expect("what came");
        assert_eq!(&seen, b"after");
        console.close();
        let mut rest = Vec::new();
        ours.read_to_end(&mut rest).expect("the end");
        follower.join().expect("no panic").expect("no error");
        assert!(rest.is_empty() && lock(&console.progress).bells.is_empty());
        std::fs::remove_file(path).expect("it is ours");
    }

    #[test]
    fn a_follower_that_hangs_up_is_let_go() {
        let (console, path) = console("hang-up");
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let for_follower = Arc::clone(&console);
        let follower = std::thread::spawn(move || for_follower.follow(&mut io::sink(), Some(theirs.as_fd())));
        drop(ours);
        follower.join().expect("no panic").expect("no error");
        assert!(lock(&console.progress).bells.is_empty());
        assert!(Console::create(path.clone()).is_err(), "a file that exists is not taken");
        std::fs::remove_file(path).expect("it is ours");
    }
}
