use linux_loader::loader::bootparam::XLF_KERNEL_64;
use vm_memory::Bytes;

use super::*;
use crate::arch::x86_64::regs::selector;
use crate::boot::testing::{BzImage, Elf, ram, read, read_bytes};
use crate::boot::{kernel, long_mode};
use crate::memory::layout::{BOOT_GDT, BOOT_PDPT, BOOT_PML4, GIB, MIB, PAGE_BYTES};

const ENTRY: u64 = MIB + 0x40;

fn kernel(entry: KernelEntry) -> LoadedKernel {
    LoadedKernel { entry, start: MIB, end: 2 * MIB, setup_header: None }
}

fn sources(kernel: &LoadedKernel) -> BootSources<'_> {
    BootSources { kernel, cmdline: c"console=ttyS0", initrd: None, acpi_rsdp: None }
}

/// The map as (start, end, usable).
fn map(mebibytes: u64) -> Vec<(u64, u64, bool)> {
    memory_map(&ram(mebibytes)).map(|e| (e.start, e.start + e.size_bytes, e.usable)).collect()
}

#[test]
fn the_memory_map_covers_all_ram_and_nothing_else() {
    let low = [(0, 0x9_fc00, true), (0x9_fc00, MIB, false)];
    for mebibytes in [16, 64, 3072] {
        assert_eq!(map(mebibytes), [&low[..], &[(MIB, mebibytes * MIB, true)]].concat());
    }
    let split = [&low[..], &[(MIB, 3 * GIB, true), (4 * GIB, 9 * GIB, true)]].concat();
    assert_eq!(map(8192), split);
    let page_above = GuestRam::new(3 * GIB + PAGE_BYTES, 46).unwrap();
    let last = memory_map(&page_above).last().unwrap();
    assert_eq!((last.start, last.size_bytes, last.usable), (4 * GIB, PAGE_BYTES, true));
}

#[test]
fn pvh_start_info_leads_to_everything() {
    let ram = ram(8192);
    let kernel = kernel(KernelEntry::Pvh { rip: ENTRY });
    let initrd = Initrd { address: 3 * GIB - 0x3000, size_bytes: 0x2345 };
    let sources =
        BootSources { initrd: Some(initrd), acpi_rsdp: Some(0xe_0000), ..sources(&kernel) };
    let entry = write(&ram, &sources).unwrap();

    assert_eq!(entry, BootEntry::Pvh { rip: ENTRY, start_info: PVH_START_INFO });
    let info: hvm_start_info = read(&ram, PVH_START_INFO);
    assert_eq!((info.magic, info.version, info.flags), (0x336e_c578, 1, 0));
    assert_eq!(info.rsdp_paddr, 0xe_0000);
    assert_eq!(read_bytes(&ram, info.cmdline_paddr, 14), b"console=ttyS0\0");
    assert_eq!(info.nr_modules, 1);
    let module: hvm_modlist_entry = read(&ram, info.modlist_paddr);
    assert_eq!((module.paddr, module.size), (initrd.address, initrd.size_bytes));
    assert_eq!(info.memmap_entries, 4);
    let entries = (0..4).map(|i| info.memmap_paddr + i * 24).map(|at| {
        let entry: hvm_memmap_table_entry = read(&ram, at);
        (entry.addr, entry.addr + entry.size, entry.type_ == 1)
    });
    assert_eq!(entries.collect::<Vec<_>>(), map(8192));
}

#[test]
fn pvh_without_initrd_has_no_modules() {
    let ram = ram(16);
    write(&ram, &sources(&kernel(KernelEntry::Pvh { rip: ENTRY }))).unwrap();
    let info: hvm_start_info = read(&ram, PVH_START_INFO);
    assert_eq!((info.nr_modules, info.modlist_paddr, info.rsdp_paddr), (0, 0, 0));
}

