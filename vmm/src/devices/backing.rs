//! The storage behind the DMA engine: layered, so that a clone sees what its source had at the cut
//! and nothing later. Aliasing xor mutability, for disks.
//!
//! A [`Backing`] is an optional read-only base file, else zeros, under a map from 4 KiB block to an
//! *extent*: a block in an extent file. Each VM writes to one extent file of its own and only ever
//! to extents that no map names: `plan_write` allocates, the data lands there, and
//! its `commit` (inside the [completion gate](super::gate)) changes the map. So at a cut
//! the map is frozen ([`Backing::freeze`]: one reference count) and handed to the clone with the
//! extent files, opened read-only. A write in flight at the cut lands in extents that the frozen
//! map does not name. An extent that a frozen map may name is never written again; one that was
//! allocated since the last cut and superseded is reused, once no read is under way on it.
//!
//! A write of part of a block gets the rest of it at its commit, from the block that the map names
//! then: two such writes in flight on one block lose nothing of each other.
//!
//! # Caveats
//! Blocks frozen by a cut are not reused after the clones have gone. No `fsync`: a backing lives as
//! long as its colony. A host that fails in the middle of a commit's merge leaves the map unchanged.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::gate::HeldGate;
use super::lock;
use crate::failure;
use crate::words::{index, wide};

mod map;
mod plan;

use map::{Map, NO_FILE, Place, Run};
use plan::{Part, parts, push_joined};
pub(super) use plan::{ReadPlan, Segment, WritePlan};

/// Bytes in a block of the backing.
pub const BLOCK_BYTES: usize = 4096;
/// The largest backing: 1 TiB.
pub const MAX_BACKING_BYTES: u64 = 1 << 40;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// The name of an extent file, unique in a colony.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ExtentFileId(pub u64);

/// Where extent files come from.
pub trait ExtentFiles: Send + Sync {
    /// Creates an empty file, open for reading and writing.
    ///
    /// # Errors
    /// Those of the host.
    fn create(&self) -> io::Result<(ExtentFileId, File)>;

    /// Opens a file of this colony, for reading.
    ///
    /// # Errors
    /// Those of the host.
    fn open(&self, id: ExtentFileId) -> io::Result<File>;
}

/// Why a backing cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// A transfer leaves the backing.
    #[error("offset {offset:#x}, {len_bytes} bytes: the backing has {bytes} bytes")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Length of the transfer.
        len_bytes: usize,
        /// Size of the backing.
        bytes: u64,
    },
    /// The backing is larger than [`MAX_BACKING_BYTES`].
    #[error("a backing of {bytes} bytes is too large, {MAX_BACKING_BYTES} are allowed")]
    TooLarge {
        /// Size asked for.
        bytes: u64,
    },
    /// The extent file is full.
    #[error("the extent file has no more blocks")]
    Full,
    /// A saved state needs a base file and has none, or the other way round, or one that is shorter.
    #[error("the saved backing has a base of {expected:?} bytes, this one {found:?}")]
    Base {
        /// Of the state.
        expected: Option<u64>,
        /// Of the file given.
        found: Option<u64>,
    },
    /// The host failed.
    #[error("the backing's host file failed: {0}")]
    Host(#[from] io::Error),
}

/// A frozen backing: what a clone starts from. Cheap to take; serialising costs time by its runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(into = "WireState", try_from = "WireState")]
pub struct BackingState {
    bytes: u64,
    base_bytes: Option<u64>,
    files: Vec<Option<ExtentFileId>>,
    map: Map,
}

/// [`BackingState`] between processes.
#[derive(Serialize, Deserialize)]
struct WireState {
    bytes: u64,
    base_bytes: Option<u64>,
    files: Vec<Option<ExtentFileId>>,
    runs: Vec<Run>,
}

impl BackingState {
    /// The extent files that the map names.
    pub fn extent_files(&self) -> impl Iterator<Item = ExtentFileId> + '_ {
        self.files.iter().copied().flatten()
    }
}

impl From<BackingState> for WireState {
    fn from(state: BackingState) -> Self {
        Self { bytes: state.bytes, base_bytes: state.base_bytes, runs: state.map.runs(), files: state.files }
    }
}

impl TryFrom<WireState> for BackingState {
    type Error = String;

