//! What a virtio device is to its transport, and what it gets from it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::{VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::queue::Queue;
use crate::rate_limit::LogLimit;

/// The guest's RAM, shared by all who access it.
pub type Memory = Arc<GuestMemoryMmap<()>>;

/// The feature bits that the transport offers for every device (virtio 1.2 §6): VERSION_1,
/// EVENT_IDX, INDIRECT_DESC and RING_RESET.
pub const TRANSPORT_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_F_RING_RESET;

/// What a driver does wrong is logged this often at the most.
const COMPLAIN_EVERY: Duration = Duration::from_secs(5);

/// One queue as a device offers it.
#[derive(Clone, Debug)]
pub struct QueueSlot {
    /// The most entries the driver may choose: a power of two, 32768 at the most.
    pub max_size: u16,
    /// Becomes readable when the driver has made buffers available. It stays the same through
    /// resets, so that it can be registered with KVM and an event loop once. Whoever serves the
    /// queue may write to it as well, to wake itself.
    pub kick: Arc<EventFd>,
}

/// What a device gets when its driver is ready (DRIVER_OK).
#[derive(Debug)]
pub struct Activation {
    /// The guest's RAM.
    pub memory: Memory,
    /// The features that were negotiated, transport features included.
    pub features: u64,
    /// The queues that the driver set up, by ascending [`Queue::index`]; the driver may have left
    /// out any of those that the device offers.
    pub queues: Vec<Queue>,
    /// The way to the driver for what concerns no single queue.
    pub signals: Arc<Signals>,
}

/// Why a device could not start. The transport sets DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ActivateError {
    /// The driver left out a queue that the device cannot do without.
    #[error("the driver did not set up queue {index}")]
    MissingQueue {
        /// The queue's index.
        index: u16,
    },
    /// The host refused a thread, a descriptor or the like.
    #[error("the host cannot {call}")]
    Host {
        /// What was asked of it, as in "start a thread".
        call: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

/// A virtio device behind a transport.
///
/// The transport owns the device and calls it under its own lock, one call at a time, from vCPU
/// threads and from the machine's owner, the event loop's thread among them. What serves the
/// queues (a thread each, or a subscriber of the event loop) shares state with this side and
/// therefore locks; it calls the transport through [`Signals`] only, which waits for no device.
///
/// The order of calls: `activate` only on a device that is not active; `reset`, `pause` and
/// `resume` at any time; `reset_queue` and `enable_queue` only while active.
///
/// No guest value, in queues or in config writes, may panic, overflow or allocate without bound.
pub trait VirtioDevice: Send {
    /// The device ID of virtio 1.2 §5.
    fn device_id(&self) -> u32;

    /// The device-specific features on offer (bits 0 to 23 and 50 to 127 of virtio 1.2 §2.2, as
    /// far as they fit); the transport adds [`TRANSPORT_FEATURES`]. Constant for the device's life.
    fn features(&self) -> u64;

    /// Whether the device can work with `features`, a subset of what was offered that has
    /// VERSION_1. Refuse what lacks a feature that another one depends on.
    fn accepts_features(&self, features: u64) -> bool {
        let _ = features;
        true
    }

    /// The queues by index: their number, sizes and kicks. Constant for the device's life.
    fn queues(&self) -> &[QueueSlot];

    /// The configuration space as it is now; none by default. The driver reads zeroes past its end.
    /// The length is constant, 3840 bytes at the most.
    ///
    /// The transport asks after each write of the driver to the configuration space or to the
    /// status, and shows the driver what it got until the next one. What the device changes
    /// otherwise while it is active it tells by [`Signals::config_changed`].
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes what the driver writes to the configuration space at `offset`. Read-only fields and
    /// bytes past the end are left alone. Called from FEATURES_OK on. By default nothing is written.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Begins to serve `activation.queues`. Each queue is looked at once without a kick, since
    /// the driver may have filled it before.
    ///
    /// A paused device takes the queues and starts with `resume`.
    ///
    /// # Errors
    /// The device is not active then and has dropped the queues.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Returns to the state before `activate`: when it returns, no request is in flight, guest
    /// memory is no longer accessed, and the queues are dropped. Configuration that the driver
    /// wrote returns to its initial value. A pause lasts.
    ///
    /// May wait for the host's I/O, never for the event loop. Does nothing to a device that is
    /// not active.
    fn reset(&mut self);

    /// Does for one queue what `reset` does for all (virtio 1.2 §2.6.1). An index without an
    /// active queue is ignored.
    fn reset_queue(&mut self, index: u16);

    /// Serves `queue` again that `reset_queue` had stopped.
    ///
    /// # Errors
    /// The queue stays stopped and is dropped.
    fn enable_queue(&mut self, queue: Queue) -> Result<(), ActivateError>;

    /// When it returns, no request is in flight, and none starts before `resume`. Waits as `reset`
    /// does. Does nothing to a paused device.
    fn pause(&mut self);

    /// Goes on after `pause` and looks at every queue, since kicks may have come in between.
    fn resume(&mut self);
}

/// How a transport interrupts the driver.
pub trait SignalRoute: Send + Sync {
    /// The device put buffers into the used ring of queue `index`.
    fn queue_used(&self, index: u16);
    /// The device changed its configuration: at `offset` the driver finds `field` from now on.
    fn config_changed(&self, offset: usize, field: &[u8]);
    /// The device needs a reset.
    fn reset_needed(&self);
}

/// A device's way to its driver, whatever the transport. Any thread may call it, whatever locks of
/// the device it holds; no transport calls a device with a lock that is taken here.
pub struct Signals {
    route: Arc<dyn SignalRoute>,
    needs_reset: AtomicBool,
    complaints: LogLimit,
}

impl std::fmt::Debug for Signals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signals").field("needs_reset", &self.needs_reset).finish_non_exhaustive()
    }
}

impl Signals {
    /// Signals that go by `route`.
    pub fn new(route: Arc<dyn SignalRoute>) -> Self {
        let complaints = LogLimit::new(COMPLAIN_EVERY);
        Self { route, needs_reset: AtomicBool::new(false), complaints }
    }

    /// Whether to log now what the driver did wrong, which it may do all the time: if so, how many
    /// times that was not logged before.
    pub fn may_complain(&self) -> Option<u64> {
        self.complaints.pass(Instant::now())
    }

    /// Interrupts the driver for the used ring of queue `index`, without asking whether it wants
    /// to be: that is [`Queue::signal`]'s decision.
    pub fn queue_used(&self, index: u16) {
        self.route.queue_used(index);
    }

    /// Shows the driver a change of the configuration that it did not make itself, `field` at
    /// `offset`, and tells it (virtio 1.2 §2.5). [`VirtioDevice::config`] has the new value already;
    /// of one device, one call comes after the other, in the order of the changes.
    ///
    /// What lies in one aligned word of 4 bytes changes at once. A driver that reads a longer field
    /// word by word at just that time may find both values mixed, and reads again when it is told.
    pub fn config_changed(&self, offset: usize, field: &[u8]) {
        self.route.config_changed(offset, field);
    }

    /// Sets DEVICE_NEEDS_RESET and tells the driver (virtio 1.2 §2.1.2): the device has met
    /// something it cannot go on from.
    pub fn request_reset(&self) {
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            self.route.reset_needed();
        }
    }

    /// Whether [`Signals::request_reset`] was called since the last reset.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// The device was reset; for transports.
    pub fn clear_needs_reset(&self) {
        self.needs_reset.store(false, Ordering::Release);
    }
}
