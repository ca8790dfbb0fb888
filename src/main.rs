//! The `alcove` command.

use std::process::ExitCode;

use alcove::cli::{Cli, Command};
use alcove::commands::{self, Failure};
use alcove::log;
use clap::Parser;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return commands::usage(&error),
    };
    log::init(cli.log);
    let result = match cli.command {
        Command::Run(args) => commands::run::run(*args),
        Command::Bench(args) => commands::bench::run(*args),
        Command::Doctor => commands::doctor::run(),
        Command::Completions { shell } => commands::completions::run(shell),
        Command::Man => commands::man::run(),
    };
    result.unwrap_or_else(|failure: Failure| failure.report())
}
