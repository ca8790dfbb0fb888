//! The way of frames into the guest: receiveq (virtio 1.2 §5.1.6.3).
#![expect(unsafe_code, reason = "hands the guest's memory to the network")]

use std::collections::VecDeque;

use libc::iovec;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF};
use vm_memory::VolatileSlice;

use crate::backend::net::{Failure, HEADER_BYTES, HEADER_NUM_BUFFERS, MAX_FRAME_BYTES, NetPort};
use crate::virtio::chain::{Chain, Head};
use crate::virtio::queue::Queue;

/// What a frame takes at most, header and all.
const MAX_BYTES: usize = HEADER_BYTES + MAX_FRAME_BYTES;
/// The most pieces of guest memory that one system call takes, one less than there can be (IOV_MAX).
const MAX_PIECES: usize = 1023;
/// Room for the frames that are expected at first, bytes.
const FIRST_EXPECTED: usize = 2048;

/// What became of an attempt to receive a frame.
#[derive(Debug)]
pub(super) enum Received {
    /// It is in the guest's memory; its bytes without the header.
    Frame(u64),
    /// It was larger than the guest's buffer and is lost.
    TooLarge,
    /// The guest must make room first.
    NoRoom,
    /// The port has none, or worse.
    Nothing(Failure),
}

/// The queue with the buffers that were taken from it and await frames.
///
/// A frame is read straight into them. What of it finds no room there stays in `spill` until the
/// driver has made more: nothing is lost because a frame is longer than expected.
#[derive(Debug)]
pub(super) struct ReceiveQueue {
    pub queue: Queue,
    /// In the order in which they are to be filled.
    taken: VecDeque<Taken>,
    /// Empty but while a buffer is taken.
    chain: Chain,
    /// The pieces of all that was taken, and one for `spill` while a frame is read.
    pieces: Pieces,
    /// Bytes of room in `taken`.
    room: usize,
    /// Descriptors of the queue's table in `taken`.
    descriptors: usize,
    /// The room that is made before a frame is read: what recent frames took.
    expected: usize,
    spill: Box<[u8]>,
    /// A frame of so many bytes, header included, was read and waits for room: as many bytes of it
    /// as there was room for are in `taken`, the others in `spill`.
    waiting: Option<Waiting>,
    /// A frame may be spread over several buffers.
    mergeable: bool,
    /// The driver takes frames as on a wire only.
    is_plain: bool,
}

/// A buffer that the driver gave.
#[derive(Debug)]
struct Taken {
    head: Head,
    /// How many of the pieces are its, [`MAX_PIECES`] at the most.
    pieces: u16,
    /// How many descriptors of the queue's table it takes.
    descriptors: u16,
    /// How many bytes it has room for, [`MAX_BYTES`] at the most.
    room: u32,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    bytes: usize,
    placed: usize,
}

/// Pieces of guest memory, some of them used up at the front.
#[derive(Debug, Default)]
struct Pieces {
    all: Vec<iovec>,
    first: usize,
}

// SAFETY: the pieces lead into guest memory, which the queue beside them keeps mapped and any thread
// may access.
unsafe impl Send for Pieces {}

impl Pieces {
    fn rest(&self) -> &[iovec] {
        self.all.get(self.first..).unwrap_or_default()
    }

    fn len(&self) -> usize {
        self.all.len() - self.first
    }

    fn append(&mut self, pieces: &[iovec]) {
        // Now and then, so that it costs little for each frame.
        if self.first > MAX_PIECES {
            self.all.drain(..self.first);
            self.first = 0;
        }
        self.all.extend_from_slice(pieces);
    }

    fn consume(&mut self, count: usize) {
        self.first = (self.first + count).min(self.all.len());
    }
}

impl ReceiveQueue {
    /// `queue` for a driver with `features`.
    pub fn new(queue: Queue, features: u64) -> Self {
        let has = |feature: u32| features >> feature & 1 != 0;
        Self {
            queue,
            taken: VecDeque::new(),
            chain: Chain::new(),
            pieces: Pieces::default(),
            room: 0,
            descriptors: 0,
            expected: FIRST_EXPECTED,
            spill: vec![0; MAX_BYTES].into_boxed_slice(),
            waiting: None,
            mergeable: has(VIRTIO_NET_F_MRG_RXBUF),
            is_plain: !has(VIRTIO_NET_F_GUEST_CSUM),
        }
    }

    /// Moves one frame from `port` to the guest, which learns of it with [`Queue::signal`].
    pub fn receive(&mut self, port: &mut dyn NetPort) -> Received {
        if let Some(waiting) = self.waiting {
            return self.place(waiting);
        }
        if !self.make_room(self.expected) {
            return Received::NoRoom;
        }
        let spill = iovec { iov_base: self.spill.as_mut_ptr().cast(), iov_len: self.spill.len() };
        self.pieces.all.push(spill);
        // SAFETY: the pieces are guest memory that the queue keeps mapped, and the spill.
        let result = unsafe { port.receive(self.pieces.rest()) };
        self.pieces.all.pop();
        match result {
            Ok(bytes) => {
                let placed = bytes.min(self.room);
                self.expect(bytes);
                self.place(Waiting { bytes, placed })
            }
            Err(failure) => Received::Nothing(failure),
        }
    }

