//! Devices that work on pinned pages of a window: a thread of this process, and the host's kernel.
#![expect(unsafe_code, reason = "io_uring works on raw addresses of a window")]

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, types};

use super::nursery::Vm;
use crate::space::Access;
use crate::words::{Gfn, PAGE_BYTES};

/// Who transfers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    /// A thread of the monitor.
    Thread,
    /// The host's kernel, by a buffer registered with io_uring.
    Kernel,
}

/// A device that holds one pinned page of a VM. The pin ends with it.
pub(super) struct Device {
    vm: Arc<Vm>,
    gfn: Gfn,
    ring: Option<Ring>,
}

struct Ring {
    uring: IoUring,
    source: OwnedFd,
    sink: OwnedFd,
}

impl Device {
    pub(super) fn pin(vm: &Arc<Vm>, gfn: Gfn, engine: Engine) -> Self {
        vm.space.pin(gfn, 1, Access::ReadWrite).expect("a pin");
        let ring = match engine {
            Engine::Thread => None,
            Engine::Kernel => Ring::over(vm, gfn),
        };
        Self { vm: Arc::clone(vm), gfn, ring }
    }

    fn address(&self) -> *mut u8 {
        self.vm.window().host_address(self.gfn.gpa()).as_ptr()
    }

    /// The device writes the page: all words become `value`.
    pub(super) fn write(&mut self, value: u64) {
        let address = self.address();
        match &mut self.ring {
            None => self.vm.set(self.gfn, value),
            Some(ring) => ring.write(address, value),
        }
    }

    /// The device reads the page.
    pub(super) fn read(&mut self) -> u64 {
        let address = self.address();
        match &mut self.ring {
            None => self.vm.get(self.gfn),
            Some(ring) => ring.read(address),
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        drop(self.ring.take());
        self.vm.space.unpin(self.gfn, 1).expect("the pin is there");
    }
}

impl Ring {
    /// None, and a loud line, where io_uring is not permitted: then a thread does it.
    fn over(vm: &Vm, gfn: Gfn) -> Option<Self> {
        let uring = match IoUring::new(4) {
            Ok(uring) => uring,
            Err(error) => {
                println!("SKIPPED: io_uring as a device: {error}");
                return None;
            }
        };
        let address = vm.window().host_address(gfn.gpa()).as_ptr();
        let buffer = libc::iovec { iov_base: address.cast(), iov_len: PAGE_BYTES };
        // SAFETY: the page is pinned: it is mapped and stays where it is until the ring is closed.
        unsafe { uring.submitter().register_buffers(&[buffer]) }.expect("a registered buffer");
        let (source, sink) = rustix::pipe::pipe().expect("a pipe");
        Some(Self { uring, source, sink })
    }

    fn write(&mut self, address: *mut u8, value: u64) {
        let page: Vec<u8> = std::iter::repeat_n(value.to_ne_bytes(), PAGE_BYTES / 8).flatten().collect();
        assert_eq!(rustix::io::write(&self.sink, &page).expect("a pipe"), PAGE_BYTES);
        let file = types::Fd(self.source.as_raw_fd());
        self.run(&opcode::ReadFixed::new(file, address, LEN, 0).offset(u64::MAX).build());
    }

    fn read(&mut self, address: *mut u8) -> u64 {
        let file = types::Fd(self.sink.as_raw_fd());
        self.run(&opcode::WriteFixed::new(file, address, LEN, 0).offset(u64::MAX).build());
        let mut page = [0; PAGE_BYTES];
        assert_eq!(rustix::io::read(&self.source, &mut page).expect("a pipe"), PAGE_BYTES);
        let mut words =
            page.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("8 bytes")));
        let first = words.next().expect("a page has words");
        assert!(words.all(|word| word == first), "the device read a torn page");
        first
    }

    fn run(&mut self, entry: &io_uring::squeue::Entry) {
        // SAFETY: the buffer is registered, and its page is pinned until after the completion.
        unsafe { self.uring.submission().push(entry) }.expect("room in the queue");
        self.uring.submit_and_wait(1).expect("a submission");
        let completion = self.uring.completion().next().expect("a completion");
        assert_eq!(usize::try_from(completion.result()).ok(), Some(PAGE_BYTES), "{completion:?}");
    }
}

/// Bytes of a transfer.
const LEN: u32 = 4096;
const _: () = assert!(LEN as usize == PAGE_BYTES);
