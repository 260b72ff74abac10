//! `salp torture` runs, counts what it did, leaves nothing behind, and finds a fault that is planted.

use std::os::unix::process::CommandExt as _;
use std::process::{Child, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::process::{Pid, Signal, kill_process_group};
use salp_tests::user::User;
use salp_tests::world::can_run;
use salp_tests::{GuestKind, both_guests};
use serde_json::Value;

both_guests! {
    a_short_torture_holds_and_leaves_nothing;
    a_planted_fault_is_found;
    an_interrupted_torture_ends_with_a_summary;
}

/// A run of the torture, in a process group and a directory of its own.
struct Run {
    child: Child,
    user: User,
}

impl Run {
    fn start(guest: GuestKind, time: &str, plant: Option<&str>) -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let user = User::of_any_host(&format!("torture-{number}"));
        let guest = if guest == GuestKind::Kvm { "kvm" } else { "thread" };
        let mut command =
            user.command(&["torture", "--memory", "32M", "--vms", "5", "--seed", "5", "--json"]);
        command.args(["--time", time, "--guest", guest]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        if let Some(plant) = plant {
            command.env("SALP_TORTURE_PLANT", plant);
        }
        Self { child: command.spawn().expect("salp starts"), user }
    }

    /// Waits for the end; what it said, and its report.
    #[track_caller]
    fn end(self) -> (Output, Value) {
        let number = self.child.id();
        let output = self.child.wait_with_output().expect("it was started here");
        self.user.end();
        let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
        assert!(!swaps.contains(&format!("salp-torture-{number}")), "swap is left: {swaps}");
        for place in ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"] {
            let left = std::path::Path::new(place).join(format!("salp-torture-{number}"));
            assert!(!left.exists(), "{} is left", left.display());
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
        (output, report)
    }
}

fn a_short_torture_holds_and_leaves_nothing(test: &str, guest: GuestKind) {
    if !can_run(test, guest) {
        return;
    }
    let (output, report) = Run::start(guest, "4s", None).end();
    assert!(output.status.success(), "{report}: {}", String::from_utf8_lossy(&output.stderr));
    assert_eq!((&report["seed"], &report["finding"]), (&Value::from(5), &Value::Null), "{report}");
    for count in ["rounds", "forks", "resets", "kills", "transfers", "transferred_bytes", "checks"] {
        assert!(report["summary"][count].as_u64().is_some_and(|count| count > 0), "no {count}: {report}");
    }
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("seed 5"), "{said}");
}

fn a_planted_fault_is_found(test: &str, guest: GuestKind) {
    if !can_run(test, guest) {
        return;
    }
    let (output, report) = Run::start(guest, "4s", Some("bit")).end();
    assert_eq!(output.status.code(), Some(1), "{report}");
    let finding = report["finding"].as_str().unwrap_or_default();
    let words = if guest == GuestKind::Kvm { "has checksum" } else { "have the sum" };
    assert!(finding.contains(words), "{report}");
}

fn an_interrupted_torture_ends_with_a_summary(test: &str, guest: GuestKind) {
    if !can_run(test, guest) {
        return;
    }
    let mut run = Run::start(guest, "30s", None);
    // Its first word of what it has done: signals are caught by then.
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(run.child.stderr.take().expect("piped")));
    let rounds = lines.by_ref().find(|line| line.as_ref().is_ok_and(|line| line.contains(" rounds, ")));
    assert!(rounds.is_some(), "it ended at once");
    kill_process_group(Pid::from_child(&run.child), Signal::INT).expect("it runs");
    let (output, report) = run.end();
    assert_eq!(output.status.code(), Some(130), "{report}");
    assert_eq!(
        (&report["is_interrupted"], &report["finding"]),
        (&Value::from(true), &Value::Null),
        "{report}"
    );
}
