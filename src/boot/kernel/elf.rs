//! ELF vmlinux (System V ABI, "Object Files" and "Program Loading").
//!
//! Parsed here and not by linux-loader: its loader takes the segments one by one as they come, so
//! it has written some before it finds a bad one, does not see overlaps, accepts any machine, and
//! follows a note chain of any length.

use std::mem::{offset_of, size_of};

use libc::{Elf64_Ehdr, Elf64_Phdr};

use super::super::image::{ImageFile, array_at};
use super::{KernelEntry, KernelError, LoadedKernel, fits_low_ram};
use crate::memory::GuestRam;
use crate::memory::layout::HIGH_MEMORY_START;

/// e_ident\[EI_MAG0..=EI_MAG3\].
const ELFMAG: &[u8] = b"\x7fELF";
/// e_machine of LoongArch, which libc does not have.
const EM_LOONGARCH: u16 = 258;
/// Xen's public/elfnote.h: the 32-bit physical address of the PVH entry.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const XEN_NOTE_NAME: &[u8] = b"Xen\0";
/// n_namesz, n_descsz and n_type, four bytes each.
const NOTE_HEADER_BYTES: usize = 12;
/// The notes of a distribution kernel take less than 1 KiB.
const NOTES_LIMIT_BYTES: u64 = 64 << 10;

/// A PT_LOAD or PT_NOTE program header.
struct Segment {
    index: usize,
    /// p_offset.
    offset: u64,
    /// p_paddr.
    start: u64,
    /// p_filesz.
    file_bytes: u64,
    /// p_memsz.
    memory_bytes: u64,
    /// p_align.
    align: u64,
}

impl Segment {
    /// The address after the last. Only for segments that were checked to lie in RAM.
    fn end(&self) -> u64 {
        self.start + self.memory_bytes
    }
}

/// What the program headers say.
#[derive(Default)]
struct Segments {
    /// By ascending address once checked.
    load: Vec<Segment>,
    notes: Vec<Segment>,
}

/// Whether the file starts as ELF files do.
pub(super) fn is_elf(head: &[u8]) -> bool {
    head.starts_with(ELFMAG)
}

/// Loads an ELF kernel whose first bytes are `head`.
pub(super) fn load(
    ram: &GuestRam,
    image: &ImageFile<'_>,
    head: &[u8],
) -> Result<LoadedKernel, KernelError> {
    check_ident(image, head)?;
    let Segments { mut load, notes } = read_segments(image, head)?;
    check_segments(ram, image, &mut load)?;
    let entry = match find_pvh_entry(image, &notes)? {
        Some(rip) => KernelEntry::Pvh { rip: rip.into() },
        None => KernelEntry::Linux64 { rip: read_u64(head, offset_of!(Elf64_Ehdr, e_entry)) },
    };
    let (KernelEntry::Pvh { rip } | KernelEntry::Linux64 { rip }) = entry;
    // The entry must be code that comes from the file, not .bss.
    if !load.iter().any(|s| (s.start..s.start + s.file_bytes).contains(&rip)) {
        return Err(KernelError::EntryOutside { address: rip });
    }
    for segment in &load {
        image.read_into(ram, segment.start, segment.offset, segment.file_bytes)?;
    }
    let (Some(first), Some(last)) = (load.first(), load.last()) else {
        return Err(KernelError::NoSegments);
    };
    Ok(LoadedKernel { entry, start: first.start, end: last.end(), setup_header: None })
}

/// The name of a processor by its e_machine value, for the machines that Linux runs on.
pub(super) fn machine_name(machine: u16) -> String {
    let name = match machine {
        libc::EM_386 => "32-bit x86",
        libc::EM_AARCH64 => "AArch64",
        libc::EM_ARM => "32-bit ARM",
        libc::EM_RISCV => "RISC-V",
        libc::EM_PPC64 => "64-bit PowerPC",
        libc::EM_PPC => "PowerPC",
        libc::EM_S390 => "S/390",
        libc::EM_MIPS => "MIPS",
        libc::EM_SPARCV9 => "SPARC V9",
        EM_LOONGARCH => "LoongArch",
        other => return format!("machine {other}"),
    };
    name.to_owned()
}

