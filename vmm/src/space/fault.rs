//! Faults: the first touch of a leaf that is not known yet, and the store to a protected page.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Backing, Host, Patch, Space, SpaceError};
use crate::board::LeafMap;
use crate::frames::CutId;
use crate::plants::{Plant, is_planted};
use crate::tables::{Entry, Found, resolve};
use crate::words::{Gfn, LeafNumber};

/// What trapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A first access to a leaf that traps every access.
    Touch,
    /// A store to a protected page.
    Store,
}

/// How long to wait before the tables are looked at again: by then the cut may have been settled and
/// its words given up, so that nobody wakes who waits for one of them.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// How long to wait for a source before its name is logged.
const SOURCE_PATIENCE: Duration = Duration::from_secs(2);

impl<H: Host> Space<H> {
    /// Resolves a fault at `gfn` and wakes who waits there. See the case table of the module.
    ///
    /// # Errors
    /// The page's bytes are lost (the leaf is poisoned by then), or the host refused.
    pub fn handle_fault(&self, gfn: Gfn, fault: Fault) -> Result<(), SpaceError> {
        let leaf = gfn.leaf();
        match fault {
            Fault::Touch => {
                if self.backing(leaf) == Backing::Trapped {
                    self.resolve_leaf(leaf)
                } else {
                    Ok(self.host.wake(leaf)?)
                }
            }
            Fault::Store => {
                self.counters.store_faults.fetch_add(1, Ordering::Relaxed);
                let _leaf = self.lock_leaf(leaf);
                if !self.is_protected(leaf) {
                    return Ok(self.host.wake(leaf)?);
                }
                let remap = self.remapping();
                // No cut can come between the question and the answer.
                if self.is_copied_for_all(gfn) {
                    self.set_protected(leaf, super::PARTLY_PROTECTED);
                    self.host.unprotect_page(gfn)?;
                    return Ok(());
                }
                drop(remap);
                self.force_locked(leaf);
                self.open_leaf(leaf)
            }
        }
    }

    /// Whether every cut that waits for this page's leaf has a copy of the page: it was pinned.
    fn is_copied_for_all(&self, gfn: Gfn) -> bool {
        let pending = self.pending_cuts(gfn.leaf());
        !pending.is_empty() && pending.iter().all(|cut| cut.copy_of(gfn).is_some())
    }

    /// Finds out what a trapped leaf holds and maps it. Waits for the source of a cut if need be.
    ///
    /// # Errors
    /// The leaf is lost (and poisoned), the space is being stopped, or the host refused.
    pub fn resolve_leaf(&self, leaf: LeafNumber) -> Result<(), SpaceError> {
        let found = self.find(leaf)?;
        let _leaf = self.lock_leaf(leaf);
        if self.backing(leaf) != Backing::Trapped && !is_planted(Plant::MapsTwice) {
            return Ok(self.host.wake(leaf)?);
        }
        let area = self.board.member(self.slot);
        let _remap = self.remapping();
        // A new mapping traps no more at once, so that the leaf's state must change with it, whatever
        // happens then; one that is there already traps until it is unregistered.
        match found {
            Found::Zero => {
                self.host.map_anonymous(leaf)?;
                self.set_backing(leaf, Backing::Anonymous);
                area.set_map(leaf, LeafMap::Own);
                self.host.wake(leaf)?;
            }
            Found::Shared { block: Some(block), patches: None } if self.is_over_block(leaf, block) => {
                area.set_map(leaf, LeafMap::Block(block));
                self.host.unregister(leaf)?;
                self.set_backing(leaf, Backing::Block(block));
            }
            Found::Shared { block, patches } => {
                let map = block.map_or(LeafMap::Own, LeafMap::Block);
                area.set_map(leaf, map);
                let patches = patches.map_or_else(Vec::new, |cut| self.patches_of(cut, leaf));
                let mapped = self.host.map_block(leaf, block, &patches);
                mapped.inspect_err(|_| area.set_map(leaf, LeafMap::Unknown))?;
                self.set_backing(leaf, block.map_or(Backing::Anonymous, Backing::Block));
                self.host.wake(leaf)?;
            }
            Found::Lost | Found::Pending(_) => {
                // Who is woken by the poison must find out why.
                self.set_backing(leaf, Backing::Lost);
                self.host.poison(leaf).inspect_err(|_| self.set_backing(leaf, Backing::Trapped))?;
                return Err(SpaceError::Lost { gfn: leaf.first_gfn() });
            }
        }
        self.set_departed(leaf, false);
        self.counters.leaves_resolved.fetch_add(1, Ordering::Relaxed);
        if self.is_cut_reserved() {
            self.host.register(leaf, 1, super::Traps::Stores)?;
            self.set_registered(leaf, true);
        }
        Ok(())
    }

