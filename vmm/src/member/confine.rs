//! What a member may ask of the host's kernel: the system calls that VMs need, and of those that could
//! do harm only the arguments that they need. Anything else ends the process by `SIGSYS`.
//!
//! The filter is made once in a colony, by its zygote, and all members have it from there. So there is one
//! for all threads of all VMs. A narrower one for each vCPU would be a kernel object for each process, and
//! Linux (6.18 was seen) locks up when some thousand of them are freed at once.
//!
//! What needs more than members may is done before, by the zygote, and handed down: `/dev/kvm` and
//! `/dev/userfaultfd` are open already.
//!
//! # Holes
//! - A filter sees no paths. Members open files for reading (their own `/proc`), or create such as were not
//!   there; none that exists can be opened for writing or taken away.
//! - What an io_uring is told to do, which members use for DMA, no filter sees.
//! - A zygote makes members under the filter that they have: they too could make copies of themselves. The
//!   copy can do no more than they can.
//! - Signals: the one that stops vCPUs, and `SIGABRT`, may be sent to any process of the user's.

use std::collections::BTreeMap;

use kvm_bindings as kvm;
use rustix::process::{Resource, Rlimit, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};
use serde::{Deserialize, Serialize};

use super::MemberError;
use crate::ipc::spawn::COPY_FLAGS;
use crate::kvm::kick::kick_signal;
use crate::window::IOCTLS as WINDOW_IOCTLS;
use crate::words::wide;

/// Whether members are confined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
pub enum Confinement {
    /// A system call that no VM needs ends the VM's process.
    #[default]
    On,
    /// It is logged by the kernel (`dmesg`, type 1326), and done.
    Log,
    /// There is no filter.
    Off,
}

/// The signal that ends a process which has made a forbidden system call.
pub const FORBIDDEN: i32 = libc::SIGSYS;

/// Confines this process and all copies of it. It can never gain privileges by a program that it runs, and
/// leaves no image of a guest's memory behind when it crashes.
///
/// # Errors
/// The kernel has no filters, or refused this one.
pub fn confine(confinement: Confinement) -> Result<(), MemberError> {
    let refused = |error: std::io::Error| MemberError::Confinement(error.to_string());
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
        .map_err(|error| refused(error.into()))?;
    rustix::thread::set_no_new_privs(true).map_err(|error| refused(error.into()))?;
    let otherwise = match confinement {
        Confinement::On => SeccompAction::KillProcess,
        Confinement::Log => SeccompAction::Log,
        Confinement::Off => return Ok(()),
    };
    // The flags of `clone3` are in memory, where no filter looks. Told that there is none, the C library
    // starts threads by `clone`.
    let no_clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let no_such_call = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    apply(no_clone3, SeccompAction::Allow, no_such_call)?;
    apply(allowed()?, otherwise, SeccompAction::Allow)
}

/// Makes a system call that no VM needs: a socket to the world.
#[cfg(debug_assertions)]
pub(super) fn break_out() -> Result<(), MemberError> {
    use rustix::net::{AddressFamily, SocketType, socket};
    let made = socket(AddressFamily::INET, SocketType::STREAM, None);
    made.map(drop).map_err(|error| MemberError::Window(error.into()))
}

fn apply(rules: Rules, otherwise: SeccompAction, then: SeccompAction) -> Result<(), MemberError> {
    let filter = SeccompFilter::new(rules, otherwise, then, TargetArch::x86_64).map_err(backend)?;
    let program = BpfProgram::try_from(filter).map_err(backend)?;
    apply_filter(&program).map_err(|error| MemberError::Confinement(error.to_string()))
}

fn backend(error: seccompiler::BackendError) -> MemberError {
    MemberError::Confinement(error.to_string())
}

/// By the call's number; without a rule every use of it matches, else one of them must.
type Rules = BTreeMap<i64, Vec<SeccompRule>>;
type Condition = Result<SeccompCondition, seccompiler::BackendError>;

/// The calls that need no look at their arguments.
const FREE: [i64; 66] = [
    // Memory. What could make it executable is below.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_userfaultfd,
    // Descriptors that are there.
    libc::SYS_close,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_read,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_stat,
    libc::SYS_statx,
    libc::SYS_write,
    libc::SYS_writev,
    // New ones, and the channel to the keeper.
    libc::SYS_eventfd2,
    libc::SYS_getsockopt,
    libc::SYS_memfd_create,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    // Devices outside, by order.
    libc::SYS_pipe2,
    libc::SYS_vmsplice,
    // DMA by the kernel.
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    // Threads.
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getcpu,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_membarrier,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    // Signals.
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    // Time and chance.
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_gettimeofday,
    libc::SYS_nanosleep,
    // Who and where it is.
    libc::SYS_geteuid,
    libc::SYS_getuid,
    libc::SYS_sysinfo,
    libc::SYS_time,
    libc::SYS_uname,
];

/// What a thread of the C library is made with (glibc; musl adds `CLONE_DETACHED`, which means nothing).
const THREAD_FLAGS: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID;

