//! The window on the real kernel, without KVM: a host thread is the guest.
//!
//! - [`nursery`]: a colony in one process: VMs, cuts, clones, and a checker over all of them.
//! - [`reclaim`]: what the kernel does with pages behind a window's back.
//! - [`maps`]: what the kernel says of a window's mappings.
//! - The other modules are tests, by subject.
//!
//! Where userfaultfd is not permitted every test says so and passes.

mod devices;
mod maps;
mod nursery;
mod reclaim;
mod rows;

mod basic;
mod first_fork;
mod hazards_cut;
mod hazards_force;
mod model;
mod pins;
mod races;
mod resolvers;
