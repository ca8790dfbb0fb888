use super::*;
use crate::boot::kernel::{self, KernelEntry};
use crate::boot::testing::{BzImage, file, ram, read_bytes};
use crate::memory::layout::{GIB, MIB};

fn elf_kernel(end: u64) -> LoadedKernel {
    let entry = KernelEntry::Linux64 { rip: MIB };
    LoadedKernel { entry, start: MIB, end, setup_header: None }
}

fn sparse(size_bytes: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size_bytes).unwrap();
    file
}

#[test]
fn an_initrd_ends_in_the_last_page_of_low_ram() {
    for (mebibytes, end) in [(16, 16 * MIB), (3072, 3 * GIB), (8192, 3 * GIB)] {
        let ram = ram(mebibytes);
        let initrd = load(&ram, &file(b"cpio"), &elf_kernel(2 * MIB)).unwrap();
        assert_eq!(initrd, Initrd { address: end - PAGE_BYTES, size_bytes: 4 });
        assert_eq!(read_bytes(&ram, initrd.address, 5), b"cpio\0");
    }
}

#[test]
fn an_initrd_may_fill_the_room_above_the_kernel_but_not_more() {
    let kernel = elf_kernel(14 * MIB - 1);
    let initrd = load(&ram(16), &sparse(2 * MIB), &kernel).unwrap();
    assert_eq!(initrd, Initrd { address: 14 * MIB, size_bytes: 2 * MIB });
    let refused = load(&ram(16), &sparse(2 * MIB + 1), &kernel).unwrap_err();
    let InitrdError::TooLarge { size_bytes, room_bytes } = refused else {
        panic!("unexpected {refused}");
    };
    assert_eq!((size_bytes, room_bytes), (2 * MIB + 1, 2 * MIB));
    assert!(refused.to_string().contains("--memory"), "{refused}");
}

#[test]
fn sizes_beyond_any_memory_are_too_large() {
    for size_bytes in [16 * MIB, 17 * MIB, 1 << 42] {
        let refused = load(&ram(16), &sparse(size_bytes), &elf_kernel(2 * MIB)).unwrap_err();
        assert!(matches!(refused, InitrdError::TooLarge { .. }));
    }
    let full = elf_kernel(16 * MIB);
    let refused = load(&ram(16), &file(b"x"), &full).unwrap_err();
    assert!(matches!(refused, InitrdError::TooLarge { room_bytes: 0, .. }));
}

#[test]
fn a_bzimage_tells_how_high_its_initrd_may_lie() {
    let loaded = |initrd_addr_max| {
        let ram = ram(16);
        let image = BzImage { initrd_addr_max, ..BzImage::small() };
        let kernel = kernel::load(&ram, &image.file()).unwrap();
        load(&ram, &file(b"x"), &kernel).map(|initrd| initrd.address)
    };
    assert_eq!(loaded(u32::MAX).unwrap(), 16 * MIB - PAGE_BYTES);
    assert_eq!(loaded(0x7f_ffff).unwrap(), 8 * MIB - PAGE_BYTES);
    // Not into the 2 MiB from 2 MiB on in which this kernel unpacks itself.
    assert_eq!(loaded(0x40_0000).unwrap(), 4 * MIB);
    for below in [0, 0x10_0000, 0x3f_ffff] {
        assert!(matches!(loaded(below), Err(InitrdError::TooLarge { room_bytes: 0, .. })));
    }
}

#[test]
fn files_that_hold_no_initrd_are_refused_by_kind() {
    let refused = |file: &File| match load(&ram(16), file, &elf_kernel(2 * MIB)).unwrap_err() {
        InitrdError::Image(error) => error,
        error => panic!("unexpected {error}"),
    };
    let directory = tempfile::tempdir().unwrap();
    let directory = File::open(directory.path()).unwrap();
    assert!(matches!(refused(&directory), ImageError::Directory));
    assert!(matches!(refused(&file(b"")), ImageError::Empty));
    assert!(matches!(refused(&File::open("/dev/zero").unwrap()), ImageError::NotRegular));
}
