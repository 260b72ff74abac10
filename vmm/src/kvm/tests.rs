//! Tests that run guests. Without a usable `/dev/kvm` they say so and do nothing.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvm_bindings::{KVM_MP_STATE_HALTED, kvm_regs};
use salp_protocol::{call, port};

use super::guest::{self, MMIO, Ram, Ring, VECTOR, counter, start};
use super::kick::{StopSignal, Woken};
use super::*;
use crate::words::{Gpa, wide};

/// Generous: only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(20);

macro_rules! kvm_or_skip {
    () => {
        match Kvm::open() {
            Ok(kvm) => kvm,
            Err(error) => {
                eprintln!("SKIPPED: {}: {error}", module_path!());
                return;
            }
        }
    };
}

/// What a call of the test guest is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reply {
    Value(u64),
    Nothing,
}

/// The machine of the test guests: counts what it is asked, checks nothing itself.
struct Bench {
    ram: Arc<Ram>,
    /// Every exit in order: kind, address, value.
    log: Mutex<Vec<(&'static str, u64, u64)>>,
    /// Reads of port 0x20 per vCPU: the value read is their count.
    reads: [AtomicU64; 2],
    writes: [AtomicU64; 2],
    mmio: [AtomicU64; 2],
    /// What the next call returns; empty: the call blocks.
    reply: Mutex<Reply>,
    calls: Mutex<Sender<u32>>,
    ends: Mutex<Sender<(usize, End)>>,
}

struct Ears {
    calls: Receiver<u32>,
    ends: Receiver<(usize, End)>,
}

impl Ears {
    fn end(&self) -> End {
        self.ends.recv_timeout(PATIENCE).expect("the guest ends").1
    }
}

impl Bench {
    fn new(ram: &Arc<Ram>) -> (Arc<Self>, Ears) {
        let (calls, heard_calls) = channel();
        let (ends, heard_ends) = channel();
        let bench = Self {
            ram: Arc::clone(ram),
            log: Mutex::default(),
            reads: Default::default(),
            writes: Default::default(),
            mmio: Default::default(),
            reply: Mutex::new(Reply::Nothing),
            calls: Mutex::new(calls),
            ends: Mutex::new(ends),
        };
        (
            Arc::new(bench),
            Ears {
                calls: heard_calls,
                ends: heard_ends,
            },
        )
    }

    /// A machine in the same state, over other memory.
    fn fork(&self, ram: &Arc<Ram>) -> (Arc<Self>, Ears) {
        let (clone, ears) = Self::new(ram);
        for (to, from) in [
            (&clone.reads, &self.reads),
            (&clone.writes, &self.writes),
            (&clone.mmio, &self.mmio),
        ] {
            for (to, from) in to.iter().zip(from) {
                to.store(from.load(Ordering::SeqCst), Ordering::SeqCst);
            }
        }
        (clone, ears)
    }

    fn note(&self, kind: &'static str, at: u64, data: &[u8]) {
        let value = data
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte));
        self.log.lock().expect("no panic").push((kind, at, value));
    }

    fn answer(&self, registers: &mut CallRegisters, stop: &StopSignal) -> Option<CallOutcome> {
        let reply = std::mem::replace(&mut *self.reply.lock().expect("no panic"), Reply::Nothing);
        if let Reply::Value(value) = reply {
            registers.rax = value;
            registers.rdi = value;
            return Some(CallOutcome::Return);
        }
        assert_eq!(
            stop.wait(None, Some(PATIENCE)),
            Woken::Stop,
            "nobody stopped the call"
        );
        None
    }
}

impl Machine for Bench {
    fn pio_read(&self, vcpu: usize, port: u16, data: &mut [u8]) {
        assert!(
            data.iter().all(|byte| *byte == 0xff),
            "an unanswered read is all ones"
        );
        if port == 0x20 {
            let count = self.reads[vcpu].fetch_add(1, Ordering::SeqCst) + 1;
            data.copy_from_slice(&count.to_le_bytes()[..data.len()]);
        } else {
            data.fill(0x5a);
        }
        self.note("in", port.into(), data);
    }