    /// Whether a frame was read that waits for room.
    pub fn holds_frame(&self) -> bool {
        self.waiting.is_some()
    }

    /// Room follows the frames' size up at once and down slowly.
    fn expect(&mut self, bytes: usize) {
        self.expected = match self.expected.checked_sub(bytes) {
            Some(excess) => self.expected - excess / 16,
            None => bytes,
        };
    }

    /// Takes buffers until a frame of `bytes` fits, if there are so many; whether there is any room.
    /// A driver that spreads no frame over several buffers gives one for each.
    fn make_room(&mut self, bytes: usize) -> bool {
        // A driver may go on and on with buffers that are none.
        for _ in 0..self.queue.size() {
            let enough = self.room >= bytes || !(self.mergeable || self.taken.is_empty());
            if enough || self.pieces.len() >= MAX_PIECES {
                break;
            }
            let chain = &mut self.chain;
            if !self.queue.pop(chain) {
                break;
            }
            // No frame needs more.
            let room = chain.writable_bytes().min(MAX_BYTES as u64) as u32;
            let pieces = chain.writable().len();
            if (room as usize) < HEADER_BYTES || pieces > MAX_PIECES - self.pieces.len() {
                // No driver means that.
                self.queue.push(chain, 0);
                continue;
            }
            self.pieces.append(chain.writable());
            let descriptors = chain.descriptors();
            if let Some(head) = chain.release() {
                self.room += room as usize;
                self.descriptors += usize::from(descriptors);
                self.taken.push_back(Taken { head, pieces: pieces as u16, descriptors, room });
            }
        }
        !self.taken.is_empty()
    }

    /// Whether the driver can make no more room before it gets some buffers back.
    fn is_exhausted(&self) -> bool {
        self.pieces.len() >= MAX_PIECES || self.descriptors >= usize::from(self.queue.size())
    }

    /// Gives the guest the frame `waiting`, once there is room for all of it.
    fn place(&mut self, waiting: Waiting) -> Received {
        let Waiting { bytes, placed } = waiting;
        if bytes > MAX_BYTES || (bytes > self.room && !self.mergeable) {
            self.waiting = None;
            return Received::TooLarge;
        }
        if bytes > placed {
            self.make_room(bytes);
            if self.room < bytes && self.is_exhausted() {
                self.waiting = None;
                return Received::TooLarge;
            }
            if self.room < bytes {
                self.waiting = Some(waiting);
                return Received::NoRoom;
            }
            let rest = self.spill.get(..bytes - placed).unwrap_or_default();
            copy_to(self.pieces.rest(), placed, rest);
        }
        self.waiting = None;
        self.hand_over(bytes);
        Received::Frame((bytes - HEADER_BYTES.min(bytes)) as u64)
    }

    /// Uses the buffers that hold a frame of `bytes`.
    fn hand_over(&mut self, bytes: usize) {
        let (mut count, mut room, mut pieces, mut descriptors) = (0u16, 0, 0, 0);
        for taken in &self.taken {
            count += 1;
            room += taken.room as usize;
            pieces += usize::from(taken.pieces);
            descriptors += usize::from(taken.descriptors);
            if room >= bytes {
                break;
            }
        }
        copy_to(self.pieces.rest(), HEADER_NUM_BUFFERS, &count.to_le_bytes());
        if self.is_plain {
            // Frames may have waited since a driver that wanted more.
            copy_to(self.pieces.rest(), 0, &[0; HEADER_NUM_BUFFERS]);
        }
        let mut left = bytes;
        let used = self.taken.drain(..usize::from(count)).map(|taken| {
            let written = (taken.room as usize).min(left);
            left -= written;
            (taken.head, written as u32)
        });
        self.queue.push_heads(used);
        self.pieces.consume(pieces);
        self.room -= room;
        self.descriptors -= descriptors;
    }
}

/// Writes `data` into `pieces`, `offset` bytes from their start, as far as they reach.
fn copy_to(pieces: &[iovec], mut offset: usize, mut data: &[u8]) {
    for piece in pieces {
        if data.is_empty() {
            return;
        }
        let skipped = offset.min(piece.iov_len);
        offset -= skipped;
        let (now, later) = data.split_at(data.len().min(piece.iov_len - skipped));
        if now.is_empty() {
            continue;
        }
        let start = piece.iov_base.wrapping_byte_add(skipped);
        // SAFETY: the pieces are guest memory that is mapped for as long as they are here.
        let slice = unsafe { VolatileSlice::new(start.cast(), now.len()) };
        slice.copy_from(now);
        data = later;
    }
}
