//! Who a VM is told that it is, and forks whose clones are each wanted in a way of their own: names, data,
//! paused, some that cannot be had.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use salp::devices::identity::IdentityError;
use salp::family::VmId;
use salp::keeper::fork::Forked;
use salp::keeper::member_handle::MemberState;
use salp::keeper::observe::Observer;
use salp::keeper::spec::{CloneSpec, ForkSpec};
use salp::keeper::{Colony, ColonyConfig, ColonyError};
use salp::kvm::Irqchip;
use salp::member::messages::{GuestKind, HowEnded, Order, PuppetOrder};
use salp::words::{Gpa, MemoryShape};
use salp_protocol::identity::{DATA_BYTES, MAGIC, SEED_BYTES, register};
use salp_protocol::{call, layout, order};
use salp_tests::both_guests;
use salp_tests::images::{CODE, image, pvh_note};
use salp_tests::procs::{entries, salp_binary};
use salp_tests::row::{FULL, NEW, OLD, write_memory};
use salp_tests::world::{LIMIT, Setup, World, can_run};

both_guests! {
    each_clone_is_told_who_it_is;
    a_reset_makes_a_vm_another_one;
    a_guest_says_that_it_is_ready;
    a_clone_begins_paused;
    a_guests_own_fork_gets_a_name;
}

/// What a VM reads of its device.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Who {
    generation: u64,
    index: u64,
    name: String,
    data: String,
    seed: Vec<u8>,
}

fn read(world: &World, vm: VmId, offset: u64) -> u64 {
    world.run(vm, order::IDENTITY_READ, offset, 0)
}

fn read_bytes(world: &World, vm: VmId, offset: u64, count: u64) -> Vec<u8> {
    let words = (0..count.div_ceil(8)).flat_map(|at| read(world, vm, offset + 8 * at).to_le_bytes());
    words.take(usize::try_from(count).expect("less than a page")).collect()
}

fn who(world: &World, vm: VmId) -> Who {
    assert_eq!(read(world, vm, register::MAGIC), MAGIC);
    let text = |offset, length| {
        let bytes = read_bytes(world, vm, offset, read(world, vm, length));
        String::from_utf8(bytes).expect("it is told in UTF-8")
    };
    Who {
        generation: read(world, vm, register::GENERATION),
        index: read(world, vm, register::INDEX),
        name: text(register::NAME, register::NAME_LENGTH),
        data: text(register::DATA, register::DATA_LENGTH),
        seed: read_bytes(world, vm, register::SEED, SEED_BYTES as u64),
    }
}

