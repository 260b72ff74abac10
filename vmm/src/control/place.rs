//! The directory of one user's colonies: `$XDG_RUNTIME_DIR/salp`, else `salp-<uid>` in the directory
//! for temporary files. Private (0700), and used only if it belongs to this user.
//!
//! | name | what |
//! |---|---|
//! | `colony-<pid>.sock` | the socket of a colony, named by its keeper's process |
//! | `colony-<pid>.log` | what a keeper in the background has to say |
//! | `<name>.vm` | a symbolic link to the socket of the colony that has the VM |
//! | `<name>.console` | the VM's console output |
//!
//! A link is made whole or not at all, and only if there is none: so names are unique. Whoever
//! changes names or removes what a killed colony left holds the directory's lock (flock). A socket
//! is bound and listens under that lock; so one that refuses a connection has no colony any more.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::ControlError;

/// What the names of files with last words end with.
const LAST_WORDS: &str = ".ended";
/// The longest name, in bytes.
const NAME_BYTES: usize = 63;

/// See the module.
#[derive(Clone, Debug)]
pub struct Place {
    path: PathBuf,
}

/// The directory, locked.
#[derive(Debug)]
pub struct Locked<'a> {
    place: &'a Place,
    _directory: File,
}

/// What stands behind a name.
#[derive(Debug)]
pub enum Found {
    /// A connection to its colony.
    Colony(UnixStream),
    /// Its colony is gone; what it left is cleaned up.
    Stale,
    /// No VM has that name.
    Nothing,
}

impl Place {
    /// This user's directory; it need not exist.
    #[must_use]
    pub fn of_user() -> Self {
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let path = match runtime.filter(|path| path.is_absolute()) {
            Some(path) => path.join("salp"),
            None => std::env::temp_dir().join(format!("salp-{}", rustix::process::geteuid().as_raw())),
        };
        Self { path }
    }

    /// The directory at this path.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the directory is there.
    ///
    /// # Errors
    /// It is not this user's, or others may enter it.
    pub fn exists(&self) -> Result<bool, ControlError> {
        let metadata = match fs::symlink_metadata(&self.path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(self.host("look at", &self.path, error)),
        };
        let own = rustix::process::geteuid().as_raw();
        let why = match () {
            () if !metadata.is_dir() => "it is no directory".to_owned(),
            () if metadata.uid() != own => format!("it belongs to user {}, not {own}", metadata.uid()),
            () if metadata.mode() & 0o077 != 0 => {
                format!("others may enter it: `chmod 700 {}`", self.path.display())
            }
            () => return Ok(true),
        };
        Err(ControlError::Place { path: self.path.clone(), why })
    }

