//! What the host's kernel does with pages behind a window's back: swap, and moves to other frames.
#![expect(unsafe_code, reason = "gives advice on raw addresses of a window")]

use super::nursery::Vm;
use crate::words::{LEAF_BYTES, LeafNumber};

/// Has the host swap a leaf's pages out, as far as it can: without swap it cannot.
pub(super) fn page_out(vm: &Vm, leaf: LeafNumber) -> bool {
    advise(vm, leaf, libc::MADV_PAGEOUT)
}

/// Has the host move a leaf's pages into one huge page, if it can: it does not where they are trapped,
/// or held by its own devices.
pub(super) fn collapse(vm: &Vm, leaf: LeafNumber) -> bool {
    advise(vm, leaf, libc::MADV_COLLAPSE)
}

fn advise(vm: &Vm, leaf: LeafNumber, advice: libc::c_int) -> bool {
    let address = vm.window().host_address(leaf.gpa()).as_ptr();
    // SAFETY: the range is a leaf of a living window; neither advice changes a byte of it.
    unsafe { libc::madvise(address.cast(), LEAF_BYTES, advice) == 0 }
}
