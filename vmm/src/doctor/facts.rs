//! What is found out about a host: [`Facts`]. What is a file is read below a root directory that may be
//! another than `/`; what only a system call tells is asked of the host.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use procfs::{FromRead as _, Meminfo, ProcessCGroups};
use rustix::process::{Resource, getrlimit};

use crate::arena_files::{ArenaChoice, ArenaDir, ArenaError, ArenaKind};
use crate::control::place::Place;
use crate::kvm::{Capability, HostDescription, HostKind, Kvm, KvmError};
use crate::window::{Pagemap, Userfault};
use crate::words::{LEAF_BYTES, wide};

/// See the module.
#[derive(Debug)]
pub struct Facts {
    /// What files say.
    pub files: FileFacts,
    /// How KVM runs guests.
    pub kind: HostKind,
    /// What KVM says of the capabilities that salp needs.
    pub capabilities: Result<Vec<Capability>, KvmError>,
    /// The features of userfaultfd that are missing.
    pub userfault: io::Result<Vec<&'static str>>,
    /// Whether there is `PAGEMAP_SCAN`.
    pub pagemap: io::Result<()>,
    /// The arena that the host allows, and whether its readers are kept from writing.
    pub arena: Result<(ArenaKind, bool), ArenaError>,
    /// Whether an io_uring can be had.
    pub io_uring: io::Result<()>,
    /// `RLIMIT_MEMLOCK`.
    pub locked_memory: Limit,
    /// `RLIMIT_NOFILE`.
    pub open_files: Limit,
    /// Processors that this process may use.
    pub processors: usize,
    /// The directory of sockets, and whether it can be used.
    pub sockets: Result<PathBuf, String>,
    /// Whether this is root.
    pub is_root: bool,
}

/// A resource limit; `None` is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// What holds now.
    pub soft: Option<u64>,
    /// How far it can be raised without privilege.
    pub hard: Option<u64>,
}

/// What files say; `None` where one cannot be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileFacts {
    /// `/proc/sys/kernel/osrelease`.
    pub release: Option<String>,
    /// `MemAvailable`, in bytes.
    pub available_bytes: Option<u64>,
    /// `SwapTotal`, in bytes.
    pub swap_bytes: Option<u64>,
    /// The tightest memory limit of this process's control groups, with the file that says so.
    pub group_limit: Option<(u64, PathBuf)>,
    /// `/proc/sys/vm/max_map_count`.
    pub map_count: Option<u64>,
    /// The chosen words of `/sys/kernel/mm/transparent_hugepage/`.
    pub huge_enabled: Option<String>,
    /// As above.
    pub huge_shmem: Option<String>,
    /// As above.
    pub huge_defrag: Option<String>,
    /// `/proc/sys/kernel/seccomp/actions_avail`.
    pub seccomp_actions: Option<String>,
    /// `/proc/sys/kernel/io_uring_disabled`.
    pub io_uring_disabled: Option<u64>,
}

impl Facts {
    /// All of this host, its files below `root`.
    #[must_use]
    pub fn gather(root: &Path) -> Self {
        let description = HostDescription::read();
        let arena = ArenaDir::create_as(ArenaChoice::Best, wide(LEAF_BYTES));
        let place = Place::of_user();
        Self {
            files: FileFacts::read(root),
            kind: description.kind,
            capabilities: Kvm::look_up_capabilities(),
            userfault: Userfault::missing_features(),
            pagemap: Pagemap::open_own().map(|_| ()),
            arena: arena.map(|arena| (arena.kind(), arena.guards_readers())),
            io_uring: io_uring::IoUring::new(2).map(|_| ()),
            locked_memory: Limit::of(Resource::Memlock),
            open_files: Limit::of(Resource::Nofile),
            processors: description.processors,
            sockets: usable(&place),
            is_root: rustix::process::geteuid().is_root(),
        }
    }
}

/// Made as any command makes it, and taken away again if nobody uses it.
fn usable(place: &Place) -> Result<PathBuf, String> {
    let locked = place.lock().map_err(|error| error.to_string())?;
    locked.leave();
    Ok(place.path().to_owned())
}

impl Limit {
    fn of(resource: Resource) -> Self {
        let limit = getrlimit(resource);
        Self { soft: limit.current, hard: limit.maximum }
    }
}

impl FileFacts {
    /// Reads them below a root directory.
    #[must_use]
    pub fn read(root: &Path) -> Self {
        let memory = Meminfo::from_file(root.join("proc/meminfo")).ok();
        let number = |path| text(root, path).and_then(|text| text.parse().ok());
        let huge = |name| {
            let path = Path::new("sys/kernel/mm/transparent_hugepage").join(name);
            text(root, path).as_deref().and_then(chosen)
        };
        Self {
            release: text(root, "proc/sys/kernel/osrelease"),
            available_bytes: memory.as_ref().and_then(|memory| memory.mem_available),
            swap_bytes: memory.map(|memory| memory.swap_total),
            group_limit: group_limit(root),
            map_count: number("proc/sys/vm/max_map_count"),
            huge_enabled: huge("enabled"),
            huge_shmem: huge("shmem_enabled"),
            huge_defrag: huge("defrag"),
            seccomp_actions: text(root, "proc/sys/kernel/seccomp/actions_avail"),
            io_uring_disabled: number("proc/sys/kernel/io_uring_disabled"),
        }
    }
}

