//! Hosts that lack something, one thing at a time: the doctor says which, and what mends it.

use std::io;

use super::facts::{Facts, FileFacts, Limit};
use super::{Level, judge};
use crate::arena_files::ArenaKind;
use crate::kvm::{Capability, HostKind, KvmError};

/// A host that has everything.
fn healthy() -> Facts {
    let word = |text: &str| Some(text.to_owned());
    let no_limit = Limit { soft: None, hard: None };
    Facts {
        files: FileFacts {
            release: word("6.12.1-amd64"),
            available_bytes: Some(8 << 30),
            swap_bytes: Some(1 << 30),
            group_limit: None,
            map_count: Some(65_530),
            huge_enabled: word("madvise"),
            huge_shmem: word("never"),
            huge_defrag: word("madvise"),
            seccomp_actions: word("kill_process kill_thread errno allow"),
            io_uring_disabled: Some(0),
        },
        kind: HostKind::Vmx,
        capabilities: Ok(vec![capability(true)]),
        userfault: Ok(Vec::new()),
        pagemap: Ok(()),
        arena: Ok((ArenaKind::HugeTmpfs, true)),
        io_uring: Ok(()),
        locked_memory: no_limit,
        open_files: no_limit,
        processors: 4,
        sockets: Ok("/run/user/1000/salp".into()),
        is_root: false,
    }
}

fn capability(is_present: bool) -> Capability {
    Capability { name: "KVM_CAP_XCRS", purpose: "to save vcpus", is_present }
}

/// One thing that is wrong with a host.
type Break = fn(&mut Facts);

#[test]
fn a_healthy_host_is_ok_in_all_respects() {
    let checks = judge(&healthy());
    assert!(checks.iter().all(|check| check.level == Level::Ok && check.remedy.is_none()), "{checks:?}");
    let mut names: Vec<_> = checks.iter().map(|check| check.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), checks.len(), "two checks have one name");
}

#[test]
fn what_is_missing_is_named_with_what_mends_it() {
    let cases: [(Break, &str, Level, &str); 26] = [
        (|f| f.files.release = Some("5.15.0".into()), "kernel", Level::Missing, "6.7"),
        (|f| f.files.release = None, "kernel", Level::Slower, "uname"),
        (|f| f.kind = HostKind::Software, "kvm", Level::Slower, "nested"),
        (|f| f.capabilities = Err(KvmError::DeviceMissing { path: "x" }), "kvm", Level::Missing, "kvm_intel"),
        (|f| f.capabilities = Err(KvmError::NoPermission { path: "x" }), "kvm", Level::Missing, "usermod"),
        (|f| f.capabilities = Err(KvmError::ApiVersion { found: 1 }), "kvm", Level::Missing, "lsmod"),
        (|f| f.capabilities = Ok(vec![capability(false)]), "kvm-capabilities", Level::Missing, "kernel"),
        (|f| f.userfault = Err(refused()), "userfaultfd", Level::Missing, "/dev/userfaultfd"),
        (|f| f.userfault = Ok(vec!["UFFD_FEATURE_POISON"]), "userfaultfd", Level::Missing, "6.7"),
        (|f| f.pagemap = Err(refused()), "pagemap-scan", Level::Missing, "6.7"),
        (|f| f.files.available_bytes = Some(32 << 20), "memory", Level::Missing, "ps aux"),
        (|f| f.files.available_bytes = Some(1 << 30), "memory", Level::Slower, "--memory"),
        (|f| f.files.group_limit = Some((1 << 20, "/g".into())), "control-group", Level::Missing, "tee /g"),
        (|f| f.files.group_limit = Some((1 << 30, "/g".into())), "control-group", Level::Slower, "tee /g"),
        (|f| f.arena = Ok((ArenaKind::Memfd, false)), "arena", Level::Slower, "root"),
        (deny_shmem, "arena", Level::Slower, "shmem_enabled"),
        (|f| f.files.huge_enabled = Some("never".into()), "huge-pages", Level::Slower, "/enabled"),
        (|f| f.files.huge_enabled = None, "huge-pages", Level::Slower, "TRANSPARENT_HUGEPAGE"),
        (|f| f.files.huge_defrag = Some("never".into()), "huge-pages", Level::Slower, "/defrag"),
        (|f| f.files.map_count = Some(1024), "map-count", Level::Slower, "vm.max_map_count"),
        (|f| f.files.swap_bytes = Some(0), "swap", Level::Slower, "swapon"),
        (disable_io_uring, "io-uring", Level::Slower, "io_uring_disabled=0"),
        (|f| f.locked_memory.hard = Some(8 << 20), "locked-memory", Level::Slower, "memlock"),
        (|f| f.open_files.hard = Some(1024), "open-files", Level::Slower, "nofile"),
        (|f| f.files.seccomp_actions = None, "seccomp", Level::Slower, "SECCOMP"),
        (|f| f.sockets = Err("no directory".into()), "sockets", Level::Missing, "XDG_RUNTIME_DIR"),
    ];
    for (number, (spoil, name, level, word)) in cases.into_iter().enumerate() {
        let mut facts = healthy();
        spoil(&mut facts);
        for check in judge(&facts) {
            let remedy = check.remedy.clone().unwrap_or_default();
            if check.name == name {
                assert!(check.level == level && remedy.contains(word), "case {number}: {check:?}");
            } else if check.name == "kvm-capabilities" && facts.capabilities.is_err() {
                assert_eq!(check.level, Level::Missing, "nobody knows them without kvm");
            } else {
                assert_eq!(check.level, Level::Ok, "case {number} is about {name}: {check:?}");
            }
        }
    }
}

fn refused() -> io::Error {
    io::Error::from(io::ErrorKind::PermissionDenied)
}

fn deny_shmem(facts: &mut Facts) {
    facts.arena = Ok((ArenaKind::Tmpfs, true));
    facts.files.huge_shmem = Some("deny".into());
}

fn disable_io_uring(facts: &mut Facts) {
    facts.io_uring = Err(refused());
    facts.files.io_uring_disabled = Some(2);
}

#[test]
fn limits_of_users_are_none_of_roots() {
    let mut facts = healthy();
    facts.locked_memory.hard = Some(0);
    facts.is_root = true;
    assert!(judge(&facts).iter().all(|check| check.level == Level::Ok));
}

#[test]
fn this_host_is_looked_at() {
    let report = super::examine();
    let worst = report.checks.iter().map(|check| check.level).max();
    assert_eq!(worst, Some(report.verdict));
    for check in &report.checks {
        assert_eq!(check.remedy.is_some(), check.level > Level::Ok, "{check:?}");
        assert!(!check.found.is_empty() && !check.found.contains('\n'), "{check:?}");
    }
}
