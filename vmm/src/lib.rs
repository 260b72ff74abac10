//! salp forks running microVMs, with DMA in flight, in a pause that does not grow with the VM's
//! memory. The modules stand here in the order of their layers: each uses only those above it.
//! `vmm/README.md` explains the words, the protocol and the invariants.

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("salp runs on x86-64 Linux only");

pub mod version;
pub mod failure;
mod plants;
pub mod sync;
pub mod words;
pub mod board;
pub mod frames;
pub mod tables;
pub mod family;
pub mod space;
pub mod ipc;
pub mod arena_files;
pub mod window;
pub mod kvm;
pub mod devices;
pub mod boot;
pub mod member;
pub mod keeper;
pub mod control;
pub mod doctor;
pub mod bench;
pub mod torture;
pub mod cli;
