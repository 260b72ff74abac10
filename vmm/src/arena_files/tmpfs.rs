//! A detached tmpfs: [`TmpfsMount`], and the operations on files by a mount's descriptor.
//!
//! `fsopen`, `fsconfig`, `fsmount` make a mount that is attached nowhere; `open_tree` clones it, and
//! `mount_setattr` makes the clone read-only. What is opened through the clone can be written by
//! nobody: reopening it through `/proc/self/fd` meets the same mount, which says `EROFS`.
#![expect(unsafe_code, reason = "mount_setattr is in neither std nor rustix")]

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags};

use super::{ArenaError, is_same_file};
use crate::words::LEAF_BYTES;

/// What the pages of a file are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PageSize {
    /// 2 MiB where there is memory in such pieces.
    Huge,
    /// 4 KiB.
    Small,
}

/// A tmpfs that no file tree shows.
#[derive(Debug)]
pub(super) struct TmpfsMount {
    writable: OwnedFd,
    /// A read-only clone; `None` where the kernel cannot clone a detached mount.
    read_only: Option<OwnedFd>,
}

impl TmpfsMount {
    pub(super) fn create(page_size: PageSize, budget_bytes: u64) -> Result<Self, ArenaError> {
        let huge = match page_size {
            PageSize::Huge => "always",
            PageSize::Small => "never",
        };
        let writable = mount(huge, budget_bytes).map_err(|errno| ArenaError::host("mount a tmpfs", errno))?;
        if page_size == PageSize::Huge {
            expect_huge_pages(writable.as_fd())
                .map_err(|errno| ArenaError::host("get huge pages from a tmpfs", errno))?;
        }
        let read_only = match read_only_clone(writable.as_fd()) {
            Ok(clone) => Some(clone),
            Err(error) => {
                tracing::warn!(%error, "readers of the arena are not guarded against writing");
                None
            }
        };
        Ok(Self { writable, read_only })
    }

    pub(super) fn writable(&self) -> BorrowedFd<'_> {
        self.writable.as_fd()
    }

    pub(super) fn readable(&self) -> BorrowedFd<'_> {
        self.read_only.as_ref().unwrap_or(&self.writable).as_fd()
    }

    pub(super) fn guards_readers(&self) -> bool {
        self.read_only.is_some()
    }

    pub(super) fn used_bytes(&self) -> Result<u64, ArenaError> {
        let stat = rustix::fs::fstatvfs(&self.writable)
            .map_err(|errno| ArenaError::host("ask a tmpfs how full it is", errno))?;
        Ok((stat.f_blocks - stat.f_bfree) * stat.f_frsize)
    }
}

fn mount(huge: &str, budget_bytes: u64) -> Result<OwnedFd, Errno> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let options = [("source", "salp-arena"), ("mode", "0700"), ("huge", huge)];
    for (key, value) in options {
        rustix::mount::fsconfig_set_string(&context, key, value)?;
    }
    rustix::mount::fsconfig_set_string(&context, "size", budget_bytes.to_string())?;
    rustix::mount::fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// The kernel accepts `huge=always` also where huge pages are switched off (`shmem_enabled` is `deny`):
/// what it will do it says as the preferred block size of a file.
fn expect_huge_pages(mount: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::openat(mount, ".", flags, Mode::RUSR | Mode::WUSR)?;
    let is_huge = usize::try_from(rustix::fs::fstat(&file)?.st_blksize) == Ok(LEAF_BYTES);
    if is_huge { Ok(()) } else { Err(Errno::OPNOTSUPP) }
}

fn read_only_clone(mount: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let clone = rustix::mount::open_tree(mount, "", flags)?;
    set_read_only(clone.as_fd())?;
    Ok(clone)
}

/// `struct mount_attr` of `<linux/mount.h>`.
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

fn set_read_only(mount: BorrowedFd<'_>) -> Result<(), Errno> {
    let attributes = MountAttributes {
        set: u64::from(MountAttrFlags::MOUNT_ATTR_RDONLY.bits()),
        clear: 0,
        propagation: 0,
        user_namespace: 0,
    };
    // SAFETY: the kernel reads an empty path and a structure of the size given, and writes nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            AtFlags::EMPTY_PATH.bits(),
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    if result == 0 {
        return Ok(());
    }
    // libc reports an error as -1 and errno.
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

pub(super) fn create_file(mount: BorrowedFd<'_>, name: &str, len_bytes: u64) -> Result<OwnedFd, ArenaError> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = rustix::fs::openat(mount, name, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|errno| ArenaError::file("create", name, errno))?;
    if len_bytes == 0 {
        return Ok(file);
    }
    rustix::fs::ftruncate(&file, len_bytes).map_err(|errno| {
        // Nobody knows the name yet; where even this fails, only an empty file stays behind.
        let _ = rustix::fs::unlinkat(mount, name, AtFlags::empty());
        ArenaError::file("size", name, errno)
    })?;
    Ok(file)
}

pub(super) fn open_read_only(mount: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, ArenaError> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::openat(mount, name, flags, Mode::empty())
        .map_err(|errno| ArenaError::file("open", name, errno))
}

pub(super) fn remove(mount: BorrowedFd<'_>, name: &str) -> Result<(), ArenaError> {
    rustix::fs::unlinkat(mount, name, AtFlags::empty())
        .map_err(|errno| ArenaError::file("remove", name, errno))
}

/// Checks that `file` is what the name stands for.
pub(super) fn expect_same(mount: BorrowedFd<'_>, name: &str, file: &OwnedFd) -> Result<(), ArenaError> {
    let named = open_read_only(mount, name)?;
    match is_same_file(named.as_fd(), file.as_fd()) {
        Ok(true) => Ok(()),
        Ok(false) => Err(ArenaError::file("adopt", name, Errno::EXIST)),
        Err(errno) => Err(ArenaError::file("adopt", name, errno)),
    }
}
