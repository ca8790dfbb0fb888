//! System calls on memory that a guest may change meanwhile, and those that rustix lacks.
#![expect(unsafe_code, reason = "system calls on raw memory")]

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

/// The most buffers that one system call takes.
pub(super) const MAX_BUFFERS_PER_CALL: usize = 1024;

/// A stretch of host memory. It does not borrow the memory: who hands it to a queue vouches for
/// it ([`super::DiskQueue::submit`]).
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Buffer(libc::iovec);

// SAFETY: it is an address and a length; using them is what needs care.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// The `len` bytes from `start` on.
    pub const fn new(start: *mut u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: start.cast(), iov_len: len })
    }

    /// The same buffers in the form that system calls take.
    pub const fn from_iovecs(iovecs: &[libc::iovec]) -> &[Self] {
        // SAFETY: a Buffer is nothing but an iovec.
        unsafe { std::slice::from_raw_parts(iovecs.as_ptr().cast(), iovecs.len()) }
    }

    /// The first byte.
    pub const fn start(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// The length in bytes.
    pub const fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether there is nothing.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What is left after the first `count` bytes, or nothing.
    pub(super) fn skip(self, count: usize) -> Self {
        let count = count.min(self.len());
        Self::new(self.start().wrapping_add(count), self.len() - count)
    }

    /// Both start and length are multiples of `alignment`, a power of two.
    pub(super) fn is_aligned(&self, alignment: usize) -> bool {
        (self.start().addr() | self.len()) & alignment.wrapping_sub(1) == 0
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{:#x}", self.start(), self.len())
    }
}

/// The form in which the kernel takes buffers.
pub(super) fn as_iovecs(buffers: &[Buffer]) -> *const libc::iovec {
    // Buffer is a transparent iovec.
    buffers.as_ptr().cast()
}

/// Which way data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the file to memory.
    Read,
    /// From memory to the file.
    Write,
    /// The same, and on to the medium.
    WriteDurably,
}

/// Moves data between the first [`MAX_BUFFERS_PER_CALL`] of `buffers` and `file` at `offset`;
/// returns how many bytes.
///
/// # Safety
/// The memory of `buffers` is mapped, and writable if `direction` is to read.
pub(super) unsafe fn transfer(
    file: BorrowedFd<'_>,
    direction: Direction,
    buffers: &[Buffer],
    offset: u64,
) -> Result<usize, Errno> {
    let fd = file.as_raw_fd();
    let offset = libc::off_t::try_from(offset).map_err(|_| Errno::INVAL)?;
    // At most MAX_BUFFERS_PER_CALL, which fits.
    let count = buffers.len().min(MAX_BUFFERS_PER_CALL) as libc::c_int;
    let iovecs = as_iovecs(buffers);
    let moved = match direction {
        // SAFETY: `iovecs` are `count` buffers or more, whose memory the caller vouches for.
        Direction::Read => unsafe { libc::preadv(fd, iovecs, count, offset) },
        // SAFETY: as above.
        Direction::Write => unsafe { libc::pwritev(fd, iovecs, count, offset) },
        Direction::WriteDurably => {
            // SAFETY: as above.
            unsafe { libc::pwritev2(fd, iovecs, count, offset, libc::RWF_DSYNC) }
        }
    };
    usize::try_from(moved).map_err(|_| last_error())
}

/// Tells a block device that the range is of no use any more.
pub(super) fn discard_blocks(file: BorrowedFd<'_>, offset: u64, len: u64) -> Result<(), Errno> {
    let range = [offset, len];
    // SAFETY: BLKDISCARD reads two 64-bit numbers at its argument.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
    check(result)
}

/// Whether a block device is write-protected.
pub(super) fn is_block_device_read_only(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut read_only: libc::c_int = 0;
    // SAFETY: BLKROGET writes one int at its argument.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKROGET, &raw mut read_only) };
    check(result).map(|()| read_only != 0)
}

/// The size of I/O that suits a block device best, in bytes; 0 if it does not say.
pub(super) fn block_device_optimal_io(file: BorrowedFd<'_>) -> Result<u32, Errno> {
    let mut bytes: libc::c_uint = 0;
    // SAFETY: BLKIOOPT writes one unsigned int at its argument.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKIOOPT, &raw mut bytes) };
    check(result).map(|()| bytes)
}

/// `_IO(0x12, nr)` of linux/fs.h, where libc has no name for it.
const fn block_ioctl(nr: libc::Ioctl) -> libc::Ioctl {
    const BLOCK_TYPE: libc::Ioctl = 0x12;
    BLOCK_TYPE << 8 | nr
}

const BLKROGET: libc::Ioctl = block_ioctl(94);
const BLKDISCARD: libc::Ioctl = block_ioctl(119);

/// Takes an open file description lock on all of `file`, shared or exclusive, without waiting.
pub(super) fn try_lock(file: BorrowedFd<'_>, exclusive: bool) -> Result<(), Errno> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    let lock = libc::flock {
        // The constants are 0 to 2.
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: F_OFD_SETLK reads a flock at its argument.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    check(result)
}

fn check(result: libc::c_int) -> Result<(), Errno> {
    if result < 0 { Err(last_error()) } else { Ok(()) }
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
