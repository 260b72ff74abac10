//! Hazards that need processes and vCPUs: what blocks in a fault must come out when it is told to,
//! and no VM may make another's faults slow.

use std::fs;
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use salp::family::VmId;
use salp::member::messages::{GuestKind, Order, PuppetOrder};
use salp_protocol::order;
use salp_tests::row::{FULL, OLD, write_memory};
use salp_tests::world::{LIMIT, Setup, World};

fn signal(world: &World, vm: VmId, signal: Signal) {
    let process = i32::try_from(world.member(vm).process()).expect("a process number");
    let pid = Pid::from_raw(process).expect("not 0");
    kill_process(pid, signal).expect("it is a process of this test");
}

/// Stops a member, and waits until each of its threads stands: until then one may still answer.
fn freeze(world: &World, vm: VmId) {
    signal(world, vm, Signal::STOP);
    let tasks = format!("/proc/{}/task", world.member(vm).process());
    let deadline = Instant::now() + LIMIT;
    let stands = |task: &fs::DirEntry| {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        // The state follows the name, which is in parentheses.
        stat.rsplit(") ").next().is_some_and(|fields| fields.starts_with('T'))
    };
    while !fs::read_dir(&tasks).expect("the process exists").flatten().all(|task| stands(&task)) {
        assert!(Instant::now() < deadline, "{vm} is not stopped by SIGSTOP");
        std::thread::yield_now();
    }
}

/// Waits until vCPU 0 of a VM sleeps inside `KVM_RUN`: the guest does not halt here, so it waits for
/// a page, in the fault itself or for an asynchronous one.
fn await_fault(world: &World, vm: VmId) {
    let tasks = format!("/proc/{}/task", world.member(vm).process());
    let deadline = Instant::now() + LIMIT;
    // The first field is the number of the system call that a sleeping thread is in.
    let ioctl = format!("{} ", libc::SYS_ioctl);
    let is_waiting = || {
        fs::read_dir(&tasks).expect("the process exists").flatten().any(|task| {
            let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            read("comm").trim_end() == "vcpu0" && read("syscall").starts_with(&ioctl)
        })
    };
    while !is_waiting() {
        assert!(Instant::now() < deadline, "{vm} does not wait in a fault");
        std::thread::yield_now();
    }
}

/// A clone whose vCPU waits for a page of a source that is frozen.
fn blocked_clone(world: &World) -> (VmId, VmId) {
    let source = world.root();
    write_memory(world, source);
    let clone = world.fork(source);
    freeze(world, source);
    let load = PuppetOrder { order: order::LOAD64, a: FULL.gfn(7).gpa().0, ..PuppetOrder::default() };
    world.begin(clone, 0, load);
    await_fault(world, clone);
    (source, clone)
}

#[test]
fn hazard_p7_a_vcpu_in_a_fault_stops_and_goes_on() {
    let test = "hazard_p7_a_vcpu_in_a_fault_stops_and_goes_on";
    let Some(world) = World::new(test, GuestKind::Kvm, &Setup::default()) else { return };
    let (source, clone) = blocked_clone(&world);
    // Answered although the page cannot come now.
    world.tell(clone, Order::Quiesce);
    world.tell(clone, Order::Resume);
    await_fault(&world, clone);
    signal(&world, source, Signal::CONT);
    assert_eq!(world.result(clone, 0), OLD, "the load that was interrupted");
    world.finish();
}

#[test]
fn hazard_p7b_a_vm_ends_with_its_vcpu_in_a_fault() {
    let test = "hazard_p7b_a_vm_ends_with_its_vcpu_in_a_fault";
    let Some(world) = World::new(test, GuestKind::Kvm, &Setup::default()) else { return };
    let (source, clone) = blocked_clone(&world);
    world.tell(clone, Order::EndVm);
    signal(&world, source, Signal::CONT);
    world.finish();
}

/// The host calls every KVM VM of a process at each of its copy-on-write faults: so no process has
/// more than one.
#[test]
fn hazard_p8_and_p11_each_vm_has_a_process_of_its_own() {
    let test = "hazard_p8_and_p11_each_vm_has_a_process_of_its_own";
    let Some(world) = World::alone(test, GuestKind::Kvm, &Setup::default()) else { return };
    let source = world.root();
    let clones = world.fork_many(source, 3).clones;
    let kvm_vms = |process: u32| {
        let fds = fs::read_dir(format!("/proc/{process}/fd")).expect("the process exists");
        let targets = fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
        targets.filter(|target| target.to_string_lossy().contains("kvm-vm")).count()
    };
    for vm in clones.iter().map(|clone| clone.vm).chain([source]) {
        assert_eq!(kvm_vms(world.member(vm).process()), 1, "{vm}");
    }
    assert_eq!(kvm_vms(std::process::id()), 0, "the keeper");
    world.finish();
}
