//! The machine and the VM that the tests run their guests in.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvm_bindings::kvm_regs;
use salp_protocol::{call, port};

use super::guest::{self, Ram, Ring, counter, start};
use super::kick::{StopSignal, Woken};
use super::*;
use crate::words::Gpa;

/// Generous: only a hang reaches it.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// What a call of the test guest is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    Value(u64),
    Nothing,
}

/// The machine of the test guests: counts what it is asked, checks nothing itself.
pub(super) struct Bench {
    ram: Arc<Ram>,
    /// Every exit in order: kind, address, value.
    log: Mutex<Vec<(&'static str, u64, u64)>>,
    /// Reads of port 0x20 per vCPU: the value read is their count.
    pub(super) reads: [AtomicU64; 2],
    writes: [AtomicU64; 2],
    mmio: [AtomicU64; 2],
    /// What the next call returns; empty: the call blocks.
    reply: Mutex<Reply>,
    calls: Mutex<Sender<u32>>,
    ends: Mutex<Sender<(usize, End)>>,
}

pub(super) struct Ears {
    pub(super) calls: Receiver<u32>,
    pub(super) ends: Receiver<(usize, End)>,
}

impl Ears {
    pub(super) fn end(&self) -> End {
        self.ends.recv_timeout(PATIENCE).expect("the guest ends").1
    }
}

impl Bench {
    pub(super) fn new(ram: &Arc<Ram>) -> (Arc<Self>, Ears) {
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
        (Arc::new(bench), Ears { calls: heard_calls, ends: heard_ends })
    }

    /// A machine in the same state, over other memory.
    pub(super) fn fork(&self, ram: &Arc<Ram>) -> (Arc<Self>, Ears) {
        let (clone, ears) = Self::new(ram);
        for (to, from) in
            [(&clone.reads, &self.reads), (&clone.writes, &self.writes), (&clone.mmio, &self.mmio)]
        {
            for (to, from) in to.iter().zip(from) {
                to.store(from.load(Ordering::SeqCst), Ordering::SeqCst);
            }
        }
        (clone, ears)
    }

    fn note(&self, kind: &'static str, at: u64, data: &[u8]) {
        let value = data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        self.log.lock().expect("no panic").push((kind, at, value));
    }

    fn answer(&self, registers: &mut CallRegisters, stop: &StopSignal) -> Option<CallOutcome> {
        let reply = std::mem::replace(&mut *self.reply.lock().expect("no panic"), Reply::Nothing);
        if let Reply::Value(value) = reply {
            registers.rax = value;
            registers.rdi = value;
            return Some(CallOutcome::Return);
        }
        assert_eq!(stop.wait(None, Some(PATIENCE)), Woken::Stop, "nobody stopped the call");
        None
    }
}

impl Machine for Bench {
    fn pio_read(&self, vcpu: usize, port: u16, data: &mut [u8]) {
        assert!(data.iter().all(|byte| *byte == 0xff), "an unanswered read is all ones");
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

    fn call(&self, _: usize, number: u32, registers: &mut CallRegisters, stop: &StopSignal) -> CallOutcome {
        self.calls.lock().expect("no panic").send(number).expect("the test listens");
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
        self.answer(registers, stop).unwrap_or(CallOutcome::InterruptedWith(call::AGAIN))
    }

    fn ended(&self, vcpu: usize, end: End) {
        self.ends.lock().expect("no panic").send((vcpu, end)).expect("the test listens");
    }

    fn read_memory(&self, gpa: Gpa, bytes: &mut [u8]) -> bool {
        self.ram.read(gpa, bytes);
        true
    }
}

/// A test VM with its threads, parked at the program's start.
pub(super) struct Setup {
    // In the order in which they must go.
    pub(super) threads: Vec<VcpuThread>,
    pub(super) vm: Vm,
    pub(super) bench: Arc<Bench>,
    pub(super) ears: Ears,
    pub(super) ram: Arc<Ram>,
}

impl Setup {
    pub(super) fn new(kvm: &Kvm, program: &[u8], vcpus: u8, irqchip: Irqchip, ring: Ring) -> Self {
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
        Self { threads, vm, bench, ears, ram }
    }

