//! Files that are no kernels at all, and kernels with bytes changed.

use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;
use crate::memory::layout::PAGE_BYTES;

#[test]
fn a_directory_is_named_as_such() {
    let directory = tempfile::tempdir().unwrap();
    let refused = load(&ram(16), &File::open(directory.path()).unwrap());
    assert_refused!(refused, KernelError::Image(ImageError::Directory));
}

#[test]
fn an_empty_file_is_named_as_such() {
    assert_refused!(load(&ram(16), &file(b"")), KernelError::Image(ImageError::Empty));
}

#[test]
fn devices_and_pipes_are_refused() {
    let device = File::open("/dev/zero").unwrap();
    assert_refused!(load(&ram(16), &device), KernelError::Image(ImageError::NotRegular));
    let (reader, _writer) = std::io::pipe().unwrap();
    let pipe = File::from(std::os::fd::OwnedFd::from(reader));
    assert_refused!(load(&ram(16), &pipe), KernelError::Image(ImageError::NotRegular));
}

#[test]
fn garbage_is_neither_format_and_common_mistakes_are_named() {
    let cases: [(&[u8], Option<&str>); 6] = [
        (b"x", None),
        (&[0; 8192], None),
        (b"\x1f\x8b\x08 gzip", Some("compressed")),
        (b"070701 cpio", Some("--initrd")),
        (b"#!/bin/sh\n", Some("script")),
        (&[[0; 56].as_slice(), b"ARM\x64"].concat(), Some("arm64")),
    ];
    for (content, hint) in cases {
        let refused = load(&ram(16), &file(content)).unwrap_err();
        assert!(matches!(refused, KernelError::Unrecognized { .. }));
        let message = refused.to_string();
        assert!(message.starts_with("it is neither an ELF vmlinux nor a bzImage"), "{message}");
        assert_eq!(hint.is_some(), message.contains("looks like"), "{message}");
        assert!(message.contains(hint.unwrap_or("")), "{message}");
    }
}

#[test]
fn a_file_of_notes_is_refused_without_reading_it() {
    const SPARSE_BYTES: u64 = 1 << 40;
    let segment = Segment { filesz: SPARSE_BYTES - 0x2000, ..Segment::note(0x2000, b"") };
    let sparse = Elf::small().with(segment).file();
    sparse.set_len(SPARSE_BYTES).unwrap();
    let refused = load(&ram(16), &sparse);
    assert_refused!(refused, KernelError::TooManyNotes { limit_bytes: 65536, .. });
}

#[test]
fn a_refused_kernel_leaves_guest_memory_untouched() {
    let ram = ram(16);
    let elf = Elf::small().with(Segment::load(0x2000, 32 * MIB, b"x", 0));
    load(&ram, &elf.file()).unwrap_err();
    assert!(dirty_pages(&ram).is_empty());
}

#[test]
fn the_position_of_the_file_does_not_matter() {
    let file = Elf::small().file();
    let mut last = [0];
    file.read_exact_at(&mut last, 0x1003).unwrap();
    load(&ram(16), &file).unwrap();
    load(&ram(16), &file).unwrap();
}

/// The addresses of all pages of RAM that are not zero.
fn dirty_pages(ram: &GuestRam) -> Vec<u64> {
    let bytes = read_bytes(ram, 0, ram.low_end() as usize);
    let zero = [0; PAGE_BYTES as usize];
    let pages = bytes.chunks(PAGE_BYTES as usize).zip((0..).step_by(PAGE_BYTES as usize));
    pages.filter(|(page, _)| *page != zero).map(|(_, address)| address).collect()
}

/// What holds for any file: it is loaded within the range that the result names, or not at all.
fn check_any_file(content: &[u8]) -> Result<(), TestCaseError> {
    let ram = ram(16);
    let loaded = load(&ram, &file(content));
    let dirty = dirty_pages(&ram);
    match loaded {
        Ok(kernel) => {
            let (KernelEntry::Pvh { rip } | KernelEntry::Linux64 { rip }) = kernel.entry;
            prop_assert!(kernel.start >= MIB && kernel.end <= ram.low_end());
            prop_assert!((kernel.start..kernel.end).contains(&rip));
            let first_page = kernel.start - kernel.start % PAGE_BYTES;
            prop_assert!(dirty.iter().all(|page| (first_page..kernel.end).contains(page)));
        }
        Err(error) => {
            prop_assert!(dirty.is_empty(), "{error}: {dirty:x?}");
            prop_assert!(!error.to_string().contains('\n'));
        }
    }
    Ok(())
}

/// Values that headers go wrong with, beside random ones.
fn field() -> impl Strategy<Value = u64> {
    let interesting = [0, 1, 0x1000, MIB - 1, MIB, MIB + 1, 16 * MIB, 3 * GIB, u64::MAX];
    prop_oneof![
        prop::sample::select(interesting.to_vec()),
        (0u32..64).prop_map(|bit| 1u64 << bit),
        (0u32..64).prop_map(|bit| u64::MAX << bit),
        any::<u64>(),
    ]
}

/// Writes up to eight fields of one to eight bytes within `range` of an image.
fn mutations(range: std::ops::Range<usize>) -> impl Strategy<Value = Vec<(usize, usize, u64)>> {
    prop::collection::vec((range, 1usize..=8, field()), 1..8)
}

fn mutate(mut image: Vec<u8>, mutations: &[(usize, usize, u64)]) -> Vec<u8> {
    for &(at, len, value) in mutations {
        for (target, byte) in image.iter_mut().skip(at).take(len).zip(value.to_le_bytes()) {
            *target = byte;
        }
    }
    image
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn any_elf_header_loads_within_its_range_or_not_at_all(
        changes in mutations(4..64 + 3 * 56),
        notes in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let pvh = note(b"Xen\0", XEN_PHYS32_ENTRY, &(MIB as u32).to_le_bytes(), 4);
        let elf = Elf::small()
            .with(Segment::load(0x2000, 2 * MIB, b"data", 0x1000))
            .with(Segment::note(0x3000, &[notes, pvh].concat()));
        check_any_file(&mutate(elf.bytes(), &changes))?;
    }

    #[test]
    fn any_setup_header_loads_within_its_range_or_not_at_all(
        changes in mutations(0x1f1..0x270),
    ) {
        check_any_file(&mutate(BzImage::small().bytes(), &changes))?;
    }

    #[test]
    fn random_bytes_after_a_magic_never_load_outside_ram(
        magic in prop::sample::select(vec![&b""[..], b"\x7fELF", b"\x7fELF\x02\x01\x01"]),
        bytes in prop::collection::vec(any::<u8>(), 0..1024),
    ) {
        check_any_file(&[magic, &bytes].concat())?;
    }
}