#[test]
fn zero_page_of_an_elf_kernel_has_a_header() {
    let ram = ram(8192);
    let kernel = kernel(KernelEntry::Linux64 { rip: ENTRY });
    let initrd = Initrd { address: 0x7fff_e000, size_bytes: 0x1fff };
    let sources =
        BootSources { initrd: Some(initrd), acpi_rsdp: Some(0xe_0000), ..sources(&kernel) };
    let entry = write(&ram, &sources).unwrap();

    assert_eq!(entry, BootEntry::Linux64 { rip: ENTRY, zero_page: ZERO_PAGE });
    let params: boot_params = read(&ram, ZERO_PAGE);
    let header = params.hdr;
    assert_eq!(({ header.boot_flag }, { header.header }), (0xaa55, 0x5372_6448));
    assert_eq!(header.type_of_loader, 0xff);
    assert_eq!(({ header.ramdisk_image }, { header.ramdisk_size }), (0x7fff_e000, 0x1fff));
    assert_eq!(({ params.ext_ramdisk_image }, { params.ext_ramdisk_size }), (0, 0));
    assert_eq!(({ params.acpi_rsdp_addr }, params.sentinel), (0xe_0000, 0));
    assert_eq!(read_bytes(&ram, header.cmd_line_ptr.into(), 14), b"console=ttyS0\0");
    let entries = { params.e820_table };
    let entries = entries[..usize::from(params.e820_entries)].iter();
    let entries: Vec<_> =
        entries.map(|e| ({ e.addr }, { e.addr } + { e.size }, { e.r#type } == 1)).collect();
    assert_eq!(entries, map(8192));
}

#[test]
fn zero_page_of_a_bzimage_keeps_its_header() {
    let ram = ram(16);
    let kernel = kernel::load(&ram, &BzImage::small().file()).unwrap();
    write(&ram, &sources(&kernel)).unwrap();
    let header = read::<boot_params>(&ram, ZERO_PAGE).hdr;
    assert_eq!(({ header.init_size }, { header.pref_address }), (0x20_0000, 2 * MIB));
    assert_eq!({ header.xloadflags } & XLF_KERNEL_64, XLF_KERNEL_64);
    assert_eq!(({ header.cmd_line_ptr }, header.type_of_loader), (CMDLINE as u32, 0xff));
}

#[test]
fn an_initrd_above_4_gib_would_be_told_in_full() {
    let ram = ram(16);
    let kernel = kernel(KernelEntry::Linux64 { rip: ENTRY });
    let initrd = Some(Initrd { address: 0x1_2345_6000, size_bytes: 0x2_0000_0001 });
    write(&ram, &BootSources { initrd, ..sources(&kernel) }).unwrap();
    let params: boot_params = read(&ram, ZERO_PAGE);
    assert_eq!(({ params.hdr.ramdisk_image }, { params.ext_ramdisk_image }), (0x2345_6000, 1));
    assert_eq!(({ params.hdr.ramdisk_size }, { params.ext_ramdisk_size }), (1, 2));
}

/// Walks the boot page tables as the processor does; the physical address, if there is one.
fn translate(ram: &GuestRam, address: u64) -> Option<u64> {
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    let table_entry = |table: u64, shift: u32| {
        let entry: u64 = read(ram, table + (address >> shift & 0x1ff) * 8);
        (entry & 3 == 3).then_some(entry)
    };
    let pdpte = table_entry(table_entry(BOOT_PML4, 39)? & ADDRESS, 30)?;
    let pde = table_entry(pdpte & ADDRESS, 21)?;
    assert_eq!(pde & 1 << 7, 1 << 7, "2 MiB pages only");
    Some((pde & ADDRESS) + (address & 0x1f_ffff))
}

#[test]
fn identity_pages_cover_the_low_tables_and_the_whole_kernel() {
    for (end, mapped_end) in
        [(2 * MIB, GIB), (GIB, GIB), (GIB + 1, 2 * GIB), (3 * GIB, 3 * GIB), (u64::MAX, 3 * GIB)]
    {
        let ram = ram(16);
        long_mode::write_tables(&ram, end).unwrap();
        for address in [0, ZERO_PAGE, CMDLINE, MIB, GIB - 1, mapped_end - 1] {
            assert_eq!(translate(&ram, address), Some(address), "end {end:#x}");
        }
        for address in [mapped_end, 512 * GIB] {
            assert_eq!(translate(&ram, address), None, "end {end:#x}");
        }
    }
}

#[test]
fn boot_gdt_has_the_segments_that_linux_asks_for() {
    let ram = ram(16);
    long_mode::write_tables(&ram, MIB).unwrap();
    let descriptor = |selector: u16| read::<u64>(&ram, BOOT_GDT + u64::from(selector));
    assert_eq!(descriptor(0), 0);
    assert_eq!(descriptor(selector::BOOT_CS), 0x00af_9b00_0000_ffff);
    assert_eq!(descriptor(selector::BOOT_DS), 0x00cf_9300_0000_ffff);
    assert_eq!(descriptor(selector::BOOT_TSS), 0x0000_8b00_0000_0067);
    assert_eq!(long_mode::BOOT_GDT_LIMIT, 47);
}

#[test]
fn pvh_entry_costs_no_page_tables() {
    let ram = ram(16);
    write(&ram, &sources(&kernel(KernelEntry::Pvh { rip: ENTRY }))).unwrap();
    assert_eq!((read::<u64>(&ram, BOOT_PML4), read::<u64>(&ram, BOOT_PDPT)), (0, 0));
}

#[test]
fn the_tables_of_a_loaded_kernel_leave_it_alone() {
    let ram = ram(16);
    let kernel = kernel::load(&ram, &Elf::small().file()).unwrap();
    let longest = std::ffi::CString::new(vec![b'x'; 2047]).unwrap();
    write(&ram, &BootSources { cmdline: &longest, ..sources(&kernel) }).unwrap();
    assert_eq!(read_bytes(&ram, MIB, 4), [0xf4; 4]);
    let mut reserved = vec![0; (MIB - EBDA_START) as usize];
    ram.memory().read_slice(&mut reserved, GuestAddress(EBDA_START)).unwrap();
    assert!(reserved.iter().all(|byte| *byte == 0));
}
