//! What the guest prints, on its way to the host.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::stream::Stream;
use super::waker::Waker;
use crate::timer::Timer;

/// Output that waits for the host before the guest has to wait.
pub const BUFFER_BYTES: usize = 64 * 1024;
/// The end of the output that is kept for [`Output::tail`].
pub const TAIL_BYTES: usize = 16 * 1024;

/// A line this long goes out before its end.
const BATCH_BYTES: usize = 1024;
/// What one system call writes at most.
const WRITE_BYTES: usize = 4096;
/// How long an unfinished line may wait for its rest.
const LINGER: Duration = Duration::from_millis(2);
/// After this long without output the first byte goes out at once: it is an echoed key more often
/// than the start of a long text.
const IDLE: Duration = Duration::from_millis(20);

/// What becomes of output while no one takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unattended {
    /// It is dropped: there will be no one.
    Dropped,
    /// The latest [`BUFFER_BYTES`] are kept for who comes next.
    Kept,
}

/// The buffer between the guest's vCPU threads, which put bytes in, and the host.
///
/// A vCPU thread writes the finished line itself when the host takes it; the event loop is woken
/// only for what is left over: an unfinished line (when its timer fires) or a host that is slow
/// (when it is writable again). A guest that prints faster than the host takes waits in
/// [`Output::push`] once the buffer is full; nothing else ever waits.
#[derive(Debug)]
pub struct Output {
    /// Innermost lock: nothing else is locked, and nothing that waits is called, under it.
    state: Mutex<State>,
    /// The buffer has room again, a write has ended, or waiting has become pointless.
    progress: Condvar,
    timer: Timer,
    waker: Waker,
}

#[derive(Debug)]
struct State {
    buffer: VecDeque<u8>,
    tail: VecDeque<u8>,
    sink: Option<Arc<Stream>>,
    unattended: Unattended,
    /// A thread is writing the front of the buffer to the sink, with the lock released.
    writing: bool,
    /// The sink takes nothing at present; the event loop watches it.
    blocked: bool,
    /// No one waits any more: the machine stops.
    closed: bool,
    waiting_threads: usize,
    /// The number of writes when the timer was armed; `None` when it is not armed.
    timer_armed_at: Option<u64>,
    writes: u64,
    last_write: Option<Instant>,
    scratch: Vec<u8>,
}

impl Output {
    /// A buffer in front of `sink`.
    ///
    /// # Errors
    /// No timer could be had.
    pub fn new(
        sink: Option<Arc<Stream>>,
        unattended: Unattended,
        waker: Waker,
    ) -> io::Result<Self> {
        let state = State {
            buffer: VecDeque::new(),
            tail: VecDeque::new(),
            sink,
            unattended,
            writing: false,
            blocked: false,
            closed: false,
            waiting_threads: 0,
            timer_armed_at: None,
            writes: 0,
            last_write: None,
            scratch: Vec::new(),
        };
        let timer = Timer::new()?;
        Ok(Self { state: Mutex::new(state), progress: Condvar::new(), timer, waker })
    }

    /// Takes one byte from the guest. Waits while the buffer is full and the host is slow, until
    /// there is room, the host goes away or [`Output::close`] is called; the byte is then dropped
    /// if it still does not fit.
    pub fn push(&self, byte: u8) {
        let mut state = self.lock();
        state.keep_in_tail(byte);
        while state.buffer.len() >= BUFFER_BYTES {
            if state.sink.is_none() {
                state.buffer.pop_front();
            } else if state.closed {
                return;
            } else {
                state = self.wait(state);
            }
        }
        if state.drops_output() {
            return;
        }
        state.buffer.push_back(byte);
        if !state.can_write() {
            return;
        }
        let line_ends = byte == b'\n' || state.buffer.len() >= BATCH_BYTES;
        if line_ends || (state.buffer.len() == 1 && state.is_idle()) {
            drop(self.flush(state));
        } else {
            self.arm_timer(&mut state);
        }
    }

    /// The last [`TAIL_BYTES`] of all output, whether or not the host took it.
    pub fn tail(&self) -> Vec<u8> {
        self.lock().tail.iter().copied().collect()
    }

    /// From now on [`Output::push`] drops what does not fit, and threads that wait in it return.
    pub fn close(&self) {
        self.lock().closed = true;
        self.progress.notify_all();
    }

