//! Memfds as arena files, where the host allows no tmpfs of our own: [`MemfdTable`] in the owner,
//! [`MemfdLocator`] in the others.
//!
//! A memfd has no name that can be opened, but `/proc/<pid>/fd` of its owner shows what it was called
//! when it was made: `/memfd:salp-<arena>-<name> (deleted)`. A reader looks there for the name, opens
//! what it finds for reading, and looks once more at what it has opened, since the owner may have
//! closed and reused the number in between. The mode of a file in the table is 0400, so that only root
//! can open it for writing; the owner sets it to 0 when the name is taken away, which says "removed"
//! to readers that find a descriptor of it which is still open.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{ArenaError, is_same_file, own_path};

/// The files of an arena, in the process that owns it.
#[derive(Debug)]
pub(super) struct MemfdTable {
    locator: MemfdLocator,
    files: Mutex<BTreeMap<String, OwnedFd>>,
}

/// How other processes find the files.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct MemfdLocator {
    owner_pid: u32,
    /// Which of the owner's arenas.
    arena: u32,
}

impl MemfdTable {
    pub(super) fn new() -> Self {
        // Relaxed: only that no two are the same matters.
        static ARENAS: AtomicU32 = AtomicU32::new(0);
        let arena = ARENAS.fetch_add(1, Ordering::Relaxed);
        Self { locator: MemfdLocator { owner_pid: process::id(), arena }, files: Mutex::default() }
    }

    pub(super) fn locator(&self) -> MemfdLocator {
        self.locator
    }

    fn files(&self) -> MutexGuard<'_, BTreeMap<String, OwnedFd>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn used_bytes(&self) -> Result<u64, ArenaError> {
        self.files().iter().try_fold(0, |sum, (name, file)| {
            let stat = rustix::fs::fstat(file).map_err(|errno| ArenaError::file("stat", name, errno))?;
            Ok(sum + u64::try_from(stat.st_blocks).unwrap_or(0) * 512)
        })
    }

    pub(super) fn create_file(&self, name: &str, len_bytes: u64) -> Result<OwnedFd, ArenaError> {
        let mut files = self.files();
        if files.contains_key(name) {
            return Err(ArenaError::file("create", name, Errno::EXIST));
        }
        let file = self.locator.create_file(name, len_bytes)?;
        let kept = rustix::io::fcntl_dupfd_cloexec(&file, 0)
            .map_err(|errno| ArenaError::file("keep", name, errno))?;
        files.insert(name.to_owned(), kept);
        Ok(file)
    }

    pub(super) fn adopt(&self, name: &str, file: OwnedFd) -> Result<(), ArenaError> {
        let mut files = self.files();
        let fits = match files.get(name) {
            Some(known) => is_same_file(known.as_fd(), file.as_fd())
                .map_err(|errno| ArenaError::file("adopt", name, errno))?,
            None => true,
        };
        // Readers go by the name that the file was made with.
        let made_as = fs::read_link(own_path(file.as_fd())).unwrap_or_default();
        if !fits || made_as != self.locator.link_target(name) {
            return Err(ArenaError::file("adopt", name, Errno::EXIST));
        }
        files.entry(name.to_owned()).or_insert(file);
        Ok(())
    }

    pub(super) fn open_read_only(&self, name: &str) -> Result<OwnedFd, ArenaError> {
        let files = self.files();
        let file = files.get(name).ok_or_else(|| ArenaError::file("open", name, Errno::NOENT))?;
        open_path(Path::new(&own_path(file.as_fd()))).map_err(|errno| ArenaError::file("open", name, errno))
    }

    pub(super) fn remove(&self, name: &str) -> Result<(), ArenaError> {
        let mut files = self.files();
        let file = files.get(name).ok_or_else(|| ArenaError::file("remove", name, Errno::NOENT))?;
        rustix::fs::fchmod(file, Mode::empty()).map_err(|errno| ArenaError::file("remove", name, errno))?;
        files.remove(name);
        Ok(())
    }
}

impl MemfdLocator {
    fn memfd_name(self, name: &str) -> String {
        format!("salp-{}-{}-{name}", self.owner_pid, self.arena)
    }

    /// What `/proc/<pid>/fd` shows for the file.
    fn link_target(self, name: &str) -> PathBuf {
        PathBuf::from(format!("/memfd:{} (deleted)", self.memfd_name(name)))
    }

    /// A file that only this process has.
    pub(super) fn create_file(self, name: &str, len_bytes: u64) -> Result<OwnedFd, ArenaError> {
        let file = rustix::fs::memfd_create(self.memfd_name(name), MemfdFlags::CLOEXEC)
            .map_err(|errno| ArenaError::file("create", name, errno))?;
        rustix::fs::fchmod(&file, Mode::RUSR)
            .and_then(|()| rustix::fs::ftruncate(&file, len_bytes))
            .map_err(|errno| ArenaError::file("size", name, errno))?;
        Ok(file)
    }

    pub(super) fn open_read_only(self, name: &str) -> Result<OwnedFd, ArenaError> {
        let target = self.link_target(name);
        let failed = |errno| ArenaError::file("find", name, errno);
        let descriptors = fs::read_dir(format!("/proc/{}/fd", self.owner_pid))
            .map_err(|error| failed(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
        for entry in descriptors {
            let path =
                entry.map_err(|error| failed(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?.path();
            // A number that was closed in between is not the one looked for.
            if fs::read_link(&path).ok().as_ref() != Some(&target) {
                continue;
            }
            match open_path(&path) {
                Ok(file) if fs::read_link(own_path(file.as_fd())).ok().as_ref() == Some(&target) => {
                    return Ok(file);
                }
                // Closed, reused, or removed.
                Ok(_) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(ArenaError::file("open", name, errno)),
            }
        }
        Err(ArenaError::file("open", name, Errno::NOENT))
    }
}

/// Opens what a `/proc` path stands for, unless its name was taken away.
fn open_path(path: &Path) -> Result<OwnedFd, Errno> {
    let removed = |mode: Mode| !mode.contains(Mode::RUSR);
    let file = match rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
        // Without root a removed file cannot be opened.
        Err(Errno::ACCESS) if rustix::fs::stat(path).is_ok_and(|stat| removed(Mode::from(stat.st_mode))) => {
            return Err(Errno::NOENT);
        }
        result => result?,
    };
    let stat = rustix::fs::fstat(&file)?;
    if removed(Mode::from(stat.st_mode)) { Err(Errno::NOENT) } else { Ok(file) }
}
