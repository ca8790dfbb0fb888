//! bzImage (Documentation/arch/x86/boot.rst).
//!
//! The setup header's layout is linux-loader's; its loader is not used: it does not know the 64-bit
//! entry, init_size or pref_address, and takes what follows the image (a signature) for a part of
//! it.

use std::fs::File;
use std::mem::offset_of;

use linux_loader::loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, boot_params, setup_header};
use vm_memory::ByteValued;

use super::super::image::{ImageFile, array_at};
use super::{KernelEntry, KernelError, LoadedKernel, fits_low_ram, payload};
use crate::memory::GuestRam;
use crate::memory::layout::HIGH_MEMORY_START;

/// Offset of the setup header in the file, the same as in the zero page.
const HEADER_OFFSET: usize = offset_of!(boot_params, hdr);
const BOOT_FLAG_OFFSET: usize = HEADER_OFFSET + offset_of!(setup_header, boot_flag);
const MAGIC_OFFSET: usize = HEADER_OFFSET + offset_of!(setup_header, header);
/// The displacement of the `jump` instruction, which tells where the header ends.
const JUMP_DISPLACEMENT_OFFSET: usize = HEADER_OFFSET + offset_of!(setup_header, jump) + 1;

/// `boot_flag`.
pub(in crate::boot) const BOOT_FLAG: u16 = 0xaa55;
/// `header`.
pub(in crate::boot) const MAGIC: [u8; 4] = *b"HdrS";
/// Boot protocol 2.12, the first with `xloadflags`.
const MIN_VERSION: u16 = 0x020c;
const SECTOR_BYTES: u64 = 512;
/// "If setup_sects is 0, the real value is 4."
const DEFAULT_SETUP_SECTS: u8 = 4;
/// `syssize` counts paragraphs.
const PARAGRAPH_BYTES: u64 = 16;
/// "64-bit Boot Protocol": the entry is at this offset of the loaded kernel.
const ENTRY_64_OFFSET: u64 = 0x200;

/// Whether the file starts as bzImages do.
pub(super) fn is_bzimage(head: &[u8]) -> bool {
    array_at(head, BOOT_FLAG_OFFSET) == Some(BOOT_FLAG.to_le_bytes())
        && array_at(head, MAGIC_OFFSET) == Some(MAGIC)
}

/// Loads a bzImage whose first bytes are `head`.
pub(super) fn load(
    ram: &GuestRam,
    image: &ImageFile<'_>,
    head: &[u8],
) -> Result<LoadedKernel, KernelError> {
    let mut header = read_header(head);
    check_protocol(&header)?;
    let setup_bytes = setup_bytes(&header);
    let kernel_bytes = u64::from(header.syssize) * PARAGRAPH_BYTES;
    image.check_range(setup_bytes, kernel_bytes)?;

    let start = header.pref_address;
    let size_bytes = check_place(ram, &header, kernel_bytes)?;
    if kernel_bytes <= ENTRY_64_OFFSET {
        return Err(KernelError::EntryOutside { address: start + ENTRY_64_OFFSET });
    }
    image.read_into(ram, start, setup_bytes, kernel_bytes)?;
    // Low RAM ends below 4 GiB.
    header.code32_start = start as u32;
    Ok(LoadedKernel {
        entry: KernelEntry::Linux64 { rip: start + ENTRY_64_OFFSET },
        start,
        end: start + size_bytes,
        setup_header: Some(header),
    })
}

/// The kernel inside, where its compression is known; see [`payload::unpack`].
pub(super) fn unpack(
    ram: &GuestRam,
    image: &ImageFile<'_>,
    head: &[u8],
) -> Result<Option<File>, KernelError> {
    let header = read_header(head);
    check_protocol(&header)?;
    payload::unpack(image, &header, setup_bytes(&header), ram.low_end())
}

/// Where the protected-mode kernel starts in the file: after the boot sector and `setup_sects` more.
fn setup_bytes(header: &setup_header) -> u64 {
    let setup_sects = match header.setup_sects {
        0 => DEFAULT_SETUP_SECTS,
        sectors => sectors,
    };
    (u64::from(setup_sects) + 1) * SECTOR_BYTES
}

/// Takes as much of the header as the file says it has and alcove knows; the rest stays zero.
fn read_header(head: &[u8]) -> setup_header {
    let mut header = setup_header::default();
    let displacement = head.get(JUMP_DISPLACEMENT_OFFSET).copied().unwrap_or(0);
    let end = JUMP_DISPLACEMENT_OFFSET + 1 + usize::from(displacement);
    let there = head.get(HEADER_OFFSET..end.min(head.len())).unwrap_or_default();
    for (field, byte) in header.as_mut_slice().iter_mut().zip(there) {
        *field = *byte;
    }
    header
}

/// Checks that the kernel has the entry that alcove uses.
fn check_protocol(header: &setup_header) -> Result<(), KernelError> {
    let version = header.version;
    if version < MIN_VERSION {
        return Err(KernelError::BzImageVersion { version });
    }
    if header.loadflags & LOADED_HIGH == 0 {
        let value = header.loadflags.into();
        return Err(KernelError::BzImageHeader { field: "loadflags", value });
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::BzImage32Bit);
    }
    Ok(())
}

/// Checks that the kernel can be loaded at its preferred address and run there, and returns how
/// many bytes from there on it uses.
///
/// There is no second choice: a kernel loaded lower moves itself up to that address, and low RAM
/// below it stays free for an initrd.
fn check_place(
    ram: &GuestRam,
    header: &setup_header,
    kernel_bytes: u64,
) -> Result<u64, KernelError> {
    let start = header.pref_address;
    let alignment = header.kernel_alignment;
    if header.relocatable_kernel != 0 {
        if !alignment.is_power_of_two() {
            let value = alignment.into();
            return Err(KernelError::BzImageHeader { field: "kernel_alignment", value });
        }
        if !start.is_multiple_of(alignment.into()) {
            return Err(KernelError::BzImageHeader { field: "pref_address", value: start });
        }
    }
    if start < HIGH_MEMORY_START {
        return Err(KernelError::BzImageHeader { field: "pref_address", value: start });
    }
    let size_bytes = kernel_bytes.max(header.init_size.into());
    if !fits_low_ram(ram, start, size_bytes) {
        return Err(KernelError::BzImageOutsideRam { start, size_bytes });
    }
    Ok(size_bytes)
}
