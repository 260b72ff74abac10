//! A naive model is the judge: the same random operations on a nursery and on plain arrays that are
//! copied as a whole at each fork.
//!
//! A run is the same each time. `SALP_MODEL_SEED=N` chooses other operations, `SALP_MODEL_CASES=N` how
//! many scripts of them. What fails is shrunk to a short script, which is printed with its seed.

use std::sync::Arc;

use proptest::prelude::{Just, Strategy, prop, prop_oneof};
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};

use super::devices::{Device, Engine};
use super::nursery::{Axes, Nursery, Vm};
use super::reclaim;
use crate::space::{Keep, PageCounts};
use crate::words::{Gfn, LEAF_PAGES, LeafNumber, index, wide};

const LEAVES: u32 = 4;
const VM_LIMIT: usize = 6;
/// Devices of a VM at one time.
const DEVICE_LIMIT: usize = 4;
/// Few enough pages that operations meet, at places that differ.
const POSITIONS: [usize; 8] = [0, 1, 2, 3, 40, 41, 300, 511];

/// One thing that happens. VMs and pages are picked modulo how many there are.
#[derive(Clone, Debug)]
enum Op {
    Write { vm: usize, page: usize },
    WriteLeaf { vm: usize, leaf: u32 },
    Compare { vm: usize, page: usize },
    Pin { vm: usize, page: usize, is_kernel: bool },
    Unpin { vm: usize },
    DeviceWrite { vm: usize },
    Discard { vm: usize, page: usize },
    DiscardLeaf { vm: usize, leaf: u32 },
    PageOut { vm: usize, leaf: u32 },
    Collapse { vm: usize, leaf: u32 },
    Fork { vm: usize },
    CloneAgain { vm: usize },
    Force { vm: usize, leaf: u32, keep: Keep },
    Publish { vm: usize, keep: Keep },
    Reset { vm: usize },
    Exit { vm: usize },
    PublishAndKill { vm: usize },
    GiveUpACut { vm: usize },
    Settle,
    CompareAll,
}

fn operation() -> impl Strategy<Value = Op> {
    let vm = || 0..8usize;
    let page = || 0..POSITIONS.len() * LEAVES as usize;
    let leaf = || 0..LEAVES;
    let keep = || prop::sample::select(vec![Keep::Own, Keep::Shared]);
    prop_oneof![
        24 => (vm(), page()).prop_map(|(vm, page)| Op::Write { vm, page }),
        2 => (vm(), leaf()).prop_map(|(vm, leaf)| Op::WriteLeaf { vm, leaf }),
        18 => (vm(), page()).prop_map(|(vm, page)| Op::Compare { vm, page }),
        8 => (vm(), page(), prop::bool::ANY)
            .prop_map(|(vm, page, is_kernel)| Op::Pin { vm, page, is_kernel }),
        7 => vm().prop_map(|vm| Op::Unpin { vm }),
        8 => vm().prop_map(|vm| Op::DeviceWrite { vm }),
        3 => (vm(), page()).prop_map(|(vm, page)| Op::Discard { vm, page }),
        2 => (vm(), leaf()).prop_map(|(vm, leaf)| Op::DiscardLeaf { vm, leaf }),
        3 => (vm(), leaf()).prop_map(|(vm, leaf)| Op::PageOut { vm, leaf }),
        2 => (vm(), leaf()).prop_map(|(vm, leaf)| Op::Collapse { vm, leaf }),
        8 => vm().prop_map(|vm| Op::Fork { vm }),
        3 => vm().prop_map(|vm| Op::CloneAgain { vm }),
        4 => (vm(), leaf(), keep()).prop_map(|(vm, leaf, keep)| Op::Force { vm, leaf, keep }),
        4 => (vm(), keep()).prop_map(|(vm, keep)| Op::Publish { vm, keep }),
        4 => vm().prop_map(|vm| Op::Reset { vm }),
        4 => vm().prop_map(|vm| Op::Exit { vm }),
        1 => vm().prop_map(|vm| Op::PublishAndKill { vm }),
        3 => vm().prop_map(|vm| Op::GiveUpACut { vm }),
        2 => Just(Op::Settle),
        2 => Just(Op::CompareAll),
    ]
}

fn gfn(page: usize) -> Gfn {
    let leaf = LeafNumber(u32::try_from(page / POSITIONS.len()).expect("few"));
    leaf.gfn(POSITIONS[page % POSITIONS.len()])
}

