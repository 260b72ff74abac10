//! The family under torture: who descends from whom, who may lose pages, what was done and what held.
//!
//! A round does some things to some VMs at the same time, waits for all, then books what happened, in
//! this order: clones first, then deaths, since whoever descends from a VM that died with pages to
//! publish may lose them; then what was refused or said.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use salp_protocol::layout;

use super::pressure::Pressure;
use super::puppet::{Model, Puppet};
use super::script::{Act, Kind, Random, View, decide};
use super::subject::{Finding, LIMIT, Outcome, Subject, Verdict};
use super::{Plan, Plant, Summary};
use crate::family::VmId;
use crate::keeper::fork::Forked;
use crate::keeper::member_handle::MemberHandle;
use crate::keeper::{Colony, ColonyError};
use crate::member::messages::{GuestKind, Order, Reply};
use crate::words::{LEAF_BYTES, PAGE_SHIFT, wide};

/// How long the host may take to give back what processes had that have ended.
const PATIENCE: Duration = Duration::from_secs(10);

/// A VM that has ended and whose process others may need.
struct Image {
    member: Arc<MemberHandle>,
}

/// See the module.
pub struct Herd<'a> {
    plan: &'a Plan<'a>,
    colony: &'a Colony,
    random: Random,
    subjects: BTreeMap<VmId, Subject>,
    images: BTreeMap<VmId, Image>,
    /// Who was cloned from whom: pages reach a grandchild past an ended parent.
    parents: BTreeMap<VmId, VmId>,
    /// VMs in which a fault was planted.
    spoiled: BTreeSet<VmId>,
    /// VMs that the torture has killed in this round.
    killed: BTreeSet<VmId>,
    pressure: &'a Pressure,
    /// Processes that the host had killed when the round began.
    killed_before: u64,
    /// What this process had open before there was a VM.
    descriptors: Vec<String>,
    /// What was done.
    pub summary: Summary,
}

impl<'a> Herd<'a> {
    /// A family of nobody, in a colony whose pool is full.
    #[must_use]
    pub fn new(plan: &'a Plan<'a>, colony: &'a Colony, pressure: &'a Pressure) -> Self {
        Self {
            plan,
            colony,
            random: Random::new(plan.seed),
            subjects: BTreeMap::new(),
            images: BTreeMap::new(),
            parents: BTreeMap::new(),
            spoiled: BTreeSet::new(),
            killed: BTreeSet::new(),
            pressure,
            killed_before: pressure.look().killed,
            descriptors: descriptors(),
            summary: Summary::default(),
        }
    }

    /// Does some things at the same time, and books what they came to.
    ///
    /// # Errors
    /// What does not hold.
    pub fn round(&mut self) -> Result<(), Finding> {
        self.killed_before = self.pressure.look().killed;
        if self.subjects.is_empty() {
            self.boot()?;
        }
        self.images.retain(|_, image| image.member.is_alive());
        let views = self.views();
        let acts = decide(&mut self.random, &views, self.plan.vms);
        tracing::debug!(round = self.summary.rounds, ?acts, "torture");
        let outcomes = self.perform(&acts);
        self.book_clones(&outcomes)?;
        self.book_deaths(&acts);
        self.book_host_kills();
        for (vm, act, outcome) in outcomes {
            self.book(vm, act, outcome)?;
        }
        self.summary.rounds += 1;
        self.listen()?;
        self.spoil()
    }

    fn views(&self) -> Vec<View> {
        let living = self.subjects.values().map(|subject| {
            let is_clone = subject.depth > 0;
            let kind = match (subject.is_paused, is_clone) {
                (true, is_clone) => Kind::Paused { is_clone },
                (false, true) => Kind::Clone,
                (false, false) => Kind::Root,
            };
            View { vm: subject.vm, kind }
        });
        let images = self.images.keys().map(|vm| View { vm: *vm, kind: Kind::Image });
        living.chain(images).collect()
    }

