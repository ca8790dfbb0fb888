//! A virtio driver in plain memory, for tests: it sees a device as a guest does, through the MMIO
//! registers and the rings.

mod held;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_DEVICE_FEATURES, VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY,
    VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_STATUS,
};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub use held::{Held, HeldDevice};

use super::device::{Memory, VirtioDevice};
use super::queue::QueueSetup;
use super::transport::core::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK};
use super::transport::mmio::{MmioTransport, RegisterPages};
use crate::bus::BusDevice;
use crate::testing::{EventLoop, FakeInterrupt, Subscriber};

/// Another descriptor follows.
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// The buffer is for the device to write.
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// The first range of RAM; a second one adjoins it.
pub const LOW_RAM_BYTES: u64 = 1 << 18;
/// Where RAM ends and the hole begins.
pub const HOLE: u64 = 2 * LOW_RAM_BYTES;
/// Where the third range of RAM begins, [`LOW_RAM_BYTES`] long.
pub const HIGH_RAM: u64 = 1 << 32;
/// The first address that is handed out; what lies below is left alone.
const FIRST_FREE: u64 = 0x1000;
/// How long a device may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// RAM for tests, zeroed: two adjoining ranges, a hole, and one more range above 4 GiB.
pub fn memory() -> Memory {
    let len = LOW_RAM_BYTES as usize;
    let starts = [0, LOW_RAM_BYTES, HIGH_RAM];
    let ranges = starts.map(|start| (GuestAddress(start), len));
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

/// One queue on the driver's side.
#[derive(Clone, Copy, Debug)]
pub struct DriverQueue {
    /// Its number.
    pub index: u16,
    /// Where it lies.
    pub setup: QueueSetup,
    /// The available ring's index.
    pub next_avail: u16,
    /// How far the used ring was looked at.
    pub next_used: u16,
}

/// A descriptor as the driver writes it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Desc {
    /// Guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// VIRTQ_DESC_F_*.
    pub flags: u16,
    /// The descriptor that follows.
    pub next: u16,
}

impl Desc {
    /// The form in memory (virtio 1.2 §2.7.5).
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A driver and its device.
pub struct FakeDriver {
    /// The device's registers.
    pub transport: Arc<MmioTransport>,
    /// The interrupt line.
    pub line: Arc<FakeInterrupt>,
    /// RAM.
    pub memory: Memory,
    next_free: u64,
    _loops: Vec<EventLoop>,
}

impl FakeDriver {
    /// Plugs `device` in and serves `subscribers`, on a thread each.
    pub fn new(device: Box<dyn VirtioDevice>, subscribers: Vec<Subscriber>) -> Self {
        let memory = memory();
        let line = Arc::new(FakeInterrupt::default());
        let page = RegisterPages::new(1).unwrap().iter().next().unwrap();
        let transport = MmioTransport::new(device, memory.clone(), line.clone(), page);
        let loops = subscribers.into_iter().map(EventLoop::run).collect();
        Self { transport, line, memory, next_free: FIRST_FREE, _loops: loops }
    }

    /// Reads a control register.
    pub fn read(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a control register.
    pub fn write(&self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        self.read(VIRTIO_MMIO_STATUS) as u8
    }

    /// Adds `bits` to the device status and returns what it has become.
    pub fn add_status(&self, bits: u8) -> u8 {
        self.write(VIRTIO_MMIO_STATUS, (self.status() | bits).into());
        self.status()
    }

    /// Resets the device and forgets what memory was handed out.
    pub fn reset(&mut self) {
        self.write(VIRTIO_MMIO_STATUS, 0);
        self.next_free = FIRST_FREE;
    }

    /// The features on offer.
    pub fn offered(&self) -> u64 {
        let word = |sel| {
            self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, sel);
            u64::from(self.read(VIRTIO_MMIO_DEVICE_FEATURES))
        };
        word(0) | word(1) << u32::BITS
    }

