//! What the kernel, KVM and the limits of a user allow.

use super::facts::Facts;
use super::{Check, Level};
use crate::kvm::{HostKind, KvmError};

/// The first kernel with everything: `PAGEMAP_SCAN` and `UFFDIO_POISON`.
const KERNEL: (u64, u64) = (6, 7);
/// Descriptors of a keeper with some hundred VMs: two files a cut, a socket and a process each.
const OPEN_FILES: u64 = 4096;

pub(super) fn release(facts: &Facts) -> Check {
    let found = facts.files.release.as_deref().unwrap_or("unknown");
    let check = Check::ok("kernel", "has all calls that salp makes", format!("Linux {found}"));
    match version(found) {
        Some(version) if version >= KERNEL => check,
        Some(_) => check.worse(Level::Missing, "boot Linux 6.7 or later"),
        // What is needed of it is looked at one by one below.
        None => check.worse(Level::Slower, "see that it is 6.7 or later: `uname -r`"),
    }
}

/// The first two numbers of a release.
fn version(release: &str) -> Option<(u64, u64)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

pub(super) fn kvm(facts: &Facts) -> Check {
    let purpose = "runs the vms";
    match (&facts.capabilities, facts.kind) {
        (Ok(_), HostKind::Vmx) => Check::ok("kvm", purpose, "hardware virtualization, VMX"),
        (Ok(_), HostKind::Svm) => Check::ok("kvm", purpose, "hardware virtualization, SVM"),
        (Ok(_), HostKind::Software) => {
            let found = "software, no VMX or SVM: 64-bit ring 3 is native, all else is emulated";
            let remedy =
                "use a machine with VMX or SVM, or have nested virtualization switched on for this one";
            Check::ok("kvm", purpose, found).worse(Level::Slower, remedy)
        }
        (Err(error), kind) => {
            let remedy = match error {
                KvmError::DeviceMissing { .. } if kind == HostKind::Svm => "sudo modprobe kvm_amd",
                KvmError::DeviceMissing { .. } if kind == HostKind::Vmx => "sudo modprobe kvm_intel",
                KvmError::DeviceMissing { .. } => {
                    "switch virtualization on in the firmware, or for this virtual machine; in a container \
                     pass the device in: --device /dev/kvm"
                }
                KvmError::NoPermission { .. } => "sudo usermod -aG kvm \"$USER\", and log in again",
                _ => "use the kernel's own kvm module: lsmod | grep kvm",
            };
            Check::ok("kvm", purpose, error.to_string()).worse(Level::Missing, remedy)
        }
    }
}

pub(super) fn capabilities(facts: &Facts) -> Check {
    let check = |found: String| Check::ok("kvm-capabilities", "save and set the state of vms", found);
    let Ok(all) = &facts.capabilities else {
        return check("unknown without kvm".to_owned()).worse(Level::Missing, "see kvm");
    };
    let missing: Vec<_> = all.iter().filter(|one| !one.is_present).collect();
    if missing.is_empty() {
        return check(format!("all {} that salp needs", all.len()));
    }
    let each = missing.iter().map(|one| format!("{} {}", one.name, one.purpose));
    check(format!("missing: {}", each.collect::<Vec<_>>().join(", ")))
        .worse(Level::Missing, "boot a kernel whose kvm has them: a distribution's does")
}

pub(super) fn userfaultfd(facts: &Facts) -> Check {
    let check = |found: String| Check::ok("userfaultfd", "tells of the first touch of a page", found);
    match &facts.userfault {
        Ok(missing) if missing.is_empty() => check("sees the kernel's faults too; all features".to_owned()),
        Ok(missing) => {
            check(format!("lacks {}", missing.join(", "))).worse(Level::Missing, "boot Linux 6.7 or later")
        }
        Err(error) => {
            let remedy = "sudo setfacl -m u:\"$USER\":rw /dev/userfaultfd, or run as root";
            check(error.to_string()).worse(Level::Missing, remedy)
        }
    }
}

pub(super) fn pagemap_scan(facts: &Facts) -> Check {
    let check = |found: String| Check::ok("pagemap-scan", "tells which pages a vm has written", found);
    match &facts.pagemap {
        Ok(()) => check("works".to_owned()),
        Err(error) => check(error.to_string()).worse(Level::Missing, "boot Linux 6.7 or later"),
    }
}

pub(super) fn io_uring(facts: &Facts) -> Check {
    let check = |found: String| Check::ok("io-uring", "transfers by the kernel into registered pages", found);
    match (&facts.io_uring, facts.files.io_uring_disabled) {
        (Ok(()), _) => check("works".to_owned()),
        (Err(_), Some(1 | 2)) => check("switched off: such transfers fail".to_owned())
            .worse(Level::Slower, "sudo sysctl kernel.io_uring_disabled=0"),
        (Err(error), _) => check(format!("refused ({error}): such transfers fail"))
            .worse(Level::Slower, "allow io_uring_setup in this container's or service's filter"),
    }
}

pub(super) fn open_files(facts: &Facts) -> Check {
    let limit = facts.open_files;
    let check = |found: String| Check::ok("open-files", "cuts, processes and sockets of a colony", found);
    match limit.hard {
        None => check("no limit".to_owned()),
        Some(hard) if hard >= OPEN_FILES => check(format!("{hard} at most")),
        Some(hard) => check(format!("{hard} at most: too few for hundreds of vms")).worse(
            Level::Slower,
            format!("echo \"$USER hard nofile {}\" | sudo tee -a /etc/security/limits.conf", 1 << 16),
        ),
    }
}

pub(super) fn processors(facts: &Facts) -> Check {
    let check =
        Check::ok("processors", "source, clone and publisher side by side", facts.processors.to_string());
    match facts.processors {
        0 | 1 => check.worse(Level::Slower, "give it two or more: they take turns here"),
        _ => check,
    }
}

pub(super) fn seccomp(facts: &Facts) -> Check {
    let check = |found: &str| Check::ok("seccomp", "keeps a hostile guest's process from other calls", found);
    let actions = facts.files.seccomp_actions.as_deref().unwrap_or_default();
    if actions.split_whitespace().any(|action| action == "kill_process") {
        check("filters can kill a process")
    } else {
        check("no filters that kill a process")
            .worse(Level::Slower, "boot a kernel with CONFIG_SECCOMP_FILTER for guests that are not trusted")
    }
}

pub(super) fn sockets(facts: &Facts) -> Check {
    let check = |found: String| Check::ok("sockets", "where commands find running colonies", found);
    match &facts.sockets {
        Ok(path) => check(path.display().to_string()),
        Err(why) => check(why.clone())
            .worse(Level::Missing, "export XDG_RUNTIME_DIR to a short path of a directory of yours"),
    }
}
