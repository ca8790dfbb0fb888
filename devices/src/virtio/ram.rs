//! Guest RAM as memory of this process.
//!
//! Each buffer that a driver names is looked up, so a look-up is a few instructions: guests have one or
//! two ranges of RAM, which are kept side by side here.
#![expect(unsafe_code, reason = "says that host pointers may go to other threads")]

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::device::Memory;

/// Where guest RAM lies.
#[derive(Clone, Debug)]
pub(super) struct Ram {
    ranges: Box<[Range]>,
    memory: Memory,
}

/// A range of guest RAM that is one range here too.
#[derive(Clone, Debug)]
struct Range {
    /// Guest physical address.
    start: u64,
    bytes: u64,
    host: *mut u8,
}

// SAFETY: the pointers lead into mappings that `Ram::memory` keeps, which any thread may access.
unsafe impl Send for Range {}

impl Ram {
    /// That of `memory`.
    pub fn new(memory: &Memory) -> Self {
        let range = |region: &vm_memory::GuestRegionMmap| {
            let host = region.get_host_address(MemoryRegionAddress(0)).ok()?;
            Some(Range { start: region.start_addr().0, bytes: region.len(), host })
        };
        Self { ranges: memory.iter().filter_map(range).collect(), memory: memory.clone() }
    }

    /// Keeps mapped what [`Ram::find`] finds.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The host's address of `len` bytes of RAM at guest physical `address`; `None` if they are not, or
    /// not whole, in one range.
    pub fn find(&self, address: u64, len: usize) -> Option<*mut u8> {
        self.ranges.iter().find_map(|range| {
            let offset = address.wrapping_sub(range.start);
            let fits = offset < range.bytes && len as u64 <= range.bytes - offset;
            fits.then(|| range.host.wrapping_add(offset as usize))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::virtio::testing::{HOLE, LOW_RAM_BYTES, memory};

    proptest! {
        #[test]
        fn it_finds_what_vm_memory_finds(
            base in prop::sample::select(vec![0, LOW_RAM_BYTES, HOLE, 1 << 32, u64::MAX]),
            offset in -64i64..64,
            len in prop_oneof![0usize..130, Just(usize::MAX)],
        ) {
            let memory = memory();
            let address = base.wrapping_add_signed(offset);
            let expected = memory.get_slice(GuestAddress(address), len).ok();
            let expected = expected.map(|slice| slice.ptr_guard_mut().as_ptr());
            prop_assert_eq!(Ram::new(&memory).find(address, len), expected);
        }
    }
}
