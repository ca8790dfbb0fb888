//! A descriptor chain (virtio 1.2 §2.7.5), read once and checked whole before a device sees it.
#![expect(unsafe_code, reason = "copies to and from guest memory through host pointers")]

mod walk;

use libc::iovec;
use vm_memory::VolatileSlice;

pub(super) use self::walk::ChainRules;
use super::device::Memory;

/// What is wrong with a descriptor chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// More descriptors than a queue as large as the device offers would have, or a loop.
    #[error("the chain has more than {limit} descriptors or loops")]
    TooLong {
        /// The most that are allowed.
        limit: u16,
    },
    /// A descriptor's `next` lies past the table.
    #[error("descriptor {index} lies past the table of {entries}")]
    NextOutsideTable {
        /// The index asked for.
        index: u16,
        /// The table's size.
        entries: u32,
    },
    /// A buffer or an indirect table is not, or not whole, in guest RAM.
    #[error("{len} bytes at {address:#x} are not guest memory")]
    OutsideMemory {
        /// First guest physical address.
        address: u64,
        /// Length in bytes.
        len: u32,
    },
    /// A buffer of no bytes.
    #[error("a buffer is empty")]
    ZeroLength,
    /// A readable buffer after a writable one (§2.7.4.2).
    #[error("a readable buffer follows a writable one")]
    ReadableAfterWritable,
    /// More than 2^32 bytes in all.
    #[error("the chain holds more than 4 GiB")]
    TooManyBytes,
    /// An indirect descriptor although the feature was not negotiated.
    #[error("an indirect descriptor without VIRTIO_F_INDIRECT_DESC")]
    IndirectNotNegotiated,
    /// An indirect descriptor within an indirect table.
    #[error("an indirect table refers to another one")]
    NestedIndirect,
    /// An indirect descriptor with VIRTQ_DESC_F_NEXT.
    #[error("an indirect descriptor is followed by another descriptor")]
    IndirectWithNext,
    /// An indirect table whose length is zero or not a multiple of a descriptor's.
    #[error("an indirect table of {len} bytes")]
    IndirectLength {
        /// Its length in bytes.
        len: u32,
    },
}

/// The chain has fewer readable bytes than were asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the chain is too short")]
pub struct TooShort;

/// A chain of which its device has taken what it needs: all that is left to do is to give it back
/// ([`Queue::push_heads`](super::queue::Queue::push_heads)).
#[derive(Debug, PartialEq, Eq)]
pub struct Head(pub(super) u16);

/// Buffers of one direction, in order.
#[derive(Debug, Default)]
struct Buffers {
    iovecs: Vec<iovec>,
    /// The first that is not used up.
    first: usize,
    bytes: u64,
}

impl Buffers {
    fn clear(&mut self) {
        self.iovecs.clear();
        self.first = 0;
        self.bytes = 0;
    }

    fn push(&mut self, start: *mut u8, bytes: usize) {
        self.bytes += bytes as u64;
        self.iovecs.push(iovec { iov_base: start.cast(), iov_len: bytes });
    }

    fn rest(&self) -> &[iovec] {
        self.iovecs.get(self.first..).unwrap_or_default()
    }

    /// Takes up to `most` bytes off the front, all from one buffer; `None` when there are none.
    fn take_front(&mut self, most: usize) -> Option<iovec> {
        let front = self.iovecs.get_mut(self.first)?;
        let taken = iovec { iov_base: front.iov_base, iov_len: front.iov_len.min(most) };
        front.iov_base = front.iov_base.wrapping_byte_add(taken.iov_len);
        front.iov_len -= taken.iov_len;
        if front.iov_len == 0 {
            self.first += 1;
        }
        self.bytes -= taken.iov_len as u64;
        Some(taken)
    }

    /// Takes the last byte off.
    fn take_last_byte(&mut self) -> Option<*mut u8> {
        if self.bytes == 0 {
            return None;
        }
        let last = self.iovecs.last_mut()?;
        last.iov_len -= 1;
        let byte = last.iov_base.wrapping_byte_add(last.iov_len).cast();
        if last.iov_len == 0 {
            self.iovecs.pop();
        }
        self.bytes -= 1;
        Some(byte)
    }
}

