//! Tests that run guests. Without a usable `/dev/kvm` they say so and do nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvm_bindings::KVM_MP_STATE_HALTED;
use salp_protocol::{call, port};

use super::bench::{PATIENCE, Reply, Setup};
use super::guest::{self, MMIO, Ram, Ring, VECTOR, counter};
use super::kick::ImmediateExit;
use super::*;
use crate::words::{Gpa, wide};

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
fn immediate_exit_keeps_a_vcpu_out_of_the_guest() {
    let kvm = kvm_or_skip!();
    let ram = Ram::new(guest::COUNT);
    let (_vm, mut vcpus) = ram.vm(&kvm, 1, Irqchip::Split);
    guest::start(&vcpus[0], Ring::User);
    let flag = ImmediateExit::map(&vcpus[0].fd).expect("a mapping");
    let before = vcpus[0].fd().get_regs().expect("regs");
    flag.set();
    let error = vcpus[0].fd.run().expect_err("it returns at once");
    assert_eq!(error.errno(), libc::EINTR);
    assert_eq!(vcpus[0].fd().get_regs().expect("regs"), before);
    vcpus[0].fd.set_kvm_immediate_exit(0);
    assert!(vcpus[0].fd.run().is_ok(), "the two flags are one");
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
fn a_stop_that_is_taken_back_stops_nothing() {
    let kvm = kvm_or_skip!();
    let setup = Setup::user(&kvm, guest::COUNT);
    setup.resume();
    for round in 0..200 {
        setup.threads[0].request_stop();
        if round % 2 == 0 {
            // Whether it has followed or not.
            std::thread::yield_now();
        }
        setup.threads[0].take_back_stop().expect("its thread is there");
    }
    let (before, start) = (setup.ram.load(counter(0)), std::time::Instant::now());
    while setup.ram.load(counter(0)) == before {
        assert!(start.elapsed() < PATIENCE, "it stands still");
        std::thread::yield_now();
    }
    setup.stop();
    setup.check_count();
}

#[test]
fn a_saved_state_goes_on_in_another_vm() {
    let kvm = kvm_or_skip!();
    for vcpus in [1, 2] {
        let source = Setup::new(&kvm, guest::COUNT, vcpus, Irqchip::Split, Ring::User);
        source.resume();
        source.await_progress();
        source.stop();
        let at_cut = source.check_count();
        let clone = source.fork(&kvm);
        assert_eq!(clone.check_count(), at_cut);
        source.resume();
        source.await_progress();
        clone.resume();
        clone.finish_count();
        source.stop();
        let later = source.check_count();
        assert!(later.iter().sum::<u64>() > at_cut.iter().sum(), "the source went on");
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
        setup.await_progress();
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
    setup.vm.set_irq_line(5, Level::High).expect("the full irqchip has pins");
    let clone = setup.fork(&kvm);
    let state = |setup: &Setup| setup.vm.save().expect("stopped");
    let chips = |setup: &Setup| {
        let devices = state(setup).devices.expect("the full irqchip");
        postcard::to_stdvec(&devices.chips).expect("plain data")
    };
    let untouched = Setup::new(&kvm, guest::COUNT, 1, Irqchip::Full, Ring::User);
    assert_ne!(chips(&setup), chips(&untouched), "the pin is part of the state");
    assert_eq!(chips(&setup), chips(&clone));
    let mut later = state(&setup);
    later.clock_ns = 1 << 50;
    later.saved_at_ns -= 5_000_000_000;
    untouched.vm.set(&later).expect("stopped");
    let now_ns = state(&untouched).clock_ns;
    assert!(now_ns >= (1 << 50) + 5_000_000_000, "the clock goes on from its value: {now_ns}");
    let split = Setup::user(&kvm, guest::COUNT);
    assert!(matches!(split.vm.set(&state(&setup)), Err(KvmError::WrongIrqchip { .. })));
    assert!(split.vm.set_irq_line(5, Level::High).is_err());
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
    assert_eq!(setup.threads[0].save().expect("stopped").regs.r13, 2, "interruptions");
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
    setup.stop();
    assert_eq!(thread.open_call().expect("ended"), None);
    assert!(matches!(thread.show_result(1), Err(KvmError::NoOpenCall { .. })));
    assert!(setup.ears.calls.try_recv().is_err(), "the call was made once");
}

#[test]
fn a_triple_fault_is_reported_with_its_instruction() {
    let kvm = kvm_or_skip!();
    let setup = Setup::user(&kvm, guest::FAULT);
    let start = setup.threads[0].save().expect("parked");
    for _ in 0..2 {
        setup.resume();
        let end = setup.ears.end();
        let End::TripleFault(dump) = &end else { panic!("{end}") };
        assert_eq!(dump.regs.expect("readable").rip, start.regs.rip, "{end}");
        assert_eq!(dump.instruction[..2], [0x0f, 0x0b], "{end}");
        setup.threads[0].wait_stopped(PATIENCE).expect("an end is a stop");
        assert!(setup.threads[0].has_ended());
        // Resuming an ended vCPU does nothing; a state brings it back.
        setup.resume();
        setup.threads[0].set(&start).expect("ended is stopped");
        assert!(!setup.threads[0].has_ended());
    }
}

#[test]
fn lost_memory_ends_the_run_and_not_the_process() {
    let kvm = kvm_or_skip!();
    let setup = Setup::user(&kvm, guest::COUNT);
    let page = Gpa(0x10_0000);
    // Holds the poison as long as it is open.
    let _poison = match setup.ram.poison(page) {
        Ok(userfaultfd) => userfaultfd,
        Err(error) => {
            eprintln!("SKIPPED: {}: no userfaultfd with poison: {error}", module_path!());
            return;
        }
    };
    let mut state = setup.threads[0].save().expect("parked");
    state.regs.rdi = page.0;
    setup.threads[0].set(&state).expect("parked");
    setup.resume();
    let end = setup.ears.end();
    let End::MemoryError { host_address, dump } = &end else { panic!("{end}") };
    assert_eq!(*host_address, setup.ram.host_address(page));
    assert_eq!(dump.regs.expect("readable").rip, guest::CODE + 3, "{end}");
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
            assert!(start.elapsed() < PATIENCE, "woken {} times", setup.log().len());
            std::thread::yield_now();
        }
    };
    told(&setup, 1);
    for round in 1..=5 {
        assert!(setup.vm.raise_msi(Msi::fixed(0, VECTOR)).expect("an APIC"), "taken");
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
        assert!(setup.vm.raise_msi(Msi::fixed(0, VECTOR)).expect("an APIC"), "taken");
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
    setup.await_progress();
    setup.stop();
    let state = setup.threads[0].save().expect("stopped");
    let bytes = postcard::to_stdvec(&state).expect("plain data");
    let back: VcpuState = postcard::from_bytes(&bytes).expect("its own bytes");
    assert_eq!(back, state);
    assert!(state.xsave.len() >= 4096 && !state.msrs.is_empty());
    let clone = setup.fork(&kvm);
    // The guest uses no SSE: put something there. Byte 512 says which parts the area holds.
    let mut state = state;
    state.xsave[512] |= 3;
    state.xsave[160..176].copy_from_slice(b"sixteen in xmm0.");
    // The task priority, and the register that shows it.
    (state.lapic.regs[0x80], state.sregs.cr8) = (0x20, 2);
    let star = state.msrs.iter_mut().find(|msr| msr.index == 0xc000_0081);
    star.expect("every x86-64 KVM has STAR").value = 0x0023_0010_0000_0000;
    clone.threads[0].set(&state).expect("parked");
    let set = clone.threads[0].save().expect("parked");
    assert_eq!(set.xsave, state.xsave);
    assert_eq!(set.lapic.regs[0x80], 0x20);
    assert_eq!((set.regs, set.sregs, set.xcrs), (state.regs, state.sregs, state.xcrs));
    assert_eq!((set.debug, set.events, set.mp_state), (state.debug, state.events, state.mp_state));
    for (set, saved) in set.msrs.iter().zip(&state.msrs) {
        if set.index == 0x10 {
            assert!(set.value >= saved.value, "the TSC ran backward");
        } else {
            assert_eq!(set, saved);
        }
    }
}

#[test]
fn threads_save_their_own_vcpus() {
    let kvm = kvm_or_skip!();
    let setup = Setup::user(&kvm, guest::COUNT);
    let thread = &setup.threads[0];
    let registers = || thread.save().expect("stopped").regs;
    let run = || {
        setup.resume();
        setup.await_progress();
        setup.stop();
    };
    let have_saved = || {
        thread.begin_save();
        while !thread.has_saved() {
            std::thread::yield_now();
        }
    };
    run();
    let saved_here = registers();
    have_saved();
    assert_eq!(registers(), saved_here);
    assert!(!thread.has_saved(), "it was taken");
    // What nobody has taken is past when the vCPU runs.
    have_saved();
    run();
    assert_ne!(registers(), saved_here);
    // So is what was saved before the vCPU was set.
    let mut state = thread.save().expect("stopped");
    have_saved();
    state.regs.r15 = 0x1234_5678;
    thread.set(&state).expect("stopped");
    assert_eq!(registers(), state.regs);
    // Whoever does not wait for the thread gets the same.
    begin_save(&setup.threads);
    assert_eq!(registers(), state.regs);
}

#[test]
fn a_vm_closes_in_the_background() {
    let kvm = kvm_or_skip!();
    let setup = Setup::new(&kvm, guest::COUNT, 2, Irqchip::Full, Ring::User);
    setup.resume();
    let Setup { threads, vm, bench, ram, .. } = setup;
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
