//! Many clones at once, each in a process of its own that waits until it may go.
//!
//! Three pipes join them to their parent: they say by a byte that they are ready (or have failed),
//! take one order each, and end when the last pipe does, also where their parent was killed.
#![expect(unsafe_code, reason = "forks a process with one thread")]

use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{read, write};
use rustix::pipe::{PipeFlags, pipe_with};

use super::Crowd;
use super::host::BaselineHost;
use super::restore::load;
use super::words::{Burst, us};
use crate::bench::BenchError;
use crate::bench::plain_vm::{Guest, Pages, PlainMemory, PlainState};
use crate::kvm::vcpu::monotonic_ns;
use crate::member::messages::PuppetOrder;

/// `out 0xf8, al`: leaves the guest.
const ONE_INSTRUCTION: [u8; 2] = [0xe6, 0xf8];
/// How long a child may take.
const LIMIT: Timespec = Timespec { tv_sec: 120, tv_nsec: 0 };
/// An order in a pipe, in bytes.
const ORDER_BYTES: usize = 40;
const READY: u8 = 1;
const FAILED: u8 = 2;

/// See the module. They end, and are reaped, when it is dropped.
pub(super) struct Held {
    children: Vec<libc::pid_t>,
    /// Orders; its end, and that of `end`, is the end of the children.
    orders: Option<OwnedFd>,
    end: Option<OwnedFd>,
    said: OwnedFd,
}

/// The children's ends.
struct Ends {
    orders: OwnedFd,
    end: OwnedFd,
    said: OwnedFd,
}

impl Held {
    /// Makes them, and waits until all are ready.
    pub(super) fn make(
        host: &BaselineHost,
        crowd: Crowd,
        count: usize,
        path: Option<&str>,
    ) -> Result<(Self, Burst), BenchError> {
        let begin = monotonic_ns();
        let mut held = Self::fork_off(host, crowd, count, path)?;
        held.await_all()?;
        let all_us = us(begin, monotonic_ns());
        let processes = held.children.iter().filter_map(|pid| u32::try_from(*pid).ok()).collect();
        Ok((held, Burst { all_us, processes }))
    }

    /// Makes them, and does not wait.
    pub(super) fn fork_off(
        host: &BaselineHost,
        crowd: Crowd,
        count: usize,
        path: Option<&str>,
    ) -> Result<Self, BenchError> {
        let state = match crowd {
            Crowd::ProcessFork => Some(host.source_to_share()?.guest.save()?),
            Crowd::StaticTemplate | Crowd::Bare => None,
        };
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from);
        let ((orders, orders_in), (end, end_in), (said_out, said)) = (pipe()?, pipe()?, pipe()?);
        let mut held =
            Self { children: Vec::new(), orders: Some(orders_in), end: Some(end_in), said: said_out };
        let ends = Ends { orders, end, said };
        for _ in 0..count {
            // SAFETY: this process has one thread, so the child may do whatever the parent could; it
            // never returns from here, and leaves by `_exit` without running the parent's destructors.
            let child = unsafe { libc::fork() };
            if child == 0 {
                // Else the ends of the pipes would never be seen.
                drop((held.orders.take(), held.end.take()));
                let status = in_child(host, crowd, path, state.as_ref(), &ends);
                // SAFETY: ends the process at once.
                unsafe { libc::_exit(status) };
            }
            if child < 0 {
                return Err(io::Error::last_os_error().into());
            }
            held.children.push(child);
        }
        Ok(held)
    }

    /// Has each do an order, once; returns when all have.
    pub(super) fn activate(&mut self, order: PuppetOrder) -> Result<(), BenchError> {
        let PuppetOrder { order, a, b, c, d } = order;
        let bytes = [order, a, b, c, d].map(u64::to_ne_bytes).concat();
        let Some(orders) = &self.orders else { return Ok(()) };
        for _ in &self.children {
            // Below the size up to which a pipe takes all or nothing.
            write(orders, &bytes).map_err(io::Error::from)?;
        }
        self.await_all()
    }

    fn await_all(&mut self) -> Result<(), BenchError> {
        for _ in &self.children {
            let mut said = [0];
            let ready = poll(&mut [PollFd::new(&self.said, PollFlags::IN)], Some(&LIMIT));
            let count = match ready.map_err(io::Error::from)? {
                0 => 0,
                _ => read(self.said.as_fd(), &mut said).map_err(io::Error::from)?,
            };
            if count == 0 || said != [READY] {
                return Err(BenchError::Baseline("one of many clones could not run".to_owned()));
            }
        }
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop((self.orders.take(), self.end.take()));
        for child in &self.children {
            let mut status = 0;
            // SAFETY: waits for this process's own child, once.
            if unsafe { libc::waitpid(*child, &raw mut status, 0) } != *child {
                tracing::error!(error = %io::Error::last_os_error(), "a clone cannot be reaped");
            }
        }
    }
}

/// What a child does; returns its exit status.
fn in_child(
    host: &BaselineHost,
    crowd: Crowd,
    path: Option<&str>,
    state: Option<&PlainState>,
    ends: &Ends,
) -> i32 {
    match live(host, crowd, path, state, ends) {
        Ok(()) => 0,
        Err(error) => {
            // There is no better place, and the parent says only that it failed.
            let _ = writeln!(io::stderr(), "salp: a clone of the baselines: {error}");
            let _ = write(&ends.said, &[FAILED]);
            1
        }
    }
}

fn live(
    host: &BaselineHost,
    crowd: Crowd,
    path: Option<&str>,
    state: Option<&PlainState>,
    ends: &Ends,
) -> Result<(), BenchError> {
    let kvm = host.kvm.as_ref();
    // A VM is dropped before the memory under it.
    let own;
    let mut guest;
    let memory = match (crowd, path) {
        (Crowd::ProcessFork, _) => {
            let memory = &host.source_to_share()?.memory;
            guest = Guest::over(kvm, memory)?;
            if let Some(state) = state {
                guest.set(state)?;
            }
            memory
        }
        (Crowd::StaticTemplate, Some(path)) => {
            let (file, state) = load(path, host.setup.memory)?;
            own = PlainMemory::private_of(&file, host.setup.memory)?;
            guest = Guest::over(kvm, &own)?;
            guest.set(&state)?;
            &own
        }
        (Crowd::StaticTemplate, None) => {
            return Err(BenchError::Baseline("there is no snapshot".to_owned()));
        }
        (Crowd::Bare, _) => {
            own = PlainMemory::anonymous(host.setup.memory, Pages::Small)?;
            own.put_first(&ONE_INSTRUCTION)?;
            guest = Guest::over(kvm, &own)?;
            guest.run_first_byte()?;
            &own
        }
    };
    if crowd != Crowd::Bare {
        guest.run_to_order()?;
    }
    say_ready(ends)?;
    let mut bytes = [0; ORDER_BYTES];
    if read(&ends.orders, &mut bytes).map_err(io::Error::from)? == ORDER_BYTES {
        let word = |i: usize| bytes[8 * i..8 * i + 8].try_into().map_or(0, u64::from_ne_bytes);
        let order = PuppetOrder { order: word(0), a: word(1), b: word(2), c: word(3), d: word(4) };
        guest.order(memory, order)?;
        say_ready(ends)?;
        read(&ends.end, &mut [0]).map_err(io::Error::from)?;
    }
    Ok(())
}

fn say_ready(ends: &Ends) -> Result<(), BenchError> {
    write(&ends.said, &[READY]).map_err(io::Error::from)?;
    Ok(())
}