fn text(root: &Path, path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(root.join(path)).ok().map(|text| text.trim().to_owned())
}

/// The word in brackets: `always [madvise] never`.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(word, _)| word.to_owned())
}

/// The tightest memory limit of this process's groups and all that they lie in, in both hierarchies.
fn group_limit(root: &Path) -> Option<(u64, PathBuf)> {
    let groups = ProcessCGroups::from_file(root.join("proc/self/cgroup")).ok()?;
    let mut limits = Vec::new();
    for group in groups {
        let (mounts, file): (&[_], _) = match group.hierarchy {
            0 => (&["sys/fs/cgroup", "sys/fs/cgroup/unified"], "memory.max"),
            _ if group.controllers.iter().any(|name| name == "memory") => {
                (&["sys/fs/cgroup/memory"], "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let inner = Path::new(group.pathname.trim_start_matches('/'));
        for (mount, part) in mounts.iter().flat_map(|mount| inner.ancestors().map(move |part| (mount, part)))
        {
            let path = Path::new(mount).join(part).join(file);
            // Not a number: "max". The first hierarchy says "none" with a number that no host has.
            let limit = text(root, &path).and_then(|text| text.parse::<u64>().ok());
            limits.extend(limit.filter(|limit| *limit < 1 << 60).map(|limit| (limit, root.join(path))));
        }
    }
    limits.into_iter().min()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A root directory of these files, removed when dropped.
    struct Root(PathBuf);

    impl Root {
        fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let path = std::env::temp_dir().join(format!("salp-doctor-{name}-{}", std::process::id()));
            for (file, text) in files {
                let file = path.join(file);
                fs::create_dir_all(file.parent().expect("below the root")).expect("a new directory");
                fs::write(file, text).expect("a new file");
            }
            Self(path)
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).expect("it is there");
        }
    }

    #[test]
    fn files_are_read_below_the_root_given() {
        // All that every kernel has.
        let names = "MemTotal MemFree Buffers Cached SwapCached Active Inactive SwapFree Dirty Writeback \
                     Mapped Slab Committed_AS VmallocTotal VmallocUsed VmallocChunk";
        let memory = names.split_whitespace().map(|name| format!("{name}: 1 kB\n")).collect::<String>();
        let memory = format!("{memory}MemAvailable: 2048 kB\nSwapTotal: 4 kB\n");
        let huge = "sys/kernel/mm/transparent_hugepage";
        let root = Root::new(
            "files",
            &[
                ("proc/meminfo", &memory),
                ("proc/sys/kernel/osrelease", "6.12.0-test\n"),
                ("proc/sys/vm/max_map_count", "65530\n"),
                (&format!("{huge}/enabled"), "always [madvise] never\n"),
                (&format!("{huge}/shmem_enabled"), "always within_size advise [never] deny force\n"),
                ("proc/self/cgroup", "4:memory:/a/b\n3:cpu:/a\n0::/c\n"),
                ("sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "9223372036854771712\n"),
                ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "4096\n"),
                ("sys/fs/cgroup/unified/c/memory.max", "max\n"),
            ],
        );
        let facts = FileFacts::read(&root.0);
        let limit = (4096, root.0.join("sys/fs/cgroup/memory/a/memory.limit_in_bytes"));
        let expected = FileFacts {
            release: Some("6.12.0-test".to_owned()),
            available_bytes: Some(2 << 20),
            swap_bytes: Some(4096),
            group_limit: Some(limit),
            map_count: Some(65530),
            huge_enabled: Some("madvise".to_owned()),
            huge_shmem: Some("never".to_owned()),
            huge_defrag: None,
            seccomp_actions: None,
            io_uring_disabled: None,
        };
        assert_eq!(facts, expected);
    }

    #[test]
    fn the_second_hierarchy_is_walked_up() {
        let files = [
            ("proc/self/cgroup", "0::/user.slice/mine\n"),
            ("sys/fs/cgroup/user.slice/mine/memory.max", "8192\n"),
            ("sys/fs/cgroup/user.slice/memory.max", "12288\n"),
        ];
        let root = Root::new("second", &files);
        let (limit, path) = FileFacts::read(&root.0).group_limit.expect("a limit");
        assert_eq!((limit, path), (8192, root.0.join(files[1].0)));
    }

    #[test]
    fn nothing_is_made_up_where_there_is_nothing() {
        let root = Root::new("nothing", &[("proc/empty", "")]);
        assert_eq!(FileFacts::read(&root.0), FileFacts::default());
    }
}