fn data(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn wanted(index: u32) -> CloneSpec {
    let data = data(&[("task", &format!("{}", 100 + index)), ("a text", "with = and a space")]);
    CloneSpec { name: Some(format!("worker-{index}")), index, data, is_paused: false }
}

/// Clones of one fork, those of one of them too, and another one of the first VM.
fn each_clone_is_told_who_it_is(test: &str, guest: GuestKind) {
    let Some(world) = World::new(test, guest, &Setup::default()) else { return };
    let root = world.root();
    let first = who(&world, root);
    assert_eq!((first.generation, first.index, first.name.as_str(), first.data.as_str()), (0, 0, "vm-1", ""));
    let forked = world.colony.fork_as(root, &ForkSpec::each((0..20).map(wanted).collect())).expect("a fork");
    assert_eq!((forked.clones.len(), forked.missing.len()), (20, 0));
    let mut seeds = BTreeSet::from([first.seed.clone()]);
    for (clone, index) in forked.clones.iter().zip(0..) {
        world.await_puppets(clone.vm);
        let found = who(&world, clone.vm);
        assert_eq!((found.generation, found.index), (1, index));
        assert_eq!(found.name, format!("worker-{index}"));
        assert_eq!(found.data, format!("a text=with = and a space\0task={}\0", 100 + index));
        assert_eq!((clone.name.as_str(), clone.position), (found.name.as_str(), clone.position));
        assert!(seeds.insert(found.seed.clone()), "{} has a seed that another vm has", found.name);
        assert_eq!(who(&world, clone.vm), found, "it stays who it is");
    }
    let child = forked.clones[7].vm;
    let grandchild = who(&world, world.fork(child));
    assert_eq!((grandchild.generation, grandchild.index, grandchild.data.as_str()), (2, 0, ""));
    let late = who(&world, world.fork(root));
    assert_eq!(late.generation, 1);
    assert!(seeds.insert(grandchild.seed) && seeds.insert(late.seed));
    assert_eq!(who(&world, root), first, "a source stays who it is");
    world.finish();
}

fn a_reset_makes_a_vm_another_one(test: &str, guest: GuestKind) {
    let Some(world) = World::new(test, guest, &Setup::default()) else { return };
    let root = world.root();
    let clone = world.colony.fork_as(root, &ForkSpec::each(vec![wanted(3)])).expect("a fork").clones[0].vm;
    world.await_puppets(clone);
    let mut seeds = BTreeSet::new();
    for generation in 1..5 {
        let found = who(&world, clone);
        assert_eq!((found.generation, found.index, found.name.as_str()), (generation, 3, "worker-3"));
        assert!(found.data.contains("task=103\0"));
        assert!(seeds.insert(found.seed), "a seed comes twice");
        let grandchild = world.fork(clone);
        assert_eq!(who(&world, grandchild).generation, generation + 1);
        world.end(grandchild);
        world.colony.reset(clone).expect("it is a clone");
        world.await_puppets(clone);
    }
    world.finish();
}

fn a_guest_says_that_it_is_ready(test: &str, guest: GuestKind) {
    let Some(world) = World::new(test, guest, &Setup::default()) else { return };
    let root = world.root();
    let say =
        |vm, generation| assert_eq!(world.run(vm, order::IDENTITY_WRITE, register::READY, generation), 0);
    say(root, 0);
    assert_eq!(world.colony.wait_ready(root, LIMIT).expect("it said so"), 0);
    let clone = world.fork(root);
    // What its source says, said by the clone: nobody who waits for the clone is told.
    say(clone, 0);
    assert_eq!(read(&world, clone, register::READY), u64::MAX);
    let error = world.colony.wait_ready(clone, Duration::from_millis(50)).expect_err("it knows nothing yet");
    assert!(matches!(error, ColonyError::NotReady { .. }), "{error}");
    assert!(error.to_string().contains("does it use the identity device?"), "{error}");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| world.colony.wait_ready(clone, LIMIT));
        say(clone, 1);
        assert_eq!(waiting.join().expect("it waits").expect("the clone said so"), 1);
    });
    assert_eq!(read(&world, clone, register::READY), 1);
    world.colony.reset(clone).expect("it is a clone");
    world.await_puppets(clone);
    assert!(world.member(clone).state().ready.is_none(), "it has not said so since the reset");
    say(clone, 2);
    assert_eq!(world.colony.wait_ready(clone, LIMIT).expect("it said so"), 2);
    world.finish();
}

/// Whether a VM's process has a thread that is its guest.
fn has_guest_thread(world: &World, vm: VmId) -> bool {
    let tasks = format!("/proc/{}/task", world.member(vm).process());
    let name = |task: &String| std::fs::read_to_string(format!("{tasks}/{task}/comm")).unwrap_or_default();
    entries(&tasks).iter().any(|task| name(task).trim_end() == "guest")
}

fn a_clone_begins_paused(test: &str, guest: GuestKind) {
    let Some(world) = World::new(test, guest, &Setup::default()) else { return };
    let root = world.root();
    write_memory(&world, root);
    let paused = |index| CloneSpec { is_paused: true, ..wanted(index) };
    let spec = ForkSpec::each(vec![paused(0), paused(1), paused(2), wanted(3)]);
    let clones: Vec<_> =
        world.colony.fork_as(root, &spec).expect("a fork").clones.iter().map(|clone| clone.vm).collect();
    let [first, second, third, running] = clones[..] else { panic!("{} clones", clones.len()) };
    for vm in [first, second, third] {
        assert!(world.colony.is_paused(vm).expect("it is there"));
        let entries = world.describe(vm).vcpus.iter().filter(|times| times.entered_ns != 0).count();
        assert_eq!(entries, 0, "{vm} has been in the guest");
        assert!(!has_guest_thread(&world, vm), "{vm} has been started");
    }
    let error = world.colony.wait_ready(first, Duration::from_millis(10)).expect_err("it does not run");
    assert!(error.to_string().contains("it is paused"), "{error}");
    assert!(!world.colony.is_paused(running).expect("it is there"));
    assert_eq!(has_guest_thread(&world, running), guest == GuestKind::Thread);
    world.await_puppets(running);
    world.expect(running, FULL.gfn(1).gpa(), OLD);
    world.check();
    // It can be forked as it stands, and its clone runs.
    let grandchild = world.fork(first);
    assert_eq!(who(&world, grandchild).generation, 2);
    world.expect(grandchild, FULL.gfn(1).gpa(), OLD);
    world.colony.resume(first).expect("it begins");
    world.await_puppets(first);
    assert_eq!(who(&world, first).name, "worker-0");
    world.store(first, FULL.gfn(1).gpa(), NEW);
    // A reset lets it run, and so does its end.
    world.colony.reset(second).expect("it is a clone");
    world.await_puppets(second);
    assert!(!world.colony.is_paused(second).expect("it is there"));
    assert_eq!(who(&world, second).generation, 2);
    world.expect(second, FULL.gfn(1).gpa(), OLD);
    world.end(third);
    world.expect(root, FULL.gfn(1).gpa(), OLD);
    world.finish();
}

