//! The machine's own subscriber on the event loop: its end, its time limit, its signals.
#![expect(unsafe_code, reason = "asks what is done about a signal")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use devices::legacy::generic_event::GenericEvents;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tracing::{error, info, warn};
use vmm_sys_util::timerfd::TimerFd;

use super::{Mailbox, Outcome};

/// Turns signals and time limits into outcomes.
///
/// SIGINT and SIGHUP end the machine at once. The first SIGTERM presses the guest's power button
/// where there is one ([`Control::press_on_terminate`]); it ends the machine when the guest has not
/// powered off in time, and a second one does so at once.
pub struct Control {
    mailbox: Arc<Mailbox>,
    signals: Signals,
    timer: Option<TimerFd>,
    button: Option<Button>,
}

/// Where the numbers of signals come from.
enum Signals {
    /// The process's own.
    Own(SignalFd),
    /// Those that a jail's keeper passes in, a byte each.
    Passed(OwnedFd),
}

impl Signals {
    /// The next one, if there is one.
    fn next(&self) -> Option<i32> {
        match self {
            Self::Own(signals) => {
                let info = signals.read_signal().ok().flatten()?;
                Some(i32::try_from(info.ssi_signo).unwrap_or(Signal::SIGTERM as i32))
            }
            Self::Passed(pipe) => {
                let mut byte = [0];
                match rustix::io::read(pipe, &mut byte).ok()? {
                    // Nobody is there any more to take the exit status.
                    0 => Some(Signal::SIGKILL as i32),
                    _ => Some(byte[0].into()),
                }
            }
        }
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Own(signals) => signals.as_raw_fd(),
            Self::Passed(pipe) => pipe.as_raw_fd(),
        }
    }
}

/// The power button, and how long it has to take effect.
struct Button {
    events: Arc<GenericEvents>,
    limit: Duration,
    /// Runs once the button was pressed.
    timer: Option<TimerFd>,
}

impl Control {
    /// Takes over SIGINT, SIGTERM and SIGHUP, for this thread and those it starts from now on, and
    /// starts the time limit. With `passed`, signals are taken from there instead.
    pub fn new(
        mailbox: Arc<Mailbox>,
        timeout: Option<Duration>,
        passed: Option<OwnedFd>,
    ) -> io::Result<Self> {
        let signals = match passed {
            Some(pipe) => {
                rustix::io::ioctl_fionbio(&pipe, true)?;
                Signals::Passed(pipe)
            }
            None => {
                let mask = signals()?;
                mask.thread_block()?;
                let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
                Signals::Own(SignalFd::with_flags(&mask, flags)?)
            }
        };
        let timer = timeout.map(start_timer).transpose()?;
        Ok(Self { mailbox, signals, timer, button: None })
    }

    /// Makes SIGTERM press the power button of `events` and give the guest `limit` to power off;
    /// with a limit of zero SIGTERM ends the machine at once, as it does without this.
    pub fn press_on_terminate(&mut self, events: Arc<GenericEvents>, limit: Duration) {
        self.button = (limit > Duration::ZERO).then_some(Button { events, limit, timer: None });
    }

    fn take_signals(&mut self, ops: &mut EventOps<'_>) {
        while !self.mailbox.has_ended()
            && let Some(number) = self.signals.next()
        {
            let asks = number == Signal::SIGTERM as i32;
            match &mut self.button {
                Some(button) if asks && button.timer.is_none() => match button.press() {
                    Ok(timer) => {
                        listen(ops, timer.as_raw_fd());
                        button.timer = Some(timer);
                    }
                    Err(e) => {
                        error!("the power button cannot be pressed: {e}");
                        self.mailbox.end(Outcome::Signalled(number));
                    }
                },
                _ => self.mailbox.end(Outcome::Signalled(number)),
            }
        }
    }

    /// The guest had its time to power off.
    fn give_up(&self) {
        if let Some(button) = &self.button {
            button.explain();
        }
        self.mailbox.end(Outcome::Signalled(Signal::SIGTERM as i32));
    }
}

impl Button {
    fn press(&self) -> io::Result<TimerFd> {
        self.events.press_power_button()?;
        info!("SIGTERM pressed the power button; the guest has {:?} to power off", self.limit);
        start_timer(self.limit)
    }

    /// Says why the guest is still there.
    fn explain(&self) {
        let limit = self.limit;
        if self.events.is_pending() {
            warn!(
                "the guest took no notice of its power button for {limit:?} (--shutdown-timeout): \
                 its kernel has no ACPI, has not come so far, or hangs"
            );
        } else {
            warn!(
                "the guest saw its power button but did not power off within {limit:?} \
                 (--shutdown-timeout)"
            );
        }
    }
}

