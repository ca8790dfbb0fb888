//! A device that leaves its queues to the test.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::virtio::device::{ActivateError, Activation, QueueSlot, Signals, VirtioDevice};
use crate::virtio::queue::Queue;

/// What a [`HeldDevice`] shares with its test.
#[derive(Debug, Default)]
pub struct Held {
    /// The queues, while the device is active.
    pub queues: Vec<Queue>,
    /// What was negotiated at the last activation.
    pub features: u64,
    /// The way to the driver, from the first activation on.
    pub signals: Option<Arc<Signals>>,
    /// The configuration space.
    pub config: [u8; 12],
    /// What was called, in order.
    pub calls: Vec<&'static str>,
    /// The device cannot be activated.
    pub is_out_of_order: bool,
    /// Features that the device offers and does not go along with.
    pub unloved_features: u64,
}

/// A device with two queues and a configuration space, which does nothing by itself.
#[derive(Debug)]
pub struct HeldDevice {
    slots: Vec<QueueSlot>,
    held: Arc<Mutex<Held>>,
}

impl HeldDevice {
    /// The largest queues it offers.
    pub const MAX_SIZE: u16 = 16;
    /// The features it offers.
    pub const FEATURES: u64 = 0b111;

    /// A device, and the test's hold on it.
    pub fn new() -> (Self, Arc<Mutex<Held>>) {
        let held = Arc::new(Mutex::new(Held::default()));
        let kick = || Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let slot = |_| QueueSlot { max_size: Self::MAX_SIZE, kick: kick() };
        (Self { slots: (0..2).map(slot).collect(), held: held.clone() }, held)
    }

    fn held(&self, call: &'static str) -> MutexGuard<'_, Held> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.calls.push(call);
        held
    }

    fn peek(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for HeldDevice {
    fn device_id(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        Self::FEATURES
    }

    fn accepts_features(&self, features: u64) -> bool {
        features & self.peek().unloved_features == 0
    }

    fn queues(&self) -> &[QueueSlot] {
        &self.slots
    }

    fn config(&self) -> Vec<u8> {
        self.peek().config.to_vec()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut held = self.held("write_config");
        for (address, byte) in (offset..).zip(data) {
            if let Some(known) =
                usize::try_from(address).ok().and_then(|at| held.config.get_mut(at))
            {
                *known = *byte;
            }
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut held = self.held("activate");
        if held.is_out_of_order {
            return Err(ActivateError::MissingQueue { index: 7 });
        }
        held.queues = activation.queues;
        held.features = activation.features;
        held.signals = Some(activation.signals);
        Ok(())
    }

    fn reset(&mut self) {
        self.held("reset").queues.clear();
    }

    fn reset_queue(&mut self, index: u16) {
        self.held("reset_queue").queues.retain(|queue| queue.index() != index);
    }

    fn enable_queue(&mut self, queue: Queue) -> Result<(), ActivateError> {
        self.held("enable_queue").queues.push(queue);
        Ok(())
    }

    fn pause(&mut self) {
        drop(self.held("pause"));
    }

    fn resume(&mut self) {
        drop(self.held("resume"));
    }
}