/// The guest sees the interrupt before it can see anything else of its new identity.
#[test]
fn the_interrupt_comes_before_the_clone_goes_on() {
    let test = "the_interrupt_comes_before_the_clone_goes_on";
    let setup = Setup { command_line: "case=identity us=200".to_owned(), ..Setup::default() };
    let Some(world) = World::new(test, GuestKind::Kvm, &setup) else { return };
    let root = world.root();
    world.colony.wait_ready(root, LIMIT).expect("it has a device");
    let mut vms = vec![(root, 0)];
    for round in 0..8 {
        let (source, generation) = vms[round / 2];
        let forked = world.fork_running(source, 2);
        vms.extend(forked.clones.iter().map(|clone| (clone.vm, generation + 1)));
    }
    for (vm, generation) in &vms[1..] {
        assert_eq!(world.colony.wait_ready(*vm, LIMIT).expect("it has noticed"), *generation);
    }
    for (vm, generation) in &mut vms[1..6] {
        world.colony.reset(*vm).expect("it is a clone");
        *generation = world.colony.wait_ready(*vm, LIMIT).expect("it has noticed");
    }
    let mut figures = BTreeSet::new();
    for (vm, generation) in &vms {
        world.tell(*vm, Order::Finish);
        let member = world.member(*vm);
        let ended = member.wait_for(LIMIT, |state| state.ended.clone()).expect("it finishes");
        let state = member.state();
        let console = String::from_utf8_lossy(&state.console).into_owned();
        assert_eq!((ended.0, state.progress.errors), (Some(0), 0), "{vm} says: {console}");
        assert!(figures.insert(state.progress.figure), "{vm} has a seed that another one has");
        let said = format!("vm-{}: clone", vm.0);
        assert!(
            console.contains(&said) && console.contains(&format!("generation {generation}, ")),
            "{console}"
        );
    }
    world.end_all();
}

/// 32-bit code: enables the device's interrupt, says "." and looks until it is another VM; then ends with
/// what the first interrupt controller is asked for.
const ENDS_WITH_REQUESTS: &[u8] = &[
    0xb8, 0x00, 0x01, 0x00, 0x00, // mov eax, 0x100
    0xa3, 0x28, 0x10, 0x00, 0xd0, // mov [0xd0001028], eax
    0xba, 0xf8, 0x03, 0x00, 0x00, // mov edx, 0x3f8
    0xb0, 0x2e, // mov al, '.'
    0xee, // out dx, al
    0xa1, 0x08, 0x10, 0x00, 0xd0, // look: mov eax, [0xd0001008]
    0x85, 0xc0, // test eax, eax
    0x74, 0xf7, // jz look
    0xe4, 0x20, // in al, 0x20
    0xe6, 0xf4, // out 0xf4, al
    0xf4, // hlt
];

/// Other kernels get the interrupt on a pin.
#[test]
fn the_interrupt_of_other_kernels_is_pin_5() {
    if !can_run("the_interrupt_of_other_kernels_is_pin_5", GuestKind::Kvm) {
        return;
    }
    let mut config = ColonyConfig::new(MemoryShape::new(16 << 20).expect("whole leaves"));
    config.irqchip = Irqchip::Full;
    config.program = Some(salp_binary());
    let colony = Colony::new(config).expect("a colony");
    let kernel = File::from(memfd_create("salp-test-image", MemfdFlags::CLOEXEC).expect("a memfd"));
    let entry = u32::try_from(CODE).expect("in the first MiB");
    let code = image(ENDS_WITH_REQUESTS, CODE, &pvh_note(entry));
    rustix::io::pwrite(&kernel, &code, 0).expect("room for an image");
    let root = colony.boot_image_as(Some("other"), &kernel, None, "").expect("an image that boots");
    let looks = |state: &mut MemberState| state.console.contains(&b'.').then_some(());
    colony.member(root).expect("it is there").wait_for(LIMIT, looks).expect("it looks");
    let clone = colony.fork(root, 1).expect("a fork").clones[0].vm;
    for _ in 0..2 {
        let member = colony.member(clone).expect("it is there");
        let (status, text) = member.wait_for(LIMIT, |state| state.ended.clone()).expect("it ends");
        let requests = status.unwrap_or_else(|| panic!("{text}"));
        assert!(requests & 1 << 5 != 0, "requests {requests:#x}");
        colony.reset(clone).expect("it is a clone");
    }
    assert!(colony.member(root).expect("it is there").state().ended.is_none(), "a source stays who it is");
}

