//! What a process holds of its host: descriptors, threads, mappings, children. And the salp binary,
//! and processes found by a mark in their environment.
//!
//! All is read from `/proc`. A count taken while threads come and go is a moment's: [`settled`]
//! looks again until it is what it should be.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use salp::torture::script;

/// The environment variable that names the salp binary to a program that is not of its build: a fuzzer.
pub const BINARY: &str = "SALP_BINARY";

/// The salp binary of the build that this test belongs to, or the one that [`BINARY`] names.
///
/// # Panics
/// There is none: only the tests were built.
#[must_use]
pub fn salp_binary() -> PathBuf {
    if let Some(named) = std::env::var_os(BINARY) {
        return PathBuf::from(named);
    }
    let test = std::env::current_exe().expect("a running program has a path");
    let directory = test.parent().and_then(Path::parent).expect("a test lies two levels below its build");
    let salp = directory.join("salp");
    assert!(salp.is_file(), "{} is missing: run `make test`, which builds it first", salp.display());
    salp
}

/// What this process holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Mappings of files and of shared memory.
    pub mappings: usize,
    /// Other mappings. The C library keeps stacks of threads that have ended, and arenas for those
    /// that allocated: some dozens, however many threads come and go.
    pub anonymous: usize,
    /// Its children.
    pub children: usize,
    /// Children that have ended and were not reaped.
    pub zombies: usize,
}

impl Usage {
    /// This process's usage now.
    #[must_use]
    pub fn now() -> Self {
        let children = children();
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        // The fifth field is the inode: proc(5).
        let is_file = |line: &&str| line.split_whitespace().nth(4).is_some_and(|inode| inode != "0");
        let mappings = maps.lines().filter(is_file).count();
        Self {
            descriptors: entries("/proc/self/fd").len().saturating_sub(1),
            threads: entries("/proc/self/task").len(),
            mappings,
            anonymous: maps.lines().count() - mappings,
            zombies: children.iter().filter(|pid| state(**pid) == Some('Z')).count(),
            children: children.len(),
        }
    }

    /// Whether this is not more than `base`, but for what the C library keeps.
    #[must_use]
    pub fn is_within(&self, base: &Self) -> bool {
        self.descriptors <= base.descriptors
            && self.threads <= base.threads
            && self.mappings <= base.mappings
            && self.anonymous <= base.anonymous + ANONYMOUS_SLACK
            && self.children <= base.children
            && self.zombies == 0
    }
}

/// Twenty stacks of 2 MiB with their guards (the C library keeps 40 MiB), and eight arenas a core.
const ANONYMOUS_SLACK: usize = 2 * 20 + 2 * 8 * 8;

/// Asks `now` until `is` holds of it, at most `limit`; returns the last answer.
pub fn settled<T>(limit: Duration, mut now: impl FnMut() -> T, is: impl Fn(&T) -> bool) -> T {
    let deadline = Instant::now() + limit;
    loop {
        let found = now();
        if is(&found) || Instant::now() >= deadline {
            return found;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The names in a directory of `/proc`.
#[must_use]
pub fn entries(path: &str) -> Vec<String> {
    let Ok(directory) = fs::read_dir(path) else { return Vec::new() };
    directory.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// The processes that any thread of this one started and that exist still, zombies included.
#[must_use]
pub fn children() -> BTreeSet<u32> {
    let mut found = BTreeSet::new();
    for task in entries("/proc/self/task") {
        let text = fs::read_to_string(format!("/proc/self/task/{task}/children")).unwrap_or_default();
        found.extend(text.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    found
}

/// The state letter of a process (proc(5)); none: it is gone.
#[must_use]
pub fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.trim_start().chars().next()
}

/// The processes whose environment has the variable `name` with this value. A zombie has none any
/// more.
#[must_use]
pub fn marked(name: &str, value: &str) -> BTreeSet<u32> {
    let wanted = format!("{name}={value}");
    let is_marked = |pid: &u32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|one| one == wanted.as_bytes())
    };
    entries("/proc").iter().filter_map(|name| name.parse().ok()).filter(is_marked).collect()
}

/// Numbers that a seed decides.
#[derive(Clone, Debug)]
pub struct Random(script::Random);

impl Random {
    /// From the environment variable `SALP_SEED`, else from the clock. Prints it.
    #[must_use]
    pub fn from_environment(test: &str) -> Self {
        let given = std::env::var("SALP_SEED").ok().and_then(|text| text.parse().ok());
        let clock = || {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.map_or(1, |since| since.as_secs() ^ u64::from(since.subsec_nanos()) << 20)
        };
        let seed = given.unwrap_or_else(clock);
        println!("{test}: SALP_SEED={seed} repeats this run's choices");
        Self(script::Random::new(seed))
    }

    /// Draws a number.
    pub fn draw(&mut self) -> u64 {
        self.0.draw()
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit).expect("an index fits 64 bits");
        usize::try_from(self.0.below(limit)).expect("it is below an index")
    }

    /// Whether a thing happens that happens in `percent` of 100 cases.
    pub fn is_in(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// A directory for one test, removed when dropped. Anybody may enter it.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// A new, empty directory.
    ///
    /// # Panics
    /// The host has no room for one.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("salp-{name}-{}", std::process::id()));
        fs::create_dir(&path).expect("a new directory for temporary files");
        let anybody = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&path, anybody).expect("it is ours");
        Self(path)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The names in it.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        entries(&self.0.to_string_lossy())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            println!("{} stays: {error}", self.0.display());
        }
    }
}

/// The environment variable that marks the processes of a test.
pub const MARK: &str = "SALP_TEST_MARK";

/// Checks that a run of salp that ended has left nothing behind: no process with its mark, no mount
/// and no shared memory of salp's, no file in the directory it worked in.
///
/// # Panics
/// Something is left.
pub fn expect_nothing_left(mark: &str, scratch: &Scratch) {
    let left = settled(Duration::from_secs(10), || marked(MARK, mark), BTreeSet::is_empty);
    assert!(left.is_empty(), "processes {left:?} outlive salp");
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("a table of mounts");
    assert!(!mounts.contains("salp-arena"), "a mount is left:\n{mounts}");
    let shared: Vec<_> = entries("/dev/shm").into_iter().filter(|name| name.contains("salp")).collect();
    assert!(shared.is_empty(), "shared memory is left: {shared:?}");
    assert_eq!(scratch.names(), Vec::<String>::new(), "files are left");
}

/// What a command has put out is a refusal: it fails with that status, saying one line in which all of
/// `words` are.
#[track_caller]
pub fn expect_refusal(output: &Output, status: i32, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "status of: {said}");
    assert_eq!(said.lines().count(), 1, "one line, not:\n{said}");
    assert!(said.starts_with("salp: "), "{said}");
    for word in words {
        assert!(said.contains(word), "no {word:?} in: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// How often the threads of a process have gone to sleep.
#[must_use]
pub fn switches(pid: u32) -> u64 {
    let tasks = entries(&format!("/proc/{pid}/task"));
    let status = |task: &String| fs::read_to_string(format!("/proc/{pid}/task/{task}/status"));
    let texts = tasks.iter().filter_map(|task| status(task).ok()).collect::<String>();
    let lines = texts.lines().filter(|line| line.contains("voluntary_ctxt_switches"));
    lines.filter_map(|line| line.split_whitespace().last()?.parse::<u64>().ok()).sum()
}
