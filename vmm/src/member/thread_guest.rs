//! A host thread as the guest: it does a puppet's orders on the window, so that the whole memory
//! manager runs where there is no KVM. It is not stopped at a cut: like a device, it is held by
//! the protection alone.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use salp_protocol::dma::register;
use salp_protocol::{call, order};

use super::machine::{Live, MemberMachine};
use super::mailbox::Mailbox;
use super::messages::{Event, HowEnded, PuppetOrder};
use crate::devices::dma::DmaEngine;
use crate::space::SpaceError;
use crate::words::{Gpa, PAGE_BYTES, index};

/// The thread; stopped and joined when dropped.
pub struct ThreadGuest {
    machine: Arc<MemberMachine>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ThreadGuest {
    /// Starts the guest of a machine that has its role.
    ///
    /// # Errors
    /// The host has no thread left.
    pub fn start(machine: &Arc<MemberMachine>) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (for_thread, for_stop) = (Arc::clone(machine), Arc::clone(&stop));
        crate::failure::point("guest.thread")?;
        let thread = std::thread::Builder::new()
            .name("guest".to_owned())
            .spawn(move || run(&for_thread, &for_stop))?;
        Ok(Self { machine: Arc::clone(machine), stop, thread: Some(thread) })
    }
}

impl Drop for ThreadGuest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.machine.mailboxes().iter().for_each(Mailbox::finish);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a thread guest panicked");
        }
    }
}

fn run(machine: &MemberMachine, stop: &AtomicBool) {
    let (Some(mailbox), Ok(live)) = (machine.mailbox(0), machine.role()) else { return };
    let guest = Guest { machine, live, stop };
    loop {
        mailbox.hush();
        if stop.load(Ordering::SeqCst) {
            return;
        }
        if let Some(order) = mailbox.take_order() {
            let result = match guest.obey(&order) {
                Ok(result) => result,
                Err(error) => {
                    machine.tell(Event::Ended {
                        how: HowEnded::Crashed,
                        status: None,
                        text: error.to_string(),
                    });
                    return;
                }
            };
            if mailbox.take_working() {
                machine.tell(Event::Puppet { vcpu: 0, result });
            }
            continue;
        }
        if !await_letter(mailbox) {
            return;
        }
    }
}

/// Waits until something may have come. False: nothing ever will.
fn await_letter(mailbox: &Mailbox) -> bool {
    match poll(&mut [PollFd::from_borrowed_fd(mailbox.as_fd(), PollFlags::IN)], None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => true,
        Err(error) => {
            tracing::error!(%error, "waiting for orders failed");
            false
        }
    }
}

fn read_register(dma: &DmaEngine, register: u64) -> u64 {
    let mut value = [0; 8];
    dma.mmio_read(register, &mut value);
    u64::from_le_bytes(value)
}

/// An order's result; an error: memory is lost, and the guest's run ends.
type Done = Result<u64, SpaceError>;

struct Guest<'a> {
    machine: &'a MemberMachine,
    live: &'a Live,
    stop: &'a AtomicBool,
}

