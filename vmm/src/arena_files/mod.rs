//! Where the arena's files are: [`ArenaDir`], and what a member gets of it, [`ArenaReader`] and
//! [`ArenaWriter`].
//!
//! | kind | files | budget | huge pages | guard of readers |
//! |---|---|---|---|---|
//! | [`HugeTmpfs`](ArenaKind::HugeTmpfs) | names on two detached tmpfs, one of small pages | by the kernel: `ENOSPC` | from the first write | a read-only clone of each mount |
//! | [`Tmpfs`](ArenaKind::Tmpfs) | names on a detached tmpfs | the same | none | the same |
//! | [`Memfd`](ArenaKind::Memfd) | a table of memfds | none | none | file mode: works unless root |
//!
//! The first that the host allows is taken; a detached mount needs `CAP_SYS_ADMIN` and shows up in no
//! file tree. The arena's memory is charged to whoever writes it first, and given back when the last
//! descriptor and mapping of a removed file is gone.
//!
//! A file of single frames is a [small](ArenaDir::create_small_file) one: in a huge file the first byte of
//! every 2 MiB takes all of them. Where files are huge the small ones have a tmpfs of their own, with a
//! [part](SMALL_PART) of the budget besides.
//!
//! # Protocol
//! The keeper [creates](ArenaDir::create) the directory and sends each member its
//! [parts](ArenaDir::share_with_member). A member creates the files that it fills and sends their
//! descriptors to the keeper, which [adopts](ArenaDir::adopt) them: from then on every reader finds
//! them by name. A name is used once in the life of an arena.
//!
//! # Holes
//! - A descriptor opened for reading on the writable mount can be reopened for writing through
//!   `/proc`, by root. Kernels that cannot clone a detached mount (before 6.15) leave readers with
//!   that one: [`ArenaDir::guards_readers`].
//! - Memfd: a reader must be allowed to look at the owner's `/proc/<pid>/fd` (same user, same or
//!   outer pid namespace), and the budget is not enforced.

mod memfd;
mod tmpfs;

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::failure::{self, Injected};
use crate::words::{LEAF_BYTES, wide};
use memfd::{MemfdLocator, MemfdTable};
use tmpfs::{PageSize, TmpfsMount};

/// Environment variable that chooses the kind for [`ArenaDir::create`]: `huge`, `small` or `memfd`.
pub const ARENA_VARIABLE: &str = "SALP_ARENA";

/// Where the files of an arena are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ArenaKind {
    /// A detached tmpfs with huge pages.
    HugeTmpfs,
    /// A detached tmpfs with 4 KiB pages.
    Tmpfs,
    /// Memfds.
    Memfd,
}

/// What is wanted of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ArenaChoice {
    /// Huge pages where the host has them, else the next best.
    #[default]
    Best,
    /// No huge pages; a tmpfs where the host allows it.
    SmallPages,
    /// Memfds, whatever the host allows.
    Memfd,
}

/// Why the arena's files cannot be used as asked.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// The host refused a call about the arena as a whole.
    #[error("cannot {action}: {source}")]
    Host {
        /// What was being done.
        action: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The host refused a call about one file: it exists already, is not there, or else.
    #[error("cannot {action} arena file {name:?}: {source}")]
    File {
        /// What was being done.
        action: &'static str,
        /// The file's name.
        name: String,
        /// What the host said.
        source: io::Error,
    },
    /// Not a name of an arena file.
    #[error("{name:?} is no name of an arena file: letters, digits, '.', '_' and '-', 1 to {limit} bytes")]
    Name {
        /// The name.
        name: String,
        /// The most bytes.
        limit: usize,
    },
    /// An arena must hold at least one block.
    #[error("an arena of {budget_bytes} bytes does not hold one block of {LEAF_BYTES} bytes")]
    Budget {
        /// The budget asked for.
        budget_bytes: u64,
    },
    /// The variable [`ARENA_VARIABLE`] has no known value.
    #[error("{ARENA_VARIABLE} is {value:?}, not huge, small or memfd")]
    Choice {
        /// Its value.
        value: String,
    },
    /// The parts of an arena that were received do not fit together.
    #[error("an arena of kind {kind:?} came with {count} descriptors")]
    Parts {
        /// The kind described.
        kind: ArenaKind,
        /// How many descriptors came.
        count: usize,
    },
}

