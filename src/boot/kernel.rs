//! Loads a Linux kernel: an ELF vmlinux or a bzImage, told apart by their magic numbers.

mod bzimage;
mod elf;
mod payload;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::File;

pub use linux_loader::loader::bootparam::setup_header;

pub(super) use bzimage::{BOOT_FLAG as SECTOR_BOOT_FLAG, MAGIC as HEADER_MAGIC};

use super::image::{ImageError, ImageFile};
use crate::memory::GuestRam;
use crate::memory::layout::{HIGH_MEMORY_START, LOW_RAM_LIMIT, MIB};

/// Why a file cannot be loaded as a kernel. The messages are about "it", the file that the caller
/// names.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The file is no image at all, is shorter than it says, or cannot be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Neither of the two formats.
    #[error("it is neither an ELF vmlinux nor a bzImage{}", Hint(*looks_like))]
    Unrecognized {
        /// What the file seems to be instead, if that is known.
        looks_like: Option<&'static str>,
    },
    /// A 32-bit ELF file.
    #[error("it is a 32-bit ELF file; alcove boots 64-bit kernels")]
    Elf32Bit,
    /// An ELF file of a big-endian machine.
    #[error("it is a big-endian ELF file; alcove boots x86-64 kernels")]
    ElfBigEndian,
    /// An ELF file for another processor.
    #[error("it is built for {}; alcove boots x86-64 kernels", elf::machine_name(*machine))]
    ElfMachine {
        /// e_machine.
        machine: u16,
    },
    /// An object file, a core dump or a kernel module.
    #[error(
        "it is an ELF file of type {elf_type}, not an executable (type 2); a kernel is called vmlinux"
    )]
    ElfType {
        /// e_type.
        elf_type: u16,
    },
    /// A program that asks for a dynamic linker.
    #[error("it is a program for user space, not a kernel")]
    ElfInterpreter,
    /// A header field with a value that the ELF specification does not allow.
    #[error("its ELF header is malformed: {field} is {value:#x}")]
    ElfHeader {
        /// The field's name in the specification.
        field: &'static str,
        /// What stands there.
        value: u64,
    },
    /// Nothing to load.
    #[error("it has no loadable segment")]
    NoSegments,
    /// A segment with more bytes in the file than in memory (p_filesz above p_memsz).
    #[error(
        "its segment {index} is malformed: {file_bytes:#x} bytes for {memory_bytes:#x} of memory"
    )]
    SegmentSize {
        /// Program header number, from 0.
        index: usize,
        /// p_filesz.
        file_bytes: u64,
        /// p_memsz.
        memory_bytes: u64,
    },
    /// A segment below [`HIGH_MEMORY_START`], where alcove and the firmware tables live.
    #[error("its segment {index} starts at {start:#x}, below the first MiB, which is not free")]
    SegmentTooLow {
        /// Program header number, from 0.
        index: usize,
        /// p_paddr.
        start: u64,
    },
    /// A segment that does not fit into low RAM.
    #[error("its segment {index} at {start:#x} with {size_bytes:#x} bytes lies outside the guest's \
             memory{}", Remedy(*kernel_end))]
    SegmentOutsideRam {
        /// Program header number, from 0.
        index: usize,
        /// p_paddr.
        start: u64,
        /// p_memsz.
        size_bytes: u64,
        /// The highest end of all segments: what low RAM must reach to.
        kernel_end: u64,
    },
    /// Two segments share memory.
    #[error("its segments {first} and {second} overlap at {address:#x}")]
    SegmentsOverlap {
        /// Program header number of the lower segment.
        first: usize,
        /// Program header number of the other.
        second: usize,
        /// The first address they share.
        address: u64,
    },
    /// The entry point lies in no segment, or outside the loaded part of a bzImage.
    #[error("its entry point {address:#x} lies outside its code")]
    EntryOutside {
        /// The entry point's physical address.
        address: u64,
    },
    /// The Xen note XEN_ELFNOTE_PHYS32_ENTRY, or the notes around it, are malformed.
    #[error("its PVH note is malformed")]
    PvhNote,
    /// More notes than a kernel has.
    #[error("it has {size_bytes} bytes of notes, at most {limit_bytes} are read")]
    TooManyNotes {
        /// What the note segments add up to.
        size_bytes: u64,
        /// What is read at most.
        limit_bytes: u64,
    },
    /// A bzImage older than boot protocol 2.12.
    #[error("it speaks boot protocol {}.{:02}, alcove needs 2.12 (Linux 3.8) or later", version >> 8, version & 0xff)]
    BzImageVersion {
        /// The header's `version`: major in the high byte.
        version: u16,
    },
    /// A bzImage without a 64-bit entry (XLF_KERNEL_64 is clear).
    #[error("it is a 32-bit bzImage; alcove boots 64-bit kernels")]
    BzImage32Bit,
    /// The compressed kernel in a bzImage cannot be unpacked.
    #[error("its compressed kernel is damaged: {cause}")]
    Payload {
        /// What is wrong with it.
        cause: String,
    },
    /// A setup header field with a value that the boot protocol does not allow.
    #[error("its setup header is malformed: {field} is {value:#x}")]
    BzImageHeader {
        /// The field's name in the boot protocol.
        field: &'static str,
        /// What stands there.
        value: u64,
    },
    /// A bzImage whose run area (init_size) does not fit into low RAM.
    #[error("it needs {size_bytes:#x} bytes at {start:#x} to unpack itself, which lies outside the \
             guest's memory{}", Remedy(start.saturating_add(*size_bytes)))]
    BzImageOutsideRam {
        /// Where it would be loaded.
        start: u64,
        /// The size of the run area.
        size_bytes: u64,
    },
}

