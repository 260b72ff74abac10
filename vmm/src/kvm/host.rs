//! The host's KVM: `/dev/kvm` opened, checked once for everything that salp needs, and described.
//!
//! Key types: [`Kvm`], [`Capability`], [`HostKind`], [`HostDescription`]. The kind matters because on a
//! software KVM only 64-bit ring 3 runs natively and every exit costs tens of microseconds; figures are
//! always reported with it.
//!
//! Known hole: the kind is told by which vendor module is loaded and by `/proc/cpuinfo`; a host
//! that hides both is reported as software.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Cap;
use serde::{Deserialize, Serialize};

use super::error::KvmError;
use super::state::StateLayout;

/// The device.
const DEVICE: &str = "/dev/kvm";
/// The only version of the KVM API that was ever stable.
const API_VERSION: i32 = 12;

/// What salp cannot do without: capability, name, purpose.
const REQUIRED: [(Cap, &str, &str); 14] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "for guest memory"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "to stop vcpus"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID", "to set CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE", "to save vcpus"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS", "to save vcpus"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS", "to save vcpus"),
    (Cap::Xsave, "KVM_CAP_XSAVE", "to save vcpus"),
    (Cap::Xcrs, "KVM_CAP_XCRS", "to save vcpus"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ", "to save vcpus"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK", "to save the clock"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP", "for interrupts"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP", "for cheap VMs"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI", "for device interrupts"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR", "for Intel hosts"),
];

/// How this KVM runs guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostKind {
    /// Intel VMX.
    Vmx,
    /// AMD SVM.
    Svm,
    /// No hardware virtualization: guests run in the host's ring 3, privileged code is emulated.
    Software,
}

impl HostKind {
    /// Whether the processor itself runs the guest's privileged code.
    #[must_use]
    pub const fn is_hardware(self) -> bool {
        matches!(self, Self::Vmx | Self::Svm)
    }

    /// Decides from the vendor modules present, then from the processor's flags.
    fn detect(module_is_loaded: impl Fn(&str) -> bool, flags: &str) -> Self {
        let has = |flag| flags.split_ascii_whitespace().any(|f| f == flag);
        if module_is_loaded("kvm_intel") {
            Self::Vmx
        } else if module_is_loaded("kvm_amd") {
            Self::Svm
        } else if module_is_loaded("kvm_pvm") {
            Self::Software
        } else if has("vmx") {
            Self::Vmx
        } else if has("svm") {
            Self::Svm
        } else {
            Self::Software
        }
    }
}

/// The host as it is written next to figures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostDescription {
    /// The processor's model name, from `/proc/cpuinfo`.
    pub processor: String,
    /// Logical processors that this process may use.
    pub processors: usize,
    /// The running kernel's release.
    pub kernel_release: String,
    /// How KVM runs guests.
    pub kind: HostKind,
}

impl HostDescription {
    /// Reads it from `/proc` and `/sys`; needs no KVM. Unreadable facts are "unknown".
    #[must_use]
    pub fn read() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            cpuinfo
                .lines()
                .find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'))
                .map(str::trim)
        };
        let loaded = |module: &str| Path::new("/sys/module").join(module).exists();
        Self {
            processor: field("model name").unwrap_or("unknown").to_owned(),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            kernel_release: fs::read_to_string("/proc/sys/kernel/osrelease")
                .map_or_else(|_| "unknown".to_owned(), |s| s.trim().to_owned()),
            kind: HostKind::detect(loaded, field("flags").unwrap_or_default()),
        }
    }
}

/// One capability that salp cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// As the kernel's headers name it.
    pub name: &'static str,
    /// What salp needs it for.
    pub purpose: &'static str,
    /// Whether this KVM has it.
    pub is_present: bool,
}

/// The opened KVM. One per process is enough; VMs are made from it.
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
    description: HostDescription,
    cpuid: CpuId,
    /// Found with the first vCPU, the same for all VMs of this host.
    layout: OnceLock<Arc<StateLayout>>,
}