    /// Makes the directory if it is not there, and locks it.
    ///
    /// # Errors
    /// As for [`exists`](Self::exists), or the host refused.
    pub fn lock(&self) -> Result<Locked<'_>, ControlError> {
        loop {
            match DirBuilder::new().mode(0o700).create(&self.path) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                    return Err(self.host("make the directory", &self.path, error));
                }
                _ => {}
            }
            if !self.exists()? {
                continue;
            }
            let directory = match File::open(&self.path) {
                Ok(directory) => directory,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(self.host("open", &self.path, error)),
            };
            flock(&directory, FlockOperation::LockExclusive)
                .map_err(|error| self.host("lock", &self.path, error.into()))?;
            // The last colony may have removed it meanwhile, and another one have made it anew.
            let locked = directory.metadata().map_err(|error| self.host("look at", &self.path, error))?;
            if fs::symlink_metadata(&self.path).is_ok_and(|now| now.ino() == locked.ino()) {
                return Ok(Locked { place: self, _directory: directory });
            }
        }
    }

    /// The file name of a colony's socket.
    #[must_use]
    pub fn socket_name(keeper_pid: u32) -> String {
        format!("colony-{keeper_pid}.sock")
    }

    /// Where a colony's log is.
    #[must_use]
    pub fn log(&self, keeper_pid: u32) -> PathBuf {
        self.path.join(format!("colony-{keeper_pid}.log"))
    }

    /// Where a VM's console output is.
    #[must_use]
    pub fn console(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.console"))
    }

    /// Where the last words of a VM are that ended badly and alone in the background.
    fn last_words(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}{LAST_WORDS}"))
    }

    /// Leaves a VM's last words, for whoever asks next.
    ///
    /// # Errors
    /// The host refused.
    pub fn leave_last_words(&self, name: &str, text: &str) -> Result<(), ControlError> {
        let _locked = self.lock()?;
        let path = self.last_words(name);
        fs::write(&path, text).map_err(|error| self.host("write", &path, error))
    }

    /// Takes away all last words.
    ///
    /// # Errors
    /// The directory is not this user's, or cannot be read.
    pub fn take_last_words(&self) -> Result<Vec<String>, ControlError> {
        let mut words = Vec::new();
        let is_last = |name: &String| name.ends_with(LAST_WORDS);
        if !self.exists()? || !self.names()?.iter().any(is_last) {
            return Ok(words);
        }
        let locked = self.lock()?;
        for name in self.names()?.into_iter().filter(is_last) {
            let path = self.path.join(name);
            words.push(fs::read_to_string(&path).map_err(|error| self.host("read", &path, error))?);
            remove(&path);
        }
        locked.leave();
        Ok(words)
    }

    fn link(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.vm"))
    }

    /// The file names of all sockets.
    ///
    /// # Errors
    /// The directory is not this user's, or cannot be read.
    pub fn sockets(&self) -> Result<Vec<String>, ControlError> {
        if !self.exists()? {
            return Ok(Vec::new());
        }
        let mut names = self.names()?;
        names.retain(|name| name.starts_with("colony-") && name.ends_with(".sock"));
        names.sort();
        Ok(names)
    }

    fn names(&self) -> Result<Vec<String>, ControlError> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|error| self.host("read", &self.path, error))?,
        };
        Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
    }

    /// The names whose links lead to this socket.
    fn names_of(&self, socket: &str) -> Result<Vec<String>, ControlError> {
        let names = self.names()?.into_iter().filter_map(|name| name.strip_suffix(".vm").map(str::to_owned));
        Ok(names
            .filter(|name| fs::read_link(self.link(name)).is_ok_and(|to| to == Path::new(socket)))
            .collect())
    }

    /// The colony that has a VM of this name.
    ///
    /// # Errors
    /// The directory is not this user's, or the host refused.
    pub fn find(&self, name: &str) -> Result<Found, ControlError> {
        check_name(name)?;
        if !self.exists()? {
            return Ok(Found::Nothing);
        }
        match self.target(name)? {
            None => Ok(Found::Nothing),
            Some(socket) => self.connect(&socket),
        }
    }

    fn target(&self, name: &str) -> Result<Option<String>, ControlError> {
        let link = self.link(name);
        match fs::read_link(&link) {
            Ok(target) => Ok(Some(target.to_string_lossy().into_owned())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.host("read", &link, error)),
        }
    }

    /// Connects to a socket; what a colony without a process left is cleaned up.
    ///
    /// # Errors
    /// The host refused.
    pub fn connect(&self, socket: &str) -> Result<Found, ControlError> {
        match self.try_connect(socket)? {
            Some(stream) => Ok(Found::Colony(stream)),
            // Its last user may have removed the directory: it is not made again for that.
            None if !self.exists()? => Ok(Found::Nothing),
            None => {
                let locked = self.lock()?;
                let found = locked.connect(socket);
                locked.leave();
                found
            }
        }
    }

    /// None: nobody is there.
    fn try_connect(&self, socket: &str) -> Result<Option<UnixStream>, ControlError> {
        let path = self.path.join(socket);
        match UnixStream::connect(&path) {
            Ok(stream) => Ok(Some(stream)),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                Ok(None)
            }
            Err(error) => Err(self.host("connect to", &path, error)),
        }
    }

    fn host(&self, action: &'static str, path: &Path, source: io::Error) -> ControlError {
        ControlError::Host { action, path: path.to_owned(), source }
    }
}

