//! The thread that serves one pair of queues, and the control queue if that is woken by the same kick.
//!
//! It sleeps until the driver kicks or the network has become ready, both told edge by edge, so that
//! nothing needs to be read to be woken again. Frames then go both ways in batches, each batch with
//! one decision on an interrupt.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::event::epoll;

use super::control::{self, Command};
use super::features::RECEIVE_OFFLOADS;
use super::metrics::DirectionMetrics;
use super::receive::{ReceiveQueue, Received};
use super::shared::{Shared, offloads_of};
use super::transmit::Sender;
use crate::backend::net::{Failure, NetPort};
use crate::rate_limit::{Rate, Throttle};
use crate::virtio::chain::Chain;
use crate::virtio::desk::{Desk, Taken, Work};
use crate::virtio::pace::Pace;
use crate::virtio::queue::Queue;

/// The most frames that go one way before the other way has its turn and the driver is told.
const BATCH: usize = 64;

/// What woke the thread, as the data of epoll events.
const KICK: u64 = 0;
const PORT: u64 = 1;
const RECEIVE_TIMER: u64 = 2;
const SEND_TIMER: u64 = 3;
const CONTROL_TIMER: u64 = 4;

/// Commands that the control queue carries out in a second, and at once after a rest; changes of the
/// offloads by a driver that starts likewise. Each may have the host's kernel wait with a lock that all
/// its networks share.
const CONTROL_RATE: Rate =
    Rate { per_second: NonZeroU64::new(16).unwrap(), burst: NonZeroU64::new(64).unwrap() };

/// What a port is watched for, edge by edge.
const PORT_EVENTS: epoll::EventFlags =
    epoll::EventFlags::IN.union(epoll::EventFlags::OUT).union(epoll::EventFlags::ET);

/// The queues that a thread serves.
#[derive(Debug, Default)]
pub(super) struct Pair {
    pub receive: Option<ReceiveQueue>,
    pub transmit: Option<Queue>,
    /// The first pair's thread has it; the second's where there is one that the driver does not use.
    pub control: Option<Queue>,
    /// The thread shall take note that the device was reset, with queues or without.
    pub was_reset: bool,
}

impl Work for Pair {
    fn is_empty(&self) -> bool {
        let has_queues =
            self.receive.is_some() || self.transmit.is_some() || self.control.is_some();
        !has_queues && !self.was_reset
    }
}

/// A direction's limits and what it waits for.
#[derive(Debug)]
struct Way {
    throttle: Option<Throttle>,
    /// Until the throttle's timer fires.
    throttled: bool,
    /// Until the network is ready.
    blocked: bool,
}

impl Way {
    fn new(throttle: Option<Throttle>) -> Self {
        Self { throttle, throttled: false, blocked: false }
    }

    fn is_open(&self) -> bool {
        !self.throttled && !self.blocked
    }

    /// The throttle's timer has fired.
    fn timer_fired(&mut self) {
        self.throttled = false;
        if let Some(throttle) = &mut self.throttle {
            // Setting it again, which takes the expiry back as well, is all that could fail.
            let _ = throttle.clear();
        }
    }

    fn throttle_now(&mut self, metrics: &DirectionMetrics) {
        self.throttled = true;
        metrics.throttled.add(1);
    }
}

/// One pair's way between the driver and the network.
pub(super) struct Worker {
    port: Box<dyn NetPort>,
    /// The pair's number.
    index: u16,
    poll: OwnedFd,
    receive: Way,
    send: Way,
    control: Way,
    sender: Sender,
    chain: Chain,
    attached: bool,
    /// The interface was found down, and has not been found up since.
    is_down: bool,
    /// The driver must make room before a frame can be received.
    starved: bool,
    pace: Pace,
    shared: Arc<Shared>,
}

