use std::io::Write;

use proptest::prelude::*;

use super::*;
use crate::boot::testing::{BzImage, Elf, PT_INTERP, Segment, file, note, ram, read, read_bytes};
use crate::memory::layout::GIB;

/// Asserts that an expression is an error of a kind, and that its message is one line.
macro_rules! assert_refused {
    ($result:expr, $($pattern:tt)+) => {
        match $result {
            Err(error) => {
                assert!(matches!(error, $($pattern)+), "{error:?}");
                assert!(!error.to_string().contains('\n'), "{error}");
            }
            Ok(loaded) => panic!("loaded as {loaded:x?}"),
        }
    };
}

mod hostile;

const XEN_PHYS32_ENTRY: u32 = 18;

fn load_elf(elf: &Elf) -> Result<LoadedKernel, KernelError> {
    load(&ram(16), &elf.file())
}

fn load_bzimage(image: &BzImage) -> Result<LoadedKernel, KernelError> {
    load(&ram(16), &image.file())
}

#[test]
fn elf_without_pvh_note_is_entered_at_e_entry() {
    let ram = ram(16);
    let elf = Elf { entry: MIB + 2, ..Elf::small() };
    let kernel = load(&ram, &elf.file()).unwrap();
    assert_eq!(kernel.entry, KernelEntry::Linux64 { rip: MIB + 2 });
    assert_eq!((kernel.start, kernel.end), (MIB, MIB + 0x2004));
    assert_eq!((kernel.setup_header, kernel.cmdline_limit_bytes()), (None, 2047));
    assert_eq!(read_bytes(&ram, MIB - 1, 6), b"\0\xf4\xf4\xf4\xf4\0");
}

#[test]
fn elf_with_pvh_note_is_entered_there() {
    let entry = MIB as u32 + 3;
    let other = note(b"Linux\0", 257, b"x", 4);
    let xen_other = note(b"Xen\0", 17, &[0; 3], 4);
    for descriptor in [entry.to_le_bytes().to_vec(), u64::from(entry).to_le_bytes().to_vec()] {
        let pvh = note(b"Xen\0", XEN_PHYS32_ENTRY, &descriptor, 4);
        let notes = [other.clone(), xen_other.clone(), pvh].concat();
        let kernel = load_elf(&Elf::small().with(Segment::note(0x2000, &notes))).unwrap();
        assert_eq!(kernel.entry, KernelEntry::Pvh { rip: entry.into() });
    }
}

#[test]
fn pvh_note_is_found_in_any_note_segment_and_with_either_padding() {
    let pvh = |align| note(b"Xen\0", XEN_PHYS32_ENTRY, &(MIB as u32).to_le_bytes(), align);
    let other = |align| note(b"Linux\0", 257, &[1; 5], align);
    for align in [4, 8] {
        let first = Segment { align: 8, ..Segment::note(0x2000, &other(align)) };
        let notes = [other(align), pvh(align)].concat();
        let second = Segment { align: 8, ..Segment::note(0x3000, &notes) };
        let kernel = load_elf(&Elf::small().with(first).with(second)).unwrap();
        assert_eq!(kernel.entry, KernelEntry::Pvh { rip: MIB }, "padding {align}");
    }
}

#[test]
fn notes_of_the_same_number_by_others_are_not_pvh() {
    let notes = note(b"GNU\0", XEN_PHYS32_ENTRY, &[0xff; 8], 4);
    let kernel = load_elf(&Elf::small().with(Segment::note(0x2000, &notes))).unwrap();
    assert_eq!(kernel.entry, KernelEntry::Linux64 { rip: MIB });
}

#[test]
fn malformed_pvh_notes_are_refused() {
    let too_short = note(b"Xen\0", XEN_PHYS32_ENTRY, &[1; 3], 4);
    let too_high = note(b"Xen\0", XEN_PHYS32_ENTRY, &u64::MAX.to_le_bytes(), 4);
    let mut long_name = note(b"Xen\0", XEN_PHYS32_ENTRY, &[0; 4], 4);
    long_name[..4].fill(0xff);
    let mut long_descriptor = note(b"GNU\0", 1, &[0; 4], 4);
    long_descriptor[4..8].fill(0xff);
    for notes in [too_short, too_high, long_name, long_descriptor] {
        for align in [0, 4, 8, u64::MAX] {
            let segment = Segment { align, ..Segment::note(0x2000, &notes) };
            assert_refused!(load_elf(&Elf::small().with(segment)), KernelError::PvhNote);
        }
    }
}

