//! Other processes of the same binary, and what becomes of them.
//!
//! A process with threads is never forked: [`spawn_self`] goes through `posix_spawn`, which runs
//! nothing of the parent's in the child and copies no page tables. Descriptors are handed over at
//! fixed numbers, which the child [adopts](adopt); all others are close-on-exec.
//!
//! A [`Child`] is always reaped: dropping it kills the process and waits for it. Its pidfd becomes
//! readable when the process has ended, whatever way.
//!
//! # Copies
//! To exec costs each process a copy of all that the dynamic linker relocates. A child with one thread
//! can make copies of itself instead ([`copy_beside`]), which share that: they are children of *its*
//! parent, which learns their number by message and takes them over ([`Child::of`]).
//!
//! # A child without its parent
//! `posix_spawn` cannot set a parent-death signal, so the child does, with [`die_with_parent`]; a copy
//! has none until it does so too. That signal belongs to the parent's *thread* that spawned, for copies
//! the one that spawned the original: it also comes when only that thread ends. So whoever wants his
//! children to live as long as he does spawns them from a thread that does.
#![expect(
    unsafe_code,
    reason = "posix_spawn and clone are not in std or rustix; inherited descriptors have only numbers"
)]

use std::env;
use std::ffi::{CString, NulError, OsStr, OsString};
use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;
use std::ptr::null_mut;
use std::sync::{Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, FdFlags};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};

/// The running binary, even after its file was replaced.
const SELF: &std::ffi::CStr = c"/proc/self/exe";
/// Environment variable that tells a child its parent's process id.
const PARENT_VARIABLE: &str = "SALP_PARENT_PID";
/// The first number a descriptor may be handed over at: 0 to 2 are the standard streams.
pub const FIRST_HANDED_OVER: RawFd = 3;

/// Why a process could not be started, watched or taken from.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The host refused a call.
    #[error("cannot {action}: {source}")]
    Host {
        /// What was being done.
        action: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// An argument or variable has a NUL byte in it.
    #[error("cannot pass a text with a NUL byte to a child: {source}")]
    Nul {
        /// The text and where the byte is.
        source: NulError,
    },
    /// A descriptor cannot be handed over or adopted at this number.
    #[error("descriptor {number} cannot be handed over or adopted: {reason}")]
    Number {
        /// The number in the child.
        number: RawFd,
        /// Why not.
        reason: &'static str,
    },
    /// A process with several threads cannot be copied.
    #[error("this process has more than one thread and cannot be copied")]
    Threads,
    /// This process was not started by [`spawn_self`], or its parent has ended already.
    #[error("the parent process is gone, or this process was not started by salp")]
    NoParent,
}

impl SpawnError {
    fn host(action: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Host { action, source: source.into() }
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It exited with this code.
    Exited(i32),
    /// This signal killed it.
    Killed(i32),
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exited with code {code}"),
            Self::Killed(libc::SIGSYS) => write!(f, "was killed for a forbidden system call"),
            Self::Killed(signal) => write!(f, "was killed by signal {signal}"),
        }
    }
}

/// A process started by [`spawn_self`] or [`copy_beside`]. Dropping it kills and reaps the process.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    pidfd: OwnedFd,
    /// Set once the process has been reaped.
    ending: Mutex<Option<Ending>>,
}

/// What a terminal's Ctrl-C and timeout(1) send to whole process groups. A child that has just begun would
/// die of it before it could say what these signals are to it: it calls [`take_signals`] then.
pub const FOR_LATER: [libc::c_int; 2] = [libc::SIGINT, libc::SIGTERM];

/// Unblocks [`FOR_LATER`] in this thread, and in those that it starts.
///
/// # Errors
/// The host refused.
pub fn take_signals() -> io::Result<()> {
    for signal in FOR_LATER {
        vmm_sys_util::signal::unblock_signal(signal).map_err(|error| io::Error::other(error.to_string()))?;
    }
    Ok(())
}

