//! Fuzz targets of the virtio devices, see [`crate::fuzzing`].

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{Bytes, GuestAddress};

use super::blk::{DiskConfig, VirtioBlk};
use super::chain::{Chain, ChainRules};
use super::device::VirtioDevice;
use super::net::{NetConfig, OpenNetwork, VirtioNet};
use super::ram::Ram;
use super::rng::{RngConfig, VirtioRng};
use super::testing::{
    Desc, DriverQueue, FakeDriver, HIGH_RAM, HOLE, HeldDevice, LOW_RAM_BYTES, memory,
};
use super::transport::core::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK};
use crate::backend::disk::{Engine, RawDisk};
use crate::backend::net::{Mac, Network, Offloads, Stream};
use crate::bus::BusDevice;
use crate::fuzzing::Input;
use crate::testing::Subscriber;
use crate::thread_start::nothing_first;

const DISK_BYTES: u64 = 64 << 10;
/// How long a device is given to do what it was asked.
const PATIENCE: Duration = Duration::from_millis(20);
/// A reset that takes longer hangs.
const RESET_PATIENCE: Duration = Duration::from_secs(5);

/// A disk in memory, through its queues.
pub fn blk(data: &[u8]) {
    let mut input = Input(data);
    let kind = input.u8();
    let image = memfd_create("disk", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&image, DISK_BYTES).unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&image);
    let config = DiskConfig {
        engine: Some(if kind & 1 == 0 { Engine::Sync } else { Engine::IoUring }),
        queues: 1 + u16::from(kind >> 1 & 1),
        queue_size: 16,
        discard: kind & 4 == 0,
        sync: kind & 8 == 0,
        readonly: kind & 16 != 0,
        ..DiskConfig::new(format!("/proc/self/fd/{number}"))
    };
    let disk = match RawDisk::open(&config.options()) {
        Ok(disk) => disk,
        // A host may have no io_uring.
        Err(error) => return assert_eq!(kind & 1, 1, "{error}"),
    };
    let device = VirtioBlk::new("fuzz", &config, &disk).unwrap();
    Drive::new(Box::new(device), Vec::new(), None).run(input);
    let length = rustix::fs::fstat(&image).map(|stat| stat.st_size);
    assert_eq!(length, Ok(DISK_BYTES as i64), "the image has another size");
}

/// A network on a socket, through its queues; the other end takes part.
pub fn net(data: &[u8]) {
    let pair = || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        (ours, Box::new(Stream::new(theirs.into())))
    };
    let ((ours, first), (_idle, second)) = (pair(), pair());
    let offloads = Offloads { checksum: true, tso4: true, tso6: true, ecn: true, uso: true };
    let network = Network { ports: vec![first, second], offloads, mtu: Some(1500) };
    let opened = OpenNetwork { mac: Mac::from_id("fuzz"), network, passt: None };
    let device = VirtioNet::new("fuzz", &NetConfig::user(), opened, &nothing_first()).unwrap();
    Drive::new(Box::new(device), Vec::new(), Some(ours)).run(Input(data));
}

/// The entropy device, through its queue.
pub fn rng(data: &[u8]) {
    let device = VirtioRng::new(&RngConfig::default()).unwrap();
    let subscribers = vec![device.subscriber() as Subscriber];
    Drive::new(Box::new(device), subscribers, None).run(Input(data));
}

/// A driver that does what the bytes say.
struct Drive {
    driver: FakeDriver,
    queues: Vec<DriverQueue>,
    events: EventManager<Subscriber>,
    peer: Option<UnixStream>,
}

impl Drive {
    fn new(
        device: Box<dyn VirtioDevice>,
        subscribers: Vec<Subscriber>,
        peer: Option<UnixStream>,
    ) -> Self {
        let mut events = EventManager::new().unwrap();
        for subscriber in subscribers {
            events.add_subscriber(subscriber);
        }
        Self { driver: FakeDriver::new(device, Vec::new()), queues: Vec::new(), events, peer }
    }

    fn run(mut self, mut input: Input<'_>) {
        self.bring_up(&mut input);
        while let Some(step) = input.next() {
            self.step(step, &mut input);
            // What is not used by the loop is served by threads of its own.
            let _ = self.events.run_with_timeout(0);
        }
        let begun = Instant::now();
        self.driver.reset();
        assert!(begun.elapsed() < RESET_PATIENCE, "a reset takes {:?}", begun.elapsed());
        assert_eq!(self.driver.status(), 0);
        // It serves a driver that behaves.
        self.bring_up(&mut Input(&[]));
        let running = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
        assert_eq!(self.driver.status(), running);
    }

