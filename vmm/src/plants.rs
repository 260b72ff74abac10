//! Faults that tests plant in the rules of the memory manager and of the pool, to prove that they can
//! convict.
//!
//! Each [`Plant`] breaks one rule at the one place that keeps it. Where a rule is kept, the code asks
//! [`is_planted`]; in a build that is no test that is the constant `false`, and nothing is left of it.
//! A test plants a fault for its own thread, by `plant`, and expects that the model, the checker or a
//! simulated host convicts: `space::tests::model`, and `space::tests::races` for what takes two threads;
//! `keeper::pool` has its own.

/// A broken rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plant {
    /// A pin does not make its pages exclusive first.
    PinWithoutUnshare,
    /// A pin more is not counted in the sum.
    PinUncounted,
    /// Who discards does not see the pins.
    DiscardSeesNoPin,
    /// Who resets does not see the pins.
    ResetSeesNoPin,
    /// A pin comes to be without keeping cuts out meanwhile.
    PinOutsideRemap,
    /// A cut copies no pinned page.
    PinnedNotCopied,
    /// What is swapped out is not lent.
    LentForgetsSwapped,
    /// Pages without a protection are lent too: what was written after the cut.
    UnprotectedIsLent,
    /// What is lent to earlier cuts is not recorded before a new protection blurs it.
    LentNotRecorded,
    /// What a store makes exclusive while its block is being protected is not looked for.
    StoresMeanwhileUnseen,
    /// The markers that a protection leaves over a block are taken for pages.
    MarkersAreLent,
    /// A leaf of one cut is said to be as in the cut before, whatever the two lent sets are.
    UnequalSetsAreOneBlock,
    /// The same where a page was pinned at one of the cuts.
    PinnedSetsAreOneBlock,
    /// A source puts its block in the place of pages that the block has not.
    DropsMoreThanLent,
    /// A protection is taken off while a cut waits for the pages under it.
    OpensWhilePending,
    /// Whether a new cut waits is not looked at again before a protection is taken off.
    OpensWithoutALook,
    /// A leaf is forced without its lock.
    ForceWithoutLock,
    /// A leaf that another thread has found out meanwhile is mapped once more.
    MapsTwice,
    /// Who waits for a leaf is not woken.
    WakesNobody,
    /// A source says that a leaf is its own until its block has taken the place.
    DropsBeforeItSays,
    /// A leaf that maps something else than at the beginning is taken for one that does not.
    DepartureForgotten,
    /// Lent pages are left out of the sums.
    LentUncounted,
    /// A harvest takes markers for pages of the VM's own.
    MarkersAreOwned,
    /// Requests are taken by a load and a store.
    RequestsTakenTwice,
    /// A cut is said to be settled before its table is.
    SettledBeforeTable,
    /// Lost pages read as zeros.
    LostIsZero,
    /// A node with several referrers is edited in place.
    SharedNodeEdited,
    /// A leaf record takes no reference on its frames.
    FramesUncounted,
    /// An entry takes no reference on its cut.
    CutUncounted,
    /// A cut that only tables name is declared unneeded.
    UnneededTooEarly,
    /// A cut that was declared unneeded gets one more clone.
    UnneededTakesClones,
    /// A settled leaf has lost its patches.
    SettleForgetsPatches,
    /// A block that a window maps is freed.
    MappedBlockFreed,
    /// A VM's tables lose what its window does not have itself.
    TrimsWhatIsNotOwned,
    /// The leaves that a killed source had not published stay pending.
    DeathIsSilent,
    /// A clone takes no reference on what it may return to.
    OriginUncounted,
    /// What one VM owns is shared by a cut.
    OwnedIsShared,
    /// Tables that somebody walks are used again.
    ReclaimsUnderWalkers,
    /// Who takes a member from the pool leaves it there for a moment.
    PoolHandsOutTwice,
    /// A member that is given back to a pool that is full is forgotten.
    PoolLosesMember,
    /// Nobody is told that a member has come into the pool.
    PoolTellsNobody,
    /// Who finds no place for another member does not look whether one has become ready meanwhile.
    PoolOverlooksReady,
    /// A member that dies in the pool stays in it.
    PoolKeepsDead,
}

/// Whether a fault is planted: never, but in a test that says so.
#[cfg(not(test))]
pub(crate) const fn is_planted(_plant: Plant) -> bool {
    false
}

#[cfg(test)]
pub(crate) use self::planting::{is_planted, plant};

#[cfg(test)]
mod planting {
    use std::cell::Cell;

    use super::Plant;

    impl Plant {
        /// What one thread can find by itself.
        pub(crate) const OF_ONE_THREAD: [Self; 28] = [
            Self::PinWithoutUnshare,
            Self::PinUncounted,
            Self::DiscardSeesNoPin,
            Self::ResetSeesNoPin,
            Self::PinnedNotCopied,
            Self::LentForgetsSwapped,
            Self::UnprotectedIsLent,
            Self::LentNotRecorded,
            Self::MarkersAreLent,
            Self::UnequalSetsAreOneBlock,
            Self::PinnedSetsAreOneBlock,
            Self::DropsMoreThanLent,
            Self::OpensWhilePending,
            Self::DepartureForgotten,
            Self::LentUncounted,
            Self::MarkersAreOwned,
            Self::LostIsZero,
            Self::SharedNodeEdited,
            Self::FramesUncounted,
            Self::CutUncounted,
            Self::UnneededTooEarly,
            Self::UnneededTakesClones,
            Self::SettleForgetsPatches,
            Self::MappedBlockFreed,
            Self::TrimsWhatIsNotOwned,
            Self::DeathIsSilent,
            Self::OriginUncounted,
            Self::OwnedIsShared,
        ];
        /// What goes wrong between threads alone.
        pub(crate) const OF_THREADS: [Self; 10] = [
            Self::MapsTwice,
            Self::StoresMeanwhileUnseen,
            Self::PinOutsideRemap,
            Self::OpensWithoutALook,
            Self::ForceWithoutLock,
            Self::WakesNobody,
            Self::DropsBeforeItSays,
            Self::RequestsTakenTwice,
            Self::SettledBeforeTable,
            Self::ReclaimsUnderWalkers,
        ];
        /// What goes wrong between those who use the pool.
        pub(crate) const OF_THE_POOL: [Self; 5] = [
            Self::PoolHandsOutTwice,
            Self::PoolLosesMember,
            Self::PoolTellsNobody,
            Self::PoolOverlooksReady,
            Self::PoolKeepsDead,
        ];
    }

    // Every fault is in one of the three.
    const _: () = assert!(
        Plant::OF_ONE_THREAD.len() + Plant::OF_THREADS.len() + Plant::OF_THE_POOL.len()
            == Plant::PoolKeepsDead as usize + 1
    );

    thread_local! {
        static PLANTED: Cell<Option<Plant>> = const { Cell::new(None) };
    }

    /// Whether this thread runs with that fault.
    pub(crate) fn is_planted(plant: Plant) -> bool {
        PLANTED.get() == Some(plant)
    }

    /// What this thread does has that fault, until the value is dropped.
    pub(crate) fn plant(plant: Option<Plant>) -> impl Drop {
        PLANTED.set(plant);
        Planted
    }

    struct Planted;

    impl Drop for Planted {
        fn drop(&mut self) {
            PLANTED.set(None);
        }
    }
}
