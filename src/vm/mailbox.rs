//! Where every thread says why the machine should end.

use std::sync::{Mutex, PoisonError};

use devices::event::{MachineEvent, MachineEvents};
use tracing::info;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Outcome;

/// Holds the first outcome that was reported and wakes the event loop for it.
pub struct Mailbox {
    /// A leaf lock.
    outcome: Mutex<Option<Outcome>>,
    wake: EventFd,
}

impl Mailbox {
    /// An empty mailbox.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { outcome: Mutex::new(None), wake: EventFd::new(EFD_NONBLOCK)? })
    }

    /// Readable once there is an outcome.
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Reports `outcome`; all but the first are dropped.
    pub fn end(&self, outcome: Outcome) {
        let mut slot = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            *slot = Some(outcome);
            // The counter cannot overflow: it is written once.
            let _ = self.wake.write(1);
        }
    }

    /// Whether there is an outcome.
    pub fn has_ended(&self) -> bool {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// The outcome, once there is one.
    pub fn take(&self) -> Option<Outcome> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl MachineEvents for Mailbox {
    fn post(&self, event: MachineEvent) {
        match event {
            MachineEvent::Reset => self.end(Outcome::Reset),
            MachineEvent::PowerOff => self.end(Outcome::PoweredOff),
            MachineEvent::Exit(status) => self.end(Outcome::Status(status)),
            MachineEvent::Panicked => self.end(Outcome::Panicked),
            MachineEvent::Quit => self.end(Outcome::Quit),
            MachineEvent::CrashLoaded => info!("the guest's crash kernel takes over"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_outcome_stands() {
        let mailbox = Mailbox::new().unwrap();

        mailbox.post(MachineEvent::Exit(7));
        mailbox.post(MachineEvent::Reset);

        assert!(matches!(mailbox.take(), Some(Outcome::Status(7))));
    }

    #[test]
    fn a_crash_kernel_does_not_end_the_machine() {
        let mailbox = Mailbox::new().unwrap();

        mailbox.post(MachineEvent::CrashLoaded);

        assert!(!mailbox.has_ended());
    }
}
