//! Forks of an engine with transfers in flight: the memory is copied, the backing frozen.

use std::io::{Read, Write};

use super::*;

impl Machine {
    /// What a cut does: with the gate held, saves the engine and freezes the backing; the clone's
    /// state goes through bytes. The clone is not started.
    fn fork(&self, held: &HeldGate, clone_backing: Option<BackingKind>) -> Machine {
        self.fork_with(held, clone_backing, |_| ())
    }

    fn fork_with(
        &self,
        held: &HeldGate,
        clone_backing: Option<BackingKind>,
        change: impl FnOnce(&mut DmaState),
    ) -> Machine {
        let state = self.engine.save(held);
        let bytes = postcard::to_stdvec(&state).expect("a state is plain data");
        let mut state: DmaState = postcard::from_bytes(&bytes).expect("just serialised");
        change(&mut state);
        let backing = clone_backing.unwrap_or_else(|| match &self.backing {
            BackingKind::Storage(backing) => {
                let frozen = backing.freeze(held);
                let clone = Backing::restore(&frozen, None, self.files.clone());
                BackingKind::Storage(clone.expect("all files are there"))
            }
            BackingKind::Pipe(..) | BackingKind::Lost => BackingKind::Lost,
        });
        let (ram, files) = (Arc::new(self.ram.copy()), self.files.clone());
        let (line, gate) = (CountingLine::new(), CompletionGate::new());
        let (memory, interrupt) = (ram.clone(), line.clone());
        let engine = DmaEngine::restore(&state, memory, interrupt, backing.clone(), gate.clone());
        Machine { ram, line, gate, files, backing, engine }
    }

    fn read_back(&self, offset: u64, len_bytes: u32) -> Vec<u8> {
        let to = RAM_END - (1 << 20);
        let already = self.get(register::COMPLETED);
        let raised = self.line.raised(VECTOR);
        let number = self.submit(&descriptor(operation::READ, 0, len_bytes, offset, to));
        assert_eq!(number, already, "nothing else is in flight");
        self.line.wait(VECTOR, raised + 1);
        assert_eq!(self.status(number), status::OK);
        self.ram.bytes(to, crate::words::index(len_bytes.into()))
    }
}

fn pipe() -> (File, File) {
    let (read, write) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("two descriptors for a test");
    (read.into(), write.into())
}

/// A machine on pipes, with the far ends of both.
fn piped() -> (Machine, File, File) {
    let ((read, far_write), (far_read, write)) = (pipe(), pipe());
    let backing = BackingKind::Pipe(Arc::new(read), Arc::new(write));
    (Machine::with(Arc::default(), backing), far_read, far_write)
}

#[test]
fn with_the_gate_held_data_lands_and_nothing_is_completed() {
    let machine = Machine::new();
    let bytes = pattern(5, 70_000);
    machine.ram.set(DATA, &bytes);
    assert_eq!(machine.run(&descriptor(operation::WRITE, 0, 70_000, DATA, 0)), status::OK);
    for (n, flags) in (0..).zip(possible([0, flag::KERNEL])) {
        let held = machine.gate.hold();
        let to = DATA + 0x4_0000 * (n + 1);
        let first = machine.submit(&descriptor(operation::READ, flags, 70_000, 0, to));
        machine.until(|m| m.ram.bytes(to, bytes.len()) == bytes);
        // A second transfer goes on as well, though the first one waits.
        let second = machine.submit(&descriptor(operation::READ, flags, 8, 8, DATA));
        machine.until(|m| m.ram.bytes(DATA, 8) == bytes[8..16]);
        machine.ram.set(DATA, &bytes);
        assert_eq!(machine.status(first), status::PENDING);
        assert_eq!(machine.status(second), status::PENDING);
        assert_eq!(machine.get(register::COMPLETED), first);
        assert_eq!(machine.line.raised(VECTOR), crate::words::index(first));
        assert_eq!(machine.engine.save(&held).requests.len(), 2);
        drop(held);
        machine.wait(second + 1);
        assert_eq!((machine.status(first), machine.status(second)), (status::OK, status::OK));
        assert_eq!(machine.get(register::COMPLETED), second + 1);
    }
}