/// A VM, what its memory should hold, what it returns to, and the devices that hold pages of it.
struct Pair {
    vm: Arc<Vm>,
    pages: Vec<u64>,
    origin: Option<Vec<u64>>,
    devices: Vec<(Gfn, Device)>,
}

struct Game {
    nursery: Nursery,
    pairs: Vec<Pair>,
    next_value: u64,
}

impl Game {
    fn begin(mut nursery: Nursery) -> Self {
        let vm = nursery.first_vm();
        let mut pages = vec![0; LEAVES as usize * LEAF_PAGES];
        for (gfn, page) in (0..).map(Gfn).zip(&mut pages[..LEAF_PAGES + 30]) {
            *page = 0xf000 + gfn.0;
            vm.set(gfn, *page);
        }
        Self { nursery, pairs: vec![Pair { vm, pages, origin: None, devices: Vec::new() }], next_value: 0 }
    }

    fn value(&mut self) -> u64 {
        self.next_value += 1;
        self.next_value
    }

    fn write(&mut self, who: usize, gfn: Gfn) {
        let value = self.value();
        self.pairs[who].vm.set(gfn, value);
        self.pairs[who].pages[index(gfn.0)] = value;
    }

    fn compare(&self, who: usize, gfn: Gfn) {
        let pair = &self.pairs[who];
        let (found, expected) = (pair.vm.get(gfn), pair.pages[index(gfn.0)]);
        assert!(found == expected, "{} has {found:#x} at {gfn}, not {expected:#x}", pair.vm.id);
    }

    fn pin(&mut self, who: usize, gfn: Gfn, is_kernel: bool) {
        let engine = if is_kernel { Engine::Kernel } else { Engine::Thread };
        let pair = &mut self.pairs[who];
        if pair.devices.len() < DEVICE_LIMIT {
            pair.devices.push((gfn, Device::pin(&pair.vm, gfn, engine)));
        }
    }

    fn device_writes(&mut self, who: usize) {
        let value = self.value();
        let pair = &mut self.pairs[who];
        if let Some((gfn, device)) = pair.devices.first_mut() {
            device.write(value);
            pair.pages[index(gfn.0)] = value;
            assert_eq!(device.read(), value);
        }
    }

    fn discard(&mut self, who: usize, first: Gfn, pages: u64) {
        let pair = &mut self.pairs[who];
        let range = first.0..first.0 + pages;
        let is_pinned = pair.devices.iter().any(|(gfn, _)| range.contains(&gfn.0));
        let result = pair.vm.space.discard(first, pages);
        assert_eq!(result.is_err(), is_pinned, "{result:?}");
        if !is_pinned {
            range.for_each(|page| pair.pages[index(page)] = 0);
        }
    }

    /// Takes a cut, and makes one clone of it, or two, of which one cannot be reset.
    fn fork(&mut self, who: usize, clones: usize) {
        let (source, pages) = (Arc::clone(&self.pairs[who].vm), self.pairs[who].pages.clone());
        if self.pairs.len() < VM_LIMIT {
            let (cut, _) = self.nursery.cut(&source);
            for number in 0..clones.min(VM_LIMIT - self.pairs.len()) {
                let is_resettable = number == 0;
                let vm = match is_resettable {
                    true => self.nursery.resettable_clone_of(cut),
                    false => self.nursery.clone_of(cut),
                };
                let origin = is_resettable.then(|| pages.clone());
                self.pairs.push(Pair { vm, pages: pages.clone(), origin, devices: Vec::new() });
            }
        }
    }

    fn reset(&mut self, who: usize) {
        let pair = &mut self.pairs[who];
        let Some(origin) = &pair.origin else { return };
        if pair.devices.is_empty() {
            self.nursery.reset(&pair.vm);
            pair.pages.clone_from(origin);
        } else {
            assert!(pair.vm.space.reset().is_err(), "{} was reset under a device", pair.vm.id);
        }
    }

    fn exit(&mut self, who: usize, is_killed: bool) {
        if self.pairs.len() > 1 {
            let Pair { vm, devices, .. } = self.pairs.swap_remove(who);
            drop(devices);
            if is_killed {
                // It takes along only what it has not published.
                vm.publish_all(Keep::Own);
                self.nursery.kill(vm);
                self.nursery.settle();
            } else {
                self.nursery.exit(vm);
            }
        }
    }

    fn compare_all(&mut self) {
        for who in 0..self.pairs.len() {
            for leaf in (0..LEAVES).map(LeafNumber) {
                for position in [0, 1, 2, 3, 4, 40, 41, 42, 300, 510, 511] {
                    self.compare(who, leaf.gfn(position));
                }
            }
        }
        self.nursery.check();
        self.pairs.iter().for_each(check_counts);
    }