    fn pio_write(&self, vcpu: usize, port: u16, data: &[u8]) -> Flow {
        self.note("out", port.into(), data);
        self.writes[vcpu].fetch_add(1, Ordering::SeqCst);
        match data.try_into().map(u32::from_le_bytes) {
            Ok(status) if port == port::EXIT => Flow::Exit(status),
            _ => Flow::Continue,
        }
    }

    fn mmio_read(&self, vcpu: usize, gpa: Gpa, data: &mut [u8]) {
        let value = self.mmio[vcpu].load(Ordering::SeqCst).to_le_bytes();
        data.copy_from_slice(&value[..data.len()]);
        self.note("load", gpa.0, data);
    }

    fn mmio_write(&self, vcpu: usize, gpa: Gpa, data: &[u8]) -> Flow {
        self.note("store", gpa.0, data);
        let mut value = [0; 8];
        value[..data.len()].copy_from_slice(data);
        self.mmio[vcpu].store(u64::from_le_bytes(value), Ordering::SeqCst);
        Flow::Continue
    }

    fn call(
        &self,
        _: usize,
        number: u32,
        registers: &mut CallRegisters,
        stop: &StopSignal,
    ) -> CallOutcome {
        self.calls
            .lock()
            .expect("no panic")
            .send(number)
            .expect("the test listens");
        let interrupted = match number {
            call::FORK => CallOutcome::InterruptedWith(call::AGAIN),
            _ => CallOutcome::Interrupted,
        };
        self.answer(registers, stop).unwrap_or(interrupted)
    }

    fn resume_call(
        &self,
        _: usize,
        number: u32,
        registers: &mut CallRegisters,
        stop: &StopSignal,
    ) -> CallOutcome {
        assert_eq!(number, call::FORK, "only forks stay open");
        self.answer(registers, stop)
            .unwrap_or(CallOutcome::InterruptedWith(call::AGAIN))
    }

    fn ended(&self, vcpu: usize, end: End) {
        self.ends
            .lock()
            .expect("no panic")
            .send((vcpu, end))
            .expect("the test listens");
    }

    fn read_memory(&self, gpa: Gpa, bytes: &mut [u8]) -> bool {
        self.ram.read(gpa, bytes);
        true
    }
}

/// A test VM with its threads, parked at the program's start.
struct Setup {
    // In the order in which they must go.
    threads: Vec<VcpuThread>,
    vm: Vm,
    bench: Arc<Bench>,
    ears: Ears,
    ram: Arc<Ram>,
}

impl Setup {
    fn new(kvm: &Kvm, program: &[u8], vcpus: u8, irqchip: Irqchip, ring: Ring) -> Self {
        let ram = Arc::new(Ram::new(program));
        let (bench, ears) = Bench::new(&ram);
        let (vm, vcpus) = ram.vm(kvm, vcpus, irqchip);
        for vcpu in &vcpus {
            start(vcpu, ring);
        }
        Self::assemble(vm, vcpus, bench, ears, ram)
    }

    fn assemble(vm: Vm, vcpus: Vec<Vcpu>, bench: Arc<Bench>, ears: Ears, ram: Arc<Ram>) -> Self {
        let spawn = |vcpu| {
            let machine: Arc<dyn Machine> = bench.clone();
            VcpuThread::spawn(vcpu, machine).expect("a thread")
        };
        let threads = vcpus.into_iter().map(spawn).collect();
        Self {
            threads,
            vm,
            bench,
            ears,
            ram,
        }
    }

    fn user(kvm: &Kvm, program: &[u8]) -> Self {
        Self::new(kvm, program, 1, Irqchip::Split, Ring::User)
    }

    fn resume(&self) {
        resume_all(&self.threads).expect("stopped before");
    }

    fn stop(&self) {
        stop_all(&self.threads, PATIENCE).expect("all stop");
    }

