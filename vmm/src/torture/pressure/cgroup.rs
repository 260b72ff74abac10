//! A control group of the torture's own, with a memory limit: version 1 or 2, whichever has memory.
//!
//! Version 2 lets a group that has processes itself have no groups with memory below, so the new one is
//! looked for a place below this process's group, beside it, and below the root.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use procfs::ProcResult;
use procfs::process::{MountInfo, Process};

use super::{Pressed, gone};

const PREFIX: &str = "salp-torture-";

/// The names of what is asked of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// A hierarchy of groups that has memory, and where in it this process is.
#[derive(Debug)]
struct Hierarchy {
    version: Version,
    mount: PathBuf,
    own: PathBuf,
}

/// A group that this process is in; it goes back to its own and removes it when this is dropped.
#[derive(Debug)]
pub(super) struct Group {
    version: Version,
    path: PathBuf,
    own: PathBuf,
}

impl Version {
    const fn limit(self) -> &'static str {
        match self {
            Self::One => "memory.limit_in_bytes",
            Self::Two => "memory.max",
        }
    }
}

impl Hierarchy {
    /// Version 1's memory, else version 2.
    fn find() -> Result<Self, String> {
        let unknown = |error: procfs::ProcError| format!("the control groups are not known: {error}");
        let read = || -> ProcResult<_> {
            let process = Process::myself()?;
            Ok((process.mountinfo()?.0, process.cgroups()?.0))
        };
        let (mounts, groups) = read().map_err(unknown)?;
        let is_one =
            |mount: &&MountInfo| mount.fs_type == "cgroup" && mount.super_options.contains_key("memory");
        let is_two = |mount: &&MountInfo| mount.fs_type == "cgroup2";
        let one = mounts.iter().find(is_one).map(|mount| (Version::One, mount));
        let two = mounts.iter().find(is_two).map(|mount| (Version::Two, mount));
        let (version, mount) = one.or(two).ok_or("no control groups with memory are mounted")?;
        let group = groups.iter().find(|group| match version {
            Version::One => group.controllers.iter().any(|name| name == "memory"),
            Version::Two => group.controllers.iter().all(String::is_empty),
        });
        let path = group.map(|group| group.pathname.clone()).ok_or("this process is in no such group")?;
        // What the mount shows begins at its root; a group outside of that is not reached.
        let below = path.strip_prefix(mount.root.trim_end_matches('/')).unwrap_or("");
        let own = mount.mount_point.join(below.trim_start_matches('/'));
        Ok(Self { version, mount: mount.mount_point.clone(), own })
    }

    /// Where a new group may have its place.
    fn places(&self) -> Vec<&Path> {
        let mut places = vec![self.own.as_path()];
        places.extend(self.own.parent().filter(|parent| parent.starts_with(&self.mount)));
        places.push(&self.mount);
        places
    }
}

impl Group {
    /// Makes the group, limits it, and enters it.
    pub(super) fn enter(limit_bytes: u64) -> Result<Self, String> {
        let hierarchy = Hierarchy::find()?;
        let mut refused = String::new();
        for place in hierarchy.places() {
            let path = place.join(format!("{PREFIX}{}", std::process::id()));
            if let Err(error) = fs::create_dir(&path) {
                refused = format!("{}: {error}", path.display());
                continue;
            }
            let group = Self { version: hierarchy.version, path, own: hierarchy.own.clone() };
            match group.begin(limit_bytes) {
                Ok(()) => return Ok(group),
                Err(error) => refused = format!("{}: {error}", group.path.display()),
            }
        }
        Err(refused)
    }

    fn begin(&self, limit_bytes: u64) -> io::Result<()> {
        fs::write(self.path.join(self.version.limit()), limit_bytes.to_string())?;
        fs::write(self.path.join("cgroup.procs"), std::process::id().to_string())
    }

    pub(super) fn look(&self) -> Pressed {
        let number = |name: &str| -> u64 {
            let text = fs::read_to_string(self.path.join(name)).unwrap_or_default();
            text.trim().parse().unwrap_or(0)
        };
        let field = |name: &str, key: &str| -> u64 {
            let text = fs::read_to_string(self.path.join(name)).unwrap_or_default();
            let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok());
            value.unwrap_or(0)
        };
        match self.version {
            Version::One => Pressed {
                swapped_bytes: field("memory.stat", "swap"),
                limit_hits: number("memory.failcnt"),
                killed: field("memory.oom_control", "oom_kill"),
            },
            Version::Two => Pressed {
                swapped_bytes: number("memory.swap.current"),
                limit_hits: field("memory.events", "max"),
                killed: field("memory.events", "oom_kill"),
            },
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let back = fs::write(self.own.join("cgroup.procs"), std::process::id().to_string());
        if let Err(error) = back.and_then(|()| remove(&self.path)) {
            tracing::warn!(group = %self.path.display(), %error, "a control group stays");
        }
    }
}

/// Removes a group; a process that has just ended is in it for a moment yet.
fn remove(path: &Path) -> io::Result<()> {
    let mut tries = 0;
    loop {
        match fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && tries < 200 => {
                tries += 1;
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            result => return result,
        }
    }
}

/// Removes groups of runs that were killed.
pub(super) fn remove_leftovers(notes: &mut Vec<String>) {
    let Ok(hierarchy) = Hierarchy::find() else { return };
    for place in hierarchy.places() {
        for entry in fs::read_dir(place).into_iter().flatten().flatten() {
            if gone(&entry.file_name().to_string_lossy(), PREFIX, "").is_some()
                && fs::remove_dir(entry.path()).is_ok()
            {
                notes.push(format!("removed {}, left by a run that was killed", entry.path().display()));
            }
        }
    }
}
