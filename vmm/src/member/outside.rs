//! Devices outside, by order: what tests and benchmarks pin, load and store, and pages that are handed
//! to the host's kernel.
//!
//! One device works through the window, as the DMA engine's own threads do. The other is the host's
//! kernel: an io_uring with registered buffers, whose transfers end when a pipe says so. It has the
//! *physical* pages that were there at the registration: whatever a window maps later, it reads and
//! writes those.
//!
//! A page of the kernel's stays pinned until the last transfer that uses it is over, also after
//! [`Order::Unpin`](super::messages::Order::Unpin).
//!
//! Known hole: one transfer waits at a time.
#![expect(unsafe_code, reason = "registered buffers, their transfers and vmsplice name memory by address")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use io_uring::{IoUring, opcode, squeue, types};
use rustix::pipe::{PipeFlags, pipe_with};

use super::MemberError;
use super::life::Member;
use super::messages::PinHolder;
use crate::space::{Access, Space, SpaceError};
use crate::window::Window;
use crate::words::{Gfn, Gpa, HostAddress, PAGE_BYTES, index, wide};

/// Bytes that a device moves: a word at the start of a page.
const WORD_BYTES: usize = 8;
/// Buffers that can be registered at one time.
const BUFFERS: u32 = 16;

/// What a completion is, above the number of its buffer.
const KIND_SHIFT: u32 = 32;
const LOADED: u64 = 1;
const STORED: u64 = 2;
const LET_GO: u64 = 3;

const fn user_data(kind: u64, buffer: u32) -> u64 {
    kind << KIND_SHIFT | buffer as u64
}

/// The devices outside of one VM.
#[derive(Default)]
pub(super) struct Outside {
    /// Pages pinned for the first device, as often as they are.
    pins: u64,
    kernel: Option<KernelDevice>,
}

impl Outside {
    /// Whether a page of the VM is pinned by order.
    pub(super) fn holds_pages(&self) -> bool {
        self.pins > 0 || self.kernel.as_ref().is_some_and(|kernel| kernel.buffers.iter().any(Option::is_some))
    }
}

/// Pages that the host's kernel has.
struct Buffer {
    first: Gfn,
    pages: u64,
    host: HostAddress,
    /// Unregistered, but not let go of yet.
    is_leaving: bool,
}

impl Buffer {
    fn page(&self, gfn: Gfn) -> Option<HostAddress> {
        let page = gfn.0.checked_sub(self.first.0).filter(|page| *page < self.pages)?;
        Some(self.host.plus(index(page) * PAGE_BYTES))
    }
}

/// The host's kernel as a device.
struct KernelDevice {
    // First: closed before the pages that it works on can go.
    ring: IoUring,
    /// What is stored comes out of this pipe.
    source: (OwnedFd, OwnedFd),
    /// What is loaded goes into this one.
    sink: (OwnedFd, OwnedFd),
    buffers: Vec<Option<Buffer>>,
    /// The page that a transfer waits for data for, and its buffer.
    waiting: Option<(Gfn, u32)>,
    space: Arc<Space<Window>>,
}

impl KernelDevice {
    fn new(space: Arc<Space<Window>>) -> io::Result<Self> {
        let ring = IoUring::new(BUFFERS)?;
        ring.submitter().register_buffers_sparse(BUFFERS)?;
        let pipe = || pipe_with(PipeFlags::CLOEXEC);
        let buffers = (0..BUFFERS).map(|_| None).collect();
        Ok(Self { ring, source: pipe()?, sink: pipe()?, buffers, waiting: None, space })
    }

    /// Registers pages, which the caller has pinned; they are unpinned when the kernel lets go.
    fn register(&mut self, first: Gfn, pages: u64) -> io::Result<()> {
        let free = (0..BUFFERS).zip(&self.buffers).find(|(_, buffer)| buffer.is_none());
        let (number, _) =
            free.ok_or_else(|| io::Error::other(format!("{BUFFERS} buffers are registered")))?;
        let host = self.space.host().host_address(first.gpa());
        let vector = libc::iovec { iov_base: host.as_ptr().cast(), iov_len: index(pages * wide(PAGE_BYTES)) };
        // SAFETY: the pages are pinned and stay so until the tag says that the kernel has let go.
        unsafe {
            let submitter = self.ring.submitter();
            submitter.register_buffers_update(number, &[vector], Some(&[user_data(LET_GO, number)]))?;
        }
        self.buffers[number as usize] = Some(Buffer { first, pages, host, is_leaving: false });
        Ok(())
    }

    /// Whether these pages are one of its buffers.
    fn has(&self, first: Gfn, pages: u64) -> Option<u32> {
        let is_it =
            |buffer: &Buffer| (buffer.first, buffer.pages, buffer.is_leaving) == (first, pages, false);
        (0..).zip(&self.buffers).find(|(_, buffer)| buffer.as_ref().is_some_and(is_it)).map(|(at, _)| at)
    }

