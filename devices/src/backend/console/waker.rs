//! How a vCPU thread calls the console's pump on the event loop.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Wakes the console's pump. Clones wake the same one.
#[derive(Clone, Debug)]
pub struct Waker(Arc<EventFd>);

impl Waker {
    /// A waker that no one has used yet.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(EventFd::new(EFD_NONBLOCK)?)))
    }

    /// Has the pump look at its device and its output again. Never waits.
    pub fn wake(&self) {
        // Fails only when the counter is at its limit, and then the pump is awake anyway.
        let _ = self.0.write(1);
    }

    /// Takes back all calls of [`Waker::wake`] so far.
    pub fn clear(&self) {
        // Fails only when there is none.
        let _ = self.0.read();
    }
}

impl AsRawFd for Waker {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
