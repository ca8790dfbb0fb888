//! What all transports share: the device's status, the negotiation of features and the set-up of
//! queues (virtio 1.2 §2.1, §2.2, §2.6, §3.1).
//!
//! Nothing here knows a register. What a driver asks at the wrong time, or may not ask at all, has
//! no effect.

use std::fmt;
use std::sync::Arc;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1,
};

use crate::virtio::device::{
    ActivateError, Activation, Memory, QueueSlot, Signals, TRANSPORT_FEATURES, VirtioDevice,
};
use crate::virtio::queue::{Queue, QueueError, QueueSetup};

/// The driver has seen the device.
pub const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
/// The driver knows how to drive it.
pub const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
/// The driver is set up.
pub const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
/// The features are agreed on.
pub const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
/// The device cannot go on.
pub const DEVICE_NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
/// The driver has given up.
pub const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;

/// What it takes to enter a step of the initialization.
#[derive(Clone, Copy, Debug)]
enum Entry {
    Free,
    /// The driver's features are acceptable.
    Features,
    /// The device starts. It is entered in any case; a device that cannot start needs a reset.
    Start,
}

/// The steps of §3.1.1 in their order: the bit, the bits that come before, the way in.
const STEPS: [(u8, u8, Entry); 4] = [
    (ACKNOWLEDGE, 0, Entry::Free),
    (DRIVER, ACKNOWLEDGE, Entry::Free),
    (FEATURES_OK, ACKNOWLEDGE | DRIVER, Entry::Features),
    (DRIVER_OK, ACKNOWLEDGE | DRIVER | FEATURES_OK, Entry::Start),
];

/// Why a device that the driver started does not run.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("queue {index}: {source}")]
    Queue { index: u16, source: QueueError },
    #[error(transparent)]
    Device(#[from] ActivateError),
}

/// A queue on the driver's side.
#[derive(Clone, Copy, Debug, Default)]
struct QueueState {
    setup: QueueSetup,
    ready: bool,
    /// The driver reset this queue alone and may set it up again although DRIVER_OK is set.
    was_reset: bool,
}

/// A device and what its driver has made of it.
pub struct Core {
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    signals: Arc<Signals>,
    /// Without DEVICE_NEEDS_RESET, which `signals` have.
    status: u8,
    driver_features: u64,
    /// The driver took features past the 64 that there are.
    overreached: bool,
    queues: Vec<QueueState>,
    /// The device was activated and not reset since.
    active: bool,
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core")
            .field("device_id", &self.device.device_id())
            .field("status", &self.status())
            .field("driver_features", &self.driver_features)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

impl Core {
    /// `device` as after a reset, with access to `memory`.
    pub fn new(device: Box<dyn VirtioDevice>, memory: Memory, signals: Arc<Signals>) -> Self {
        let queues = vec![QueueState::default(); device.queues().len()];
        Self {
            device,
            memory,
            signals,
            status: 0,
            driver_features: 0,
            overreached: false,
            queues,
            active: false,
        }
    }

    /// The device.
    pub fn device(&self) -> &dyn VirtioDevice {
        self.device.as_ref()
    }

    /// The device status field.
    pub fn status(&self) -> u8 {
        let needs_reset = if self.signals.needs_reset() { DEVICE_NEEDS_RESET } else { 0 };
        self.status | needs_reset
    }

