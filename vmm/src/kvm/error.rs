//! What can go wrong with KVM, and whose fault it is: the host's (missing device, capability), or
//! one call's (named by its ioctl).

use thiserror::Error;

/// An error of the KVM backend.
#[derive(Debug, Error)]
pub enum KvmError {
    /// The device file does not exist: no KVM module, or a container without the device.
    #[error("{path} does not exist: the kvm module is not loaded, or the device was not passed in")]
    DeviceMissing {
        /// The path that was tried.
        path: &'static str,
    },
    /// The device file may not be opened for reading and writing.
    #[error("no permission to open {path}: be root, or in the group that owns it")]
    NoPermission {
        /// The path that was tried.
        path: &'static str,
    },
    /// Opening failed for another reason.
    #[error("cannot open {path}")]
    Open {
        /// The path that was tried.
        path: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The kernel speaks another version of the KVM API.
    #[error("/dev/kvm answers with api version {found}, 12 expected: it is no kvm device, or a foreign one")]
    ApiVersion {
        /// What `KVM_GET_API_VERSION` returned.
        found: i32,
    },
    /// The kernel lacks something without which salp cannot run.
    #[error("this kvm lacks the capability {name}, needed {purpose}")]
    CapabilityMissing {
        /// The capability, as the kernel's headers name it.
        name: &'static str,
        /// What salp needs it for.
        purpose: &'static str,
    },
    /// An ioctl or system call failed.
    #[error("{name} failed: {source}")]
    Ioctl {
        /// The ioctl or system call.
        name: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The kernel refused one MSR of a state.
    #[error("KVM_SET_MSRS refused msr {index:#x} = {value:#x}")]
    MsrRefused {
        /// The register's number.
        index: u32,
        /// The value that was to be set.
        value: u64,
    },
    /// A saved state does not fit the VM it is set into.
    #[error("the state has {what} = {found}, this vm {expected}")]
    StateMismatch {
        /// What differs.
        what: &'static str,
        /// What the state has.
        found: u64,
        /// What the VM has.
        expected: u64,
    },
    /// The VM was made with another interrupt controller than this operation needs.
    #[error("{operation} needs the {needed} irqchip")]
    WrongIrqchip {
        /// What was asked for.
        operation: &'static str,
        /// The interrupt controller that it needs.
        needed: &'static str,
    },
    /// The operation needs a stopped vCPU.
    #[error("vcpu {vcpu} is not stopped")]
    NotStopped {
        /// The vCPU's index.
        vcpu: usize,
    },
    /// The vCPU did not stop in time: it is inside a fault that nobody resolves, or in a call that
    /// does not heed its stop signal.
    #[error("vcpu {vcpu} did not stop within {waited_ms} ms")]
    StopTimeout {
        /// The vCPU's index.
        vcpu: usize,
        /// How long it was waited for.
        waited_ms: u64,
    },
    /// The vCPU's thread has left, by order or by a panic.
    #[error("the thread of vcpu {vcpu} is gone")]
    Gone {
        /// The vCPU's index.
        vcpu: usize,
    },
    /// No call is open in the stopped vCPU.
    #[error("vcpu {vcpu} is not inside a call")]
    NoOpenCall {
        /// The vCPU's index.
        vcpu: usize,
    },
}

impl KvmError {
    /// The error of an ioctl of kvm-ioctls, for `map_err`.
    pub(super) fn ioctl(name: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |errno| Self::Ioctl { name, source: std::io::Error::from_raw_os_error(errno.errno()) }
    }

    /// An ioctl of kvm-ioctls, which a test can make fail.
    pub(super) fn call<T>(
        name: &'static str,
        ioctl: impl FnOnce() -> Result<T, kvm_ioctls::Error>,
    ) -> Result<T, Self> {
        crate::failure::point(name).map_err(|source| Self::Ioctl { name, source: source.into() })?;
        ioctl().map_err(Self::ioctl(name))
    }

    /// The error of a system call whose answer is in `errno`.
    pub(super) fn last_os(name: &'static str) -> Self {
        Self::Ioctl { name, source: std::io::Error::last_os_error() }
    }
}
