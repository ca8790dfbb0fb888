//! What changes in a device's registers without a write of the driver's: causes of interrupts, the
//! configuration, the need of a reset.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_INT_CONFIG,
    VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_STATUS,
};

use super::page::RegisterPage;
use crate::interrupt::Interrupt;
use crate::virtio::device::{SignalRoute, VirtioDevice};
use crate::virtio::transport::core::DEVICE_NEEDS_RESET;

/// A device's interrupt line and the registers that its own threads change.
pub(super) struct MmioRoute {
    page: RegisterPage,
    line: Arc<dyn Interrupt>,
    /// Held by who writes the configuration space and its generation in `page`; a leaf lock.
    config_writer: Mutex<()>,
    /// A failure was logged.
    has_failed: AtomicBool,
}

impl MmioRoute {
    pub fn new(page: RegisterPage, line: Arc<dyn Interrupt>) -> Self {
        page.set(VIRTIO_MMIO_INTERRUPT_STATUS, 0);
        page.set(VIRTIO_MMIO_STATUS, 0);
        page.set(VIRTIO_MMIO_CONFIG_GENERATION, 0);
        Self { page, line, config_writer: Mutex::new(()), has_failed: AtomicBool::new(false) }
    }

    pub fn page(&self) -> &RegisterPage {
        &self.page
    }

    /// Sets `cause` in InterruptStatus and, if it was clear, signals an edge. While it is set, the
    /// driver has an interrupt that it has not acknowledged; what `cause` stands for now it sees
    /// when it looks after the acknowledgement, as it has to with a line that has a level.
    fn raise(&self, cause: u32) {
        let before = self.update(VIRTIO_MMIO_INTERRUPT_STATUS, |causes| causes | cause);
        if before & cause != 0 {
            return;
        }
        if let Err(error) = self.line.trigger()
            && !self.has_failed.swap(true, Ordering::Relaxed)
        {
            tracing::error!(%error, "the host does not deliver a device's interrupt");
        }
    }

    /// The driver acknowledges `causes`.
    pub fn acknowledge(&self, causes: u32) {
        self.update(VIRTIO_MMIO_INTERRUPT_STATUS, |status| status & !causes);
    }

    /// The device status is `status`, but for the need of a reset, which lasts.
    pub fn show_status(&self, status: u8) {
        let needs_reset = u32::from(DEVICE_NEEDS_RESET);
        self.update(VIRTIO_MMIO_STATUS, |old| old & needs_reset | u32::from(status));
    }

    /// The device was reset: there is no cause of an interrupt and no need of another reset.
    pub fn reset(&self) {
        self.page.set(VIRTIO_MMIO_INTERRUPT_STATUS, 0);
        self.page.set(VIRTIO_MMIO_STATUS, 0);
    }

    /// Shows the configuration space of `device`. The device may change it meanwhile and say so to
    /// [`SignalRoute::config_changed`]; what it says last is shown.
    #[inline(never)]
    pub fn show_config(&self, device: &dyn VirtioDevice) {
        loop {
            let generation = self.generation();
            let config = device.config();
            let _writer = self.config_writer();
            if self.generation() == generation {
                let mut shown = vec![0; config.len()];
                self.page.read(VIRTIO_MMIO_CONFIG.into(), &mut shown);
                if shown != config {
                    self.write_config(0, &config);
                }
                return;
            }
        }
    }

    /// Writes to the configuration space. The generation changes before and after: readings from
    /// before cannot be mixed with those from after it.
    fn write_config(&self, offset: usize, bytes: &[u8]) {
        self.next_generation();
        self.page.write((VIRTIO_MMIO_CONFIG as usize).saturating_add(offset), bytes);
        self.next_generation();
    }

    fn next_generation(&self) {
        self.update(VIRTIO_MMIO_CONFIG_GENERATION, |generation| generation.wrapping_add(1));
    }

    fn generation(&self) -> u32 {
        let word = self.word(VIRTIO_MMIO_CONFIG_GENERATION);
        word.map_or(0, |word| u32::from_le(word.load(Ordering::Acquire)))
    }

    fn config_writer(&self) -> MutexGuard<'_, ()> {
        self.config_writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn word(&self, register: u32) -> Option<&AtomicU32> {
        self.page.word(register as usize)
    }

    /// Changes a register and returns what it was.
    #[inline]
    fn update(&self, register: u32, change: impl Fn(u32) -> u32) -> u32 {
        let Some(word) = self.word(register) else { return 0 };
        let change = |old| Some(change(u32::from_le(old)).to_le());
        // There is a new value always.
        let before = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, change);
        u32::from_le(before.unwrap_or_default())
    }
}

impl SignalRoute for MmioRoute {
    fn queue_used(&self, _index: u16) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    fn config_changed(&self, offset: usize, field: &[u8]) {
        let writer = self.config_writer();
        self.write_config(offset, field);
        drop(writer);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    fn reset_needed(&self) {
        self.update(VIRTIO_MMIO_STATUS, |status| status | u32::from(DEVICE_NEEDS_RESET));
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }
}
