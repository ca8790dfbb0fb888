//! The range map that routes a guest's port or MMIO access to a device.

use std::sync::Arc;

/// A device that answers accesses within an address range.
///
/// Called from vCPU threads, several at a time: a device locks what it must inside. Neither method
/// may panic for any offset, width or value; what a chip does not decode reads as all ones and
/// ignores writes.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what the guest reads at `offset` bytes into the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes what the guest writes at `offset` bytes into the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a range could not be added to a [`Bus`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or ends past the address space.
    #[error("range {base:#x}+{len:#x} is empty or wraps")]
    BadRange {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Another device already answers there.
    #[error("range {base:#x}+{len:#x} overlaps another device")]
    Overlap {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
}

struct Entry {
    base: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// A map of address ranges to devices, filled before the first vCPU runs and only read after, so
/// that a look-up takes no lock. One instance serves ports, one serves MMIO.
#[derive(Default)]
pub struct Bus {
    /// Sorted by base, without overlaps.
    entries: Vec<Entry>,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Routes `base..base + len` to `device`.
    ///
    /// # Errors
    /// The range is empty, ends past 2^64 - 1 (exclusive), or overlaps one that is there; the bus
    /// is then unchanged.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        let end =
            base.checked_add(len).filter(|_| len > 0).ok_or(BusError::BadRange { base, len })?;
        let at = self.entries.partition_point(|e| e.base < base);
        let before = at.checked_sub(1).and_then(|i| self.entries.get(i));
        let clash = before.is_some_and(|e| e.base + e.len > base)
            || self.entries.get(at).is_some_and(|e| e.base < end);
        if clash {
            return Err(BusError::Overlap { base, len });
        }
        self.entries.insert(at, Entry { base, len, device });
        Ok(())
    }

    /// Reads `data.len()` bytes at `address`. Where no single device answers the whole access,
    /// `data` becomes all ones and the result is false.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((entry, offset)) => {
                entry.device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes `data` at `address`; false, and nothing written, where no single device answers the
    /// whole access.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((entry, offset)) => {
                entry.device.write(offset, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, address: u64, width: usize) -> Option<(&Entry, u64)> {
        let at = self.entries.partition_point(|e| e.base <= address).checked_sub(1)?;
        let entry = self.entries.get(at)?;
        let offset = address - entry.base;
        let end = offset.checked_add(width as u64)?;
        (end <= entry.len).then_some((entry, offset))
    }
}

#[cfg(test)]
mod tests;