/// Checks what makes an ELF file an x86-64 executable, the most telling difference first.
fn check_ident(image: &ImageFile<'_>, head: &[u8]) -> Result<(), KernelError> {
    image.check_range(0, size_of::<Elf64_Ehdr>() as u64)?;
    if head[libc::EI_CLASS] == libc::ELFCLASS32 {
        return Err(KernelError::Elf32Bit);
    }
    if head[libc::EI_DATA] == libc::ELFDATA2MSB {
        return Err(KernelError::ElfBigEndian);
    }
    let malformed = |field, value| Err(KernelError::ElfHeader { field, value });
    if head[libc::EI_CLASS] != libc::ELFCLASS64 {
        return malformed("EI_CLASS", head[libc::EI_CLASS].into());
    }
    if head[libc::EI_DATA] != libc::ELFDATA2LSB {
        return malformed("EI_DATA", head[libc::EI_DATA].into());
    }
    let machine = read_u16(head, offset_of!(Elf64_Ehdr, e_machine));
    if machine != libc::EM_X86_64 {
        return Err(KernelError::ElfMachine { machine });
    }
    // A position-independent kernel is ET_DYN; it is loaded at its p_paddr all the same.
    let elf_type = read_u16(head, offset_of!(Elf64_Ehdr, e_type));
    if elf_type != libc::ET_EXEC && elf_type != libc::ET_DYN {
        return Err(KernelError::ElfType { elf_type });
    }
    Ok(())
}

/// Reads the program headers, from `head` where they lie in it.
fn read_segments(image: &ImageFile<'_>, head: &[u8]) -> Result<Segments, KernelError> {
    const ENTRY_BYTES: usize = size_of::<Elf64_Phdr>();

    let entry_bytes = read_u16(head, offset_of!(Elf64_Ehdr, e_phentsize));
    let count = read_u16(head, offset_of!(Elf64_Ehdr, e_phnum));
    let offset = read_u64(head, offset_of!(Elf64_Ehdr, e_phoff));
    if count == 0 {
        return Err(KernelError::NoSegments);
    }
    if usize::from(entry_bytes) != ENTRY_BYTES {
        return Err(KernelError::ElfHeader { field: "e_phentsize", value: entry_bytes.into() });
    }
    let table_bytes = ENTRY_BYTES * usize::from(count);
    let end = image.check_range(offset, table_bytes as u64)?;
    let separate;
    let table = match head.get(offset as usize..end as usize) {
        Some(table) => table,
        None => {
            separate = image.read_vec(offset, table_bytes as u64)?;
            &separate
        }
    };

    let mut segments = Segments::default();
    for (index, header) in table.chunks_exact(ENTRY_BYTES).enumerate() {
        let segment = Segment {
            index,
            offset: read_u64(header, offset_of!(Elf64_Phdr, p_offset)),
            start: read_u64(header, offset_of!(Elf64_Phdr, p_paddr)),
            file_bytes: read_u64(header, offset_of!(Elf64_Phdr, p_filesz)),
            memory_bytes: read_u64(header, offset_of!(Elf64_Phdr, p_memsz)),
            align: read_u64(header, offset_of!(Elf64_Phdr, p_align)),
        };
        match read_u32(header, offset_of!(Elf64_Phdr, p_type)) {
            libc::PT_LOAD if segment.memory_bytes > 0 || segment.file_bytes > 0 => {
                segments.load.push(segment);
            }
            libc::PT_NOTE if segment.file_bytes > 0 => segments.notes.push(segment),
            libc::PT_INTERP => return Err(KernelError::ElfInterpreter),
            _ => {}
        }
    }
    if segments.load.is_empty() {
        return Err(KernelError::NoSegments);
    }
    Ok(segments)
}

