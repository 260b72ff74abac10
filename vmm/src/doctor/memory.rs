//! What memory there is, in which pieces, and what limits it.

use super::facts::Facts;
use super::{Check, Level};
use crate::arena_files::ArenaKind;
use crate::words::{LEAF_BYTES, wide};

/// What the built-in guest and its first clone need.
const LEAST_BYTES: u64 = 64 << 20;
/// Enough for `salp demo`: ten VMs of 512 MiB that share most of it.
const COMFORT_BYTES: u64 = 2 << 30;
/// The kernel's usual limit. Each leaf of a window that is written here and there is a mapping or two.
const MAP_COUNT: u64 = 65_530;
/// What long-lived buffers of a device may take.
const LOCKED_BYTES: u64 = 64 << 20;
/// Where the kernel's choices about huge pages are.
const HUGE: &str = "/sys/kernel/mm/transparent_hugepage";

/// Whole MiB.
fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

pub(super) fn available(facts: &Facts) -> Check {
    let check = |found: String| Check::ok("memory", "of vms and of what they share", found);
    let Some(bytes) = facts.files.available_bytes else {
        return check("unknown".to_owned()).worse(Level::Slower, "mount -t proc proc /proc");
    };
    let found = format!("{} available", mib(bytes));
    if bytes < LEAST_BYTES {
        let text = format!("{found}: a vm and a clone need {}", mib(LEAST_BYTES));
        check(text).worse(Level::Missing, "end something that uses memory: ps aux --sort=-rss | head")
    } else if bytes < COMFORT_BYTES {
        check(format!("{found}: not enough for `salp demo` as it is"))
            .worse(Level::Slower, "give --memory with less, as in `salp demo --memory 64M`")
    } else {
        check(found)
    }
}

pub(super) fn control_group(facts: &Facts) -> Check {
    let check = |found: String| Check::ok("control-group", "limits the memory of a colony", found);
    let Some((limit, path)) = &facts.files.group_limit else { return check("no memory limit".to_owned()) };
    let found = format!("{} in {}", mib(*limit), path.display());
    // Beyond its limit a group's processes are killed, not refused.
    if facts.files.available_bytes.is_some_and(|available| *limit >= available) {
        return check(found);
    }
    let level = if *limit < LEAST_BYTES { Level::Missing } else { Level::Slower };
    check(format!("{found}, less than the host has: a colony that needs more is killed"))
        .worse(level, format!("raise it: echo N | sudo tee {}", path.display()))
}

pub(super) fn arena(facts: &Facts) -> Check {
    let check = |found: String| Check::ok("arena", "shared pages, 2 MiB at a time", found);
    let switched_off = matches!(facts.files.huge_shmem.as_deref(), None | Some("deny"));
    let remedy = || {
        if switched_off {
            format!("echo advise | sudo tee {HUGE}/shmem_enabled")
        } else {
            "run salp as root (CAP_SYS_ADMIN): it mounts a tmpfs of its own, which nobody sees".to_owned()
        }
    };
    match &facts.arena {
        Ok((ArenaKind::HugeTmpfs, true)) => check("a tmpfs of huge pages, guarded".to_owned()),
        Ok((ArenaKind::HugeTmpfs, false)) => {
            check("a tmpfs of huge pages; readers are not guarded against mistakes (Linux 6.15)".to_owned())
        }
        Ok((ArenaKind::Tmpfs, _)) => {
            check("a tmpfs of 4 KiB pages: clones read more slowly".to_owned()).worse(Level::Slower, remedy())
        }
        Ok((ArenaKind::Memfd, _)) => check("memfds of 4 KiB pages, without a limit".to_owned())
            .worse(Level::Slower, if facts.is_root { format!("as root: {}", remedy()) } else { remedy() }),
        Err(error) => check(error.to_string()).worse(Level::Missing, "unset SALP_ARENA"),
    }
}

pub(super) fn huge_pages(facts: &Facts) -> Check {
    let check = |found: String| Check::ok("huge-pages", "make the pause short and a vm fast", found);
    let files = &facts.files;
    match (files.huge_enabled.as_deref(), files.huge_defrag.as_deref()) {
        (None, _) => check("this kernel has none".to_owned())
            .worse(Level::Slower, "boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE"),
        (Some("never"), _) => check("switched off".to_owned())
            .worse(Level::Slower, format!("echo madvise | sudo tee {HUGE}/enabled")),
        (Some(enabled), Some("never")) => check(format!("{enabled}, but none are made where none are free"))
            .worse(Level::Slower, format!("echo madvise | sudo tee {HUGE}/defrag")),
        (Some(enabled), _) => check(enabled.to_owned()),
    }
}

pub(super) fn map_count(facts: &Facts) -> Check {
    let check = |found: String| Check::ok("map-count", "mappings of a vm's memory", found);
    let remedy = "sudo sysctl vm.max_map_count=262144";
    match facts.files.map_count {
        None => check("unknown".to_owned()).worse(Level::Slower, remedy),
        Some(count) if count < MAP_COUNT => {
            let size = mib(count / 2 * wide(LEAF_BYTES));
            let text = format!("{count}: vms with more than {size} may have to copy instead of share");
            check(text).worse(Level::Slower, remedy)
        }
        Some(count) => check(count.to_string()),
    }
}

pub(super) fn swap(facts: &Facts) -> Check {
    let check = |found: String| Check::ok("swap", "takes what idle vms have written", found);
    let remedy = "sudo fallocate -l 4G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && \
                  sudo swapon /swapfile";
    match facts.files.swap_bytes {
        Some(bytes) if bytes > 0 => check(mib(bytes)),
        _ => check("none: what vms have written stays in memory".to_owned()).worse(Level::Slower, remedy),
    }
}

pub(super) fn locked_memory(facts: &Facts) -> Check {
    let check = |found: String| Check::ok("locked-memory", "pages registered with a device", found);
    match facts.locked_memory.hard {
        _ if facts.is_root => check("no limit for root".to_owned()),
        None => check("no limit".to_owned()),
        Some(hard) if hard >= LOCKED_BYTES => check(format!("{} at most", mib(hard))),
        Some(hard) => check(format!("{} at most: transfers beyond fail", mib(hard))).worse(
            Level::Slower,
            "echo \"$USER - memlock unlimited\" | sudo tee -a /etc/security/limits.conf, and log in again",
        ),
    }
}