    /// Resets the device and goes up to DRIVER_OK.
    fn bring_up(&mut self, input: &mut Input<'_>) {
        const VERSION_1: u64 = 1 << 32;
        self.driver.reset();
        let features = self.driver.offered() & !input.u64() | VERSION_1;
        self.queues.clear();
        if !self.driver.negotiate(features) {
            return;
        }
        let sizes = input.u16();
        for index in 0..8 {
            let size = self.driver.max_size(index).min(4 << (sizes >> (2 * index) & 3));
            if size > 0 {
                let queue = self.driver.set_up_queue(index, size);
                self.queues.push(queue);
            }
        }
        self.driver.add_status(DRIVER_OK);
    }

    fn queue(&self, choice: u8) -> Option<DriverQueue> {
        let index = usize::from(choice).checked_rem(self.queues.len())?;
        self.queues.get(index).copied()
    }

    fn step(&mut self, step: u8, input: &mut Input<'_>) {
        match step & 15 {
            0..=3 => self.chain(input),
            4 => {
                let Some(queue) = self.queue(input.u8()) else { return };
                let desc = descriptor(input);
                self.driver.describe(&queue, u16::from(input.u8()) % queue.setup.size, desc);
            }
            5 => {
                let Some(mut queue) = self.queue(input.u8()) else { return };
                self.driver.offer(&mut queue, input.u16());
                self.keep(queue);
                self.kick(queue);
            }
            6 => {
                let address = GuestAddress(u64::from(input.u16()));
                let _ = self.driver.memory.write(input.bytes(usize::from(step)), address);
            }
            7 => {
                let (register, value) = (u32::from(input.u16() & 0xffc), input.u32());
                self.driver.write(register, value);
            }
            8 => {
                let offset = u64::from(input.u16() & 0xfff);
                self.driver.transport.write(offset, input.bytes(usize::from(step >> 4 & 7) + 1));
            }
            9 => self.bring_up(input),
            10 => {
                let Some(queue) = self.queue(input.u8()) else { return };
                // QueueReset, and the queue once more.
                self.driver.write(0x30, queue.index.into());
                self.driver.write(0xc0, 1);
                let fresh = DriverQueue { next_avail: 0, next_used: 0, ..queue };
                let zero = [0; 4];
                for ring in [queue.setup.avail_ring, queue.setup.used_ring] {
                    let _ = self.driver.memory.write_slice(&zero, GuestAddress(ring));
                }
                self.driver.write_setup(queue.index, fresh.setup);
                self.keep(fresh);
            }
            11 => {
                self.driver.transport.pause();
                if let Some(queue) = self.queue(step >> 4) {
                    self.driver.kick(&queue);
                }
                self.driver.transport.resume();
            }
            12 => {
                if let Some(queue) = self.queue(input.u8()) {
                    self.driver.set_avail_flags(&queue, input.u16());
                    self.driver.set_used_event(&queue, input.u16());
                }
            }
            _ => self.at_the_other_end(input),
        }
    }

    /// Builds a chain, offers it, kicks and waits.
    fn chain(&mut self, input: &mut Input<'_>) {
        let Some(mut queue) = self.queue(input.u8()) else { return };
        let count = u16::from(input.u8() & 3) + 1;
        let head = u16::from(input.u8());
        let size = queue.setup.size;
        let place = |index: u16| head.wrapping_add(index) % size;
        for index in 0..count {
            let mut desc = descriptor(input);
            desc.flags ^= u16::from(index + 1 < count);
            desc.next ^= place(index + 1);
            self.driver.describe(&queue, place(index), desc);
        }
        let bytes = input.u8() & 31;
        let address = GuestAddress(BUFFERS);
        let _ = self.driver.memory.write(input.bytes(bytes.into()), address);
        self.driver.offer(&mut queue, place(0));
        self.keep(queue);
        self.kick(queue);
    }

    fn keep(&mut self, queue: DriverQueue) {
        if let Some(place) = self.queues.iter_mut().find(|known| known.index == queue.index) {
            *place = queue;
        }
    }

    /// Kicks and waits for what may come of it.
    fn kick(&mut self, queue: DriverQueue) {
        const NEEDS_RESET: u8 = 64;
        self.driver.kick(&queue);
        let end = Instant::now() + PATIENCE;
        let done = || {
            self.driver.used_index(&queue) == queue.next_avail
                || self.driver.status() & NEEDS_RESET != 0
        };
        while !done() && Instant::now() < end {
            let _ = self.events.run_with_timeout(0);
            thread::yield_now();
        }
    }

    fn at_the_other_end(&mut self, input: &mut Input<'_>) {
        let Some(peer) = &mut self.peer else { return };
        let mut buffer = [0; 4096];
        let _ = peer.read(&mut buffer);
        let count = input.u8();
        let bytes = input.bytes(count.into());
        if let [framed, bytes @ ..] = bytes {
            let length = (bytes.len() as u32).to_be_bytes();
            let _ = match framed & 1 {
                0 => peer.write_all(bytes),
                _ => peer.write_all(&[&length[..], bytes].concat()),
            };
        }
    }
}

