//! Model-specific registers: their addresses and what a vCPU starts with.

use kvm_bindings::{Msrs, kvm_msr_entry};

/// Selectors for SYSCALL and SYSRET (AMD APM vol. 2, 6.1.1).
pub const STAR: u32 = 0xc000_0081;
/// Where SYSCALL enters from 64-bit mode.
pub const LSTAR: u32 = 0xc000_0082;
/// Where SYSCALL enters from compatibility mode.
pub const CSTAR: u32 = 0xc000_0083;
/// RFLAGS bits that SYSCALL clears.
pub const SFMASK: u32 = 0xc000_0084;

const IA32_MISC_ENABLE: u32 = 0x1a0;
/// IA32_MISC_ENABLE bit 0: fast strings.
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// IA32_MTRR_DEF_TYPE: MTRRs on (bit 11), everything write-back (type 6).
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// The MSRs whose value at the kernel's entry differs from KVM's reset value.
pub fn boot() -> Msrs {
    table(&[
        (IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS),
        (IA32_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ])
}

/// The table by which KVM reads or writes these MSRs, at most 256.
pub fn table(values: &[(u32, u64)]) -> Msrs {
    let entries: Vec<kvm_msr_entry> = values
        .iter()
        .map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() })
        .collect();
    Msrs::from_entries(&entries).unwrap_or_else(|_| unreachable!("no list of MSRs is that long"))
}