impl Kvm {
    /// Opens `/dev/kvm` and checks it.
    ///
    /// # Errors
    /// One that says what to do: the device is missing or not permitted, the API version is
    /// unknown, or a capability is missing (the first of them is named).
    pub fn open() -> Result<Self, KvmError> {
        let fd = open_device()?;
        if let Some((_, name, purpose)) = REQUIRED.into_iter().find(|c| !fd.check_extension(c.0)) {
            return Err(KvmError::CapabilityMissing { name, purpose });
        }
        let cpuid = fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::ioctl("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(Self { fd, description: HostDescription::read(), cpuid, layout: OnceLock::new() })
    }

    /// All capabilities that salp cannot do without, whether they are there or not.
    ///
    /// # Errors
    /// As for [`open`](Self::open), but for missing capabilities.
    pub fn look_up_capabilities() -> Result<Vec<Capability>, KvmError> {
        let fd = open_device()?;
        let look_up =
            |(cap, name, purpose)| Capability { name, purpose, is_present: fd.check_extension(cap) };
        Ok(REQUIRED.into_iter().map(look_up).collect())
    }

    /// The host, for reports.
    #[must_use]
    pub const fn description(&self) -> &HostDescription {
        &self.description
    }

    /// The CPUID leaves that this KVM can give to guests.
    #[must_use]
    pub const fn supported_cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// The most vCPUs that one VM should have here.
    #[must_use]
    pub fn recommended_vcpus(&self) -> usize {
        self.fd.get_nr_vcpus()
    }

    pub(super) const fn fd(&self) -> &kvm_ioctls::Kvm {
        &self.fd
    }

    pub(super) const fn layout_cell(&self) -> &OnceLock<Arc<StateLayout>> {
        &self.layout
    }
}

/// The device, which speaks the version of the API that this program knows.
fn open_device() -> Result<kvm_ioctls::Kvm, KvmError> {
    let fd = kvm_ioctls::Kvm::new()
        .map_err(|errno| open_error(std::io::Error::from_raw_os_error(errno.errno())))?;
    match fd.get_api_version() {
        API_VERSION => Ok(fd),
        found => Err(KvmError::ApiVersion { found }),
    }
}

/// What a failed `open` means.
fn open_error(source: std::io::Error) -> KvmError {
    let path = DEVICE;
    match source.kind() {
        ErrorKind::NotFound => KvmError::DeviceMissing { path },
        ErrorKind::PermissionDenied => KvmError::NoPermission { path },
        _ => KvmError::Open { path, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_is_told_by_module_then_by_flags() {
        let with = |module: &'static str| move |m: &str| m == module;
        assert_eq!(HostKind::detect(with("kvm_intel"), ""), HostKind::Vmx);
        assert_eq!(HostKind::detect(with("kvm_amd"), ""), HostKind::Svm);
        assert_eq!(HostKind::detect(with("kvm_pvm"), "fpu vmx"), HostKind::Software);
        assert_eq!(HostKind::detect(with(""), "fpu svm sse"), HostKind::Svm);
        assert_eq!(HostKind::detect(with(""), "fpu svm_lock"), HostKind::Software);
    }

    #[test]
    fn open_errors_are_told_apart() {
        let error = |kind| open_error(std::io::Error::from(kind));
        assert!(matches!(error(ErrorKind::NotFound), KvmError::DeviceMissing { .. }));
        assert!(matches!(error(ErrorKind::PermissionDenied), KvmError::NoPermission { .. }));
        assert!(matches!(error(ErrorKind::Interrupted), KvmError::Open { .. }));
    }

    #[test]
    fn the_description_is_serialisable() {
        let description = HostDescription::read();
        let text = serde_json::to_string(&description).expect("plain data");
        let back: HostDescription = serde_json::from_str(&text).expect("its own output");
        assert_eq!(back, description);
    }
}
