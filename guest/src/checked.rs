//! Memory that knows what it must hold: pages with a pattern, and pages with a table of checksums.

use crate::memory::{PAGE_BYTES, PAGE_WORDS, Pages, load, store};
use crate::pattern::{self, Mismatch, Random, checksum, mix};
use crate::worker::Worker;

/// Pages of which the first `words` words follow from a salt and the page's index.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patterned {
    pub(crate) pages: Pages,
    pub(crate) words: u64,
}

impl Patterned {
    /// Writes page `index`.
    pub(crate) fn fill(self, index: u64, salt: u64) {
        pattern::fill(self.pages.address(index), self.words, mix(salt, index));
    }

    /// Checks page `index`.
    pub(crate) fn check(self, index: u64, salt: u64) -> Result<(), Mismatch> {
        pattern::check(self.pages.address(index), self.words, mix(salt, index))
    }

    /// Writes all pages.
    pub(crate) fn fill_all(self, salt: u64) {
        for index in 0..self.pages.count {
            self.fill(index, salt);
        }
    }

    /// Checks all pages.
    pub(crate) fn check_all(self, worker: &Worker, what: &str, salt: u64) {
        for index in 0..self.pages.count {
            worker.check(what, self.check(index, salt));
        }
    }
}

/// Pages with arbitrary contents, each with its checksum in a table that lies before them.
#[derive(Debug)]
pub(crate) struct Summed {
    table: Pages,
    data: Pages,
    random: Random,
    identity: u64,
}

impl Summed {
    /// Takes over `pages`, at least 2, and writes them all.
    pub(crate) fn new(pages: Pages, worker: &Worker) -> Self {
        let table_pages = pages.count.div_ceil(PAGE_WORDS + 1);
        let table = Pages { first: pages.first, count: table_pages };
        let data = Pages { first: pages.first + table_pages, count: pages.count - table_pages };
        let random = Random::new(mix(worker.identity(), worker.index));
        let mut summed = Self { table, data, random, identity: worker.identity() };
        for index in 0..data.count {
            summed.write(index);
        }
        summed
    }

    /// How many pages hold data.
    pub(crate) fn count(&self) -> u64 {
        self.data.count
    }

    /// In a VM that has become another one, choose other pages and contents than the source.
    pub(crate) fn diverge(&mut self, identity: u64) {
        if identity != self.identity {
            self.identity = identity;
            self.random = Random::new(mix(identity, self.random.next()));
        }
    }

    /// Checks a random page, then writes it anew.
    pub(crate) fn rewrite_random(&mut self, worker: &Worker) {
        let index = self.random.below(self.data.count);
        self.rewrite(index, worker);
    }

    /// Checks page `index`, then writes it anew.
    pub(crate) fn rewrite(&mut self, index: u64, worker: &Worker) {
        self.check(index, worker);
        self.write(index);
    }

    /// Checks all pages.
    pub(crate) fn check_all(&self, worker: &Worker) {
        for index in 0..self.data.count {
            self.check(index, worker);
        }
    }

    fn check(&self, index: u64, worker: &Worker) {
        let address = self.data.address(index);
        let (expected, found) = (load(self.entry(index)), checksum(address, index));
        if found != expected {
            worker.error(format_args!("page {address:#x} has checksum {found:#x}, not {expected:#x}"));
        }
    }

    fn write(&mut self, index: u64) {
        let address = self.data.address(index);
        pattern::fill(address, PAGE_WORDS, self.random.next());
        store(self.entry(index), checksum(address, index));
    }

    fn entry(&self, index: u64) -> u64 {
        self.table.address(index / PAGE_WORDS) + 8 * (index % PAGE_WORDS)
    }
}

const _: () = assert!(PAGE_WORDS * 8 == PAGE_BYTES);
