//! The steward: the keeper's thread for what happens on its own. It may wait for members; nobody
//! waits for it but by their own wish.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender};

use rustix::fs::FallocateFlags;

use super::fork::Forked;
use super::member_handle::MemberHandle;
use super::spec::ForkSpec;
use super::{ColonyError, Inner, Shared};
use crate::failure;
use crate::family::{Sweep, VmId};
use crate::frames::Frames;
use crate::ipc::futex;
use crate::member::extents_name;
use crate::member::messages::Order;
use crate::tables::Entry;
use crate::words::{LEAF_BYTES, PAGE_BYTES, wide};

/// What the steward is to do.
pub(super) enum Job {
    /// The pool has room.
    FillPool,
    /// The family may have changed.
    Sweep,
    /// A guest asks for a fork of its VM.
    ForkAsked {
        /// Which VM.
        vm: VmId,
        /// Which vCPU.
        vcpu: usize,
    },
    /// A guest asks for a reset of its VM that has been cut itself.
    ResetAsked {
        /// Which VM.
        vm: VmId,
        /// Which vCPU.
        vcpu: usize,
    },
    /// A guest may have halted for good.
    Look {
        /// Which VM.
        vm: VmId,
    },
    /// Say when everything before this has been done.
    Echo(Sender<()>),
    /// Go home.
    Close,
}

/// What the host could not give back.
#[derive(Default)]
pub(super) struct Leftovers {
    /// Frames to be punched.
    frames: Vec<Frames>,
    /// Names of files to be removed.
    files: Vec<String>,
}

/// The steward's thread.
pub(super) fn run(shared: &Arc<Shared>, jobs: &Receiver<Job>) {
    while let Ok(job) = jobs.recv() {
        let result = match job {
            Job::FillPool => {
                // Whoever needs a member that cannot be made is told then.
                if let Err(error) = shared.fill_pool() {
                    tracing::debug!(%error, "the pool is not full");
                }
                Ok(())
            }
            Job::Sweep => shared.sweep(),
            Job::ForkAsked { vm, vcpu } => shared.fork_for_guest(vm, vcpu),
            Job::ResetAsked { vm, vcpu } => shared.reset_for_guest(vm, vcpu),
            Job::Look { vm } => {
                shared.begin_look(vm);
                Ok(())
            }
            Job::Echo(done) => {
                let result = shared.sweep();
                // Whoever asked may have given up.
                let _ = done.send(());
                result
            }
            Job::Close => return,
        };
        if let Err(error) = result {
            tracing::error!(%error, "the steward could not do its work");
        }
        shared.changed.notify_all();
    }
}

impl Shared {
    /// Does all that follows from the family's state, until nothing more does.
    pub(super) fn sweep(self: &Arc<Self>) -> Result<(), ColonyError> {
        loop {
            let sweep = {
                let mut inner = self.lock();
                let sweep = inner.family.sweep()?;
                // Before anybody can reserve a cut that gets a closed one's place on the board.
                self.let_go(&mut inner, &sweep);
                sweep
            };
            let released = self.release_unneeded(&sweep);
            let dismissed = self.dismiss_images();
            self.tell_published();
            if released == 0 && dismissed == 0 {
                return Ok(());
            }
        }
    }

    /// Punches what nobody refers to, and removes files; what could not be the last time, too.
    fn let_go(&self, inner: &mut Inner, sweep: &Sweep) {
        let Leftovers { frames, files } = std::mem::take(&mut inner.leftovers);
        for frames in frames.into_iter().chain(sweep.freed.iter().copied()) {
            if let Err(error) = self.punch(inner, frames) {
                tracing::warn!(?frames, %error, "frames stay in the arena for now");
                inner.leftovers.frames.push(frames);
            }
        }
        for cut in &sweep.closed {
            inner.files.remove(cut);
            // Not asked again: whoever uses the place next clears it first.
            if let Err(error) = self.board.close_cut(*cut) {
                tracing::warn!(%cut, %error, "words of the board stay for now");
            }
        }
        let closed = sweep.closed.iter().flat_map(|cut| [cut.block_file(), cut.patch_file()]);
        for name in files.into_iter().chain(closed) {
            self.remove_file(inner, name);
        }
    }

    fn remove_file(&self, inner: &mut Inner, name: String) {
        match self.arena.remove(&name) {
            // A cut that could not be reserved has none, a member that never wrote neither.
            Err(error) if !error.is_not_found() => {
                tracing::warn!(%error, "a file of the arena stays for now");
                inner.leftovers.files.push(name);
            }
            _ => {}
        }
    }

    fn punch(&self, inner: &Inner, frames: Frames) -> std::io::Result<()> {
        failure::point("steward.punch")?;
        let (file, offset, len_bytes) = match frames {
            Frames::Block(block) => (0, block.leaf.gpa().0, wide(LEAF_BYTES)),
            Frames::Patches(place) => {
                let patches = self.board.cut(place.cut).patches(place.leaf);
                let bytes = wide(patches.pages.len()) * wide(PAGE_BYTES);
                (1, u64::from(patches.first_frame) * wide(PAGE_BYTES), bytes)
            }
        };
        match inner.files.get(&frames.cut()) {
            Some(files) if len_bytes > 0 => Ok(rustix::fs::fallocate(
                &files[file],
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                offset,
                len_bytes,
            )?),
            _ => Ok(()),
        }
    }

