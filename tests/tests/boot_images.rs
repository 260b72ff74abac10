//! Other people's kernels: a bare ELF image of a few instructions, forked while it runs, and so is a clone.
//! Then all images that must be refused. `linux_guest.rs` has the Linux.

use std::fs::File;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use salp::family::VmId;
use salp::keeper::{Colony, ColonyConfig, ColonyError};
use salp::kvm::Irqchip;
use salp::member::messages::GuestKind;
use salp::words::MemoryShape;
use salp_tests::images::{
    CODE, COUNTER, ECHO, HALT, LATE_HALT, PROMPT, RESET, TRIPLE_FAULT, WAIT, bare_image, counts, image,
    pvh_note,
};
use salp_tests::procs::salp_binary;
use salp_tests::world::can_run;

const LIMIT: Duration = Duration::from_secs(120);

fn colony(test: &str, memory_mib: u64, irqchip: Irqchip) -> Option<Colony> {
    colony_of(test, memory_mib, irqchip, 1)
}

fn colony_of(test: &str, memory_mib: u64, irqchip: Irqchip, vcpus: u8) -> Option<Colony> {
    if !can_run(test, GuestKind::Kvm) {
        return None;
    }
    let mut config = ColonyConfig::new(MemoryShape::new(memory_mib << 20).expect("whole leaves"));
    config.program = Some(salp_binary());
    config.irqchip = irqchip;
    config.vcpus = vcpus;
    Some(Colony::new(config).expect("a colony"))
}

fn file(bytes: &[u8]) -> File {
    let file = File::from(memfd_create("salp-test-image", MemfdFlags::CLOEXEC).expect("a memfd"));
    rustix::io::pwrite(&file, bytes, 0).expect("room for an image");
    file
}

/// Waits until `is` holds of a VM's console, and returns what it says.
#[track_caller]
fn await_console(colony: &Colony, vm: VmId, mut is: impl FnMut(&str) -> bool) -> String {
    let member = colony.member(vm).expect("it lives");
    let found = member.wait_for(LIMIT, |state| {
        let text = String::from_utf8_lossy(&state.console).into_owned();
        if is(&text) {
            return Some(Ok(text));
        }
        state.ended.clone().map(|ended| Err((ended, text)))
    });
    match found {
        Ok(Ok(text)) => text,
        Ok(Err((ended, text))) => panic!("{vm} has ended: {ended:?}; it said: {text}"),
        Err(error) => panic!("{vm}: {error}; it said: {}", String::from_utf8_lossy(&member.state().console)),
    }
}

fn fork(colony: &Colony, vm: VmId) -> VmId {
    colony.fork(vm, 1).unwrap_or_else(|error| panic!("a fork of {vm}: {error}")).clones[0].vm
}

// ---- a bare image ----

#[track_caller]
fn assert_consecutive(vm: VmId, counts: &[u32]) {
    assert!(counts.windows(2).all(|pair| pair[1] == pair[0] + 1), "{vm} counts {counts:?}");
}

#[test]
fn a_bare_image_is_forked_while_it_runs() {
    let test = "a_bare_image_is_forked_while_it_runs";
    // A second vCPU waits for its start-up interrupt all the time.
    for (irqchip, vcpus) in [(Irqchip::Split, 1), (Irqchip::Full, 1), (Irqchip::Full, 2)] {
        let Some(colony) = colony_of(test, 16, irqchip, vcpus) else { return };
        let image = file(&bare_image(COUNTER));
        let root = colony.boot_image(&image, None, "").expect("an image that boots");
        await_console(&colony, root, |text| counts(text).len() >= 3);
        let child = fork(&colony, root);
        let before = counts(&await_console(&colony, root, |_| true)).len();
        await_console(&colony, child, |text| counts(text).len() >= 4);
        let grandchild = fork(&colony, child);
        let [root_says, child_says, grandchild_says] =
            [(root, before + 4), (child, 8), (grandchild, 4)].map(|(vm, lines)| {
                let said = counts(&await_console(&colony, vm, |text| counts(text).len() >= lines));
                assert_consecutive(vm, &said);
                said
            });
        // Each goes on from where its source was, by the count in its own memory.
        assert_eq!(root_says[0], 1);
        assert!(child_says[0] > 3, "{child_says:?}");
        assert!(grandchild_says[0] > child_says[3], "{grandchild_says:?} after {child_says:?}");
        colony.check().expect("a sound state");
    }
}

#[test]
fn input_reaches_the_guest_and_a_prompt_its_reader() {
    let test = "input_reaches_the_guest_and_a_prompt_its_reader";
    let Some(echo) = colony(test, 16, Irqchip::Full) else { return };
    let vm = echo.boot_image(&file(&bare_image(ECHO)), None, "").expect("an image that boots");
    assert_eq!(echo.console_input(vm, b"hello\n").expect("it takes input"), 6);
    await_console(&echo, vm, |text| text == "hello\n");
    let clone = fork(&echo, vm);
    assert_eq!(echo.console_input(clone, b"clone\n").expect("it takes input"), 6);
    await_console(&echo, clone, |text| text == "clone\n");
    let prompt = colony(test, 16, Irqchip::Split).expect("as before");
    let vm = prompt.boot_image(&file(&bare_image(PROMPT)), None, "").expect("an image that boots");
    await_console(&prompt, vm, |text| text == "?");
}