    /// Whether a trapped leaf lies over this block already: it was never mapped anew.
    fn is_over_block(&self, leaf: LeafNumber, block: CutId) -> bool {
        self.placeholder.get() == Some(&block) && !self.has_departed(leaf)
    }

    /// The VM is ending and its vCPUs have been told to stop: whoever waits for a page is freed. What
    /// it reads then is nothing that anybody looks at.
    ///
    /// # Errors
    /// The host refused.
    pub fn free_waiters(&self) -> Result<(), SpaceError> {
        for leaf in self.shape.leaves() {
            let _leaf = self.lock_leaf(leaf);
            let _remap = self.remapping();
            match self.backing(leaf) {
                Backing::Trapped => self.host.unregister(leaf)?,
                // What is protected stays so, for the clones; who waits there asks again.
                _ => self.host.wake(leaf)?,
            }
        }
        Ok(())
    }

    /// Maps all trapped leaves that can be found out without asking anybody: when all is published,
    /// every one that is not lost. Returns whether none is left.
    ///
    /// A touch that traps costs more than its fault: KVM resolves it as if
    /// it were a store (its asynchronous page faults ask for a writable page), so that the leaf gets a
    /// private page and loses its huge mapping.
    ///
    /// # Errors
    /// The space is being stopped, or the host refused.
    pub fn resolve_known(&self) -> Result<bool, SpaceError> {
        for leaf in self.shape.leaves().filter(|leaf| self.backing(*leaf) == Backing::Trapped) {
            if self.is_stopping() {
                return Err(SpaceError::Stopping);
            }
            self.resolve_if_known(leaf)?;
        }
        Ok(self.shape.leaves().all(|leaf| self.backing(leaf) != Backing::Trapped))
    }

    /// Maps a trapped leaf if what it holds can be found out without asking anybody.
    pub(super) fn resolve_if_known(&self, leaf: LeafNumber) -> Result<(), SpaceError> {
        match self.look_up(leaf) {
            Found::Pending(_) | Found::Lost => Ok(()),
            Found::Zero | Found::Shared { .. } => self.resolve_leaf(leaf),
        }
    }

    /// What the tables say of a leaf.
    pub(super) fn look_up(&self, leaf: LeafNumber) -> Found {
        let area = self.board.member(self.slot);
        area.walk(|base| resolve(&self.board, Entry::decode(base), leaf))
    }

    pub(super) fn patches_of(&self, cut: CutId, leaf: LeafNumber) -> Vec<Patch> {
        let patches = self.board.cut(cut).patches(leaf);
        (patches.first_frame..)
            .zip(patches.pages.iter())
            .map(|(frame, position)| Patch { position, cut, frame })
            .collect()
    }

    /// What the leaf holds, once that is known.
    fn find(&self, leaf: LeafNumber) -> Result<Found, SpaceError> {
        let mut patience = Some(Instant::now() + SOURCE_PATIENCE);
        loop {
            // First: the tables of a VM that has ended are no longer kept.
            if self.is_stopping() {
                return Err(SpaceError::Stopping);
            }
            let found = self.look_up(leaf);
            let Found::Pending(cut) = found else {
                return Ok(found);
            };
            let asked = self.board.cut(cut);
            asked.request(leaf);
            let source = self.board.member(asked.source());
            source.ring();
            self.host.wake_word(source.doorbell());
            let word = asked.raw(leaf);
            self.host.wait_word(word, 0, LOOK_AGAIN);
            if patience.is_some_and(|until| Instant::now() > until) && word.load(Ordering::Acquire) == 0 {
                patience = None;
                tracing::warn!(%cut, %leaf, source = asked.source(), "a source keeps its clone waiting");
            }
        }
    }
}
