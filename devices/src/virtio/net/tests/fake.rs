//! A network in memory.
#![expect(unsafe_code, reason = "the buffers of a port are raw")]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use libc::iovec;
use vm_memory::VolatileSlice;

use crate::backend::net::{Failure, HEADER_BYTES, NetPort, Offloads};

/// What a fake network was told and given.
#[derive(Debug, Default)]
pub struct Seen {
    /// Header and frame each.
    pub sent: Vec<Vec<u8>>,
    pub offloads: Vec<Offloads>,
    pub attached: Vec<bool>,
    /// Frames with their headers that wait to be received.
    pub waiting: VecDeque<Vec<u8>>,
    /// So many sends more are carried; then the network is busy.
    pub room: usize,
    /// What [`Seen::wake`] makes ready.
    pub event: Option<OwnedFd>,
}

impl Seen {
    /// The network is ready for something.
    pub fn wake(&self) {
        rustix::io::write(self.event.as_ref().unwrap(), &1u64.to_ne_bytes()).unwrap();
    }
}

/// A port that keeps what it gets.
#[derive(Debug)]
pub struct FakePort {
    pub seen: Arc<Mutex<Seen>>,
    pub event: OwnedFd,
    /// When nothing waits, there is a frame of so many bytes all the same.
    pub endless: Option<usize>,
}

impl NetPort for FakePort {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    unsafe fn receive(&mut self, buffers: &[iovec]) -> Result<usize, Failure> {
        let waiting = self.seen.lock().unwrap().waiting.pop_front();
        let endless = || self.endless.map(|bytes| vec![0xab; HEADER_BYTES + bytes]);
        let frame = waiting.or_else(endless).ok_or(Failure::WouldBlock)?;
        let mut rest = &frame[..];
        for buffer in buffers {
            let (now, later) = rest.split_at(rest.len().min(buffer.iov_len));
            // SAFETY: the caller vouches for the buffer.
            let slice = unsafe { VolatileSlice::new(buffer.iov_base.cast(), now.len()) };
            slice.copy_from(now);
            rest = later;
        }
        Ok(frame.len() - rest.len())
    }

    unsafe fn send(&mut self, buffers: &[iovec]) -> Result<(), Failure> {
        let mut frame = Vec::new();
        for buffer in buffers {
            let at = frame.len();
            frame.resize(at + buffer.iov_len, 0);
            // SAFETY: the caller vouches for the buffer.
            let slice = unsafe { VolatileSlice::new(buffer.iov_base.cast(), buffer.iov_len) };
            slice.copy_to(&mut frame[at..]);
        }
        let mut seen = self.seen.lock().unwrap();
        seen.room = seen.room.checked_sub(1).ok_or(Failure::WouldBlock)?;
        seen.sent.push(frame);
        Ok(())
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.seen.lock().unwrap().offloads.push(offloads);
        Ok(())
    }

    fn set_attached(&mut self, attached: bool) -> io::Result<()> {
        self.seen.lock().unwrap().attached.push(attached);
        Ok(())
    }
}