    fn boot(&mut self) -> Result<(), Finding> {
        let vm = match self.colony.boot(&self.command_line()) {
            Ok(vm) => vm,
            Err(_) if self.has_host_killed() => return Ok(()),
            Err(error) => return Err(Finding(error.to_string())),
        };
        let member = self.member(vm)?;
        let model = (self.plan.guest == GuestKind::Thread).then(|| Model::new(self.plan.memory));
        let mut subject = Subject {
            vm,
            member,
            depth: 0,
            may_lose: false,
            is_paused: false,
            cuts: Vec::new(),
            model,
            origin: None,
        };
        self.summary.boots += 1;
        if let Some(model) = &mut subject.model {
            let begun = Puppet { vm, member: &subject.member, model }.begin(&mut self.random);
            self.subjects.insert(vm, subject);
            return self.book(vm, Act::Work(Duration::ZERO), begun);
        }
        // Its first word says that all of its memory is written and transfers have begun.
        let verdict = subject.await_word(|state| state.reports > 0);
        self.subjects.insert(vm, subject);
        self.judge(vm, verdict)
    }

    fn command_line(&self) -> String {
        if self.plan.guest == GuestKind::Thread {
            return "case=puppet".to_owned();
        }
        let memory_mib = self.plan.memory.ram_bytes() >> 20;
        let mib = (memory_mib - GUEST_OVERHEAD_MIB) * 3 / 4;
        format!("case=dma mib={} pins={PINS} depth=8 delay_us=1000 dirty=32 kernel=1", mib.max(1))
    }

    fn member(&self, vm: VmId) -> Result<Arc<MemberHandle>, Finding> {
        self.colony.member(vm).map_err(|error| Finding(error.to_string()))
    }

    /// Does all of it at once, and waits.
    fn perform(&mut self, acts: &[(VmId, Act)]) -> Vec<(VmId, Act, Outcome)> {
        let (colony, images) = (self.colony, &self.images);
        let mut subjects: BTreeMap<_, _> = self.subjects.iter_mut().collect();
        let random = &mut self.random;
        std::thread::scope(|scope| {
            let mut begun = Vec::new();
            for (vm, act) in acts.iter().copied() {
                let seed = random.draw();
                match (subjects.remove(&vm), images.get(&vm)) {
                    (Some(subject), _) => {
                        begun.push((vm, act, scope.spawn(move || subject.suffer(colony, act, seed))));
                    }
                    (None, Some(image)) => image.member.kill(),
                    (None, None) => {}
                }
            }
            let wait = |(vm, act, thread): (_, _, std::thread::ScopedJoinHandle<'_, _>)| {
                (vm, act, thread.join().unwrap_or_else(|_| Outcome::Wrong("a thread panicked".to_owned())))
            };
            begun.into_iter().map(wait).collect()
        })
    }

    fn book_clones(&mut self, outcomes: &[(VmId, Act, Outcome)]) -> Result<(), Finding> {
        for (vm, _, outcome) in outcomes {
            if let Outcome::Forked(forked) = outcome {
                self.adopt(*vm, forked)?;
            }
        }
        Ok(())
    }

    fn adopt(&mut self, source: VmId, forked: &Forked) -> Result<(), Finding> {
        self.summary.forks += 1;
        let Some(parent) = self.subjects.get_mut(&source) else { return Ok(()) };
        parent.cuts.push(forked.cut);
        let (depth, may_lose) = (parent.depth + 1, parent.may_lose);
        let model = parent.model.as_ref().map(Model::of_clone);
        self.summary.deepest_chain = self.summary.deepest_chain.max(depth);
        for clone in &forked.clones {
            let (vm, origin) = (clone.vm, model.clone());
            let member = match self.member(vm) {
                Err(_) if self.has_host_killed() => continue,
                member => member?,
            };
            let (cuts, model) = (Vec::new(), model.clone());
            let subject = Subject { vm, member, depth, may_lose, is_paused: false, cuts, model, origin };
            self.subjects.insert(vm, subject);
            self.parents.insert(vm, source);
            self.summary.clones += 1;
        }
        Ok(())
    }

