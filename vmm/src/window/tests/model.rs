//! A naive model is the judge: the same random operations on a nursery and on plain arrays that are
//! copied as a whole at each fork. Seeds reproduce.

use std::sync::Arc;

use super::devices::{Device, Engine};
use super::nursery::{Axes, Nursery, Vm};
use crate::space::Keep;
use crate::words::{Gfn, LEAF_PAGES, LeafNumber, index, wide};

const LEAVES: u64 = 4;
const VM_LIMIT: usize = 6;

/// A VM, what its memory should hold, and the devices that hold pages of it.
struct Pair {
    vm: Arc<Vm>,
    pages: Vec<u64>,
    devices: Vec<(Gfn, Device)>,
}

struct Game {
    nursery: Nursery,
    pairs: Vec<Pair>,
    random: u64,
    next_value: u64,
    log: Vec<String>,
}

impl Game {
    /// xorshift64*.
    fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }

    /// Few enough pages that operations meet, at places that differ.
    fn page(&mut self) -> Gfn {
        let leaf = self.below(LEAVES);
        let position = [0, 1, 2, 3, 40, 41, 300, 511][index(self.below(8))];
        Gfn(leaf * wide(LEAF_PAGES) + position)
    }

    fn value(&mut self) -> u64 {
        self.next_value += 1;
        self.next_value
    }

    fn note(&mut self, what: String) {
        self.log.push(what);
    }

    fn step(&mut self) {
        let who = index(self.below(wide(self.pairs.len())));
        let gfn = self.page();
        match self.below(100) {
            0..25 => self.write(who, gfn),
            25..45 => self.compare(who, gfn),
            45..53 => self.pin(who, gfn),
            53..60 => self.unpin(who),
            60..68 => self.device_writes(who),
            68..72 => self.discard(who, gfn),
            72..80 => self.fork(who),
            80..84 => self.force(who, gfn.leaf()),
            84..88 => self.publish(who),
            88..93 => self.exit(who),
            93..96 => self.give_up_a_cut(who),
            96..98 => self.nursery.settle(),
            _ => self.compare_all(),
        }
    }

    fn write(&mut self, who: usize, gfn: Gfn) {
        let value = self.value();
        self.note(format!("{} writes {value:#x} to {gfn}", self.pairs[who].vm.id));
        self.pairs[who].vm.set(gfn, value);
        self.pairs[who].pages[index(gfn.0)] = value;
    }

    fn compare(&mut self, who: usize, gfn: Gfn) {
        let pair = &self.pairs[who];
        let (found, expected) = (pair.vm.get(gfn), pair.pages[index(gfn.0)]);
        if found != expected {
            println!("{}", self.log.join("\n"));
            panic!("{} has {found:#x} at {gfn}, not {expected:#x}", pair.vm.id);
        }
    }

    fn pin(&mut self, who: usize, gfn: Gfn) {
        self.note(format!("{} pins {gfn}", self.pairs[who].vm.id));
        let engine = if self.below(2) == 0 { Engine::Kernel } else { Engine::Thread };
        let pair = &mut self.pairs[who];
        if pair.devices.len() < 4 {
            pair.devices.push((gfn, Device::pin(&pair.vm, gfn, engine)));
        }
    }

    fn unpin(&mut self, who: usize) {
        if let Some((gfn, _)) = self.pairs[who].devices.pop() {
            self.note(format!("{} unpins {gfn}", self.pairs[who].vm.id));
        }
    }

    fn device_writes(&mut self, who: usize) {
        let value = self.value();
        let pair = &mut self.pairs[who];
        if let Some((gfn, device)) = pair.devices.first_mut() {
            device.write(value);
            pair.pages[index(gfn.0)] = value;
            assert_eq!(device.read(), value);
            let line = format!("the device of {} writes {value:#x} to {gfn}", pair.vm.id);
            self.note(line);
        }
    }

    fn discard(&mut self, who: usize, gfn: Gfn) {
        let is_whole = self.below(2) == 0;
        let (first, pages) = if is_whole { (gfn.leaf().first_gfn(), wide(LEAF_PAGES)) } else { (gfn, 1) };
        self.note(format!("{} discards {pages} from {first}", self.pairs[who].vm.id));
        let pair = &mut self.pairs[who];
        let range = first.0..first.0 + pages;
        let is_pinned = pair.devices.iter().any(|(gfn, _)| range.contains(&gfn.0));
        let result = pair.vm.space.discard(first, pages);
        assert_eq!(result.is_err(), is_pinned, "{result:?}");
        if !is_pinned {
            range.for_each(|page| pair.pages[index(page)] = 0);
        }
    }

    fn fork(&mut self, who: usize) {
        if self.pairs.len() == VM_LIMIT {
            return;
        }
        let (source, pages) = (Arc::clone(&self.pairs[who].vm), self.pairs[who].pages.clone());
        let vm = self.nursery.fork(&source);
        self.note(format!("{} forks {}", source.id, vm.id));
        self.pairs.push(Pair { vm, pages, devices: Vec::new() });
    }

    fn keep(&mut self) -> Keep {
        if self.below(2) == 0 { Keep::Own } else { Keep::Shared }
    }

    fn force(&mut self, who: usize, leaf: LeafNumber) {
        let keep = self.keep();
        self.note(format!("{} forces {leaf} {keep:?}", self.pairs[who].vm.id));
        self.pairs[who].vm.space.force(leaf, keep).expect("a force");
    }

    fn publish(&mut self, who: usize) {
        let keep = self.keep();
        self.note(format!("{} publishes all {keep:?}", self.pairs[who].vm.id));
        self.pairs[who].vm.publish_all(keep);
    }

    fn exit(&mut self, who: usize) {
        if self.pairs.len() > 1 {
            let Pair { vm, devices, .. } = self.pairs.swap_remove(who);
            self.note(format!("{} exits", vm.id));
            drop(devices);
            self.nursery.exit(vm);
        }
    }

    fn give_up_a_cut(&mut self, who: usize) {
        self.note(format!("{} gives a cut up", self.pairs[who].vm.id));
        let vm = Arc::clone(&self.pairs[who].vm);
        self.nursery.give_up_a_cut(&vm);
    }

    fn compare_all(&mut self) {
        self.note("all is compared".to_owned());
        for who in 0..self.pairs.len() {
            for leaf in 0..LEAVES {
                for position in [0, 1, 2, 3, 4, 40, 41, 42, 300, 510, 511] {
                    self.compare(who, Gfn(leaf * wide(LEAF_PAGES) + position));
                }
            }
        }
        let log = self.log.clone();
        let report = Report(log);
        self.nursery.check();
        std::mem::forget(report);
    }
}

