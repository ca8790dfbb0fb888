#![expect(unsafe_code, reason = "requests on memory that the tests own")]

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::NamedTempFile;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;

mod engines;
mod files;
mod load;

const ENGINES: [Engine; 2] = [Engine::Sync, Engine::IoUring];

/// An image of `len` bytes, each the low byte of its offset divided by 512.
fn image(len: usize) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..len).map(|at| (at / 512) as u8).collect();
    file.write_all(&bytes).unwrap();
    file
}

fn options(path: &Path, engine: Engine) -> DiskOptions {
    DiskOptions { path: path.to_owned(), read_only: false, direct: false, engine: Some(engine) }
}

/// A queue and its eventfd.
struct Rig {
    disk: RawDisk,
    wake: EventFd,
    queue: Box<dyn DiskQueue>,
}

impl Rig {
    fn new(options: &DiskOptions) -> Self {
        let disk = RawDisk::open(options).unwrap();
        let wake = EventFd::new(EFD_NONBLOCK).unwrap();
        let queue = open_queue(&disk, 64, &wake);
        Self { disk, wake, queue }
    }

    /// Does one request and waits for it.
    fn run(&mut self, offset: u64, len: u64, operation: Operation<'_>) -> Result<(), Failure> {
        let request = Request { tag: 3, offset, len, operation };
        // SAFETY: the callers' memory outlives the call, which waits for the completion.
        unsafe { self.queue.submit(&request) };
        assert_eq!(self.queue.in_flight(), 1);
        self.queue.wait();
        let completion = self.queue.next_completion().unwrap();
        assert_eq!(completion.tag, 3);
        assert_eq!(self.queue.in_flight(), 0);
        assert_eq!(self.queue.next_completion(), None);
        completion.result
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Result<(), Failure> {
        let buffers = [buffer(data)];
        self.run(offset, data.len() as u64, Operation::Read(&buffers))
    }

    fn write(&mut self, offset: u64, data: &mut [u8]) -> Result<(), Failure> {
        let buffers = [buffer(data)];
        let write = Operation::Write { buffers: &buffers, durable: false };
        self.run(offset, data.len() as u64, write)
    }
}

fn open_queue(disk: &RawDisk, depth: u16, wake: &EventFd) -> Box<dyn DiskQueue> {
    // SAFETY: the eventfd is open for as long as it is borrowed.
    let wake = unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(wake)) };
    disk.open_queue(depth, wake).unwrap()
}

fn buffer(data: &mut [u8]) -> Buffer {
    Buffer::new(data.as_mut_ptr(), data.len())
}
