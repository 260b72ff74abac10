//! What users get wrong, and hosts that lack something: one line on standard error that says what is
//! wrong and what to do, a status that is not 0, and nothing left behind. And guests that end badly:
//! the VM's end is described, and the others go on.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use salp::keeper::{Colony, ColonyConfig};
use salp::kvm::Kvm;
use salp::member::messages::{Order, PuppetOrder};
use salp::words::MemoryShape;
use salp_protocol::{exit, layout, order};
use salp_tests::procs::{MARK, Scratch, expect_nothing_left, expect_refusal, salp_binary};

const NOBODY: u32 = 65_534;
const LIMIT: Duration = Duration::from_secs(60);

/// One run of salp to its end, in an empty directory of its own.
fn run(name: &str, mut command: Command) -> Output {
    let scratch = Scratch::new(name);
    let mark = format!("{name}-{}", std::process::id());
    command.env(MARK, &mark).env("TMPDIR", scratch.path()).current_dir(scratch.path());
    let output = command.output().expect("salp starts");
    expect_nothing_left(&mark, &scratch);
    output
}

fn salp(arguments: &[&str]) -> Command {
    let mut command = Command::new(salp_binary());
    command.args(arguments);
    command
}

/// The host must let a demo run as far as to look at its memory.
fn has_kvm(test: &str) -> bool {
    match Kvm::open() {
        Ok(_) => true,
        Err(error) => {
            println!("SKIPPED: {test}: {error}");
            false
        }
    }
}

fn is_root(test: &str) -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        println!("SKIPPED: {test}: only root can become nobody and hide devices");
    }
    is_root
}

#[test]
fn wrong_arguments_are_refused_in_one_line() {
    let cases: [(&[&str], i32, &[&str]); 16] = [
        (&[], 2, &["no command", "salp demo"]),
        (&["frobnicate"], 2, &["frobnicate", "--help"]),
        (&["demo", "surplus"], 2, &["surplus", "--help"]),
        (&["demo", "--nonsense"], 2, &["--nonsense"]),
        (&["demo", "--memory"], 2, &["--memory"]),
        (&["demo", "--memory", "much"], 2, &["much", "512M"]),
        (&["demo", "--memory", "0"], 1, &["memory of 0 bytes", "2M"]),
        (&["demo", "--memory", "3M"], 1, &["multiple of 2M"]),
        (&["demo", "--memory", "4M"], 1, &["16M"]),
        (&["demo", "--memory", "100T"], 1, &["64G"]),
        (&["demo", "--memory", "99999999999T"], 2, &["99999999999T"]),
        (&["demo", "--clones", "0"], 2, &["--clones", "1..=64"]),
        (&["demo", "--cpus", "3"], 2, &["--cpus", "1..=2"]),
        (&["demo", "--dirty", "nonsense"], 1, &["nonsense", "all", "64M", "10%"]),
        (&["demo", "--dirty", "101%"], 1, &["101%"]),
        (&["demo", "--huge", "maybe"], 2, &["maybe", "on, off"]),
    ];
    for (arguments, status, words) in cases {
        expect_refusal(&run("arguments", salp(arguments)), status, words);
    }
    let pins = ["demo", "--memory", "32M", "--pins", "65536"];
    expect_refusal(&run("arguments", salp(&pins)), 1, &["--pins 65536", "32M", "270M"]);
}

#[test]
fn more_memory_than_the_host_has_is_refused() {
    let available = salp::keeper::available_memory_bytes().expect("the host says");
    let asked = (available + (4 << 30)) >> 30;
    if asked > 64 {
        println!("SKIPPED: more_memory_than_the_host_has_is_refused: the host has more than 60G");
        return;
    }
    let output = run("more-memory", salp(&["demo", "--memory", &format!("{asked}G")]));
    expect_refusal(&output, 1, &[&format!("{asked}G"), "available", "give less"]);
}

#[test]
fn help_and_version_are_no_errors() {
    for argument in ["--help", "--version"] {
        let output = run("help", salp(&[argument]));
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("salp"));
    }
}

