//! The tables that tell a kernel about the machine: `boot_params` of the 64-bit boot protocol or
//! `hvm_start_info` of PVH, both with a memory map, and the command line beside them.

#[cfg(test)]
mod tests;

use std::ffi::CStr;

use linux_loader::loader::bootparam::{LOADED_HIGH, boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE,
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::initrd::Initrd;
use super::kernel::{HEADER_MAGIC, KernelEntry, LoadedKernel, SECTOR_BOOT_FLAG};
use super::long_mode;
use crate::memory::GuestRam;
use crate::memory::layout::{
    CMDLINE, EBDA_START, HIGH_MEMORY_START, HIGH_RAM_START, PVH_MEMORY_MAP, PVH_MODULE_LIST,
    PVH_START_INFO, ZERO_PAGE,
};

/// `type_of_loader` of a boot loader without a number of its own.
const LOADER_TYPE_UNDEFINED: u8 = 0xff;
/// Boot protocol 2.15: the one whose fields alcove fills in for kernels without a header.
const PROTOCOL_VERSION: u16 = 0x020f;
/// `hvm_start_info` with a memory map.
const START_INFO_VERSION: u32 = 1;

/// Guest memory refused a write of the tables. RAM of the least size a guest may have holds them
/// all, so this is a fault of alcove's.
#[derive(Debug, thiserror::Error)]
#[error("the boot tables cannot be written")]
pub struct ParamsError(#[from] GuestMemoryError);

/// Where the first vCPU starts and what it finds in its registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootEntry {
    /// Protected mode with flat 32-bit segments, paging and interrupts off (Xen's PVH boot
    /// protocol).
    Pvh {
        /// First instruction.
        rip: u64,
        /// For EBX: where `hvm_start_info` lies.
        start_info: u64,
    },
    /// 64-bit mode with the GDT of [`long_mode`] at
    /// [`BOOT_GDT`](crate::memory::layout::BOOT_GDT) and CR3 on
    /// [`BOOT_PML4`](crate::memory::layout::BOOT_PML4), interrupts off.
    Linux64 {
        /// First instruction.
        rip: u64,
        /// For RSI: where `boot_params` lies.
        zero_page: u64,
    },
}

/// What the tables speak of.
#[derive(Debug, Clone, Copy)]
pub struct BootSources<'a> {
    /// The kernel in RAM.
    pub kernel: &'a LoadedKernel,
    /// Its command line, not longer than the kernel's limit.
    pub cmdline: &'a CStr,
    /// Its initrd in RAM.
    pub initrd: Option<Initrd>,
    /// Where the ACPI root pointer (RSDP) lies; without it the kernel searches
    /// [`RSDP_AREA`](crate::memory::layout::RSDP_AREA).
    pub acpi_rsdp: Option<u64>,
}

/// A range of the guest's memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapEntry {
    /// First guest physical address.
    pub start: u64,
    /// Length in bytes.
    pub size_bytes: u64,
    /// Whether the guest may use it as RAM; reserved otherwise.
    pub usable: bool,
}

/// The memory map as the firmware of a PC would tell it, by ascending address, at most four
/// entries. The EBDA and the ROM area are reserved: tables for the guest may lie there.
pub fn memory_map(ram: &GuestRam) -> impl Iterator<Item = MapEntry> {
    let entry = |start, end, usable| MapEntry { start, size_bytes: end - start, usable };
    [
        entry(0, EBDA_START, true),
        entry(EBDA_START, HIGH_MEMORY_START, false),
        entry(HIGH_MEMORY_START, ram.low_end(), true),
        entry(HIGH_RAM_START, HIGH_RAM_START + ram.high_bytes(), true),
    ]
    .into_iter()
    .filter(|entry| entry.size_bytes > 0)
}

