//! alcove's own log, on standard error.

use std::io;
use std::time::{Duration, Instant};

use tracing::level_filters::LevelFilter;

/// How much is logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Level {
    /// Nothing.
    Off,
    /// What made something fail.
    Error,
    /// What a user should know of.
    #[default]
    Warn,
    /// What was chosen, and accesses of the guest to devices that it does not have.
    Info,
    /// What helps to find a fault in alcove.
    Debug,
}

/// Sends the log to standard error from now on. Only the first call has an effect.
pub fn init(level: Level) {
    let filter = match level {
        Level::Off => LevelFilter::OFF,
        Level::Error => LevelFilter::ERROR,
        Level::Warn => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
    };
    let _ = tracing_subscriber::fmt()
        .with_max_level(filter)
        .with_writer(io::stderr)
        .with_ansi(false)
        .without_time()
        .with_target(false)
        // What cannot be written is not worth a panic: whoever reads the log may have left.
        .log_internal_errors(false)
        .try_init();
}

/// Lets a few lines through a second, so that a guest cannot fill the log.
#[derive(Debug, Default)]
pub struct RateLimit {
    window: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl RateLimit {
    const LINES_PER_WINDOW: u32 = 5;
    const WINDOW: Duration = Duration::from_secs(1);

    /// Calls `say` unless this second has had its lines; says how many were left out once a new
    /// second begins.
    pub fn allow(&mut self, say: impl FnOnce()) {
        let now = Instant::now();
        if self.window.is_none_or(|start| now.duration_since(start) >= Self::WINDOW) {
            self.window = Some(now);
            self.lines = 0;
            let suppressed = std::mem::take(&mut self.suppressed);
            if suppressed > 0 {
                tracing::info!("{suppressed} more such lines were left out");
            }
        }
        if self.lines < Self::LINES_PER_WINDOW {
            self.lines += 1;
            say();
        } else {
            self.suppressed += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_to_a_few_lines() {
        let mut limit = RateLimit::default();
        let mut said = 0;

        for _ in 0..1000 {
            limit.allow(|| said += 1);
        }

        assert!((5..100).contains(&said), "{said} lines");
    }
}