impl Locked<'_> {
    fn connect(&self, socket: &str) -> Result<Found, ControlError> {
        if let Some(stream) = self.place.try_connect(socket)? {
            return Ok(Found::Colony(stream));
        }
        // Whoever ends in order removes its socket; whoever is killed does not.
        let was_killed = fs::symlink_metadata(self.place.path.join(socket)).is_ok();
        self.remove_colony(socket)?;
        Ok(if was_killed { Found::Stale } else { Found::Nothing })
    }

    /// Binds the socket of this process's colony.
    ///
    /// # Errors
    /// The host refused.
    pub fn listen(&self, socket: &str) -> Result<UnixListener, ControlError> {
        // A killed colony's keeper may have had this process's number.
        self.remove_colony(socket)?;
        let path = self.place.path.join(socket);
        UnixListener::bind(&path).map_err(|error| self.place.host("listen at", &path, error))
    }

    /// Takes these names for a colony: all of them, or none. One whose colony was killed is free.
    ///
    /// # Errors
    /// One is taken, or is no name.
    pub fn claim(&self, names: &[String], socket: &str) -> Result<(), ControlError> {
        let mut claimed = Vec::new();
        for name in names {
            match self.claim_one(name, socket) {
                Ok(()) => claimed.push(name.clone()),
                Err(error) => {
                    self.release(&claimed);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn claim_one(&self, name: &str, socket: &str) -> Result<(), ControlError> {
        check_name(name)?;
        let link = self.place.link(name);
        if let Some(other) = self.place.target(name)?
            && let Found::Colony(_) = self.connect(&other)?
        {
            return Err(ControlError::Taken(name.to_owned()));
        }
        match symlink(socket, &link) {
            Ok(()) => Ok(()),
            Err(error) => Err(self.place.host("make", &link, error)),
        }
    }

    /// The first `count` of `prefix-1`, `prefix-2`, ... that nobody has.
    #[must_use]
    pub fn free_names(&self, prefix: &str, count: usize) -> Vec<String> {
        let names = (1_u64..).map(|number| format!("{prefix}-{number}"));
        names.filter(|name| fs::symlink_metadata(self.place.link(name)).is_err()).take(count).collect()
    }

    /// Gives up names, with their console files.
    pub fn release(&self, names: &[String]) {
        for name in names {
            remove(&self.place.console(name));
            remove(&self.place.link(name));
        }
    }

    /// Removes all that a colony has here, and the directory if nothing else is in it.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn remove_colony(&self, socket: &str) -> Result<(), ControlError> {
        self.release(&self.place.names_of(socket)?);
        remove(&self.place.path.join(socket));
        remove(&self.place.path.join(socket.replace(".sock", ".log")));
        Ok(())
    }

    /// Removes the directory if nothing is in it.
    pub fn leave(self) {
        // Others may have theirs there.
        if let Err(error) = fs::remove_dir(&self.place.path)
            && error.kind() != ErrorKind::DirectoryNotEmpty
        {
            tracing::debug!(%error, "the directory of names stays");
        }
    }
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "a file stays");
    }
}

/// Whether a text can be a name.
///
/// # Errors
/// It cannot.
pub fn check_name(name: &str) -> Result<(), ControlError> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let is_first = |c: char| c.is_ascii_alphanumeric();
    if name.len() <= NAME_BYTES && name.starts_with(is_first) && name.chars().all(is_plain) {
        Ok(())
    } else {
        Err(ControlError::BadName(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(test: &str) -> Place {
        Place::at(std::env::temp_dir().join(format!("salp-place-{test}-{}", std::process::id())))
    }

    fn texts(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn names_are_unique_and_claimed_all_or_none() {
        let place = place("unique");
        let locked = place.lock().expect("a new directory");
        let _listener = locked.listen("colony-1.sock").expect("a socket");
        locked.claim(&texts(&["a", "b-1"]), "colony-1.sock").expect("both are free");
        let error = locked.claim(&texts(&["c", "a"]), "colony-1.sock").expect_err("a is taken");
        assert!(matches!(error, ControlError::Taken(name) if name == "a"));
        assert!(matches!(place.find("c"), Ok(Found::Nothing)));
        assert!(matches!(place.find("a"), Ok(Found::Colony(_))));
        assert_eq!(locked.free_names("b", 2), texts(&["b-2", "b-3"]));
        assert_eq!(place.sockets().expect("it is ours"), texts(&["colony-1.sock"]));
        locked.remove_colony("colony-1.sock").expect("it is there");
        locked.leave();
        assert!(!place.path().exists());
    }

    #[test]
    fn what_a_killed_colony_left_is_cleaned_up() {
        let place = place("stale");
        let locked = place.lock().expect("a new directory");
        drop(locked.listen("colony-1.sock").expect("a socket"));
        locked.claim(&texts(&["a", "b"]), "colony-1.sock").expect("both are free");
        fs::write(place.console("a"), "text").expect("a file");
        let listener = locked.listen("colony-2.sock").expect("a socket");
        locked.claim(&texts(&["b"]), "colony-2.sock").expect("its colony is gone");
        assert!(matches!(place.find("a"), Ok(Found::Nothing)), "all names of that colony go at once");
        assert!(!place.console("a").exists());
        assert!(matches!(place.find("b"), Ok(Found::Colony(_))));
        drop(locked);
        drop(listener);
        assert!(matches!(place.find("b"), Ok(Found::Stale)));
        assert!(matches!(place.find("b"), Ok(Found::Nothing)));
        place.lock().expect("it is there").leave();
        assert!(!place.path().exists());
    }

    #[test]
    fn a_directory_that_others_may_enter_is_refused() {
        let place = place("open");
        DirBuilder::new().mode(0o755).create(place.path()).expect("a new directory");
        let open = fs::metadata(place.path()).expect("it is there").mode() & 0o077 != 0;
        assert_eq!(matches!(place.lock(), Err(ControlError::Place { .. })), open);
        fs::remove_dir(place.path()).expect("it is ours");
    }

    #[test]
    fn names_are_plain() {
        for good in ["a", "salp-1", "a.b_c-9", &"n".repeat(63)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", ".a", "a/b", "a b", "ü", "a\n", &"n".repeat(64)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }
}
