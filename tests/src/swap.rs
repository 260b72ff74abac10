//! What the host does to memory when it is told to: a swap file while a test has it, pages sent there,
//! huge pages made and split, all memory compacted.
#![expect(unsafe_code, reason = "swapon, swapoff and process_madvise have no wrapper")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::process::Command;

use rustix::fs::FlockOperation;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use salp::family::VmId;
use salp::words::{Gfn, Gpa, LEAF_BYTES, LeafNumber, PAGE_BYTES, index, wide};

use crate::procs::Scratch;
use crate::world::World;

/// Room for some leaves.
const SWAP_BYTES: u64 = 64 << 20;

/// A swap file in use; no more when dropped. One at a time on a host.
pub struct Swap {
    path: CString,
    _scratch: Scratch,
    _turn: File,
}

impl Swap {
    /// Sets a swap file up.
    ///
    /// # Errors
    /// Why there can be none.
    pub fn on() -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("no swap: it takes root to set it up".to_owned());
        }
        let turn = File::open("/proc/swaps").map_err(|error| format!("no swap: /proc/swaps: {error}"))?;
        rustix::fs::flock(&turn, FlockOperation::LockExclusive)
            .map_err(|error| format!("no swap: its lock: {error}"))?;
        let scratch = Scratch::new("swap");
        let path = scratch.path().join("swap");
        make_file(&path).map_err(|error| format!("no swap: {}: {error}", path.display()))?;
        let path = CString::new(path.into_os_string().into_encoded_bytes())
            .map_err(|error| format!("no swap: {error}"))?;
        // SAFETY: a NUL-terminated path that lives through the call.
        if unsafe { libc::swapon(path.as_ptr(), 0) } != 0 {
            return Err(format!("no swap: swapon: {}", io::Error::last_os_error()));
        }
        Ok(Self { path, _scratch: scratch, _turn: turn })
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // SAFETY: a NUL-terminated path that lives through the call.
        if unsafe { libc::swapoff(self.path.as_ptr()) } != 0 {
            println!("a swap file stays in use: {}", io::Error::last_os_error());
        }
    }
}

fn make_file(path: &std::path::Path) -> io::Result<()> {
    let file = File::create_new(path)?;
    rustix::fs::fchmod(&file, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, SWAP_BYTES)?;
    let made = Command::new("mkswap").arg(path).output()?;
    match made.status.success() {
        true => Ok(()),
        false => Err(io::Error::other(String::from_utf8_lossy(&made.stderr).into_owned())),
    }
}

impl World {
    /// Has the host take advice on memory of a VM.
    fn advise(&self, vm: VmId, gpa: Gpa, len_bytes: usize, advice: libc::c_int) -> io::Result<()> {
        let process = i32::try_from(self.member(vm).process()).ok().and_then(Pid::from_raw);
        let process = pidfd_open(process.ok_or(io::ErrorKind::NotFound)?, PidfdFlags::empty())?;
        let address = self.describe(vm).window + gpa.0;
        let vector =
            libc::iovec { iov_base: std::ptr::without_provenance_mut(index(address)), iov_len: len_bytes };
        // SAFETY: the advice is for another process's memory, and changes no byte of it.
        let advised = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                process.as_raw_fd(),
                &raw const vector,
                1_usize,
                advice,
                0_u32,
            )
        };
        match u64::try_from(advised) {
            Ok(bytes) if bytes == wide(len_bytes) => Ok(()),
            Ok(bytes) => Err(io::Error::other(format!("advice was taken for {bytes} bytes"))),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    /// Has the host swap a leaf of a VM out. Returns how many of its pages went.
    ///
    /// # Errors
    /// The host refused.
    pub fn swap_out(&self, vm: VmId, leaf: LeafNumber) -> io::Result<usize> {
        let mut swapped = 0;
        // A page on its way through a list of its processor's is left out: it has arrived later.
        for number in 0..TRIES {
            if number > 0 {
                // By now it is where the kernel looks for what it can swap out.
                compact_memory()?;
            }
            self.advise(vm, leaf.gpa(), LEAF_BYTES, libc::MADV_PAGEOUT)?;
            let states = self.anonymous(vm).into_iter().find(|(at, _)| *at == leaf);
            let states = states.map(|(_, states)| states).unwrap_or_default();
            swapped = states.anonymous.minus(&states.present).len();
            if swapped == states.anonymous.len() {
                break;
            }
        }
        Ok(swapped)
    }

    /// Has the host make a leaf of a VM one huge page.
    ///
    /// # Errors
    /// The host refused.
    pub fn collapse(&self, vm: VmId, leaf: LeafNumber) -> io::Result<()> {
        self.advise(vm, leaf.gpa(), LEAF_BYTES, libc::MADV_COLLAPSE)
    }

    /// Has the host split the huge page around a page, by advice for 4 KiB of it.
    ///
    /// # Errors
    /// The host refused.
    pub fn split(&self, vm: VmId, gfn: Gfn) -> io::Result<()> {
        self.advise(vm, gfn.gpa(), PAGE_BYTES, libc::MADV_COLD)
    }
}

/// Has the host compact its memory; before that, every processor's new pages arrive on the kernel's lists.
///
/// # Errors
/// It has no compaction, or this user may not ask for it.
pub fn compact_memory() -> io::Result<()> {
    const COMPACT: &str = "/proc/sys/vm/compact_memory";
    std::fs::write(COMPACT, "1")
        .map_err(|error| io::Error::new(error.kind(), format!("no compaction: {COMPACT}: {error}")))
}

/// How often pages are sent to swap before those that stay are let be.
const TRIES: usize = 50;