    /// The buffer with this page, and the page's address.
    fn buffer_of(&self, gfn: Gfn) -> Option<(u32, HostAddress)> {
        (0..).zip(&self.buffers).find_map(|(at, buffer)| {
            let buffer = buffer.as_ref().filter(|buffer| !buffer.is_leaving)?;
            Some((at, buffer.page(gfn)?))
        })
    }

    /// Takes a buffer out of the table, and waits until the kernel has let go, if nothing waits there.
    fn unregister(&mut self, number: u32) -> io::Result<()> {
        let none = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: an empty entry takes a buffer out of the table; nothing new is registered.
        unsafe { self.ring.submitter().register_buffers_update(number, &[none], Some(&[0]))? };
        if let Some(buffer) = &mut self.buffers[number as usize] {
            buffer.is_leaving = true;
        }
        match self.waiting {
            Some((_, of)) if of == number => Ok(()),
            _ => self.wait_until(|this, _| this.buffers[number as usize].is_none()),
        }
    }

    /// Has the kernel wait for a word to store at the start of a page.
    fn begin(&mut self, gfn: Gfn) -> io::Result<()> {
        if let Some((gfn, _)) = self.waiting {
            return Err(io::Error::other(format!("a transfer to {gfn} is under way")));
        }
        let (number, page) = self.buffer_of(gfn).ok_or_else(|| no_buffer(gfn))?;
        let fd = types::Fd(self.source.0.as_raw_fd());
        let entry = opcode::ReadFixed::new(fd, page.as_ptr(), WORD_BYTES as u32, buffer_index(number));
        self.submit(&entry.build().user_data(user_data(STORED, number)))?;
        self.waiting = Some((gfn, number));
        Ok(())
    }

    /// Stores a word at the start of a page.
    fn store(&mut self, gfn: Gfn, value: u64) -> io::Result<()> {
        if self.waiting.is_none() {
            self.begin(gfn)?;
        }
        match self.waiting {
            Some((waiting, _)) if waiting != gfn => {
                return Err(io::Error::other(format!("a transfer to {waiting} is under way")));
            }
            _ => {}
        }
        rustix::io::write(&self.source.1, &value.to_ne_bytes())?;
        self.wait_until(|_, kind| kind == STORED)?;
        let Some((_, number)) = self.waiting.take() else { return Ok(()) };
        if self.buffers[number as usize].as_ref().is_some_and(|buffer| buffer.is_leaving) {
            self.wait_until(|this, _| this.buffers[number as usize].is_none())?;
        }
        Ok(())
    }

    /// The word at the start of a page.
    fn load(&mut self, gfn: Gfn) -> io::Result<u64> {
        let (number, page) = self.buffer_of(gfn).ok_or_else(|| no_buffer(gfn))?;
        let fd = types::Fd(self.sink.1.as_raw_fd());
        let entry = opcode::WriteFixed::new(fd, page.as_ptr(), WORD_BYTES as u32, buffer_index(number));
        self.submit(&entry.build().user_data(user_data(LOADED, number)))?;
        self.wait_until(|_, kind| kind == LOADED)?;
        let mut word = [0; WORD_BYTES];
        rustix::io::read(&self.sink.0, &mut word)?;
        Ok(u64::from_ne_bytes(word))
    }

    fn submit(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: the entry names a page of a registered buffer, pinned until the kernel has let go of
        // it, and an end of a pipe that lives as long as the ring.
        unsafe { self.ring.submission().push(entry).map_err(io::Error::other)? };
        self.ring.submit()?;
        Ok(())
    }

    /// Takes completions until `is_over` holds after one, given its kind.
    fn wait_until(&mut self, is_over: impl Fn(&Self, u64) -> bool) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            let completions: Vec<_> = self
                .ring
                .completion()
                .map(|completion| (completion.user_data(), completion.result()))
                .collect();
            let mut is_done = false;
            for (data, result) in completions {
                let kind = data >> KIND_SHIFT;
                if kind == LET_GO {
                    self.let_go(index(data & u64::from(u32::MAX)))?;
                } else if usize::try_from(result).ok() != Some(WORD_BYTES) {
                    return Err(io::Error::other(format!("a transfer by the kernel ended with {result}")));
                }
                is_done |= is_over(self, kind);
            }
            if is_done {
                return Ok(());
            }
        }
    }

    /// The kernel has let go of a buffer.
    fn let_go(&mut self, number: usize) -> io::Result<()> {
        match self.buffers[number].take() {
            Some(buffer) => self.space.unpin(buffer.first, buffer.pages).map_err(io::Error::other),
            None => Ok(()),
        }
    }
}

fn no_buffer(gfn: Gfn) -> io::Error {
    io::Error::other(format!("{gfn} is in no registered buffer"))
}