impl Worker {
    /// A thread's worth for pair `index` with `port`, to be kicked by `kick`.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn new(
        index: u16,
        port: Box<dyn NetPort>,
        kick: BorrowedFd<'_>,
        throttles: [Option<Throttle>; 2],
        shared: Arc<Shared>,
    ) -> io::Result<Self> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let edges = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&poll, kick, epoll::EventData::new_u64(KICK), edges)?;
        let [receive, send] = throttles;
        let throttles = [receive, send, Some(Throttle::new(Some(CONTROL_RATE), None)?)];
        let timers = [RECEIVE_TIMER, SEND_TIMER, CONTROL_TIMER];
        for (throttle, data) in throttles.iter().zip(timers) {
            if let Some(throttle) = throttle {
                // SAFETY: the timer is open for as long as it is borrowed.
                #[expect(unsafe_code, reason = "the timer lends its descriptor by number only")]
                let timer = unsafe { BorrowedFd::borrow_raw(throttle.as_raw_fd()) };
                epoll::add(&poll, timer, epoll::EventData::new_u64(data), epoll::EventFlags::IN)?;
            }
        }
        let [receive, send, control] = throttles.map(Way::new);
        let mut worker = Self {
            port,
            index,
            poll,
            receive,
            send,
            control,
            sender: Sender::default(),
            chain: Chain::new(),
            attached: index == 0,
            is_down: false,
            starved: false,
            pace: Pace::default(),
            shared,
        };
        if worker.attached {
            worker.watch_port()?;
        }
        Ok(worker)
    }

    fn watch_port(&mut self) -> io::Result<()> {
        let data = epoll::EventData::new_u64(PORT);
        Ok(epoll::add(&self.poll, self.port.descriptor(), data, PORT_EVENTS)?)
    }

    /// The thread's life: serves what lies on `desk`.
    pub fn run(mut self, desk: &Desk<Pair>) {
        while let Some(mut taken) = Taken::next(desk) {
            self.serve(&mut taken.work, desk);
        }
    }

    /// Serves `pair` until it shall stop. Nothing is in flight between two calls of the network.
    fn serve(&mut self, pair: &mut Pair, desk: &Desk<Pair>) {
        // Kicks and edges of the time before are forgotten.
        (self.receive.blocked, self.send.blocked) = (false, false);
        while !desk.stops() {
            self.follow_settings();
            pair.was_reset = false;
            if pair.is_empty() {
                return;
            }
            let mut moved = pair.control.as_mut().map_or(0, |queue| self.serve_control(queue));
            moved += pair.transmit.as_mut().map_or(0, |queue| self.transmit(queue));
            moved += pair.receive.as_mut().map_or(0, |queue| self.receive(queue));
            self.pace.saw(moved);
            if moved > 0 {
                continue;
            }
            if self.arm(pair) {
                continue;
            }
            if let Err(error) = self.wait() {
                // Nothing that a host is known to do.
                tracing::error!(net = self.shared.name, %error, "a network stops: no more kicks");
                desk.refuse();
                break;
            }
            self.pace.woken();
        }
        // A reset takes back what the driver has set.
        self.follow_settings();
    }

    /// Asks the driver for kicks where it may have more; whether it has by now.
    fn arm(&self, pair: &mut Pair) -> bool {
        let mut more = false;
        // A queue that must wait for something else needs no kicks.
        if self.control.is_open() {
            more |= pair.control.as_mut().is_some_and(Queue::enable_kicks);
        }
        if self.send.is_open() {
            more |= pair.transmit.as_mut().is_some_and(Queue::enable_kicks);
        }
        if self.starved {
            more |= pair.receive.as_mut().is_some_and(|receive| receive.queue.enable_kicks());
        }
        more
    }

    /// Sleeps until there is something to do.
    fn wait(&mut self) -> io::Result<()> {
        let mut events = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }; 5];
        let count = match epoll::wait(&self.poll, &mut events, None) {
            Err(rustix::io::Errno::INTR) => return Ok(()),
            result => result?,
        };
        for event in events.iter().take(count) {
            match event.data.u64() {
                RECEIVE_TIMER => self.receive.timer_fired(),
                SEND_TIMER => self.send.timer_fired(),
                CONTROL_TIMER => self.control.timer_fired(),
                PORT => self.port_is_ready(event.flags),
                _ => {}
            }
        }
        Ok(())
    }

    fn port_is_ready(&mut self, flags: epoll::EventFlags) {
        let gone = epoll::EventFlags::HUP | epoll::EventFlags::ERR | epoll::EventFlags::RDHUP;
        if flags.intersects(epoll::EventFlags::IN | gone) {
            self.receive.blocked = false;
        }
        if flags.intersects(epoll::EventFlags::OUT | gone) {
            self.send.blocked = false;
            // What was down may be up: frames that are sent and received will tell.
            self.receive.blocked = false;
            if std::mem::take(&mut self.is_down) {
                self.shared.set_link(true);
            }
            match self.port.flush() {
                Ok(()) | Err(Failure::WouldBlock) => {}
                Err(failure) => self.note(&failure),
            }
        }
    }

    /// Takes over what the control queue, a reset or an activation has changed.
    fn follow_settings(&mut self) {
        let attached = self.index < self.shared.active_pairs.load(Ordering::Acquire);
        if attached != self.attached {
            self.attached = attached;
            let mut result = self.port.set_attached(attached);
            if attached {
                result = result.and_then(|()| self.watch_port());
                self.receive.blocked = false;
            } else {
                result =
                    result.and_then(|()| Ok(epoll::delete(&self.poll, self.port.descriptor())?));
            }
            if let Err(error) = result
                && let Some(others) = self.shared.may_complain()
            {
                tracing::warn!(net = self.shared.name, queue = self.index, %error, others, "a queue of the network cannot be switched");
            }
        }
        let is_due = self.index == 0 && !self.shared.offloads_are_applied();
        if is_due && self.admits_control() {
            self.apply_offloads();
        }
    }

    /// Whether one more thing may be asked of the host's kernel now; if not, the throttle's timer wakes
    /// the thread.
    fn admits_control(&mut self) -> bool {
        let is_refused = self.control.throttled
            || self
                .control
                .throttle
                .as_mut()
                .is_some_and(|throttle| matches!(throttle.admit(0), Ok(false)));
        self.control.throttled = is_refused;
        !is_refused
    }

    /// Has the network leave to the driver what the driver does itself. For the first pair's thread.
    fn apply_offloads(&mut self) {
        let offloads = self.shared.receive_offloads.load(Ordering::Acquire);
        if let Err(error) = self.port.set_offloads(offloads_of(offloads))
            && let Some(others) = self.shared.may_complain()
        {
            tracing::warn!(net = self.shared.name, %error, others, "the network keeps its offloads");
        }
        self.shared.set_applied_offloads(offloads);
    }

    /// Sends a batch; how many frames the driver gave.
    fn transmit(&mut self, queue: &mut Queue) -> usize {
        queue.disable_kicks();
        let mut room = BATCH;
        while room > 0 && self.send.is_open() && queue.pop(&mut self.chain) {
            self.send_one(queue);
            room -= 1;
        }
        queue.signal();
        BATCH - room
    }

    /// Sends the frame in `self.chain`, or puts it back where it must wait.
    fn send_one(&mut self, queue: &mut Queue) {
        let metrics = &self.shared.metrics.sent;
        let features = self.shared.features.load(Ordering::Relaxed);
        let Ok((header, bytes)) = Sender::parse(&mut self.chain, features) else {
            metrics.malformed.add(1);
            if let Some(others) = self.shared.may_complain() {
                tracing::warn!(
                    net = self.shared.name,
                    others,
                    "a driver sent a frame that makes no sense; it is dropped"
                );
            }
            queue.push(&mut self.chain, 0);
            return;
        };
        if let Some(throttle) = &mut self.send.throttle
            && let Ok(false) = throttle.is_open()
        {
            self.send.throttle_now(metrics);
            queue.put_back(&mut self.chain);
            return;
        }
        match self.sender.send(self.port.as_mut(), &header, &self.chain) {
            Ok(()) => {
                metrics.packets.add(1);
                metrics.bytes.add(bytes);
                if let Some(throttle) = &self.send.throttle {
                    throttle.charge(bytes);
                }
            }
            Err(Failure::WouldBlock) => {
                metrics.blocked.add(1);
                self.send.blocked = true;
                queue.put_back(&mut self.chain);
                return;
            }
            Err(failure) => {
                match failure {
                    Failure::Down | Failure::Gone(_) => metrics.link_down.add(1),
                    _ => metrics.refused.add(1),
                }
                self.note(&failure);
            }
        }
        queue.push(&mut self.chain, 0);
    }

    /// Receives a batch; how many frames came.
    fn receive(&mut self, receive: &mut ReceiveQueue) -> usize {
        self.starved = false;
        let may_come = receive.holds_frame() || self.attached;
        if !may_come || !self.shared.offloads_are_applied() {
            return 0;
        }
        receive.queue.disable_kicks();
        let mut moved = 0;
        while moved < BATCH && self.receive.is_open() {
            if let Some(throttle) = &mut self.receive.throttle
                && let Ok(false) = throttle.is_open()
            {
                self.receive.throttle_now(&self.shared.metrics.received);
            } else if self.receive_one(receive) {
                moved += 1;
            } else {
                break;
            }
        }
        receive.queue.signal();
        moved
    }

    /// Receives a frame; false when there is none or no room for one.
    fn receive_one(&mut self, receive: &mut ReceiveQueue) -> bool {
        let metrics = &self.shared.metrics.received;
        match receive.receive(self.port.as_mut()) {
            Received::Frame(bytes) => {
                metrics.packets.add(1);
                metrics.bytes.add(bytes);
                if let Some(throttle) = &self.receive.throttle {
                    throttle.charge(bytes);
                }
                self.shared.set_link(true);
            }
            Received::TooLarge => {
                metrics.too_large.add(1);
                if let Some(others) = self.shared.may_complain() {
                    tracing::warn!(
                        net = self.shared.name,
                        others,
                        "a frame is larger than the driver's buffers; it is dropped"
                    );
                }
            }
            Received::NoRoom => {
                metrics.blocked.add(1);
                self.starved = true;
                return false;
            }
            Received::Nothing(failure) => {
                self.receive.blocked = true;
                match failure {
                    // A tap that is down says no more than that there is nothing.
                    Failure::WouldBlock if self.is_down => {}
                    Failure::WouldBlock => {
                        self.shared.set_link(true);
                    }
                    failure => self.note(&failure),
                }
                return false;
            }
        }
        true
    }

    /// Tells what has happened to the network, the driver too.
    fn note(&mut self, failure: &Failure) {
        let is_link = matches!(failure, Failure::Down | Failure::Gone(_));
        let is_news = !is_link || self.shared.set_link(false);
        if matches!(failure, Failure::Down) && self.attached && !self.is_down {
            self.is_down = true;
            // Has the kernel tell when it is up: it does for who has looked while it was down.
            let data = epoll::EventData::new_u64(PORT);
            let watched = epoll::modify(&self.poll, self.port.descriptor(), data, PORT_EVENTS);
            if let Err(error) = watched {
                tracing::debug!(net = self.shared.name, %error, "the interface is not watched");
            }
        }
        if let Some(others) = is_news.then(|| self.shared.may_complain()).flatten() {
            tracing::warn!(net = self.shared.name, others, "{failure}");
        }
    }

    /// Answers what is in the control queue; how many commands there were.
    fn serve_control(&mut self, queue: &mut Queue) -> usize {
        queue.disable_kicks();
        let mut room = BATCH;
        while room > 0 && self.control.is_open() && queue.pop(&mut self.chain) {
            if !self.admits_control() {
                queue.put_back(&mut self.chain);
                break;
            }
            room -= 1;
            let shared = &self.shared;
            let features = shared.features.load(Ordering::Relaxed);
            let command =
                control::parse(&mut self.chain, features, shared.max_pairs, RECEIVE_OFFLOADS);
            match command {
                Some(Command::Pairs(pairs)) => shared.set_active_pairs(pairs),
                Some(Command::Offloads(bits)) => {
                    shared.set_receive_offloads(bits);
                    if self.index == 0 && !shared.offloads_are_applied() {
                        self.apply_offloads();
                    }
                }
                None => {}
            }
            let written = control::answer(&mut self.chain, command.is_some());
            queue.push(&mut self.chain, written);
        }
        queue.signal();
        BATCH - room
    }
}