    fn log(&self) -> Vec<(&'static str, u64, u64)> {
        self.bench.log.lock().expect("no panic").clone()
    }

    fn reply(&self, reply: Reply) {
        *self.bench.reply.lock().expect("no panic") = reply;
    }

    fn exit(&self) -> u32 {
        match self.ears.end() {
            End::Exit(status) => status,
            other => panic!("{other}"),
        }
    }

    /// A second VM with a copy of the memory and the saved states, by way of their bytes.
    fn fork(&self, kvm: &Kvm) -> Self {
        let bytes = |state: &VcpuState| postcard::to_stdvec(state).expect("plain data");
        let saved: Vec<_> = self
            .threads
            .iter()
            .map(|thread| bytes(&thread.save().expect("stopped")))
            .collect();
        let vm_state = postcard::to_stdvec(&self.vm.save().expect("stopped")).expect("plain data");
        let ram = Arc::new(self.ram.copy());
        let (bench, ears) = self.bench.fork(&ram);
        let count = u8::try_from(saved.len()).expect("two at most");
        let (vm, vcpus) = ram.vm(kvm, count, self.vm.irqchip());
        vm.set(&postcard::from_bytes(&vm_state).expect("its own bytes"))
            .expect("set");
        for (vcpu, saved) in vcpus.iter().zip(&saved) {
            vcpu.set(&postcard::from_bytes(saved).expect("its own bytes"))
                .expect("set");
        }
        Self::assemble(vm, vcpus, bench, ears, ram)
    }

    /// What must hold of a stopped COUNT guest: memory, registers and the machine agree.
    fn check_count(&self) -> Vec<u64> {
        let check = |thread: &VcpuThread| {
            let vcpu = thread.index();
            let kvm_regs { rbx, r9, .. } = thread.save().expect("stopped").regs;
            let memory = self.ram.load(counter(vcpu));
            assert!(
                memory == rbx || memory + 1 == rbx,
                "vcpu {vcpu}: rbx {rbx}, memory {memory}"
            );
            let reads = self.bench.reads[vcpu].load(Ordering::SeqCst);
            let writes = self.bench.writes[vcpu].load(Ordering::SeqCst);
            assert_eq!(reads, r9, "vcpu {vcpu}: a port read was lost or done twice");
            assert!(
                writes == r9 || writes + 1 == r9,
                "vcpu {vcpu}: {writes} of {r9} writes"
            );
            assert!(
                rbx / 4096 == r9 || rbx / 4096 == r9 + 1,
                "vcpu {vcpu}: {rbx} rounds, {r9}"
            );
            rbx
        };
        self.threads.iter().map(check).collect()
    }

    fn finish_count(&self) {
        self.ram.store(Gpa(guest::FLAG), 1);
        for _ in &self.threads {
            let status = self.exit();
            let counted = |reads: &AtomicU64| reads.load(Ordering::SeqCst) == u64::from(status);
            assert!(
                self.bench.reads.iter().any(counted),
                "exit with {status:#x}"
            );
        }
        self.stop();
        for thread in &self.threads {
            let rbx = thread.save().expect("stopped").regs.rbx;
            assert_eq!(rbx, self.ram.load(counter(thread.index())));
        }
    }
}