/// Starts this binary again.
///
/// `arguments` follow the program's name; `variables` are added to this process's environment;
/// `descriptors` are open in the child at the given numbers, from [`FIRST_HANDED_OVER`] on, each
/// number once. The child starts with [`FOR_LATER`] blocked and no other signal, those and
/// `SIGPIPE` at their defaults. The standard streams are inherited.
///
/// # Errors
/// The host has no room for another process, or one of the arguments cannot be passed on. No process
/// is left behind.
pub fn spawn_self(
    arguments: &[&OsStr],
    variables: &[(&str, &OsStr)],
    descriptors: &[(BorrowedFd<'_>, RawFd)],
) -> Result<Child, SpawnError> {
    spawn(SELF, arguments, variables, descriptors)
}

/// As [`spawn_self`], with the binary at `program`, which must be salp too.
///
/// # Errors
/// As there; also where there is no such program.
pub fn spawn_program(
    program: &Path,
    arguments: &[&OsStr],
    variables: &[(&str, &OsStr)],
    descriptors: &[(BorrowedFd<'_>, RawFd)],
) -> Result<Child, SpawnError> {
    let program = c_strings(std::iter::once(program.as_os_str()))?;
    spawn(&program[0], arguments, variables, descriptors)
}

fn spawn(
    path: &std::ffi::CStr,
    arguments: &[&OsStr],
    variables: &[(&str, &OsStr)],
    descriptors: &[(BorrowedFd<'_>, RawFd)],
) -> Result<Child, SpawnError> {
    let program = env::args_os().next().unwrap_or_else(|| OsString::from("salp"));
    let arguments = c_strings(std::iter::once(program.as_os_str()).chain(arguments.iter().copied()))?;
    let environment = environment(variables)?;
    let moved = out_of_the_way(descriptors)?;

    let mut settings = Settings::new()?;
    for (descriptor, number) in &moved {
        settings.hand_over(descriptor.as_fd(), *number)?;
    }
    let pid = settings.spawn(path, &arguments, &environment)?;
    Child::of(pid)
}

/// Where [`copy_beside`] returns: twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// In the process that was copied.
    Original,
    /// In the copy.
    Copy,
}

/// `st_nlink` of `/proc/self/task` of a process with one thread: a directory and one below it.
const LINKS_OF_ONE_THREAD: u64 = 3;

/// Makes a copy of this process that is a child of this one's parent, and has what a copy has by
/// `fork(2)`: all memory and descriptors, no parent-death signal. Nobody else tells the parent of it.
///
/// # Errors
/// This process has other threads, whose locks the copy would have for ever; the host has no room for
/// another process.
pub fn copy_beside() -> Result<Copied, SpawnError> {
    let threads = rustix::fs::stat("/proc/self/task")
        .map_err(|error| SpawnError::host("count the threads of this process", error))?;
    if threads.st_nlink != LINKS_OF_ONE_THREAD {
        return Err(SpawnError::Threads);
    }
    // SAFETY: with no new stack the copy goes on from here as the original does. There is one thread, so
    // no lock is held by anybody else and all memory is as one thread left it. The C library is not told:
    // it knows the thread's number from before, which it uses for locks that salp has none of.
    let result = unsafe { libc::syscall(libc::SYS_clone, COPY_FLAGS, 0, 0, 0, 0) };
    match result {
        0 => Ok(Copied::Copy),
        1.. => Ok(Copied::Original),
        _ => Err(SpawnError::host("copy this process", io::Error::last_os_error())),
    }
}

/// The parent of a copy is the original's, as is the signal that it gets at its end.
pub const COPY_FLAGS: libc::c_long = libc::CLONE_PARENT as libc::c_long;

/// Takes over the descriptor that the parent handed over at `number`, and makes it close-on-exec.
///
/// salp and std open everything close-on-exec: a descriptor that is not was inherited and has no owner
/// yet. That is checked, so a number cannot be adopted twice, nor one that somebody here opened.
///
/// # Errors
/// Nothing was handed over at that number, or it has been adopted.
pub fn adopt(number: RawFd) -> Result<OwnedFd, SpawnError> {
    static ADOPTING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = ADOPTING.lock().unwrap_or_else(PoisonError::into_inner);
    if number < FIRST_HANDED_OVER {
        return Err(SpawnError::Number { number, reason: "it is a standard stream" });
    }
    // SAFETY: the borrow ends with this function, and only asks for flags before it is known to be open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = rustix::io::fcntl_getfd(borrowed)
        .map_err(|_| SpawnError::Number { number, reason: "it is not open" })?;
    if flags.contains(FdFlags::CLOEXEC) {
        return Err(SpawnError::Number { number, reason: "it was opened or adopted by this process" });
    }
    rustix::io::fcntl_setfd(borrowed, flags | FdFlags::CLOEXEC)
        .map_err(|error| SpawnError::host("make a descriptor close-on-exec", error))?;
    // SAFETY: it is open, was inherited (see above), and is close-on-exec from now on, so that this
    // is the only time that it is given an owner.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Makes the kernel kill this process when the parent's thread that spawned it ends. To be called
/// first thing in a process started by [`spawn_self`], and in its copies.
///
/// # Errors
/// [`SpawnError::NoParent`] where the parent has ended before this call (then the signal will not
/// come: exit), or this process was started by somebody else.
pub fn die_with_parent() -> Result<(), SpawnError> {
    let parent = env::var(PARENT_VARIABLE).ok().and_then(|text| text.parse().ok()).and_then(Pid::from_raw);
    let Some(parent) = parent else {
        return Err(SpawnError::NoParent);
    };
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| SpawnError::host("ask for a signal at the parent's death", error))?;
    // Asked for first, looked second: a death in between is seen by one of the two.
    if rustix::process::getppid() == Some(parent) { Ok(()) } else { Err(SpawnError::NoParent) }
}

impl Child {
    /// Takes over a child of this process that has not been reaped: one that was spawned, or a copy that
    /// has told its number.
    ///
    /// # Errors
    /// It is no child of this process; no descriptor is left: then it is killed and reaped.
    pub fn of(pid: Pid) -> Result<Self, SpawnError> {
        // The number cannot belong to another process before it has been reaped, which only `Child` does.
        wait_id(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT)?;
        match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Self { pid, pidfd, ending: Mutex::new(None) }),
            Err(error) => {
                // ESRCH: it has ended by itself, and is reaped all the same.
                let killed = rustix::process::kill_process(pid, Signal::KILL);
                if matches!(killed, Ok(()) | Err(Errno::SRCH)) {
                    reap(WaitId::Pid(pid))?;
                }
                Err(SpawnError::host("open a pidfd for a new process", error))
            }
        }
    }

    /// The process's id.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Waits until the process has ended. May be called again, and by several threads.
    ///
    /// # Errors
    /// The host refused to tell (somebody else reaped it).
    pub fn wait(&self) -> Result<Ending, SpawnError> {
        loop {
            // Waiting is done without the lock, so that `try_wait` and `kill` get through.
            match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(SpawnError::host("wait on a pidfd", error)),
            }
            if let Some(ending) = self.try_wait()? {
                return Ok(ending);
            }
        }
    }

    /// How the process ended, if it has.
    ///
    /// # Errors
    /// As for [`wait`](Self::wait).
    pub fn try_wait(&self) -> Result<Option<Ending>, SpawnError> {
        let mut ending = self.ending.lock().unwrap_or_else(PoisonError::into_inner);
        if ending.is_none() {
            *ending =
                wait_id(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG)?;
        }
        Ok(*ending)
    }

    /// Kills the process (`SIGKILL`). It is gone once [`wait`](Self::wait) says so; nothing happens
    /// where it has ended already.
    ///
    /// # Errors
    /// The host refused.
    pub fn kill(&self) -> Result<(), SpawnError> {
        match rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(SpawnError::host("kill a process", error)),
        }
    }

    /// Gives up the handle without ending the process. For a parent that is about to exit: the
    /// process is then init's to reap.
    pub fn leave_running(self) {
        // Nothing but the pidfd is lost; it closes when this process exits.
        std::mem::forget(self);
    }
}

impl AsFd for Child {
    /// The pidfd: readable when the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Err(error) = self.kill().and_then(|()| self.wait()) {
            tracing::warn!(pid = self.pid.as_raw_pid(), %error, "a process could not be ended and reaped");
        }
    }
}