/// The bit of `O_TMPFILE` that is not `O_DIRECTORY`'s.
const TEMPORARY: i32 = libc::O_TMPFILE & !libc::O_DIRECTORY;
/// Flags of `open` that change something.
const CHANGING: i32 = libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC | libc::O_APPEND | TEMPORARY;
/// `O_LARGEFILE` of the kernel, which says nothing here; the C library has it as 0.
const LARGE_FILE: i32 = 0x8000;
/// How members create files of the arena.
const CREATING: i32 = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC;
/// `PR_GET_AUXV`, by which libraries learn what the processor can.
const GET_AUXV: u64 = 0x4155_5856;

fn allowed() -> Result<Rules, MemberError> {
    let mut rules: Rules = FREE.into_iter().map(|call| (call, Vec::new())).collect();
    let mut add = |call: i64, conditions: Vec<Condition>| -> Result<(), MemberError> {
        let conditions = conditions.into_iter().collect::<Result<_, _>>().map_err(backend)?;
        rules.entry(call).or_default().push(SeccompRule::new(conditions).map_err(backend)?);
        Ok(())
    };
    for request in KVM_IOCTLS.into_iter().chain(WINDOW_IOCTLS) {
        add(libc::SYS_ioctl, vec![is(1, request)])?;
    }
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        add(call, vec![has(2, libc::PROT_EXEC, 0)])?;
    }
    for (call, flags) in [(libc::SYS_openat, 2), (libc::SYS_open, 1)] {
        add(call, vec![has(flags, CHANGING, 0)])?;
        add(call, vec![has(flags, !LARGE_FILE, CREATING)])?;
    }
    for flags in [THREAD_FLAGS, THREAD_FLAGS | libc::CLONE_DETACHED] {
        add(libc::SYS_clone, vec![is(0, bits(flags))])?;
    }
    add(libc::SYS_clone, vec![is(0, COPY_FLAGS.unsigned_abs())])?;
    for command in [
        libc::F_DUPFD_CLOEXEC,
        libc::F_GETFD,
        libc::F_SETFD,
        libc::F_GETFL,
        libc::F_GET_SEALS,
        libc::F_ADD_SEALS,
    ] {
        add(libc::SYS_fcntl, vec![is(1, bits(command))])?;
    }
    add(libc::SYS_prctl, vec![is(0, bits(libc::PR_SET_NAME))])?;
    add(libc::SYS_prctl, vec![is(0, GET_AUXV)])?;
    add(libc::SYS_prctl, vec![is(0, bits(libc::PR_SET_PDEATHSIG)), is(1, bits(libc::SIGKILL))])?;
    for signal in [kick_signal(), libc::SIGABRT] {
        add(libc::SYS_tgkill, vec![is(2, bits(signal))])?;
    }
    // Limits are read, of this process, and not set.
    add(libc::SYS_prlimit64, vec![is(0, 0), is(2, 0)])?;
    Ok(rules)
}

/// A number that C has as `int`, in a register.
fn bits(value: i32) -> u64 {
    u64::from(value.cast_unsigned())
}

/// The argument has this value in its low half, which is all that the kernel takes of an `int`.
fn is(argument: u8, value: u64) -> Condition {
    let length = if value > u64::from(u32::MAX) { SeccompCmpArgLen::Qword } else { SeccompCmpArgLen::Dword };
    SeccompCondition::new(argument, length, SeccompCmpOp::Eq, value)
}

/// Of these bits the argument has those.
fn has(argument: u8, of: i32, those: i32) -> Condition {
    let operator = SeccompCmpOp::MaskedEq(bits(of));
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, bits(those))
}

/// `_IO` and its like of `<asm/ioctl.h>`, for KVM.
const fn request(direction: u64, number: u64, len_bytes: usize) -> u64 {
    direction << 30 | wide(len_bytes) << 16 | (kvm::KVMIO as u64) << 8 | number
}

const fn io(number: u64) -> u64 {
    request(0, number, 0)
}

const fn iow<T>(number: u64) -> u64 {
    request(1, number, size_of::<T>())
}

const fn ior<T>(number: u64) -> u64 {
    request(2, number, size_of::<T>())
}

const fn iowr<T>(number: u64) -> u64 {
    request(3, number, size_of::<T>())
}