    fn try_from(wire: WireState) -> Result<Self, String> {
        if wire.bytes > MAX_BACKING_BYTES {
            return Err(format!("a backing of {} bytes is too large", wire.bytes));
        }
        for run in &wire.runs {
            let file = wire.files.get(run.place.file_index()).copied().flatten();
            file.ok_or_else(|| format!("block {}: no file {}", run.block, run.place.file))?;
        }
        let map = Map::from_runs(wire.bytes.div_ceil(BLOCK), &wire.runs)?;
        Ok(Self { bytes: wire.bytes, base_bytes: wire.base_bytes, files: wire.files, map })
    }
}

/// An extent file that some block is in.
struct Layer {
    id: ExtentFileId,
    file: Arc<File>,
    /// Blocks of the map that are in it.
    blocks: u64,
}

/// The extents of this VM's own file.
#[derive(Default)]
struct Own {
    /// Its layer, once the first write has made it.
    layer: Option<u32>,
    /// Extents below this number have been allocated.
    next: u32,
    /// Allocated, named by no map, not in use.
    free: BTreeSet<u32>,
    /// Named by this VM's map and by no frozen one.
    private: HashSet<u32>,
    /// Reads under way on an extent.
    reads: HashMap<u32, u32>,
    /// Superseded private extents that reads are still under way on.
    leaving: HashSet<u32>,
}

struct Inner {
    map: Map,
    layers: Vec<Option<Layer>>,
    own: Own,
}

/// The storage of one VM. Shared by its transfers.
pub struct Backing {
    bytes: u64,
    base: Option<(Arc<File>, u64)>,
    files: Arc<dyn ExtentFiles>,
    inner: Mutex<Inner>,
}

impl Backing {
    /// A new backing: `base`'s bytes if there is one (then `bytes` may be more, the rest being
    /// zeros), else `bytes` zeros.
    ///
    /// # Errors
    /// [`BackingError::TooLarge`], or the host's.
    pub fn new(
        base: Option<File>,
        bytes: u64,
        files: Arc<dyn ExtentFiles>,
    ) -> Result<Arc<Self>, BackingError> {
        let base_bytes = base.as_ref().map(file_bytes).transpose()?;
        let bytes = bytes.max(base_bytes.unwrap_or(0));
        if bytes > MAX_BACKING_BYTES {
            return Err(BackingError::TooLarge { bytes });
        }
        let map = Map::new(bytes.div_ceil(BLOCK));
        Ok(Self::build(bytes, base.zip(base_bytes), files, map, Vec::new()))
    }

    /// The backing of a clone, from its source's frozen one. `base` is the same file as there.
    ///
    /// # Errors
    /// [`BackingError::Base`], or the host's when it opens an extent file.
    pub fn restore(
        state: &BackingState,
        base: Option<File>,
        files: Arc<dyn ExtentFiles>,
    ) -> Result<Arc<Self>, BackingError> {
        failure::point("backing.size").map_err(io::Error::from)?;
        let found = base.as_ref().map(file_bytes).transpose()?;
        if found != state.base_bytes {
            let expected = state.base_bytes;
            return Err(BackingError::Base { expected, found });
        }
        let layers = layers_of(state, files.as_ref())?;
        let map = state.map.clone();
        Ok(Self::build(state.bytes, base.zip(found), files, map, layers))
    }

    /// Returns to the frozen map that this backing began with. No transfer is under way.
    ///
    /// # Errors
    /// The host's, when it opens an extent file: nothing has changed.
    pub fn reset(&self, state: &BackingState) -> Result<(), BackingError> {
        let mut layers = layers_of(state, self.files.as_ref())?;
        let mut inner = lock(&self.inner);
        let own = inner.own.layer.and_then(|number| inner.layers.get_mut(index(number.into()))?.take());
        inner.own.layer = own.map(|own| add_layer(&mut layers, Layer { blocks: 0, ..own })).transpose()?;
        inner.layers = layers;
        inner.map = state.map.clone();
        let own = &mut inner.own;
        own.free.extend(own.private.drain());
        Ok(())
    }