    /// The driver writes the device status field.
    ///
    /// Zero resets the device and returns, with true, when that is done. Otherwise the driver keeps the bits
    /// that are set and adds some, each after those that come before it; what it adds out of order
    /// stays clear, as does FEATURES_OK when the features are not acceptable, and everything once
    /// FAILED or DEVICE_NEEDS_RESET is set.
    pub fn set_status(&mut self, value: u8) -> bool {
        if value == 0 {
            self.reset();
            return true;
        }
        if value & self.status != self.status {
            tracing::debug!(value, status = self.status, "a driver took back status bits");
            return false;
        }
        for (bit, before, entry) in STEPS {
            let wanted = value & bit != 0 && self.status & bit == 0;
            let stuck = self.status() & (FAILED | DEVICE_NEEDS_RESET) != 0;
            if !wanted || stuck || self.status & before != before {
                continue;
            }
            match entry {
                Entry::Free => self.status |= bit,
                Entry::Features if self.features_are_acceptable() => self.status |= bit,
                Entry::Features => {
                    tracing::debug!(features = self.driver_features, "features are refused");
                }
                Entry::Start => {
                    self.status |= bit;
                    self.start();
                }
            }
        }
        self.status |= value & FAILED;
        false
    }

    /// The features on offer.
    pub fn device_features(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    /// The driver takes, of the features from `32 * word` on, those in `bits`. Once FEATURES_OK is
    /// set this has no effect.
    pub fn set_driver_features(&mut self, word: u32, bits: u32) {
        if self.status & FEATURES_OK != 0 {
            return;
        }
        let low_word = u64::from(u32::MAX);
        let bits = u64::from(bits);
        match word {
            0 => self.driver_features = self.driver_features & !low_word | bits,
            1 => self.driver_features = self.driver_features & low_word | bits << u32::BITS,
            _ => self.overreached |= bits != 0,
        }
    }

    /// The most entries that queue `index` may have; 0 if there is no such queue.
    pub fn queue_max_size(&self, index: u32) -> u16 {
        self.slot(index).map_or(0, |slot| slot.max_size)
    }

    /// Whether queue `index` is in use or will be with DRIVER_OK.
    pub fn queue_is_ready(&self, index: u32) -> bool {
        self.state(index).is_some_and(|queue| queue.ready)
    }

    /// How the driver set up queue `index` so far.
    pub fn queue_setup(&self, index: u32) -> QueueSetup {
        self.state(index).map(|queue| queue.setup).unwrap_or_default()
    }

    /// Lets the driver `change` how queue `index` is set up: from FEATURES_OK to DRIVER_OK, or
    /// after it reset the queue, and while the queue is not ready. Values are taken as they are
    /// and checked by [`Core::set_queue_ready`].
    pub fn change_queue(&mut self, index: u32, change: impl FnOnce(&mut QueueSetup)) {
        let status = self.status;
        if let Some(queue) = self.state_mut(index)
            && queue.is_open(status)
        {
            change(&mut queue.setup);
        }
    }

    /// The driver declares queue `index` set up, or takes that back: a queue that is in use is then
    /// left alone until the device is reset (§4.2.2, QueueReady). A queue that cannot be used as it
    /// is set up does not become ready.
    pub fn set_queue_ready(&mut self, index: u32, ready: bool) {
        let status = self.status;
        let Some(queue) = self.state_mut(index) else { return };
        if !ready {
            if std::mem::take(&mut queue.ready)
                && self.active
                && let Ok(number) = u16::try_from(index)
            {
                self.device.reset_queue(number);
            }
            return;
        }
        if !queue.is_open(status) {
            return;
        }
        let setup = queue.setup;
        if let Err(error) = setup.check(self.queue_max_size(index), &self.memory) {
            if let Some(others) = self.signals.may_complain() {
                tracing::warn!(index, %error, others, "a virtio driver set up a queue that cannot be used");
            }
            return;
        }
        if let Some(queue) = self.state_mut(index) {
            queue.ready = true;
            queue.was_reset = false;
        }
        if self.active
            && let Err(error) = self.restart_queue(index)
        {
            self.give_up(&error);
        }
    }

    /// The driver resets queue `index` alone (§2.6.1): when this returns, the queue is as after a
    /// reset of the device. Without VIRTIO_F_RING_RESET, on a device that does not run, or on a queue
    /// that is not ready, this has no effect.
    pub fn reset_queue(&mut self, index: u32) {
        let may = self.driver_features >> VIRTIO_F_RING_RESET & 1 != 0;
        if !may || !self.active || !self.queue_is_ready(index) {
            return;
        }
        if let Ok(number) = u16::try_from(index) {
            self.device.reset_queue(number);
        }
        if let Some(queue) = self.state_mut(index) {
            *queue = QueueState { was_reset: true, ..QueueState::default() };
        }
    }

    /// The driver made buffers available in queue `index`.
    pub fn notify(&self, index: u32) {
        if self.status & DRIVER_OK != 0
            && let Some(slot) = self.slot(index)
        {
            // It fails when the counter is full, and then the device is awake anyway.
            let _ = slot.kick.write(1);
        }
    }

    /// The driver writes the device's configuration space; without effect before FEATURES_OK.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        if self.status & FEATURES_OK != 0 {
            self.device.write_config(offset, data);
        }
    }

