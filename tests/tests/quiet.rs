//! After a fork, when all is published: nothing is registered with userfaultfd, no thread uses the
//! processor, and a clone reads its memory with a few faults a block.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use salp::arena_files::ArenaKind;
use salp::family::VmId;
use salp::keeper::{Colony, ColonyConfig};
use salp::kvm::Kvm;
use salp::member::messages::{Description, GuestKind, Order, PuppetOrder, Reply};
use salp::space::SpaceReport;
use salp::words::MemoryShape;
use salp_protocol::{layout, order};
use salp_tests::procs::{entries, salp_binary, settled};

const MEMORY_BYTES: u64 = 128 << 20;
const LEAVES: u64 = MEMORY_BYTES >> 21;
const PAGE: u64 = 4096;
const LIMIT: Duration = Duration::from_secs(60);
/// How long nothing may happen.
const IDLE: Duration = Duration::from_secs(2);

/// The tests look at processors and at counters of the host: one after the other.
static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn colony(test: &str) -> Option<Colony> {
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/userfaultfd").exists() {
        println!("SKIPPED: {test}: needs root and /dev/userfaultfd");
        return None;
    }
    let mut config = ColonyConfig::new(MemoryShape::new(MEMORY_BYTES).expect("whole leaves"));
    config.program = Some(salp_binary());
    if let Err(error) = Kvm::open() {
        println!("SKIPPED in part: {error}: the guests of {test} are threads");
        config.guest = GuestKind::Thread;
    }
    Some(Colony::new(config).expect("a colony"))
}

/// The result of an order. A clone's first result may be its source's last, said again: that is taken
/// by [`fork`].
fn ask(colony: &Colony, vm: VmId, order: PuppetOrder) -> u64 {
    let member = colony.member(vm).expect("it lives");
    member.ask(Order::Puppet { vcpu: 0, order }, &[]).expect("it is taken");
    await_result(colony, vm)
}

fn await_result(colony: &Colony, vm: VmId) -> u64 {
    let member = colony.member(vm).expect("it lives");
    let result = member.wait_for(LIMIT, |state| {
        let result = (!state.puppet_results.is_empty()).then(|| state.puppet_results.remove(0).1);
        result.map(Ok).or_else(|| state.ended.clone().map(Err))
    });
    result.expect("it answers").expect("the guest runs on")
}

/// A VM that has written all its free memory, and a clone of it, everything published.
fn family(colony: &Colony) -> (VmId, VmId) {
    let root = colony.boot("case=puppet").expect("a vm");
    let pages = (MEMORY_BYTES - layout::FREE) / PAGE;
    let fill = PuppetOrder { order: order::STORE_STRIDE, a: layout::FREE, b: 3, c: pages, d: PAGE };
    assert_eq!(ask(colony, root, fill), 0);
    let clone = colony.fork(root, 1).expect("a fork").clones[0].vm;
    if colony.config().guest == GuestKind::Kvm {
        await_result(colony, clone);
    }
    let lent = settled(LIMIT, || report(colony, root).counts.lent, |lent| *lent == 0);
    assert_eq!(lent, 0, "publication does not end");
    colony.settle();
    (root, clone)
}

/// The clone reads every page.
fn read_all(colony: &Colony, clone: VmId) {
    let pages = (MEMORY_BYTES - layout::FREE) / PAGE;
    let sum =
        PuppetOrder { order: order::SUM_STRIDE, a: layout::FREE, c: pages, d: PAGE, ..Default::default() };
    assert_eq!(ask(colony, clone, sum), 3 * pages);
    // Its image and stacks. What is below is the loader's, and some of that is not mapped for it.
    let pages = (layout::FREE - layout::IMAGE) / PAGE;
    let rest =
        PuppetOrder { order: order::SUM_STRIDE, a: layout::IMAGE, c: pages, d: PAGE, ..Default::default() };
    ask(colony, clone, rest);
}

fn report(colony: &Colony, vm: VmId) -> SpaceReport {
    match colony.ask(vm, Order::Harvest).expect("it lives") {
        Reply::Harvest(report) => *report,
        other => panic!("{other:?}"),
    }
}

/// What a VM says while its vCPU is stopped, so that KVM's counters are there.
fn describe(colony: &Colony, vm: VmId) -> Description {
    colony.ask(vm, Order::Quiesce).expect("it stops");
    let described = colony.ask(vm, Order::Describe).expect("it lives");
    colony.ask(vm, Order::Resume).expect("it goes on");
    match described {
        Reply::Describe(description) => *description,
        other => panic!("{other:?}"),
    }
}