    fn build(
        bytes: u64,
        base: Option<(File, u64)>,
        files: Arc<dyn ExtentFiles>,
        map: Map,
        layers: Vec<Option<Layer>>,
    ) -> Arc<Self> {
        let own = Own::default();
        Arc::new(Self {
            bytes,
            base: base.map(|(file, bytes)| (Arc::new(file), bytes)),
            files,
            inner: Mutex::new(Inner { map, layers, own }),
        })
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Blocks that this VM's own extent file has grown to.
    #[must_use]
    pub fn own_blocks(&self) -> u64 {
        u64::from(lock(&self.inner).own.next)
    }

    /// Freezes the map for a clone. The gate must be held, so that the frozen map agrees with the
    /// engine's state saved under the same hold.
    pub fn freeze(&self, _held: &HeldGate) -> BackingState {
        let mut inner = lock(&self.inner);
        // From now on a frozen map may name them: they are not this VM's to write any more.
        inner.own.private = HashSet::new();
        BackingState {
            bytes: self.bytes,
            base_bytes: self.base.as_ref().map(|(_, bytes)| *bytes),
            files: inner
                .layers
                .iter()
                .map(|layer| layer.as_ref().filter(|l| l.blocks > 0).map(|l| l.id))
                .collect(),
            map: inner.map.clone(),
        }
    }

    fn check(&self, offset: u64, len_bytes: usize) -> Result<(), BackingError> {
        match offset.checked_add(wide(len_bytes)) {
            Some(end) if end <= self.bytes => Ok(()),
            _ => Err(BackingError::OutOfRange { offset, len_bytes, bytes: self.bytes }),
        }
    }

    /// Finds where `[offset, offset + len_bytes)` is now.
    pub(super) fn plan_read(
        self: &Arc<Self>,
        offset: u64,
        len_bytes: usize,
    ) -> Result<ReadPlan, BackingError> {
        self.check(offset, len_bytes)?;
        let mut plan = ReadPlan { backing: Arc::clone(self), segments: Vec::new(), extents: Vec::new() };
        let mut inner = lock(&self.inner);
        for part in parts(offset, len_bytes) {
            let place = inner.map.get(part.block);
            if Some(place.file) == inner.own.layer {
                *inner.own.reads.entry(place.extent).or_default() += 1;
                plan.extents.push(place.extent);
            }
            for piece in self.locate(&inner, place, &part) {
                push_joined(&mut plan.segments, piece);
            }
        }
        Ok(plan)
    }

    /// The bytes of `part`, which the map has at `place`: one or two segments.
    fn locate(&self, inner: &Inner, place: Place, part: &Part) -> Vec<Segment> {
        let segment = |place, at, len_bytes| Segment { place, at, len_bytes };
        if let Some(Some(layer)) = inner.layers.get(place.file_index()) {
            let offset = u64::from(place.extent) * BLOCK + wide(part.start);
            let place = Some((Arc::clone(&layer.file), offset));
            return vec![segment(place, part.at, part.len_bytes)];
        }
        let offset = part.block * BLOCK + wide(part.start);
        let (from_base, base) = match &self.base {
            Some((file, bytes)) => {
                let len_bytes = index(bytes.saturating_sub(offset).min(wide(part.len_bytes)));
                (len_bytes, Some((Arc::clone(file), offset)))
            }
            None => (0, None),
        };
        let rest = segment(None, part.at + from_base, part.len_bytes - from_base);
        [segment(base, part.at, from_base), rest].into_iter().filter(|s| s.len_bytes > 0).collect()
    }

    /// Allocates extents for a write of `[offset, offset + len_bytes)`.
    pub(super) fn plan_write(
        self: &Arc<Self>,
        offset: u64,
        len_bytes: usize,
    ) -> Result<WritePlan, BackingError> {
        self.check(offset, len_bytes)?;
        let mut plan = WritePlan {
            backing: Arc::clone(self),
            offset,
            len_bytes,
            segments: Vec::new(),
            extents: Vec::new(),
        };
        let result = self.allocate(&mut lock(&self.inner), &mut plan);
        // The lock is free again: dropping a half-made plan takes it.
        result.map(|()| plan)
    }

    fn allocate(&self, inner: &mut Inner, plan: &mut WritePlan) -> Result<(), BackingError> {
        let file = self.own_file(inner)?;
        for part in parts(plan.offset, plan.len_bytes) {
            let extent = inner.own.allocate()?;
            plan.extents.push(extent);
            let offset = u64::from(extent) * BLOCK + wide(part.start);
            let segment =
                Segment { place: Some((Arc::clone(&file), offset)), at: part.at, len_bytes: part.len_bytes };
            push_joined(&mut plan.segments, segment);
        }
        Ok(())
    }

    fn own_file(&self, inner: &mut Inner) -> Result<Arc<File>, BackingError> {
        let own = inner.own.layer.and_then(|n| inner.layers.get(index(n.into())));
        if let Some(Some(layer)) = own {
            return Ok(Arc::clone(&layer.file));
        }
        let (id, file) = self.files.create()?;
        let file = Arc::new(file);
        let layer = Layer { id, file: Arc::clone(&file), blocks: 0 };
        inner.own.layer = Some(add_layer(&mut inner.layers, layer)?);
        Ok(file)
    }

    /// Reads all of a block as the map has it.
    fn read_block(&self, inner: &Inner, block: u64) -> io::Result<[u8; BLOCK_BYTES]> {
        let mut bytes = [0; BLOCK_BYTES];
        let part = Part { block, start: 0, at: 0, len_bytes: BLOCK_BYTES };
        for segment in self.locate(inner, inner.map.get(block), &part) {
            if let Some((file, offset)) = segment.place {
                let into = &mut bytes[segment.at..segment.at + segment.len_bytes];
                file.read_exact_at(into, offset)?;
            }
        }
        Ok(bytes)
    }
}

impl Own {
    fn allocate(&mut self) -> Result<u32, BackingError> {
        if let Some(extent) = self.free.pop_first() {
            return Ok(extent);
        }
        let extent = self.next;
        self.next = extent.checked_add(1).ok_or(BackingError::Full)?;
        Ok(extent)
    }