#[test]
fn both_sides_of_a_fork_complete_what_was_in_flight() {
    let sets = [0, flag::KERNEL, flag::REGISTERED, flag::REGISTERED | flag::KERNEL];
    for flags in possible(sets) {
        let source = Machine::new();
        assert_eq!(source.register_buffer(0, DATA, 0x10_0000), error::NONE);
        let (old, new) = (pattern(1, 50_000), pattern(2, 50_000));
        source.ram.set(DATA, &old);
        assert_eq!(source.run(&descriptor(operation::WRITE, flags, 50_000, DATA, 0)), status::OK);

        let held = source.gate.hold();
        source.ram.set(DATA, &new);
        let read = descriptor(operation::READ, flags, 50_000, 0, DATA + 0x4_0000);
        let read = source.submit(&read);
        source.until(|m| m.ram.bytes(DATA + 0x4_0000, old.len()) == old);
        let write = source.submit(&descriptor(operation::WRITE, flags, 50_000, DATA, 777));
        let clone = source.fork(&held, None);
        drop(held);
        source.wait(3);
        assert_eq!((source.status(read), source.status(write)), (status::OK, status::OK));

        // The clone's memory is its own from the cut on: its transfers use that.
        let own = pattern(4, 50_000);
        assert_eq!(clone.ram.bytes(DATA, new.len()), new);
        clone.ram.set(DATA, &own);
        clone.ram.set(DATA + 0x4_0000, &[0; 50_000]);
        assert_eq!((clone.engine.in_flight(), clone.ram.pins()), (2, 0));
        assert_eq!(clone.status(write), status::PENDING);
        clone.engine.start().expect("threads for a test");
        clone.wait(2);
        assert_eq!((clone.status(read), clone.status(write)), (status::OK, status::OK));
        assert_eq!(clone.get(register::COMPLETED), 3);
        assert_eq!(clone.ram.bytes(DATA + 0x4_0000, old.len()), old, "read from the frozen disk");

        for (machine, written) in [(&source, &new), (&clone, &own)] {
            let mut expected = old[..777].to_vec();
            expected.extend(written);
            assert_eq!(machine.read_back(0, 50_777), expected);
        }
        machine_pins(&source, 1);
        machine_pins(&clone, 1);
    }
}

/// Waits until only the slot's pin is left, then until none is.
fn machine_pins(machine: &Machine, expected: usize) {
    machine.until(|m| m.engine.pins_held() == expected);
    machine.engine.stop();
    assert_eq!((machine.engine.pins_held(), machine.ram.pins()), (0, 0));
}

#[test]
fn a_write_that_completes_after_the_cut_is_not_on_the_clones_disk() {
    let source = Machine::new();
    source.ram.set(DATA, &[1; 8192]);
    assert_eq!(source.run(&descriptor(operation::WRITE, 0, 8192, DATA, 0)), status::OK);
    source.ram.set(DATA, &[2; 8192]);
    let held = source.gate.hold();
    source.submit(&descriptor(operation::WRITE, 0, 8192, DATA, 0));
    // The clone forgets the request: it shall see the disk as it was.
    let clone = source.fork_with(&held, None, |state| {
        state.requests.clear();
        state.registers.completed = state.registers.tail;
    });
    drop(held);
    source.wait(2);
    assert_eq!(source.read_back(0, 8192), [2; 8192]);
    clone.engine.start().expect("threads for a test");
    assert_eq!(clone.read_back(0, 8192), [1; 8192]);
    assert_eq!(source.run(&descriptor(operation::WRITE, 0, 8192, DATA + 0x2_0000, 0)), status::OK);
    assert_eq!(clone.read_back(0, 8192), [1; 8192]);
}

