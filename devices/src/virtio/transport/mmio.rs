//! Virtio over MMIO, version 2 (virtio 1.2 §4.2).
//!
//! The driver reads from memory ([`RegisterPage`]); writes come here and change that memory. A
//! device's own threads change it too, see `route`.

mod page;
mod route;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_DEVICE_FEATURES, VIRTIO_MMIO_DEVICE_FEATURES_SEL,
    VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL,
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
    VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW,
    VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX,
    VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH,
    VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use vmm_sys_util::eventfd::EventFd;

pub use page::{RegisterPage, RegisterPages};

use super::core::Core;
use crate::bus::BusDevice;
use crate::interrupt::Interrupt;
use crate::virtio::device::{Memory, Signals, VirtioDevice};
use crate::virtio::queue::QueueSetup;
use route::MmioRoute;

/// The size of a device's range on the MMIO bus, bytes.
pub const MMIO_BYTES: u64 = 0x1000;
/// Where QueueNotify lies in the range.
pub const QUEUE_NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// "virt" (§4.2.2, MagicValue).
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// The version of the register layout.
const VERSION: u32 = 2;
/// This implementation (§4.2.2, VendorID).
const VENDOR: u32 = u32::from_le_bytes(*b"ALCV");
/// What the virtio-bindings crate lacks: QueueReset (§4.2.2).
const VIRTIO_MMIO_QUEUE_RESET: u32 = 0xc0;

/// A write that KVM may turn into one to an eventfd (KVM_IOEVENTFD), without a way through this
/// process.
#[derive(Clone, Debug)]
pub struct Notifier {
    /// Where the driver writes, an offset into the device's range; 4 bytes wide.
    pub offset: u64,
    /// What it writes there.
    pub datamatch: u32,
    /// What becomes readable then.
    pub event: Arc<EventFd>,
}

/// The registers of one virtio device on the MMIO bus, [`MMIO_BYTES`] long.
///
/// Reads take every width and place and have no effect. What no register decodes reads as all
/// ones, as do registers that are only written. Control registers are written by aligned words of
/// 32 bits and take nothing else; the configuration space takes every width.
pub struct MmioTransport {
    /// Held while the device is called, during a reset also while it waits for the host's I/O.
    /// Devices never take it.
    registers: Mutex<Registers>,
    route: Arc<MmioRoute>,
    notifiers: Vec<Notifier>,
}

impl fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmioTransport").field("registers", &self.registers).finish_non_exhaustive()
    }
}

impl MmioTransport {
    /// `device` with access to `memory`; `line` interrupts the guest. All that the driver may read
    /// is in `page` at any time, so that the page itself may be the answer to its reads; it must
    /// not be able to write there.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        line: Arc<dyn Interrupt>,
        page: RegisterPage,
    ) -> Arc<Self> {
        let kicks = device.queues().iter().map(|slot| slot.kick.clone());
        let notifier =
            |(datamatch, event)| Notifier { offset: QUEUE_NOTIFY_OFFSET, datamatch, event };
        let notifiers = (0..).zip(kicks).map(notifier).collect();
        page.fill();
        let route = Arc::new(MmioRoute::new(page, line));
        let signals = Arc::new(Signals::new(route.clone()));
        let registers = Registers::new(Core::new(device, memory, signals));
        registers.show(route.page());
        route.show_config(registers.core.device());
        Arc::new(Self { registers: Mutex::new(registers), route, notifiers })
    }

    /// One for each queue. They stay the same for the device's life; writes that KVM does not take
    /// itself work as well, only slower.
    pub fn notifiers(&self) -> &[Notifier] {
        &self.notifiers
    }

    /// Stops the device's I/O; returns when none is in flight. Also when the driver starts the
    /// device meanwhile, it does nothing before [`MmioTransport::resume`].
    pub fn pause(&self) {
        self.registers().core.pause();
    }

    /// Goes on after [`MmioTransport::pause`].
    pub fn resume(&self) {
        self.registers().core.resume();
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_register(&self, register: u32, value: u32) {
        match register {
            // Written on every interrupt: without the lock.
            VIRTIO_MMIO_INTERRUPT_ACK => self.route.acknowledge(value),
            VIRTIO_MMIO_QUEUE_NOTIFY => self.registers().core.notify(value),
            // The field has 8 bits.
            VIRTIO_MMIO_STATUS => self.write_status(value as u8),
            register => {
                let mut registers = self.registers();
                registers.write(register, value);
                registers.show(self.route.page());
            }
        }
    }

    fn write_status(&self, value: u8) {
        let mut registers = self.registers();
        if registers.core.set_status(value) {
            registers.clear_selectors();
            self.route.reset();
        }
        registers.show(self.route.page());
        self.route.show_config(registers.core.device());
        self.route.show_status(registers.core.status());
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.route.page().read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            let mut registers = self.registers();
            registers.core.write_config(offset, data);
            self.route.show_config(registers.core.device());
            return;
        }
        if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.write_register(register(offset), u32::from_le_bytes(data));
        }
    }
}