    /// Whoever descends from a VM that was killed before it had published everything may lose pages.
    fn book_deaths(&mut self, acts: &[(VmId, Act)]) {
        self.killed.clear();
        for (vm, act) in acts {
            let is_killed = matches!(act, Act::Kill(_) | Act::Fork { kill_after: Some(_), .. });
            let has_published_all = match (self.subjects.get(vm), self.images.remove(vm)) {
                (Some(subject), _) if is_killed => {
                    // Its last words are heard.
                    subject.member.wait_end();
                    self.summary.kills += 1;
                    self.killed.insert(*vm);
                    // What a fork had begun that did not come to its clones is nobody's.
                    subject.has_published_all()
                }
                (None, Some(image)) => {
                    image.member.wait_end();
                    self.summary.image_kills += 1;
                    // It would have gone by itself if nobody needed it.
                    false
                }
                _ => continue,
            };
            if !has_published_all {
                self.book_loss(*vm);
            }
        }
    }

    fn book_loss(&mut self, killed: VmId) {
        for (vm, subject) in &mut self.subjects {
            let mut ancestor = self.parents.get(vm).copied();
            while let Some(one) = ancestor.filter(|one| *one != killed) {
                ancestor = self.parents.get(&one).copied();
            }
            subject.may_lose |= ancestor.is_some();
        }
    }

    /// Whether the host has killed a process since the round began: it may have been any.
    fn has_host_killed(&self) -> bool {
        self.pressure.look().killed > self.killed_before
    }

    /// VMs that the host has killed at the memory limit are dead like others.
    fn book_host_kills(&mut self) {
        if !self.has_host_killed() {
            return;
        }
        let dead = |subject: &&Subject| !subject.member.is_alive() && !self.killed.contains(&subject.vm);
        let dead: Vec<_> = self.subjects.values().filter(dead).map(|subject| subject.vm).collect();
        for vm in dead {
            self.summary.host_kills += 1;
            self.book_loss(vm);
            self.bank(vm);
            self.subjects.remove(&vm);
        }
        let gone: Vec<_> = self.images.iter().filter(|(_, image)| !image.member.is_alive()).collect();
        let gone: Vec<_> = gone.into_iter().map(|(vm, _)| *vm).collect();
        gone.into_iter().for_each(|vm| self.book_loss(vm));
    }

    /// Books what an act came to.
    fn book(&mut self, vm: VmId, act: Act, outcome: Outcome) -> Result<(), Finding> {
        let Some(subject) = self.subjects.get(&vm) else { return Ok(()) };
        let is_killed = matches!(act, Act::Kill(_) | Act::Fork { kill_after: Some(_), .. });
        match outcome {
            Outcome::Forked(_) | Outcome::Done => match act {
                Act::Reset => self.summary.resets += 1,
                Act::Pause => self.summary.pauses += 1,
                Act::End => self.retire(vm),
                _ => {}
            },
            Outcome::Verified => {
                self.summary.verified_vms += 1;
                self.finish(vm)?;
            }
            Outcome::Told => self.judge(vm, Verdict::Told)?,
            Outcome::Wrong(text) => return Err(self.finding(vm, &text)),
            // Whoever may lose pages may lose them in the middle of a fork or a reset, too.
            Outcome::Refused(error)
                if !matches!(*error, ColonyError::Silent { .. }) && (is_killed || subject.may_lose) =>
            {
                self.summary.failed_forks += u64::from(matches!(act, Act::Fork { .. }));
                // A reset that failed leaves it between two states.
                if !is_killed && !matches!(act, Act::Fork { .. }) {
                    self.judge(vm, Verdict::Told)?;
                }
            }
            // Its clone, or one that was to be it, may have been killed by the host.
            Outcome::Refused(error)
                if !matches!(*error, ColonyError::Silent { .. }) && self.has_host_killed() => {}
            Outcome::Refused(error) => return Err(self.finding(vm, &format!("{act:?}: {error}"))),
        }
        if is_killed {
            self.bank(vm);
            self.subjects.remove(&vm);
        }
        Ok(())
    }