/// By loads and stores of every kind, those too that reach into the pages beside it.
#[test]
fn a_guest_cannot_change_who_it_is() {
    let Some(world) = World::new("a_guest_cannot_change_who_it_is", GuestKind::Kvm, &Setup::default()) else {
        return;
    };
    let root = world.root();
    let page = layout::IDENTITY_REGISTERS;
    let first = who(&world, root);
    let fill = |at, byte, count| {
        let order = PuppetOrder { order: order::FILL, a: at, b: byte, c: count, d: 0 };
        assert_eq!(world.order(root, 0, order), 0);
    };
    fill(page, 0xff, 4096);
    for offset in
        [1, register::GENERATION, register::INDEX - 4, register::READY + 1, register::SEED, 4088, 4093]
    {
        world.store(root, Gpa(page + offset), u64::MAX);
    }
    assert_eq!(who(&world, root), first);
    assert_eq!(read(&world, root, register::READY), u64::MAX, "nothing of that was the generation");
    assert_eq!(read(&world, root, register::INTERRUPT), 0);
    let beside = |offset| world.load(root, Gpa(page.wrapping_add_signed(offset))).to_le_bytes();
    assert_eq!(beside(3), *b"p-id1\0\0\0");
    // Half of it is the DMA engine's, or nobody's.
    assert_eq!(beside(-4)[4..], *b"salp");
    assert_eq!(beside(4092), [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    world.finish();
}

fn small_colony(guest: GuestKind, members: u32) -> Colony {
    let mut config = ColonyConfig::new(MemoryShape::new(16 << 20).expect("whole leaves"));
    config.guest = guest;
    config.members = members;
    config.pool = 1;
    config.program = Some(salp_binary());
    Colony::new(config).expect("a colony")
}

/// Names the clones that guests ask for, as long as it has names.
#[derive(Debug, Default)]
struct Namer {
    names: Mutex<Vec<String>>,
    forgotten: Mutex<Vec<String>>,
}

impl Observer for Namer {
    fn console(&self, _: VmId, _: &[u8]) {}
    fn ended(&self, _: VmId, _: HowEnded, _: Option<u32>, _: &str) {}
    fn restarted(&self, _: VmId) {}
    fn gone(&self, _: VmId) {}
    fn forked(&self, _: Forked) {}

    fn name_clone(&self, _: &str) -> Result<Option<String>, ColonyError> {
        let name = self.names.lock().expect("nobody panics").pop();
        name.map(Some).ok_or_else(|| ColonyError::Nameless("there are no more".to_owned()))
    }

    fn forget_name(&self, name: &str) {
        self.forgotten.lock().expect("nobody panics").push(name.to_owned());
    }
}

/// By whoever observes the colony, before the clone runs.
fn a_guests_own_fork_gets_a_name(test: &str, guest: GuestKind) {
    if !can_run(test, guest) {
        return;
    }
    let colony = small_colony(guest, 3);
    let namer = Arc::new(Namer::default());
    namer.names.lock().expect("nobody panics").extend(["third", "second", "first"].map(str::to_owned));
    let observer: Arc<dyn Observer> = namer.clone();
    colony.observe(Arc::downgrade(&observer));
    let root = colony.boot("case=puppet").expect("a first VM");
    let result = |vm| {
        let member = colony.member(vm).expect("it is there");
        member.wait_for(LIMIT, |state| state.puppet_results.pop()).expect("it answers").1
    };
    let run = |order, a| {
        let order = PuppetOrder { order, a, ..PuppetOrder::default() };
        colony.ask(root, Order::Puppet { vcpu: 0, order }).expect("it takes orders");
        result(root)
    };
    for name in ["first", "second"] {
        colony.settle();
        let clone = VmId(u32::try_from(run(order::FORK, 0)).expect("a clone's number"));
        assert_eq!(result(clone), 0, "the call's result in the clone");
        let order = PuppetOrder { order: order::IDENTITY_READ, a: register::NAME, ..PuppetOrder::default() };
        colony.ask(clone, Order::Puppet { vcpu: 0, order }).expect("it takes orders");
        let mut expected = [0; 8];
        expected[..name.len()].copy_from_slice(name.as_bytes());
        assert_eq!(result(clone).to_le_bytes(), expected, "{name}");
    }
    // No place for a third one: its name is free again. Then there are no names.
    assert_eq!(run(order::FORK, 0), call::FAILED);
    assert_eq!(*namer.forgotten.lock().expect("nobody panics"), ["third"]);
    assert_eq!(run(order::FORK, 0), call::FAILED);
    assert_eq!((colony.vms().len(), run(order::NOTHING, 0)), (3, 0));
}

/// Those that can be had are; where there are to be all or none, there is none.
#[test]
fn clones_that_cannot_be_had_are_told() {
    if !can_run("clones_that_cannot_be_had_are_told", GuestKind::Thread) {
        return;
    }
    let colony = small_colony(GuestKind::Thread, 4);
    let root = colony.boot("").expect("a first VM");
    colony.settle();
    let error = colony.fork(root, 5).expect_err("there are places for 3");
    assert!(matches!(error, ColonyError::Members(4)), "{error}");
    colony.settle();
    assert_eq!(colony.vms(), [root]);
    let forked = colony.fork_as(root, &ForkSpec::each((0..5).map(wanted).collect())).expect("three");
    let positions: Vec<_> = forked.clones.iter().map(|clone| clone.position).collect();
    let missing: Vec<_> = forked.missing.iter().map(|missing| missing.position).collect();
    assert_eq!((positions, missing), (vec![0, 1, 2], vec![3, 4]));
    assert!(forked.missing.iter().all(|missing| matches!(missing.error, ColonyError::Members(4))));
    let error = colony.fork_as(root, &ForkSpec::each(vec![wanted(5)])).expect_err("all places are taken");
    assert!(matches!(error, ColonyError::Members(4)), "{error}");
    colony.end(forked.clones[1].vm).expect("it is there");
    colony.settle();
    let again = colony.fork_as(root, &ForkSpec::each(vec![wanted(6)])).expect("a place is free again");
    assert_eq!(again.clones[0].name, "worker-6");
    colony.check().expect("all adds up");
}

/// What a clone cannot be told is refused before anything is done.
#[test]
fn what_cannot_be_told_is_refused() {
    if !can_run("what_cannot_be_told_is_refused", GuestKind::Thread) {
        return;
    }
    let colony = small_colony(GuestKind::Thread, 4);
    let root = colony.boot_as(Some("first"), "").expect("a first VM");
    assert_eq!(
        colony.member(root).expect("it is there").identity().map(|who| who.name.as_str()),
        Some("first")
    );
    let long = CloneSpec { data: data(&[("k", &"v".repeat(DATA_BYTES))]), ..CloneSpec::default() };
    let error = colony.fork_as(root, &ForkSpec::each(vec![wanted(0), long])).expect_err("too long");
    assert!(matches!(error, ColonyError::Identity(IdentityError::Data { .. })), "{error}");
    assert_eq!(colony.vms(), [root]);
    assert_eq!(colony.structure_counts().0, 0, "no cut was taken");
    let error = colony.boot_as(Some(""), "").expect_err("no name at all");
    assert!(matches!(error, ColonyError::Identity(IdentityError::Name(_))), "{error}");
}

/// Several members are made at the same time, and each becomes one clone.
#[test]
fn processes_are_made_at_the_same_time() {
    if !can_run("processes_are_made_at_the_same_time", GuestKind::Thread) {
        return;
    }
    let colony = small_colony(GuestKind::Thread, 16);
    let root = colony.boot("").expect("a first VM");
    let spec = ForkSpec { at_once: std::num::NonZero::new(4).expect("not 0"), ..ForkSpec::plain(12) };
    let forked = colony.fork_as(root, &spec).expect("twelve");
    let vms: BTreeSet<_> = forked.clones.iter().map(|clone| clone.vm).collect();
    let processes: BTreeSet<_> =
        vms.iter().map(|vm| colony.member(*vm).expect("it is there").process()).collect();
    assert_eq!((vms.len(), processes.len()), (12, 12));
    colony.check().expect("all adds up");
}