#[test]
fn exits_reach_the_machine_in_order_and_are_counted() {
    let kvm = kvm_or_skip!();
    let ram = Setup::new(&kvm, guest::EXITS, 1, Irqchip::Split, Ring::User);
    let mut state = ram.threads[0].save().expect("parked");
    state.regs.rdi = MMIO;
    ram.threads[0].set(&state).expect("parked");
    ram.resume();
    assert_eq!(ram.exit(), 0x1122_335a);
    let expected = [
        ("out", 0x10, 0x44),
        ("out", 0x10, 0x3344),
        ("out", 0x10, 0x1122_3344),
        ("in", 0x10, 0x5a),
        ("store", MMIO, 0x1122_335a),
        ("load", MMIO, 0x1122_335a),
        ("out", port::EXIT.into(), 0x1122_335a),
    ];
    assert_eq!(ram.log(), expected);
    ram.stop();
    let exits = ram.threads[0].exits();
    assert_eq!((exits.pio_reads, exits.pio_writes), (1, 4));
    assert_eq!((exits.mmio_reads, exits.mmio_writes), (1, 1));
    let stats = ram.threads[0].stats().expect("kernel 5.14 or later");
    assert!(stats["exits"] >= 7, "{stats:?}");
    assert!(stats.contains_key("pf_taken"));
    assert!(!stats::stats(&ram.vm).expect("of the VM").is_empty());
}

#[test]
fn two_hundred_stops_lose_nothing() {
    let kvm = kvm_or_skip!();
    let setup = Setup::user(&kvm, guest::COUNT);
    let mut seed = 0x9e37_79b9_u64;
    for _ in 0..200 {
        setup.resume();
        seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        // A random moment: a stop at once, within an exit, or in the loop.
        let until = std::time::Instant::now() + Duration::from_micros(seed >> 53);
        while std::time::Instant::now() < until {
            std::hint::spin_loop();
        }
        setup.stop();
        let times = setup.threads[0].times();
        assert!(times.requested_ns <= times.stopped_ns, "{times:?}");
        setup.check_count();
    }
    setup.resume();
    setup.finish_count();
}

#[test]
fn a_saved_state_goes_on_in_another_vm() {
    let kvm = kvm_or_skip!();
    for vcpus in [1, 2] {
        let source = Setup::new(&kvm, guest::COUNT, vcpus, Irqchip::Split, Ring::User);
        source.resume();
        while source.bench.reads[0].load(Ordering::SeqCst) < 3 {
            std::thread::yield_now();
        }
        source.stop();
        let at_cut = source.check_count();
        let clone = source.fork(&kvm);
        assert_eq!(clone.check_count(), at_cut);
        source.resume();
        clone.resume();
        clone.finish_count();
        source.stop();
        let later = source.check_count();
        assert!(
            later.iter().sum::<u64>() > at_cut.iter().sum(),
            "the source went on"
        );
        source.resume();
        source.finish_count();
        let times = source.threads[0].times();
        assert!(times.resumed_ns <= times.entered_ns && times.entered_ns <= times.first_exit_ns);
    }
}

#[test]
fn two_vcpus_stop_together() {
    let kvm = kvm_or_skip!();
    let setup = Setup::new(&kvm, guest::COUNT, 2, Irqchip::Full, Ring::User);
    for _ in 0..20 {
        setup.resume();
        let before = setup.bench.reads[1].load(Ordering::SeqCst);
        while setup.bench.reads[1].load(Ordering::SeqCst) == before {
            std::thread::yield_now();
        }
        setup.stop();
        setup.check_count();
    }
    setup.resume();
    setup.finish_count();
}

#[test]
fn the_full_irqchip_is_saved_with_the_vm() {
    let kvm = kvm_or_skip!();
    let setup = Setup::new(&kvm, guest::COUNT, 1, Irqchip::Full, Ring::User);
    setup
        .vm
        .set_irq_line(5, Level::High)
        .expect("the full irqchip has pins");
    let clone = setup.fork(&kvm);
    let state = |setup: &Setup| setup.vm.save().expect("stopped");
    let devices = |setup: &Setup| postcard::to_stdvec(&state(setup).devices).expect("plain data");
    let untouched = Setup::new(&kvm, guest::COUNT, 1, Irqchip::Full, Ring::User);
    assert_ne!(
        devices(&setup),
        devices(&untouched),
        "the pin is part of the state"
    );
    let split = Setup::user(&kvm, guest::COUNT);
    assert!(matches!(
        split.vm.set(&state(&setup)),
        Err(KvmError::WrongIrqchip { .. })
    ));
    assert!(split.vm.set_irq_line(5, Level::High).is_err());
    assert!(state(&clone).clock_ns >= state(&untouched).clock_ns.min(1));
}

