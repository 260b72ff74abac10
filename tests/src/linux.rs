//! Linux guests: the kernels and initramfs's that `make linux-guest` has made, what their consoles say and
//! when, and the lines of the program `resources/linux/witness.c`.
//!
//! Key types: [`LinuxGuest`], a colony with what it boots; [`Consoles`], everything that its VMs have
//! written, each line with the host's clocks at its arrival; [`Step`], a line of the witness.

use std::collections::BTreeMap;
use std::env;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use salp::family::VmId;
use salp::keeper::fork::Forked;
use salp::keeper::observe::Observer;
use salp::keeper::{Colony, ColonyConfig};
use salp::kvm::Irqchip;
use salp::member::messages::{GuestKind, HowEnded};
use salp::words::MemoryShape;

use crate::procs::salp_binary;
use crate::world::can_run;

/// How long anything may take: a Linux on software KVM boots in seconds, on a busy machine in minutes.
pub const LIMIT: Duration = Duration::from_secs(300);

/// A whole line that a VM has written to its console.
#[derive(Clone, Debug)]
pub struct HostLine {
    /// The line, without its end.
    pub text: String,
    /// The host's `CLOCK_MONOTONIC` when the line's end arrived, in nanoseconds.
    pub mono_ns: u64,
    /// The host's `CLOCK_REALTIME` then, in nanoseconds.
    pub real_ns: u64,
}

/// What one VM has said.
#[derive(Clone, Debug, Default)]
pub struct Said {
    /// Whole lines.
    pub lines: Vec<HostLine>,
    /// What came after the last of them.
    pub rest: String,
    /// How its guest's run or its process ended, if one did.
    pub ended: Option<String>,
}

impl Said {
    /// The witness's lines. A clone's first line may be the rest of one that its source had begun: that is
    /// none.
    #[must_use]
    pub fn steps(&self) -> Vec<Step> {
        self.lines.iter().filter_map(Step::parse).collect()
    }
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines.iter().try_for_each(|line| writeln!(f, "    {}", line.text))?;
        write!(f, "    {:?}, ended: {:?}", self.rest, self.ended)
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Consoles {
    said: Mutex<BTreeMap<VmId, Said>>,
    changed: Condvar,
}

fn clock_ns(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    let [s, ns] = [now.tv_sec, now.tv_nsec].map(|part| u64::try_from(part).expect("after 1970"));
    s * 1_000_000_000 + ns
}

impl Consoles {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<VmId, Said>> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, vm: VmId, how: &str) {
        self.lock().entry(vm).or_default().ended.get_or_insert(how.to_owned());
        self.changed.notify_all();
    }

    /// What a VM has said until now.
    #[must_use]
    pub fn said(&self, vm: VmId) -> Said {
        self.lock().get(&vm).cloned().unwrap_or_default()
    }

