//! One file a subcommand, and how a failure is told.

pub mod bench;
pub mod completions;
pub mod doctor;
pub mod man;
pub mod run;

use std::env;
use std::error::Error;
use std::ffi::OsStr;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::error::ErrorKind;

use crate::vm::VmError;

/// The exit status when alcove itself failed.
pub const FAILED: u8 = 125;
/// That of a program which a reader leaves and which takes SIGPIPE as it comes.
const READER_LEFT: u8 = 128 + libc::SIGPIPE as u8;

/// Why a subcommand failed.
#[derive(Debug)]
pub struct Failure(Box<dyn Error>);

impl<E: Into<Box<dyn Error>>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl Failure {
    /// Prints the chain of causes as one line and gives the exit status for it. That nobody reads the
    /// output any more is no news to whoever reads it.
    pub fn report(&self) -> ExitCode {
        let printing = self.0.downcast_ref::<io::Error>();
        if printing.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
            return ExitCode::from(READER_LEFT);
        }
        let mut line = format!("alcove: {}", self.0);
        let mut cause = self.0.source();
        while let Some(error) = cause {
            line.push_str(&format!(": {error}"));
            cause = error.source();
        }
        if let Some(remedy) = self.0.downcast_ref::<VmError>().and_then(VmError::remedy) {
            line.push_str(&format!("; {remedy}"));
        }
        let _ = writeln!(io::stderr(), "{line}");
        ExitCode::from(FAILED)
    }
}

/// Prints what clap has to say: help and version as they are, a mistake as one line.
pub fn usage(error: &clap::Error) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    if matches!(error.kind(), ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand) {
        let _ = error.print();
        return ExitCode::from(FAILED);
    }
    let text = error.to_string();
    let said: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more info"))
        .filter(|line| !line.is_empty())
        .collect();
    let line = said.join("; ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    let command = match env::args_os().nth(1).as_deref().and_then(OsStr::to_str) {
        Some("run") => "run ",
        Some("bench") => "bench ",
        _ => "",
    };
    let _ = writeln!(io::stderr(), "alcove: {line}; see alcove {command}--help");
    ExitCode::from(FAILED)
}