/// The mappings of a process that are registered with a userfaultfd: proc(5), `VmFlags`.
fn registered(pid: u32) -> Vec<String> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("a child of ours");
    let mut found = Vec::new();
    let mut mapping = "";
    for line in smaps.lines() {
        match line.strip_prefix("VmFlags:") {
            Some(flags) if flags.split_whitespace().any(|flag| ["um", "uw", "ui"].contains(&flag)) => {
                found.push(mapping.to_owned());
            }
            Some(_) => {}
            // A mapping begins with its addresses, in hexadecimal digits of small letters.
            None if line.starts_with(|c: char| c.is_ascii_digit() || c.is_ascii_lowercase()) => {
                mapping = line
            }
            None => {}
        }
    }
    found
}

/// How often each thread of a process has given up the processor or was made to, by name and number.
/// Without KVM's own thread, which the kernel runs when it likes.
fn switches(process: &str) -> BTreeMap<String, u64> {
    let mut found = BTreeMap::new();
    for task in entries(&format!("/proc/{process}/task")) {
        let status = fs::read_to_string(format!("/proc/{process}/task/{task}/status")).unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("").trim();
        let count = |name| field(name).parse::<u64>().unwrap_or(0);
        let name = field("Name:").to_owned();
        if !name.starts_with("kvm-") {
            let sum = count("voluntary_ctxt_switches:") + count("nonvoluntary_ctxt_switches:");
            found.insert(format!("{name} {task} of {process}"), sum);
        }
    }
    found
}

/// The threads of the keeper, which this process is, and of the members.
fn all_switches(colony: &Colony, vms: &[VmId]) -> BTreeMap<String, u64> {
    let is_keepers = |name: &String| ["steward", "listener"].iter().any(|known| name.starts_with(known));
    let mut found: BTreeMap<_, _> =
        switches("self").into_iter().filter(|(name, _)| is_keepers(name)).collect();
    assert_eq!(found.len(), 2, "the keeper has a steward and one who hears all members: {found:?}");
    for vm in vms {
        let process = colony.member(*vm).expect("it lives").process();
        found.extend(switches(&process.to_string()));
    }
    found
}

#[test]
fn when_all_is_published_nothing_is_registered_and_nobody_is_busy() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some(colony) = colony("when_all_is_published_nothing_is_registered_and_nobody_is_busy") else {
        return;
    };
    let (root, clone) = family(&colony);
    colony.warm().expect("the pool is full");
    let process = |vm| colony.member(vm).expect("it lives").process();
    assert_eq!(registered(process(root)), Vec::<String>::new(), "of the source");
    // It maps the rest in the background, without having touched it.
    let left = settled(LIMIT, || registered(process(clone)), Vec::is_empty);
    assert_eq!(left, Vec::<String>::new(), "of the clone, before it reads");
    read_all(&colony, clone);
    assert_eq!(registered(process(clone)), Vec::<String>::new(), "of the clone");
    // What has to be done is done at once; then two looks with nothing between them.
    let quiet = settled(
        LIMIT,
        || {
            let before = all_switches(&colony, &[root, clone]);
            std::thread::sleep(IDLE);
            let after = all_switches(&colony, &[root, clone]);
            let busy = |(name, count): (&String, &u64)| {
                (before.get(name) != Some(count))
                    .then(|| format!("{name}: {:?} -> {count}", before.get(name)))
            };
            after.iter().filter_map(busy).collect::<Vec<_>>()
        },
        Vec::is_empty,
    );
    assert!(quiet.is_empty(), "threads are busy: {quiet:?}");
    colony.check().expect("all adds up");
}

#[test]
fn a_clone_reads_published_memory_with_few_faults() {
    const TEST: &str = "a_clone_reads_published_memory_with_few_faults";
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some(colony) = colony(TEST) else { return };
    if colony.arena_kind() != ArenaKind::HugeTmpfs {
        println!("SKIPPED: {TEST}: this host allows no huge pages in a tmpfs");
        return;
    }
    let (_root, clone) = family(&colony);
    let process = colony.member(clone).expect("it lives").process();
    settled(LIMIT, || registered(process), Vec::is_empty);
    let before = describe(&colony, clone);
    read_all(&colony, clone);
    let after = describe(&colony, clone);
    let faults = after.minor_faults - before.minor_faults;
    println!("{faults} faults of the process for {LEAVES} leaves, {} resolved", after.leaves_resolved);
    assert!(faults <= 4 * LEAVES, "{faults} faults for {LEAVES} leaves");
    match (before.kvm.get("pf_taken"), after.kvm.get("pf_taken")) {
        (Some(before), Some(after)) => {
            let faults = after - before;
            println!("{faults} faults of the guest");
            // The first block is mapped for the guest by pages of 4 KiB.
            assert!(faults <= 4 * (LEAVES - 1) + 512, "{faults} faults of the guest for {LEAVES} leaves");
        }
        _ => println!("SKIPPED in part: no vcpu, or a KVM that does not count"),
    }
}