#[test]
fn delayed_transfers_begin_anew_in_the_clone() {
    let source = Machine::new();
    let bytes = pattern(8, 1 << 20);
    source.ram.set(DATA, &bytes);
    source.set(register::DELAY_US, FOREVER_US);
    source.submit(&descriptor(operation::WRITE, 0, 1 << 20, DATA, 4096));
    source.submit(&descriptor(operation::COPY, 0, 4096, DATA, DATA + 0x20_0000));
    source.until(|m| m.engine.pins_held() == 3);
    let held = source.gate.hold();
    let clone = source.fork_with(&held, None, |state| state.registers.delay_us = 0);
    drop(held);
    // A clone of a clone that was never started has the same requests.
    let held = clone.gate.hold();
    let grandchild = clone.fork(&held, None);
    drop(held);
    for machine in [&clone, &grandchild] {
        machine.engine.start().expect("threads for a test");
        machine.wait(2);
        assert_eq!((machine.status(0), machine.status(1)), (status::OK, status::OK));
        assert_eq!(machine.ram.bytes(DATA + 0x20_0000, 4096), bytes[..4096]);
        assert_eq!(machine.read_back(4096, 1 << 20), bytes);
    }
    assert_eq!((source.status(0), source.status(1)), (status::PENDING, status::PENDING));
    source.engine.stop();
    assert_eq!(source.ram.pins(), 0);
}

#[test]
fn a_buffer_unregistered_in_flight_is_used_to_the_end_on_both_sides() {
    if !has_io_uring() {
        return;
    }
    let source = Machine::new();
    assert_eq!(source.register_buffer(3, DATA, 0x1_0000), error::NONE);
    let held = source.gate.hold();
    source.ram.set(DATA, &[6; 4096]);
    let mut write = descriptor(operation::WRITE, flag::REGISTERED | flag::KERNEL, 4096, DATA, 0);
    write.slot = 3;
    source.submit(&write);
    source.set(register::BUFFER_UNREGISTER, 3);
    assert_eq!(source.get(register::ERROR), error::NONE);
    assert_eq!(source.register_buffer(3, DATA + 0x1_0000, 0x1_0000), error::NONE);
    let clone = source.fork(&held, None);
    drop(held);
    clone.engine.start().expect("threads for a test");
    for machine in [&source, &clone] {
        machine.wait(1);
        assert_eq!(machine.status(0), status::OK);
        assert_eq!(machine.read_back(0, 4096), [6; 4096]);
        machine_pins(machine, 1);
    }
}

#[test]
fn a_clone_whose_buffer_cannot_be_pinned_says_so() {
    let source = Machine::new();
    assert_eq!(source.register_buffer(0, DATA, 0x1_0000), error::NONE);
    let held = source.gate.hold();
    source.submit(&descriptor(operation::READ, flag::REGISTERED, 64, 0, DATA));
    let clone = source.fork(&held, None);
    drop(held);
    clone.ram.refuse_pins();
    clone.engine.start().expect("threads for a test");
    clone.wait(1);
    assert_eq!(clone.status(0), status::INVALID);
    assert_eq!(clone.get(register::ERROR), error::PIN);
}

#[test]
fn a_pipe_decides_when_a_transfer_happens_and_is_lost_at_a_fork() {
    if !has_io_uring() {
        return;
    }
    let (source, mut far_read, mut far_write) = piped();
    let read = source.submit(&descriptor(operation::READ, 0, 5, 0, DATA));
    source.ram.set(DATA + 4096, b"there");
    let write = source.submit(&descriptor(operation::WRITE, 0, 5, DATA + 4096, 0));
    let mut there = [0; 5];
    far_read.read_exact(&mut there).expect("the engine writes");
    assert_eq!(&there, b"there");
    source.wait(1);
    assert_eq!((source.status(read), source.status(write)), (status::PENDING, status::OK));

    let held = source.gate.hold();
    let (_, storage) = storage();
    let clones = [source.fork(&held, None), source.fork(&held, Some(storage))];
    drop(held);
    far_write.write_all(b"he").expect("the engine reads");
    far_write.write_all(b"llo").expect("the engine reads");
    source.wait(2);
    assert_eq!(source.status(read), status::OK);
    assert_eq!((source.result(read), source.ram.bytes(DATA, 5)), (5, b"hello".to_vec()));

    let [lost, stored] = &clones;
    for clone in [lost, stored] {
        clone.engine.start().expect("threads for a test");
        clone.wait(1);
        assert_eq!(clone.status(read), status::LOST_AT_FORK);
        assert_eq!(clone.ram.bytes(DATA, 5), [0; 5]);
    }
    let again = descriptor(operation::READ, 0, 5, 0, DATA);
    let number = lost.submit(&again);
    lost.wait(2);
    assert_eq!(lost.status(number), status::LOST_AT_FORK);
    let number = stored.submit(&again);
    stored.wait(2);
    assert_eq!(stored.status(number), status::OK);
}

