//! The one epoll loop, on the main thread.

use std::sync::{Arc, Mutex};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};

/// What the loop serves.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// Devices and the machine's own control, each woken when a descriptor of theirs is ready.
pub struct EventLoop {
    manager: EventManager<Subscriber>,
}

impl EventLoop {
    /// A loop with no subscribers.
    pub fn new() -> Result<Self, event_manager::Error> {
        Ok(Self { manager: EventManager::new()? })
    }

    /// Adds `subscriber`, which registers its descriptors.
    pub fn add(&mut self, subscriber: Subscriber) {
        self.manager.add_subscriber(subscriber);
    }

    /// Waits for one batch of events and serves it.
    pub fn turn(&mut self) -> Result<(), event_manager::Error> {
        self.manager.run().map(drop)
    }
}
