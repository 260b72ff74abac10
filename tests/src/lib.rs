//! The harness of salp's whole-system tests.