impl From<Injected> for ArenaError {
    fn from(injected: Injected) -> Self {
        Self::Host { action: "go on", source: injected.into() }
    }
}

impl ArenaError {
    fn host(action: &'static str, errno: Errno) -> Self {
        Self::Host { action, source: errno.into() }
    }

    fn file(action: &'static str, name: &str, errno: Errno) -> Self {
        Self::File { action, name: name.to_owned(), source: errno.into() }
    }

    /// Whether it says that a file is not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::File { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

impl ArenaChoice {
    /// The choice made by [`ARENA_VARIABLE`]; without it, the best.
    ///
    /// # Errors
    /// [`ArenaError::Choice`].
    pub fn from_environment() -> Result<Self, ArenaError> {
        env::var_os(ARENA_VARIABLE).map_or(Ok(Self::Best), |value| Self::parse(&value))
    }

    fn parse(value: &OsStr) -> Result<Self, ArenaError> {
        match value.to_str() {
            Some("huge" | "") => Ok(Self::Best),
            Some("small") => Ok(Self::SmallPages),
            Some("memfd") => Ok(Self::Memfd),
            _ => Err(ArenaError::Choice { value: value.to_string_lossy().into_owned() }),
        }
    }
}

/// The arena's files, as their owner has them: the keeper.
#[derive(Debug)]
pub struct ArenaDir {
    kind: ArenaKind,
    budget_bytes: u64,
    files: Files,
    /// Small files, where the others are huge.
    small: Option<TmpfsMount>,
}

/// Small files have the budget divided by this besides: patches are few, or a leaf is written anew.
const SMALL_PART: u64 = 8;

#[derive(Debug)]
enum Files {
    Tmpfs(TmpfsMount),
    Memfd(MemfdTable),
}

/// What [`ArenaDir::share_with_member`] says about the descriptors that go with it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct ArenaDescription {
    kind: ArenaKind,
    memfds: Option<MemfdLocator>,
}

/// Opens the arena's files by name, for reading only.
#[derive(Debug)]
pub struct ArenaReader(Place);

/// Creates files in the arena: a capability apart from reading.
#[derive(Debug)]
pub struct ArenaWriter(Place);

/// A member's side of the arena.
#[derive(Debug)]
enum Place {
    /// A mount, and that of small files, of a reader where there is one.
    Tmpfs(OwnedFd, Option<OwnedFd>),
    Memfd(MemfdLocator),
}

impl ArenaDir {
    /// An arena of the kind that [`ARENA_VARIABLE`] chooses. See [`create_as`](Self::create_as).
    ///
    /// # Errors
    /// As there, and [`ArenaError::Choice`].
    pub fn create(budget_bytes: u64) -> Result<Self, ArenaError> {
        Self::create_as(ArenaChoice::from_environment()?, budget_bytes)
    }

    /// An empty arena whose files may use `budget_bytes` of memory (rounded up to whole pages).
    ///
    /// # Errors
    /// The budget is less than one block. What the host does not allow is no error: see
    /// [`kind`](Self::kind).
    pub fn create_as(choice: ArenaChoice, budget_bytes: u64) -> Result<Self, ArenaError> {
        if budget_bytes < wide(LEAF_BYTES) {
            return Err(ArenaError::Budget { budget_bytes });
        }
        let kinds: &[_] = match choice {
            ArenaChoice::Best => &[ArenaKind::HugeTmpfs, ArenaKind::Tmpfs],
            ArenaChoice::SmallPages => &[ArenaKind::Tmpfs],
            ArenaChoice::Memfd => &[],
        };
        for &kind in kinds {
            match Self::mounts(kind, budget_bytes) {
                Ok((mount, small)) => {
                    return Ok(Self { kind, budget_bytes, files: Files::Tmpfs(mount), small });
                }
                Err(error) => {
                    tracing::debug!(?kind, %error, "the host does not allow this kind of arena")
                }
            }
        }
        let files = Files::Memfd(MemfdTable::new());
        Ok(Self { kind: ArenaKind::Memfd, budget_bytes, files, small: None })
    }

