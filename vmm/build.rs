//! Builds the built-in guest (`guest/`, freestanding) with an ordinary `cargo build` of its own, and
//! names the image in `SALP_GUEST_ELF` for `include_bytes!`.
//!
//! The nested build must not inherit what was meant for salp itself: compiler flags, wrappers,
//! targets, profiles. The guest is always baseline x86-64 and needs no network.

use std::env;
use std::ffi::OsString;
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

fn main() {
    let manifest = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let root = manifest.parent().expect("vmm/ lies in the repository");
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
    ] {
        println!("cargo::rerun-if-changed={}", root.join(input).display());
    }
}

fn variable(name: &str) -> OsString {
    env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name} for build scripts"))
}
