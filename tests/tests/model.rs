//! Random operations on a colony of real processes, judged by a model that simply copies.
//!
//! A script names VMs and pages by numbers that are taken modulo what there is. Every byte that a guest
//! or a device reads is compared; the checker runs in between and at the end, and nothing may be left.
//! What fails is shrunk to a short script, which is printed with its seed: `SALP_MODEL_SEED=N` chooses
//! other scripts, `SALP_MODEL_CASES=N` how many.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use proptest::prelude::{Just, Strategy, prop, prop_oneof};
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};
use salp::family::VmId;
use salp::member::messages::{GuestKind, Order, Publication};
use salp::space::Keep;
use salp::words::{Gfn, LEAF_PAGES, LeafNumber, wide};
use salp_tests::both_guests;
use salp_tests::dma::{Engine, Transfer};
use salp_tests::row::{FULL, OLD, write_memory};
use salp_tests::world::{Setup, World};

both_guests! {
    a_colony_of_processes_is_what_deep_copies_are;
    a_wrong_byte_is_convicted;
}

/// The leaves that operations go to, from [`FULL`] on: full, sparse, and untouched.
const LEAVES: u64 = 3;
/// The pages that they prefer: few, so that they meet.
const POSITIONS: [usize; 8] = [0, 1, 2, 8, 63, 300, 510, 511];
/// VMs at one time.
const VMS: usize = 5;
/// The page of the DMA engine's ring.
const RING: Gfn = Gfn(600);
/// Blocks of the disk that transfers go to.
const BLOCKS: usize = 4;

/// One thing that happens. A fork without a number of clones is one clone of a VM that publishes
/// meanwhile.
#[derive(Clone, Debug)]
enum Op {
    Load { vm: usize, page: usize },
    Store { vm: usize, page: usize },
    StoreRun { vm: usize, page: usize, pages: u64 },
    Pin { vm: usize, page: usize },
    Unpin { vm: usize, pick: usize },
    DeviceStore { vm: usize, pick: usize },
    ToDisk { vm: usize, page: usize, block: usize },
    FromDisk { vm: usize, page: usize, block: usize },
    Discard { vm: usize, page: usize, pages: u64 },
    DiscardLeaf { vm: usize, leaf: u64 },
    Fork { vm: usize, clones: usize },
    ForkWhilePublishing { vm: usize, keep: Keep },
    Publish { vm: usize, keep: Keep },
    Reset { vm: usize },
    End { vm: usize },
    PublishAndKill { vm: usize },
    Check,
}

fn operation() -> impl Strategy<Value = Op> {
    let vm = || 0..8usize;
    let page = || 0..POSITIONS.len() * 3;
    let block = || 0..BLOCKS;
    let leaf = || 0..LEAVES;
    let keep = || prop::sample::select(vec![Keep::Own, Keep::Shared]);
    prop_oneof![
        6 => (vm(), page()).prop_map(|(vm, page)| Op::Load { vm, page }),
        14 => (vm(), page()).prop_map(|(vm, page)| Op::Store { vm, page }),
        4 => (vm(), page(), 2..24u64).prop_map(|(vm, page, pages)| Op::StoreRun { vm, page, pages }),
        4 => (vm(), page()).prop_map(|(vm, page)| Op::Pin { vm, page }),
        4 => (vm(), 0..8usize).prop_map(|(vm, pick)| Op::Unpin { vm, pick }),
        4 => (vm(), 0..8usize).prop_map(|(vm, pick)| Op::DeviceStore { vm, pick }),
        3 => (vm(), page(), block()).prop_map(|(vm, page, block)| Op::ToDisk { vm, page, block }),
        3 => (vm(), page(), block()).prop_map(|(vm, page, block)| Op::FromDisk { vm, page, block }),
        2 => (vm(), page(), 1..12u64).prop_map(|(vm, page, pages)| Op::Discard { vm, page, pages }),
        1 => (vm(), leaf()).prop_map(|(vm, leaf)| Op::DiscardLeaf { vm, leaf }),
        6 => (vm(), 1..3usize).prop_map(|(vm, clones)| Op::Fork { vm, clones }),
        3 => (vm(), keep()).prop_map(|(vm, keep)| Op::ForkWhilePublishing { vm, keep }),
        4 => (vm(), keep()).prop_map(|(vm, keep)| Op::Publish { vm, keep }),
        4 => vm().prop_map(|vm| Op::Reset { vm }),
        3 => vm().prop_map(|vm| Op::End { vm }),
        1 => vm().prop_map(|vm| Op::PublishAndKill { vm }),
        1 => Just(Op::Check),
    ]
}