    /// The mounts of an arena of a kind that has some.
    fn mounts(kind: ArenaKind, budget_bytes: u64) -> Result<(TmpfsMount, Option<TmpfsMount>), ArenaError> {
        let small = |budget_bytes| TmpfsMount::create(PageSize::Small, budget_bytes);
        match kind {
            ArenaKind::HugeTmpfs => {
                // no failure point: there is no colony yet, and another kind of arena is tried
                let small = small(budget_bytes / SMALL_PART)?;
                // no failure point: as above
                Ok((TmpfsMount::create(PageSize::Huge, budget_bytes)?, Some(small)))
            }
            // no failure point: as above
            _ => Ok((small(budget_bytes)?, None)),
        }
    }

    /// What the host allowed.
    #[must_use]
    pub fn kind(&self) -> ArenaKind {
        self.kind
    }

    /// The budget, in bytes. Only a tmpfs enforces it.
    #[must_use]
    pub fn budget_bytes(&self) -> u64 {
        self.budget_bytes
    }

    /// Memory that the arena's files use, in bytes: on a tmpfs removed files that are open or mapped
    /// included, for memfds only what is in the table.
    ///
    /// # Errors
    /// The host refused to say.
    pub fn used_bytes(&self) -> Result<u64, ArenaError> {
        // no failure point: a figure for reports
        let small = self.small.as_ref().map_or(Ok(0), TmpfsMount::used_bytes)?;
        let others = match &self.files {
            Files::Tmpfs(mount) => mount.used_bytes(),
            Files::Memfd(table) => table.used_bytes(),
        };
        Ok(others? + small)
    }

    /// Whether a descriptor opened by a reader can never be reopened for writing, not even by root.
    #[must_use]
    pub fn guards_readers(&self) -> bool {
        matches!(&self.files, Files::Tmpfs(mount) if mount.guards_readers())
            && self.small.as_ref().is_none_or(TmpfsMount::guards_readers)
    }

    /// A new, sparse file of `len_bytes`, open for reading and writing.
    ///
    /// # Errors
    /// [`ArenaError::Name`]; the name is taken; the host refused.
    pub fn create_file(&self, name: &str, len_bytes: u64) -> Result<OwnedFd, ArenaError> {
        check_name(name)?;
        failure::point("arena.create")?;
        match &self.files {
            Files::Tmpfs(mount) => tmpfs::create_file(mount.writable(), name, len_bytes),
            Files::Memfd(table) => table.create_file(name, len_bytes),
        }
    }

    /// As [`create_file`](Self::create_file), but each 4 KiB of the file take memory by themselves.
    ///
    /// # Errors
    /// As there.
    pub fn create_small_file(&self, name: &str, len_bytes: u64) -> Result<OwnedFd, ArenaError> {
        match &self.small {
            Some(mount) => {
                check_name(name)?;
                tmpfs::create_file(mount.writable(), name, len_bytes)
            }
            None => self.create_file(name, len_bytes),
        }
    }

    /// Takes note of a file that an [`ArenaWriter`] created, so that readers find it by name.
    ///
    /// # Errors
    /// The descriptor is not that file, or the name is taken by another.
    pub fn adopt(&self, name: &str, file: OwnedFd) -> Result<(), ArenaError> {
        check_name(name)?;
        match &self.files {
            Files::Tmpfs(mount) => tmpfs::expect_same(mount.writable(), name, &file),
            Files::Memfd(table) => table.adopt(name, file),
        }
    }

    /// Opens a file for reading.
    ///
    /// # Errors
    /// [`ArenaError::Name`]; there is no such file.
    pub fn open_read_only(&self, name: &str) -> Result<OwnedFd, ArenaError> {
        check_name(name)?;
        match &self.files {
            Files::Tmpfs(mount) => {
                let small = self.small.as_ref().map(TmpfsMount::readable);
                in_either(mount.readable(), small, |mount| tmpfs::open_read_only(mount, name))
            }
            Files::Memfd(table) => table.open_read_only(name),
        }
    }

    /// Takes a file's name away. Its memory is given back when the last descriptor and mapping of it
    /// is gone, in any process.
    ///
    /// # Errors
    /// [`ArenaError::Name`]; there is no such file.
    pub fn remove(&self, name: &str) -> Result<(), ArenaError> {
        check_name(name)?;
        failure::point("arena.remove")?;
        match &self.files {
            Files::Tmpfs(mount) => {
                let small = self.small.as_ref().map(TmpfsMount::writable);
                in_either(mount.writable(), small, |mount| tmpfs::remove(mount, name))
            }
            Files::Memfd(table) => table.remove(name),
        }
    }

