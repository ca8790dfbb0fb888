//! Disk images: files and block devices that hold the sectors of a guest's disk.
//!
//! A [`Disk`] is what was opened; a [`DiskQueue`] moves data between it and host memory, one a
//! thread. [`RawDisk`] is the disk whose bytes are the guest's own. Its engines:
//!
//! - `sync`: one system call a request, on the calling thread. The fewest instructions, and no
//!   concurrency within a queue.
//! - `io_uring`: one system call a batch, many requests under way at a time.
//!
//! Data goes straight between the file and the memory of the request. Only what direct I/O cannot
//! take as it lies in memory passes through a buffer (`bounce`).

mod bounce;
mod host;
mod lock;
mod open;
mod raw;
mod sync;
mod uring;

use std::io;
use std::os::fd::BorrowedFd;

pub use host::Buffer;
pub use lock::LockOwner;
pub use open::{DiskOptions, Engine, OpenError};
pub use raw::RawDisk;

/// The unit of a disk's capacity, in bytes.
pub const SECTOR_BYTES: u64 = 512;

/// The most requests that a queue takes at a time.
pub const MAX_DEPTH: u16 = 1024;

/// What a disk looks like to its user. All sizes are in bytes; block sizes are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// A multiple of `logical_block`, at least one. The rest of a file that ends within a block
    /// is out of reach.
    pub capacity: u64,
    /// The least that can be read or written, 512 or more. Requests must be multiples of it only
    /// if `aligned_only`.
    pub logical_block: u32,
    /// What can be written without reading first, at least `logical_block`.
    pub physical_block: u32,
    /// The size of I/O that suits the disk best; 0 if the host does not say.
    pub optimal_io: u32,
    /// Requests that are not multiples of `logical_block` fail: direct I/O cannot carry them out.
    pub aligned_only: bool,
    /// Nothing can be written.
    pub read_only: bool,
}

/// What to do to a range of a disk.
#[derive(Clone, Copy, Debug)]
pub enum Operation<'a> {
    /// Fill the buffers from the disk.
    Read(&'a [Buffer]),
    /// Write the buffers to the disk.
    Write {
        /// The data.
        buffers: &'a [Buffer],
        /// Complete only when the data would survive a power cut.
        durable: bool,
    },
    /// Complete when all writes that were completed before would survive a power cut. The range
    /// is ignored.
    Flush,
    /// The range's content is of no use any more; what is read there later is anything.
    Discard,
    /// Make the range read as zeroes.
    WriteZeroes {
        /// The disk may give the space back to the host.
        may_unmap: bool,
        /// Complete only when the zeroes would survive a power cut.
        durable: bool,
    },
}

/// One request to a [`DiskQueue`].
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Comes back in the [`Completion`]. Below the queue's depth, and not that of a request under
    /// way.
    pub tag: u16,
    /// Where the range begins, in bytes.
    pub offset: u64,
    /// How long the range is, in bytes. For reads and writes the buffers' lengths add up to it.
    pub len: u64,
    /// What to do there.
    pub operation: Operation<'a>,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The request's.
    pub tag: u16,
    /// Whether all of it was done. If not, any part of it may have been.
    pub result: Result<(), Failure>,
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The range ends after the disk.
    #[error("the range ends after the disk")]
    OutOfRange,
    /// The range is not made of whole blocks, and the disk is [`Geometry::aligned_only`].
    #[error("the range is not aligned to the disk's blocks")]
    Misaligned,
    /// A write of any kind to a read-only disk.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The host cannot do this to this file.
    #[error("the host does not support the operation")]
    Unsupported,
    /// The file has become shorter than it was when it was opened.
    #[error("the file has become shorter")]
    Truncated,
    /// The buffers' lengths do not add up to the range's, or the tag is in use or too large.
    #[error("the request contradicts itself")]
    Malformed,
    /// The host failed, with this error number.
    #[error("{}", io::Error::from_raw_os_error(*.0))]
    Host(i32),
}

impl From<rustix::io::Errno> for Failure {
    fn from(error: rustix::io::Errno) -> Self {
        match error {
            rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS => Self::Unsupported,
            error => Self::Host(error.raw_os_error()),
        }
    }
}

/// An opened disk.
pub trait Disk: Send + Sync {
    /// What it looks like. Does not change.
    fn geometry(&self) -> Geometry;

    /// A queue for one thread that takes `depth` requests at a time, 1 to [`MAX_DEPTH`]. Once
    /// [`DiskQueue::arm`] was called, a completion makes the eventfd `wake` readable.
    ///
    /// # Errors
    /// The host has no resources left for it.
    fn open_queue(&self, depth: u16, wake: BorrowedFd<'_>) -> io::Result<Box<dyn DiskQueue>>;
}

/// Where requests to a disk are put in, and their completions taken out.
///
/// A batch is: [`submit`](Self::submit) each, [`start`](Self::start) all, then
/// [`next_completion`](Self::next_completion) until there is none; [`arm`](Self::arm) before
/// waiting for the eventfd. No order is kept among the requests under way. Dropping a queue waits
/// for those.
pub trait DiskQueue: Send {
    /// Takes a request. It may wait for [`start`](Self::start) or be done at once; it ends in a
    /// completion in any case, also when it is malformed.
    ///
    /// # Safety
    /// Until the completion was taken or the queue dropped, the slice of buffers stays as it is,
    /// and their memory stays mapped, readable and for reads writable. Others may access that
    /// memory meanwhile.
    #[expect(unsafe_code, reason = "the memory is used after the call")]
    unsafe fn submit(&mut self, request: &Request<'_>);

    /// Starts the requests that wait for it.
    fn start(&mut self);

    /// A completion that is there. Does not wait.
    fn next_completion(&mut self) -> Option<Completion>;

    /// How many requests were submitted whose completion was not taken yet.
    fn in_flight(&self) -> usize;

    /// From now until the next [`start`](Self::start), completions make the queue's eventfd
    /// readable. True if there are completions to be taken already: the eventfd is then not to be
    /// waited for.
    fn arm(&mut self) -> bool;

    /// Starts what waits, then waits until there is a completion to be taken, or none in flight.
    fn wait(&mut self);
}

#[cfg(test)]
mod tests;
