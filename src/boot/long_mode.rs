//! What the 64-bit entry needs in memory before the kernel has its own: a GDT and page tables that
//! map addresses to themselves (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::GuestRam;
use crate::memory::layout::{
    BOOT_GDT, BOOT_PAGE_DIRECTORIES, BOOT_PAGE_DIRECTORY, BOOT_PDPT, BOOT_PML4, GIB, MIB,
    PAGE_BYTES,
};

/// Descriptor types and attributes (Intel SDM vol. 3 §3.4.5).
const TYPE_CODE_EXECUTE_READ_ACCESSED: u64 = 0xb << 40;
const TYPE_DATA_READ_WRITE_ACCESSED: u64 = 0x3 << 40;
const TYPE_TSS_BUSY: u64 = 0xb << 40;
const S_CODE_OR_DATA: u64 = 1 << 44;
const PRESENT: u64 = 1 << 47;
const L_64_BIT_CODE: u64 = 1 << 53;
const DB_32_BIT: u64 = 1 << 54;
const G_4_KIB_LIMIT: u64 = 1 << 55;
/// Limit 0xfffff: bits 0 to 15 and 48 to 51.
const LIMIT_ALL: u64 = 0xf << 48 | 0xffff;
/// The limit of a 104-byte TSS.
const LIMIT_TSS: u64 = 0x67;

/// The boot GDT: null, null, then those of
/// [`selector`](crate::arch::x86_64::regs::selector): code, data, and a TSS, which takes two entries.
pub const BOOT_GDT_ENTRIES: [u64; 6] = [
    0,
    0,
    LIMIT_ALL
        | TYPE_CODE_EXECUTE_READ_ACCESSED
        | S_CODE_OR_DATA
        | PRESENT
        | L_64_BIT_CODE
        | G_4_KIB_LIMIT,
    LIMIT_ALL
        | TYPE_DATA_READ_WRITE_ACCESSED
        | S_CODE_OR_DATA
        | PRESENT
        | DB_32_BIT
        | G_4_KIB_LIMIT,
    LIMIT_TSS | TYPE_TSS_BUSY | PRESENT,
    0,
];
/// The limit of the boot GDT for GDTR: its size less one.
pub const BOOT_GDT_LIMIT: u16 = (size_of_val(&BOOT_GDT_ENTRIES) - 1) as u16;

/// Page table entry bits (Intel SDM vol. 3 §4.5.4). Accessed and dirty are set in advance, which
/// spares the processor the write.
const PTE_PRESENT: u64 = 1 << 0;
const PTE_WRITE: u64 = 1 << 1;
const PTE_ACCESSED: u64 = 1 << 5;
const PTE_DIRTY: u64 = 1 << 6;
const PTE_PAGE_SIZE: u64 = 1 << 7;
const TABLE: u64 = PTE_PRESENT | PTE_WRITE | PTE_ACCESSED;
const LARGE_PAGE: u64 = TABLE | PTE_DIRTY | PTE_PAGE_SIZE;
const LARGE_PAGE_BYTES: u64 = 2 * MIB;
const ENTRY_BYTES: u64 = 8;

/// Writes the boot GDT and identity page tables, in pages of 2 MiB, for all addresses below `end`
/// rounded up to a GiB, at most up to the end of low RAM.
///
/// Pages of 1 GiB would take two entries in all, but not every processor has them.
pub fn write_tables(ram: &GuestRam, end: u64) -> Result<(), GuestMemoryError> {
    let memory = ram.memory();
    let gdt: Vec<u8> = BOOT_GDT_ENTRIES.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    memory.write_slice(&gdt, GuestAddress(BOOT_GDT))?;

    memory.write_obj(BOOT_PDPT | TABLE, GuestAddress(BOOT_PML4))?;
    for gib in 0..end.div_ceil(GIB).clamp(1, BOOT_PAGE_DIRECTORIES) {
        let directory = BOOT_PAGE_DIRECTORY + gib * PAGE_BYTES;
        memory.write_obj(directory | TABLE, GuestAddress(BOOT_PDPT + gib * ENTRY_BYTES))?;
        let pages = (gib * GIB..).step_by(LARGE_PAGE_BYTES as usize);
        let entries = pages.map(|page| (page | LARGE_PAGE).to_le_bytes());
        let mut table = [0; PAGE_BYTES as usize];
        for (slot, entry) in table.chunks_exact_mut(ENTRY_BYTES as usize).zip(entries) {
            slot.copy_from_slice(&entry);
        }
        memory.write_slice(&table, GuestAddress(directory))?;
    }
    Ok(())
}
