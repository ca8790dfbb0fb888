//! `alcove man`.

use std::io;
use std::process::ExitCode;

use clap::CommandFactory;

use super::Failure;
use crate::cli::Cli;

/// Prints the manual page: that of alcove, then those of the subcommands that have flags.
pub fn run() -> Result<ExitCode, Failure> {
    let mut command = Cli::command();
    command.build();
    let mut out = io::stdout();
    clap_mangen::Man::new(command.clone()).render(&mut out)?;
    for name in ["run", "bench"] {
        let Some(subcommand) = command.find_subcommand(name) else { continue };
        let page = clap_mangen::Man::new(subcommand.clone());
        page.render_synopsis_section(&mut out)?;
        page.render_options_section(&mut out)?;
        page.render_extra_section(&mut out)?;
    }
    Ok(ExitCode::SUCCESS)
}