fn reap(id: WaitId<'_>) -> Result<(), SpawnError> {
    wait_id(id, WaitIdOptions::EXITED).map(|_| ())
}

/// `None` only with `NOHANG`, where the process runs still.
fn wait_id(id: WaitId<'_>, options: WaitIdOptions) -> Result<Option<Ending>, SpawnError> {
    let status = loop {
        match rustix::process::waitid(id.clone(), options) {
            Err(Errno::INTR) => {}
            result => break result.map_err(|error| SpawnError::host("reap a process", error))?,
        }
    };
    Ok(status.and_then(|status| {
        let killed = status.terminating_signal().map(Ending::Killed);
        status.exit_status().map(Ending::Exited).or(killed)
    }))
}

fn c_strings<'a>(texts: impl Iterator<Item = &'a OsStr>) -> Result<Vec<CString>, SpawnError> {
    texts.map(|text| CString::new(text.as_bytes()).map_err(|source| SpawnError::Nul { source })).collect()
}

/// This process's environment, with `variables` and the parent's id in place of what had their names.
fn environment(variables: &[(&str, &OsStr)]) -> Result<Vec<CString>, SpawnError> {
    let own = OsString::from(std::process::id().to_string());
    let added = || variables.iter().copied().chain([(PARENT_VARIABLE, own.as_os_str())]);
    let kept = env::vars_os().filter(|(name, _)| added().all(|(other, _)| name != other));
    let all = kept.chain(added().map(|(name, value)| (name.into(), value.to_owned())));
    let texts: Vec<OsString> = all
        .map(|(name, value)| OsString::from_vec([name.as_bytes(), b"=", value.as_bytes()].concat()))
        .collect();
    c_strings(texts.iter().map(OsString::as_os_str))
}