    /// Books what a VM says.
    fn judge(&mut self, vm: VmId, verdict: Verdict) -> Result<(), Finding> {
        self.book_host_kills();
        match verdict {
            _ if !self.subjects.contains_key(&vm) => Ok(()),
            Verdict::Fine => Ok(()),
            Verdict::Told if self.subjects.get(&vm).is_some_and(|subject| subject.may_lose) => {
                self.summary.told_of_loss += 1;
                self.finish(vm)
            }
            Verdict::Told => {
                Err(self.finding(vm, "it is told of lost pages, and nobody was killed with any"))
            }
            Verdict::Verified => Err(self.finding(vm, "it ended, and nobody asked it to")),
            Verdict::Unexplained(text) | Verdict::Begun(text) | Verdict::Wrong(text) => {
                Err(self.finding(vm, &text))
            }
        }
    }

    /// Ends a VM that is done.
    fn finish(&mut self, vm: VmId) -> Result<(), Finding> {
        let ended = self.colony.end(vm);
        self.retire(vm);
        ended.map_err(|error| self.finding(vm, &format!("its end: {error}")))
    }

    /// A VM has ended: its process is an image.
    fn retire(&mut self, vm: VmId) {
        self.bank(vm);
        if let Some(subject) = self.subjects.remove(&vm) {
            self.images.insert(vm, Image { member: subject.member });
        }
    }

    /// Adds what a VM has done.
    fn bank(&mut self, vm: VmId) {
        if let Some(subject) = self.subjects.get(&vm) {
            let (transfers, bytes) = subject.transfers();
            self.summary.transfers += transfers;
            self.summary.transferred_bytes += bytes;
        }
    }

    /// Hears what every VM says.
    fn listen(&mut self) -> Result<(), Finding> {
        let vms: Vec<_> = self.subjects.keys().copied().collect();
        for vm in vms {
            let Some(subject) = self.subjects.get(&vm) else { continue };
            let verdict = match subject.verdict() {
                // Heard when it runs again.
                Verdict::Begun(_) if subject.is_paused => Verdict::Fine,
                // Who resolves faults says so a moment later, and the guest the rest.
                Verdict::Unexplained(_) | Verdict::Begun(_) => subject.await_word(|_| false),
                other => other,
            };
            self.judge(vm, verdict)?;
        }
        Ok(())
    }

    /// The whole-state checker; then every VM that runs gives word.
    ///
    /// # Errors
    /// What does not hold.
    pub fn check(&mut self) -> Result<(), Finding> {
        match self.colony.check() {
            Ok(checked) => {
                self.summary.checks += 1;
                self.summary.pages_compared += checked.pages_compared;
                self.summary.pages_moved += checked.pages_moved;
                self.summary.leaves_changed += checked.leaves_changed;
            }
            Err(ColonyError::Died(_)) if self.has_host_killed() => self.book_host_kills(),
            Err(error) => return Err(Finding(error.to_string())),
        }
        let mut said = Vec::new();
        for subject in self.subjects.values().filter(|subject| !subject.is_paused && subject.model.is_none())
        {
            let heard = subject.member.state().reports;
            let verdict = match subject.await_word(|state| state.reports > heard) {
                Verdict::Wrong(text) => Verdict::Wrong(format!("it should run after a check, and: {text}")),
                other => other,
            };
            said.push((subject.vm, verdict));
        }
        said.into_iter().try_for_each(|(vm, verdict)| self.judge(vm, verdict))
    }

    /// The end of a whole run: every VM verifies everything.
    ///
    /// # Errors
    /// What does not hold.
    pub fn verify_all(&mut self) -> Result<(), Finding> {
        self.check()?;
        let acts: Vec<_> = self.subjects.keys().map(|vm| (*vm, Act::Verify)).collect();
        let outcomes = self.perform(&acts);
        outcomes.into_iter().try_for_each(|(vm, act, outcome)| self.book(vm, act, outcome))
    }

