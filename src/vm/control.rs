//! The machine's own subscriber on the event loop: its end, its time limit, its signals.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tracing::error;
use vmm_sys_util::timerfd::TimerFd;

use super::{Mailbox, Outcome};

/// Turns signals and the time limit into outcomes.
pub struct Control {
    mailbox: Arc<Mailbox>,
    signals: SignalFd,
    timer: Option<TimerFd>,
}

impl Control {
    /// Takes over SIGINT, SIGTERM and SIGHUP, for this thread and those it starts from now on, and
    /// starts the time limit.
    pub fn new(mailbox: Arc<Mailbox>, timeout: Option<Duration>) -> io::Result<Self> {
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            mask.add(signal);
        }
        mask.thread_block()?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let signals = SignalFd::with_flags(&mask, flags)?;
        let timer = match timeout {
            Some(limit) => {
                let mut timer = TimerFd::new()?;
                // A limit of zero would disarm the timer instead of firing at once.
                timer.reset(limit.max(Duration::from_nanos(1)), None)?;
                Some(timer)
            }
            None => None,
        };
        Ok(Self { mailbox, signals, timer })
    }

    fn take_signals(&self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            let number = i32::try_from(info.ssi_signo).unwrap_or(Signal::SIGTERM as i32);
            self.mailbox.end(Outcome::Signalled(number));
        }
    }
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let timer = self.timer.as_ref().map(AsRawFd::as_raw_fd);
        let fds = [self.mailbox.wake().as_raw_fd(), self.signals.as_raw_fd()];
        for fd in fds.into_iter().chain(timer) {
            if let Err(e) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                error!("the event loop takes no control events: {e}");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        let timer = self.timer.as_ref().map(AsRawFd::as_raw_fd);
        if Some(events.fd()) == timer {
            self.mailbox.end(Outcome::TimedOut);
        } else if events.fd() == self.signals.as_raw_fd() {
            self.take_signals();
        }
        // The mailbox needs no more than that the loop wakes up.
    }
}
