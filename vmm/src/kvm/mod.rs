//! The KVM backend: a virtual machine, its virtual CPUs and their state.
//!
//! | file | what it holds |
//! |---|---|
//! | [`host`] | `/dev/kvm` opened and checked; what kind of KVM it is |
//! | [`vm`] | one VM: memory slots, interrupt controller, clock; made in the order that is cheap |
//! | [`state`] | [`VcpuState`]: everything a vCPU is, to save, send and set |
//! | [`machine`] | what the exits of a vCPU are handed to: ports, MMIO, calls, the end |
//! | [`run`] | the exit loop |
//! | [`vcpu`] | one thread per vCPU, and the protocol that stops and resumes it |
//! | [`rest`] | whether a vCPU has halted for good |
//! | [`kick`] | how a thread inside `KVM_RUN` is made to leave it |
//! | `poison` | how a guest that touches lost memory ends |
//! | [`stats`] | the kernel's binary statistics |
//! | [`mod@close`] | tear-down in the background |
//!
//! Nothing here knows how guest memory is managed: a VM is given host ranges as they are.

pub mod close;
pub mod error;
pub mod host;
pub mod kick;
pub mod machine;
mod poison;
pub mod rest;
pub mod run;
pub mod state;
pub mod stats;
mod times;
pub mod vcpu;
pub mod vm;

#[cfg(test)]
mod bench;
#[cfg(test)]
mod guest;
#[cfg(test)]
mod tests;

pub use close::{Closed, Closing, close};
pub use error::KvmError;
pub use host::{Capability, HostDescription, HostKind, Kvm};
pub use machine::{CallOutcome, CallRegisters, End, Flow, Machine};
pub use rest::{Doing, Rest, VcpuWatch};
pub use run::Exits;
pub use state::VcpuState;
pub use vcpu::{Times, VcpuThread, begin_save, resume_all, rouse_all, stop_all};
pub use vm::{Irqchip, Level, Msi, Region, Vcpu, Vm, VmConfig, VmState, VouchedAddress};
