//! The rules of pages, run on a simulated host and judged by a naive model.
//!
//! - [`world`], [`host`]: the machine: windows, traps, protections, the arena, failures.
//! - [`colony`]: a whole colony in one thread, each VM beside its model.
//! - [`model`]: random operations on it; planted faults show that it can fail.
//! - [`races`]: threads on the spaces of a few VMs, in many orders, and faults that only they find.

mod colony;
mod host;
mod model;
pub(crate) mod races;
mod world;
