//! The entropy device (virtio 1.2 §5.4): random bytes from the host's kernel.

mod config;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};

use event_manager::MutEventSubscriber;
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

pub use config::RngConfig;

use super::chain::Chain;
use super::device::{ActivateError, Activation, QueueSlot, VirtioDevice};
use super::queue::Queue;
use super::served::{Answer, LoopDevice, QueueHandler};
use crate::rate_limit::Throttle;

/// Entries of the request queue.
const QUEUE_SIZE: u16 = 64;
/// The most bytes that one request gets; the driver asks again for more (§5.4.6.1).
pub const MAX_REQUEST_BYTES: usize = 4096;

/// The entropy device. It has one queue, requestq, and no configuration.
#[derive(Debug)]
pub struct VirtioRng {
    device: LoopDevice<Entropy>,
}

impl VirtioRng {
    /// A device as `config` says; [`RngConfig::enabled`] is the caller's concern.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn new(config: &RngConfig) -> io::Result<Self> {
        let throttle = Throttle::new(None, Some(config.bandwidth))?;
        let handler = Entropy { throttle, bytes: Box::new([0; MAX_REQUEST_BYTES]) };
        Ok(Self { device: LoopDevice::new(handler, &[QUEUE_SIZE])? })
    }

    /// What goes on the event loop.
    pub fn subscriber(&self) -> Arc<Mutex<dyn MutEventSubscriber + Send>> {
        self.device.subscriber()
    }
}

impl VirtioDevice for VirtioRng {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> &[QueueSlot] {
        self.device.queues()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.device.activate(activation)
    }

    fn reset(&mut self) {
        self.device.reset();
    }

    fn reset_queue(&mut self, index: u16) {
        self.device.reset_queue(index);
    }

    fn enable_queue(&mut self, queue: Queue) -> Result<(), ActivateError> {
        self.device.enable_queue(queue)
    }

    fn pause(&mut self) {
        self.device.pause();
    }

    fn resume(&mut self) {
        self.device.resume();
    }
}

/// Fills requests with random bytes, as fast as the throttle allows.
struct Entropy {
    throttle: Throttle,
    bytes: Box<[u8; MAX_REQUEST_BYTES]>,
}

impl QueueHandler for Entropy {
    fn handle(&mut self, _index: u16, chain: &mut Chain) -> Answer {
        let room = usize::try_from(chain.writable_bytes()).unwrap_or(usize::MAX);
        let count = room.min(MAX_REQUEST_BYTES);
        match self.throttle.admit(count as u64) {
            Ok(true) => {}
            Ok(false) => return Answer::Later,
            Err(error) => tracing::warn!(%error, "the entropy device's rate is not limited"),
        }
        let bytes = self.bytes.get_mut(..count).unwrap_or_default();
        // The system call itself: what finds out whether there is one may open a file instead.
        let filled = match getrandom(&mut *bytes, GetRandomFlags::empty()) {
            Ok(filled) => filled,
            Err(error) => {
                tracing::warn!(%error, "the host has no random bytes");
                return Answer::Done(0);
            }
        };
        let written = chain.write(bytes.get(..filled).unwrap_or_default());
        Answer::Done(u32::try_from(written).unwrap_or(0))
    }

    fn sources(&self) -> Vec<RawFd> {
        vec![self.throttle.as_raw_fd()]
    }

    fn on_source(&mut self, _source: RawFd) -> Option<u16> {
        if let Err(error) = self.throttle.clear() {
            tracing::warn!(%error, "the entropy device's timer cannot be cleared");
        }
        Some(0)
    }
}

impl std::fmt::Debug for Entropy {
    /// Without the bytes: the guest's keys come from them.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entropy").field("throttle", &self.throttle).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
