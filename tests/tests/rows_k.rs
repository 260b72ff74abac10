//! Rows K of the conformance table: when something runs out, is missing, or dies. That each step of a
//! fork fails once is in `failures.rs`.

use std::fs;
use std::process::{Command, Output, Stdio};

use salp::family::VmId;
use salp::member::messages::{GuestKind, Order, PuppetOrder};
use salp::space::Keep;
use salp::words::LeafNumber;
use salp_protocol::order;
use salp_tests::axes::LEVEL;
use salp_tests::both_guests;
use salp_tests::procs::{salp_binary, settled};
use salp_tests::row::{ALONE, FULL, NEW, OLD, OTHER, at, attempt, write_memory};
use salp_tests::user::User;
use salp_tests::world::{LIMIT, Setup, World};

both_guests! {
    k2_the_arena_is_full;
    k3_mappings_are_bounded;
    k4_without_kvm;
    k5_a_clones_vcpu_crashes;
    k6_the_process_is_killed;
}

/// How a VM's run ended, if it has.
fn end_of(world: &World, vm: VmId) -> Option<(Option<u32>, String)> {
    world.member(vm).state().ended.clone()
}

fn k2_the_arena_is_full(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| {
        // Room for as much as the VM has: for the first cut, and little of the second. (A KVM guest needs
        // two leaves for itself, of each.)
        let world = World::at(point, Setup { arena_mib: Some(16), ..Setup::default() });
        let root = world.root();
        let leaves = || (2..if guest == GuestKind::Kvm { 6 } else { 8 }).map(LeafNumber);
        let write = |value| leaves().for_each(|leaf| world.store_pages(root, leaf.first_gfn(), 512, value));
        write(OLD);
        let first = world.fork(root);
        world.publish_all(root, Keep::Own);
        write(NEW);
        let child = world.fork(root);
        let mut seen = 0;
        let told = leaves().find_map(|leaf| {
            let load = PuppetOrder { order: order::LOAD64, a: leaf.gpa().0, ..PuppetOrder::default() };
            world.begin(child, 0, load);
            let outcome = world.member(child).wait_for(LIMIT, |state| {
                let result = state.puppet_results.pop().map(|(_, result)| Ok(result));
                result.or_else(|| state.ended.clone().map(Err))
            });
            match outcome.unwrap_or_else(|error| panic!("{child}: {error}")) {
                Ok(value) => {
                    assert_eq!(value, NEW, "{leaf}: never a byte that is wrong");
                    seen += 1;
                    None
                }
                Err((status, text)) => Some((leaf, status, text)),
            }
        });
        let (leaf, status, text) = told.expect("two cuts found room for one");
        assert_eq!(status, None, "{text}");
        assert!(text.contains(&leaf.first_gfn().to_string()), "{text}: names the page, after {seen} leaves");
        for leaf in leaves() {
            assert_eq!(world.sum(root, leaf.gpa(), 512, 4096), 512 * NEW, "{leaf} of the source");
            assert_eq!(world.sum(first, leaf.gpa(), 512, 4096), 512 * OLD, "{leaf} of the first clone");
        }
        // With the clones their blocks go, and there is room for another.
        [child, first].into_iter().for_each(|vm| world.end(vm));
        settled(LIMIT, || world.usage().1, |bytes| *bytes == 0);
        let next = world.fork(root);
        world.expect(next, FULL.gpa(), NEW);
        world.store(next, FULL.gpa(), OTHER);
        world.expect(root, FULL.gpa(), NEW);
        world.finish();
    });
}

/// A leaf is one mapping, whatever is done to it: the largest VM, of 32,768 leaves, stays far below the
/// usual limit of 65,530, so that there is nothing to fall back from.
fn k3_mappings_are_bounded(test: &str, guest: GuestKind) {
    /// What a member has besides its window.
    const OTHERS: usize = 300;
    at(test, guest, LEVEL, |point| {
        let world = World::at(point, Setup { memory_mib: 512, ..Setup::default() });
        let root = world.root();
        let leaves = || (2..256).map(LeafNumber);
        let step = PuppetOrder { order: order::STORE_STRIDE, a: FULL.gpa().0, b: OLD, c: 254, d: 2 << 20 };
        assert_eq!(world.order(root, 0, step), 0);
        let child = world.fork(root);
        // Every second leaf is known, every third discarded in part, every fifth has a patch.
        for leaf in leaves().step_by(2) {
            world.expect(child, leaf.gpa(), OLD);
        }
        for leaf in leaves().step_by(3) {
            world.tell(child, Order::Discard { first: leaf.gfn(3), pages: 2 });
        }
        world.publish_all(root, Keep::Shared);
        let grandchild = world.fork(child);
        for leaf in leaves().step_by(5) {
            world.store(child, leaf.gpa(), NEW);
            world.pin(child, leaf.gfn(7), 1);
        }
        for leaf in leaves().step_by(4) {
            world.load(grandchild, leaf.gpa());
        }
        for vm in [root, child, grandchild] {
            let maps = fs::read_to_string(format!("/proc/{}/maps", world.member(vm).process()));
            let maps = maps.expect("the maps of a member").lines().count();
            assert!(maps <= 256 + OTHERS, "{vm} has {maps} mappings for 256 leaves");
        }
        for leaf in leaves().step_by(5) {
            world.unpin(child, leaf.gfn(7), 1);
            world.expect(grandchild, leaf.gpa(), OLD);
        }
        world.finish();
    });
}

