//! A Linux, with a program that keeps 100 MiB of checksummed memory, forked while it runs; a shell forked
//! at its prompt; several processors; a bzImage.
//!
//! Kernels and programs are what `make linux-guest` has made, else all this says SKIPPED. What the lines of
//! the program mean is said in `resources/linux/witness.c`.
//!
//! # Clocks
//! The *lag* of a line is the host's clock when the line had arrived minus the guest's clock that the line
//! says. It is never less than what the guest's clock is behind, and more by however long the line took:
//! of several lines the least lag is taken. What is compared is a clone's lag with its source's, for
//! `CLOCK_MONOTONIC` and `CLOCK_REALTIME` alike: a guest's monotonic clock began at its boot, and its real
//! one is behind by what a slow boot lost (ticks of the kernel's first seconds, before it takes to a better
//! clock: up to 2 s where ring 0 is emulated).

use std::collections::BTreeSet;

use salp::family::VmId;
use salp_tests::linux::{HostLine, LinuxGuest, Said, Step};

/// How wrong a clone's clocks may be.
const SECOND_NS: u64 = 1_000_000_000;
/// What a clone has to say.
const FURTHER: usize = 3;
/// A tree of 3 MiB, for tests of something else than memory.
const SMALL_TREE: &str = "-- 12";

/// What `vm` has said is right, and one chain.
#[track_caller]
fn assert_sound(vm: VmId, steps: &[Step]) {
    for step in steps {
        assert_eq!(step.verdict, "ok", "{vm}: {step:?}");
    }
    for pair in steps.windows(2) {
        assert_follows(vm, &pair[0], &pair[1]);
    }
}

/// `next` is the step after `step`, of the same memory or a clone's, and later by the guest's clocks.
#[track_caller]
fn assert_follows(vm: VmId, step: &Step, next: &Step) {
    assert_eq!(
        (next.number, next.value),
        (step.number + 1, step.next_value()),
        "{vm}: {next:?} after {step:?}"
    );
    for clock in [0, 1] {
        assert!(next.clocks_ns[clock] >= step.clocks_ns[clock], "{vm}: {next:?} after {step:?}");
    }
}

/// The clone goes on from its source's memory and time, and by itself. `said_before` are the lines that
/// its source had written before the fork was asked for, `said` those until now.
#[track_caller]
fn assert_clone(clone: VmId, steps: &[Step], said_before: &[Step], said: &[Step]) {
    assert_sound(clone, steps);
    let first = &steps[0];
    let source = said.iter().find(|step| step.number + 1 == first.number);
    assert_follows(clone, source.expect("the source has said the line before the clone's first"), first);
    let latest = said_before.last().expect("it was forked while it ran");
    for clock in [0, 1] {
        assert!(first.clocks_ns[clock] >= latest.clocks_ns[clock], "{clone}: {first:?} after {latest:?}");
    }
    // The changes are drawn from the clock, among other things: no two VMs go on alike.
    let own: BTreeSet<_> = steps[1..].iter().map(|step| step.value).collect();
    assert!(said.iter().all(|step| !own.contains(&step.value)), "{clone} says what its source says");
    let [own, of_source] = [steps, said].map(least_lag_ns);
    for (clock, own, of_source) in [("monotonic", own[0], of_source[0]), ("realtime", own[1], of_source[1])] {
        println!("{clone}: its {clock} clock lags {own} ns behind the host's, its source's {of_source} ns");
        let off_ns = own.abs_diff(of_source);
        assert!(off_ns < SECOND_NS, "{clone}: the {clock} clock is off by {off_ns} ns: {steps:?}, {said:?}");
    }
}

fn least_lag_ns(steps: &[Step]) -> [i64; 2] {
    [0, 1].map(|clock| steps.iter().map(|step| step.lag_ns()[clock]).min().expect("it has said something"))
}

#[test]
fn clones_of_a_linux_verify_their_memory_and_have_the_right_time() {
    const CLONES: usize = 20;
    let test = "clones_of_a_linux_verify_their_memory_and_have_the_right_time";
    let Some(guest) = LinuxGuest::new(test, 160, 1) else { return };
    let root = guest.boot("vmlinux", "witness.cpio", "");
    guest
        .consoles
        .wait(root, |said| said.lines.iter().any(|line| line.text.ends_with("nodes=131071 bytes=104857600")));
    // Two clones at a time live beside the root: more than a small host's processors can run would only
    // make all of them slow.
    let mut last = None;
    for number in 1..=CLONES {
        // At least one more line of the root between two forks.
        let count = guest.consoles.said(root).steps().len();
        let before = guest.steps(root, count + 1);
        let clone = guest.fork(root);
        if let Some((clone, before)) = last.replace((clone, before)) {
            let steps = guest.steps(clone, 1 + FURTHER);
            assert_clone(clone, &steps, &before, &guest.consoles.said(root).steps());
            guest.colony.end(clone).unwrap_or_else(|error| panic!("the end of {clone}, {number}: {error}"));
        }
    }
    let (clone, before) = last.expect("there were clones");
    let steps = guest.steps(clone, 1 + FURTHER);
    assert_clone(clone, &steps, &before, &guest.consoles.said(root).steps());
    let grandchild = guest.fork(clone);
    let grandchild_steps = guest.steps(grandchild, 1 + FURTHER);
    assert_clone(grandchild, &grandchild_steps, &steps, &guest.consoles.said(clone).steps());
    assert_sound(root, &guest.consoles.said(root).steps());
    guest.colony.check().expect("a sound state");
}

