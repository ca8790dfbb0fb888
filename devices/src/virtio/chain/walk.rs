//! How a chain is followed and checked.

use std::sync::Arc;

use virtio_bindings::virtio_ring::{
    VRING_DESC_ALIGN_SIZE, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::volatile_memory::VolatileMemory;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::{Chain, ChainError};
use crate::virtio::ram::Ram;

/// The size of a descriptor, bytes.
const DESCRIPTOR_BYTES: u32 = VRING_DESC_ALIGN_SIZE;
/// Another descriptor follows.
const F_NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// The buffer is for the device to write.
const F_WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// The buffer is a table of descriptors.
const F_INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
/// The most bytes that a chain may hold, 2^32 (virtio 1.2 §2.7.5.2).
const MAX_CHAIN_BYTES: u64 = 1 << 32;

/// The rules by which a queue reads chains.
#[derive(Clone, Copy, Debug)]
pub(in crate::virtio) struct ChainRules {
    pub(in crate::virtio) table: GuestAddress,
    /// Entries of the descriptor table.
    pub(in crate::virtio) entries: u16,
    /// The most descriptors in a chain.
    pub(in crate::virtio) limit: u16,
    /// Whether VIRTIO_F_INDIRECT_DESC was negotiated.
    pub(in crate::virtio) indirect: bool,
}

impl ChainRules {
    /// Fills `chain` with the chain that begins at `head`, which is below `entries`.
    ///
    /// # Errors
    /// The chain has a head then, and where the end of the chain could be found and the last
    /// byte is a writable one, that byte as its status; no buffers.
    pub(in crate::virtio) fn parse(
        &self,
        ram: &Ram,
        head: u16,
        chain: &mut Chain,
    ) -> Result<(), ChainError> {
        chain.begin(ram, head);
        let mut walk = Walk { ram, chain, flaw: None };
        let walked = self.walk(&mut walk, head);
        let flaw = walk.flaw;
        let result = walked.and(flaw.map_or(Ok(()), Err));
        if walked.is_err() {
            chain.status = None;
        }
        if result.is_err() {
            chain.readable.clear();
            chain.writable.clear();
        } else {
            chain.status = None;
        }
        result
    }

    /// Follows the chain to its end; an error when that is not to be found.
    fn walk(&self, walk: &mut Walk<'_>, head: u16) -> Result<(), ChainError> {
        let ram = walk.ram;
        let mut table = table_at(ram, self.table, u32::from(self.entries) * DESCRIPTOR_BYTES)?;
        let mut entries = u32::from(self.entries);
        let mut indirect = false;
        let mut index = head;
        let mut count = 0u16;
        loop {
            let offset = usize::from(index) * DESCRIPTOR_BYTES as usize;
            if !indirect {
                walk.chain.descriptors += 1;
            }
            let descriptor = table
                .get_ref::<Descriptor>(offset)
                .map_err(|_| ChainError::NextOutsideTable { index, entries })?
                .load();
            if descriptor.flags() & F_INDIRECT != 0 {
                self.check_indirect(&descriptor, indirect)?;
                table = table_at(ram, descriptor.addr(), descriptor.len())?;
                entries = descriptor.len() / DESCRIPTOR_BYTES;
                indirect = true;
                index = 0;
                continue;
            }
            if count == self.limit {
                return Err(ChainError::TooLong { limit: self.limit });
            }
            count += 1;
            walk.take(&descriptor);
            if descriptor.flags() & F_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    fn check_indirect(&self, descriptor: &Descriptor, nested: bool) -> Result<(), ChainError> {
        let len = descriptor.len();
        if !self.indirect {
            Err(ChainError::IndirectNotNegotiated)
        } else if nested {
            Err(ChainError::NestedIndirect)
        } else if descriptor.flags() & F_NEXT != 0 {
            Err(ChainError::IndirectWithNext)
        } else if len == 0 || !len.is_multiple_of(DESCRIPTOR_BYTES) {
            Err(ChainError::IndirectLength { len })
        } else {
            Ok(())
        }
    }
}

impl Chain {
    /// Fills the chain with the one at `head` if `descriptor` is all of it and without a flaw, as a
    /// network's buffers for frames are; false otherwise, for [`ChainRules::parse`] to tell what it is.
    pub(in crate::virtio) fn fill_with_one(
        &mut self,
        ram: &Ram,
        head: u16,
        descriptor: &Descriptor,
    ) -> bool {
        let (len, flags) = (descriptor.len(), descriptor.flags());
        if len == 0 || flags & (F_NEXT | F_INDIRECT) != 0 {
            return false;
        }
        let Some(start) = ram.find(descriptor.addr().0, len as usize) else { return false };
        self.begin(ram, head);
        self.descriptors = 1;
        let buffers = if flags & F_WRITE != 0 { &mut self.writable } else { &mut self.readable };
        buffers.push(start, len as usize);
        true
    }

    /// Empties the chain, to be filled with the one at `head`.
    fn begin(&mut self, ram: &Ram, head: u16) {
        self.release();
        if !self.memory.as_ref().is_some_and(|known| Arc::ptr_eq(known, ram.memory())) {
            self.memory = Some(ram.memory().clone());
        }
        self.head = Some(head);
    }
}

/// A table of descriptors within one region of RAM.
fn table_at(ram: &Ram, address: GuestAddress, len: u32) -> Result<VolatileSlice<'_>, ChainError> {
    let bytes = len as usize;
    let outside = ChainError::OutsideMemory { address: address.0, len };
    let start = ram.find(address.0, bytes).ok_or(outside)?;
    // SAFETY: these are so many bytes of guest RAM, which `ram` keeps mapped.
    Ok(unsafe { VolatileSlice::new(start, bytes) })
}

/// A chain as far as it was followed.
struct Walk<'a> {
    ram: &'a Ram,
    chain: &'a mut Chain,
    /// The first flaw that does not hide the chain's end.
    flaw: Option<ChainError>,
}

impl Walk<'_> {
    /// Adds the buffer of `descriptor`.
    fn take(&mut self, descriptor: &Descriptor) {
        let writable = descriptor.flags() & F_WRITE != 0;
        self.chain.status = None;
        let flaw = match self.add(descriptor, writable) {
            Err(flaw) => Some(flaw),
            Ok(()) if !writable && self.chain.writable.bytes > 0 => {
                Some(ChainError::ReadableAfterWritable)
            }
            Ok(()) if self.chain.readable.bytes + self.chain.writable.bytes > MAX_CHAIN_BYTES => {
                Some(ChainError::TooManyBytes)
            }
            Ok(()) => None,
        };
        self.flaw = self.flaw.or(flaw);
    }

    fn add(&mut self, descriptor: &Descriptor, writable: bool) -> Result<(), ChainError> {
        let (address, len) = (descriptor.addr(), descriptor.len());
        if len == 0 {
            return Err(ChainError::ZeroLength);
        }
        let buffers = if writable { &mut self.chain.writable } else { &mut self.chain.readable };
        match self.ram.find(address.0, len as usize) {
            Some(start) => buffers.push(start, len as usize),
            // Ranges may adjoin.
            None => {
                for slice in self.ram.memory().get_slices(address, len as usize) {
                    let outside = |_| ChainError::OutsideMemory { address: address.0, len };
                    let slice = slice.map_err(outside)?;
                    buffers.push(slice.ptr_guard_mut().as_ptr(), slice.len());
                }
            }
        }
        if writable {
            let last = buffers.iovecs.last();
            self.chain.status =
                last.map(|piece| piece.iov_base.cast::<u8>().wrapping_add(piece.iov_len - 1));
        }
        Ok(())
    }
}