/// Checks that the segments lie in the file and in low RAM and apart from each other, and sorts
/// them by address.
fn check_segments(
    ram: &GuestRam,
    image: &ImageFile<'_>,
    load: &mut [Segment],
) -> Result<(), KernelError> {
    let kernel_end = load.iter().map(|s| s.start.saturating_add(s.memory_bytes)).max().unwrap_or(0);
    for segment in load.iter() {
        let &Segment { index, start, file_bytes, memory_bytes, .. } = segment;
        if file_bytes > memory_bytes {
            return Err(KernelError::SegmentSize { index, file_bytes, memory_bytes });
        }
        if start < HIGH_MEMORY_START {
            return Err(KernelError::SegmentTooLow { index, start });
        }
        if !fits_low_ram(ram, start, memory_bytes) {
            let size_bytes = memory_bytes;
            return Err(KernelError::SegmentOutsideRam { index, start, size_bytes, kernel_end });
        }
        image.check_range(segment.offset, file_bytes)?;
    }
    load.sort_unstable_by_key(|segment| segment.start);
    for pair in load.windows(2) {
        let [first, second] = pair else { continue };
        if first.end() > second.start {
            return Err(KernelError::SegmentsOverlap {
                first: first.index,
                second: second.index,
                address: second.start,
            });
        }
    }
    Ok(())
}

/// Looks for the PVH entry in the note segments.
fn find_pvh_entry(image: &ImageFile<'_>, notes: &[Segment]) -> Result<Option<u32>, KernelError> {
    let size_bytes = notes.iter().fold(0, |sum: u64, note| sum.saturating_add(note.file_bytes));
    if size_bytes > NOTES_LIMIT_BYTES {
        let limit_bytes = NOTES_LIMIT_BYTES;
        return Err(KernelError::TooManyNotes { size_bytes, limit_bytes });
    }
    for segment in notes {
        let bytes = image.read_vec(segment.offset, segment.file_bytes)?;
        // Linux pads notes to 4 bytes whatever p_align is; the gABI wants 8 in a 64-bit file.
        let by_4 = pvh_entry_in(&bytes, 4);
        let found = if segment.align == 8 && !matches!(by_4, Ok(Some(_))) {
            pvh_entry_in(&bytes, 8).or(by_4)
        } else {
            by_4
        };
        if let Some(rip) = found? {
            return Ok(Some(rip));
        }
    }
    Ok(None)
}

/// Walks a chain of notes whose descriptors and ends are padded to `align` bytes.
fn pvh_entry_in(mut notes: &[u8], align: usize) -> Result<Option<u32>, KernelError> {
    while let Some((header, rest)) = notes.split_first_chunk::<NOTE_HEADER_BYTES>() {
        let name_bytes = read_u32(header, 0) as usize;
        let descriptor_bytes = read_u32(header, 4) as usize;
        let note_type = read_u32(header, 8);
        // Once a slice is there, its length is below NOTES_LIMIT_BYTES, and sums do not overflow.
        let name = rest.get(..name_bytes).ok_or(KernelError::PvhNote)?;
        let at = (NOTE_HEADER_BYTES + name_bytes).next_multiple_of(align);
        let tail = notes.get(at..).unwrap_or_default();
        let descriptor = tail.get(..descriptor_bytes).ok_or(KernelError::PvhNote)?;
        if note_type == XEN_ELFNOTE_PHYS32_ENTRY && name == XEN_NOTE_NAME {
            return read_entry(descriptor).map(Some);
        }
        notes = tail.get(descriptor_bytes.next_multiple_of(align)..).unwrap_or_default();
    }
    Ok(None)
}

/// The address in a PVH note: 4 bytes, or 8 of which the upper 4 are zero.
fn read_entry(descriptor: &[u8]) -> Result<u32, KernelError> {
    if let Some(bytes) = array_at(descriptor, 0) {
        u32::try_from(u64::from_le_bytes(bytes)).map_err(|_| KernelError::PvhNote)
    } else {
        array_at(descriptor, 0).map(u32::from_le_bytes).ok_or(KernelError::PvhNote)
    }
}

// Fields of headers whose length was checked; what is not there reads as zero.

fn read_u16(bytes: &[u8], offset: usize) -> u16 {
    array_at(bytes, offset).map_or(0, u16::from_le_bytes)
}

fn read_u32(bytes: &[u8], offset: usize) -> u32 {
    array_at(bytes, offset).map_or(0, u32::from_le_bytes)
}

fn read_u64(bytes: &[u8], offset: usize) -> u64 {
    array_at(bytes, offset).map_or(0, u64::from_le_bytes)
}
