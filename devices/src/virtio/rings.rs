//! The parts of a split virtqueue (virtio 1.2 §2.7.5 to §2.7.10), in this process's memory.
//!
//! They are found once, when the queue is set up: every request touches them several times. Each access
//! is an atomic one, since the driver's are at the same time.
#![expect(unsafe_code, reason = "atomic accesses to guest memory through host pointers")]

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use virtio_queue::desc::split::Descriptor;

use super::device::Memory;
use super::ram::Ram;

/// Bytes of the rings beside their entries: flags, idx and the event index.
pub(super) const META_BYTES: usize = 6;
/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: usize = 16;
/// Bytes of an entry of the available ring.
pub(super) const AVAIL_ENTRY_BYTES: usize = 2;
/// Bytes of an entry of the used ring.
pub(super) const USED_ENTRY_BYTES: usize = 8;
/// Where the flags lie in a ring.
const FLAGS: usize = 0;
/// Where the index lies.
const IDX: usize = 2;
/// Where the entries begin.
const ENTRIES: usize = 4;

/// The table and the rings of a queue of `size` entries.
#[derive(Debug)]
pub(super) struct Rings {
    table: *mut u8,
    avail: *mut u8,
    used: *mut u8,
    size: u16,
    /// Keeps mapped what the pointers lead to.
    _memory: Memory,
}

// SAFETY: the pointers lead into mappings that `_memory` keeps, which any thread may access.
unsafe impl Send for Rings {}

impl Rings {
    /// The parts of a queue at `table`, `avail` and `used`, guest physical addresses aligned as §2.7
    /// demands; `None` if one is not, or not whole, in one range of guest RAM. `size` is a power of two.
    pub fn new(ram: &Ram, table: u64, avail: u64, used: u64, size: u16) -> Option<Self> {
        debug_assert!(size.is_power_of_two());
        let entries = usize::from(size);
        let find = |address: u64, align: usize, bytes: usize| {
            let start = ram.find(address, bytes)?;
            start.addr().is_multiple_of(align).then_some(start)
        };
        let table = find(table, 16, DESCRIPTOR_BYTES * entries)?;
        let avail = find(avail, 2, META_BYTES + AVAIL_ENTRY_BYTES * entries)?;
        let used = find(used, 4, META_BYTES + USED_ENTRY_BYTES * entries)?;
        Some(Self { table, avail, used, size, _memory: ram.memory().clone() })
    }

    /// The descriptor at `index`, below the queue's size, as it is now.
    pub fn descriptor(&self, index: u16) -> Descriptor {
        let half = |offset| {
            let at = DESCRIPTOR_BYTES * usize::from(self.entry(index)) + offset;
            // SAFETY: the table was found to be whole and aligned to 16 bytes, `entry` is below its size,
            // and the offsets are those of the two halves of a descriptor.
            let half = unsafe { AtomicU64::from_ptr(self.table.wrapping_add(at).cast()) };
            u64::from_le(half.load(Ordering::Relaxed))
        };
        let (address, rest) = (half(0), half(size_of::<u64>()));
        Descriptor::new(address, rest as u32, (rest >> 32) as u16, (rest >> 48) as u16)
    }

    /// Where the driver puts its next chain.
    pub fn avail_index(&self) -> u16 {
        self.avail(IDX).load(Ordering::Acquire).to_le()
    }

    /// The head that the driver put at `index`.
    pub fn avail_head(&self, index: u16) -> u16 {
        let entry = AVAIL_ENTRY_BYTES * usize::from(self.entry(index));
        self.avail(ENTRIES + entry).load(Ordering::Relaxed).to_le()
    }

    /// VIRTQ_AVAIL_F_NO_INTERRUPT or 0.
    pub fn avail_flags(&self) -> u16 {
        self.avail(FLAGS).load(Ordering::Relaxed).to_le()
    }

    /// Past which entry of the used ring the driver wants an interrupt (VIRTIO_F_EVENT_IDX).
    pub fn used_event(&self) -> u16 {
        let end = ENTRIES + AVAIL_ENTRY_BYTES * usize::from(self.size);
        self.avail(end).load(Ordering::Relaxed).to_le()
    }

    /// VIRTQ_USED_F_NO_NOTIFY or 0.
    pub fn set_used_flags(&self, flags: u16) {
        self.used(FLAGS).store(flags.to_le(), Ordering::Relaxed);
    }

    /// At which entry of the available ring the device wants a kick (VIRTIO_F_EVENT_IDX).
    pub fn set_avail_event(&self, index: u16) {
        let end = ENTRIES + USED_ENTRY_BYTES * usize::from(self.size);
        self.used(end).store(index.to_le(), Ordering::Relaxed);
    }

    /// Writes the used entry at `index`, which the driver does not look at before
    /// [`Rings::set_used_index`].
    pub fn write_used(&self, index: u16, head: u16, written: u32) {
        let at = ENTRIES + USED_ENTRY_BYTES * usize::from(self.entry(index));
        for (offset, value) in [(at, u32::from(head)), (at + size_of::<u32>(), written)] {
            // SAFETY: the ring was found to be whole, `entry` is below its size, and the start of an
            // entry is aligned as the ring is, to four bytes.
            let word = unsafe { AtomicU32::from_ptr(self.used.wrapping_add(offset).cast()) };
            word.store(value.to_le(), Ordering::Relaxed);
        }
    }

    /// Shows the driver the used entries before `index`.
    pub fn set_used_index(&self, index: u16) {
        self.used(IDX).store(index.to_le(), Ordering::Release);
    }

    fn entry(&self, index: u16) -> u16 {
        index & (self.size - 1)
    }

    /// The two bytes at `offset` of the available ring.
    fn avail(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset < META_BYTES + AVAIL_ENTRY_BYTES * usize::from(self.size));
        // SAFETY: the ring was found to be whole and aligned to two bytes, and the offsets of this
        // file are even and within it.
        unsafe { AtomicU16::from_ptr(self.avail.wrapping_add(offset).cast()) }
    }

    /// The two bytes at `offset` of the used ring.
    fn used(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset < META_BYTES + USED_ENTRY_BYTES * usize::from(self.size));
        // SAFETY: as for the available ring.
        unsafe { AtomicU16::from_ptr(self.used.wrapping_add(offset).cast()) }
    }
}
