//! What salp needs of a host, and what it profits from: looked at, judged, and with the command that
//! mends it.
//!
//! [`Facts`] are gathered ([`facts`]), below any root directory as far as they are files, and judged
//! without touching the host (`kernel`, `memory`): each [`Check`] is a function of the facts. What is
//! needed and not there is [`Missing`](Level::Missing); without what is [`Slower`](Level::Slower) salp
//! works, but slower or for fewer VMs.
//!
//! # Known holes
//! Control groups are looked for at their usual mount points. A limit that somebody lowers later is not
//! foreseen.

pub mod facts;
mod kernel;
mod memory;
#[cfg(test)]
mod tests;

use std::path::Path;

use serde::Serialize;

use crate::kvm::HostDescription;
use facts::Facts;

/// How the host does in one respect, from best to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// salp works, but slower, or for fewer VMs.
    Slower,
    /// salp does not work without it.
    Missing,
}

/// One respect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it does.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// What salp does with it.
    pub purpose: &'static str,
    /// What mends it: a command where there is one.
    pub remedy: Option<String>,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The worst of the checks.
    pub verdict: Level,
    /// The host.
    pub host: HostDescription,
    /// The checks.
    pub checks: Vec<Check>,
}

/// Looks at this host.
#[must_use]
pub fn examine() -> Report {
    let facts = Facts::gather(Path::new("/"));
    tracing::debug!(?facts, "looked at the host");
    let checks = judge(&facts);
    let verdict = checks.iter().map(|check| check.level).max().unwrap_or(Level::Ok);
    Report { verdict, host: HostDescription::read(), checks }
}

/// What the facts mean: what is needed first.
fn judge(facts: &Facts) -> Vec<Check> {
    vec![
        kernel::release(facts),
        kernel::kvm(facts),
        kernel::capabilities(facts),
        kernel::userfaultfd(facts),
        kernel::pagemap_scan(facts),
        memory::available(facts),
        memory::control_group(facts),
        memory::arena(facts),
        memory::huge_pages(facts),
        memory::map_count(facts),
        memory::swap(facts),
        kernel::io_uring(facts),
        memory::locked_memory(facts),
        kernel::open_files(facts),
        kernel::processors(facts),
        kernel::seccomp(facts),
        kernel::sockets(facts),
    ]
}

impl Check {
    fn ok(name: &'static str, purpose: &'static str, found: impl Into<String>) -> Self {
        Self { name, level: Level::Ok, found: found.into(), purpose, remedy: None }
    }

    /// The same, not as it should be.
    fn worse(self, level: Level, remedy: impl Into<String>) -> Self {
        Self { level, remedy: Some(remedy.into()), ..self }
    }
}