    pub(super) fn user(kvm: &Kvm, program: &[u8]) -> Self {
        Self::new(kvm, program, 1, Irqchip::Split, Ring::User)
    }

    pub(super) fn resume(&self) {
        resume_all(&self.threads).expect("stopped before");
    }

    pub(super) fn stop(&self) {
        stop_all(&self.threads, PATIENCE).expect("all stop");
    }

    pub(super) fn log(&self) -> Vec<(&'static str, u64, u64)> {
        self.bench.log.lock().expect("no panic").clone()
    }

    pub(super) fn reply(&self, reply: Reply) {
        *self.bench.reply.lock().expect("no panic") = reply;
    }

    pub(super) fn exit(&self) -> u32 {
        match self.ears.end() {
            End::Exit(status) => status,
            other => panic!("{other}"),
        }
    }

    /// A second VM with a copy of the memory and the saved states, by way of their bytes.
    pub(super) fn fork(&self, kvm: &Kvm) -> Self {
        let bytes = |state: &VcpuState| postcard::to_stdvec(state).expect("plain data");
        let saved: Vec<_> =
            self.threads.iter().map(|thread| bytes(&thread.save().expect("stopped"))).collect();
        let vm_state = postcard::to_stdvec(&self.vm.save().expect("stopped")).expect("plain data");
        let ram = Arc::new(self.ram.copy());
        let (bench, ears) = self.bench.fork(&ram);
        let count = u8::try_from(saved.len()).expect("two at most");
        let (vm, vcpus) = ram.vm(kvm, count, self.vm.irqchip());
        vm.set(&postcard::from_bytes(&vm_state).expect("its own bytes")).expect("set");
        for (vcpu, saved) in vcpus.iter().zip(&saved) {
            vcpu.set(&postcard::from_bytes(saved).expect("its own bytes")).expect("set");
        }
        Self::assemble(vm, vcpus, bench, ears, ram)
    }

    /// What must hold of a stopped COUNT guest: memory, registers and the machine agree.
    pub(super) fn check_count(&self) -> Vec<u64> {
        let check = |thread: &VcpuThread| {
            let vcpu = thread.index();
            let kvm_regs { rbx, r9, rip, .. } = thread.save().expect("stopped").regs;
            let memory = self.ram.load(counter(vcpu));
            assert!(memory == rbx || memory + 1 == rbx, "vcpu {vcpu}: rbx {rbx}, memory {memory}");
            // Exactly what was done up to `rip` has happened: no access is half done.
            let done = |at: &AtomicU64| at.load(Ordering::SeqCst);
            let offset = rip - guest::CODE;
            let [read, write, store] = [0x1b, 0x25, 0x26].map(|instruction| {
                // `r9` is one ahead between its increment and the access.
                r9 - u64::from((0x16..=instruction).contains(&offset))
            });
            assert_eq!(done(&self.bench.reads[vcpu]), read, "reads, at {offset:#x}");
            assert_eq!(done(&self.bench.writes[vcpu]), write, "writes, at {offset:#x}");
            assert_eq!(done(&self.bench.mmio[vcpu]), store, "stores, at {offset:#x}");
            assert!(rbx / 4096 == r9 || rbx / 4096 == r9 + 1, "{rbx} rounds, {r9} accesses");
            rbx
        };
        self.threads.iter().map(check).collect()
    }

    /// Waits until every vCPU of a running COUNT guest has come round once more.
    pub(super) fn await_progress(&self) {
        for reads in &self.bench.reads[..self.threads.len()] {
            let before = reads.load(Ordering::SeqCst);
            while reads.load(Ordering::SeqCst) == before {
                std::thread::yield_now();
            }
        }
    }

    pub(super) fn finish_count(&self) {
        self.ram.store(Gpa(guest::FLAG), 1);
        for _ in &self.threads {
            let status = self.exit();
            let counted = |reads: &AtomicU64| reads.load(Ordering::SeqCst) == u64::from(status);
            assert!(self.bench.reads.iter().any(counted), "exit with {status:#x}");
        }
        self.stop();
        for thread in &self.threads {
            let rbx = thread.save().expect("stopped").regs.rbx;
            assert_eq!(rbx, self.ram.load(counter(thread.index())));
        }
    }
}