#[test]
fn an_interrupted_call_is_made_again() {
    let kvm = kvm_or_skip!();
    let setup = Setup::user(&kvm, guest::CALLS);
    let mut state = setup.threads[0].save().expect("parked");
    state.regs.rbx = counter(0).0;
    setup.threads[0].set(&state).expect("parked");
    setup.reply(Reply::Value(5));
    setup.resume();
    let calls = &setup.ears.calls;
    // The first is answered, the second blocks and is interrupted, in the source and in the clone.
    for _ in 0..2 {
        assert_eq!(calls.recv_timeout(PATIENCE), Ok(call::NEXT));
    }
    setup.stop();
    let saved = setup.threads[0].save().expect("stopped");
    assert_eq!((saved.regs.rax, saved.regs.r12), (call::AGAIN, 5));
    assert_eq!(setup.threads[0].open_call().expect("stopped"), None);
    let clone = setup.fork(&kvm);
    clone.reply(Reply::Value(0));
    clone.resume();
    assert_eq!(clone.exit(), 5);
    setup.reply(Reply::Value(37));
    setup.resume();
    for _ in 0..2 {
        assert_eq!(calls.recv_timeout(PATIENCE), Ok(call::NEXT));
    }
    setup.stop();
    setup.reply(Reply::Value(0));
    setup.resume();
    assert_eq!(setup.exit(), 42);
    setup.stop();
    assert_eq!(
        setup.threads[0].save().expect("stopped").regs.r13,
        2,
        "interruptions"
    );
}

#[test]
fn a_fork_call_returns_twice() {
    let kvm = kvm_or_skip!();
    let setup = Setup::user(&kvm, guest::FORKS);
    let thread = &setup.threads[0];
    setup.resume();
    assert_eq!(setup.ears.calls.recv_timeout(PATIENCE), Ok(call::FORK));
    assert!(matches!(thread.save(), Err(KvmError::NotStopped { .. })));
    setup.stop();
    assert_eq!(thread.open_call().expect("stopped"), Some(call::FORK));
    // A cut that is not this call's: its clone makes the call again.
    assert_eq!(thread.save().expect("stopped").regs.rax, call::AGAIN);
    // This call's cut.
    thread.show_result(0).expect("inside a call");
    let clone = setup.fork(&kvm);
    clone.resume();
    assert_eq!(clone.exit(), 0);
    // Resumed without a result the call is still open.
    setup.resume();
    setup.stop();
    assert_eq!(thread.open_call().expect("stopped"), Some(call::FORK));
    setup.reply(Reply::Value(7));
    setup.resume();
    assert_eq!(setup.exit(), 7);
    assert_eq!(thread.open_call().expect("ended"), None);
    assert!(matches!(
        thread.show_result(1),
        Err(KvmError::NoOpenCall { .. })
    ));
    assert!(
        setup.ears.calls.try_recv().is_err(),
        "the call was made once"
    );
}

#[test]
fn a_triple_fault_is_reported_with_its_instruction() {
    let kvm = kvm_or_skip!();
    let setup = Setup::user(&kvm, guest::FAULT);
    let start = setup.threads[0].save().expect("parked");
    for _ in 0..2 {
        setup.resume();
        let end = setup.ears.end();
        let End::TripleFault(dump) = &end else {
            panic!("{end}")
        };
        assert_eq!(dump.regs.expect("readable").rip, start.regs.rip, "{end}");
        assert_eq!(dump.instruction[..2], [0x0f, 0x0b], "{end}");
        setup.threads[0]
            .wait_stopped(PATIENCE)
            .expect("an end is a stop");
        assert!(setup.threads[0].has_ended());
        // Resuming an ended vCPU does nothing; a state brings it back.
        setup.resume();
        setup.threads[0].set(&start).expect("ended is stopped");
        assert!(!setup.threads[0].has_ended());
    }
}

