//! The event loop's part of a console.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::output::Output;
use super::stream::Stream;
use super::waker::Waker;
use super::{Backend, Door, MIN_ROOM_BYTES, Receiver};
use crate::backend::terminal::RawMode;
use crate::backend::terminal::escape::{self, EscapeParser, Key};
use crate::event::{MachineEvent, MachineEvents};

/// What one read takes at most.
const READ_BYTES: usize = 4096;

/// A descriptor of the console and what the event loop watches it for.
#[derive(Debug)]
struct Link {
    stream: Arc<Stream>,
    watched: Option<EventSet>,
    /// epoll does not take it, since it is always ready.
    always_ready: bool,
}

impl Link {
    fn new(stream: Arc<Stream>) -> Self {
        let always_ready = stream.is_always_ready();
        Self { stream, watched: None, always_ready }
    }

    fn is(&self, fd: RawFd) -> bool {
        self.stream.as_raw_fd() == fd
    }

    /// Has the loop watch for `wanted`, or not at all.
    fn watch(&mut self, ops: &mut EventOps<'_>, wanted: Option<EventSet>) {
        if self.watched == wanted || self.always_ready {
            return;
        }
        let events = |set| Events::new(self.stream.as_ref(), set);
        let result = match (self.watched, wanted) {
            (None, Some(set)) => ops.add(events(set)),
            (Some(_), Some(set)) => ops.modify(events(set)),
            (Some(_), None) => ops.remove(events(EventSet::empty())),
            (None, None) => Ok(()),
        };
        match result {
            Ok(()) => self.watched = wanted,
            Err(event_manager::Error::Epoll(error)) if error.errno() == EPERM => {
                self.always_ready = true;
            }
            Err(error) => tracing::warn!(%error, "the console cannot be watched"),
        }
    }
}

/// What epoll answers for files that have no notion of readiness.
const EPERM: i32 = rustix::io::Errno::PERM.raw_os_error();

/// Moves bytes between the host and a [`Receiver`], on the event loop's thread. Never waits.
pub struct ConsolePump {
    receiver: Arc<dyn Receiver>,
    output: Arc<Output>,
    events: Arc<dyn MachineEvents>,
    waker: Waker,
    source: Option<Link>,
    /// The output's end a second time, to be watched apart from the source.
    sink: Option<Link>,
    door: Door,
    door_watched: bool,
    escape: Option<EscapeParser>,
    buffer: Box<[u8; READ_BYTES]>,
    /// Restores the terminal on drop.
    _raw_mode: Option<RawMode>,
}

impl ConsolePump {
    /// A pump between `backend`, whose output is `output`, and `receiver`. Ctrl-a x posts
    /// [`MachineEvent::Quit`] to `events`.
    pub(crate) fn new(
        backend: Backend,
        output: Arc<Output>,
        receiver: Arc<dyn Receiver>,
        events: Arc<dyn MachineEvents>,
        waker: Waker,
    ) -> Self {
        let sink = output.sink().map(Link::new);
        Self {
            receiver,
            output,
            events,
            waker,
            source: backend.source.map(|stream| Link::new(Arc::new(stream))),
            sink,
            door: backend.door,
            door_watched: false,
            escape: backend.escapes.then(EscapeParser::default),
            buffer: Box::new([0; READ_BYTES]),
            _raw_mode: backend.raw_mode,
        }
    }

    /// Reads what is there and hands it over: once, or for a source that is always ready until
    /// the receiver is full.
    fn read_input(&mut self, ops: &mut EventOps<'_>) {
        while let Some(source) = &self.source {
            let room = self.receiver.room();
            if room < MIN_ROOM_BYTES {
                return;
            }
            // A held Ctrl-a may come on top.
            let limit = (room - 1).min(READ_BYTES);
            let always_ready = source.always_ready;
            let result = source.stream.read(self.buffer.get_mut(..limit).unwrap_or_default());
            match result {
                Ok(0) => self.end_input(ops),
                Ok(count) => self.take_typed(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::debug!(%error, "the console's input ends");
                    self.end_input(ops);
                }
            }
            if !always_ready {
                return;
            }
        }
    }

    /// Hands over the first `count` bytes of the buffer, less the escapes in them.
    fn take_typed(&mut self, count: usize) {
        let typed = self.buffer.get(..count).unwrap_or_default();
        let Some(parser) = &mut self.escape else {
            self.receiver.deliver(typed);
            return;
        };
        let mut sent = Vec::with_capacity(count.saturating_add(1));
        let mut help = false;
        for byte in typed {
            match parser.feed(*byte) {
                Key::Held => {}
                Key::Send(byte) => sent.push(byte),
                Key::SendEscaped(byte) => sent.extend([escape::ESCAPE, byte]),
                Key::Help => help = true,
                Key::Quit => self.events.post(MachineEvent::Quit),
            }
        }
        self.receiver.deliver(&sent);
        if let (true, Some(source)) = (help, &self.source) {
            // To the terminal itself; a terminal too busy for help shows none.
            let _ = source.stream.write(escape::HELP.as_bytes());
        }
    }

