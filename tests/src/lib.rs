//! The harness of salp's whole-system tests.

pub mod procs;
