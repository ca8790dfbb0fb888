//! Guest physical addresses: what lies where below 4 GiB.
//!
//! Sources: the memory map of a PC (conventional memory, EBDA, ROM area), the kernel's
//! Documentation/arch/x86/boot.rst (zero page, command line, load addresses), the KVM API
//! documentation (KVM_SET_TSS_ADDR, KVM_SET_IDENTITY_MAP_ADDR) and the Intel SDM (local APIC
//! base, vol. 3 §11.4.1).
//!
//! | from          | what                                                |
//! | ------------- | --------------------------------------------------- |
//! | 0             | conventional memory, with what alcove writes in it  |
//! | [`EBDA_START`] | reserved: EBDA, ROM area, ACPI tables              |
//! | [`HIGH_MEMORY_START`] | RAM: kernel, initrd at its end              |
//! | [`LOW_RAM_LIMIT`] | devices, up to 4 GiB                            |
//! | [`HIGH_RAM_START`] | the rest of the RAM                            |

/// The size of a small page, bytes.
pub const PAGE_BYTES: u64 = 0x1000;
/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;

/// The GDT for the 64-bit entry; after the BIOS data area (0x400 to 0x4ff).
pub const BOOT_GDT: u64 = 0x500;
/// `hvm_start_info` of the PVH entry, with the tables that it points to in the same page.
pub const PVH_START_INFO: u64 = 0x6000;
/// The PVH module list: one `hvm_modlist_entry`, the initrd.
pub const PVH_MODULE_LIST: u64 = PVH_START_INFO + 0x40;
/// The PVH memory map: `hvm_memmap_table_entry` times the number of entries.
pub const PVH_MEMORY_MAP: u64 = PVH_START_INFO + 0x80;
/// `boot_params` ("zero page") of the 64-bit boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// Root of the identity page tables for the 64-bit entry (CR3).
pub const BOOT_PML4: u64 = 0x9000;
/// The page directory pointer table for the first 512 GiB.
pub const BOOT_PDPT: u64 = 0xa000;
/// The first page directory; one for each GiB of low RAM follows, [`BOOT_PAGE_DIRECTORIES`].
pub const BOOT_PAGE_DIRECTORY: u64 = 0xb000;
/// How many page directories there is room for: enough for [`LOW_RAM_LIMIT`].
pub const BOOT_PAGE_DIRECTORIES: u64 = LOW_RAM_LIMIT / GIB;
/// The command line with its terminating NUL.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line, bytes, NUL included.
pub const CMDLINE_ROOM_BYTES: u64 = 0x1_0000;

/// Extended BIOS data area: the end of conventional memory.
pub const EBDA_START: u64 = 0x9_fc00;
/// The ROM area's upper part, where an operating system looks for the RSDP (ACPI 6.5 §5.2.5.1);
/// up to [`HIGH_MEMORY_START`]. MP or ACPI tables go here.
pub const RSDP_AREA: u64 = 0xe_0000;
/// Where memory above the first mebibyte starts: the lowest address a kernel may be loaded at.
pub const HIGH_MEMORY_START: u64 = MIB;

/// Low RAM ends here at the latest: 3 GiB.
pub const LOW_RAM_LIMIT: u64 = 3 * GIB;
/// The first virtio-mmio register block.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
/// The end of the window for virtio-mmio register blocks.
pub const VIRTIO_MMIO_END: u64 = 0xe000_0000;
/// The I/O APIC's registers (82093AA §3.0, "IOAPIC base address").
pub const IO_APIC: u64 = 0xfec0_0000;
/// The local APIC's registers after reset (Intel SDM vol. 3 §11.4.1).
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// One page that KVM fills with an identity page table, for processors without unrestricted guest
/// (KVM_SET_IDENTITY_MAP_ADDR).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM uses for a TSS on the same processors (KVM_SET_TSS_ADDR).
pub const KVM_TSS: u64 = 0xfffb_d000;
/// High RAM starts here: 4 GiB.
pub const HIGH_RAM_START: u64 = 4 * GIB;

// What alcove writes lies apart and inside conventional memory.
const _: () = {
    assert!(BOOT_GDT < PVH_START_INFO);
    assert!(PVH_START_INFO + PAGE_BYTES <= ZERO_PAGE);
    assert!(ZERO_PAGE + PAGE_BYTES < BOOT_PML4);
    assert!(BOOT_PML4 + PAGE_BYTES <= BOOT_PDPT && BOOT_PDPT + PAGE_BYTES <= BOOT_PAGE_DIRECTORY);
    assert!(BOOT_PAGE_DIRECTORY + BOOT_PAGE_DIRECTORIES * PAGE_BYTES <= CMDLINE);
    assert!(CMDLINE + CMDLINE_ROOM_BYTES <= EBDA_START);
    assert!(EBDA_START < RSDP_AREA && RSDP_AREA < HIGH_MEMORY_START);
    assert!(LOW_RAM_LIMIT <= VIRTIO_MMIO_START && VIRTIO_MMIO_END <= IO_APIC);
    assert!(KVM_IDENTITY_MAP + PAGE_BYTES <= KVM_TSS);
    assert!(KVM_TSS + 3 * PAGE_BYTES <= HIGH_RAM_START);
};
