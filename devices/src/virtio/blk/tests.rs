use std::fs;
use std::path::Path;
use std::sync::{Barrier, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::backend::disk::{Completion, DiskQueue, Engine, Request as DiskRequest};
use crate::bus::BusDevice;
use crate::virtio::conformance::{Request, Subject, VERSION_1};
use crate::virtio::testing::{Desc, DriverQueue, FakeDriver, WRITE};

mod behaviour;
mod life;

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;
const ENGINES: [Engine; 2] = [Engine::Sync, Engine::IoUring];
/// What a status byte is before the device writes it.
const UNTOUCHED: u8 = 0xee;
const SECTORS: u64 = 2048;

/// An image whose sector n is full of the byte n.
fn image() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..SECTORS * 512).map(|at| (at / 512) as u8).collect();
    fs::write(file.path(), bytes).unwrap();
    file
}

fn config(path: &Path, engine: Engine) -> DiskConfig {
    DiskConfig { engine: Some(engine), ..DiskConfig::new(path) }
}

/// A header as a driver writes it.
fn header(request_type: u32, sector: u64) -> Vec<u8> {
    let reserved = [0x5a; 4];
    [&request_type.to_le_bytes()[..], &reserved, &sector.to_le_bytes()].concat()
}

/// A range to discard or zero.
fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// A driver of a disk on an image.
struct Guest {
    driver: FakeDriver,
    queues: Vec<DriverQueue>,
    metrics: Metrics,
    file: NamedTempFile,
    /// Memory for requests.
    arena: u64,
    used: u64,
}

/// Bytes of memory for requests.
const ARENA_BYTES: u64 = 192 << 10;

/// A request's place in the guest's memory.
#[derive(Clone, Copy)]
struct Placed {
    data: u64,
    status: u64,
}

impl Guest {
    fn new(change: impl FnOnce(&mut DiskConfig)) -> Self {
        Self::with_features(u64::MAX, change)
    }

    /// With as many of `features` as the device offers.
    fn with_features(features: u64, change: impl FnOnce(&mut DiskConfig)) -> Self {
        let file = image();
        let mut config = DiskConfig::new(file.path());
        change(&mut config);
        let device = VirtioBlk::open("test", &config).unwrap();
        Self::of(device, features, file)
    }

    fn of(device: VirtioBlk, features: u64, file: NamedTempFile) -> Self {
        let metrics = device.metrics();
        let mut driver = FakeDriver::new(Box::new(device), Vec::new());
        let features = driver.offered() & (features | VERSION_1);
        let queues = driver.bring_up(features, 256);
        let arena = driver.allocate(ARENA_BYTES);
        Self { driver, queues, metrics, file, arena, used: 0 }
    }

    /// Memory for a request.
    fn allocate(&mut self, bytes: u64) -> u64 {
        let address = self.arena + self.used;
        self.used = (self.used + bytes).next_multiple_of(64);
        assert!(self.used <= ARENA_BYTES, "the test takes too much memory");
        address
    }

    /// Takes back the memory of all requests.
    fn forget(&mut self) {
        self.used = 0;
    }

    /// Puts a request into queue `index` from descriptor `first` on, without a kick.
    fn put(&mut self, index: usize, first: u16, readable: &[u8], writable: u32) -> Placed {
        let input = self.allocate(readable.len() as u64);
        self.driver.memory.write_slice(readable, GuestAddress(input)).unwrap();
        let data = self.allocate(u64::from(writable) + 1);
        let status = data + u64::from(writable);
        self.driver.memory.write_obj(UNTOUCHED, GuestAddress(status)).unwrap();
        let mut descs = vec![Desc { addr: input, len: readable.len() as u32, flags: 0, next: 0 }];
        if readable.len() > 16 {
            descs[0].len = 16;
            let len = readable.len() as u32 - 16;
            descs.push(Desc { addr: input + 16, len, flags: 0, next: 0 });
        }
        if writable > 0 {
            descs.push(Desc { addr: data, len: writable, flags: WRITE, next: 0 });
        }
        descs.push(Desc { addr: status, len: 1, flags: WRITE, next: 0 });
        let mut queue = self.queues[index];
        for (at, desc) in (first..).zip(crate::virtio::conformance::linked(first, &descs)) {
            self.driver.describe(&queue, at, desc);
        }
        self.driver.offer(&mut queue, first);
        self.queues[index] = queue;
        Placed { data, status }
    }