    /// All VMs have ended: nothing of them is left.
    ///
    /// # Errors
    /// What is.
    pub fn expect_nothing_left(&mut self) -> Result<(), Finding> {
        self.colony.wait_until_gone(LIMIT).map_err(|error| Finding(format!("at the end, {error}")))?;
        // What is known of processes that are gone holds descriptors too.
        self.images.clear();
        let begun = Instant::now();
        loop {
            self.colony.settle();
            self.colony.warm().map_err(|error| Finding(error.to_string()))?;
            let structure = self.colony.structure_counts();
            let arena_bytes = self.colony.arena_used_bytes().map_err(|error| Finding(error.to_string()))?;
            let mut more = descriptors();
            for before in &self.descriptors {
                more.iter().position(|now| now == before).map(|at| more.swap_remove(at));
            }
            if structure == (0, 0, 0) && arena_bytes == 0 && more.is_empty() {
                return Ok(());
            }
            if begun.elapsed() > PATIENCE {
                let (cuts, nodes, records) = structure;
                return Err(Finding(format!(
                    "all vms are gone, and there are {cuts} cuts, {nodes} nodes, {records} records, \
                     {arena_bytes} bytes in the arena; too many descriptors: {more:?}"
                )));
            }
            // The host's kernel gives the memory of a file back some time after its last mapping.
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What was done, and whether a signal ended it. Whoever is left ends with the colony.
    #[must_use]
    pub fn end(mut self) -> (Summary, bool) {
        let left: Vec<_> = self.subjects.keys().copied().collect();
        left.into_iter().for_each(|vm| self.bank(vm));
        (self.summary, (self.plan.is_interrupted)())
    }

    fn finding(&self, vm: VmId, text: &str) -> Finding {
        let mut said = format!("{vm}: {text}");
        if let Some(subject) = self.subjects.get(&vm) {
            let state = subject.member.state();
            let console = String::from_utf8_lossy(&state.console).into_owned();
            let lines = state.troubles.iter().map(String::as_str).chain(console.lines());
            for line in lines.filter(|line| !text.contains(line)).take(8) {
                said.push_str("; ");
                said.push_str(line);
            }
        }
        Finding(said)
    }

    /// Plants the fault that was asked for, once in each VM: one that dies does not find it.
    fn spoil(&mut self) -> Result<(), Finding> {
        if self.plan.plant != Some(Plant::Bit) {
            return Ok(());
        }
        let mut spoiled = std::mem::take(&mut self.spoiled);
        for subject in self.subjects.values().filter(|subject| !spoiled.contains(&subject.vm)) {
            match self.turn_bit(subject) {
                Ok(()) => {
                    spoiled.insert(subject.vm);
                    break;
                }
                // A page that traps still: another time.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => {}
                Err(error) => return Err(Finding(format!("no fault could be planted: {error}"))),
            }
        }
        self.spoiled = spoiled;
        Ok(())
    }

    /// Turns a bit over in a page that the guest checks.
    fn turn_bit(&self, subject: &Subject) -> io::Result<()> {
        let description = match self.colony.ask(subject.vm, Order::Describe) {
            Ok(Reply::Describe(description)) => description,
            other => return Err(io::Error::other(format!("{other:?}"))),
        };
        // The first tracked page of a puppet, and among the written pages of the built-in guest.
        let address = description.window + layout::FREE + wide(LEAF_BYTES);
        let path = format!("/proc/{}/mem", subject.member.process());
        let memory = std::fs::File::options().read(true).write(true).open(path)?;
        let mut byte = [0];
        memory.read_exact_at(&mut byte, address)?;
        memory.write_all_at(&[byte[0] ^ 1], address)?;
        Ok(())
    }
}

/// Pages that each guest keeps registered with its device.
const PINS: u64 = 64;

/// What the built-in guest uses besides the memory that it dirties, in MiB: see `guest/src/options.rs`.
const GUEST_OVERHEAD_MIB: u64 = 13 + (PINS << PAGE_SHIFT >> 20) + 1;

/// What this process has open, as the host names it; what it has several of comes several times. Sockets and
/// pipes have numbers, which say nothing.
fn descriptors() -> Vec<String> {
    let entries = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let name = |link: PathBuf| {
        let link = link.to_string_lossy();
        link.trim_end_matches(|letter: char| letter.is_ascii_digit() || letter == ']').to_owned()
    };
    // The directory that is read is gone by now.
    let names = entries.filter_map(|entry| std::fs::read_link(entry.path()).ok()).map(name);
    names.collect()
}
