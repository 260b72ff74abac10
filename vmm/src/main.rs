//! The command line of salp.

use std::process::ExitCode;

fn main() -> ExitCode {
    salp::cli::main()
}
