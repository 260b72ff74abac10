//! A clone by `fork()`: a child with a new VM over the memory that it inherits.
#![expect(unsafe_code, reason = "forks a process with one thread")]

use std::io;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use serde::{Deserialize, Serialize};

use super::host::do_task;
use super::words::{Outcome, stages, us};
use crate::bench::BenchError;
use crate::bench::plain_vm::{Guest, PlainState, PlainVm};
use crate::bench::work::{Task, WorkTimes};
use crate::kvm::Kvm;
use crate::kvm::vcpu::monotonic_ns;

/// Gets a clone, has it do its task, and ends it.
pub(super) fn process_fork(
    kvm: Option<&Kvm>,
    source: &mut PlainVm,
    task: &Task,
) -> Result<Outcome, BenchError> {
    let board = ResultBoard::new()?;
    let begin = monotonic_ns();
    let state = source.guest.save()?;
    let saved = monotonic_ns();
    // SAFETY: this process has one thread, so the child may do whatever the parent could; it never
    // returns from here, and leaves by `_exit` without running the parent's destructors.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let result = in_child(kvm, source, &state, task, begin);
        let status = board.write(&result);
        // SAFETY: ends the process at once.
        unsafe { libc::_exit(status) };
    }
    let forked = monotonic_ns();
    if child < 0 {
        return Err(io::Error::last_os_error().into());
    }
    source.guest.run_to_order()?;
    let mut status = 0;
    // SAFETY: waits for this process's own child, once.
    if unsafe { libc::waitpid(child, &raw mut status, 0) } != child {
        return Err(io::Error::last_os_error().into());
    }
    let ChildTimes { begun, vm_made, entering, first_exit, first_mib_us, work } = board.read()?;
    Ok(Outcome {
        pause_us: us(begin, forked),
        call_us: us(begin, entering),
        first_instruction_us: us(begin, first_exit),
        first_mib_us,
        stages_us: stages(&[
            ("save", begin, saved),
            ("fork_in_source", saved, forked),
            ("fork_to_child", saved, begun),
            ("make_vm", begun, vm_made),
            ("set", vm_made, entering),
        ]),
        work,
    })
}

/// What the child of a fork does.
fn in_child(
    kvm: Option<&Kvm>,
    source: &PlainVm,
    state: &PlainState,
    task: &Task,
    begin: u64,
) -> Result<ChildTimes, BenchError> {
    let begun = monotonic_ns();
    let mut guest = Guest::over(kvm, &source.memory)?;
    let vm_made = monotonic_ns();
    guest.set(state)?;
    let entering = monotonic_ns();
    guest.run_to_order()?;
    let first_exit = monotonic_ns();
    let (first_mib_us, work) = do_task(&mut guest, &source.memory, task, begin)?;
    Ok(ChildTimes { begun, vm_made, entering, first_exit, first_mib_us, work })
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct ChildTimes {
    begun: u64,
    vm_made: u64,
    entering: u64,
    first_exit: u64,
    first_mib_us: Option<f64>,
    work: Option<WorkTimes>,
}

/// A page that a child of fork leaves its result in, as JSON.
struct ResultBoard(*mut u8);

const BOARD_BYTES: usize = 4096;

impl ResultBoard {
    fn new() -> Result<Self, BenchError> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let page = unsafe { mmap_anonymous(std::ptr::null_mut(), BOARD_BYTES, access, flags) };
        Ok(Self(page.map_err(io::Error::from)?.cast()))
    }

    /// In the child. Returns its exit status.
    fn write(&self, result: &Result<ChildTimes, BenchError>) -> i32 {
        let said = result.as_ref().map_err(ToString::to_string);
        match serde_json::to_vec(&said) {
            Ok(bytes) if bytes.len() < BOARD_BYTES => {
                // SAFETY: fits into the page, which nobody reads before this process has ended.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0, bytes.len()) };
                0
            }
            _ => 1,
        }
    }

    /// In the parent, when the child has ended.
    fn read(&self) -> Result<ChildTimes, BenchError> {
        let mut bytes = vec![0; BOARD_BYTES];
        // SAFETY: the whole page; who wrote it is gone.
        unsafe { std::ptr::copy_nonoverlapping(self.0, bytes.as_mut_ptr(), BOARD_BYTES) };
        bytes.retain(|byte| *byte != 0);
        let said: Result<Result<ChildTimes, String>, _> = serde_json::from_slice(&bytes);
        said.map_err(|error| BenchError::Baseline(format!("the child of fork left nothing: {error}")))?
            .map_err(BenchError::Baseline)
    }
}

impl Drop for ResultBoard {
    fn drop(&mut self) {
        // SAFETY: this page's own mapping, made in `new`.
        if let Err(error) = unsafe { munmap(self.0.cast(), BOARD_BYTES) } {
            tracing::error!(%error, "a page stays mapped");
        }
    }
}
