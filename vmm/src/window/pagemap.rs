//! What the host's kernel knows of pages: anonymous, present, protected; and their frame numbers.
#![expect(unsafe_code, reason = "PAGEMAP_SCAN is an ioctl on a plain structure")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::mapping::Reservation;
use crate::failure;
use crate::space::PageStates;
use crate::words::{Gfn, Gpa, HostAddress, LEAF_BYTES, LEAF_PAGES, LeafNumber, PAGE_BYTES, index, wide};

const WRITTEN: u64 = 1 << 1;
const FILE: u64 = 1 << 2;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
const ZERO_PAGE: u64 = 1 << 5;

/// `_IOWR('f', 16, struct pm_scan_arg)` of `linux/fs.h`.
pub(super) const PAGEMAP_SCAN: u64 = 3 << 30 | 96 << 16 | 0x66 << 8 | 16;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    regions_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<ScanArgument>() == 96 && size_of::<Region>() == 24);

/// Regions fetched by one call.
const BATCH: usize = 512;

/// The page states of a process.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// This process's.
    ///
    /// # Errors
    /// The host refused, or has no PAGEMAP_SCAN (Linux 6.7).
    pub fn open_own() -> io::Result<Self> {
        Self::open("/proc/self/pagemap")
    }

    /// Another process's; needs the right to trace it.
    ///
    /// # Errors
    /// As for [`Pagemap::open_own`].
    pub fn open_of(process: u32) -> io::Result<Self> {
        Self::open(&format!("/proc/{process}/pagemap"))
    }

    fn open(path: &str) -> io::Result<Self> {
        let pagemap = Self(File::open(path)?);
        pagemap.scan_regions(0..wide(PAGE_BYTES), &mut |_| {}).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("{path} has no PAGEMAP_SCAN (Linux 6.7 or later has it): {error}"),
            )
        })?;
        Ok(pagemap)
    }

    /// The anonymous pages of `count` leaves of a window, leaf by leaf where there are any.
    pub(super) fn scan(
        &self,
        window: &Reservation,
        first: LeafNumber,
        count: u32,
    ) -> io::Result<Vec<(LeafNumber, PageStates)>> {
        let range = first.gpa().0..first.gpa().0 + wide(LEAF_BYTES) * u64::from(count);
        let base = window.host(0..0).start;
        self.scan_leaves(base, window.host(range))
    }

    /// As [`Host::scan`](crate::space::Host::scan), for a window of any process that lies at `base`.
    ///
    /// # Errors
    /// The host refused.
    pub fn scan_leaves(&self, base: u64, range: Range<u64>) -> io::Result<Vec<(LeafNumber, PageStates)>> {
        let mut leaves: Vec<(LeafNumber, PageStates)> = Vec::new();
        // Regions come in ascending order.
        self.scan_regions(range, &mut |region| {
            let (mut gfn, end) = (Gpa(region.start - base).gfn().0, Gpa(region.end - base).gfn().0);
            while gfn < end {
                let leaf = Gfn(gfn).leaf();
                if leaves.last().is_none_or(|(last, _)| *last != leaf) {
                    leaves.push((leaf, PageStates::default()));
                }
                let from = Gfn(gfn).in_leaf();
                let to = index(end - leaf.first_gfn().0).min(LEAF_PAGES);
                if let Some((_, states)) = leaves.last_mut() {
                    states.anonymous.insert_range(from, to);
                    if region.categories & PRESENT != 0 {
                        states.present.insert_range(from, to);
                    }
                    if region.categories & WRITTEN != 0 {
                        states.written.insert_range(from, to);
                    }
                }
                gfn += wide(to - from);
            }
        })?;
        Ok(leaves)
    }

    fn scan_regions(&self, range: Range<u64>, visit: &mut dyn FnMut(&Region)) -> io::Result<()> {
        let mut regions = [Region::default(); BATCH];
        let mut start = range.start;
        failure::point("pagemap.scan")?;
        while start < range.end {
            let mut argument = ScanArgument {
                size: wide(size_of::<ScanArgument>()),
                start,
                end: range.end,
                regions: wide(regions.as_mut_ptr() as usize),
                regions_len: wide(BATCH),
                // Neither of a file nor the zero page, and in memory or in swap.
                category_inverted: FILE | ZERO_PAGE,
                category_mask: FILE | ZERO_PAGE,
                category_anyof_mask: PRESENT | SWAPPED,
                return_mask: PRESENT | SWAPPED | WRITTEN,
                ..ScanArgument::default()
            };
            // SAFETY: the kernel reads and writes a structure of the size that the number encodes
            // (asserted above) and at most BATCH regions at the address given with that count.
            let count = unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
            let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
            regions[..count].iter().for_each(&mut *visit);
            start = argument.walk_end;
        }
        Ok(())
    }

    /// The host frame number of the page at `address`; 0 where none is mapped, or the caller may
    /// not see it.
    pub(super) fn frame_number(&self, address: HostAddress) -> io::Result<u64> {
        self.frame_number_at(address.get())
    }

    /// The host frame number of the page at a host address of the process.
    ///
    /// # Errors
    /// The host refused.
    pub fn frame_number_at(&self, address: u64) -> io::Result<u64> {
        Ok(self.frame_numbers(address, 1)?[0])
    }

    /// The host frame numbers of `count` pages from a host address of the process; 0 where none is
    /// mapped, or the caller may not know.
    ///
    /// # Errors
    /// The host refused.
    pub fn frame_numbers(&self, address: u64, count: usize) -> io::Result<Vec<u64>> {
        let mut entries = vec![0; count * 8];
        self.0.read_exact_at(&mut entries, address / wide(PAGE_BYTES) * 8)?;
        let number = |entry: &[u8]| {
            let entry = entry.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
            let is_present = entry >> 63 == 1;
            if is_present { entry & ((1 << 55) - 1) } else { 0 }
        };
        Ok(entries.chunks_exact(8).map(number).collect())
    }
}