/// Where most buffers lie, behind the rings.
const BUFFERS: u64 = LOW_RAM_BYTES / 2;

/// A descriptor that is small and in memory, mostly.
fn descriptor(input: &mut Input<'_>) -> Desc {
    let kind = input.u8();
    let addr = match kind & 7 {
        0 => input.u64(),
        1 => HOLE - u64::from(input.u8()),
        2 => LOW_RAM_BYTES - u64::from(input.u8()),
        3 => HIGH_RAM + u64::from(input.u16()),
        4 => u64::from(input.u16()),
        _ => BUFFERS + u64::from(input.u8()),
    };
    let len = match kind >> 3 & 7 {
        0 => input.u32(),
        1 => u32::from(input.u16()),
        2 => 512 * u32::from(input.u8()),
        3 => 16,
        4 => 1,
        _ => u32::from(input.u8()),
    };
    let flags = u16::from(kind >> 6 & 1) << 1;
    let (flags, next) = if kind & 128 != 0 { (input.u16(), input.u16()) } else { (flags, 0) };
    Desc { addr, len, flags, next }
}

/// The transport over a device that does nothing: what the driver reads is what the registers say.
pub fn mmio(data: &[u8]) {
    let (device, held) = HeldDevice::new();
    let mut driver = FakeDriver::new(Box::new(device), Vec::new());
    let mut input = Input(data);
    let kind = input.u8();
    {
        let mut held = held.lock().unwrap();
        held.is_out_of_order = kind & 1 != 0;
        held.unloved_features = u64::from(kind >> 1 & 7);
    }
    while let Some(step) = input.next() {
        let offset = u64::from(input.u16() & 0x1fff);
        match step & 7 {
            0..=2 => driver.write(offset as u32 & 0x1fc, input.u32()),
            3 => driver.transport.write(offset, input.bytes(usize::from(step >> 3 & 7) + 1)),
            4 => {
                let mut bytes = [0; 8];
                driver.transport.read(offset, &mut bytes[..usize::from(step >> 3 & 7) + 1]);
            }
            5 => drop(driver.add_status(step >> 3 | 1)),
            6 => {
                let index = u16::from(step >> 3 & 1);
                driver.write_setup(index, setup(&mut input));
            }
            _ => {
                let signals = held.lock().unwrap().signals.clone();
                if let Some(signals) = signals {
                    match step >> 3 & 3 {
                        0 => signals.request_reset(),
                        1 => signals.config_changed(0, &[1, 2, 3]),
                        _ => signals.queue_used(0),
                    }
                }
            }
        }
        let status = driver.status();
        let active = !held.lock().unwrap().queues.is_empty();
        assert!(!active || status & DRIVER_OK != 0, "queues without DRIVER_OK: {status:#x}");
        assert_eq!(driver.read(0), u32::from_le_bytes(*b"virt"));
    }
    driver.reset();
    assert_eq!(driver.status(), 0);
    assert!(held.lock().unwrap().queues.is_empty());
}

/// A queue's place, near or past the edges of memory at times.
fn setup(input: &mut Input<'_>) -> super::queue::QueueSetup {
    let mut address = || match input.u8() {
        0 => input.u64(),
        1 => HOLE - u64::from(input.u8()),
        high => u64::from(high) << 8,
    };
    let (desc_table, avail_ring, used_ring) = (address(), address(), address());
    let size = 1u16 << (input.u8() & 7);
    super::queue::QueueSetup { size, desc_table, avail_ring, used_ring }
}

/// A disk's request in a chain of any shape: what is told of it holds.
pub fn disk_request(data: &[u8]) {
    const ENTRIES: u16 = 8;
    const TABLE: u64 = 0x1000;
    let memory = memory();
    let mut input = Input(data);
    let flags = input.u8();
    for index in 0..u64::from(ENTRIES) {
        let desc = descriptor(&mut input);
        let _ = memory.write_slice(&desc.to_bytes(), GuestAddress(TABLE + 16 * index));
    }
    let _ = memory.write(input.bytes(256), GuestAddress(BUFFERS));
    let table = GuestAddress(TABLE);
    let rules = ChainRules { table, entries: ENTRIES, limit: ENTRIES, indirect: flags & 1 != 0 };
    let mut chain = Chain::new();
    if rules.parse(&Ram::new(&memory), u16::from(flags >> 1) % ENTRIES, &mut chain).is_ok() {
        let all = chain.readable_bytes() + chain.writable_bytes();
        assert!((1..=1 << 32).contains(&all), "{all} bytes");
        super::blk::check_request(&mut chain, flags & 16 != 0, flags & 32 != 0);
    }
}
