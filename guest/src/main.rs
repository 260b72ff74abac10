//! salp's built-in guest: a freestanding program whose cases check the memory manager from inside.
//!
//! The loader starts every vCPU in 64-bit ring 3 with all RAM mapped to itself and all ports open;
//! ring 0 is a handful of instructions in [`entry`], since a KVM without hardware virtualization
//! emulates that ring one instruction at a time. The command line chooses a case and its options
//! (`case=touch mib=64 rounds=10`); [`options`] lists them all. A case checks its own work, reports
//! by [`salp_protocol::call`], and the VM ends with a status of [`salp_protocol::exit`].
//!
//! Known holes: one case per run; the vCPUs beyond the first do the same work on their own share of
//! memory, or accompany the case with random writes (`dma`, `fork`).
#![no_std]
#![no_main]

mod call;
mod cases;
mod checked;
mod engine;
mod entry;
mod identity;
mod memory;
mod options;
mod panic;
mod pattern;
mod serial;
mod string;
mod worker;