/// Boots `kernel` with `vcpus` processors, and forks it and a clone; returns what the three then said.
fn forked_twice(test: &str, kernel: &str, vcpus: u8, options: &str) -> Option<[Vec<Step>; 3]> {
    let guest = LinuxGuest::new(test, 64, vcpus)?;
    let root = guest.boot(kernel, "witness.cpio", &format!("{options} {SMALL_TREE}"));
    let expected = format!("INIT-REACHED witness processors={vcpus} affinity={vcpus}");
    guest.consoles.wait(root, |said| said.lines.iter().any(|line| line.text.starts_with(&expected)));
    let before = guest.steps(root, 2);
    let child = guest.fork(root);
    let child_before = guest.steps(child, 2);
    let grandchild = guest.fork(child);
    let grandchild_steps = guest.steps(grandchild, 1 + FURTHER);
    let child_steps = guest.steps(child, child_before.len() + FURTHER);
    let root_steps = guest.steps(root, before.len() + FURTHER);
    assert_clone(child, &child_steps, &before, &root_steps);
    assert_clone(grandchild, &grandchild_steps, &child_before, &child_steps);
    assert_sound(root, &root_steps);
    guest.colony.check().expect("a sound state");
    Some([root_steps, child_steps, grandchild_steps])
}

#[test]
fn a_linux_with_two_processors_is_forked() {
    let Some(said) = forked_twice("a_linux_with_two_processors_is_forked", "vmlinux", 2, "") else { return };
    for steps in said {
        // The thread on the second processor goes on in each.
        let (first, last) = (&steps[0], &steps[steps.len() - 1]);
        assert!(last.helper > first.helper, "{first:?} to {last:?}");
    }
}

#[test]
fn a_linux_as_bzimage_is_forked() {
    let _ = forked_twice("a_linux_as_bzimage_is_forked", "bzImage", 1, "");
}

/// Kernels take the processor's time-stamp counter for their clock where it is stable, else this one.
#[test]
fn a_linux_with_kvmclock_is_forked() {
    let _ = forked_twice("a_linux_with_kvmclock_is_forked", "vmlinux", 1, "clocksource=kvm-clock");
}

/// The shell waits to be told something. It asks the terminal where its cursor is, and needs no answer.
fn is_at_prompt(said: &Said) -> bool {
    said.rest.trim_end_matches("\x1b[6n").ends_with("salp# ")
}

/// The counts that a shell has printed, one a line, behind `word`.
fn counts(said: &Said, word: &str) -> Vec<u64> {
    let count = |line: &HostLine| line.text.strip_prefix(word)?.strip_prefix(' ')?.parse().ok();
    said.lines.iter().filter_map(count).collect()
}

#[track_caller]
fn assert_counts_from(vm: VmId, counts: &[u64], first: u64) {
    let expected: Vec<_> = (first..).take(counts.len()).collect();
    assert_eq!(counts, expected, "{vm}");
}

#[test]
fn a_shell_is_forked_while_it_runs_and_at_its_prompt() {
    let test = "a_shell_is_forked_while_it_runs_and_at_its_prompt";
    let Some(guest) = LinuxGuest::new(test, 64, 1) else { return };
    let root = guest.boot("vmlinux", "shell.cpio", "");
    let consoles = &guest.consoles;
    consoles.wait(root, is_at_prompt);
    guest.type_in(root, "n=100; uname -s; echo $((n + 11))\n");
    let said = consoles.wait(root, |said| said.lines.iter().any(|line| line.text == "111"));
    assert!(said.lines.iter().any(|line| line.text == "Linux"), "{said}");
    consoles.wait(root, is_at_prompt);
    // Each turn starts a process: the clones do so too.
    guest.type_in(root, "while :; do n=$((n+1)); echo tick $n; sleep 1; done\n");
    let before = counts(&consoles.wait(root, |said| counts(said, "tick").len() >= 2), "tick");

    let child = guest.fork(root);
    let said = consoles.wait(child, |said| counts(said, "tick").len() >= FURTHER);
    let ticks = counts(&said, "tick");
    assert!(ticks[0] > before[before.len() - 1], "{child} says {ticks:?} after {before:?}");
    assert_counts_from(child, &ticks, ticks[0]);
    // The clone alone is interrupted; its shell has the count.
    guest.type_in(child, "\x03");
    let said = consoles.wait(child, is_at_prompt);
    let last = *counts(&said, "tick").last().expect("three at least");

    let grandchild = guest.fork(child);
    for turn in 1..=FURTHER {
        guest.type_in(grandchild, "n=$((n+1)); echo mine $n\n");
        consoles.wait(grandchild, |said| counts(said, "mine").len() == turn && is_at_prompt(said));
    }
    assert_counts_from(grandchild, &counts(&consoles.said(grandchild), "mine"), last + 1);
    guest.type_in(child, "echo still $n\n");
    let said = consoles.wait(child, |said| !counts(said, "still").is_empty());
    assert_eq!(counts(&said, "still"), [last]);
    // The root goes on, untouched.
    let count = counts(&consoles.said(root), "tick").len();
    let said = consoles.wait(root, |said| counts(said, "tick").len() > count);
    assert_counts_from(root, &counts(&said, "tick"), 101);
    guest.colony.check().expect("a sound state");
}
