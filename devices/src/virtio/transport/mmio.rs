//! Virtio over MMIO, version 2 (virtio 1.2 §4.2).

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING,
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE,
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL,
    VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_STATUS,
    VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::core::Core;
use crate::bus::BusDevice;
use crate::interrupt::Interrupt;
use crate::virtio::device::{Memory, SignalRoute, Signals, VirtioDevice};
use crate::virtio::queue::QueueSetup;

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
/// What is not there reads as all ones, a length of shared memory among it (§4.2.2, SHMLenLow).
const NOTHING: u32 = u32::MAX;

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
/// Control registers are 32 bits wide and aligned; other accesses to them, and what no register
/// decodes, read as all ones and write nothing. The configuration space takes every width.
pub struct MmioTransport {
    /// Held while the device is called, during a reset also while it waits for the host's I/O.
    /// Devices never take it.
    registers: Mutex<Registers>,
    interrupt: Arc<MmioInterrupt>,
    notifiers: Vec<Notifier>,
}

impl fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmioTransport").field("registers", &self.registers).finish_non_exhaustive()
    }
}

impl MmioTransport {
    /// `device` with access to `memory`; `line` interrupts the guest.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        line: Arc<dyn Interrupt>,
    ) -> io::Result<Arc<Self>> {
        let interrupt = Arc::new(MmioInterrupt {
            status: AtomicU32::new(0),
            acknowledged: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
            line,
            has_failed: AtomicBool::new(false),
        });
        let notifier =
            |(datamatch, event)| Notifier { offset: QUEUE_NOTIFY_OFFSET, datamatch, event };
        let kicks = device.queues().iter().map(|slot| slot.kick.clone());
        let acknowledge = Notifier {
            offset: VIRTIO_MMIO_INTERRUPT_ACK.into(),
            datamatch: VIRTIO_MMIO_INT_VRING,
            event: interrupt.acknowledged.clone(),
        };
        let notifiers = (0..).zip(kicks).map(notifier).chain([acknowledge]).collect();
        let signals = Arc::new(Signals::new(interrupt.clone()));
        let registers = Registers::new(Core::new(device, memory, signals));
        Ok(Arc::new(Self { registers: Mutex::new(registers), interrupt, notifiers }))
    }

    /// One for each queue, and one for the acknowledgement of an interrupt. They stay the same for
    /// the device's life; writes that KVM does not take itself work as well, only slower.
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

    fn read_register(&self, register: u32) -> u32 {
        match register {
            // Read on every interrupt: without the lock.
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.read_status(),
            register => self.registers().read(register),
        }
    }

    fn write_register(&self, register: u32, value: u32) {
        if register == VIRTIO_MMIO_INTERRUPT_ACK {
            self.interrupt.acknowledge(value);
            return;
        }
        let mut registers = self.registers();
        if register != VIRTIO_MMIO_STATUS {
            registers.write(register, value);
        // The field has 8 bits.
        } else if registers.core.set_status(value as u8) {
            registers.clear_selectors();
            self.interrupt.reset();
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            self.registers().core.device().read_config(offset, data);
            return;
        }
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(data) => *data = self.read_register(register(offset)).to_le_bytes(),
            Err(_) => data.fill(u8::MAX),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            self.registers().core.write_config(offset, data);
            return;
        }
        if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.write_register(register(offset), u32::from_le_bytes(data));
        }
    }
}

/// The register at `offset`, as the constants have it. Those that are not aligned match none.
fn register(offset: u64) -> u32 {
    u32::try_from(offset).unwrap_or(NOTHING)
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

    fn read(&self, register: u32) -> u32 {
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.core.device().device_id(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => {
                let [low, high] = halves(self.core.device_features());
                match self.device_features_sel {
                    0 => low,
                    1 => high,
                    _ => 0,
                }
            }
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.core.queue_max_size(self.queue_sel).into(),
            VIRTIO_MMIO_QUEUE_READY => self.core.queue_is_ready(self.queue_sel).into(),
            VIRTIO_MMIO_STATUS => self.core.status().into(),
            // A reset is over when the write returns.
            VIRTIO_MMIO_QUEUE_RESET => 0,
            VIRTIO_MMIO_CONFIG_GENERATION => self.core.device().config_generation(),
            _ => NOTHING,
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
            VIRTIO_MMIO_QUEUE_NOTIFY => self.core.notify(value),
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

/// The interrupt line and the InterruptStatus register, without a lock.
struct MmioInterrupt {
    /// What was raised and not acknowledged, and [`UNSEEN`].
    status: AtomicU32,
    /// Where KVM counts the acknowledgements of used buffers that it took.
    acknowledged: Arc<EventFd>,
    line: Arc<dyn Interrupt>,
    /// A failure was logged.
    has_failed: AtomicBool,
}

/// Of [`MmioInterrupt::status`]: used buffers were told of since the driver last read it.
const UNSEEN: u32 = 1 << 31;

impl MmioInterrupt {
    /// Sets `cause` and signals an edge, also when the cause was set: the driver may be about to
    /// acknowledge it without having seen what it stands for now.
    fn raise(&self, cause: u32) {
        self.status.fetch_or(cause, Ordering::AcqRel);
        if let Err(error) = self.line.trigger()
            && !self.has_failed.swap(true, Ordering::Relaxed)
        {
            tracing::error!(%error, "the host does not deliver a device's interrupt");
        }
    }

    /// The register as the driver sees it. When KVM took an acknowledgement it is not known
    /// whether it came before or after the latest cause, so a cause that the driver has not seen
    /// stays.
    fn read_status(&self) -> u32 {
        let acknowledged = self.acknowledged.read().is_ok();
        let see = |status| match status & UNSEEN != 0 {
            true => status & !UNSEEN,
            false if acknowledged => status & !VIRTIO_MMIO_INT_VRING,
            false => status,
        };
        let before =
            self.status.fetch_update(Ordering::AcqRel, Ordering::Acquire, |s| Some(see(s)));
        before.map_or(0, see)
    }

    /// The driver acknowledges `causes` by the register itself. It can mean used buffers only if it
    /// has seen them.
    fn acknowledge(&self, causes: u32) {
        let acknowledged = |status| {
            let seen = if status & UNSEEN == 0 { VIRTIO_MMIO_INT_VRING } else { 0 };
            Some(status & !(causes & (VIRTIO_MMIO_INT_CONFIG | seen)))
        };
        // It always has an answer.
        let _ = self.status.fetch_update(Ordering::AcqRel, Ordering::Acquire, acknowledged);
    }

    /// As before the first cause.
    fn reset(&self) {
        self.status.store(0, Ordering::Release);
        // It fails when there is none to be forgotten.
        let _ = self.acknowledged.read();
    }
}

impl SignalRoute for MmioInterrupt {
    fn queue_used(&self, _index: u16) {
        self.raise(VIRTIO_MMIO_INT_VRING | UNSEEN);
    }

    fn config_changed(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }
}
