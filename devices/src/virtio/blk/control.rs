//! How a device starts and stops the thread that serves one of its queues.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::virtio::queue::Queue;

/// What the device's side and the thread's side of a queue share.
///
/// The queue lies on the desk while no one serves it. The thread takes it from there and puts it
/// back when it is called upon to stop.
#[derive(Debug)]
pub(super) struct Control {
    /// The lock is held for moments only, never while the queue is served.
    desk: Mutex<Desk>,
    changed: Condvar,
    /// The thread shall put the queue back. It is looked at between batches, without the lock.
    stop: AtomicBool,
    kick: Arc<EventFd>,
}

#[derive(Debug, Default)]
struct Desk {
    queue: Option<Queue>,
    /// The thread must not take the queue.
    held: bool,
    /// The thread has the queue.
    serving: bool,
    /// The thread shall end.
    end: bool,
}

impl Control {
    /// A desk without a queue. `kick` wakes the thread while it serves.
    pub fn new(kick: Arc<EventFd>) -> Self {
        Self { desk: Mutex::default(), changed: Condvar::new(), stop: AtomicBool::new(false), kick }
    }

    /// What wakes the thread while it serves.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Gives the thread a queue to serve, once it is not held.
    pub fn put(&self, queue: Queue) {
        self.desk().queue = Some(queue);
        self.changed.notify_all();
    }

    /// Stops the thread; returns when it has nothing in flight.
    pub fn hold(&self) {
        let mut desk = self.desk();
        desk.held = true;
        self.stop_serving(desk);
    }

    /// Lets the thread serve again.
    pub fn release(&self) {
        self.desk().held = false;
        self.changed.notify_all();
    }

    /// Stops the thread and drops the queue. Whether it is held is as before.
    pub fn take_away(&self) {
        let held = {
            let mut desk = self.desk();
            std::mem::replace(&mut desk.held, true)
        };
        self.stop_serving(self.desk());
        let mut desk = self.desk();
        desk.queue = None;
        desk.held = held;
    }

    /// Has the thread end once it has nothing in flight.
    pub fn end(&self) {
        let mut desk = self.desk();
        desk.end = true;
        self.stop_serving(desk);
        self.changed.notify_all();
    }

    fn stop_serving(&self, mut desk: MutexGuard<'_, Desk>) {
        if !desk.serving {
            return;
        }
        self.stop.store(true, Ordering::Release);
        // It fails when the counter is full, and then the thread is awake anyway.
        let _ = self.kick.write(1);
        while desk.serving {
            desk = self.changed.wait(desk).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The thread waits for a queue to serve; `None`: it shall end.
    pub fn next_queue(&self) -> Option<Queue> {
        let mut desk = self.desk();
        loop {
            if desk.end {
                return None;
            }
            if !desk.held
                && let Some(queue) = desk.queue.take()
            {
                desk.serving = true;
                self.stop.store(false, Ordering::Relaxed);
                return Some(queue);
            }
            desk = self.changed.wait(desk).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether the thread shall put its queue back.
    pub fn stops(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// The thread cannot go on: it takes no queue before the next [`Control::release`].
    pub fn refuse(&self) {
        self.desk().held = true;
    }

    /// The thread puts its queue back, with nothing in flight; `None` if it was lost.
    pub fn put_back(&self, queue: Option<Queue>) {
        let mut desk = self.desk();
        desk.queue = queue;
        desk.serving = false;
        self.changed.notify_all();
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