    /// Writes out what is buffered, waiting for a slow host until `deadline`. True when the host
    /// took everything.
    pub fn flush_at_end(&self, deadline: Instant) -> bool {
        let mut state = self.lock();
        loop {
            if state.buffer.is_empty() && !state.writing {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(sink) = state.sink.clone() else { return false };
            if state.writing {
                if left.is_zero() {
                    return false;
                }
                state = self.wait_for(state, left);
                continue;
            }
            state.blocked = false;
            state = self.flush(state);
            if !state.blocked {
                continue;
            }
            drop(state);
            if left.is_zero() || sink.wait_writable(left).is_err() {
                return false;
            }
            state = self.lock();
        }
    }

    /// Output goes to `sink` from now on, beginning with what was kept.
    pub(super) fn attach(&self, sink: Arc<Stream>) {
        let mut state = self.lock();
        state.sink = Some(sink);
        state.blocked = false;
        drop(self.flush(state));
    }

    /// The sink is gone.
    pub(super) fn detach(&self) {
        self.lose_sink(&mut self.lock());
    }

    /// The sink, if there is one.
    pub(super) fn sink(&self) -> Option<Arc<Stream>> {
        self.lock().sink.clone()
    }

    /// Whether there is a sink.
    pub(super) fn is_attached(&self) -> bool {
        self.lock().sink.is_some()
    }

    /// Whether the event loop should call [`Output::on_writable`] once the sink is writable.
    pub(super) fn is_blocked(&self) -> bool {
        self.lock().blocked
    }

    /// The sink may take more.
    pub(super) fn on_writable(&self) {
        let mut state = self.lock();
        state.blocked = false;
        drop(self.flush(state));
    }

    /// The descriptor to watch for [`Output::on_timer`].
    pub(super) fn timer_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// The timer has fired: an unfinished line that has waited long enough goes out.
    pub(super) fn on_timer(&self) {
        let mut state = self.lock();
        let armed_at = state.timer_armed_at.take();
        if state.can_write() && armed_at.is_some_and(|writes| writes != state.writes) {
            // What is there began after the timer did. Arming it also clears its expiry.
            self.arm_timer(&mut state);
            return;
        }
        self.timer.clear();
        if state.can_write() {
            drop(self.flush(state));
        }
    }

    /// Writes the buffer to the sink until it is empty or the sink takes no more. The lock is
    /// released for the duration of each write.
    fn flush<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        while state.can_write() {
            let Some(sink) = state.sink.clone() else { break };
            let mut chunk = std::mem::take(&mut state.scratch);
            state.copy_front(&mut chunk);
            state.writing = true;
            drop(state);
            let result = sink.write(&chunk);
            state = self.lock();
            state.writing = false;
            state.scratch = chunk;
            state.writes = state.writes.wrapping_add(1);
            state.last_write = Some(Instant::now());
            // The sink may have been changed meanwhile; the new one gets all from the start.
            if state.sink.as_ref().is_some_and(|current| Arc::ptr_eq(current, &sink)) {
                self.settle(&mut state, result);
            }
            if state.waiting_threads > 0 {
                self.progress.notify_all();
            }
        }
        state
    }

    /// Draws the consequences of a write's result.
    fn settle(&self, state: &mut State, result: io::Result<usize>) {
        match result {
            Ok(written) => {
                state.buffer.drain(..written.min(state.buffer.len()));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                state.blocked = true;
                self.waker.wake();
            }
            Err(error) => {
                if state.unattended == Unattended::Dropped {
                    tracing::warn!(%error, "the console's output is gone; the guest goes on");
                }
                self.lose_sink(state);
                self.waker.wake();
            }
        }
    }

    fn lose_sink(&self, state: &mut State) {
        state.sink = None;
        state.blocked = false;
        if state.unattended == Unattended::Dropped {
            state.buffer = VecDeque::new();
        }
        self.progress.notify_all();
    }

    fn arm_timer(&self, state: &mut State) {
        if state.timer_armed_at.is_some() {
            return;
        }
        match self.timer.arm(LINGER) {
            Ok(()) => state.timer_armed_at = Some(state.writes),
            Err(error) => tracing::warn!(%error, "the console's timer cannot be set"),
        }
    }

    fn wait<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.waiting_threads += 1;
        let mut state = self.progress.wait(state).unwrap_or_else(PoisonError::into_inner);
        state.waiting_threads -= 1;
        state
    }

    fn wait_for<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        timeout: Duration,
    ) -> MutexGuard<'a, State> {
        state.waiting_threads += 1;
        let (mut state, _) =
            self.progress.wait_timeout(state, timeout).unwrap_or_else(PoisonError::into_inner);
        state.waiting_threads -= 1;
        state
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn keep_in_tail(&mut self, byte: u8) {
        if self.tail.len() >= TAIL_BYTES {
            self.tail.pop_front();
        }
        self.tail.push_back(byte);
    }

    fn drops_output(&self) -> bool {
        self.sink.is_none() && self.unattended == Unattended::Dropped
    }

    /// Whether this thread may write something now.
    fn can_write(&self) -> bool {
        self.sink.is_some() && !self.writing && !self.blocked && !self.buffer.is_empty()
    }

    /// Copies the first [`WRITE_BYTES`] of the buffer, or all there is, to `chunk`.
    fn copy_front(&self, chunk: &mut Vec<u8>) {
        chunk.clear();
        let (front, back) = self.buffer.as_slices();
        for part in [front, back] {
            let room = WRITE_BYTES.saturating_sub(chunk.len());
            chunk.extend_from_slice(part.get(..room).unwrap_or(part));
        }
    }

    fn is_idle(&self) -> bool {
        self.last_write.is_none_or(|last| last.elapsed() > IDLE)
    }
}

#[cfg(test)]
mod tests;