#[test]
fn a_halted_vcpu_stops_and_an_msi_wakes_it() {
    let kvm = kvm_or_skip!();
    let setup = Setup::new(&kvm, guest::HALTS, 1, Irqchip::Split, Ring::Kernel);
    setup.resume();
    let told = |setup: &Setup, count: usize| {
        let start = std::time::Instant::now();
        while setup.log().len() < count {
            if let Ok((_, end)) = setup.ears.ends.try_recv() {
                panic!("{end}");
            }
            assert!(
                start.elapsed() < PATIENCE,
                "woken {} times",
                setup.log().len()
            );
            std::thread::yield_now();
        }
    };
    told(&setup, 1);
    for round in 1..=5 {
        assert!(
            setup.vm.raise_msi(Msi::fixed(0, VECTOR)).expect("an APIC"),
            "taken"
        );
        told(&setup, 1 + round);
        assert_eq!(setup.ram.load(counter(0)), wide(round));
    }
    // It goes to sleep again sooner or later; stop it there.
    loop {
        setup.stop();
        let state = setup.threads[0].save().expect("stopped");
        if state.mp_state.mp_state == KVM_MP_STATE_HALTED {
            break;
        }
        setup.resume();
        std::thread::yield_now();
    }
    let clone = setup.fork(&kvm);
    for setup in [&clone, &setup] {
        let before = setup.log().len();
        // Raised while stopped: pending, and seen after the resume.
        assert!(
            setup.vm.raise_msi(Msi::fixed(0, VECTOR)).expect("an APIC"),
            "taken"
        );
        setup.resume();
        told(setup, before + 1);
        assert_eq!(setup.ram.load(counter(0)), 6);
        setup.stop();
    }
}

#[test]
fn a_state_survives_its_bytes_and_being_set() {
    let kvm = kvm_or_skip!();
    let setup = Setup::user(&kvm, guest::COUNT);
    setup.resume();
    while setup.bench.reads[0].load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    setup.stop();
    let state = setup.threads[0].save().expect("stopped");
    let bytes = postcard::to_stdvec(&state).expect("plain data");
    let back: VcpuState = postcard::from_bytes(&bytes).expect("its own bytes");
    assert_eq!(back, state);
    assert!(state.xsave.len() >= 4096 && !state.msrs.is_empty());
    let clone = setup.fork(&kvm);
    let set = clone.threads[0].save().expect("parked");
    assert_eq!(set.xsave, state.xsave);
    assert_eq!(
        (set.regs, set.sregs, set.xcrs),
        (state.regs, state.sregs, state.xcrs)
    );
    assert_eq!(
        (set.debug, set.events, set.mp_state),
        (state.debug, state.events, state.mp_state)
    );
    for (set, saved) in set.msrs.iter().zip(&state.msrs) {
        if set.index == 0x10 {
            assert!(set.value >= saved.value, "the TSC ran backward");
        } else {
            assert_eq!(set, saved);
        }
    }
}

#[test]
fn a_vm_closes_in_the_background() {
    let kvm = kvm_or_skip!();
    let setup = Setup::new(&kvm, guest::COUNT, 2, Irqchip::Full, Ring::User);
    setup.resume();
    let Setup {
        threads,
        vm,
        bench,
        ram,
        ..
    } = setup;
    let (vm, released) = (Arc::new(vm), Arc::new(AtomicU64::new(0)));
    let in_release = Arc::clone(&released);
    let held = Arc::clone(&vm);
    let closing = close(threads, vm, move || in_release.store(1, Ordering::SeqCst));
    assert_eq!(closing.expect("a thread").wait(), Closed::StillHeld);
    assert_eq!(released.load(Ordering::SeqCst), 1);
    let closing = close(Vec::new(), held, || ()).expect("a thread");
    assert_eq!(closing.wait(), Closed::Gone);
    assert_eq!(Arc::strong_count(&bench), 1, "the threads have ended");
    drop(ram);
}
