//! The map of a backing: block -> place in an extent file, cheap to freeze.
//!
//! Two levels of reference-counted arrays, copied on write: a clone of the map is one count, the
//! first change after it copies the upper level and one chunk of 512 places.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::words::{index, wide};

/// The `file` of a block that no extent file has.
pub(super) const NO_FILE: u32 = u32::MAX;

const CHUNK_BLOCKS: usize = 512;

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    /// Number of the extent file in its backing's list, or [`NO_FILE`].
    pub(super) file: u32,
    /// Number of the extent in that file.
    pub(super) extent: u32,
}

impl Place {
    /// `file` as an index; past every list for a block that is nowhere.
    pub(super) const fn file_index(self) -> usize {
        self.file as usize
    }
}

const NOWHERE: Place = Place { file: NO_FILE, extent: 0 };

/// Consecutive blocks in consecutive extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Run {
    pub(super) block: u64,
    pub(super) blocks: u32,
    pub(super) place: Place,
}

type Chunk = [Place; CHUNK_BLOCKS];

/// The map. Blocks are below the number that it was made for.
#[derive(Clone, Debug)]
pub(super) struct Map {
    chunks: Arc<Vec<Option<Arc<Chunk>>>>,
}

impl Map {
    /// A map of `blocks` blocks, all nowhere.
    pub(super) fn new(blocks: u64) -> Self {
        let chunks = index(blocks).div_ceil(CHUNK_BLOCKS);
        Self { chunks: Arc::new(vec![None; chunks]) }
    }

    pub(super) fn get(&self, block: u64) -> Place {
        let chunk = self.chunks.get(index(block) / CHUNK_BLOCKS);
        match chunk {
            Some(Some(chunk)) => chunk[index(block) % CHUNK_BLOCKS],
            _ => NOWHERE,
        }
    }

    /// Sets a block's place, returns the old one. A block outside the map is left alone.
    pub(super) fn set(&mut self, block: u64, place: Place) -> Place {
        let chunks = Arc::make_mut(&mut self.chunks);
        let Some(chunk) = chunks.get_mut(index(block) / CHUNK_BLOCKS) else {
            return NOWHERE;
        };
        let chunk = chunk.get_or_insert_with(|| Arc::new([NOWHERE; CHUNK_BLOCKS]));
        let slot = &mut Arc::make_mut(chunk)[index(block) % CHUNK_BLOCKS];
        std::mem::replace(slot, place)
    }

    fn places(&self) -> impl Iterator<Item = (u64, Place)> {
        self.chunks.iter().enumerate().flat_map(|(number, chunk)| {
            let places = chunk.iter().flat_map(|chunk| chunk.iter().enumerate());
            places
                .map(move |(at, place)| (wide(number * CHUNK_BLOCKS + at), *place))
                .filter(|(_, place)| place.file != NO_FILE)
        })
    }

    /// All of the map, as runs in the order of blocks.
    pub(super) fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (block, place) in self.places() {
            if let Some(last) = runs.last_mut()
                && last.block + u64::from(last.blocks) == block
                && last.place.file == place.file
                && last.place.extent.checked_add(last.blocks) == Some(place.extent)
            {
                last.blocks += 1;
            } else {
                runs.push(Run { block, blocks: 1, place });
            }
        }
        runs
    }

    /// The map of `blocks` blocks that has these runs.
    pub(super) fn from_runs(blocks: u64, runs: &[Run]) -> Result<Self, String> {
        let mut map = Self::new(blocks);
        for run in runs {
            let end = run.block.checked_add(u64::from(run.blocks));
            let last = run.place.extent.checked_add(run.blocks);
            if end.is_none_or(|end| end > blocks) || last.is_none() || run.place.file == NO_FILE {
                return Err(format!("run {run:?} leaves a backing of {blocks} blocks"));
            }
            for n in 0..run.blocks {
                let extent = run.place.extent + n;
                map.set(run.block + u64::from(n), Place { extent, ..run.place });
            }
        }
        Ok(map)
    }

    /// How many blocks each file has, by its number.
    pub(super) fn blocks_by_file(&self) -> Vec<u64> {
        let mut counts = Vec::new();
        for (_, place) in self.places() {
            let file = place.file_index();
            if counts.len() <= file {
                counts.resize(file + 1, 0);
            }
            counts[file] += 1;
        }
        counts
    }
}
