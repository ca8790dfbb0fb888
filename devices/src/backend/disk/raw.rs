//! A disk whose bytes are those of a file or block device.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::sync::SyncQueue;
use super::uring::UringQueue;
use super::{Buffer, Disk, DiskQueue, Engine, Failure, Geometry, MAX_DEPTH, Operation, Request};

/// What direct I/O asks of a request. Powers of two.
#[derive(Clone, Copy, Debug)]
pub(super) struct Alignment {
    /// Of each buffer's start and length.
    pub memory_bytes: usize,
    /// Of the range on the disk.
    pub range_bytes: u32,
}

/// An opened image.
#[derive(Debug)]
pub(super) struct RawFile {
    pub file: File,
    /// Another description of the same file, which holds the lock.
    pub _lock: File,
    pub geometry: Geometry,
    pub is_block_device: bool,
    /// Set when the file is open for direct I/O.
    pub alignment: Option<Alignment>,
}

impl RawFile {
    /// Whether the request makes sense on this disk. For reads and writes the lengths add up.
    #[inline]
    pub fn check(&self, request: &Request<'_>) -> Result<(), Failure> {
        let geometry = &self.geometry;
        let writes = match request.operation {
            Operation::Read(buffers) => {
                check_length(buffers, request.len)?;
                false
            }
            Operation::Write { buffers, .. } => {
                check_length(buffers, request.len)?;
                true
            }
            Operation::Flush => return Ok(()),
            Operation::Discard | Operation::WriteZeroes { .. } => true,
        };
        if writes && geometry.read_only {
            return Err(Failure::ReadOnly);
        }
        let end = request.offset.checked_add(request.len).ok_or(Failure::OutOfRange)?;
        if end > geometry.capacity {
            return Err(Failure::OutOfRange);
        }
        let block = u64::from(geometry.logical_block);
        if geometry.aligned_only && (request.offset | request.len) & (block - 1) != 0 {
            return Err(Failure::Misaligned);
        }
        Ok(())
    }

    /// Direct I/O cannot take the buffers as they lie in memory.
    #[inline]
    pub fn must_bounce(&self, buffers: &[Buffer]) -> bool {
        self.alignment.is_some_and(|alignment| {
            !buffers.iter().all(|buffer| buffer.is_aligned(alignment.memory_bytes))
        })
    }
}

fn check_length(buffers: &[Buffer], len: u64) -> Result<(), Failure> {
    let add = |sum: u64, buffer: &Buffer| sum.checked_add(buffer.len() as u64);
    match buffers.iter().try_fold(0, add) {
        Some(sum) if sum == len => Ok(()),
        _ => Err(Failure::Malformed),
    }
}

/// A raw image, opened by [`RawDisk::open`].
#[derive(Debug)]
pub struct RawDisk {
    file: Arc<RawFile>,
    engine: Engine,
}

impl RawDisk {
    pub(super) fn new(file: RawFile, engine: Engine) -> Self {
        Self { file: Arc::new(file), engine }
    }

    #[cfg(test)]
    pub(super) fn file(&self) -> Arc<RawFile> {
        self.file.clone()
    }

    /// How its queues work.
    pub fn engine(&self) -> Engine {
        self.engine
    }
}

impl Disk for RawDisk {
    fn geometry(&self) -> Geometry {
        self.file.geometry
    }

    fn open_queue(&self, depth: u16, wake: BorrowedFd<'_>) -> io::Result<Box<dyn DiskQueue>> {
        if depth == 0 || depth > MAX_DEPTH {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(match self.engine {
            Engine::Sync => Box::new(SyncQueue::new(self.file.clone(), depth)),
            Engine::IoUring => Box::new(UringQueue::new(self.file.clone(), depth, wake)?),
        })
    }
}

impl AsFd for RawDisk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.file.as_fd()
    }
}