/// A number below [`BUFFERS`] as the kernel wants it.
fn buffer_index(number: u32) -> u16 {
    u16::try_from(number).expect("there are few buffers")
}

impl Member {
    /// Pins pages for a device outside.
    pub(super) fn pin(&mut self, first: Gfn, pages: u64, holder: PinHolder) -> Result<(), MemberError> {
        let space = Arc::clone(&self.life()?.space);
        match holder {
            PinHolder::Salp(access) => {
                space.pin(first, pages, access)?;
                self.outside.pins += pages;
            }
            PinHolder::Kernel => {
                if self.outside.kernel.is_none() {
                    let device = KernelDevice::new(Arc::clone(&space)).map_err(MemberError::Window)?;
                    self.outside.kernel = Some(device);
                }
                space.pin(first, pages, Access::ReadWrite)?;
                if let Some(kernel) = &mut self.outside.kernel
                    && let Err(error) = kernel.register(first, pages)
                {
                    space.unpin(first, pages)?;
                    return Err(MemberError::Window(error));
                }
            }
        }
        Ok(())
    }

    /// Takes such a pin off.
    pub(super) fn unpin(&mut self, first: Gfn, pages: u64) -> Result<(), MemberError> {
        let space = Arc::clone(&self.life()?.space);
        if let Some(kernel) = &mut self.outside.kernel
            && let Some(number) = kernel.has(first, pages)
        {
            return kernel.unregister(number).map_err(MemberError::Window);
        }
        space.unpin(first, pages)?;
        self.outside.pins -= pages;
        Ok(())
    }

    /// The kernel begins a transfer to a page.
    pub(super) fn device_begin(&mut self, gfn: Gfn) -> Result<(), MemberError> {
        match &mut self.outside.kernel {
            Some(kernel) => kernel.begin(gfn).map_err(MemberError::Window),
            None => Err(MemberError::Window(no_buffer(gfn))),
        }
    }

    /// A device stores a word at the start of a page.
    pub(super) fn device_store(&mut self, gfn: Gfn, value: u64) -> Result<(), MemberError> {
        if let Some(kernel) = &mut self.outside.kernel
            && (kernel.buffer_of(gfn).is_some() || kernel.waiting.is_some_and(|(waiting, _)| waiting == gfn))
        {
            return kernel.store(gfn, value).map_err(MemberError::Window);
        }
        for (word, half) in self.device_word(gfn)?.iter().zip([value, value >> 32]) {
            word.store((half & u64::from(u32::MAX)) as u32, Ordering::Release);
        }
        Ok(())
    }

    /// A device loads the word at the start of a page.
    pub(super) fn device_load(&mut self, gfn: Gfn) -> Result<u64, MemberError> {
        if let Some(kernel) = &mut self.outside.kernel
            && kernel.buffer_of(gfn).is_some()
        {
            return kernel.load(gfn).map_err(MemberError::Window);
        }
        let [low, high] = self.device_word(gfn)?.map(|word| u64::from(word.load(Ordering::Acquire)));
        Ok(high << 32 | low)
    }

    fn device_word(&self, gfn: Gfn) -> Result<[&AtomicU32; 2], MemberError> {
        let space = &self.life()?.space;
        if !space.pinned_gfns().contains(&gfn) {
            return Err(SpaceError::NotPinned { gfn }.into());
        }
        let word = |offset: u64| space.host().word(Gpa(gfn.gpa().0 + offset));
        match (word(0), word(4)) {
            (Some(low), Some(high)) => Ok([low, high]),
            _ => Err(SpaceError::NotMemory { gfn }.into()),
        }
    }

    /// Gives a page to a pipe, uncopied.
    pub(super) fn hand_over(&self, gfn: Gfn, descriptors: &[OwnedFd]) -> Result<(), MemberError> {
        let space = &self.life()?.space;
        let Some(pipe) = descriptors.first() else {
            return Err(MemberError::Protocol("a page is handed over with a pipe"));
        };
        if !space.shape().contains(gfn.gpa(), PAGE_BYTES) {
            return Err(SpaceError::NotMemory { gfn }.into());
        }
        let page = space.host().host_address(gfn.gpa()).as_ptr().cast();
        let vector = libc::iovec { iov_base: page, iov_len: PAGE_BYTES };
        // SAFETY: the window maps the page as long as the space lives; the kernel takes a reference of
        // its own on what is there.
        let given = unsafe { libc::vmsplice(pipe.as_raw_fd(), &raw const vector, 1, 0) };
        match usize::try_from(given) {
            Ok(PAGE_BYTES) => Ok(()),
            Ok(bytes) => {
                Err(MemberError::Window(io::Error::other(format!("{bytes} of {PAGE_BYTES} bytes given"))))
            }
            Err(_) => Err(MemberError::Window(io::Error::last_os_error())),
        }
    }
}
