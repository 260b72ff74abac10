//! What a fork is to make: how many clones, what each is told of itself, and what came of it.

use std::collections::BTreeMap;
use std::num::NonZero;

use super::ColonyError;
use crate::devices::identity::Identity;
use crate::family::VmId;

/// One clone that is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CloneSpec {
    /// Its name; without one the colony makes one up of its number.
    pub name: Option<String>,
    /// Which one it is of those that are made together.
    pub index: u32,
    /// What it is told, see [`Identity::data`].
    pub data: BTreeMap<String, String>,
    /// Whether its vCPUs wait for [`Colony::resume`](super::Colony::resume), and no device of it completes
    /// anything before that.
    pub is_paused: bool,
}

impl CloneSpec {
    /// What the clone is told of itself. A name that is made up is not longer than any.
    pub(super) fn identity(&self, vm: VmId) -> Identity {
        Identity {
            name: self.name.clone().unwrap_or_else(|| made_up_name(vm)),
            index: self.index,
            data: self.data.clone(),
        }
    }
}

/// What a VM is called that was given no name.
pub(super) fn made_up_name(vm: VmId) -> String {
    format!("vm-{}", vm.0)
}

/// A process that is made waits for others part of the time: with four at the same time 40 clones of KVM were
/// there in two thirds of the time.
const AT_ONCE: NonZero<usize> = NonZero::new(4).expect("it is 4");

/// The clones that are wanted of one cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForkSpec {
    /// Each of them.
    pub clones: Vec<CloneSpec>,
    /// How many processes are made at the same time, beyond those that are ready.
    pub at_once: NonZero<usize>,
    /// Whether there are to be all of them or none: otherwise those that can be had.
    pub is_all_or_none: bool,
}

impl ForkSpec {
    /// `count` clones that run at once, without names or data, numbered from 0: all of them or none.
    #[must_use]
    pub fn plain(count: usize) -> Self {
        let clone = |index| CloneSpec { index, ..CloneSpec::default() };
        Self { clones: (0..).take(count).map(clone).collect(), ..Self::of(Vec::new(), true) }
    }

    /// As many of `clones` as can be had.
    #[must_use]
    pub fn each(clones: Vec<CloneSpec>) -> Self {
        Self::of(clones, false)
    }

    fn of(clones: Vec<CloneSpec>, is_all_or_none: bool) -> Self {
        Self { clones, at_once: AT_ONCE, is_all_or_none }
    }

    /// Nothing in it can be refused by a clone later.
    pub(super) fn check(&self) -> Result<(), ColonyError> {
        Ok(self.clones.iter().try_for_each(|clone| clone.identity(VmId(u32::MAX)).check())?)
    }
}

/// A clone that could not be had.
#[derive(Debug)]
pub struct Missing {
    /// Its place among those that were wanted.
    pub position: usize,
    /// Why.
    pub error: ColonyError,
}
