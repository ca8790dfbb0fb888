//! `alcove completions`.

use std::io;
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

use super::Failure;
use crate::cli::Cli;

/// Prints the completion script for `shell`.
pub fn run(shell: Shell) -> Result<ExitCode, Failure> {
    clap_complete::generate(shell, &mut Cli::command(), "alcove", &mut io::stdout());
    Ok(ExitCode::SUCCESS)
}