    /// Tells sources that nobody needs a cut; returns how many.
    fn release_unneeded(&self, sweep: &Sweep) -> usize {
        let mut released = 0;
        for cut in &sweep.unneeded {
            let member = {
                let inner = self.lock();
                let source = inner.family.cuts().find(|(id, _)| id == cut).map(|(_, source)| source);
                source.and_then(|vm| inner.vms.get(&vm).or_else(|| inner.images.get(&vm)).cloned())
            };
            let answer = member.map(|member| member.ask(Order::ReleaseCut { cut: *cut }, &[]));
            match answer {
                Some(Ok(_)) | None => {
                    self.lock().family.cut_released(*cut);
                    released += 1;
                }
                // Its death is booked soon, and releases the cut.
                Some(Err(ColonyError::Died(_))) => {}
                Some(Err(error)) => {
                    tracing::warn!(%cut, %error, "a source keeps an unneeded cut for now");
                    self.lock().family.cut_not_released(*cut);
                }
            }
        }
        released
    }

    /// Tells clones when all that they share is published: nothing of theirs needs to trap any more.
    fn tell_published(&self) {
        let members: Vec<_> = {
            let inner = self.lock();
            // A root that is a thunk falls through to a cut that is not settled.
            let is_settled = |vm: &VmId| !matches!(inner.family.root(*vm), Ok(Entry::Thunk(_)) | Err(_));
            let clones = inner.vms.iter().filter(|(vm, _)| inner.parents.contains_key(vm) && is_settled(vm));
            clones.map(|(_, member)| Arc::clone(member)).collect()
        };
        for member in members {
            if !member.is_told.swap(true, Ordering::Relaxed)
                && let Err(error) = member.begin(Order::ResolveKnown, &[])
            {
                tracing::debug!(vm = %member.vm(), %error, "a clone is not told");
            }
        }
    }

    /// Lets images go whose pages nobody needs; returns how many.
    fn dismiss_images(self: &Arc<Self>) -> usize {
        let idle: Vec<_> = {
            let inner = self.lock();
            let unneeded = |vm: &VmId| !inner.family.is_image_needed(*vm);
            inner.images.iter().filter(|(vm, _)| unneeded(vm)).map(|(_, m)| Arc::clone(m)).collect()
        };
        for member in &idle {
            match member.ask(Order::Exit, &[]) {
                Ok(_) | Err(ColonyError::Died(_)) => {}
                Err(error) => {
                    tracing::warn!(%error, "a member that will not exit is killed");
                    member.kill();
                }
            }
            member.wait_end();
        }
        idle.len()
    }

    /// A process is gone, for good and once: what it had not published is lost to those who wait for
    /// it, and its slot is free. Called by the listener; waits for nobody.
    pub(super) fn book_death(&self, member: &MemberHandle) {
        {
            let mut inner = self.lock();
            if let Some(vm) = member.named() {
                for (cut, leaf) in inner.family.source_gone(vm) {
                    // no failure point: who waits there looks again by itself
                    if let Err(error) = futex::wake_all(self.board.cut(cut).raw(leaf)) {
                        tracing::error!(%cut, %leaf, %error, "nobody can be told that a leaf is lost");
                    }
                }
                inner.vms.remove(&vm);
                inner.images.remove(&vm);
                inner.last_cut.remove(&vm);
                inner.parents.remove(&vm);
            }
            self.remove_file(&mut inner, extents_name(member.process(), member.slot()));
        }
        self.pool.bury(member.slot());
        self.changed.notify_all();
        self.post(Job::Sweep);
        self.post(Job::FillPool);
    }

    /// Has a member look whether its guest has halted. If so, it says that unasked.
    fn begin_look(&self, vm: VmId) {
        let member = self.lock().vms.get(&vm).cloned();
        if let Some(Err(error)) = member.map(|member| member.begin(Order::Look, &[]).map(|_| ())) {
            tracing::debug!(%vm, %error, "a vm is gone before it could be looked at");
        }
    }

    fn fork_for_guest(self: &Arc<Self>, vm: VmId, vcpu: usize) -> Result<(), ColonyError> {
        let forked = self.fork_named(vm, vcpu);
        let clone = forked.as_ref().ok().and_then(|forked| forked.clones.first()).map(|clone| clone.vm);
        let answer = Order::ForkResult { vcpu, clone };
        let answered = self.member(vm).and_then(|member| member.ask(answer, &[]));
        let forked = forked?;
        // Also where the source has ended meanwhile.
        if let Some(observer) = self.observer() {
            observer.forked(forked);
        }
        answered.map(|_| ())
    }

    /// One clone, called what the observer says.
    fn fork_named(self: &Arc<Self>, vm: VmId, vcpu: usize) -> Result<Forked, ColonyError> {
        let observer = self.observer();
        let member = self.member(vm)?;
        let source = member.identity().map_or("", |identity| &identity.name);
        // no failure point: the observer says what the clone is called
        let name = observer.as_ref().map_or(Ok(None), |observer| observer.name_clone(source))?;
        let mut spec = ForkSpec::plain(1);
        spec.clones[0].name.clone_from(&name);
        let forked = self.fork(vm, &spec, Some(vcpu));
        if let (Err(_), Some(observer), Some(name)) = (&forked, observer, name) {
            observer.forget_name(&name);
        }
        forked
    }
}
