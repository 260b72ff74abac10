//! A VM's console: a file that has all of its output, and those who follow it.
//!
//! One thread appends; followers read the file at their own pace, so one that does not read (a
//! terminal that stands still) holds up nobody.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::watch;

/// Read at once by a follower.
const CHUNK_BYTES: usize = 16 << 10;

#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    len_bytes: u64,
    is_closed: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Console {
    path: PathBuf,
    file: File,
    progress: watch::Sender<Progress>,
}

impl Console {
    /// A console whose output goes to a new file at `path`, readable by its owner only.
    ///
    /// # Errors
    /// The host refused the file; also where there is one.
    pub fn create(path: PathBuf) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).append(true).create_new(true).mode(0o600).open(&path)?;
        Ok(Self { path, file, progress: watch::Sender::default() })
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
        let len_bytes = self.progress.borrow().len_bytes;
        let mut bytes = vec![0; crate::words::index(len_bytes.min(most_bytes))];
        self.file.read_exact_at(&mut bytes, len_bytes.saturating_sub(most_bytes))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Adds output. What the host has no room for is lost, and said in the log.
    pub fn append(&self, bytes: &[u8]) {
        self.progress.send_modify(|progress| {
            if let Err(error) = (&self.file).write_all(bytes) {
                tracing::error!(path = %self.path.display(), %error, "console output is lost");
            }
            // Also after a failure: part of it may have been written.
            match self.file.metadata() {
                Ok(metadata) => progress.len_bytes = metadata.len(),
                Err(error) => tracing::error!(path = %self.path.display(), %error, "no length of a console"),
            }
        });
    }

    /// Nothing more will come: followers end when they have read all.
    pub fn close(&self) {
        self.progress.send_modify(|progress| progress.is_closed = true);
    }

    /// More will come after all: the VM begins again.
    pub fn reopen(&self) {
        self.progress.send_modify(|progress| progress.is_closed = false);
    }

    /// One who reads everything from the beginning on.
    #[must_use]
    pub fn follow(self: &Arc<Self>) -> Follower {
        Follower { console: Arc::clone(self), progress: self.progress.subscribe(), at: 0 }
    }
}

/// Reads a console from its beginning, as it comes, until it is closed.
#[derive(Debug)]
pub struct Follower {
    console: Arc<Console>,
    progress: watch::Receiver<Progress>,
    at: u64,
}

impl Follower {
    /// What comes next; none: the console is closed.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            let Progress { len_bytes, is_closed } = *self.progress.borrow_and_update();
            if self.at < len_bytes {
                let most = usize::try_from(len_bytes - self.at).unwrap_or(usize::MAX).min(CHUNK_BYTES);
                let mut chunk = vec![0; most];
                let count = self.console.file.read_at(&mut chunk, self.at)?;
                // 0: somebody has cut the file off, what was there is gone.
                self.at = if count == 0 { len_bytes } else { self.at + crate::words::wide(count) };
                chunk.truncate(count);
                return Ok(Some(chunk));
            }
            if is_closed || self.progress.changed().await.is_err() {
                return Ok(None);
            }
        }
    }

    /// Writes all of it to `out`, in this thread.
    ///
    /// # Errors
    /// `out` or the file refused.
    pub fn copy_to(mut self, out: &mut dyn Write) -> io::Result<()> {
        let waiting = tokio::runtime::Builder::new_current_thread().build()?;
        while let Some(chunk) = waiting.block_on(self.next())? {
            out.write_all(&chunk)?;
            out.flush()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn console(name: &str) -> (Arc<Console>, PathBuf) {
        let path = std::env::temp_dir().join(format!("salp-console-{name}-{}", std::process::id()));
        (Arc::new(Console::create(path.clone()).expect("a new file")), path)
    }

    #[test]
    fn a_follower_gets_what_is_there_and_what_comes() {
        let (console, path) = console("follow");
        assert!(Console::create(path.clone()).is_err(), "a file that exists is not taken");
        console.append(b"before ");
        let (mut ours, mut theirs) = UnixStream::pair().expect("a pair");
        let follower = console.follow();
        let follower = std::thread::spawn(move || follower.copy_to(&mut theirs));
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
        assert!(rest.is_empty() && console.progress.receiver_count() == 0);
        std::fs::remove_file(path).expect("it is ours");
    }
}
