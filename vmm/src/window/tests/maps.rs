//! What `/proc/self/smaps` says of a window.

use crate::window::Window;
use crate::words::{Gpa, wide};

/// One mapping of a window.
#[derive(Debug, Default)]
pub(super) struct Map {
    /// Offset in the window, in bytes.
    pub(super) start: u64,
    pub(super) end: u64,
    /// The two-letter flags of `VmFlags`.
    pub(super) flags: Vec<String>,
    /// Memory mapped by huge pages of a file, in KiB.
    pub(super) file_huge_kib: u64,
    /// Memory mapped by anonymous huge pages, in KiB.
    pub(super) anonymous_huge_kib: u64,
}

impl Map {
    /// Whether userfaultfd watches it, in any mode.
    pub(super) fn is_registered(&self) -> bool {
        self.flags.iter().any(|flag| ["um", "uw", "ui"].contains(&flag.as_str()))
    }

    /// Whether a forked child does not get it.
    pub(super) fn is_kept_from_children(&self) -> bool {
        self.flags.iter().any(|flag| flag == "dc")
    }
}

/// The mappings of a window, ascending.
pub(super) fn maps(window: &Window) -> Vec<Map> {
    let base = wide(window.host_address(Gpa(0)).as_ptr() as usize);
    let end = base + window.shape().span_bytes();
    let text = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let mut maps: Vec<Map> = Vec::new();
    let mut is_inside = false;
    for line in text.lines() {
        let mut fields = line.split_ascii_whitespace();
        let Some(name) = fields.next() else { continue };
        if let Some((from, to)) = range_of(name) {
            is_inside = from < end && to > base;
            if is_inside {
                let (start, end) = (from.max(base) - base, to.min(end) - base);
                maps.push(Map { start, end, ..Map::default() });
            }
            continue;
        }
        let Some(map) = maps.last_mut().filter(|_| is_inside) else { continue };
        let mut kib = || fields.next().and_then(|number| number.parse().ok()).unwrap_or(0);
        match name {
            "FilePmdMapped:" | "ShmemPmdMapped:" => map.file_huge_kib += kib(),
            "AnonHugePages:" => map.anonymous_huge_kib += kib(),
            "VmFlags:" => map.flags = fields.map(str::to_owned).collect(),
            _ => {}
        }
    }
    maps
}

fn range_of(field: &str) -> Option<(u64, u64)> {
    let (from, to) = field.split_once('-')?;
    Some((u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?))
}