/// The register at `offset`, as the constants have it. Those that are not aligned match none.
fn register(offset: u64) -> u32 {
    u32::try_from(offset).unwrap_or(u32::MAX)
}

/// The device and the registers that select what others show.
#[derive(Debug)]
struct Registers {
    core: Core,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
}

impl Registers {
    fn new(core: Core) -> Self {
        Self { core, device_features_sel: 0, driver_features_sel: 0, queue_sel: 0 }
    }

    fn clear_selectors(&mut self) {
        (self.device_features_sel, self.driver_features_sel, self.queue_sel) = (0, 0, 0);
    }

    /// Shows in `page` what depends on the device and on what the driver wrote, but for the status.
    #[inline(never)]
    fn show(&self, page: &RegisterPage) {
        let [low, high] = halves(self.core.device_features());
        let features = match self.device_features_sel {
            0 => low,
            1 => high,
            _ => 0,
        };
        for (register, value) in [
            (VIRTIO_MMIO_MAGIC_VALUE, MAGIC),
            (VIRTIO_MMIO_VERSION, VERSION),
            (VIRTIO_MMIO_DEVICE_ID, self.core.device().device_id()),
            (VIRTIO_MMIO_VENDOR_ID, VENDOR),
            (VIRTIO_MMIO_DEVICE_FEATURES, features),
            (VIRTIO_MMIO_QUEUE_NUM_MAX, self.core.queue_max_size(self.queue_sel).into()),
            (VIRTIO_MMIO_QUEUE_READY, self.core.queue_is_ready(self.queue_sel).into()),
            // A reset is over when the write returns.
            (VIRTIO_MMIO_QUEUE_RESET, 0),
        ] {
            page.set(register, value);
        }
    }

    fn write(&mut self, register: u32, value: u32) {
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => {
                self.core.set_driver_features(self.driver_features_sel, value);
            }
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            VIRTIO_MMIO_QUEUE_READY => self.core.set_queue_ready(self.queue_sel, value & 1 != 0),
            VIRTIO_MMIO_QUEUE_RESET if value & 1 != 0 => self.core.reset_queue(self.queue_sel),
            register => {
                self.core.change_queue(self.queue_sel, |setup| set_up(setup, register, value));
            }
        }
    }
}

/// Writes a register that says how a queue is set up.
fn set_up(setup: &mut QueueSetup, register: u32, value: u32) {
    match register {
        // A size that does not fit is as invalid as zero.
        VIRTIO_MMIO_QUEUE_NUM => setup.size = u16::try_from(value).unwrap_or(0),
        VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut setup.desc_table, value),
        VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut setup.desc_table, value),
        VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut setup.avail_ring, value),
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut setup.avail_ring, value),
        VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut setup.used_ring, value),
        VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut setup.used_ring, value),
        _ => {}
    }
}

/// The low and the high half of `value`.
fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> u32::BITS) as u32]
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address >> u32::BITS << u32::BITS | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = u64::from(value) << u32::BITS | *address & u64::from(u32::MAX);
}
