//! The registers with which a vCPU enters a kernel.

use kvm_bindings::{kvm_fpu, kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};

/// RFLAGS bit 1 reads as one always (Intel SDM vol. 1, 3.4.3).
const RFLAGS_RESERVED: u64 = 1 << 1;
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Selectors of the flat segments that the 64-bit boot protocol asks for (__BOOT_CS, __BOOT_DS in
/// the kernel's Documentation/arch/x86/boot.rst).
pub mod selector {
    /// Code, execute and read.
    pub const BOOT_CS: u16 = 0x10;
    /// Data, read and write.
    pub const BOOT_DS: u16 = 0x18;
    /// A task state segment.
    pub const BOOT_TSS: u16 = 0x20;
}

/// Where the descriptor table and page tables for a 64-bit entry lie in guest RAM.
#[derive(Clone, Copy, Debug)]
pub struct LongModeTables {
    /// Guest physical address of the GDT.
    pub gdt_base: u64,
    /// Its size in bytes, less one.
    pub gdt_limit: u16,
    /// Guest physical address of the top-level page table.
    pub cr3: u64,
}

/// Registers for the 64-bit entry of the Linux boot protocol: long mode, flat segments, RSI the
/// zero page.
pub fn linux64(
    sregs: &mut kvm_sregs,
    rip: u64,
    zero_page: u64,
    tables: LongModeTables,
) -> kvm_regs {
    flat_segments(sregs, true);
    sregs.gdt.base = tables.gdt_base;
    sregs.gdt.limit = tables.gdt_limit;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr3 = tables.cr3;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.efer = EFER_LME | EFER_LMA;
    kvm_regs { rip, rsi: zero_page, rflags: RFLAGS_RESERVED, ..Default::default() }
}

/// Registers for a PVH entry: 32-bit protected mode without paging, EBX the start info
/// (Xen's docs/misc/pvh.pandoc).
pub fn pvh(sregs: &mut kvm_sregs, rip: u64, start_info: u64) -> kvm_regs {
    flat_segments(sregs, false);
    sregs.cr4 = 0;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.efer = 0;
    kvm_regs { rip, rbx: start_info, rflags: RFLAGS_RESERVED, ..Default::default() }
}

fn flat_segments(sregs: &mut kvm_sregs, long_mode: bool) {
    /// Descriptor types (Intel SDM vol. 3, 3.4.5.1 and table 3-2), accessed or busy.
    const CODE_EXECUTE_READ: u8 = 11;
    const DATA_READ_WRITE: u8 = 3;
    const TSS_BUSY: u8 = 11;
    const TSS_LIMIT: u32 = 0x67;
    let code = kvm_segment {
        selector: selector::BOOT_CS,
        limit: u32::MAX,
        type_: CODE_EXECUTE_READ,
        present: 1,
        s: 1,
        g: 1,
        l: long_mode.into(),
        db: (!long_mode).into(),
        ..Default::default()
    };
    let data = kvm_segment {
        selector: selector::BOOT_DS,
        limit: u32::MAX,
        type_: DATA_READ_WRITE,
        present: 1,
        s: 1,
        g: 1,
        db: 1,
        ..Default::default()
    };
    sregs.cs = code;
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = kvm_segment {
        selector: selector::BOOT_TSS,
        limit: TSS_LIMIT,
        type_: TSS_BUSY,
        present: 1,
        ..Default::default()
    };
}

/// The FPU after FNINIT, with MXCSR at its reset value (Intel SDM vol. 1, 8.1.5 and 10.2.3).
pub fn fpu() -> kvm_fpu {
    const FCW_INIT: u16 = 0x37f;
    const MXCSR_INIT: u32 = 0x1f80;
    kvm_fpu { fcw: FCW_INIT, mxcsr: MXCSR_INIT, ..Default::default() }
}

/// Wires the local APIC as firmware leaves it: LINT0 takes the 8259's interrupts, LINT1 is NMI
/// (MultiProcessor Specification 1.4, 3.6.2.2 "Virtual Wire Mode").
pub fn wire_lapic(lapic: &mut kvm_lapic_state) {
    /// Offsets of the local vector table (Intel SDM vol. 3, 11.5.1).
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    /// Delivery modes, bits 10:8.
    const DELIVERY_NMI: u32 = 4 << 8;
    const DELIVERY_EXTINT: u32 = 7 << 8;
    for (offset, value) in [(LVT_LINT0, DELIVERY_EXTINT), (LVT_LINT1, DELIVERY_NMI)] {
        for (register, byte) in lapic.regs[offset..offset + 4].iter_mut().zip(value.to_le_bytes()) {
            *register = byte as i8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_64_bit_entry_is_in_long_mode_with_the_zero_page_in_rsi() {
        let mut sregs = kvm_sregs::default();
        let tables = LongModeTables { gdt_base: 0x500, gdt_limit: 39, cr3: 0x9000 };

        let regs = linux64(&mut sregs, 0x100_0000, 0x7000, tables);

        assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x100_0000, 0x7000, 2));
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cr3), (1, 0, 0x9000));
        assert_eq!(sregs.efer & (EFER_LMA | EFER_LME), EFER_LMA | EFER_LME);
    }

    #[test]
    fn a_pvh_entry_is_in_32_bit_mode_without_paging() {
        let mut sregs = kvm_sregs::default();

        let regs = pvh(&mut sregs, 0x100_0000, 0x6000);

        assert_eq!((regs.rip, regs.rbx), (0x100_0000, 0x6000));
        assert_eq!((sregs.cs.l, sregs.cs.db), (0, 1));
        assert_eq!((sregs.cr0 & CR0_PG, sregs.efer, sregs.cr4), (0, 0, 0));
        assert_eq!(sregs.tr.limit, 0x67);
    }

    #[test]
    fn the_local_apic_is_in_virtual_wire_mode() {
        let mut lapic = kvm_lapic_state::default();

        wire_lapic(&mut lapic);

        assert_eq!((lapic.regs[0x351], lapic.regs[0x361]), (7, 4));
    }
}