fn ended(code: &[u8], test: &str) -> Option<(Option<u32>, String)> {
    let colony = colony(test, 16, Irqchip::Full)?;
    let vm = colony.boot_image(&file(&bare_image(code)), None, "").expect("an image that boots");
    let member = colony.member(vm).expect("it lives");
    Some(member.wait_for(LIMIT, |state| state.ended.clone()).expect("it ends"))
}

#[test]
fn a_reset_ends_the_run_with_status_0() {
    let Some((status, text)) = ended(RESET, "a_reset_ends_the_run_with_status_0") else { return };
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("reset by the guest"), "{text}");
}

#[test]
fn a_triple_fault_is_described() {
    let Some((status, text)) = ended(TRIPLE_FAULT, "a_triple_fault_is_described") else { return };
    assert_eq!(status, None, "{text}");
    assert!(text.contains("0f, 0b") || text.contains("triple fault"), "{text}");
}

#[test]
fn a_halt_with_interrupts_off_is_noticed_and_a_wait_is_not_taken_for_one() {
    let test = "a_halt_with_interrupts_off_is_noticed_and_a_wait_is_not_taken_for_one";
    for (code, vcpus) in [(HALT, 1), (LATE_HALT, 1), (HALT, 2)] {
        let Some(colony) = colony_of(test, 16, Irqchip::Full, vcpus) else { return };
        let vm = colony.boot_image(&file(&bare_image(code)), None, "").expect("an image that boots");
        let member = colony.member(vm).expect("it lives");
        let (status, text) = member.wait_for(LIMIT, |state| state.ended.clone()).expect("it ends");
        assert!(status.is_none() && text.contains("halted with interrupts off"), "{text}");
        // A clone of it is as it is.
        let clone = fork(&colony, vm);
        let member = colony.member(clone).expect("it lives");
        let (_, text) = member.wait_for(LIMIT, |state| state.ended.clone()).expect("it ends");
        assert!(text.contains("halted with interrupts off"), "{text}");
    }
    let waiting = colony(test, 16, Irqchip::Full).expect("as before");
    let vm = waiting.boot_image(&file(&bare_image(WAIT)), None, "").expect("an image that boots");
    for _ in 0..20 {
        waiting.look_for_ends(LIMIT);
    }
    let clone = fork(&waiting, vm);
    waiting.look_for_ends(LIMIT);
    for vm in [vm, clone] {
        assert!(waiting.member(vm).expect("it lives").state().ended.is_none());
    }
}

// ---- images that are refused ----

#[test]
fn bad_images_are_refused_with_a_reason() {
    let test = "bad_images_are_refused_with_a_reason";
    let Some(colony) = colony(test, 16, Irqchip::Split) else { return };
    let good = bare_image(COUNTER);
    let with = |at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    };
    let dynamic = with(64, &3_u32.to_le_bytes());
    let noted = |note: &[u8]| image(COUNTER, CODE, note);
    let mut short_note = pvh_note(0);
    short_note[4] = 2;
    let bad: [(&str, Vec<u8>); 19] = [
        ("entry 0x100000", noted(&pvh_note(1 << 20))),
        ("PVH entry is 0x2", noted(&short_note)),
        ("truncated: a segment of notes", noted(&pvh_note(0))[..220].to_vec()),
        ("neither an ELF file nor a bzImage", b"#!/bin/sh\n".to_vec()),
        ("neither an ELF file nor a bzImage", Vec::new()),
        ("truncated", good[..10].to_vec()),
        ("truncated", good[..40].to_vec()),
        ("truncated", good[..100].to_vec()),
        ("truncated", good[..good.len() - 1].to_vec()),
        ("32-bit", with(4, &[1])),
        ("machine 183", with(18, &183_u16.to_le_bytes())),
        ("dynamically linked", with(16, &3_u16.to_le_bytes())),
        ("dynamically linked", dynamic),
        ("type 1", with(16, &1_u16.to_le_bytes())),
        ("program headers", with(54, &32_u16.to_le_bytes())),
        ("entry 0x10", with(24, &16_u64.to_le_bytes())),
        ("RAM for it", with(64 + 40, &(16_u64 << 20).to_le_bytes())),
        ("segment's address", with(64 + 24, &(u64::MAX - 1).to_le_bytes())),
        ("truncated", with(64 + 8, &u64::MAX.to_le_bytes())),
    ];
    for (expected, image) in bad {
        refused(&colony, expected, colony.boot_image(&file(&image), None, ""));
    }
    let image = file(&good);
    let too_large = file(&vec![0; 14 << 20]);
    refused(&colony, "initrd", colony.boot_image(&image, Some(&too_large), ""));
    refused(&colony, "command line has 2048", colony.boot_image(&image, None, &"x".repeat(2048)));
    refused(&colony, "NUL at byte 1", colony.boot_image(&image, None, "a\0b"));
    let directory = File::open("/").expect("a directory");
    refused(&colony, "regular file", colony.boot_image(&directory, None, ""));
    // The colony still works.
    let vm = colony.boot_image(&image, None, &"x".repeat(2047)).expect("a good image");
    await_console(&colony, vm, |text| !counts(text).is_empty());
}

#[track_caller]
fn refused(colony: &Colony, expected: &str, result: Result<VmId, ColonyError>) {
    match result {
        Err(ColonyError::Refused { reason, .. }) if reason.contains(expected) => {}
        other => panic!("not refused for {expected:?}: {other:?}"),
    }
    assert!(colony.vms().is_empty(), "a refused image leaves no vm");
}
