//! An image file that says what a fuzzer likes.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Seek as _, Write as _};

use rustix::fs::{MemfdFlags, memfd_create};
use salp::boot::load_image;
use vm_memory::{Bytes as _, GuestAddress};

use super::bytes::Bytes;
use super::memory::CanaryRam;

/// 8 MiB: small enough that an image can ask for more, large enough that one can fit.
const PAGES: usize = 2048;

thread_local! {
    static RAM: RefCell<CanaryRam> = RefCell::new(CanaryRam::new(PAGES));
}

/// The first byte says how many vCPUs there are, and whether there is an initrd; the rest is the image.
///
/// # Panics
/// A property does not hold, see [`super`].
pub fn kernels(input: &[u8]) {
    let mut bytes = Bytes::new(input);
    let Some(how) = bytes.byte() else { return };
    let mut kernel = file(bytes.rest());
    let mut initrd = (how & 0x80 != 0).then(|| file(&[0x5a; 5000]));
    RAM.with_borrow(|ram| {
        ram.clear();
        let memory = ram.for_loader();
        let loaded = load_image(&memory, 1 + how % 8, &mut kernel, initrd.as_mut(), "console=ttyS0");
        ram.expect_whole();
        if let Ok(entry) = loaded {
            // What is entered is there.
            let mut first = [0];
            let read = memory.read_slice(&mut first, GuestAddress(entry.entry));
            assert!(read.is_ok(), "an image was loaded whose entry {:#x} is no memory", entry.entry);
            let _ = (entry.registers(), entry.special_registers(kvm_bindings::kvm_sregs::default()));
        }
    });
}

fn file(bytes: &[u8]) -> File {
    let mut file = File::from(memfd_create("image", MemfdFlags::CLOEXEC).expect("a file in memory"));
    file.write_all(bytes).expect("memory for a test");
    file.rewind().expect("a regular file");
    file
}