/// Has the signals that end a machine wait for its [`Control`].
pub fn block_signals() -> io::Result<()> {
    Ok(signals()?.thread_block()?)
}

/// The signals that end a machine: not those that whoever started alcove has it ignore, as nohup and
/// background jobs of a script do.
pub fn signals() -> io::Result<SigSet> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        if !is_ignored(signal)? {
            set.add(signal);
        }
    }
    Ok(set)
}

fn is_ignored(signal: Signal) -> io::Result<bool> {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: without a new action the call fills one with what there is.
    let result = unsafe { libc::sigaction(signal as i32, std::ptr::null(), action.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has succeeded.
    let action = unsafe { action.assume_init() };
    Ok(action.sa_sigaction == libc::SIG_IGN)
}

/// A timer that fires once after `limit`.
fn start_timer(limit: Duration) -> io::Result<TimerFd> {
    let mut timer = TimerFd::new()?;
    // A limit of zero would disarm the timer instead of firing at once.
    timer.reset(limit.max(Duration::from_nanos(1)), None)?;
    Ok(timer)
}

fn listen(ops: &mut EventOps<'_>, fd: RawFd) {
    if let Err(e) = ops.add(Events::new_raw(fd, EventSet::IN)) {
        error!("the event loop takes no control events: {e}");
    }
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let timer = self.timer.as_ref().map(AsRawFd::as_raw_fd);
        let fds = [self.mailbox.wake().as_raw_fd(), self.signals.as_raw_fd()];
        fds.into_iter().chain(timer).for_each(|fd| listen(ops, fd));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let timer = self.timer.as_ref().map(AsRawFd::as_raw_fd);
        let shutdown = self.button.as_ref().and_then(|b| b.timer.as_ref()).map(AsRawFd::as_raw_fd);
        if Some(events.fd()) == timer {
            self.mailbox.end(Outcome::TimedOut);
        } else if Some(events.fd()) == shutdown {
            self.give_up();
        } else if events.fd() == self.signals.as_raw_fd() {
            self.take_signals(ops);
        }
        // The mailbox needs no more than that the loop wakes up.
    }
}

#[cfg(test)]
mod tests {
    use devices::testing::FakeInterrupt;
    use nix::sys::signal::raise;

    use super::*;
    use crate::event_loop::EventLoop;
    use std::sync::Mutex;

    /// A machine's control on a loop, with a power button that gives the guest `limit`.
    struct Fixture {
        mailbox: Arc<Mailbox>,
        line: Arc<FakeInterrupt>,
        events: EventLoop,
    }

    fn fixture(limit: Duration) -> Fixture {
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let line = Arc::new(FakeInterrupt::default());
        let mut control = Control::new(Arc::clone(&mailbox), None, None).unwrap();
        control.press_on_terminate(Arc::new(GenericEvents::new(line.clone())), limit);
        let mut events = EventLoop::new().unwrap();
        events.add(Arc::new(Mutex::new(control)));
        Fixture { mailbox, line, events }
    }

    fn signal_of(mailbox: &Mailbox) -> Option<Signal> {
        match mailbox.take()? {
            Outcome::Signalled(number) => Some(Signal::try_from(number).unwrap()),
            other => panic!("unexpected {other:?}"),
        }
    }

    const LONG: Duration = Duration::from_secs(3600);

    #[test]
    fn the_first_sigterm_presses_the_button_and_the_second_ends() {
        let mut fixture = fixture(LONG);

        raise(Signal::SIGTERM).unwrap();
        fixture.events.turn().unwrap();
        assert_eq!((fixture.line.count(), fixture.mailbox.has_ended()), (1, false));

        raise(Signal::SIGTERM).unwrap();
        fixture.events.turn().unwrap();
        assert_eq!(signal_of(&fixture.mailbox), Some(Signal::SIGTERM));
        assert_eq!(fixture.line.count(), 1);
    }

    #[test]
    fn a_guest_that_does_not_power_off_in_time_is_ended() {
        let mut fixture = fixture(Duration::from_millis(20));

        raise(Signal::SIGTERM).unwrap();
        while !fixture.mailbox.has_ended() {
            fixture.events.turn().unwrap();
        }

        assert_eq!((fixture.line.count(), signal_of(&fixture.mailbox)), (1, Some(Signal::SIGTERM)));
    }

    #[test]
    fn other_signals_and_a_limit_of_zero_end_at_once() {
        for (limit, signal) in
            [(LONG, Signal::SIGINT), (LONG, Signal::SIGHUP), (Duration::ZERO, Signal::SIGTERM)]
        {
            let mut fixture = fixture(limit);

            raise(signal).unwrap();
            fixture.events.turn().unwrap();

            assert_eq!((fixture.line.count(), signal_of(&fixture.mailbox)), (0, Some(signal)));
        }
    }
}
