//! Frames over a stream socket, each after its length in four bytes, big-endian: how passt and
//! QEMU's `stream` networks carry them.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::iovec;
use rustix::net::sockopt::socket_type;
use rustix::net::{SendFlags, SocketType, send};
use vm_memory::VolatileSlice;

use super::tap::{TapError, take_over};
use super::{
    Failure, HEADER_BYTES, MAX_FRAME_BYTES, MIN_FRAME_BYTES, NetPort, Network, Offloads, Tap,
};

/// Bytes of the length before each frame.
const LENGTH_BYTES: usize = 4;
/// Bytes that are read at a time: two of the longest frames at least.
const BUFFER_BYTES: usize = 2 * (MAX_FRAME_BYTES + LENGTH_BYTES).next_multiple_of(4096);

/// A connected stream socket.
pub struct Stream {
    socket: OwnedFd,
    /// What was read: `start..end` of it is not used up.
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// What the socket did not take of the last frame.
    rest: Vec<u8>,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Stream {
    /// The network at the other end of `socket`, which must be connected and not block.
    pub fn new(socket: OwnedFd) -> Self {
        let buffer = vec![0; BUFFER_BYTES].into_boxed_slice();
        Self { socket, buffer, start: 0, end: 0, rest: Vec::new() }
    }

    /// The network of this socket alone, with frames as on a wire.
    pub fn into_network(self, mtu: Option<u16>) -> Network {
        Network { ports: vec![Box::new(self)], offloads: Offloads::NONE, mtu }
    }

    /// Bytes of the next frame, once all of it was read.
    ///
    /// # Errors
    /// [`Failure::Gone`]: no frame has such a length, so it is not known where the next one begins.
    fn next_frame(&self) -> Result<Option<usize>, Failure> {
        let Some(unread) = self.buffer.get(self.start..self.end) else { return Ok(None) };
        let Some((length, frame)) = unread.split_first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length) as usize;
        if !(MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&length) {
            let error = io::Error::other(format!("it announced a frame of {length} bytes"));
            return Err(Failure::Gone(Some(error)));
        }
        Ok((frame.len() >= length).then_some(length))
    }

    /// Takes the next frame.
    ///
    /// # Errors
    /// [`Failure`].
    pub(super) fn take_frame(&mut self) -> Result<&[u8], Failure> {
        let length = self.wait_frame()?;
        let from = self.start + LENGTH_BYTES;
        self.start = from + length;
        Ok(self.buffer.get(from..from + length).unwrap_or_default())
    }

    /// Reads until a frame is there, and returns its bytes.
    fn wait_frame(&mut self) -> Result<usize, Failure> {
        loop {
            if let Some(length) = self.next_frame()? {
                return Ok(length);
            }
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            let room = self.buffer.get_mut(self.end..).unwrap_or_default();
            match rustix::io::retry_on_intr(|| rustix::io::read(&self.socket, &mut *room)) {
                Ok(0) => return Err(Failure::Gone(None)),
                Ok(count) => self.end += count,
                Err(error) => return Err(failure(error)),
            }
        }
    }
}

impl NetPort for Stream {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    unsafe fn receive(&mut self, buffers: &[iovec]) -> Result<usize, Failure> {
        let frame = self.take_frame()?;
        // SAFETY: the caller vouches for the buffers.
        unsafe {
            receive_behind_header(buffers, |buffers| {
                copy_to(buffers, frame);
                Ok(frame.len())
            })
        }
    }