/// What is asked of KVM, the most frequent first (Documentation/virt/kvm/api.rst).
const KVM_IOCTLS: [u64; 47] = [
    io(0x80),                                      // KVM_RUN
    ior::<kvm::kvm_regs>(0x81),                    // KVM_GET_REGS
    iow::<kvm::kvm_regs>(0x82),                    // KVM_SET_REGS
    iow::<kvm::kvm_msi>(0xa5),                     // KVM_SIGNAL_MSI
    iow::<kvm::kvm_irq_level>(0x61),               // KVM_IRQ_LINE
    ior::<kvm::kvm_sregs>(0x83),                   // KVM_GET_SREGS
    iow::<kvm::kvm_sregs>(0x84),                   // KVM_SET_SREGS
    iowr::<kvm::kvm_translation>(0x85),            // KVM_TRANSLATE
    iowr::<kvm::kvm_msrs>(0x88),                   // KVM_GET_MSRS
    iow::<kvm::kvm_msrs>(0x89),                    // KVM_SET_MSRS
    ior::<kvm::kvm_lapic_state>(0x8e),             // KVM_GET_LAPIC
    iow::<kvm::kvm_lapic_state>(0x8f),             // KVM_SET_LAPIC
    ior::<kvm::kvm_mp_state>(0x98),                // KVM_GET_MP_STATE
    iow::<kvm::kvm_mp_state>(0x99),                // KVM_SET_MP_STATE
    ior::<kvm::kvm_vcpu_events>(0x9f),             // KVM_GET_VCPU_EVENTS
    iow::<kvm::kvm_vcpu_events>(0xa0),             // KVM_SET_VCPU_EVENTS
    ior::<kvm::kvm_debugregs>(0xa1),               // KVM_GET_DEBUGREGS
    iow::<kvm::kvm_debugregs>(0xa2),               // KVM_SET_DEBUGREGS
    io(0xa2),                                      // KVM_SET_TSC_KHZ
    io(0xa3),                                      // KVM_GET_TSC_KHZ
    ior::<kvm::kvm_xsave>(0xa4),                   // KVM_GET_XSAVE
    iow::<kvm::kvm_xsave>(0xa5),                   // KVM_SET_XSAVE
    ior::<kvm::kvm_xsave>(0xcf),                   // KVM_GET_XSAVE2
    ior::<kvm::kvm_xcrs>(0xa6),                    // KVM_GET_XCRS
    iow::<kvm::kvm_xcrs>(0xa7),                    // KVM_SET_XCRS
    io(0xce),                                      // KVM_GET_STATS_FD
    iow::<kvm::kvm_clock_data>(0x7b),              // KVM_SET_CLOCK
    ior::<kvm::kvm_clock_data>(0x7c),              // KVM_GET_CLOCK
    iowr::<kvm::kvm_irqchip>(0x62),                // KVM_GET_IRQCHIP
    ior::<kvm::kvm_irqchip>(0x63),                 // KVM_SET_IRQCHIP
    ior::<kvm::kvm_pit_state2>(0x9f),              // KVM_GET_PIT2
    iow::<kvm::kvm_pit_state2>(0xa0),              // KVM_SET_PIT2
    io(0x01),                                      // KVM_CREATE_VM
    iowr::<kvm::kvm_msr_list>(0x02),               // KVM_GET_MSR_INDEX_LIST
    io(0x03),                                      // KVM_CHECK_EXTENSION
    io(0x04),                                      // KVM_GET_VCPU_MMAP_SIZE
    iowr::<kvm::kvm_cpuid2>(0x05),                 // KVM_GET_SUPPORTED_CPUID
    io(0x41),                                      // KVM_CREATE_VCPU
    iow::<kvm::kvm_userspace_memory_region>(0x46), // KVM_SET_USER_MEMORY_REGION
    io(0x47),                                      // KVM_SET_TSS_ADDR
    io(0x60),                                      // KVM_CREATE_IRQCHIP
    iow::<kvm::kvm_pit_config>(0x77),              // KVM_CREATE_PIT2
    iow::<kvm::kvm_cpuid2>(0x90),                  // KVM_SET_CPUID2
    iow::<kvm::kvm_enable_cap>(0xa3),              // KVM_ENABLE_CAP
    io(0x00),                                      // KVM_GET_API_VERSION
    io(0x9a),                                      // KVM_NMI
    io(0xad),                                      // KVM_KVMCLOCK_CTRL
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_fits_into_a_program_of_the_kernel() {
        let (rules, then) = (allowed().expect("rules"), SeccompAction::Allow);
        let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, then, TargetArch::x86_64);
        BpfProgram::try_from(filter.expect("a filter")).expect("a program");
    }

    #[test]
    fn requests_have_the_numbers_that_the_kernel_gives_them() {
        // `KVM_GET_REGS`, `KVM_SET_USER_MEMORY_REGION`, `KVM_GET_MSRS` as strace shows them.
        assert_eq!(ior::<kvm::kvm_regs>(0x81), 0x8090_ae81);
        assert_eq!(iow::<kvm::kvm_userspace_memory_region>(0x46), 0x4020_ae46);
        assert_eq!(iowr::<kvm::kvm_msrs>(0x88), 0xc008_ae88);
        assert!(KVM_IOCTLS.contains(&0xae80));
    }

    #[test]
    fn nothing_that_starts_programs_or_reaches_out_is_allowed() {
        let rules = allowed().expect("rules");
        for call in [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_socket,
            libc::SYS_socketpair,
            libc::SYS_connect,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_kill,
            libc::SYS_setuid,
            libc::SYS_mount,
            libc::SYS_bpf,
            libc::SYS_unlink,
            libc::SYS_unlinkat,
            libc::SYS_rename,
            libc::SYS_openat2,
            libc::SYS_pidfd_getfd,
        ] {
            assert!(!rules.contains_key(&call), "call {call}");
        }
    }
}
