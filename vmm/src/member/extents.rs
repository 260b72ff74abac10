//! The files behind a member's storage: its own, which it writes, and its ancestors', which it reads.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::extents_name;
use super::shell::MemberFiles;
use crate::devices::backing::{ExtentFileId, ExtentFiles};
use crate::failure;

/// See the module. The member creates its own in the arena; those of its
/// ancestors come as descriptors, since their names go when their processes do.
pub(super) struct ArenaExtents {
    files: Arc<MemberFiles>,
    known: Mutex<BTreeMap<ExtentFileId, OwnedFd>>,
}

impl ArenaExtents {
    pub(super) fn new(
        files: &Arc<MemberFiles>,
        known: impl IntoIterator<Item = (ExtentFileId, OwnedFd)>,
    ) -> Arc<Self> {
        Arc::new(Self { files: Arc::clone(files), known: Mutex::new(known.into_iter().collect()) })
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<ExtentFileId, OwnedFd>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A descriptor of a file that is known.
    ///
    /// # Errors
    /// It is not, or the host has no descriptor left.
    pub(super) fn get(&self, id: ExtentFileId) -> io::Result<OwnedFd> {
        let known = self.known();
        let file = known.get(&id).ok_or_else(|| io::Error::other("an extent file has not come along"))?;
        failure::point("extents.duplicate")?;
        file.try_clone()
    }
}

impl ExtentFiles for ArenaExtents {
    fn create(&self) -> io::Result<(ExtentFileId, std::fs::File)> {
        let (process, slot) = (std::process::id(), self.files.slot);
        let id = ExtentFileId(u64::from(process) << 32 | u64::from(slot));
        let name = extents_name(process, slot);
        let file = self.files.writer.create_file(&name, 0).map_err(io::Error::other)?;
        // What clones get. Opened anew where that can be, so that they cannot write.
        let shown = match self.files.reader.open_read_only(&name) {
            Ok(read_only) => read_only,
            // no failure point: a transfer of the VM's own fails, and its guest is told
            Err(_) => file.try_clone()?,
        };
        self.known().insert(id, shown);
        Ok((id, file.into()))
    }

    fn open(&self, id: ExtentFileId) -> io::Result<std::fs::File> {
        self.get(id).map(Into::into)
    }
}
