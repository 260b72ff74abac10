//! Builds the built-in guest (`guest/`, freestanding) with an ordinary `cargo build` of its own, and
//! names the image in `SALP_GUEST_ELF` for `include_bytes!`; finds out which commit this is, for
//! `version.rs`.
//!
//! The nested build must not inherit what was meant for salp itself: compiler flags, wrappers,
//! targets, profiles. The guest is always baseline x86-64 and needs no network.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Any host that builds salp has this target's library.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Flags of the guest's compiler: no AVX, absolute addresses. Set in this form they override every
/// configuration file.
const FLAGS: &str = "-Ctarget-cpu=x86-64\x1f-Crelocation-model=static";
/// Variables of the outer build that would change the nested one.
const REMOVED: [&str; 6] = [
    "RUSTFLAGS",
    "RUSTDOCFLAGS",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "CARGO_INCREMENTAL",
    "CARGO_ENCODED_RUSTDOCFLAGS",
];
const REMOVED_PREFIXES: [&str; 3] = ["CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_TARGET_"];

/// What git is asked about: that of which salp is made.
const SOURCES: [&str; 5] = ["vmm", "guest", "resources/guest.ld", "Cargo.toml", "Cargo.lock"];

fn main() {
    let manifest = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let root = manifest.parent().expect("vmm/ lies in the repository");
    build_guest(root);
    name_commit(root);
}

fn build_guest(root: &Path) {
    let guest = root.join("guest");
    let target_dir = Path::new(&variable("OUT_DIR")).join("guest");

    let mut command = Command::new(variable("CARGO"));
    command
        .args(["build", "--release", "--locked", "--offline", "--target", TARGET])
        .arg("--manifest-path")
        .arg(guest.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target_dir)
        .current_dir(&guest);
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if REMOVED.contains(&&*text) || REMOVED_PREFIXES.iter().any(|p| text.starts_with(p)) {
            command.env_remove(&name);
        }
    }
    command.env("CARGO_ENCODED_RUSTFLAGS", FLAGS);
    let status = command.status().expect("cargo, which runs this program, can be started again");
    assert!(status.success(), "building the built-in guest failed: {status}");

    let image = target_dir.join(TARGET).join("release/salp-guest");
    println!("cargo::rustc-env=SALP_GUEST_ELF={}", image.display());
    for input in [
        "guest/src",
        "guest/build.rs",
        "guest/Cargo.toml",
        "guest/Cargo.lock",
        "guest/protocol/src",
        "guest/protocol/Cargo.toml",
        "resources/guest.ld",
        "vmm/build.rs",
        // Whether it is as committed is part of the version.
        "vmm/src",
    ] {
        println!("cargo::rerun-if-changed={}", root.join(input).display());
    }
}

/// Sets `SALP_COMMIT` and `SALP_VERSION`.
fn name_commit(root: &Path) {
    let archive = root.join("resources/archive-commit");
    println!("cargo::rerun-if-changed={}", archive.display());
    // Not filled in: this is no archive.
    let archived = || fs::read_to_string(&archive).ok().filter(|text| !text.starts_with("$Format"));
    let commit = commit_of_tree(root).or_else(archived).unwrap_or_default();
    let (number, commit) = (variable("CARGO_PKG_VERSION"), commit.trim());
    let number = number.to_string_lossy();
    let version = if commit.is_empty() { number.to_string() } else { format!("{number} ({commit})") };
    println!("cargo::rustc-env=SALP_COMMIT={commit}");
    println!("cargo::rustc-env=SALP_VERSION={version}");
}

/// The commit that git has checked out at `root`. An archive that lies in somebody else's tree has none.
fn commit_of_tree(root: &Path) -> Option<String> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").arg("-C").arg(root).args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim_end().to_owned())
    };
    let top = PathBuf::from(git(&["rev-parse", "--show-toplevel"])?);
    if fs::canonicalize(top).ok()? != fs::canonicalize(root).ok()? {
        return None;
    }
    // The log grows with each commit and checkout; HEAD alone names a branch.
    for name in ["logs/HEAD", "HEAD"] {
        let path = root.join(git(&["rev-parse", "--git-path", name])?);
        if path.exists() {
            println!("cargo::rerun-if-changed={}", path.display());
        }
    }
    let commit = git(&["log", "-1", "--abbrev=12", "--format=%h %cs"])?;
    let changed = git(&[&["status", "--porcelain", "--"][..], &SOURCES].concat())?;
    let (hash, day) = commit.split_once(' ')?;
    Some(if changed.is_empty() { commit } else { format!("{hash}-modified {day}") })
}

fn variable(name: &str) -> OsString {
    env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name} for build scripts"))
}
