//! How a device starts and stops a thread of its own that serves queues.

use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::EventFd;

use super::queue::Queue;
use crate::thread_start::ThreadStart;

/// Characters of a device's name that its threads carry; a thread's name has 15.
const NAME_CHARS: usize = 8;

/// A thread, seen as the desk where its work lies while it does not serve. Dropping it ends the thread,
/// which finishes what is in flight, and joins it.
#[derive(Debug)]
pub(super) struct Server<W: Work> {
    desk: Arc<Desk<W>>,
    thread: Option<JoinHandle<()>>,
}

impl<W: Work + 'static> Server<W> {
    /// Thread number `index` of the device `name`: it begins with what `start` gives and lives as long
    /// as `serve`. `kick` wakes it.
    ///
    /// # Errors
    /// The host has no more threads.
    pub fn spawn(
        name: &str,
        index: u16,
        kick: Arc<EventFd>,
        start: &ThreadStart,
        serve: impl FnOnce(&Desk<W>) + Send + 'static,
    ) -> io::Result<Self> {
        let desk = Arc::new(Desk::new(kick));
        let (given, first) = (desk.clone(), start());
        let short: String = name.chars().filter(char::is_ascii).take(NAME_CHARS).collect();
        let thread = thread::Builder::new().name(format!("{short}-q{index}")).spawn(move || {
            first();
            serve(&given);
        })?;
        Ok(Self { desk, thread: Some(thread) })
    }
}

impl<W: Work> Deref for Server<W> {
    type Target = Desk<W>;

    fn deref(&self) -> &Desk<W> {
        &self.desk
    }
}

impl<W: Work> Drop for Server<W> {
    fn drop(&mut self) {
        self.desk.end();
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed.
            let _ = thread.join();
        }
    }
}

/// What a thread serves: one queue, or several that belong together.
pub(super) trait Work: Default + Send {
    /// There is no queue, and nothing to do.
    fn is_empty(&self) -> bool;
}

impl Work for Option<Queue> {
    fn is_empty(&self) -> bool {
        self.is_none()
    }
}

/// What the device's side and the thread's side share.
///
/// The work lies on the desk while no one does it. The thread takes it from there and puts it back
/// when it is called upon to stop. The device's side is one caller at a time.
#[derive(Debug)]
pub(super) struct Desk<W> {
    /// The lock is held for moments only, never while queues are served.
    state: Mutex<State<W>>,
    changed: Condvar,
    /// The thread shall put its work back. It is looked at between batches, without the lock.
    stop: AtomicBool,
    kick: Arc<EventFd>,
}

#[derive(Debug, Default)]
struct State<W> {
    work: W,
    /// The thread must not take the work: the device is paused.
    held: bool,
    /// The thread must not take the work: it is about to be changed.
    changing: bool,
    /// The thread has the work.
    serving: bool,
    /// The thread shall end.
    end: bool,
}

impl<W: Work> Desk<W> {
    /// A desk without work. `kick` wakes the thread while it serves.
    fn new(kick: Arc<EventFd>) -> Self {
        let state = State { work: W::default(), ..State::default() };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            kick,
        }
    }

    /// What wakes the thread while it serves.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Stops the thread, changes its work with nothing in flight, and lets it go on unless it is
    /// held.
    pub fn change(&self, change: impl FnOnce(&mut W)) {
        let mut state = self.state();
        state.changing = true;
        let mut state = self.stop_serving(state);
        change(&mut state.work);
        state.changing = false;
        drop(state);
        self.changed.notify_all();
    }

    /// Stops the thread; returns when it has nothing in flight.
    pub fn hold(&self) {
        let mut state = self.state();
        state.held = true;
        drop(self.stop_serving(state));
    }

    /// Lets the thread serve again.
    pub fn release(&self) {
        self.state().held = false;
        self.changed.notify_all();
    }

    /// Has the thread end once it has nothing in flight.
    fn end(&self) {
        let mut state = self.state();
        state.end = true;
        drop(self.stop_serving(state));
        self.changed.notify_all();
    }

    fn stop_serving<'a>(&'a self, mut state: MutexGuard<'a, State<W>>) -> MutexGuard<'a, State<W>> {
        if state.serving {
            self.stop.store(true, Ordering::Release);
            // It fails when the counter is full, and then the thread is awake anyway.
            let _ = self.kick.write(1);
        }
        while state.serving {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    /// The thread waits for work; `None`: it shall end.
    pub fn take(&self) -> Option<W> {
        let mut state = self.state();
        loop {
            if state.end {
                return None;
            }
            if !state.held && !state.changing && !state.work.is_empty() {
                state.serving = true;
                self.stop.store(false, Ordering::Relaxed);
                return Some(std::mem::take(&mut state.work));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether the thread shall put its work back.
    pub fn stops(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// The thread cannot go on: it takes no work before the next [`Desk::release`].
    pub fn refuse(&self) {
        self.state().held = true;
    }

    fn put_back(&self, work: W) {
        let mut state = self.state();
        state.work = work;
        state.serving = false;
        drop(state);
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State<W>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Work on its way through the thread: back to its desk it goes, with nothing in flight, also when
/// the thread panics.
pub(super) struct Taken<'a, W: Work> {
    desk: &'a Desk<W>,
    /// The work.
    pub work: W,
}

impl<'a, W: Work> Taken<'a, W> {
    /// The next work of `desk`; `None`: the thread shall end.
    pub fn next(desk: &'a Desk<W>) -> Option<Self> {
        desk.take().map(|work| Self { desk, work })
    }
}

impl<W: Work> Drop for Taken<'_, W> {
    fn drop(&mut self) {
        self.desk.put_back(std::mem::take(&mut self.work));
    }
}