/// A copy of salp that anybody may run, wherever the build is.
struct Public(Scratch);

impl Public {
    fn new(name: &str) -> Self {
        let scratch = Scratch::new(&format!("{name}-binary"));
        let path = scratch.path().join("salp-copy");
        fs::copy(salp_binary(), &path).expect("room for a copy");
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("it is ours");
        Self(scratch)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("salp-copy")
    }
}

/// A shell in mounts of its own, which prepares the devices and becomes salp.
fn with_devices(prepare: &str, binary: &Path, become_user: &str) -> Command {
    let mut command = Command::new("unshare");
    let script = format!(
        "set -e; {prepare}; exec {become_user} {} demo --memory 16M --clones 1 --dirty 1M",
        binary.display()
    );
    command.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
    command
}

fn has_unshare(test: &str) -> bool {
    let works = Command::new("unshare").args(["--mount", "true"]).output();
    let works = works.is_ok_and(|output| output.status.success());
    if !works {
        println!("SKIPPED: {test}: unshare(1) does not work here");
    }
    works
}

#[test]
fn without_permission_for_kvm_that_is_said() {
    const TEST: &str = "without_permission_for_kvm_that_is_said";
    if !is_root(TEST) || !has_kvm(TEST) {
        return;
    }
    let mode = fs::metadata("/dev/kvm").expect("it was opened").permissions().mode();
    if mode & 0o006 == 0o006 {
        println!("SKIPPED: {TEST}: anybody may open /dev/kvm here");
        return;
    }
    let public = Public::new("permission");
    let mut command = Command::new(public.path());
    command.args(["demo", "--memory", "16M"]).uid(NOBODY).gid(NOBODY);
    expect_refusal(&run("permission", command), 1, &["/dev/kvm", "permission", "root", "group"]);
}

#[test]
fn without_kvm_that_is_said() {
    const TEST: &str = "without_kvm_that_is_said";
    if !is_root(TEST) || !has_unshare(TEST) {
        return;
    }
    let hidden = with_devices("mount -t tmpfs none /dev", &salp_binary(), "");
    expect_refusal(&run("no-kvm", hidden), 1, &["/dev/kvm does not exist", "module"]);
    if has_kvm(TEST) {
        let other = with_devices("mount --bind /dev/null /dev/kvm", &salp_binary(), "");
        expect_refusal(&run("other-kvm", other), 1, &["/dev/kvm"]);
    }
}

#[test]
fn without_userfaultfd_that_is_said() {
    const TEST: &str = "without_userfaultfd_that_is_said";
    if !is_root(TEST) || !has_kvm(TEST) || !has_unshare(TEST) {
        return;
    }
    let allowed = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
    if allowed.trim() == "1" || !Path::new("/usr/bin/setpriv").exists() {
        println!("SKIPPED: {TEST}: anybody may use userfaultfd here, or setpriv(1) is missing");
        return;
    }
    let public = Public::new("userfaultfd");
    let prepare = format!(
        "mkdir {0}/dev; mount -t tmpfs none {0}/dev; cp -a /dev/kvm {0}/dev/kvm; chmod 666 {0}/dev/kvm; \
         mount --bind {0}/dev/kvm /dev/kvm; chmod 600 /dev/userfaultfd || true",
        public.0.path().display()
    );
    let nobody = format!("setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups");
    let command = with_devices(&prepare, &public.path(), &nobody);
    expect_refusal(&run("userfaultfd", command), 1, &["userfaultfd", "root", "/dev/userfaultfd"]);
}