#[test]
fn the_end_of_a_pipe_fails_its_transfer() {
    if !has_io_uring() {
        return;
    }
    let (machine, _far_read, far_write) = piped();
    (&far_write).write_all(b"abc").expect("the pipe has room");
    drop(far_write);
    assert_eq!(machine.run(&descriptor(operation::READ, 0, 5, 0, DATA)), status::FAILED);
    assert_eq!(machine.result(0), 3);
}

#[test]
fn a_stop_cancels_the_kernels_transfers_and_then_unpins() {
    if !has_io_uring() {
        return;
    }
    for flags in [0, flag::REGISTERED] {
        let (machine, _far_read, _far_write) = piped();
        assert_eq!(machine.register_buffer(0, DATA, 0x1_0000), error::NONE);
        for n in 0..3 {
            machine.submit(&descriptor(operation::READ, flags, 64, 0, DATA + n * 64));
        }
        let in_kernel = |m: &Machine| lock(&m.engine.shared.kernel).is_some();
        machine.until(|m| in_kernel(m) && lock(&m.engine.shared.jobs).len() == 0);
        machine.engine.stop();
        assert_eq!((machine.engine.pins_held(), machine.ram.pins()), (0, 0));
        assert_eq!(machine.status(0), status::PENDING);
    }
}

#[test]
fn nonsense_from_the_guest_is_survived() {
    // A fixed linear congruential sequence: reproducible, no dependency.
    let mut state = 11_u64;
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) % below
    };
    let machine = Machine::new();
    for _ in 0..6000 {
        let tail = machine.get(register::DOORBELL);
        let plausible = |n: u64, base| [base + n * 512, n, u64::MAX - n, base][(n % 4) as usize];
        let garbled = Descriptor {
            operation: random(5) as u16,
            flags: random(10) as u16,
            length: [4096, 1 << 20, random(1 << 21) as u32, u32::MAX][random(4) as usize],
            source: plausible(random(1 << 12), RAM_BASE),
            destination: plausible(random(1 << 12), DATA),
            slot: random(18) as u32,
            reserved: u32::from(random(20) == 0),
            ..Descriptor::default()
        };
        machine.ram.set(RING + tail % ENTRIES * 64, &encode(&garbled));
        match random(8) {
            0 => machine.set(random(0x80), random(1 << 40)),
            1 => machine.set(register::DELAY_US, random(200)),
            2 => machine.set(register::BUFFER_BASE, RAM_BASE + random(1100) * 4096),
            3 => machine.set(register::BUFFER_LENGTH, random(80) * 4096),
            4 => machine.set(register::BUFFER_REGISTER, random(17)),
            5 => machine.set(register::BUFFER_UNREGISTER, random(17)),
            _ => machine.set(register::DOORBELL, tail + 1 + random(3)),
        }
        machine.set(register::RATE, 0);
        if random(4) == 0 {
            machine.until(|m| m.get(register::COMPLETED) == m.get(register::DOORBELL));
        }
        if machine.engine.in_flight() == 0 {
            machine.set(register::RING_BASE, RING);
        }
        // One more than the ring has, while a status is stored and not counted yet.
        assert!(machine.engine.in_flight() <= crate::words::index(ENTRIES) + 1);
    }
    machine.until(|m| m.get(register::COMPLETED) == m.get(register::DOORBELL));
    let counters = machine.engine.counters();
    assert!(counters.transfers > 50 && counters.failed > 50, "{counters:?}");
    machine.engine.stop();
    assert_eq!((machine.engine.pins_held(), machine.ram.pins()), (0, 0));
}
