//! Rows B of the conformance table: pages that are in the host kernel's hands without a pin, as
//! `vmsplice` puts them there. The pipe is the test's own: it outlives the VM.

use std::os::fd::{AsFd as _, OwnedFd};

use rustix::pipe::{PipeFlags, pipe_with};
use salp::family::VmId;
use salp::member::messages::{GuestKind, Order, Reply};
use salp::words::PAGE_BYTES;
use salp_tests::axes::MEMORY;
use salp_tests::both_guests;
use salp_tests::row::{NEW, Row, run};

both_guests! {
    b1_the_clone_hands_over_and_discards;
    b2_the_source_hands_over_before_the_fork;
    b3_the_source_hands_over_and_discards;
    b4_the_source_hands_over_and_ends;
}

/// A page on its way through a pipe.
struct Handed(OwnedFd);

impl Handed {
    /// `vm` hands the row's page over.
    #[track_caller]
    fn by(row: &Row, vm: VmId) -> Self {
        let (out, into) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
        let order = Order::HandOver { gfn: row.page };
        match row.world.member(vm).ask(order, &[into.as_fd()]) {
            Ok(Reply::Done) => Self(out),
            other => panic!("{vm} hands {} over: {other:?}: {}", row.page, row.point),
        }
    }

    /// What comes out of the pipe: all of the page.
    #[track_caller]
    fn expect(self, row: &Row, value: u64) {
        let mut bytes = vec![0; PAGE_BYTES];
        let mut got = 0;
        while got < PAGE_BYTES {
            match rustix::io::read(&self.0, &mut bytes[got..]).expect("the pipe has a page") {
                0 => panic!("the pipe ends after {got} bytes: {}", row.point),
                more => got += more,
            }
        }
        let mut expected = vec![0; PAGE_BYTES];
        expected[..8].copy_from_slice(&value.to_le_bytes());
        let at = (0..PAGE_BYTES).find(|at| bytes[*at] != expected[*at]);
        assert_eq!(at, None, "the pipe has {:x?} where {value:#x} was: {}", &bytes[..8], row.point);
    }
}

fn discard(row: &Row, vm: VmId) {
    row.world.tell(vm, Order::Discard { first: row.page, pages: 1 });
}

fn b1_the_clone_hands_over_and_discards(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let child = row.fork_and_publish();
        let handed = Handed::by(row, child);
        discard(row, child);
        row.store(row.parent, NEW);
        handed.expect(row, row.old);
        row.expect(row.parent, NEW);
        row.expect(child, 0);
    });
}

fn b2_the_source_hands_over_before_the_fork(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let handed = Handed::by(row, row.parent);
        let child = row.fork_and_publish();
        row.store(child, NEW);
        handed.expect(row, row.old);
        row.expect(row.parent, row.old);
        row.expect(child, NEW);
    });
}

fn b3_the_source_hands_over_and_discards(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let child = row.fork_and_publish();
        let handed = Handed::by(row, row.parent);
        discard(row, row.parent);
        row.store(child, NEW);
        handed.expect(row, row.old);
        row.expect(row.parent, 0);
        row.expect(child, NEW);
    });
}

fn b4_the_source_hands_over_and_ends(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let handed = Handed::by(row, row.parent);
        let child = row.fork_and_publish();
        row.world.end(row.parent);
        row.store(child, NEW);
        handed.expect(row, row.old);
        row.expect(child, NEW);
    });
}