/// A script, over a colony of one kind.
#[derive(Clone, Debug)]
struct Script {
    is_huge: bool,
    publication: Publication,
    ops: Vec<Op>,
}

fn script(ops: usize) -> impl Strategy<Value = Script> {
    let keep = || prop::sample::select(vec![Keep::Own, Keep::Shared]);
    let publication = (prop::bool::ANY, keep(), keep())
        .prop_map(|(in_background, keep, keep_later)| Publication { in_background, keep, keep_later });
    let ops = prop::collection::vec(operation(), ops..=ops);
    (prop::bool::ANY, publication, ops).prop_map(|(is_huge, publication, ops)| Script {
        is_huge,
        publication,
        ops,
    })
}

fn gfn(page: usize) -> Gfn {
    let leaf = u32::try_from(page / POSITIONS.len()).expect("few");
    LeafNumber(FULL.0 + leaf).gfn(POSITIONS[page % POSITIONS.len()])
}

/// What a VM should hold: the first word of each page, and of each block of its disk.
#[derive(Clone, Default)]
struct Content {
    memory: BTreeMap<Gfn, u64>,
    disk: BTreeMap<usize, u64>,
}

struct Model {
    now: Content,
    /// What a clone returns to, and the last result of its guest before that.
    origin: Option<(Content, u64)>,
    pins: Vec<Gfn>,
}

struct Game<'a> {
    world: &'a World,
    engine: Engine<'a>,
    vms: BTreeMap<VmId, Model>,
    next_value: u64,
}

impl<'a> Game<'a> {
    fn begin(world: &'a World) -> Self {
        let root = world.root();
        write_memory(world, root);
        let mut memory: BTreeMap<Gfn, u64> =
            (0..LEAF_PAGES).map(|position| (FULL.gfn(position), OLD)).collect();
        memory.insert(salp_tests::row::ALONE, OLD);
        let engine = Engine::set_up(world, root, RING);
        let now = Content { memory, disk: BTreeMap::new() };
        let model = Model { now, origin: None, pins: Vec::new() };
        Self { world, engine, vms: BTreeMap::from([(root, model)]), next_value: 0xa000 }
    }

    fn value(&mut self) -> u64 {
        self.next_value += 1;
        self.next_value
    }

    fn vm(&self, pick: usize) -> VmId {
        *self.vms.keys().nth(pick % self.vms.len()).expect("below the count")
    }

    fn model(&mut self, vm: VmId) -> &mut Model {
        self.vms.get_mut(&vm).expect("a VM of the model")
    }

    fn expected(&self, vm: VmId, gfn: Gfn) -> u64 {
        self.vms[&vm].now.memory.get(&gfn).copied().unwrap_or(0)
    }

    fn load(&mut self, vm: VmId, gfn: Gfn) {
        self.world.expect(vm, gfn.gpa(), self.expected(vm, gfn));
    }

    fn store(&mut self, vm: VmId, gfn: Gfn) {
        let value = self.value();
        self.world.store(vm, gfn.gpa(), value);
        self.model(vm).now.memory.insert(gfn, value);
    }

    fn store_run(&mut self, vm: VmId, first: Gfn, pages: u64) {
        let value = self.value();
        self.world.store_pages(vm, first, pages, value);
        let memory = &mut self.model(vm).now.memory;
        memory.extend((first.0..first.0 + pages).map(|number| (Gfn(number), value)));
    }

    fn device_store(&mut self, vm: VmId, pick: usize) {
        let pins = &self.vms[&vm].pins;
        let Some(gfn) = pins.get(pick % pins.len().max(1)).copied() else { return };
        assert_eq!(self.world.device_load(vm, gfn), self.expected(vm, gfn), "a device of {vm} reads {gfn}");
        let value = self.value();
        self.world.device_store(vm, gfn, value);
        self.model(vm).now.memory.insert(gfn, value);
    }

