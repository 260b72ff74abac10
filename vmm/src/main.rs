//! The command line of salp.

fn main() {}