    /// The map no longer names `extent`.
    fn supersede(&mut self, extent: u32) {
        if !self.private.remove(&extent) {
            return;
        }
        if self.reads.contains_key(&extent) {
            self.leaving.insert(extent);
        } else {
            self.free.insert(extent);
        }
    }

    fn end_read(&mut self, extent: u32) {
        let Some(count) = self.reads.get_mut(&extent) else {
            return;
        };
        *count -= 1;
        if *count == 0 {
            self.reads.remove(&extent);
            if self.leaving.remove(&extent) {
                self.free.insert(extent);
            }
        }
    }
}

impl Inner {
    /// Makes the map name own extent `extent` for `block`, in layer `own`.
    fn remap(&mut self, block: u64, own: u32, extent: u32) {
        let old = self.map.set(block, Place { file: own, extent });
        self.own.private.insert(extent);
        if old.file == own {
            self.own.supersede(old.extent);
            return;
        }
        if let Some(Some(layer)) = self.layers.get_mut(index(own.into())) {
            layer.blocks += 1;
        }
        if let Some(slot) = self.layers.get_mut(old.file_index())
            && let Some(layer) = slot
        {
            layer.blocks -= 1;
            if layer.blocks == 0 {
                *slot = None;
            }
        }
    }
}

/// Opens the extent files that a frozen map names.
fn layers_of(state: &BackingState, files: &dyn ExtentFiles) -> io::Result<Vec<Option<Layer>>> {
    let counts = state.map.blocks_by_file();
    let layer = |(number, id): (usize, &Option<ExtentFileId>)| {
        let blocks = counts.get(number).copied().unwrap_or(0);
        let id = id.filter(|_| blocks > 0);
        id.map(|id| Ok(Layer { id, file: Arc::new(files.open(id)?), blocks })).transpose()
    };
    state.files.iter().enumerate().map(layer).collect()
}

/// Puts a layer where there is room; returns its number.
fn add_layer(layers: &mut Vec<Option<Layer>>, layer: Layer) -> Result<u32, BackingError> {
    let number = layers.iter().position(Option::is_none).unwrap_or(layers.len());
    let name = u32::try_from(number).ok().filter(|name| *name != NO_FILE).ok_or(BackingError::Full)?;
    match layers.get_mut(number) {
        Some(slot) => *slot = Some(layer),
        None => layers.push(Some(layer)),
    }
    Ok(name)
}

fn file_bytes(file: &File) -> io::Result<u64> {
    use std::io::Seek;
    // A block device has no length in its metadata, but it has an end.
    let mut file = file;
    file.seek(io::SeekFrom::End(0))
}

#[cfg(test)]
#[path = "backing/tests.rs"]
mod tests;
