//! One VM of the family: does what was decided for it, and judges what the VM says of itself.
//!
//! | what a VM shows | what that is |
//! |---|---|
//! | its process is gone, and nobody killed it | a finding |
//! | trouble, other than that a page is lost | a finding |
//! | a line on its console, other than that a transfer has failed | a finding: a wrong byte |
//! | it ended, and nobody asked it to | a finding, unless pages are lost |
//! | a page is lost: trouble, a failed transfer, a memory error | it is *told*: a finding unless it may lose pages |
//! | an order is not answered, or nothing is heard of a VM that runs | a finding: a hang |

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use salp_protocol::dma::status;

use super::puppet::{Model, Puppet};
use super::script::{Act, Random};
use crate::family::VmId;
use crate::frames::CutId;
use crate::keeper::fork::Forked;
use crate::keeper::member_handle::{MemberHandle, MemberState};
use crate::keeper::{Colony, ColonyError};
use crate::member::messages::Order;

/// How long anything may take, on a busy host that swaps: whoever takes longer hangs.
pub(super) const LIMIT: Duration = Duration::from_secs(120);

/// Something that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding(pub String);

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What something that was done to a VM came to.
pub(super) enum Outcome {
    /// It was done.
    Done,
    /// There are clones.
    Forked(Box<Forked>),
    /// All that the VM has is verified, and it has ended.
    Verified,
    /// The VM is told that pages of its memory are lost.
    Told,
    /// The colony refused.
    Refused(Box<ColonyError>),
    /// Something is wrong.
    Wrong(String),
}

/// What a VM's state says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing is wrong so far.
    Fine,
    /// It was asked to verify everything, has, and has ended.
    Verified,
    /// It is told of lost pages.
    Told,
    /// It has ended by a fault of which nobody has said yet that a page is lost.
    Unexplained(String),
    /// Its guest counts an error and has not told the whole of it yet, which it does when it runs.
    Begun(String),
    /// Something is wrong.
    Wrong(String),
}

/// See the module.
pub(super) struct Subject {
    pub(super) vm: VmId,
    pub(super) member: Arc<MemberHandle>,
    /// Generations between it and its root.
    pub(super) depth: u64,
    /// One that it descends from was killed with pages that were not published.
    pub(super) may_lose: bool,
    pub(super) is_paused: bool,
    /// Cuts that it is the source of.
    pub(super) cuts: Vec<CutId>,
    /// What a thread guest's memory must be, and must be again after a reset.
    pub(super) model: Option<Model>,
    pub(super) origin: Option<Model>,
}

impl Subject {
    /// Does what was decided. `seed` decides the rest.
    pub(super) fn suffer(&mut self, colony: &Colony, act: Act, seed: u64) -> Outcome {
        match act {
            Act::Work(time) => self.work(time, seed),
            Act::Fork { clones, kill_after } => self.fork(colony, clones, kill_after),
            Act::Reset => done(colony.reset(self.vm).map(|_| {
                self.is_paused = false;
                self.model.clone_from(&self.origin);
            })),
            Act::Pause => done(colony.pause(self.vm).map(|()| self.is_paused = true)),
            Act::Resume => self.resume(colony),
            Act::Kill(after) => {
                await_moment(after);
                self.member.kill();
                Outcome::Done
            }
            Act::Verify => self.verify(colony),
            Act::End => done(colony.end(self.vm)),
        }
    }

    fn resume(&mut self, colony: &Colony) -> Outcome {
        done(colony.resume(self.vm).map(|()| self.is_paused = false))
    }

    fn work(&mut self, time: Duration, seed: u64) -> Outcome {
        match &mut self.model {
            Some(model) if !self.is_paused => {
                let mut puppet = Puppet { vm: self.vm, member: &self.member, model };
                puppet.work(&mut Random::new(seed))
            }
            // It works by itself.
            _ => {
                std::thread::sleep(time);
                Outcome::Done
            }
        }
    }

    fn fork(&self, colony: &Colony, clones: usize, kill_after: Option<Duration>) -> Outcome {
        let forked = std::thread::scope(|scope| {
            if let Some(after) = kill_after {
                scope.spawn(move || {
                    await_moment(after);
                    self.member.kill();
                });
            }
            colony.fork(self.vm, clones)
        });
        forked.map_or_else(refused, |forked| Outcome::Forked(Box::new(forked)))
    }