    fn kick(&self, index: usize) {
        self.driver.kick(&self.queues[index]);
    }

    fn wait(&mut self, index: usize, count: u16) -> Vec<(u32, u32)> {
        self.driver.wait_used(&mut self.queues[index], count)
    }

    fn status(&self, placed: Placed) -> u8 {
        self.driver.memory.read_obj(GuestAddress(placed.status)).unwrap()
    }

    fn data(&self, placed: Placed, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.driver.memory.read_slice(&mut data, GuestAddress(placed.data)).unwrap();
        data
    }

    /// Does one request; its status, the data it wrote and the length it told.
    fn request(&mut self, readable: &[u8], writable: u32) -> (u8, Vec<u8>, u32) {
        let placed = self.put(0, 0, readable, writable);
        self.kick(0);
        let used = self.wait(0, 1);
        assert_eq!(used[0].0, 0);
        self.forget();
        (self.status(placed), self.data(placed, writable as usize), used[0].1)
    }

    fn read(&mut self, sector: u64, len: u32) -> (u8, Vec<u8>) {
        let (status, data, _) = self.request(&header(VIRTIO_BLK_T_IN, sector), len);
        (status, data)
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.request(&[&header(VIRTIO_BLK_T_OUT, sector), data].concat(), 0).0
    }

    fn config_u32(&self, offset: usize) -> u32 {
        self.driver.read(VIRTIO_MMIO_CONFIG + offset as u32)
    }

    fn write_config_u8(&self, offset: usize, value: u8) {
        self.driver.transport.write(u64::from(VIRTIO_MMIO_CONFIG) + offset as u64, &[value]);
    }
}

/// A subject for conformance whose request reads three sectors.
fn reading(engine: Engine, direct: bool) -> Subject {
    let file = image();
    let config = DiskConfig { queue_size: 64, queues: 2, direct, ..config(file.path(), engine) };
    let request = Request {
        queue: 1,
        readable: header(VIRTIO_BLK_T_IN, 5),
        writable: 3 * 512 + 1,
        written: 3 * 512 + 1,
    };
    subject(file, &config, request)
}

/// A subject whose request writes a sector. Drivers that do not negotiate flushes would have
/// each of thousands of writes reach the medium, if there were any.
fn writing(engine: Engine) -> Subject {
    let file = image();
    let config = DiskConfig { queue_size: 32, sync: false, ..config(file.path(), engine) };
    let readable = [header(VIRTIO_BLK_T_OUT, 7), vec![0x42; 512]].concat();
    subject(file, &config, Request { queue: 0, readable, writable: 1, written: 1 })
}

fn subject(file: NamedTempFile, config: &DiskConfig, request: Request) -> Subject {
    let device = VirtioBlk::open("test", config).unwrap();
    Subject { device: Box::new(device), subscribers: Vec::new(), request, _keep: Box::new(file) }
}

mod conformance_of_reads_with_sync {
    crate::virtio::conformance::conformance_tests!(super::reads_with_sync);
}
mod conformance_of_reads_with_io_uring {
    crate::virtio::conformance::conformance_tests!(super::reads_with_io_uring);
}
mod conformance_of_writes_with_io_uring {
    crate::virtio::conformance::conformance_tests!(super::writes_with_io_uring);
}
mod conformance_of_direct_reads {
    crate::virtio::conformance::conformance_tests!(super::direct_reads);
}

fn reads_with_sync() -> Subject {
    reading(Engine::Sync, false)
}

fn reads_with_io_uring() -> Subject {
    reading(Engine::IoUring, false)
}

fn writes_with_io_uring() -> Subject {
    writing(Engine::IoUring)
}

fn direct_reads() -> Subject {
    reading(Engine::IoUring, true)
}
