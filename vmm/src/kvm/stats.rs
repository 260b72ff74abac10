//! The kernel's own counters of a VM or a vCPU (`KVM_GET_STATS_FD`), by name.
//!
//! The file holds a header, then descriptors, then data; all is read through the descriptor, so
//! nothing depends on the kernel's structures. Histograms are left out.
#![expect(unsafe_code, reason = "KVM_GET_STATS_FD has no wrapper in kvm-ioctls")]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_bindings::{
    KVM_STATS_TYPE_LINEAR_HIST, KVM_STATS_TYPE_LOG_HIST, KVM_STATS_TYPE_MASK, kvm_stats_desc,
    kvm_stats_header,
};
use vmm_sys_util::ioctl::ioctl;

use super::error::KvmError;

/// The ioctl's number, in a module of its own because the macro makes it public.
mod number {
    vmm_sys_util::ioctl_io_nr!(KVM_GET_STATS_FD, kvm_bindings::KVMIO, 0xce);
}

/// More descriptors or longer names than this are not believed.
const LIMIT: usize = 4096;

/// Reads the counters of a VM (`pf_taken` is a vCPU's, `remote_tlb_flush` a VM's; see the kernel's
/// `kvm_vm_stats_desc` and `kvm_vcpu_stats_desc`).
///
/// # Errors
/// The kernel has no binary statistics, or a read failed.
pub fn stats(of: &impl AsRawFd) -> Result<BTreeMap<String, u64>, KvmError> {
    // SAFETY: the ioctl takes no argument and returns a new descriptor or -1.
    let fd = unsafe { ioctl(of, number::KVM_GET_STATS_FD()) };
    if fd < 0 {
        return Err(KvmError::last_os("KVM_GET_STATS_FD"));
    }
    // SAFETY: the descriptor is new and owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    read(&file).map_err(|source| KvmError::Ioctl { name: "reading kvm statistics", source })
}

/// The 4 bytes at `offset` as a number. The caller has checked the bounds.
fn word(bytes: &[u8], offset: usize) -> u32 {
    let word = bytes[offset..offset + 4].try_into();
    u32::from_ne_bytes(word.expect("a slice of 4"))
}

fn size(value: u32) -> usize {
    usize::try_from(value).expect("32 bits fit in 64")
}

fn read(file: &File) -> std::io::Result<BTreeMap<String, u64>> {
    let mut header = [0; size_of::<kvm_stats_header>()];
    file.read_exact_at(&mut header, 0)?;
    let at = |offset| word(&header, offset);
    let name_bytes = size(at(std::mem::offset_of!(kvm_stats_header, name_size)));
    let count = size(at(std::mem::offset_of!(kvm_stats_header, num_desc)));
    let descriptors_at = at(std::mem::offset_of!(kvm_stats_header, desc_offset));
    let data_at = at(std::mem::offset_of!(kvm_stats_header, data_offset));
    if name_bytes > LIMIT || count > LIMIT {
        return Err(std::io::Error::other("the statistics header makes no sense"));
    }
    let fixed_bytes = size_of::<kvm_stats_desc>();
    let mut descriptors = vec![0; (fixed_bytes + name_bytes) * count];
    file.read_exact_at(&mut descriptors, descriptors_at.into())?;
    let mut counters = BTreeMap::new();
    for descriptor in descriptors.chunks_exact(fixed_bytes + name_bytes) {
        let flags = word(descriptor, std::mem::offset_of!(kvm_stats_desc, flags));
        let kind = flags & KVM_STATS_TYPE_MASK;
        if kind == KVM_STATS_TYPE_LINEAR_HIST || kind == KVM_STATS_TYPE_LOG_HIST {
            continue;
        }
        let offset = word(descriptor, std::mem::offset_of!(kvm_stats_desc, offset));
        let mut value = [0; 8];
        file.read_exact_at(&mut value, u64::from(data_at) + u64::from(offset))?;
        let name = descriptor[fixed_bytes..].split(|&byte| byte == 0).next();
        let name = String::from_utf8_lossy(name.unwrap_or_default()).into_owned();
        counters.insert(name, u64::from_ne_bytes(value));
    }
    Ok(counters)
}
