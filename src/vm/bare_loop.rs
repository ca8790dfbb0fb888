//! A loop of KVM_RUN that does nothing else: the least that an exit to this process can cost.
#![expect(unsafe_code, reason = "hands guest RAM to KVM")]

use std::time::{Duration, Instant};

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress};

use super::VmError;
use crate::arch::x86_64::regs::{self, LongModeTables};
use crate::boot::long_mode;
use crate::memory::GuestRam;
use crate::memory::layout::{BOOT_GDT, BOOT_PML4, ZERO_PAGE};

/// Runs `code` at `address` in 64-bit mode, as [`vm`](super) starts a kernel, and answers none of its
/// accesses. Returns when since the start the guest has written to the port `mark`; a write to the port
/// `end` ends it.
///
/// # Errors
/// KVM refuses something, or the guest leaves other than by accesses.
pub fn run(code: &[u8], address: u64, mark: u16, end: u16) -> Result<Vec<Duration>, VmError> {
    let failed = |call| move |source| VmError::Kvm { call, source };
    let kvm = Kvm::new().map_err(failed("open /dev/kvm"))?;
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("tell what CPUID it supports"))?;
    let ram = memory(code, address)?;
    let vm = kvm.create_vm().map_err(failed("create a virtual machine"))?;
    // SAFETY: the RAM stays until this returns, and the vCPU runs on this thread only.
    unsafe { ram.give_to(&vm) }.map_err(failed("map guest RAM"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("create a vCPU"))?;
    vcpu.set_cpuid2(&supported).map_err(failed("set up a vCPU"))?;
    let mut sregs = vcpu.get_sregs().map_err(failed("set up a vCPU"))?;
    let tables =
        LongModeTables { gdt_base: BOOT_GDT, gdt_limit: long_mode::BOOT_GDT_LIMIT, cr3: BOOT_PML4 };
    let registers = regs::linux64(&mut sregs, address, ZERO_PAGE, tables);
    vcpu.set_sregs(&sregs).map_err(failed("set up a vCPU"))?;
    vcpu.set_regs(&registers).map_err(failed("set up a vCPU"))?;

    let start = Instant::now();
    let mut marks = Vec::new();
    loop {
        match vcpu.run().map_err(failed("run a vCPU"))? {
            VcpuExit::IoOut(port, _) if port == mark => marks.push(start.elapsed()),
            VcpuExit::IoOut(port, _) if port == end => return Ok(marks),
            VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => {}
            VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..) => {}
            exit => return Err(VmError::BareLoop(format!("{exit:?}"))),
        }
    }
}

fn memory(code: &[u8], address: u64) -> Result<GuestRam, VmError> {
    const ADDRESS_BITS: u8 = 36;
    let failed = |source| VmError::Memory { asked: "16M".to_owned(), source };
    let ram = GuestRam::new(GuestRam::MIN_BYTES, ADDRESS_BITS).map_err(failed)?;
    let outside = |error| VmError::BareLoop(format!("{error}"));
    long_mode::write_tables(&ram, GuestRam::MIN_BYTES).map_err(outside)?;
    ram.memory().write_slice(code, GuestAddress(address)).map_err(outside)?;
    Ok(ram)
}