/// A request: the buffers of one descriptor chain as pieces of this process's memory, those that
/// the driver filled and those that it wants filled.
///
/// The chain is checked when it is taken from its queue: each piece lies in guest RAM, there are
/// at most as many descriptors as the queue can have entries, readable ones first. What the guest
/// does to descriptors afterwards has no effect; the bytes in the buffers may change at any time.
///
/// A `Chain` is meant to be used again for the next request, and then allocates nothing.
#[derive(Debug, Default)]
pub struct Chain {
    /// `Some` from [`Queue::pop`](super::queue::Queue::pop) to `push`.
    head: Option<u16>,
    /// How many descriptors of its queue's table it takes.
    descriptors: u16,
    readable: Buffers,
    writable: Buffers,
    status: Option<*mut u8>,
    /// Keeps mapped what the pieces point to.
    memory: Option<Memory>,
}

// SAFETY: the pointers lead into the mappings that `memory` keeps, which any thread may access;
// all access goes through volatile copies or system calls.
unsafe impl Send for Chain {}

impl Chain {
    /// An empty chain.
    pub fn new() -> Self {
        Self::default()
    }

    /// Readable bytes that were not yet read.
    pub fn readable_bytes(&self) -> u64 {
        self.readable.bytes
    }

    /// Writable bytes that were not yet written or taken as the status.
    pub fn writable_bytes(&self) -> u64 {
        self.writable.bytes
    }

    /// What is left to read, as system calls take it: pieces of guest RAM, none empty, up to as
    /// many as the queue has entries (which may exceed IOV_MAX). Valid until the chain is pushed,
    /// popped into or dropped.
    pub fn readable(&self) -> &[iovec] {
        self.readable.rest()
    }

    /// What is left to write, as [`Chain::readable`].
    pub fn writable(&self) -> &[iovec] {
        self.writable.rest()
    }

    /// Reads the next `data.len()` bytes, wherever descriptors begin and end (§2.6.4).
    ///
    /// # Errors
    /// There are fewer; nothing is read.
    pub fn read(&mut self, mut data: &mut [u8]) -> Result<(), TooShort> {
        if self.readable.bytes < data.len() as u64 {
            return Err(TooShort);
        }
        while !data.is_empty() {
            let piece = self.readable.take_front(data.len()).ok_or(TooShort)?;
            let (now, later) = data.split_at_mut(piece.iov_len);
            self.slice(piece).copy_to(now);
            data = later;
        }
        Ok(())
    }

    /// Writes `data`, as much as there is room for, and returns how much that was, in bytes.
    pub fn write(&mut self, data: &[u8]) -> usize {
        let mut rest = data;
        while let Some(piece) =
            (!rest.is_empty()).then(|| self.writable.take_front(rest.len())).flatten()
        {
            let (now, later) = rest.split_at(piece.iov_len);
            self.slice(piece).copy_from(now);
            rest = later;
        }
        data.len() - rest.len()
    }

    /// Sets the last writable byte aside for [`Chain::write_status`]; it no longer counts as
    /// writable.
    ///
    /// # Errors
    /// There is no writable byte.
    pub fn take_status(&mut self) -> Result<(), TooShort> {
        self.status = Some(self.writable.take_last_byte().ok_or(TooShort)?);
        Ok(())
    }

    /// Writes the byte that [`Chain::take_status`] set aside; does nothing if none was.
    pub fn write_status(&mut self, status: u8) {
        if let Some(byte) = self.status {
            self.slice(iovec { iov_base: byte.cast(), iov_len: 1 }).copy_from(&[status]);
        }
    }

    /// The index of the chain's first descriptor, while the chain is out of its queue.
    pub fn head(&self) -> Option<u16> {
        self.head
    }

    /// How many descriptors of its queue's table the chain takes, those of an indirect table not counted.
    pub fn descriptors(&self) -> u16 {
        self.descriptors
    }

    /// Empties the chain and leaves what its queue must have back; `None` if it is out of no queue.
    pub fn release(&mut self) -> Option<Head> {
        self.readable.clear();
        self.writable.clear();
        self.status = None;
        self.descriptors = 0;
        self.head.take().map(Head)
    }

    /// `piece` for volatile copies.
    fn slice(&self, piece: iovec) -> VolatileSlice<'_> {
        debug_assert!(self.memory.is_some());
        // SAFETY: pieces come from slices of guest RAM and only get smaller; `self.memory` keeps
        // the mapping for as long as they are here, and the slice borrows `self`.
        unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len) }
    }
}

#[cfg(test)]
mod tests;