    /// See [`VirtioDevice::pause`].
    pub fn pause(&mut self) {
        self.device.pause();
    }

    /// See [`VirtioDevice::resume`].
    pub fn resume(&mut self) {
        self.device.resume();
    }

    fn features_are_acceptable(&self) -> bool {
        let features = self.driver_features;
        features & !self.device_features() == 0
            && !self.overreached
            && features >> VIRTIO_F_VERSION_1 & 1 != 0
            && self.device.accepts_features(features)
    }

    fn reset(&mut self) {
        self.device.reset();
        self.active = false;
        self.status = 0;
        self.driver_features = 0;
        self.overreached = false;
        self.queues.fill(QueueState::default());
        self.signals.clear_needs_reset();
    }

    fn start(&mut self) {
        match self.try_start() {
            Ok(()) => self.active = true,
            Err(error) => self.give_up(&error),
        }
    }

    fn try_start(&mut self) -> Result<(), StartError> {
        let ready = (0u16..).zip(&self.queues).filter(|(_, queue)| queue.ready);
        let queues = ready.map(|(index, queue)| self.make_queue(index, queue.setup));
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.driver_features,
            queues: queues.collect::<Result<_, _>>()?,
            signals: self.signals.clone(),
        };
        Ok(self.device.activate(activation)?)
    }

    fn restart_queue(&mut self, index: u32) -> Result<(), StartError> {
        let Ok(number) = u16::try_from(index) else { return Ok(()) };
        let queue = self.make_queue(number, self.queue_setup(index))?;
        Ok(self.device.enable_queue(queue)?)
    }

    fn make_queue(&self, index: u16, setup: QueueSetup) -> Result<Queue, StartError> {
        let missing = StartError::Device(ActivateError::MissingQueue { index });
        let slot = self.slot(index.into()).ok_or(missing)?;
        let (memory, signals) = (self.memory.clone(), self.signals.clone());
        Queue::new(index, slot, setup, self.driver_features, memory, signals)
            .map_err(|source| StartError::Queue { index, source })
    }

    fn give_up(&self, error: &StartError) {
        if let Some(others) = self.signals.may_complain() {
            let device_id = self.device.device_id();
            tracing::warn!(device_id, %error, others, "a virtio device fails");
        }
        self.signals.request_reset();
    }

    fn slot(&self, index: u32) -> Option<&QueueSlot> {
        self.device.queues().get(usize::try_from(index).ok()?)
    }

    fn state(&self, index: u32) -> Option<&QueueState> {
        self.queues.get(usize::try_from(index).ok()?)
    }

    fn state_mut(&mut self, index: u32) -> Option<&mut QueueState> {
        self.queues.get_mut(usize::try_from(index).ok()?)
    }
}

impl QueueState {
    /// Whether the driver may set it up, the device status being `status`.
    fn is_open(&self, status: u8) -> bool {
        let set_up_time = status & FEATURES_OK != 0 && status & DRIVER_OK == 0;
        (set_up_time || self.was_reset) && !self.ready
    }
}