    /// What another process needs for [`from_parts`](Self::from_parts): a message and the descriptors
    /// to send with it.
    #[must_use]
    pub fn share_with_member(&self) -> (ArenaDescription, Vec<BorrowedFd<'_>>) {
        let (memfds, descriptors) = match &self.files {
            Files::Tmpfs(mount) => {
                let small = self.small.as_ref().map(TmpfsMount::readable);
                (None, [mount.writable(), mount.readable()].into_iter().chain(small).collect())
            }
            Files::Memfd(table) => (Some(table.locator()), Vec::new()),
        };
        (ArenaDescription { kind: self.kind, memfds }, descriptors)
    }

    /// The two capabilities of a member, from what [`share_with_member`](Self::share_with_member) gave.
    ///
    /// # Errors
    /// [`ArenaError::Parts`].
    pub fn from_parts(
        description: &ArenaDescription,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(ArenaReader, ArenaWriter), ArenaError> {
        let (kind, count) = (description.kind, descriptors.len());
        let mut mounts = descriptors.into_iter();
        match (mounts.next(), mounts.next(), mounts.next(), description.memfds) {
            (Some(writable), Some(readable), small, None)
                if small.is_some() == (kind == ArenaKind::HugeTmpfs) && mounts.len() == 0 =>
            {
                let writer = ArenaWriter(Place::Tmpfs(writable, None));
                Ok((ArenaReader(Place::Tmpfs(readable, small)), writer))
            }
            (None, _, _, Some(locator)) => {
                Ok((ArenaReader(Place::Memfd(locator)), ArenaWriter(Place::Memfd(locator))))
            }
            _ => Err(ArenaError::Parts { kind, count }),
        }
    }
}

impl ArenaReader {
    /// As [`ArenaDir::open_read_only`].
    ///
    /// # Errors
    /// As there; memfds: also where the arena's owner is gone.
    pub fn open_read_only(&self, name: &str) -> Result<OwnedFd, ArenaError> {
        check_name(name)?;
        failure::point("arena.open")?;
        match &self.0 {
            Place::Tmpfs(mount, small) => {
                let small = small.as_ref().map(OwnedFd::as_fd);
                in_either(mount.as_fd(), small, |mount| tmpfs::open_read_only(mount, name))
            }
            Place::Memfd(locator) => locator.open_read_only(name),
        }
    }
}

impl ArenaWriter {
    /// As [`ArenaDir::create_file`]. Others find the file once the owner has
    /// [adopted](ArenaDir::adopt) the descriptor.
    ///
    /// # Errors
    /// As there; memfds: that the name is taken shows only at the adoption.
    pub fn create_file(&self, name: &str, len_bytes: u64) -> Result<OwnedFd, ArenaError> {
        check_name(name)?;
        match &self.0 {
            Place::Tmpfs(mount, _) => tmpfs::create_file(mount.as_fd(), name, len_bytes),
            Place::Memfd(locator) => locator.create_file(name, len_bytes),
        }
    }
}

/// Does a thing to a file that is on one of two mounts, or on the only one.
fn in_either<T>(
    first: BorrowedFd<'_>,
    second: Option<BorrowedFd<'_>>,
    work: impl Fn(BorrowedFd<'_>) -> Result<T, ArenaError>,
) -> Result<T, ArenaError> {
    match (work(first), second) {
        (Err(error), Some(second)) if error.is_not_found() => work(second),
        (result, _) => result,
    }
}

/// The longest name: with its prefix it must be a memfd's, of 249 bytes at most.
const NAME_LIMIT_BYTES: usize = 200;

fn check_name(name: &str) -> Result<(), ArenaError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let directory = matches!(name, "." | "..");
    if name.is_empty() || name.len() > NAME_LIMIT_BYTES || directory || !name.bytes().all(plain) {
        return Err(ArenaError::Name { name: name.to_owned(), limit: NAME_LIMIT_BYTES });
    }
    Ok(())
}

/// Whether two descriptors are of one file.
fn is_same_file(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> Result<bool, Errno> {
    let (one, other) = (rustix::fs::fstat(one)?, rustix::fs::fstat(other)?);
    Ok((one.st_dev, one.st_ino) == (other.st_dev, other.st_ino))
}

/// The path by which this process reaches what `descriptor` is open on.
fn own_path(descriptor: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", descriptor.as_raw_fd())
}

#[cfg(test)]
mod tests;
