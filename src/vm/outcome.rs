//! How a machine's run ended.

use crate::vcpu::CrashReport;

/// How a machine's run ended, and with it alcove's exit status.
#[derive(Debug)]
pub enum Outcome {
    /// The guest powered itself off.
    PoweredOff,
    /// The guest reset itself, which ends a machine that is run once.
    Reset,
    /// The user ended the guest at the console.
    Quit,
    /// The guest wrote this status to the debug-exit port.
    Status(u8),
    /// The time given with `--timeout` is over.
    TimedOut,
    /// The guest's kernel panicked.
    Panicked,
    /// The guest crashed.
    Crashed(Box<CrashReport>),
    /// A signal with this number ended alcove.
    Signalled(i32),
}

impl Outcome {
    /// The exit status, after `docker run` and `timeout`.
    pub fn exit_status(&self) -> u8 {
        /// What a shell adds to the number of the signal that ended a command.
        const SIGNAL_BASE: i32 = 128;
        match self {
            Self::PoweredOff | Self::Reset | Self::Quit => 0,
            Self::Status(status) => *status,
            Self::TimedOut => 124,
            Self::Panicked => 126,
            Self::Crashed(_) => 127,
            Self::Signalled(number) => u8::try_from(SIGNAL_BASE + number).unwrap_or(u8::MAX),
        }
    }
}