/// In a place without `/dev/kvm`: what needs it says so, and the doctor what to do.
fn k4_without_kvm(test: &str, guest: GuestKind) {
    attempt(test, guest, &[], |_| {
        let demo = without_kvm("demo")?;
        let said = String::from_utf8_lossy(&demo.stderr);
        assert!(!demo.status.success() && said.starts_with("salp: ") && said.contains("/dev/kvm"), "{said}");
        assert!(!said.contains("panicked"), "{said}");
        let doctor = without_kvm("doctor")?;
        let said = String::from_utf8_lossy(&doctor.stdout);
        assert!(!doctor.status.success(), "{said}");
        let mut lines = said.lines().skip_while(|line| !line.starts_with("missing"));
        assert!(lines.next().is_some_and(|line| line.to_lowercase().contains("kvm")), "{said}");
        assert!(lines.any(|line| line.contains("->")), "what to do: {said}");
        Ok(())
    });
}

/// Runs a command of salp's with another thing at that path, for that process alone.
fn without_kvm(command: &str) -> Result<Output, String> {
    let script = format!("mount --bind /dev/null /dev/kvm && exec {} {command}", salp_binary().display());
    let output = Command::new("unshare")
        .args(["--mount", "--", "sh", "-c", &script])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("no namespace of mounts: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("unshare:") || said.contains("mount:") {
        return Err(format!("no namespace of mounts: {}", said.trim()));
    }
    Ok(output)
}

/// Where the loader puts the interrupt descriptor table.
const DESCRIPTORS: u64 = 0x2000;
/// An address that is not mapped.
const NOWHERE: u64 = 1 << 45;

fn k5_a_clones_vcpu_crashes(test: &str, guest: GuestKind) {
    attempt(test, guest, LEVEL, |point| {
        if guest == GuestKind::Thread {
            return Err("a thread guest has no vcpu that could crash".to_owned());
        }
        let world = World::at(point, Setup::default());
        let root = world.root();
        write_memory(&world, root);
        let forked = world.fork_many(root, 2);
        let [victim, other] = [forked.clones[0].vm, forked.clones[1].vm];
        // Without its descriptors a fault becomes a double and a triple one.
        let wipe = PuppetOrder { order: order::FILL, a: DESCRIPTORS, b: 0, c: 4096, d: 0 };
        assert_eq!(world.order(victim, 0, wipe), 0);
        let crash = PuppetOrder { order: order::LOAD64, a: NOWHERE, ..PuppetOrder::default() };
        world.begin(victim, 0, crash);
        let ended = world.member(victim).wait_for(LIMIT, |state| state.ended.clone());
        let (status, text) = ended.unwrap_or_else(|error| panic!("{victim}: {error}"));
        assert_eq!(status, None, "{text}");
        assert!(text.contains("triple fault") && text.contains("rip"), "its state: {text}");
        world.store(root, FULL.gpa(), NEW);
        world.expect(other, FULL.gpa(), OLD);
        world.expect(root, ALONE.gpa(), OLD);
        let next = world.fork(root);
        world.expect(next, FULL.gpa(), NEW);
        assert_eq!((end_of(&world, root), end_of(&world, other)), (None, None));
        world.end(victim);
        world.finish();
        Ok(())
    });
}

/// The keeper of a demo, killed in the middle: its members go with it.
fn k6_the_process_is_killed(test: &str, guest: GuestKind) {
    attempt(test, guest, &[], |_| {
        if guest == GuestKind::Thread {
            return Err("no command runs thread guests".to_owned());
        }
        let user = User::of_any_host("killed");
        let mut demo = user.demo().stderr(Stdio::null()).spawn().expect("salp starts");
        settled(LIMIT, || user.processes().len(), |processes| *processes > 1);
        demo.kill().expect("it is ours");
        demo.wait().expect("it is ours");
        user.end();
        Ok(())
    });
}