    fn end_input(&mut self, ops: &mut EventOps<'_>) {
        if self.escape.as_mut().is_some_and(EscapeParser::finish) {
            self.receiver.deliver(&[escape::ESCAPE]);
        }
        if let Some(mut source) = self.source.take() {
            source.watch(ops, None);
        }
        if let Door::Pty(_) = self.door {
            self.output.detach();
        }
    }

    fn on_sink_event(&mut self, set: EventSet) {
        let hung_up = set.intersects(EventSet::HANG_UP | EventSet::ERROR);
        let client_left = match &self.door {
            Door::Closed => false,
            Door::Socket(_) => hung_up,
            // Another client may have come since.
            Door::Pty(pty) => hung_up && !pty.has_client(),
        };
        if client_left {
            self.output.detach();
        } else {
            self.output.on_writable();
        }
    }

    /// Lets a client in that is at the door.
    fn on_arrival(&mut self, ops: &mut EventOps<'_>) {
        match &self.door {
            Door::Closed => {}
            Door::Socket(listener) => {
                if let Some(client) = listener.accept() {
                    let client = Arc::new(Stream::socket(client));
                    // A client that has gone may have left input that the guest does not read.
                    if let Some(mut gone) = self.source.take() {
                        gone.watch(ops, None);
                    }
                    self.source = Some(Link::new(client.clone()));
                    self.attach_sink(&client);
                }
            }
            Door::Pty(pty) => {
                pty.clear_arrivals();
                let master = pty.master().clone();
                let has_client = pty.has_client();
                // Also when the client has left again: it may have written something.
                self.source.get_or_insert_with(|| Link::new(master.clone()));
                if has_client && self.sink.is_none() {
                    self.attach_sink(&master);
                }
            }
        }
    }

    fn attach_sink(&mut self, client: &Stream) {
        match client.try_clone() {
            Ok(sink) => {
                let sink = Arc::new(sink);
                self.sink = Some(Link::new(sink.clone()));
                self.output.attach(sink);
            }
            Err(error) => tracing::warn!(%error, "a console client gets no output"),
        }
    }

    /// Has the event loop watch exactly what there is to wait for.
    fn update_watches(&mut self, ops: &mut EventOps<'_>) {
        if !self.output.is_attached()
            && let Some(mut sink) = self.sink.take()
        {
            sink.watch(ops, None);
        }
        self.update_door(ops);
        let source_ended = self.source.is_none();
        if let Some(sink) = &mut self.sink {
            let comes_and_goes = !matches!(self.door, Door::Closed);
            let wanted = match (self.output.is_blocked(), source_ended && comes_and_goes) {
                (true, _) => Some(EventSet::OUT),
                // The empty set still reports that the client has gone.
                (false, true) => Some(EventSet::empty()),
                (false, false) => None,
            };
            sink.watch(ops, wanted);
        }
        if let Some(source) = &mut self.source {
            let room = self.receiver.room() >= MIN_ROOM_BYTES;
            source.watch(ops, room.then_some(EventSet::IN));
            if room && source.always_ready {
                self.read_input(ops);
            }
        }
    }

    /// A socket is watched while it has no client, a pseudo-terminal always.
    fn update_door(&mut self, ops: &mut EventOps<'_>) {
        let (events, wanted) = match &self.door {
            Door::Closed => return,
            Door::Socket(listener) => {
                let free = self.sink.is_none();
                (Events::new(listener, EventSet::IN), free)
            }
            Door::Pty(pty) => (Events::new(pty, EventSet::IN), true),
        };
        let result = match (self.door_watched, wanted) {
            (false, true) => ops.add(events),
            (true, false) => ops.remove(events),
            _ => return,
        };
        match result {
            Ok(()) => self.door_watched = wanted,
            Err(error) => tracing::warn!(%error, "console clients cannot be waited for"),
        }
    }

    fn is_door(&self, fd: RawFd) -> bool {
        match &self.door {
            Door::Closed => false,
            Door::Socket(listener) => listener.as_raw_fd() == fd,
            Door::Pty(pty) => pty.as_raw_fd() == fd,
        }
    }
}

impl MutEventSubscriber for ConsolePump {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let pace = self.receiver.pace().as_raw_fd();
        for fd in [self.waker.as_raw_fd(), self.output.timer_fd(), pace] {
            if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                tracing::error!(%error, "the console cannot be served");
            }
        }
        self.update_watches(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let fd = events.fd();
        if fd == self.output.timer_fd() {
            self.output.on_timer();
        } else if fd == self.receiver.pace().as_raw_fd() {
            self.receiver.on_pace();
        } else if fd == self.waker.as_raw_fd() {
            self.waker.clear();
            if self.source.as_ref().is_some_and(|source| source.watched.is_none()) {
                self.read_input(ops);
            }
        } else if self.source.as_ref().is_some_and(|source| source.is(fd)) {
            self.read_input(ops);
        } else if self.sink.as_ref().is_some_and(|sink| sink.is(fd)) {
            self.on_sink_event(events.event_set());
        } else if self.is_door(fd) {
            self.on_arrival(ops);
        }
        self.update_watches(ops);
    }
}
