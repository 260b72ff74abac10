//! Members are confined: what no VM needs ends the VM that asks for it, and no other. All other tests run
//! with the same filter.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use salp::family::VmId;
use salp::keeper::{Colony, ColonyConfig, ColonyError};
use salp::member::confine::Confinement;
use salp::member::messages::{GuestKind, Order, PuppetOrder};
use salp::words::MemoryShape;
use salp_protocol::{layout, order};
use salp_tests::procs::{MARK, Scratch, Usage, expect_nothing_left, salp_binary, settled};
use salp_tests::world::can_run;

const LIMIT: Duration = Duration::from_secs(60);
const MEMORY_BYTES: u64 = 16 << 20;

fn colony(guest: GuestKind, confinement: Confinement) -> Colony {
    let mut config = ColonyConfig::new(MemoryShape::new(MEMORY_BYTES).expect("whole leaves"));
    config.guest = guest;
    config.confinement = confinement;
    config.program = Some(salp_binary());
    config.backing_bytes = 1 << 20;
    config.members = 320;
    Colony::new(config).expect("a colony")
}

fn store(colony: &Colony, vm: VmId, value: u64) {
    let order = PuppetOrder { order: order::STORE64, a: layout::FREE, b: value, ..PuppetOrder::default() };
    result(colony, vm, order);
}

fn load(colony: &Colony, vm: VmId) -> u64 {
    result(colony, vm, PuppetOrder { order: order::LOAD64, a: layout::FREE, ..PuppetOrder::default() })
}

fn result(colony: &Colony, vm: VmId, order: PuppetOrder) -> u64 {
    let member = colony.member(vm).expect("it runs");
    member.state().puppet_results.clear();
    member.ask(Order::Puppet { vcpu: 0, order }, &[]).expect("it obeys");
    let found = |state: &mut salp::keeper::member_handle::MemberState| {
        (!state.puppet_results.is_empty()).then(|| state.puppet_results.remove(0).1)
    };
    member.wait_for(LIMIT, found).expect("a result")
}

/// The number in a line of a process's status (proc(5)).
fn status(process: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).expect("it exists");
    let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("the field");
    line.trim_start_matches(':').trim().parse().expect("a number")
}

#[cfg(debug_assertions)]
#[test]
fn a_forbidden_call_ends_that_vm_alone_and_its_keeper_says_so() {
    for guest in [GuestKind::Thread, GuestKind::Kvm] {
        if !can_run("a_forbidden_call_ends_that_vm_alone_and_its_keeper_says_so", guest) {
            continue;
        }
        let colony = colony(guest, Confinement::On);
        let root = colony.boot("case=puppet").expect("a first vm");
        store(&colony, root, 7);
        let forked = colony.fork(root, 2).expect("a fork");
        let [bad, good] = [0, 1].map(|clone| forked.clones[clone].vm);
        let member = colony.member(bad).expect("it runs");
        let refused = member.ask(Order::BreakOut, &[]);
        assert!(matches!(refused, Err(ColonyError::Died(vm)) if vm == bad), "{refused:?}");
        let (_, text) = member.state().ended.clone().expect("its keeper says why");
        assert!(text.contains("forbidden system call"), "{text}");
        for vm in [root, good] {
            assert_eq!(load(&colony, vm), 7, "{vm} goes on");
        }
        colony.fork(good, 1).expect("and can be forked");
    }
}

#[cfg(debug_assertions)]
#[test]
fn without_a_filter_the_same_call_is_made() {
    if !can_run("without_a_filter_the_same_call_is_made", GuestKind::Thread) {
        return;
    }
    for (confinement, filters) in [(Confinement::Off, 0), (Confinement::Log, 2)] {
        let colony = colony(GuestKind::Thread, confinement);
        let root = colony.boot("case=puppet").expect("a first vm");
        let member = colony.member(root).expect("it runs");
        member.ask(Order::BreakOut, &[]).expect("nobody minds");
        assert_eq!(status(member.process(), "Seccomp_filters"), filters);
        assert_eq!(status(member.process(), "NoNewPrivs"), 1);
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", member.process()));
        let limits = limits.expect("it exists");
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).expect("the field");
        assert!(core.split_whitespace().skip(4).eq(["0", "0", "bytes"]), "{core}");
    }
}

#[test]
fn three_hundred_vms_share_their_filters_and_end_together() {
    if !can_run("three_hundred_vms_share_their_filters_and_end_together", GuestKind::Thread) {
        return;
    }
    let colony = colony(GuestKind::Thread, Confinement::On);
    let root = colony.boot("case=puppet").expect("a first vm");
    store(&colony, root, 9);
    let mut vms = Vec::new();
    for _ in 0..6 {
        vms.extend(colony.fork(root, 50).expect("a fork").clones);
    }
    for clone in &vms {
        assert_eq!(load(&colony, clone.vm), 9);
        let process = colony.member(clone.vm).expect("it runs").process();
        // Made once, by the zygote: a process that made its own would have more.
        assert_eq!([status(process, "Seccomp"), status(process, "Seccomp_filters")], [2, 2]);
    }
    let begun = Instant::now();
    drop(colony);
    println!("{} vms ended in {:?}", vms.len(), begun.elapsed());
    let left = settled(LIMIT, Usage::now, |now| now.children == 0);
    assert_eq!((left.children, left.zombies), (0, 0), "processes outlive their colony");
}

/// The demo as user and group `nobody`, with device nodes of its own that anybody may open: in a mount
/// namespace, so that the host's stay as they are.
#[test]
fn an_ordinary_user_who_may_open_the_devices_forks_with_dma_in_flight() {
    let test = "an_ordinary_user_who_may_open_the_devices_forks_with_dma_in_flight";
    if !can_run(test, GuestKind::Kvm) {
        return;
    }
    let has = |program: &str| Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok();
    if !["unshare", "setpriv", "mknod", "mount"].into_iter().all(has) {
        println!("SKIPPED: {test}: needs unshare, setpriv, mknod and mount");
        return;
    }
    let scratch = Scratch::new("nobody");
    let anybody = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(scratch.path(), anybody).expect("it is ours");
    let mark = format!("nobody-{}", std::process::id());
    let script = r#"
        set -e
        mount -t tmpfs -o mode=0755 salp-devices "$1"
        for device in kvm userfaultfd; do
            numbers=$(stat -c '%Hr %Lr' "/dev/$device")
            mknod -m 0666 "$1/$device" c $numbers
            mount --bind "$1/$device" "/dev/$device"
        done
        mkdir -m 0777 "$1/work"
        cp "$2" "$1/salp"
        cd "$1/work"
        exec setpriv --reuid 65534 --regid 65534 --clear-groups --bounding-set=-all \
            env TMPDIR="$1/work" "$1/salp" demo --memory 64M --clones 3 --dirty 16M --json
    "#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]);
    command.arg(scratch.path()).arg(salp_binary()).env(MARK, &mark).env_remove("XDG_RUNTIME_DIR");
    let output = command.stdin(Stdio::null()).output().expect("unshare starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(told.contains("\"arena\":\"Memfd\"") || told.contains("\"arena\": \"Memfd\""), "{told}");
    assert!(Path::new("/dev/kvm").exists());
    expect_nothing_left(&mark, &scratch);
}