    /// Waits until `is` holds of what a VM says, and returns that.
    ///
    /// # Panics
    /// It ends before, or [`LIMIT`] is over.
    #[track_caller]
    pub fn wait(&self, vm: VmId, is: impl Fn(&Said) -> bool) -> Said {
        let deadline = Instant::now() + LIMIT;
        let mut all = self.lock();
        loop {
            let said = all.entry(vm).or_default();
            if is(said) {
                return said.clone();
            }
            assert!(said.ended.is_none(), "{vm} has ended, it said:\n{said}");
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{vm} is silent, it said:\n{said}");
            all = self.changed.wait_timeout(all, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Observer for Consoles {
    fn console(&self, vm: VmId, bytes: &[u8]) {
        let (mono_ns, real_ns) = (clock_ns(ClockId::Monotonic), clock_ns(ClockId::Realtime));
        let mut all = self.lock();
        let said = all.entry(vm).or_default();
        said.rest.push_str(&String::from_utf8_lossy(bytes));
        while let Some(end) = said.rest.find('\n') {
            let text = said.rest[..end].trim_end_matches('\r').to_owned();
            said.rest.drain(..=end);
            said.lines.push(HostLine { text, mono_ns, real_ns });
        }
        self.changed.notify_all();
    }

    fn ended(&self, vm: VmId, how: HowEnded, status: Option<u32>, text: &str) {
        self.end(vm, &format!("{how:?}, status {status:?}: {text}"));
    }

    fn restarted(&self, vm: VmId) {
        self.lock().entry(vm).or_default().ended = None;
        self.changed.notify_all();
    }

    fn gone(&self, vm: VmId) {
        self.end(vm, "its process is gone");
    }

    fn forked(&self, _: Forked) {}
}

/// A colony whose first VM boots a Linux.
pub struct LinuxGuest {
    /// The colony.
    pub colony: Colony,
    /// What its VMs say.
    pub consoles: Arc<Consoles>,
    directory: PathBuf,
}

impl LinuxGuest {
    /// A colony for Linux, or none, loudly, where the host cannot run one or `make linux-guest` was not
    /// run. `SALP_LINUX_GUEST` names a directory other than `target/linux-guest`.
    #[must_use]
    pub fn new(test: &str, memory_mib: u64, vcpus: u8) -> Option<Self> {
        let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/linux-guest");
        let directory = env::var_os("SALP_LINUX_GUEST").map_or(built, PathBuf::from);
        let names = ["vmlinux", "bzImage", "witness.cpio", "shell.cpio", "command-line"];
        if let Some(missing) = names.iter().map(|name| directory.join(name)).find(|path| !path.is_file()) {
            println!("SKIPPED: {test}: no {}: run `make linux-guest`", missing.display());
            return None;
        }
        if !can_run(test, GuestKind::Kvm) {
            return None;
        }
        let mut config = ColonyConfig::new(MemoryShape::new(memory_mib << 20).expect("whole leaves"));
        config.program = Some(salp_binary());
        config.irqchip = Irqchip::Full;
        config.vcpus = vcpus;
        let colony = Colony::new(config).expect("a colony");
        let consoles = Arc::new(Consoles::default());
        let observer: Arc<dyn Observer> = consoles.clone();
        colony.observe(Arc::downgrade(&observer));
        Some(Self { colony, consoles, directory })
    }

    /// Boots `kernel` with `initrd`; `more` is added to the kernel's command line.
    #[track_caller]
    pub fn boot(&self, kernel: &str, initrd: &str, more: &str) -> VmId {
        let path = |name| self.directory.join(name);
        let [kernel, initrd] = [kernel, initrd].map(|name| File::open(path(name)).expect("it was there"));
        let command_line = fs::read_to_string(path("command-line")).expect("it was there");
        let command_line = format!("{} {more}", command_line.trim_end());
        self.colony.boot_image(&kernel, Some(&initrd), &command_line).expect("a boot")
    }

    /// Clones a VM once.
    #[track_caller]
    pub fn fork(&self, vm: VmId) -> VmId {
        self.colony.fork(vm, 1).unwrap_or_else(|error| panic!("a fork of {vm}: {error}")).clones[0].vm
    }

    /// Types something at a VM's console: 64 bytes at most, and all before them were read.
    #[track_caller]
    pub fn type_in(&self, vm: VmId, text: &str) {
        let taken = self.colony.console_input(vm, text.as_bytes()).expect("it takes input");
        assert_eq!(taken, text.len(), "{vm} had not read what was typed before");
    }

    /// Waits until the witness in a VM has said `count` lines, and returns them.
    #[track_caller]
    pub fn steps(&self, vm: VmId, count: usize) -> Vec<Step> {
        self.consoles.wait(vm, |said| said.steps().len() >= count).steps()
    }
}

/// A line of the witness: it has verified its whole tree once more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Counts from 1.
    pub number: u64,
    /// "ok", or what is wrong.
    pub verdict: String,
    /// The sum of the tree's checksums.
    pub digest: u64,
    /// The chain in the guest's memory.
    pub value: u64,
    /// The guest's `CLOCK_MONOTONIC` and `CLOCK_REALTIME`, in nanoseconds.
    pub clocks_ns: [u64; 2],
    /// What the second thread has counted.
    pub helper: u64,
    /// The host's clocks, the same two, when the line had arrived.
    pub host_ns: [u64; 2],
}

impl Step {
    /// The witness's line that this is, if it is one.
    #[must_use]
    pub fn parse(line: &HostLine) -> Option<Self> {
        let (number, rest) = line.text.strip_prefix("step ")?.split_once(' ')?;
        let (verdict, fields) = rest.split_at(rest.find(" digest=")?);
        let field = |name: &str, radix| {
            let value = fields.split(' ').find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
            u64::from_str_radix(value?, radix).ok()
        };
        Some(Self {
            number: number.parse().ok()?,
            verdict: verdict.to_owned(),
            digest: field("digest", 16)?,
            value: field("value", 16)?,
            clocks_ns: [field("mono", 10)?, field("real", 10)?],
            helper: field("helper", 10)?,
            host_ns: [line.mono_ns, line.real_ns],
        })
    }

    /// The value that the step after this one has in the same memory.
    #[must_use]
    pub fn next_value(&self) -> u64 {
        mix(mix(self.value, self.clocks_ns[0]), self.digest)
    }

    /// How far each of the host's clocks was ahead of the guest's when the line arrived, in nanoseconds.
    #[must_use]
    pub fn lag_ns(&self) -> [i64; 2] {
        let lag = |clock: usize| {
            let lag = i128::from(self.host_ns[clock]) - i128::from(self.clocks_ns[clock]);
            i64::try_from(lag).expect("both clocks count less than a hundred years")
        };
        [lag(0), lag(1)]
    }
}

/// As in the witness.
fn mix(hash: u64, word: u64) -> u64 {
    let hash = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash ^ hash >> 29
}