    /// Takes `features`, without a word on the status.
    pub fn take_features(&self, features: u64) {
        for (sel, word) in [(0, features), (1, features >> u32::BITS)] {
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, sel);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, word as u32);
        }
    }

    /// Goes from reset up to FEATURES_OK; whether the device went along.
    pub fn negotiate(&self, features: u64) -> bool {
        self.add_status(ACKNOWLEDGE);
        self.add_status(DRIVER);
        self.take_features(features);
        self.add_status(FEATURES_OK) & FEATURES_OK != 0
    }

    /// The most entries of queue `index`.
    pub fn max_size(&self, index: u16) -> u16 {
        self.write(VIRTIO_MMIO_QUEUE_SEL, index.into());
        self.read(VIRTIO_MMIO_QUEUE_NUM_MAX) as u16
    }

    /// Memory for a queue of `size` entries, zeroed.
    pub fn place_queue(&mut self, size: u16) -> QueueSetup {
        let entries = u64::from(size);
        let mut place = |bytes| {
            let address = self.allocate(bytes);
            self.memory.write_slice(&vec![0; bytes as usize], GuestAddress(address)).unwrap();
            address
        };
        let desc_table = place(16 * entries);
        let avail_ring = place(2 * entries + 6);
        let used_ring = place(8 * entries + 6);
        QueueSetup { size, desc_table, avail_ring, used_ring }
    }

    /// Writes `setup` to the registers of queue `index`, and ready.
    pub fn write_setup(&self, index: u16, setup: QueueSetup) {
        self.write(VIRTIO_MMIO_QUEUE_SEL, index.into());
        self.write(VIRTIO_MMIO_QUEUE_NUM, setup.size.into());
        for (low, high, address) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, setup.desc_table),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, setup.avail_ring),
            (VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_QUEUE_USED_HIGH, setup.used_ring),
        ] {
            self.write(low, address as u32);
            self.write(high, (address >> u32::BITS) as u32);
        }
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    /// Whether queue `index` is ready.
    pub fn is_ready(&self, index: u16) -> bool {
        self.write(VIRTIO_MMIO_QUEUE_SEL, index.into());
        self.read(VIRTIO_MMIO_QUEUE_READY) == 1
    }

    /// Sets queue `index` up with `size` entries.
    pub fn set_up_queue(&mut self, index: u16, size: u16) -> DriverQueue {
        let setup = self.place_queue(size);
        self.write_setup(index, setup);
        DriverQueue { index, setup, next_avail: 0, next_used: 0 }
    }

    /// Goes from reset up to DRIVER_OK with `features` and all queues, each as large as it may be
    /// or `size` entries at the most.
    pub fn bring_up(&mut self, features: u64, size: u16) -> Vec<DriverQueue> {
        assert!(self.negotiate(features), "the device refuses {features:#x}");
        let sizes: Vec<u16> =
            (0..).map(|index| self.max_size(index)).take_while(|max| *max > 0).collect();
        let queues = (0..).zip(sizes).map(|(index, max)| self.set_up_queue(index, max.min(size)));
        let queues = queues.collect();
        assert_eq!(self.add_status(DRIVER_OK), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        queues
    }

    /// `bytes` of RAM that no one else uses, below the seam of the adjoining ranges.
    pub fn allocate(&mut self, bytes: u64) -> u64 {
        let address = self.next_free;
        self.next_free = (address + bytes).next_multiple_of(64);
        assert!(self.next_free <= LOW_RAM_BYTES, "the test takes too much memory");
        address
    }

    /// Writes entry `index` of the queue's descriptor table.
    pub fn describe(&self, queue: &DriverQueue, index: u16, desc: Desc) {
        let address = queue.setup.desc_table + 16 * u64::from(index);
        self.memory.write_slice(&desc.to_bytes(), GuestAddress(address)).unwrap();
    }

    /// Makes the chain at `head` available, without a kick.
    pub fn offer(&self, queue: &mut DriverQueue, head: u16) {
        let entry = queue.next_avail % queue.setup.size;
        let ring = queue.setup.avail_ring;
        self.write_u16(ring + 4 + 2 * u64::from(entry), head);
        queue.next_avail = queue.next_avail.wrapping_add(1);
        self.write_u16(ring + 2, queue.next_avail);
    }

    /// Writes the driver's flags: VIRTQ_AVAIL_F_NO_INTERRUPT or 0.
    pub fn set_avail_flags(&self, queue: &DriverQueue, flags: u16) {
        self.write_u16(queue.setup.avail_ring, flags);
    }

    /// Asks for an interrupt when the used ring moves past `event` (VIRTIO_F_EVENT_IDX).
    pub fn set_used_event(&self, queue: &DriverQueue, event: u16) {
        self.write_u16(queue.setup.avail_ring + 4 + 2 * u64::from(queue.setup.size), event);
    }

    /// Kicks the device as a guest does without KVM's help.
    pub fn kick(&self, queue: &DriverQueue) {
        self.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue.index.into());
    }

    /// What the device says in the used ring's flags: VIRTQ_USED_F_NO_NOTIFY or 0.
    pub fn used_flags(&self, queue: &DriverQueue) -> u16 {
        self.read_u16(queue.setup.used_ring)
    }

    /// When the device wants a kick (VIRTIO_F_EVENT_IDX).
    pub fn avail_event(&self, queue: &DriverQueue) -> u16 {
        self.read_u16(queue.setup.used_ring + 4 + 8 * u64::from(queue.setup.size))
    }

    /// The used ring's index.
    pub fn used_index(&self, queue: &DriverQueue) -> u16 {
        self.read_u16(queue.setup.used_ring + 2)
    }

    /// Waits until `count` more chains were used, and returns their heads and lengths.
    pub fn wait_used(&self, queue: &mut DriverQueue, count: u16) -> Vec<(u32, u32)> {
        let goal = queue.next_used.wrapping_add(count);
        wait_until("the device uses its buffers", || {
            self.used_index(queue).wrapping_sub(queue.next_used) >= count
        });
        let mut used = Vec::new();
        while queue.next_used != goal {
            let entry = queue.next_used % queue.setup.size;
            let address = queue.setup.used_ring + 4 + 8 * u64::from(entry);
            let word = |at| self.memory.read_obj::<u32>(GuestAddress(at)).unwrap();
            used.push((word(address), word(address + 4)));
            queue.next_used = queue.next_used.wrapping_add(1);
        }
        used
    }

    /// All of RAM.
    pub fn snapshot(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (start, len) in [(0, HOLE), (HIGH_RAM, LOW_RAM_BYTES)] {
            let at = bytes.len();
            bytes.resize(at + len as usize, 0);
            self.memory.read_slice(&mut bytes[at..], GuestAddress(start)).unwrap();
        }
        bytes
    }

    fn write_u16(&self, address: u64, value: u16) {
        self.memory
            .store(value.to_le(), GuestAddress(address), std::sync::atomic::Ordering::SeqCst)
            .unwrap();
    }

    fn read_u16(&self, address: u64) -> u16 {
        let order = std::sync::atomic::Ordering::SeqCst;
        u16::from_le(self.memory.load(GuestAddress(address), order).unwrap())
    }
}

/// Waits until `condition` holds.
///
/// # Panics
/// It takes too long.
pub fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        thread::sleep(Duration::from_micros(20));
    }
}
