//! Fakes for tests: an interrupt line that counts, a recorder of machine events, an event loop.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};

use crate::event::{MachineEvent, MachineEvents};
use crate::interrupt::Interrupt;

/// An interrupt line that counts its edges and lets a fake guest wait for the next one.
#[derive(Debug, Default)]
pub struct FakeInterrupt {
    edges: Mutex<u64>,
    raised: Condvar,
}

impl FakeInterrupt {
    /// How often the line was triggered so far.
    pub fn count(&self) -> u64 {
        *self.edges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the line was triggered more than `seen` times, `timeout` at the longest;
    /// returns how often it was.
    pub fn wait_past(&self, seen: u64, timeout: Duration) -> u64 {
        let edges = self.edges.lock().unwrap_or_else(PoisonError::into_inner);
        let (edges, _) = self
            .raised
            .wait_timeout_while(edges, timeout, |count| *count <= seen)
            .unwrap_or_else(PoisonError::into_inner);
        *edges
    }
}

impl Interrupt for FakeInterrupt {
    fn trigger(&self) -> io::Result<()> {
        *self.edges.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.raised.notify_all();
        Ok(())
    }
}

/// Keeps every event posted to it, in order.
#[derive(Debug, Default)]
pub struct EventRecorder {
    events: Mutex<Vec<MachineEvent>>,
}

impl EventRecorder {
    /// The events posted so far; the recorder is empty afterwards.
    pub fn take(&self) -> Vec<MachineEvent> {
        std::mem::take(&mut *self.events.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl MachineEvents for EventRecorder {
    fn post(&self, event: MachineEvent) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push(event);
    }
}

/// What an event loop serves.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// An event loop on a thread of its own, stopped and joined on drop.
#[derive(Debug)]
pub struct EventLoop {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Serves `subscriber` until dropped.
    pub fn run(subscriber: Subscriber) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            let Ok(mut events) = EventManager::<Subscriber>::new() else { return };
            events.add_subscriber(subscriber);
            while !stopped.load(Ordering::Relaxed) && events.run_with_timeout(5).is_ok() {}
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in the loop has been printed, and the test that waits for it fails.
            let _ = thread.join();
        }
    }
}
