//! System instructions: flags, traps, segment bases, extended control registers, TLB and caches.

#[cfg(test)]
mod tests;

use iced_x86::{Mnemonic, Register};

use super::cpu::{cr4, msr, rflags};
use super::operands::Step;
use super::xsave::{self, component};
use super::{CodeSize, Exception, Invalidation, Progress, Segment, Stop};

/// Where an INVPCID descriptor holds the PCID; bits 63:12 of the first half are reserved.
const PCID_MASK: u64 = 0xFFF;

pub(super) fn complete(step: &mut Step<'_>) -> Result<Progress, Stop> {
    match step.instruction.mnemonic() {
        Mnemonic::Clac => set_ac(step, false)?,
        Mnemonic::Stac => set_ac(step, true)?,
        Mnemonic::Int3 => return Ok(Progress::Trap(Exception::breakpoint())),
        Mnemonic::Int1 => return Ok(Progress::Trap(Exception::debug())),
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => {
            return Err(Exception::invalid_opcode().into());
        }
        Mnemonic::Rdfsbase => read_segment_base(step, Segment::Fs)?,
        Mnemonic::Rdgsbase => read_segment_base(step, Segment::Gs)?,
        Mnemonic::Wrfsbase => write_segment_base(step, Segment::Fs)?,
        Mnemonic::Wrgsbase => write_segment_base(step, Segment::Gs)?,
        Mnemonic::Swapgs => swap_gs(step)?,
        Mnemonic::Rdpid => read_processor_id(step)?,
        Mnemonic::Rdrand | Mnemonic::Rdseed => read_random(step)?,
        Mnemonic::Xgetbv => read_xcr(step)?,
        Mnemonic::Xsetbv => write_xcr0(step)?,
        Mnemonic::Invpcid => invalidate_pcid(step)?,
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => touch(step)?,
        Mnemonic::Nop
        | Mnemonic::Reservednop
        | Mnemonic::Endbr32
        | Mnemonic::Endbr64
        | Mnemonic::Pause
        | Mnemonic::Lfence
        | Mnemonic::Mfence
        | Mnemonic::Sfence
        | Mnemonic::Serialize
        | Mnemonic::Cldemote
        | Mnemonic::Prefetch
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchit0
        | Mnemonic::Prefetchit1
        // A no-operation while CR4.CET is clear, and no vCPU here has shadow stacks.
        | Mnemonic::Rdsspd
        | Mnemonic::Rdsspq => {}
        _ => return Ok(Progress::NotMine),
    }
    Ok(Progress::Done)
}

fn set_ac(step: &mut Step<'_>, set: bool) -> Result<(), Stop> {
    let ring_0 = step.cpu.cpl()? == 0;
    step.require(ring_0, Exception::invalid_opcode())?;
    step.set_flags(rflags::AC, if set { rflags::AC } else { 0 })
}

fn require_segment_bases(step: &mut Step<'_>) -> Result<(), Stop> {
    step.require(step.code_size == CodeSize::Bits64, Exception::invalid_opcode())?;
    step.require_cr4(cr4::FSGSBASE)
}

fn read_segment_base(step: &mut Step<'_>, segment: Segment) -> Result<(), Stop> {
    require_segment_bases(step)?;
    let base = step.cpu.segment_base(segment)?;
    step.set_value(0, base)
}

fn write_segment_base(step: &mut Step<'_>, segment: Segment) -> Result<(), Stop> {
    require_segment_bases(step)?;
    let base = step.value(0)?;
    let canonical = step.is_canonical(base)?;
    step.require(canonical, Exception::general_protection())?;
    step.cpu.set_segment_base(segment, base)
}

fn swap_gs(step: &mut Step<'_>) -> Result<(), Stop> {
    step.require(step.code_size == CodeSize::Bits64, Exception::invalid_opcode())?;
    step.require_ring_0()?;
    let current = step.cpu.segment_base(Segment::Gs)?;
    let other = step.cpu.read_msr(msr::IA32_KERNEL_GS_BASE)?;
    step.cpu.write_msr(msr::IA32_KERNEL_GS_BASE, current)?;
    step.cpu.set_segment_base(Segment::Gs, other)
}

fn read_processor_id(step: &mut Step<'_>) -> Result<(), Stop> {
    let id = step.cpu.read_msr(msr::IA32_TSC_AUX)?;
    step.set_value(0, id & u64::from(u32::MAX))
}

fn read_random(step: &mut Step<'_>) -> Result<(), Stop> {
    let mut bytes = [0; 8];
    step.cpu.entropy(&mut bytes)?;
    step.set_value(0, u64::from_le_bytes(bytes))?;
    let all = rflags::CF | rflags::PF | rflags::AF | rflags::ZF | rflags::SF | rflags::OF;
    step.set_flags(all, rflags::CF)
}

fn read_xcr(step: &mut Step<'_>) -> Result<(), Stop> {
    step.require_cr4(cr4::OSXSAVE)?;
    let value = match step.register(Register::ECX)? {
        0 => step.cpu.xcr0()?,
        1 => step.cpu.xcr0()? & xsave::in_use(step.cpu.fpu()?),
        _ => return Err(Exception::general_protection().into()),
    };
    step.set_register(Register::EAX, value)?;
    step.set_register(Register::EDX, value >> 32)
}

fn write_xcr0(step: &mut Step<'_>) -> Result<(), Stop> {
    step.require_cr4(cr4::OSXSAVE)?;
    step.require_ring_0()?;
    let value = xsave::requested(step)?;
    let mut valid = step.register(Register::ECX)? == 0 && component::is_consistent(value);
    for index in component::EXTENDED {
        if valid && value & (1 << index) != 0 {
            valid = step.cpu.xstate_component(index)?.is_some_and(|found| !found.supervisor);
        }
    }
    step.require(valid, Exception::general_protection())?;
    step.cpu.set_xcr0(value)
}

/// INVPCID (SDM vol. 2): the type in the register, the descriptor in memory.
fn invalidate_pcid(step: &mut Step<'_>) -> Result<(), Stop> {
    step.require_ring_0()?;
    let kind = step.value(0)?;
    let mut descriptor = [0; 16];
    step.read_memory(1, &mut descriptor)?;
    let descriptor = u128::from_le_bytes(descriptor);
    let (low, linear) = (descriptor as u64, (descriptor >> 64) as u64);
    let pcid = (low & PCID_MASK) as u16;
    step.require(low & !PCID_MASK == 0, Exception::general_protection())?;
    if kind < 2 && pcid != 0 {
        let enabled = step.cpu.cr4()? & cr4::PCIDE != 0;
        step.require(enabled, Exception::general_protection())?;
    }
    let what = match kind {
        0 => {
            let canonical = step.is_canonical(linear)?;
            step.require(canonical, Exception::general_protection())?;
            Invalidation::Address { linear, pcid }
        }
        1 => Invalidation::Context { pcid },
        2 => Invalidation::AllWithGlobals,
        3 => Invalidation::All,
        _ => return Err(Exception::general_protection().into()),
    };
    step.cpu.invalidate(what)
}

/// CLFLUSH and its kin: the access checks of a one-byte load; nothing is cached here.
fn touch(step: &mut Step<'_>) -> Result<(), Stop> {
    step.read_memory(0, &mut [0])
}
