//! `salp completions`, `man`, `api-spec` and `schema`: what salp says of itself, for shells, for `man` and
//! for other programs.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Command};
use clap_complete::Shell;
use clap_mangen::Man;

use super::output::Output;
use crate::control::config::VmConfig;
use crate::control::routes;

/// For which shell.
#[derive(Debug, Args)]
pub struct CompletionsArguments {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Where to.
#[derive(Debug, Args)]
pub struct ManArguments {
    /// Write a page for salp and one for each command into this directory, which is made if need be
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// `salp completions`.
///
/// # Errors
/// Standard output.
pub fn completions(
    arguments: &CompletionsArguments,
    mut command: Command,
    output: Output,
) -> io::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut command, "salp", &mut script);
    output.print(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}

/// `salp man`.
///
/// # Errors
/// The directory, or standard output.
pub fn man(arguments: &ManArguments, command: Command, output: Output) -> io::Result<ExitCode> {
    match &arguments.out {
        Some(directory) => {
            let wrong = |error: io::Error| {
                io::Error::new(error.kind(), format!("cannot write into {}: {error}", directory.display()))
            };
            std::fs::create_dir_all(directory).map_err(wrong)?;
            clap_mangen::generate_to(command, directory).map_err(wrong)?;
        }
        None => {
            let mut page = Vec::new();
            Man::new(command).render(&mut page)?;
            output.print(&String::from_utf8_lossy(&page))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// `salp api-spec`.
///
/// # Errors
/// Standard output.
pub fn api_spec(output: Output) -> io::Result<ExitCode> {
    output.print_json(&routes::document())?;
    Ok(ExitCode::SUCCESS)
}

/// `salp schema`.
///
/// # Errors
/// Standard output.
pub fn schema(output: Output) -> io::Result<ExitCode> {
    output.print_json(&VmConfig::json_schema())?;
    Ok(ExitCode::SUCCESS)
}