/// Prints the history if the checker panics.
struct Report(Vec<String>);

impl Drop for Report {
    fn drop(&mut self) {
        println!("{}", self.0.join("\n"));
    }
}

fn play(axes: Axes, seed: u64, steps: usize) -> bool {
    let leaves = u32::try_from(LEAVES).expect("few");
    let Some(mut nursery) = Nursery::new("model", axes, leaves) else { return false };
    let vm = nursery.first_vm();
    let mut pages = vec![0; index(LEAVES) * LEAF_PAGES];
    for (gfn, page) in (0..).map(Gfn).zip(&mut pages[..LEAF_PAGES + 30]) {
        *page = 0xf000 + gfn.0;
        vm.set(gfn, *page);
    }
    let pairs = vec![Pair { vm, pages, devices: Vec::new() }];
    let log = vec![format!("seed {seed} {axes:?}")];
    let mut game =
        Game { nursery, pairs, random: (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15), next_value: 0, log };
    for _ in 0..steps {
        game.step();
    }
    game.compare_all();
    true
}

#[test]
fn random_operations_equal_a_naive_model() {
    let seeds = std::env::var("SALP_MODEL_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(6);
    for seed in 0..seeds {
        for axes in Axes::ALL {
            if !play(axes, seed, 200) {
                return;
            }
        }
    }
}