    /// Has the guest verify everything and end.
    pub(super) fn verify(&mut self, colony: &Colony) -> Outcome {
        if self.is_paused
            && let Outcome::Refused(error) = self.resume(colony)
        {
            return Outcome::Refused(error);
        }
        if let Some(model) = &mut self.model {
            let mut puppet = Puppet { vm: self.vm, member: &self.member, model };
            return puppet.verify();
        }
        if let Err(error) = self.member.ask(Order::Finish, &[]) {
            return refused(error);
        }
        match self.await_word(|state| state.ended.is_some()) {
            Verdict::Verified => Outcome::Verified,
            Verdict::Told => Outcome::Told,
            Verdict::Fine => Outcome::Wrong("it verifies for ever".to_owned()),
            Verdict::Unexplained(text) | Verdict::Begun(text) | Verdict::Wrong(text) => Outcome::Wrong(text),
        }
    }

    /// Waits until `is` holds of what the VM says, or something is wrong, or the VM is told of a loss.
    pub(super) fn await_word(&self, is: impl Fn(&MemberState) -> bool) -> Verdict {
        let mut last = Verdict::Fine;
        let found = self.member.wait_for(LIMIT, |state| {
            last = verdict(state);
            let is_there = match last {
                // Who resolves faults says by itself that a page is lost, before or after.
                Verdict::Unexplained(_) | Verdict::Begun(_) => false,
                Verdict::Fine => is(state),
                _ => true,
            };
            is_there.then(|| last.clone())
        });
        match (found, last) {
            (Ok(found), _) => found,
            (Err(ColonyError::Silent { .. }), last @ (Verdict::Unexplained(_) | Verdict::Begun(_))) => last,
            (Err(error), _) => Verdict::Wrong(error.to_string()),
        }
    }

    /// What the VM says now.
    pub(super) fn verdict(&self) -> Verdict {
        verdict(&self.member.state())
    }

    /// Whether all that its clones may need of it is published, so that its death takes nothing along.
    pub(super) fn has_published_all(&self) -> bool {
        let state = self.member.state();
        self.cuts.iter().all(|cut| state.finished_cuts.contains(cut))
    }

    /// Transfers that it has verified since it began, and their bytes.
    pub(super) fn transfers(&self) -> (u64, u64) {
        if let Some(model) = &self.model {
            return (model.verified, model.verified * crate::words::wide(crate::words::PAGE_BYTES));
        }
        let state = self.member.state();
        // The first word of a clone is of what its source had done.
        if state.reports > 1 { (state.progress.transfers, state.progress.figure) } else { (0, 0) }
    }
}

/// The colony has refused something.
pub(super) fn refused(error: ColonyError) -> Outcome {
    Outcome::Refused(Box::new(error))
}

fn done(result: Result<(), ColonyError>) -> Outcome {
    result.map_or_else(refused, |()| Outcome::Done)
}

/// Chooses the moment of something, and no more: there is no event that it could wait for.
fn await_moment(after: Duration) {
    let until = Instant::now() + after;
    while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        if left > Duration::from_millis(1) { std::thread::sleep(left / 2) } else { std::hint::spin_loop() }
    }
}

/// See the module's table.
pub(super) fn verdict(state: &MemberState) -> Verdict {
    let console = String::from_utf8_lossy(&state.console);
    let (lines, begun) = console.rsplit_once('\n').unwrap_or(("", &console));
    let mut is_told = false;
    for (number, line) in lines.lines().enumerate() {
        // A clone says the rest of what its source had begun to say at the cut.
        let is_rest = number == 0 && !line.starts_with(LINE);
        if !is_rest && !is_failed_transfer(line) {
            return Verdict::Wrong(format!("its guest says: {line}"));
        }
        is_told = true;
    }
    for trouble in &state.troubles {
        if !trouble.contains(LOST) {
            return Verdict::Wrong(format!("its process says: {trouble}"));
        }
        is_told = true;
    }
    match &state.ended {
        None if !begun.is_empty() && !state.is_gone => {
            Verdict::Begun(format!("its guest has begun to say: {begun}"))
        }
        _ if is_told => Verdict::Told,
        Some((Some(0), _)) if state.progress.is_finished && state.progress.errors == 0 => Verdict::Verified,
        Some((None, text)) if text.contains(MEMORY_ERROR) => Verdict::Told,
        Some((None, text)) => Verdict::Unexplained(format!("its guest ended: {text}")),
        Some((Some(status), text)) => Verdict::Wrong(format!("its guest ended with {status}: {text}")),
        None if state.progress.errors > 0 && !state.is_gone => {
            Verdict::Begun(format!("its guest found {} errors", state.progress.errors))
        }
        None if state.is_gone => Verdict::Wrong("its process is gone, and nobody killed it".to_owned()),
        None => Verdict::Fine,
    }
}

