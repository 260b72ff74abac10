//! What fuzzers have found and kept, run once more, quickly and by the toolchain of everybody; and inputs
//! that mean something, from which they began.

use std::fs;
use std::path::{Path, PathBuf};

use salp_tests::GuestKind;
use salp_tests::hostile::{TARGETS, Target};
use salp_tests::images::{CODE, EXIT_7, bare_image, image, pvh_note};
use salp_tests::world::can_run;

/// The inputs kept for a target.
fn corpus(name: &str) -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let entries = fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut found: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    found.sort();
    found
}

fn target(name: &str) -> Target {
    TARGETS.iter().find(|(target, _)| *target == name).expect("there is such a target").1
}

#[track_caller]
fn run_corpus(name: &str) {
    let inputs = corpus(name);
    assert!(inputs.len() > 10, "{name} has {} inputs", inputs.len());
    for path in inputs {
        println!("{}", path.display());
        target(name)(&fs::read(&path).expect("an input"));
    }
}

#[test]
fn kernel_images() {
    run_corpus("kernels");
}

#[test]
fn dma_rings() {
    run_corpus("rings");
}

#[test]
fn ports_and_addresses() {
    run_corpus("accesses");
}

#[test]
fn requests_at_the_control_socket() {
    if can_run("requests_at_the_control_socket", GuestKind::Kvm) {
        run_corpus("requests");
    }
}

/// Inputs as short as they get, and each cut off at every byte.
#[test]
fn truncated_images() {
    let notes = pvh_note(u32::try_from(CODE).expect("it lies low"));
    for whole in [bare_image(EXIT_7), image(EXIT_7, CODE, &notes)] {
        for end in 0..=whole.len() {
            target("kernels")(&[&[0x80], &whole[..end]].concat());
        }
    }
}