    fn transfer(&mut self, vm: VmId, gfn: Gfn, block: usize, is_to_disk: bool) {
        let at = wide(block) * 4096;
        if is_to_disk {
            self.engine.transfer(vm, &Transfer::write(gfn.gpa(), at, 4096));
            let value = self.expected(vm, gfn);
            self.model(vm).now.disk.insert(block, value);
        } else {
            self.engine.transfer(vm, &Transfer::read(at, gfn.gpa(), 4096));
            let value = self.vms[&vm].now.disk.get(&block).copied();
            match value {
                Some(value) => {
                    self.model(vm).now.memory.insert(gfn, value);
                }
                // What the disk holds at first is the engine's.
                None => self.store(vm, gfn),
            }
        }
    }

    fn discard(&mut self, vm: VmId, first: Gfn, pages: u64) {
        let range = first.0..first.0 + pages;
        let order = Order::Discard { first, pages };
        if self.vms[&vm].pins.iter().any(|gfn| range.contains(&gfn.0)) {
            self.world.refusal(vm, order);
        } else {
            self.world.tell(vm, order);
            self.model(vm).now.memory.retain(|gfn, _| !range.contains(&gfn.0));
        }
    }

    fn fork(&mut self, vm: VmId, clones: usize) {
        let clones = clones.min(VMS.saturating_sub(self.vms.len()));
        if clones == 0 {
            return;
        }
        // A clone's guest gives in its last result once more: one that is known.
        self.load(vm, FULL.gfn(0));
        let result = self.expected(vm, FULL.gfn(0));
        let now = self.vms[&vm].now.clone();
        for clone in self.world.fork_many(vm, clones).clones {
            let origin = Some((now.clone(), result));
            self.vms.insert(clone.vm, Model { now: now.clone(), origin, pins: Vec::new() });
        }
    }

    fn reset(&mut self, vm: VmId) {
        let model = &self.vms[&vm];
        let is_refused = model.origin.is_none() || !model.pins.is_empty();
        match (self.world.colony.reset(vm), is_refused) {
            (Ok(_), false) => {}
            (Err(_), true) => return,
            (result, _) => panic!("a reset of {vm}: {result:?}"),
        }
        let (content, result) = self.vms[&vm].origin.clone().expect("it is a clone");
        if self.world.guest() == GuestKind::Kvm {
            assert_eq!(self.world.result(vm, 0), result, "a register of {vm}");
        }
        self.model(vm).now = content;
    }

    fn end(&mut self, vm: VmId) {
        if self.vms.len() > 1 {
            self.vms.remove(&vm);
            self.world.end(vm);
        }
    }

    /// A killed process takes along only what it had not published.
    fn publish_and_kill(&mut self, vm: VmId) {
        if self.vms.len() > 1 {
            self.world.publish_all(vm, Keep::Own);
            self.vms.remove(&vm);
            let member = self.world.member(vm);
            self.world.colony.kill(vm).expect("it is there");
            let gone = member.wait_for(salp_tests::world::LIMIT, |state| state.is_gone.then_some(()));
            gone.expect("a killed process is gone");
            self.world.colony.settle();
        }
    }

    fn step(&mut self, op: &Op) {
        let run_of = |page: usize, pages: u64| (gfn(page), pages.min(wide(LEAF_PAGES - gfn(page).in_leaf())));
        match *op {
            Op::Load { vm, page } => self.load(self.vm(vm), gfn(page)),
            Op::Store { vm, page } => self.store(self.vm(vm), gfn(page)),
            Op::StoreRun { vm, page, pages } => {
                let (first, pages) = run_of(page, pages);
                self.store_run(self.vm(vm), first, pages);
            }
            Op::Pin { vm, page } => {
                let vm = self.vm(vm);
                self.world.pin(vm, gfn(page), 1);
                self.model(vm).pins.push(gfn(page));
            }
            Op::Unpin { vm, pick } => {
                let vm = self.vm(vm);
                let pins = &mut self.model(vm).pins;
                if !pins.is_empty() {
                    let gfn = pins.swap_remove(pick % pins.len());
                    self.world.unpin(vm, gfn, 1);
                }
            }
            Op::DeviceStore { vm, pick } => self.device_store(self.vm(vm), pick),
            Op::ToDisk { vm, page, block } => self.transfer(self.vm(vm), gfn(page), block, true),
            Op::FromDisk { vm, page, block } => self.transfer(self.vm(vm), gfn(page), block, false),
            Op::Discard { vm, page, pages } => {
                let (first, pages) = run_of(page, pages);
                self.discard(self.vm(vm), first, pages);
            }
            Op::DiscardLeaf { vm, leaf } => {
                let first = Gfn(FULL.first_gfn().0 + leaf * wide(LEAF_PAGES));
                self.discard(self.vm(vm), first, wide(LEAF_PAGES));
            }
            Op::Fork { vm, clones } => self.fork(self.vm(vm), clones),
            Op::ForkWhilePublishing { vm, keep } => {
                let vm = self.vm(vm);
                self.fork(vm, 1);
                self.world.tell(vm, Order::Publish { keep });
                self.fork(vm, 1);
            }
            Op::Publish { vm, keep } => self.world.publish_all(self.vm(vm), keep),
            Op::Reset { vm } => self.reset(self.vm(vm)),
            Op::End { vm } => self.end(self.vm(vm)),
            Op::PublishAndKill { vm } => self.publish_and_kill(self.vm(vm)),
            Op::Check => self.check(),
        }
    }