#[test]
fn every_segment_lands_at_its_address_whatever_the_order() {
    let ram = ram(16);
    let elf = Elf::small()
        .with(Segment::load(0x4000, 4 * MIB, b"last", 0))
        .with(Segment::load(0x3000, 2 * MIB, b"middle", 6))
        .with(Segment::load(0x5000, 3 * MIB, b"", 0x1000));
    let kernel = load(&ram, &elf.file()).unwrap();
    assert_eq!((kernel.start, kernel.end), (MIB, 4 * MIB + 4));
    assert_eq!(read_bytes(&ram, 4 * MIB, 4), b"last");
    assert_eq!(read_bytes(&ram, 2 * MIB, 7), b"middle\0");
}

#[test]
fn program_headers_may_lie_far_into_the_file() {
    let ram = ram(16);
    let mut elf = Elf { phoff: 0x8000, ..Elf::small() };
    elf.segments[0].offset = 0x9000;
    load(&ram, &elf.file()).unwrap();
    assert_eq!(read_bytes(&ram, MIB, 4), [0xf4; 4]);
}

#[test]
fn a_segment_may_end_where_low_ram_ends_but_not_a_byte_later() {
    for (mebibytes, end) in [(16, 16 * MIB), (64, 64 * MIB), (3072, 3 * GIB), (8192, 3 * GIB)] {
        let at = |start| Elf::small().with(Segment::load(0x2000, start, b"x", 0xfff));
        let kernel = load(&ram(mebibytes), &at(end - 0x1000).file()).unwrap();
        assert_eq!(kernel.end, end);
        let refused = load(&ram(mebibytes), &at(end - 0xfff).file());
        assert_refused!(
            refused,
            KernelError::SegmentOutsideRam { index: 1, size_bytes: 0x1000, .. }
        );
    }
}

#[test]
fn the_remedy_for_little_memory_is_the_size_that_the_whole_kernel_needs() {
    let elf = Elf::small().with(Segment::load(0x2000, 20 * MIB, b"x", MIB)).with(Segment::load(
        0x3000,
        40 * MIB,
        b"x",
        0,
    ));
    let message = load_elf(&elf).unwrap_err().to_string();
    assert!(message.contains("segment 1"), "{message}");
    assert!(message.ends_with("; give it --memory 41M or more"), "{message}");
    load(&ram(41), &elf.file()).unwrap();
    let unreachable = Elf::small().with(Segment::load(0x2000, 3 * GIB, b"x", 0));
    let message = load_elf(&unreachable).unwrap_err().to_string();
    assert!(!message.contains("--memory"), "{message}");
}

#[test]
fn segments_that_wrap_are_outside_ram() {
    for (paddr, memsz) in [(u64::MAX, 4), (MIB, u64::MAX), (u64::MAX - 3, 4), (1 << 63, 1 << 63)] {
        let segment = Segment { memsz, ..Segment::load(0x2000, paddr, b"x", 0) };
        let refused = load_elf(&Elf::small().with(segment));
        assert_refused!(refused, KernelError::SegmentOutsideRam { index: 1, .. });
    }
}

#[test]
fn segments_below_1_mib_are_refused() {
    for paddr in [0, 0x7000, 0x2_0000, MIB - 1] {
        let refused = load_elf(&Elf::small().with(Segment::load(0x2000, paddr, b"x", 0)));
        assert_refused!(refused, KernelError::SegmentTooLow { index: 1, .. });
    }
}

#[test]
fn overlapping_segments_are_refused() {
    let second = |start| Elf::small().with(Segment::load(0x2000, start, b"x", 0));
    for start in [MIB, MIB + 1, MIB + 0x2003] {
        let refused = load_elf(&second(start));
        assert_refused!(refused, KernelError::SegmentsOverlap { address, .. } if address == start);
    }
    load_elf(&second(MIB + 0x2004)).unwrap();
}

