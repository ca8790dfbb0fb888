//! What the owner of a device has the device's threads do first.

use std::sync::Arc;

/// What a thread calls once, before it serves anything: where its owner restricts what it may do.
/// The thread has its name by then.
pub type FirstAct = Box<dyn FnOnce() + Send>;

/// Gives each thread that a device is about to start its first act, which the thread must call: the
/// owner counts on it and may wait for it.
pub type ThreadStart = Arc<dyn Fn() -> FirstAct + Send + Sync>;

/// Threads that begin with nothing at all.
pub fn nothing_first() -> ThreadStart {
    Arc::new(|| Box::new(|| {}))
}
