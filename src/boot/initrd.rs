//! Loads an initial RAM disk or initramfs.

#[cfg(test)]
mod tests;

use std::fs::File;

use super::image::{ImageError, ImageFile};
use super::kernel::LoadedKernel;
use crate::memory::GuestRam;
use crate::memory::layout::PAGE_BYTES;

/// Why a file cannot be loaded as an initrd. The messages are about "it", the file that the caller
/// names.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InitrdError {
    /// The file is no image at all, or cannot be read. An empty file is refused: it is what a
    /// failed build leaves, and a guest without initrd is had by leaving the flag out.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// No room between the kernel and the end of low RAM.
    #[error(
        "it has {} KiB, but beside the kernel there is room for {} KiB; give the guest more with \
         --memory",
        size_bytes.div_ceil(1024), room_bytes / 1024
    )]
    TooLarge {
        /// The size of the file.
        size_bytes: u64,
        /// The largest size that fits.
        room_bytes: u64,
    },
}

/// An initrd in guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initrd {
    /// Its first guest physical address; page aligned.
    pub address: u64,
    /// Its length.
    pub size_bytes: u64,
}

/// Loads the initrd in `file` as high in low RAM as the kernel allows (`initrd_addr_max` of a
/// bzImage), clear of the kernel and the area it runs in.
///
/// `file` must be a regular file; its position is moved.
pub fn load(ram: &GuestRam, file: &File, kernel: &LoadedKernel) -> Result<Initrd, InitrdError> {
    let image = ImageFile::new(file)?;
    let size_bytes = image.size_bytes();
    // initrd_addr_max is the last address that a byte of it may have.
    let address_limit =
        kernel.setup_header.map_or(u64::MAX, |header| u64::from(header.initrd_addr_max) + 1);
    let top = ram.low_end().min(address_limit);
    let floor = kernel.end.next_multiple_of(PAGE_BYTES);
    let address = top
        .checked_sub(size_bytes)
        .map(|address| address - address % PAGE_BYTES)
        .filter(|address| *address >= floor)
        .ok_or(InitrdError::TooLarge { size_bytes, room_bytes: top.saturating_sub(floor) })?;
    image.read_into(ram, address, 0, size_bytes)?;
    Ok(Initrd { address, size_bytes })
}