    fn step(&mut self, op: &Op) {
        let who = |vm: usize| vm % self.pairs.len();
        match *op {
            Op::Write { vm, page } => self.write(who(vm), gfn(page)),
            Op::WriteLeaf { vm, leaf } => {
                let who = who(vm);
                (0..LEAF_PAGES).for_each(|position| self.write(who, LeafNumber(leaf).gfn(position)));
            }
            Op::Compare { vm, page } => self.compare(who(vm), gfn(page)),
            Op::Pin { vm, page, is_kernel } => self.pin(who(vm), gfn(page), is_kernel),
            Op::Unpin { vm } => {
                let who = who(vm);
                drop(self.pairs[who].devices.pop());
            }
            Op::DeviceWrite { vm } => self.device_writes(who(vm)),
            Op::Discard { vm, page } => self.discard(who(vm), gfn(page), 1),
            Op::DiscardLeaf { vm, leaf } => {
                self.discard(who(vm), LeafNumber(leaf).first_gfn(), wide(LEAF_PAGES));
            }
            Op::PageOut { vm, leaf } => {
                reclaim::page_out(&self.pairs[who(vm)].vm, LeafNumber(leaf));
            }
            Op::Collapse { vm, leaf } => {
                reclaim::collapse(&self.pairs[who(vm)].vm, LeafNumber(leaf));
            }
            Op::Fork { vm } => self.fork(who(vm), 1),
            Op::CloneAgain { vm } => self.fork(who(vm), 2),
            Op::Force { vm, leaf, keep } => {
                let space = &self.pairs[who(vm)].vm.space;
                space.force(LeafNumber(leaf), keep).expect("a force");
            }
            Op::Publish { vm, keep } => self.pairs[who(vm)].vm.publish_all(keep),
            Op::Reset { vm } => self.reset(who(vm)),
            Op::Exit { vm } => self.exit(who(vm), false),
            Op::PublishAndKill { vm } => self.exit(who(vm), true),
            Op::GiveUpACut { vm } => {
                let vm = Arc::clone(&self.pairs[who(vm)].vm);
                self.nursery.give_up_a_cut(&vm);
            }
            Op::Settle => self.nursery.settle(),
            Op::CompareAll => self.compare_all(),
        }
    }
}

/// The sums of a VM's pages are its memory, and its pins are the devices that it has.
fn check_counts(pair: &Pair) {
    let report = pair.vm.space.harvest().expect("a harvest");
    let PageCounts { zero, exclusive, lent, shared, pinned, poisoned } = report.counts;
    assert_eq!(zero + exclusive + lent + shared + poisoned, wide(pair.pages.len()), "{}", pair.vm.id);
    let mut pages: Vec<Gfn> = pair.devices.iter().map(|(gfn, _)| *gfn).collect();
    assert_eq!((report.pins, poisoned), (wide(pages.len()), 0), "{}", pair.vm.id);
    pages.sort_unstable();
    pages.dedup();
    assert_eq!(pinned, wide(pages.len()), "{}", pair.vm.id);
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// False: the host cannot.
fn play(axes: Axes, script: &[Op]) -> bool {
    let Some(nursery) = Nursery::new("random_operations", axes, LEAVES) else { return false };
    let mut game = Game::begin(nursery);
    script.iter().for_each(|op| game.step(op));
    game.compare_all();
    true
}

#[test]
fn random_operations_equal_a_naive_model() {
    let seed = number("SALP_MODEL_SEED").unwrap_or(0);
    let cases = number("SALP_MODEL_CASES").map_or(4, |cases| u32::try_from(cases).expect("below 2^32"));
    for axes in Axes::ALL {
        let config = Config { cases, failure_persistence: None, max_shrink_iters: 1000, ..Config::default() };
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
        let scripts = prop::collection::vec(operation(), 200..=200);
        match runner.run(&scripts, |script| {
            play(axes, &script);
            Ok(())
        }) {
            Ok(()) => println!("{cases} scripts of seed {seed}, {axes:?}"),
            Err(TestError::Fail(reason, script)) => {
                let script: Vec<_> = script.iter().map(|op| format!("  {op:?}\n")).collect();
                panic!("SALP_MODEL_SEED={seed} {axes:?}: {reason}\n{}", script.concat());
            }
            Err(error) => panic!("{error}"),
        }
    }
}