/// How the guest begins each line.
const LINE: &str = "vcpu ";
/// What an error says of a page that is lost.
const LOST: &str = "is lost";
/// What the end of a guest says that touched one: a device may have been told first, and nobody else.
const MEMORY_ERROR: &str = "lost memory at host address";

/// Whether a line of the `dma` case says that the engine could not do a transfer. That is how a loss
/// shows to a device, and one in a registered buffer by there being no buffer; a transfer that was done
/// and is wrong says something else.
fn is_failed_transfer(line: &str) -> bool {
    let says = |status: u32| line.contains(&format!(": status {status},"));
    line.contains("dma: lane ") && (says(status::FAILED) || says(status::INVALID))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::member::messages::Progress;

    fn said(console: &str, troubles: &[&str], ended: Option<(Option<u32>, &str)>) -> MemberState {
        MemberState {
            console: console.as_bytes().to_vec(),
            troubles: troubles.iter().map(|text| (*text).to_owned()).collect(),
            ended: ended.map(|(status, text)| (status, text.to_owned())),
            ..MemberState::default()
        }
    }

    #[test]
    fn a_wrong_byte_is_never_taken_for_a_loss() {
        let failed = "vcpu 0: dma: lane 3 Read: status 4, 0 bytes of 17, cookie 0x1 for 0x1\n";
        let wrong = "vcpu 0: page 0x400000 has checksum 0x1, not 0x2\n";
        let lost = "gfn 0x7 is lost: its source ended before the page was published";
        let is_wrong = |state: &MemberState| matches!(verdict(state), Verdict::Wrong(_));
        assert_eq!(verdict(&said("", &[], None)), Verdict::Fine);
        assert_eq!(verdict(&said(failed, &[], None)), Verdict::Told);
        assert_eq!(verdict(&said(failed, &[lost], Some((Some(1), "")))), Verdict::Told);
        assert_eq!(verdict(&said("", &[lost], Some((None, "a triple fault")))), Verdict::Told);
        let end = "vcpu 0: lost memory at host address 0x10000b900000";
        assert_eq!(verdict(&said("", &[], Some((None, end)))), Verdict::Told);
        assert!(is_wrong(&said(&format!("{failed}{wrong}"), &[lost], None)));
        assert!(is_wrong(&said("", &["the pipe is full", lost], None)));
        assert!(is_wrong(&said("", &[], Some((Some(1), "")))));
        assert!(matches!(verdict(&said("", &[], Some((None, "")))), Verdict::Unexplained(_)));
        let has_begun = |console: &str| matches!(verdict(&said(console, &[], None)), Verdict::Begun(_));
        for end in 1..wrong.len() {
            assert!(has_begun(&wrong[..end]), "half a line is taken for one");
            assert!(has_begun(&format!("{failed}{}", &wrong[..end])), "half a line is passed over");
        }
        assert_eq!(verdict(&said(&failed[40..], &[], None)), Verdict::Told, "its source said the rest");
        assert!(is_wrong(&said(&format!("{}{wrong}", &failed[40..]), &[], None)));
        let mut state = said("", &[], Some((Some(0), "")));
        assert!(is_wrong(&state), "it was not asked to end");
        state.progress = Progress { is_finished: true, ..Progress::default() };
        assert_eq!(verdict(&state), Verdict::Verified);
        state.progress.errors = 1;
        assert!(is_wrong(&state));
        state.ended = None;
        assert!(matches!(verdict(&state), Verdict::Begun(_)), "it has not said yet what is wrong");
        state = MemberState { is_gone: true, ..MemberState::default() };
        assert!(is_wrong(&state));
    }
}
