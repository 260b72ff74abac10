//! Swap for the torture: what the host has, or a file of its own, made by the host's own commands.

use std::env;
use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use procfs::Current as _;

use super::gone;

const PREFIX: &str = "salp-torture-";
const SUFFIX: &str = ".swap";
/// A swap file's share of what its disk has free, at most: half.
const DISK_SHARE: u64 = 2;

/// A swap file in use; taken out of use and removed when dropped.
#[derive(Debug)]
pub(super) struct SwapFile {
    path: PathBuf,
}

/// Free swap of the host, in bytes.
pub(super) fn free_bytes() -> u64 {
    procfs::Meminfo::current().map_or(0, |meminfo| meminfo.swap_free)
}

/// Where swap files are tried: not all file systems can have one.
fn places() -> [PathBuf; 2] {
    [env::temp_dir(), PathBuf::from("/var/tmp")]
}

impl SwapFile {
    /// Makes one of `bytes`, or of what the disk can spare, and puts it into use.
    pub(super) fn make(bytes: u64) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("only root can make a swap file".to_owned());
        }
        let mut refused = Vec::new();
        for place in places() {
            match Self::make_in(&place, bytes) {
                Ok(file) => return Ok(file),
                Err(error) => refused.push(format!("{}: {error}", place.display())),
            }
        }
        refused.dedup();
        Err(refused.join("; "))
    }

    fn make_in(place: &Path, bytes: u64) -> Result<Self, String> {
        let disk = rustix::fs::statvfs(place).map_err(|error| error.to_string())?;
        let len_bytes = bytes.min(disk.f_bavail * disk.f_frsize / DISK_SHARE) >> 20 << 20;
        if len_bytes == 0 {
            return Err("the disk is full".to_owned());
        }
        let path = place.join(format!("{PREFIX}{}{SUFFIX}", std::process::id()));
        let made = File::options().write(true).create_new(true).mode(0o600).open(&path);
        let made = made.map_err(|error| error.to_string())?;
        // From here on it is removed, whatever happens.
        let file = Self { path };
        rustix::fs::fallocate(&made, rustix::fs::FallocateFlags::empty(), 0, len_bytes)
            .map_err(|error| error.to_string())?;
        run("mkswap", &file.path)?;
        run("swapon", &file.path)?;
        Ok(file)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SwapFile {
    fn drop(&mut self) {
        if is_in_use(&self.path)
            && let Err(error) = run("swapoff", &self.path)
        {
            tracing::warn!(file = %self.path.display(), %error, "a swap file stays in use");
            return;
        }
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(file = %self.path.display(), %error, "a swap file stays");
        }
    }
}

fn is_in_use(path: &Path) -> bool {
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    swaps.lines().filter_map(|line| line.split_whitespace().next()).any(|used| Path::new(used) == path)
}

/// Runs one of the host's commands on a file.
fn run(program: &str, path: &Path) -> Result<(), String> {
    let output = Command::new(program).arg(path).output().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(format!("{program}: {}", said.lines().last().unwrap_or("failed")))
}

/// Removes files of runs that were killed.
pub(super) fn remove_leftovers(notes: &mut Vec<String>) {
    for entry in places().iter().filter_map(|place| fs::read_dir(place).ok()).flatten().flatten() {
        let path = entry.path();
        if gone(&entry.file_name().to_string_lossy(), PREFIX, SUFFIX).is_some() {
            drop(SwapFile { path: path.clone() });
            if !path.exists() {
                notes.push(format!("removed {}, left by a run that was killed", path.display()));
            }
        }
    }
}