impl KernelError {
    /// Whether the message says what to do; otherwise it takes another image.
    pub fn tells_remedy(&self) -> bool {
        matches!(
            self,
            Self::SegmentOutsideRam { .. }
                | Self::BzImageOutsideRam { .. }
                | Self::Image(ImageError::NotRegular)
        )
    }
}

/// How the first vCPU enters a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelEntry {
    /// 32-bit protected mode, paging off, EBX on `hvm_start_info` (Xen's PVH boot protocol).
    Pvh {
        /// Physical address of the first instruction.
        rip: u64,
    },
    /// 64-bit mode, identity page tables, RSI on the zero page (Documentation/arch/x86/boot.rst,
    /// "64-bit Boot Protocol").
    Linux64 {
        /// Physical address of the first instruction.
        rip: u64,
    },
}

/// A kernel in guest RAM.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadedKernel {
    /// Where and how it starts.
    pub entry: KernelEntry,
    /// The first address that belongs to it.
    pub start: u64,
    /// The address after the last that it uses before it reads the memory map: with .bss, or with
    /// the area that a bzImage unpacks itself in. Nothing may be placed from `start` to here.
    pub end: u64,
    /// The setup header of a bzImage, with `code32_start` set to where it was loaded.
    pub setup_header: Option<setup_header>,
}

impl LoadedKernel {
    /// COMMAND_LINE_SIZE of x86, which an ELF kernel does not tell: 2048 with the NUL.
    const COMMAND_LINE_SIZE: u32 = 2048;

    /// How many bytes the command line may have, without its NUL.
    pub fn cmdline_limit_bytes(&self) -> u32 {
        self.setup_header.map_or(Self::COMMAND_LINE_SIZE - 1, |header| header.cmdline_size)
    }
}

/// The first bytes of the file: enough for either header and, in every kernel known, for the
/// program headers.
const HEAD_BYTES: usize = 4096;

/// Loads the kernel in `file` into fresh guest RAM, all of it in low RAM above the first MiB.
///
/// ELF files are entered by their PVH note when they have one, else by the 64-bit boot protocol at
/// e_entry; bzImages by their 64-bit entry. `file` must be a regular file; its position is moved.
/// Everything is checked before guest RAM is written.
pub fn load(ram: &GuestRam, file: &File) -> Result<LoadedKernel, KernelError> {
    let image = ImageFile::new(file)?;
    let mut buffer = [0; HEAD_BYTES];
    let head = image.read_head(&mut buffer)?;
    if elf::is_elf(head) {
        elf::load(ram, &image, head)
    } else if bzimage::is_bzimage(head) {
        bzimage::load(ram, &image, head)
    } else {
        Err(KernelError::Unrecognized { looks_like: looks_like(head) })
    }
}

/// As [`load`], but a bzImage compressed by gzip, LZ4 or Zstandard is unpacked here, not by the guest,
/// and then loaded as the ELF file that was in it. For guests whose kernels are interpreted.
pub fn load_unpacked(ram: &GuestRam, file: &File) -> Result<LoadedKernel, KernelError> {
    let image = ImageFile::new(file)?;
    let mut buffer = [0; HEAD_BYTES];
    let head = image.read_head(&mut buffer)?;
    let unpacked = match bzimage::is_bzimage(head) {
        true => bzimage::unpack(ram, &image, head)?,
        false => None,
    };
    load(ram, unpacked.as_ref().unwrap_or(file))
}

/// Names common mistakes by their magic numbers.
fn looks_like(head: &[u8]) -> Option<&'static str> {
    /// Offset of `magic` in the header of Documentation/arch/arm64/booting.rst.
    const ARM64_MAGIC_OFFSET: usize = 56;
    const CPIO_NEWC: &[u8] = b"070701";
    const GZIP: &[u8] = b"\x1f\x8b";
    const XZ: &[u8] = b"\xfd7zXZ";
    const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";

    if head.get(ARM64_MAGIC_OFFSET..).is_some_and(|rest| rest.starts_with(b"ARM\x64")) {
        Some("an arm64 kernel")
    } else if head.starts_with(CPIO_NEWC) {
        Some("an initramfs, which goes to --initrd")
    } else if [GZIP, XZ, ZSTD].iter().any(|magic| head.starts_with(magic)) {
        Some("a compressed file; unpack it first")
    } else if head.starts_with(b"#!") {
        Some("a script")
    } else {
        None
    }
}

/// Prints what a file seems to be.
struct Hint(Option<&'static str>);

impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |name| write!(f, " (it looks like {name})"))
    }
}

/// Prints the least --memory whose low RAM reaches to an address, where there is one.
struct Remedy(u64);

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 > LOW_RAM_LIMIT {
            return Ok(());
        }
        write!(f, "; give it --memory {}M or more", self.0.div_ceil(MIB))
    }
}

/// Whether `start..start + size_bytes` lies in low RAM above the first MiB.
fn fits_low_ram(ram: &GuestRam, start: u64, size_bytes: u64) -> bool {
    start >= HIGH_MEMORY_START
        && start.checked_add(size_bytes).is_some_and(|end| end <= ram.low_end())
}