#[test]
fn json_has_the_documented_keys() {
    const TEST: &str = "json_has_the_documented_keys";
    if !is_root(TEST) || !has_kvm(TEST) {
        return;
    }
    let arguments = ["demo", "--json", "--memory", "32M", "--clones", "2", "--dirty", "4M"];
    let output = run("json", salp(&arguments));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a JSON document");
    let keys = |value: &serde_json::Value| {
        let object = value.as_object().expect("an object");
        let mut keys: Vec<_> = object.keys().cloned().collect();
        keys.sort();
        keys
    };
    assert_eq!(keys(&report), ["host", "problems", "verdict", "vms"]);
    assert_eq!(report["verdict"], "ok");
    let vms = report["vms"].as_array().expect("a list");
    assert_eq!(vms.len(), 4, "the root, two clones, a clone of the last");
    for vm in vms {
        let expected = [
            "call_us",
            "first_instruction_us",
            "memory_verified",
            "name",
            "pages",
            "parent",
            "pause_us",
            "stages_us",
            "transfers_verified",
        ];
        assert_eq!(keys(vm), expected);
        assert_eq!(keys(&vm["pages"]), ["copied_in_pause", "lent", "pinned", "shared"]);
        assert_eq!(vm["memory_verified"], true);
        assert!(vm["transfers_verified"].as_u64().is_some_and(|count| count > 0));
        let is_root = vm["parent"].is_null();
        assert_eq!(vm["pause_us"].is_null(), is_root);
        assert_eq!(vm["stages_us"].is_object(), !is_root);
    }
}

/// Gives an order, and returns its result.
fn ask(colony: &Colony, vm: salp::family::VmId, order: PuppetOrder) -> u64 {
    let member = colony.member(vm).expect("it lives");
    member.ask(Order::Puppet { vcpu: 0, order }, &[]).expect("it is taken");
    let result = member.wait_for(LIMIT, |state| {
        (!state.puppet_results.is_empty()).then(|| state.puppet_results.remove(0).1)
    });
    result.expect("a result")
}

#[test]
fn a_guest_that_ends_badly_ends_alone() {
    const TEST: &str = "a_guest_that_ends_badly_ends_alone";
    if !is_root(TEST) || !has_kvm(TEST) {
        return;
    }
    let mut config = ColonyConfig::new(MemoryShape::new(16 << 20).expect("whole leaves"));
    config.program = Some(salp_binary());
    let colony = Colony::new(config).expect("a colony");
    let root = colony.boot("case=puppet").expect("a vm");
    let stamp = PuppetOrder { order: order::STORE64, a: layout::FREE, b: 4711, ..PuppetOrder::default() };
    assert_eq!(ask(&colony, root, stamp), 0);
    let far = 1 << 40;
    let bad = [
        PuppetOrder { order: order::LOAD64, a: far, ..PuppetOrder::default() },
        PuppetOrder { order: order::RUN_AND_WRITE, a: far, b: 1, ..PuppetOrder::default() },
    ];
    let clones = colony.fork(root, 3).expect("a fork").clones;
    for (clone, order) in clones.iter().zip(bad) {
        let member = colony.member(clone.vm).expect("it lives");
        member.ask(Order::Puppet { vcpu: 0, order }, &[]).expect("it is taken");
        let (status, text) = member.wait_for(LIMIT, |state| state.ended.clone()).expect("an end");
        // 14 is the page fault.
        assert_eq!(status, Some(exit::EXCEPTION | 14), "{text}");
        assert!(text.contains("142"), "{text}");
        assert!(member.is_alive(), "the process of a VM that ended stays until the VM is let go");
    }
    let load = PuppetOrder { order: order::LOAD64, a: layout::FREE, ..PuppetOrder::default() };
    assert_eq!(ask(&colony, root, load), 4711);
    let third = clones[2].vm;
    let member = colony.member(third).expect("it lives");
    // What its source said last, said again by the clone.
    let said = member.wait_for(LIMIT, |state| state.puppet_results.pop()).expect("the clone runs");
    assert_eq!(said, (0, 0));
    assert_eq!(ask(&colony, third, load), 4711);
    let again = colony.fork(root, 1).expect("the family goes on").clones[0].vm;
    colony.check().expect("all adds up");
    for vm in colony.vms() {
        colony.end(vm).expect("it exists");
    }
    colony.wait_until_gone(LIMIT).expect("all are ended");
    assert!(colony.member(again).is_err());
}
