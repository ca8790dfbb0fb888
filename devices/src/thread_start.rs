//! What the owner of a device has the device's threads do first.

use std::sync::Arc;

/// Called once by each thread of a device, before it serves anything: where the owner restricts what
/// the thread may do. The thread has its name by then.
pub type ThreadStart = Arc<dyn Fn() + Send + Sync>;

/// Nothing at all.
pub fn nothing_first() -> ThreadStart {
    Arc::new(|| {})
}