/// Duplicates above every number asked for, so that putting one in its place overwrites no other.
fn out_of_the_way(descriptors: &[(BorrowedFd<'_>, RawFd)]) -> Result<Vec<(OwnedFd, RawFd)>, SpawnError> {
    let mut numbers: Vec<RawFd> = descriptors.iter().map(|(_, number)| *number).collect();
    numbers.sort_unstable();
    for pair in numbers.windows(2) {
        if pair[0] == pair[1] {
            return Err(SpawnError::Number { number: pair[0], reason: "two are to have this number" });
        }
    }
    if let Some(&number) = numbers.first().filter(|number| **number < FIRST_HANDED_OVER) {
        return Err(SpawnError::Number { number, reason: "it is a standard stream" });
    }
    let above = numbers.last().map_or(FIRST_HANDED_OVER, |last| last.saturating_add(1));
    let moved = descriptors.iter().map(|(descriptor, number)| {
        let duplicate = rustix::io::fcntl_dupfd_cloexec(descriptor, above)
            .map_err(|error| SpawnError::host("duplicate a descriptor for a child", error))?;
        Ok((duplicate, *number))
    });
    moved.collect()
}

/// What `posix_spawn` is to do between birth and exec.
struct Settings {
    actions: libc::posix_spawn_file_actions_t,
    attributes: libc::posix_spawnattr_t,
}

impl Settings {
    fn new() -> Result<Self, SpawnError> {
        let mut actions = MaybeUninit::uninit();
        // SAFETY: the function initialises what it is given.
        check("prepare a child's descriptors", unsafe {
            libc::posix_spawn_file_actions_init(actions.as_mut_ptr())
        })?;
        let mut attributes = MaybeUninit::uninit();
        // SAFETY: as above.
        check("prepare a child's attributes", unsafe {
            libc::posix_spawnattr_init(attributes.as_mut_ptr())
        })?;
        // SAFETY: both were initialised. glibc and musl allow them to be moved: they hold no pointer
        // to themselves.
        let mut settings =
            unsafe { Self { actions: actions.assume_init(), attributes: attributes.assume_init() } };
        settings.reset_signals()?;
        Ok(settings)
    }

    /// What signals the parent's thread blocks is not the child's business, nor what is ignored: `SIGPIPE` by
    /// std, and those for later where a shell has started the parent in the background.
    fn reset_signals(&mut self) -> Result<(), SpawnError> {
        let mut later = MaybeUninit::uninit();
        let mut heeded = MaybeUninit::uninit();
        // SAFETY: both sets are initialised before use, and the attributes are valid.
        let result = unsafe {
            libc::sigemptyset(later.as_mut_ptr());
            libc::sigemptyset(heeded.as_mut_ptr());
            libc::sigaddset(heeded.as_mut_ptr(), libc::SIGPIPE);
            for signal in FOR_LATER {
                libc::sigaddset(later.as_mut_ptr(), signal);
                libc::sigaddset(heeded.as_mut_ptr(), signal);
            }
            libc::posix_spawnattr_setsigmask(&raw mut self.attributes, later.as_ptr())
                | libc::posix_spawnattr_setsigdefault(&raw mut self.attributes, heeded.as_ptr())
        };
        check("prepare a child's signals", result)?;
        let flags = libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF;
        let flags = libc::c_short::try_from(flags).expect("the flags are defined for a short");
        // SAFETY: the attributes are valid.
        check("prepare a child's signals", unsafe {
            libc::posix_spawnattr_setflags(&raw mut self.attributes, flags)
        })
    }

    fn hand_over(&mut self, descriptor: BorrowedFd<'_>, number: RawFd) -> Result<(), SpawnError> {
        // SAFETY: the actions are valid; the numbers are only numbers until the child runs them.
        check("prepare a child's descriptors", unsafe {
            libc::posix_spawn_file_actions_adddup2(&raw mut self.actions, descriptor.as_raw_fd(), number)
        })
    }

    fn spawn(
        &self,
        path: &std::ffi::CStr,
        arguments: &[CString],
        environment: &[CString],
    ) -> Result<Pid, SpawnError> {
        let pointers = |texts: &[CString]| -> Vec<*mut libc::c_char> {
            texts.iter().map(|text| text.as_ptr().cast_mut()).chain([null_mut()]).collect()
        };
        let (arguments, environment) = (pointers(arguments), pointers(environment));
        let mut pid = 0;
        // SAFETY: actions and attributes are valid; both lists end with null and point to texts that
        // outlive the call, which changes none of them.
        let result = unsafe {
            libc::posix_spawn(
                &raw mut pid,
                path.as_ptr(),
                &raw const self.actions,
                &raw const self.attributes,
                arguments.as_ptr(),
                environment.as_ptr(),
            )
        };
        check("start a process", result)?;
        Pid::from_raw(pid).ok_or(SpawnError::host("start a process", Errno::CHILD))
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        // SAFETY: both were initialised, and are not used again.
        unsafe {
            libc::posix_spawn_file_actions_destroy(&raw mut self.actions);
            libc::posix_spawnattr_destroy(&raw mut self.attributes);
        }
    }
}

/// The functions of `posix_spawn` return the error instead of setting `errno`.
fn check(action: &'static str, result: libc::c_int) -> Result<(), SpawnError> {
    if result == 0 { Ok(()) } else { Err(SpawnError::host(action, io::Error::from_raw_os_error(result))) }
}

#[cfg(test)]
mod tests;
