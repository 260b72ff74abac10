//! Segment registers that all entries have in common: flat, whatever the ring and the width.

use kvm_bindings::{kvm_segment, kvm_sregs};

/// A data segment over all addresses, for ring 0.
pub(super) fn flat_data(selector: u16) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    }
}

/// A code segment beside a data segment: of its ring, 32-bit.
pub(super) fn code_beside(data: kvm_segment, selector: u16) -> kvm_segment {
    kvm_segment { selector, type_: 11, ..data }
}

/// The same, 64-bit.
pub(super) fn long_code_beside(data: kvm_segment, selector: u16) -> kvm_segment {
    kvm_segment { db: 0, l: 1, ..code_beside(data, selector) }
}

/// A busy task state.
pub(super) fn task(selector: u16, base: u64, limit: u32) -> kvm_segment {
    kvm_segment { base, limit, selector, type_: 11, present: 1, ..kvm_segment::default() }
}

/// `base` with these segments.
pub(super) fn with_segments(
    base: kvm_sregs,
    code: kvm_segment,
    data: kvm_segment,
    task: kvm_segment,
) -> kvm_sregs {
    kvm_sregs { cs: code, ds: data, es: data, fs: data, gs: data, ss: data, tr: task, ..base }
}