    unsafe fn send(&mut self, buffers: &[iovec]) -> Result<(), Failure> {
        self.flush()?;
        let frame = buffers.get(1..).unwrap_or_default();
        let length: usize = frame.iter().map(|buffer| buffer.iov_len).sum();
        let prefix = (length as u32).to_be_bytes();
        let mut all = Vec::with_capacity(buffers.len());
        all.push(iovec { iov_base: prefix.as_ptr().cast_mut().cast(), iov_len: prefix.len() });
        all.extend_from_slice(frame);
        // SAFETY: a msghdr is plain numbers and pointers, for which zeroes are a value.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = all.as_mut_ptr();
        message.msg_iovlen = all.len();
        let send = || {
            let (socket, flags) = (self.socket.as_raw_fd(), libc::MSG_NOSIGNAL);
            // SAFETY: the caller vouches for the buffers; the prefix and the list outlive the call.
            let sent = unsafe { libc::sendmsg(socket, &raw const message, flags) };
            usize::try_from(sent).map_err(|_| {
                let error = rustix::io::Errno::from_io_error(&io::Error::last_os_error());
                error.unwrap_or(rustix::io::Errno::IO)
            })
        };
        let sent = rustix::io::retry_on_intr(send).map_err(failure)?;
        if sent < LENGTH_BYTES + length {
            // The frame has begun, so that its rest must follow before any other.
            // SAFETY: as above.
            unsafe { copy_from(&all, sent, &mut self.rest) };
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Failure> {
        while !self.rest.is_empty() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            let send = || send(&self.socket, &self.rest, flags);
            let sent = rustix::io::retry_on_intr(send).map_err(failure)?;
            self.rest.drain(..sent);
        }
        Ok(())
    }
}

fn failure(error: rustix::io::Errno) -> Failure {
    use rustix::io::Errno;
    match error {
        Errno::AGAIN => Failure::WouldBlock,
        Errno::NOBUFS | Errno::NOMEM => Failure::Refused(error.into()),
        error => Failure::Gone(Some(error.into())),
    }
}

/// Writes an empty header to the front of `buffers` and has `receive` fill what comes behind it;
/// returns the bytes of both.
///
/// # Safety
/// The buffers' memory is mapped and writable.
pub(super) unsafe fn receive_behind_header(
    buffers: &[iovec],
    receive: impl FnOnce(&[iovec]) -> Result<usize, Failure>,
) -> Result<usize, Failure> {
    let mut frame = Vec::with_capacity(buffers.len());
    let mut header = HEADER_BYTES;
    for buffer in buffers {
        let count = header.min(buffer.iov_len);
        header -= count;
        let rest = iovec {
            iov_base: buffer.iov_base.wrapping_byte_add(count),
            iov_len: buffer.iov_len - count,
        };
        if count > 0 {
            // SAFETY: the caller vouches for the buffer, which is longer than `count`.
            let front = unsafe { VolatileSlice::new(buffer.iov_base.cast(), count) };
            front.copy_from(&[0u8; HEADER_BYTES][..count]);
        }
        if rest.iov_len > 0 {
            frame.push(rest);
        }
    }
    receive(&frame).map(|bytes| HEADER_BYTES + bytes)
}

/// Copies as much of `data` to `buffers` as there is room for.
fn copy_to(buffers: &[iovec], mut data: &[u8]) {
    for buffer in buffers {
        let (now, later) = data.split_at(buffer.iov_len.min(data.len()));
        // SAFETY: those who call this got the buffers from a caller that vouches for them.
        let slice = unsafe { VolatileSlice::new(buffer.iov_base.cast(), now.len()) };
        slice.copy_from(now);
        data = later;
    }
}

/// Appends to `data` what `buffers` hold after the first `skip` bytes.
///
/// # Safety
/// The buffers' memory is mapped and readable.
unsafe fn copy_from(buffers: &[iovec], mut skip: usize, data: &mut Vec<u8>) {
    for buffer in buffers {
        let skipped = skip.min(buffer.iov_len);
        skip -= skipped;
        let (at, count) = (data.len(), buffer.iov_len - skipped);
        data.resize(at + count, 0);
        let start = buffer.iov_base.wrapping_byte_add(skipped);
        // SAFETY: the caller vouches for the buffer.
        let slice = unsafe { VolatileSlice::new(start.cast(), count) };
        if let Some(room) = data.get_mut(at..) {
            slice.copy_to(room);
        }
    }
}

/// The network behind descriptor `number`, which this process was started with: a tap interface, or
/// a connected stream socket.
///
/// # Errors
/// [`TapError`].
pub fn inherited(number: u32) -> Result<Network, TapError> {
    let fd = take_over(number)?;
    if matches!(socket_type(&fd), Ok(SocketType::STREAM)) {
        let connected = rustix::net::getpeername(&fd).is_ok();
        let flags = rustix::fs::fcntl_getfl(&fd);
        let set = flags
            .and_then(|flags| rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK));
        return match set {
            Ok(()) if connected => Ok(Stream::new(fd).into_network(None)),
            _ => Err(TapError::Descriptor(number)),
        };
    }
    Tap::inherited(fd)?.ok_or(TapError::Descriptor(number))
}