    /// The checker, and the pins that it counted.
    fn check(&mut self) {
        let checked = self.world.check();
        for (vm, counts) in checked.vms {
            let pins: std::collections::BTreeSet<_> = self.vms[&vm].pins.iter().collect();
            assert!(counts.pinned >= wide(pins.len()), "{vm}: {counts:?} and {pins:?}");
            assert_eq!(counts.poisoned, 0, "{vm} has lost pages");
        }
    }

    /// Every page that operations go to, and those beside, in every VM.
    fn compare_all(&mut self) {
        for vm in self.vms.keys().copied().collect::<Vec<_>>() {
            for leaf in 0..3 {
                for position in [0, 1, 2, 3, 8, 9, 63, 64, 300, 301, 509, 510, 511] {
                    self.load(vm, LeafNumber(FULL.0 + leaf).gfn(position));
                }
            }
        }
    }
}

/// Plays one script. False: the host cannot.
fn play(test: &str, guest: GuestKind, script: &Script, spoil: Option<usize>) -> bool {
    let setup = Setup { is_huge: script.is_huge, publication: script.publication, ..Setup::default() };
    let Some(world) = World::new(test, guest, &setup) else { return false };
    let mut game = Game::begin(&world);
    for (number, op) in script.ops.iter().enumerate() {
        game.step(op);
        if spoil == Some(number) {
            // A byte that the model knows nothing of.
            let vm = game.vm(number);
            world.store(vm, gfn(3).gpa(), 1);
        }
    }
    game.compare_all();
    for (vm, model) in game.vms {
        model.pins.iter().for_each(|gfn| world.unpin(vm, *gfn, 1));
    }
    world.finish();
    true
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

fn runner(cases: u32, seed: u64) -> TestRunner {
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 200, ..Config::default() };
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes))
}

fn a_colony_of_processes_is_what_deep_copies_are(test: &str, guest: GuestKind) {
    let seed = number("SALP_MODEL_SEED").unwrap_or(0);
    let cases = number("SALP_MODEL_CASES").map_or(4, |cases| u32::try_from(cases).expect("below 2^32"));
    let result = runner(cases, seed).run(&script(60), |script| {
        play(test, guest, &script, None);
        Ok(())
    });
    match result {
        Ok(()) => println!("{test}: {cases} scripts of seed {seed}"),
        Err(TestError::Fail(reason, Script { is_huge, publication, ops })) => {
            let ops: Vec<_> = ops.iter().map(|op| format!("  {op:?}\n")).collect();
            panic!(
                "SALP_MODEL_SEED={seed} SALP_MODEL_CASES={cases}: {reason}\n\
                 huge: {is_huge}, {publication:?}\n{}",
                ops.concat()
            );
        }
        Err(error) => panic!("{error}"),
    }
}

/// The judge must be able to convict, and to say by which operation.
fn a_wrong_byte_is_convicted(test: &str, guest: GuestKind) {
    let quiet = Script {
        is_huge: true,
        publication: Publication { in_background: false, keep: Keep::Own, keep_later: Keep::Own },
        ops: vec![Op::Fork { vm: 0, clones: 1 }, Op::Store { vm: 0, page: 3 }],
    };
    if !play(test, guest, &quiet, None) {
        return;
    }
    let spoiled = catch_unwind(AssertUnwindSafe(|| play(test, guest, &quiet, Some(1))));
    assert!(spoiled.is_err(), "a wrong byte went unseen");
}
