//! The rows of the conformance table, in words: what is done, and what must be seen.
//!
//! The contract: a clone cannot be told from a deep copy of its source's memory, vCPUs and devices at
//! one instant (the cut), by any load of a vCPU of either or any access of a device of either, except
//! by time and memory. While a device holds a page of a VM, it sees every later store of that VM, the
//! VM sees every store of the device, and nobody else sees or causes any of it.
//!
//! P is the source, C its clone, G a clone of C.

/// (what they are about, [(row, what)]), group by group.
pub const ROWS: &[(&str, &[(&str, &str)])] = &[
    (
        "A. Copy-on-write",
        &[
            ("A1", "P writes after the fork: P has the new value, C the old one"),
            ("A2", "C writes after the fork: C has the new value, P the old one"),
            ("A3", "both write: each has its own"),
            ("A4", "both only read: nothing is copied (but a page whose first touch trapped)"),
            ("A5", "single bytes, words across pages, atomics, string stores: nothing else changes"),
            ("A6", "C writes and ends: P is as before, and so is what is used"),
            ("A7", "P ends: C has all it had, and goes on"),
            ("A8", "10,000 forks and ends: memory, tables, descriptors, threads, mappings as before"),
            ("A9", "a page that was never touched: zero in C, whatever P writes to it later"),
            ("A10", "two vCPUs store to two pages in order, forks at random: in C never the second alone"),
            ("A11", "P runs code in a page that it writes, and is forked at it: both go on rightly"),
            ("A12", "P's page tables change after the fork: C's do not"),
            ("A13", "a protection comes and goes between fork and store: as A1"),
            ("A14", "P is forked twice with stores between, and C is: each has its own cut"),
            ("A15", "a device's thread stores to two pages in order: in C never the second alone"),
        ],
    ),
    (
        "B. Pages in the host kernel's hands without a pin (vmsplice)",
        &[
            ("B1", "C hands a page over and discards it, P writes: the pipe has the old bytes"),
            ("B2", "P hands a page over, fork, C writes: the pipe has the old bytes"),
            ("B3", "fork, P hands a page over and discards it, C writes: the pipe has the old bytes"),
            ("B4", "P hands a page over, is forked, ends unpublished, C writes: the pipe has the old bytes"),
        ],
    ),
    (
        "C. Pins to read and write",
        &[
            ("C1", "P writes to a pinned page under protection: the device sees it, the page stays"),
            ("C2", "pin, fork, P writes: the device sees it, C does not"),
            ("C3", "pin, fork, C writes: neither device nor P sees it"),
            ("C4", "pin, fork, the device writes: P sees it, C does not"),
            ("C5", "K pages pinned: exactly K are copied in the pause, all others shared"),
            ("C6", "pin, fork, unpin, fork: the second fork copies nothing in the pause"),
            ("C7", "fork, P pins a shared page, its device writes: P sees it, C does not"),
            ("C8", "fork, C pins a shared page, its device writes: C sees it, P does not"),
            ("C9", "fork, both pin the same page: each device's stores are its own VM's"),
            ("C10", "pinned twice, unpinned once: still pinned at the fork"),
            ("C11", "what cannot be pinned or unpinned: refused by page number, nothing changed"),
            ("C12", "a never-touched page is pinned: the device sees zero, then P's stores"),
            ("C13", "P ends with the pin held: the device's page stays valid, C is unaffected"),
            ("C14", "discard, reset, dropping of a pinned page: refused, never silently detached"),
            ("C15", "everything is pinned: the fork copies all, and says so before and after"),
            ("C16", "a page is pinned right after a fork, with the clone alive or gone: published or reused"),
        ],
    ),
    (
        "D. Pins to read",
        &[
            ("D1", "fork, P pins to read and writes: the device sees it, C does not"),
            ("D2", "the same after C has ended"),
            (
                "D3",
                "a pin to read on an exclusive page under protection: the device sees P's store, uncopied",
            ),
            ("D4", "pin to read, fork, P writes: the device sees it, C does not"),
            ("D5", "a pin to read on a page restored from a file: the file does not change"),
        ],
    ),
    (
        "E. Tables and accounts",
        &[
            ("E1", "a fork takes one reference at the level at which it shares, and touches no page"),
            ("E2", "then P writes: only the nodes of the path are copied"),
            ("E3", "then C writes the same page: what is left has one owner, and is not copied"),
            ("E4", "then C writes another page: P is unaffected"),
            ("E5", "many clones of one cut: as many calls and nodes for each"),
            ("E6", "a pin in one leaf: its neighbours are shared all the same"),
            ("E7", "two vCPUs of P break one table, P and C break one at once: no entry is lost"),
            ("E8", "a VM ends while its sibling breaks a table: nothing leaks"),
            ("E9", "P discards 4 KiB or 2 MiB after a fork: zero in P, as before in C"),
            ("E10", "two regions of memory meet: handled at the edges, counted once"),
            ("E11", "memory by kind: what is told is what a recount finds, and sums up"),
        ],
    ),
    (
        "F. Families",
        &[
            ("F1", "P, C and G write in all orders: each sees its own"),
            ("F2", "a chain of 16 forks: isolated, and the last fork costs what the first did"),
            ("F3", "three VMs end in all orders, before and after publication: nothing is left"),
            ("F4", "C pins and is forked: G has a copy"),
            ("F5", "P is forked again before the first cut is published: each clone has its cut"),
            ("F6", "C is forked before it knows its own memory: G is as C was"),
            ("F7", "a guest forks itself: the call returns once in each"),
            ("F8", "C returns to its cut, again and again, with writes and pins between"),
        ],
    ),
    (
        "G. Huge pages",
        &[
            ("G1", "P writes 4 KiB of a lent huge leaf: right bytes, and P keeps its huge page"),
            ("G2", "an exclusive huge leaf is split without a write: exclusive still, and nothing copied"),
            ("G3", "a leaf half shared, half exclusive is made huge again: right bytes on both sides"),
            ("G4", "4 KiB of a huge leaf are pinned: that page is copied at the fork, no other"),
            ("G5", "a block is collapsed to a huge page while clones read it: no wrong byte"),
        ],
    ),
    (
        "H. Swap, movement, merging, poison",
        &[
            ("H1", "an exclusive page in swap, fork, either side reads and writes: as A1 and A2"),
            ("H2", "a lent page goes to swap before it is published: published rightly"),
            ("H3", "the host compacts memory during forks: no difference, and pinned pages stay"),
            ("H4", "equal pages: whatever is stored once, later writes are each VM's own"),
            ("H5", "frames are let go of and blocks written anew while clones run: no wrong byte"),
            ("H6", "memory is lost: who touches it is told, nobody else, and the colony goes on"),
        ],
    ),
    (
        "I. Devices at the cut",
        &[
            ("I1", "a disk read in flight: done in P, and once more in C"),
            ("I2", "a disk write in flight: P's disk gets P's bytes, C's disk never P's later ones"),
            ("I3", "registered buffers over 100 forks: always the same pages"),
            ("I4", "short pins at the highest rate with continuous forks: every checksum is right"),
            ("I5", "an interrupt pending at the cut: delivered once in P and once in C"),
            ("I6", "a buffer is unregistered with its transfer under way: the late bytes reach P only"),
            ("I7", "data, then its completion, forks at random: in C no completion without its data"),
        ],
    ),
    (
        "J. Races",
        &[(
            "J1",
            "pins, stores, loads, forks, ends, resets, discards, swap against each other: as in some order",
        )],
    ),
    (
        "K. Failure",
        &[
            ("K1", "each step of a fork fails once: an error, P goes on unchanged, nothing leaks"),
            ("K2", "the arena is full: the clone is stopped with an error, P is never corrupted"),
            ("K3", "the limit of mappings is near: no failure"),
            ("K4", "something is missing on the host: said, with what to do"),
            ("K5", "a clone's vCPU crashes: that VM stops with its state told, the family goes on"),
            ("K6", "the process is killed: no file, mount or shared memory is left"),
        ],
    ),
];

/// The names of all rows.
pub fn names() -> impl Iterator<Item = &'static str> {
    ROWS.iter().flat_map(|(_, rows)| rows.iter().map(|(row, _)| *row))
}
