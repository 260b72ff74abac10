//! Memory pressure: the torture's processes in a control group with a memory limit, and swap for what
//! does not fit. Both are taken away again when [`Pressure`] is dropped.
//!
//! | the host has | what is done |
//! |---|---|
//! | swap, or root and a disk | a limit; a swap file of its own where there is no swap |
//! | no swap and none can be made | no limit, unless one was asked for: beyond it the host kills |
//! | no control group that this process may make | no limit, and [`Pressure::notes`] says why |
//!
//! A swap file or group that a killed run has left is taken away by the next one.

mod cgroup;
mod swap;

use self::cgroup::Group;
use self::swap::SwapFile;

/// See the module.
#[derive(Debug, Default)]
pub struct Pressure {
    // Before the swap: whoever is in the group has ended or leaves it.
    group: Option<Group>,
    swap: Option<SwapFile>,
    notes: Vec<String>,
}

/// What the pressure did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pressed {
    /// Bytes of the family in swap now.
    pub swapped_bytes: u64,
    /// Times that the limit was met.
    pub limit_hits: u64,
    /// Processes that the host has killed.
    pub killed: u64,
}

impl Pressure {
    /// None.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Puts this process and all that it starts from now on under a limit: the one asked for, or
    /// `usual_bytes` where there is swap for `most_bytes`.
    ///
    /// # Errors
    /// One was asked for and cannot be set.
    pub fn apply(asked_bytes: Option<u64>, usual_bytes: u64, most_bytes: u64) -> Result<Self, String> {
        let mut notes = Vec::new();
        swap::remove_leftovers(&mut notes);
        cgroup::remove_leftovers(&mut notes);
        let (swap, has_swap) = match swap::free_bytes() {
            free if free >= most_bytes => (None, true),
            _ => match SwapFile::make(most_bytes) {
                Ok(file) => (Some(file), true),
                Err(error) => {
                    notes.push(format!("no swap: {error}"));
                    (None, false)
                }
            },
        };
        let limit_bytes = match asked_bytes {
            Some(bytes) => bytes,
            None if has_swap => usual_bytes,
            None => {
                notes.push("no memory limit, since there is no swap".to_owned());
                return Ok(Self { group: None, swap, notes });
            }
        };
        let group = match Group::enter(limit_bytes) {
            Ok(group) => Some(group),
            Err(error) if asked_bytes.is_some() => return Err(error),
            Err(error) => {
                notes.push(format!("no memory limit: {error}"));
                None
            }
        };
        if group.is_some() {
            let limit = limit_bytes >> 20;
            notes.push(match &swap {
                Some(file) => format!("memory limit {limit} MiB, swap file {}", file.path().display()),
                None => format!("memory limit {limit} MiB, over the swap that there is"),
            });
        }
        Ok(Self { group, swap, notes })
    }

    /// What was done, and what could not be and why.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Whether there is a limit.
    #[must_use]
    pub fn has_limit(&self) -> bool {
        self.group.is_some()
    }

    /// What it has done so far.
    #[must_use]
    pub fn look(&self) -> Pressed {
        self.group.as_ref().map_or_else(Pressed::default, Group::look)
    }
}

impl Drop for Pressure {
    fn drop(&mut self) {
        drop(self.group.take());
        drop(self.swap.take());
    }
}

/// The process whose number ends the name `prefix-<number><suffix>`, if it is no more.
fn gone(name: &str, prefix: &str, suffix: &str) -> Option<u32> {
    let number = name.strip_prefix(prefix)?.strip_suffix(suffix)?.parse().ok()?;
    let is_there = std::path::Path::new("/proc").join(format!("{number}")).exists();
    (!is_there).then_some(number)
}