impl Guest<'_> {
    fn obey(&self, PuppetOrder { order, a, b, c, d }: &PuppetOrder) -> Done {
        let (a, b, c, d) = (*a, *b, *c, *d);
        match *order {
            order::NOTHING => Ok(0),
            order::STORE64 => self.store(a, &b.to_le_bytes()),
            order::LOAD64 => self.load(a),
            order::STORE8 => self.store(a, &b.to_le_bytes()[..1]),
            order::STORE_STRIDE => (0..c).try_fold(0, |_, page| self.store(a + page * d, &b.to_le_bytes())),
            order::SUM_STRIDE => {
                (0..c).try_fold(0_u64, |sum, page| Ok(sum.wrapping_add(self.load(a + page * d)?)))
            }
            order::ATOMIC_ADD => {
                // One thread is the whole guest: nobody stores between the two.
                let old = self.load(a)?;
                self.store(a, &old.wrapping_add(b).to_le_bytes())?;
                Ok(old)
            }
            order::FILL => self.fill(a, b.to_le_bytes()[0], c),
            order::DMA_WRITE => self.with_dma(|dma| {
                dma.mmio_write(a, &b.to_le_bytes());
                0
            }),
            order::DMA_READ => self.with_dma(|dma| read_register(dma, a)),
            order::DMA_FLOOD => self.count(b, |_| {
                self.with_dma(|dma| {
                    let tail = read_register(dma, register::COMPLETED).wrapping_add(a);
                    dma.mmio_write(register::DOORBELL, &tail.to_le_bytes());
                    0
                })
            }),
            order::IDENTITY_READ => {
                let mut value = [0; 8];
                self.live.bus().identity.mmio_read(a, &mut value);
                Ok(u64::from_le_bytes(value))
            }
            order::IDENTITY_WRITE => {
                self.live.bus().identity.mmio_write(a, &b.to_le_bytes());
                Ok(0)
            }
            order::COUNT => self.count(c, |k| {
                self.store(a, &u64::to_le_bytes(k))?;
                self.store(b, &u64::to_le_bytes(k))
            }),
            order::COUNT_STRIDE => self.count(b, |k| {
                let (round, page) = ((k - 1) / c.max(1) + 1, (k - 1) % c.max(1));
                self.store(a + page * d, &u64::to_le_bytes(round))
            }),
            order::FORK => Ok(self.fork()),
            order::RESET => Ok(self.reset()),
            _ => Ok(call::FAILED),
        }
    }

    fn is_memory(&self, gpa: Gpa, len_bytes: usize) -> bool {
        self.live.space.shape().contains(gpa, len_bytes)
    }

    fn store(&self, address: u64, bytes: &[u8]) -> Done {
        if !self.is_memory(Gpa(address), bytes.len()) {
            return Ok(call::FAILED);
        }
        self.live.space.host().write(Gpa(address), bytes)?;
        Ok(0)
    }

    fn load(&self, address: u64) -> Done {
        let mut bytes = [0; 8];
        if !self.is_memory(Gpa(address), bytes.len()) {
            return Ok(call::FAILED);
        }
        self.live.space.host().read(Gpa(address), &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn fill(&self, address: u64, byte: u8, len_bytes: u64) -> Done {
        let chunk = [byte; PAGE_BYTES];
        let mut done = 0;
        while done < len_bytes {
            let count = index((len_bytes - done).min(crate::words::wide(PAGE_BYTES)));
            if self.store(address + done, &chunk[..count])? != 0 {
                return Ok(call::FAILED);
            }
            done += crate::words::wide(count);
        }
        Ok(0)
    }

    fn with_dma(&self, work: impl FnOnce(&DmaEngine) -> u64) -> Done {
        Ok(self.live.bus().dma.as_ref().map_or(call::FAILED, work))
    }

    /// Asks for a fork and waits for its result: the clone's id. The clone's own guest is told 0.
    /// Waits for the reset, which ends this thread, or its refusal.
    fn reset(&self) -> u64 {
        let Some(mailbox) = self.machine.mailbox(0) else { return call::FAILED };
        self.machine.reset_bell().ring(0);
        loop {
            mailbox.hush();
            let is_over = mailbox.take_refusal() || self.stop.load(Ordering::SeqCst);
            if is_over || !await_letter(mailbox) {
                return call::FAILED;
            }
        }
    }

    fn fork(&self) -> u64 {
        let Some(mailbox) = self.machine.mailbox(0) else { return call::FAILED };
        self.machine.tell(Event::ForkAsked { vcpu: 0 });
        loop {
            mailbox.hush();
            if let Some(clone) = mailbox.take_fork() {
                return clone.map_or(call::FAILED, |clone| u64::from(clone.0));
            }
            if self.stop.load(Ordering::SeqCst) || !await_letter(mailbox) {
                return call::FAILED;
            }
        }
    }

    /// Has `store` store k = 1, 2, ... until there is another order, which it looks for after `rounds`.
    fn count(&self, rounds: u64, store: impl Fn(u64) -> Done) -> Done {
        let mut k = 0;
        loop {
            for _ in 0..rounds.max(1) {
                k += 1;
                store(k)?;
            }
            let report = crate::kvm::CallRegisters { rdi: k, ..Default::default() };
            let answer = self.machine.report(0, &report, false);
            if answer != 0 || self.stop.load(Ordering::SeqCst) {
                return Ok(k);
            }
        }
    }
}
