//! The user's terminal: raw mode, and the way back out of it whatever happens.

pub mod escape;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::getpgrp;
use rustix::termios::{
    ControlModes, InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios, isatty,
    tcgetattr, tcgetpgrp, tcsetattr,
};

/// The terminal as it was found, kept for the rest of the process.
struct Saved {
    terminal: OwnedFd,
    settings: Termios,
}

static SAVED: OnceLock<Saved> = OnceLock::new();
static RAW: AtomicBool = AtomicBool::new(false);

/// A terminal in raw mode, restored on drop and by [`restore`].
///
/// Raw means: every key reaches the guest as it is typed, Ctrl-C and Ctrl-Z included, without
/// echo. Output processing stays on, so that alcove's own lines still begin in the first column;
/// the guest's own CR LF pass unharmed.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Puts `terminal` into raw mode. `Ok(None)`, and the terminal untouched, when it is not a
    /// terminal or when this process is in its background, where touching it would stop it.
    ///
    /// A process has one such terminal: after the first call, later ones act on the same.
    ///
    /// # Errors
    /// The terminal's settings could not be read or written.
    pub fn enter(terminal: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        if !isatty(terminal) || !in_foreground(terminal) {
            return Ok(None);
        }
        let saved = match SAVED.get() {
            Some(saved) => saved,
            None => {
                let found = Saved {
                    settings: tcgetattr(terminal)?,
                    terminal: terminal.try_clone_to_owned()?,
                };
                SAVED.get_or_init(|| found)
            }
        };
        RAW.store(true, Ordering::SeqCst);
        let mut settings = saved.settings.clone();
        make_raw_input(&mut settings);
        if let Err(error) = tcsetattr(&saved.terminal, OptionalActions::Now, &settings) {
            RAW.store(false, Ordering::SeqCst);
            return Err(error.into());
        }
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as [`RawMode::enter`] found it; without effect when it is not raw.
///
/// Idempotent and async-signal-safe (atomics and two or three ioctls), so fit for a panic hook and
/// a signal handler. Leaves the terminal alone when another job has it by now.
pub fn restore() {
    if !RAW.swap(false, Ordering::SeqCst) {
        return;
    }
    if let Some(saved) = SAVED.get()
        && in_foreground(saved.terminal.as_fd())
    {
        // Nothing is left to be done about a terminal that is gone.
        let _ = tcsetattr(&saved.terminal, OptionalActions::Now, &saved.settings);
    }
}

/// Whether this process may use `terminal` without being stopped: it is the foreground job there,
/// or the terminal does not control it at all.
pub fn in_foreground(terminal: BorrowedFd<'_>) -> bool {
    tcgetpgrp(terminal).map_or(true, |group| group == getpgrp())
}

/// Input as typed: no line editing, no echo, no signals, no flow control, 8 bits.
fn make_raw_input(settings: &mut Termios) {
    settings.input_modes.remove(
        InputModes::IGNBRK
            | InputModes::BRKINT
            | InputModes::PARMRK
            | InputModes::ISTRIP
            | InputModes::INLCR
            | InputModes::IGNCR
            | InputModes::ICRNL
            | InputModes::IXON,
    );
    settings.local_modes.remove(
        LocalModes::ECHO
            | LocalModes::ECHONL
            | LocalModes::ICANON
            | LocalModes::ISIG
            | LocalModes::IEXTEN,
    );
    settings.control_modes.remove(ControlModes::CSIZE | ControlModes::PARENB);
    settings.control_modes.insert(ControlModes::CS8);
    settings.special_codes[SpecialCodeIndex::VMIN] = 1;
    settings.special_codes[SpecialCodeIndex::VTIME] = 0;
}

#[cfg(test)]
mod tests;