/// Writes the command line and the tables for the kernel's entry into guest RAM, and says how to
/// enter.
pub fn write(ram: &GuestRam, sources: &BootSources<'_>) -> Result<BootEntry, ParamsError> {
    ram.memory().write_slice(sources.cmdline.to_bytes_with_nul(), GuestAddress(CMDLINE))?;
    match sources.kernel.entry {
        KernelEntry::Pvh { rip } => {
            write_start_info(ram, sources)?;
            Ok(BootEntry::Pvh { rip, start_info: PVH_START_INFO })
        }
        KernelEntry::Linux64 { rip } => {
            write_zero_page(ram, sources)?;
            long_mode::write_tables(ram, sources.kernel.end)?;
            Ok(BootEntry::Linux64 { rip, zero_page: ZERO_PAGE })
        }
    }
}

fn write_zero_page(ram: &GuestRam, sources: &BootSources<'_>) -> Result<(), GuestMemoryError> {
    let mut params = boot_params {
        hdr: sources.kernel.setup_header.unwrap_or_else(default_header),
        acpi_rsdp_addr: sources.acpi_rsdp.unwrap_or(0),
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_TYPE_UNDEFINED;
    // CMDLINE is below 1 MiB, so that ext_cmd_line_ptr stays zero.
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    if let Some(initrd) = sources.initrd {
        (params.hdr.ramdisk_image, params.ext_ramdisk_image) = halves(initrd.address);
        (params.hdr.ramdisk_size, params.ext_ramdisk_size) = halves(initrd.size_bytes);
    }
    let mut entries = 0;
    for (slot, entry) in params.e820_table.iter_mut().zip(memory_map(ram)) {
        *slot = boot_e820_entry { addr: entry.start, size: entry.size_bytes, r#type: entry.kind() };
        entries += 1;
    }
    params.e820_entries = entries;
    ram.memory().write_obj(params, GuestAddress(ZERO_PAGE))
}

/// The header of a kernel that comes without: what Linux reads of it.
fn default_header() -> setup_header {
    setup_header {
        boot_flag: SECTOR_BOOT_FLAG,
        header: u32::from_le_bytes(HEADER_MAGIC),
        version: PROTOCOL_VERSION,
        loadflags: LOADED_HIGH,
        ..Default::default()
    }
}

fn write_start_info(ram: &GuestRam, sources: &BootSources<'_>) -> Result<(), GuestMemoryError> {
    let memory = ram.memory();
    let mut map_address = PVH_MEMORY_MAP;
    let mut memmap_entries = 0;
    for entry in memory_map(ram) {
        let entry = hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.size_bytes,
            type_: entry.kind(),
            reserved: 0,
        };
        memory.write_obj(entry, GuestAddress(map_address))?;
        map_address += size_of::<hvm_memmap_table_entry>() as u64;
        memmap_entries += 1;
    }
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: START_INFO_VERSION,
        cmdline_paddr: CMDLINE,
        rsdp_paddr: sources.acpi_rsdp.unwrap_or(0),
        memmap_paddr: PVH_MEMORY_MAP,
        memmap_entries,
        ..Default::default()
    };
    if let Some(initrd) = sources.initrd {
        let module = hvm_modlist_entry {
            paddr: initrd.address,
            size: initrd.size_bytes,
            ..Default::default()
        };
        memory.write_obj(module, GuestAddress(PVH_MODULE_LIST))?;
        info.nr_modules = 1;
        info.modlist_paddr = PVH_MODULE_LIST;
    }
    memory.write_obj(info, GuestAddress(PVH_START_INFO))
}

impl MapEntry {
    /// The type's number, the same in E820 (ACPI 6.5 table 15.4) and in PVH.
    fn kind(&self) -> u32 {
        if self.usable { XEN_HVM_MEMMAP_TYPE_RAM } else { XEN_HVM_MEMMAP_TYPE_RESERVED }
    }
}

/// The low and the high half of an address or size.
fn halves(value: u64) -> (u32, u32) {
    (value as u32, (value >> 32) as u32)
}