#[test]
fn a_segment_with_more_in_the_file_than_in_memory_is_refused() {
    let segment = Segment { memsz: 3, ..Segment::load(0x2000, 2 * MIB, b"four", 0) };
    let refused = load_elf(&Elf::small().with(segment.clone()));
    assert_refused!(refused, KernelError::SegmentSize { index: 1, file_bytes: 4, memory_bytes: 3 });
    let refused = load_elf(&Elf::small().with(Segment { memsz: 0, ..segment }));
    assert_refused!(refused, KernelError::SegmentSize { memory_bytes: 0, .. });
}

#[test]
fn segments_and_headers_beyond_the_file_are_truncation() {
    let beyond = |offset, filesz| {
        let segment = Segment { filesz, memsz: MIB, ..Segment::load(offset, 2 * MIB, b"", 0) };
        Elf::small().with(segment)
    };
    for elf in [
        beyond(0x1004, 1),
        beyond(u64::MAX, 1),
        beyond(u64::MAX - 1, MIB),
        Elf { phnum: Some(u16::MAX), ..Elf::small() },
    ] {
        assert_refused!(load_elf(&elf), KernelError::Image(ImageError::Truncated { .. }));
    }
    let mut far = Elf::small().bytes();
    far[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
    let refused = load(&ram(16), &file(&far));
    assert_refused!(refused, KernelError::Image(ImageError::Truncated { .. }));
}

#[test]
fn an_elf_file_cut_anywhere_is_refused() {
    let whole = Elf::small().bytes();
    for len in 4..whole.len() {
        let refused = load(&ram(16), &file(&whole[..len]));
        assert_refused!(refused, KernelError::Image(ImageError::Truncated { .. }));
    }
}

#[test]
fn files_for_other_machines_are_named() {
    let refused = load_elf(&Elf { machine: 183, ..Elf::small() }).unwrap_err();
    assert!(matches!(refused, KernelError::ElfMachine { machine: 183 }));
    assert_eq!(refused.to_string(), "it is built for AArch64; alcove boots x86-64 kernels");
    assert_refused!(load_elf(&Elf { machine: 9, ..Elf::small() }), KernelError::ElfMachine { .. });
    assert_refused!(load_elf(&Elf { class: 1, ..Elf::small() }), KernelError::Elf32Bit);
    assert_refused!(load_elf(&Elf { data: 2, ..Elf::small() }), KernelError::ElfBigEndian);
}

#[test]
fn elf_files_that_are_no_kernels_are_refused() {
    for e_type in [0, 1, 4, 0xffff] {
        let refused = load_elf(&Elf { e_type, ..Elf::small() });
        assert_refused!(refused, KernelError::ElfType { elf_type } if elf_type == e_type);
    }
    load_elf(&Elf { e_type: 3, ..Elf::small() }).unwrap();
    let interpreter = Segment { p_type: PT_INTERP, ..Segment::load(0x2000, 0, b"/lib/ld.so", 0) };
    assert_refused!(load_elf(&Elf::small().with(interpreter)), KernelError::ElfInterpreter);
    let program = std::env::current_exe().unwrap();
    let refused = load(&ram(16), &File::open(program).unwrap());
    assert!(refused.is_err());
}

#[test]
fn malformed_elf_headers_are_refused() {
    for elf in [
        Elf { class: 0, ..Elf::small() },
        Elf { data: 7, ..Elf::small() },
        Elf { phentsize: 0, ..Elf::small() },
        Elf { phentsize: 57, ..Elf::small() },
    ] {
        assert_refused!(load_elf(&elf), KernelError::ElfHeader { .. });
    }
    assert_refused!(load_elf(&Elf { phnum: Some(0), ..Elf::small() }), KernelError::NoSegments);
    let empty = Segment::load(0x1000, MIB, b"", 0);
    let refused = load_elf(&Elf { segments: vec![empty], ..Elf::small() });
    assert_refused!(refused, KernelError::NoSegments);
}

#[test]
fn an_entry_outside_the_loaded_code_is_refused() {
    for entry in [0, MIB - 1, MIB + 4, 8 * MIB, u64::MAX] {
        let refused = load_elf(&Elf { entry, ..Elf::small() });
        assert_refused!(refused, KernelError::EntryOutside { address } if address == entry);
    }
    let notes = note(b"Xen\0", XEN_PHYS32_ENTRY, &0u32.to_le_bytes(), 4);
    let refused = load_elf(&Elf::small().with(Segment::note(0x2000, &notes)));
    assert_refused!(refused, KernelError::EntryOutside { address: 0 });
}

#[test]
fn bzimage_is_loaded_at_its_preferred_address() {
    let ram = ram(16);
    let image = BzImage::small();
    let kernel = load(&ram, &image.file()).unwrap();
    assert_eq!(kernel.entry, KernelEntry::Linux64 { rip: 2 * MIB + 0x200 });
    assert_eq!((kernel.start, kernel.end), (2 * MIB, 4 * MIB));
    assert_eq!(read_bytes(&ram, 2 * MIB, BzImage::KERNEL_BYTES), image.kernel);
    assert_eq!(read::<u8>(&ram, 2 * MIB + BzImage::KERNEL_BYTES as u64), 0);
}

#[test]
fn bzimage_header_is_kept_with_its_load_address() {
    let image = BzImage { cmdline_size: 255, ..BzImage::small() };
    let kernel = load_bzimage(&image).unwrap();
    assert_eq!(kernel.cmdline_limit_bytes(), 255);
    let header = kernel.setup_header.unwrap();
    assert_eq!({ header.version }, 0x020f);
    assert_eq!({ header.code32_start }, 0x20_0000);
    assert_eq!({ header.init_size }, 0x20_0000);
    // The header in the image ends with init_size; what stands behind is code.
    assert_eq!({ header.kernel_info_offset }, 0);
}

#[test]
fn what_follows_the_kernel_in_a_bzimage_stays_out() {
    let mut image = BzImage { setup_sects: 0, ..BzImage::small() };
    image.kernel.extend(b"signature");
    let ram = ram(16);
    load(&ram, &image.file()).unwrap();
    let end = 2 * MIB + BzImage::KERNEL_BYTES as u64;
    assert_eq!(read_bytes(&ram, end - 1, 3), [0xff, 0, 0]);
}

#[test]
fn bzimage_needs_its_run_area_in_low_ram() {
    let image = BzImage { init_size: 14 << 20, ..BzImage::small() };
    assert_eq!(load_bzimage(&image).unwrap().end, 16 * MIB);
    let refused = load_bzimage(&BzImage { init_size: (14 << 20) + 1, ..image.clone() });
    assert_refused!(refused, KernelError::BzImageOutsideRam { .. });
    let message = refused_message(&BzImage { init_size: 62 << 20, ..image.clone() });
    assert!(message.ends_with("; give it --memory 64M or more"), "{message}");
    for pref_address in [16 * MIB, 3 * GIB, 4 * GIB, u64::MAX << 21] {
        let refused = load_bzimage(&BzImage { pref_address, ..image.clone() });
        assert_refused!(refused, KernelError::BzImageOutsideRam { .. });
    }
}

fn refused_message(image: &BzImage) -> String {
    load_bzimage(image).unwrap_err().to_string()
}

#[test]
fn bzimage_payload_counts_where_init_size_is_smaller() {
    let kernel = load_bzimage(&BzImage { init_size: 0, ..BzImage::small() }).unwrap();
    assert_eq!(kernel.end, 2 * MIB + BzImage::KERNEL_BYTES as u64);
}

#[test]
fn bzimages_without_the_64_bit_entry_are_refused() {
    for version in [0, 0x0105, 0x020b] {
        let refused = load_bzimage(&BzImage { version, ..BzImage::small() });
        assert_refused!(refused, KernelError::BzImageVersion { version: v } if v == version);
    }
    let message = refused_message(&BzImage { version: 0x0204, ..BzImage::small() });
    assert!(message.contains("protocol 2.04"), "{message}");
    let refused = load_bzimage(&BzImage { xloadflags: 2, ..BzImage::small() });
    assert_refused!(refused, KernelError::BzImage32Bit);
}

#[test]
fn malformed_setup_headers_are_refused() {
    let small = BzImage::small;
    for (image, name) in [
        (BzImage { loadflags: 0, ..small() }, "loadflags"),
        (BzImage { kernel_alignment: 0, ..small() }, "kernel_alignment"),
        (BzImage { kernel_alignment: 3, ..small() }, "kernel_alignment"),
        (BzImage { kernel_alignment: 1 << 31, ..small() }, "pref_address"),
        (BzImage { pref_address: 0, ..small() }, "pref_address"),
        (BzImage { pref_address: 0x7000, relocatable_kernel: 0, ..small() }, "pref_address"),
    ] {
        let refused = load_bzimage(&image);
        assert_refused!(refused, KernelError::BzImageHeader { field, .. } if field == name);
    }
    let refused = load_bzimage(&BzImage { syssize: 32, ..small() });
    assert_refused!(refused, KernelError::EntryOutside { .. });
}

#[test]
fn a_bzimage_cut_after_its_magic_is_truncated() {
    let whole = BzImage::small().bytes();
    for len in [0x600, 0x7ff, 0x800, 0x801, whole.len() - 1] {
        let refused = load(&ram(16), &file(&whole[..len]));
        assert_refused!(refused, KernelError::Image(ImageError::Truncated { .. }));
    }
    let refused = load_bzimage(&BzImage { syssize: u32::MAX, ..BzImage::small() });
    assert_refused!(refused, KernelError::Image(ImageError::Truncated { .. }));
    for len in 0x206..0x270 {
        load(&ram(16), &file(&whole[..len])).unwrap_err();
    }
}

/// A bzImage around `packed`, compressed as its magic number says.
fn packed(packed: &[u8], init_size: u32) -> BzImage {
    let mut image = BzImage::small();
    const OFFSET: usize = 0x300;
    image.kernel.truncate(OFFSET);
    image.kernel.extend(packed);
    image.payload = (OFFSET as u32, packed.len() as u32);
    image.kernel.resize(image.kernel.len().next_multiple_of(16), 0);
    image.syssize = (image.kernel.len() / 16) as u32;
    image.init_size = init_size;
    image
}

/// The same file in every compression that is known.
fn compressed(data: &[u8]) -> [Vec<u8>; 3] {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(data).unwrap();
    let zstd_level = ruzstd::encoding::CompressionLevel::Fastest;
    let mut zstd = ruzstd::encoding::compress_to_vec(data, zstd_level);
    let block = lz4_flex::block::compress(data);
    let mut lz4 = 0x184c_2102u32.to_le_bytes().to_vec();
    lz4.extend((block.len() as u32).to_le_bytes());
    lz4.extend(block);
    for packed in [&mut zstd, &mut lz4] {
        packed.extend((data.len() as u32).to_le_bytes());
    }
    [gzip.finish().unwrap(), lz4, zstd]
}

#[test]
fn a_compressed_kernel_is_unpacked_and_loaded_as_what_it_is() {
    let elf = Elf::small();
    let expected = load_elf(&elf).unwrap();
    for data in compressed(&elf.bytes()) {
        let image = packed(&data, MIB as u32);

        assert_eq!(load_unpacked(&ram(16), &image.file()).unwrap(), expected, "{:x?}", &data[..2]);
    }
}

#[test]
fn a_compression_that_is_not_known_is_left_to_the_guest() {
    let image = packed(b"BZh9 and so on", 0x20_0000);

    let kernel = load_unpacked(&ram(16), &image.file()).unwrap();

    assert_eq!(kernel, load(&ram(16), &image.file()).unwrap());
}

#[test]
fn a_kernel_that_unpacks_to_more_than_it_may_is_refused() {
    let elf = Elf::small().bytes();
    for data in compressed(&elf) {
        let image = packed(&data, elf.len() as u32 - 1);

        let refused = load_unpacked(&ram(16), &image.file()).unwrap_err();

        assert!(refused.to_string().contains("init_size"), "{refused}");
    }
}

proptest! {
    #[test]
    fn damaged_compressed_kernels_are_refused_without_a_panic(
        which in 0usize..3,
        at: prop::sample::Index,
        damage in prop::collection::vec(any::<u8>(), 1..20),
        end: prop::sample::Index,
    ) {
        let mut data = compressed(&Elf::small().bytes())[which].clone();
        let at = 4 + at.index(data.len() - 4);
        for (slot, byte) in data[at..].iter_mut().zip(&damage) {
            *slot ^= byte;
        }
        data.truncate(4 + end.index(data.len() - 3));
        let _ = load_unpacked(&ram(16), &packed(&data, MIB as u32).file());
    }
}
