//! `alcove run`.

use std::io::{self, Write};
use std::panic;
use std::process::ExitCode;

use devices::backend::terminal;
use devices::legacy::serial::SerialConfig;

use super::Failure;
use crate::cli::RunArgs;
use crate::config::{VmConfig, file};
use crate::vm::{Ended, Machine, Outcome};

/// Lines of the console that are shown of a guest that failed out of sight.
const TAIL_LINES: usize = 20;

/// Launches the guest that the flags describe and waits for its end.
pub fn run(args: RunArgs) -> Result<ExitCode, Failure> {
    let mut config = match &args.config {
        Some(path) => file::load(path)?,
        None => VmConfig::default(),
    };
    let print_config = args.print_config;
    args.apply(&mut config);
    config.validate()?;
    if print_config {
        io::stdout().write_all(file::to_toml(&config)?.as_bytes())?;
        return Ok(ExitCode::SUCCESS);
    }
    restore_terminal_on_panic();
    let machine = Machine::build(&config)?;
    if let Some(path) = machine.console_path() {
        let _ = writeln!(io::stderr(), "alcove: the serial console is at {}", path.display());
    }
    let ended = machine.run()?;
    // Nobody may be there to read it; the status is what counts.
    let _ = report(&ended, &config.serial);
    Ok(ExitCode::from(ended.outcome.exit_status()))
}

/// Says why the guest ended, unless it ended as guests do.
fn report(ended: &Ended, serial: &SerialConfig) -> io::Result<()> {
    let why = match &ended.outcome {
        Outcome::PoweredOff | Outcome::Reset | Outcome::Quit | Outcome::Status(_) => return Ok(()),
        Outcome::TimedOut => "the guest did not end within --timeout".to_owned(),
        Outcome::Panicked => "the guest's kernel panicked".to_owned(),
        Outcome::Signalled(number) => format!("ended by signal {number}"),
        Outcome::Crashed(report) => report.to_string(),
    };
    let mut err = io::stderr();
    writeln!(err, "alcove: {why}")?;
    if *serial != SerialConfig::Stdio && !ended.console_tail.is_empty() {
        writeln!(err, "alcove: the console's last lines:")?;
        let text = String::from_utf8_lossy(&ended.console_tail);
        let lines: Vec<&str> = text.lines().collect();
        for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
            let printable: String = line.chars().filter(|c| !c.is_control()).collect();
            writeln!(err, "  {printable}")?;
        }
    }
    Ok(())
}

/// A panic in any thread first gives the user the terminal back, then is told as usual.
pub fn restore_terminal_on_panic() {
    let tell = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        terminal::restore();
        tell(info);
    }));
}
