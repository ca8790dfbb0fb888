//! x87 control instructions and the SSE control register (SDM vol. 1 §8.1, §10.2.3).

#[cfg(test)]
mod tests;

use iced_x86::Mnemonic;

use super::cpu::{cr0, cr4};
use super::operands::Step;
use super::xsave::{component, legacy};
use super::{Exception, Progress, Stop};

/// The x87 control word after FNINIT.
const CONTROL_WORD_INITIAL: u16 = 0x037F;
/// Exception masks and flags: invalid, denormal, divide by zero, overflow, underflow, precision.
const EXCEPTIONS: u16 = 0x003F;
/// Status word: stack fault.
const STATUS_STACK_FAULT: u16 = 1 << 6;
/// Status word: an unmasked exception is pending.
const STATUS_ERROR_SUMMARY: u16 = 1 << 7;
/// Status word: busy, a copy of the error summary.
const STATUS_BUSY: u16 = 1 << 15;
/// Control word: bits 7 and 15:13 read as 0, bit 6 as 1.
const CONTROL_WORD_WRITABLE: u16 = 0x1F3F;
const CONTROL_WORD_FIXED: u16 = 0x0040;

pub(super) fn complete(step: &mut Step<'_>) -> Result<Progress, Stop> {
    match step.instruction.mnemonic() {
        Mnemonic::Wait => wait(step)?,
        Mnemonic::Fnop => check_x87(step, true)?,
        Mnemonic::Fninit => initialize(step)?,
        Mnemonic::Fnclex => clear_exceptions(step)?,
        Mnemonic::Fnstcw => store(step, legacy::CONTROL_WORD)?,
        Mnemonic::Fnstsw => store(step, legacy::STATUS_WORD)?,
        Mnemonic::Fldcw => load_control_word(step)?,
        Mnemonic::Emms => empty_tags(step)?,
        Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => load_mxcsr(step)?,
        Mnemonic::Stmxcsr | Mnemonic::Vstmxcsr => store_mxcsr(step)?,
        _ => return Ok(Progress::NotMine),
    }
    Ok(Progress::Done)
}

/// #NM if CR0.EM or CR0.TS is set; then, for a waiting instruction, #MF if an error is pending.
fn check_x87(step: &mut Step<'_>, waiting: bool) -> Result<(), Stop> {
    let available = step.cpu.cr0()? & (cr0::EM | cr0::TS) == 0;
    step.require(available, Exception::device_not_available())?;
    if waiting { check_pending(step) } else { Ok(()) }
}

fn check_pending(step: &mut Step<'_>) -> Result<(), Stop> {
    let status = legacy::word(step.cpu.fpu()?, legacy::STATUS_WORD);
    if status & STATUS_ERROR_SUMMARY == 0 {
        return Ok(());
    }
    if step.cpu.cr0()? & cr0::NE == 0 {
        return Err(Stop::Unsupported("a pending x87 error with CR0.NE clear"));
    }
    Err(Exception::x87_error().into())
}

fn wait(step: &mut Step<'_>) -> Result<(), Stop> {
    let unavailable = cr0::MP | cr0::TS;
    let available = step.cpu.cr0()? & unavailable != unavailable;
    step.require(available, Exception::device_not_available())?;
    check_pending(step)
}

fn initialize(step: &mut Step<'_>) -> Result<(), Stop> {
    check_x87(step, false)?;
    let fpu = step.cpu.fpu_mut()?;
    component::materialize(fpu, component::X87);
    legacy::reset_top(fpu);
    legacy::set_word(fpu, legacy::CONTROL_WORD, CONTROL_WORD_INITIAL);
    // Status, tags (abridged: 0 is empty), opcode and both pointers.
    legacy::clear(fpu, legacy::STATUS_WORD..legacy::MXCSR);
    Ok(())
}

fn clear_exceptions(step: &mut Step<'_>) -> Result<(), Stop> {
    check_x87(step, false)?;
    let fpu = step.cpu.fpu_mut()?;
    component::materialize(fpu, component::X87);
    let cleared = EXCEPTIONS | STATUS_STACK_FAULT | STATUS_ERROR_SUMMARY | STATUS_BUSY;
    let status = legacy::word(fpu, legacy::STATUS_WORD) & !cleared;
    legacy::set_word(fpu, legacy::STATUS_WORD, status);
    Ok(())
}

fn store(step: &mut Step<'_>, offset: usize) -> Result<(), Stop> {
    check_x87(step, false)?;
    let fpu = step.cpu.fpu()?;
    let value = match (component::is_in_use(fpu, component::X87), offset) {
        (true, _) => legacy::word(fpu, offset),
        (false, legacy::CONTROL_WORD) => CONTROL_WORD_INITIAL,
        (false, _) => 0,
    };
    step.set_value(0, u64::from(value))
}

fn load_control_word(step: &mut Step<'_>) -> Result<(), Stop> {
    check_x87(step, true)?;
    let value = step.value(0)? as u16;
    let control = value & CONTROL_WORD_WRITABLE | CONTROL_WORD_FIXED;
    let fpu = step.cpu.fpu_mut()?;
    component::materialize(fpu, component::X87);
    legacy::set_word(fpu, legacy::CONTROL_WORD, control);
    // Unmasking an exception whose flag is set makes it pending.
    let mut status = legacy::word(fpu, legacy::STATUS_WORD);
    status &= !(STATUS_ERROR_SUMMARY | STATUS_BUSY);
    if status & EXCEPTIONS & !control != 0 {
        status |= STATUS_ERROR_SUMMARY | STATUS_BUSY;
    }
    legacy::set_word(fpu, legacy::STATUS_WORD, status);
    Ok(())
}

fn empty_tags(step: &mut Step<'_>) -> Result<(), Stop> {
    let no_emulation = step.cpu.cr0()? & cr0::EM == 0;
    step.require(no_emulation, Exception::invalid_opcode())?;
    check_x87(step, true)?;
    let fpu = step.cpu.fpu_mut()?;
    component::materialize(fpu, component::X87);
    legacy::reset_top(fpu);
    legacy::clear(fpu, legacy::TAG_WORD..legacy::OPCODE);
    Ok(())
}

fn check_mxcsr_access(step: &mut Step<'_>) -> Result<(), Stop> {
    let vex = matches!(step.instruction.mnemonic(), Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr);
    if vex {
        step.require_cr4(cr4::OSXSAVE)?;
        let both = component::mask(component::SSE) | component::mask(component::AVX);
        let enabled = step.cpu.xcr0()? & both == both;
        step.require(enabled, Exception::invalid_opcode())?;
    } else {
        let emulated = step.cpu.cr0()? & cr0::EM != 0;
        step.require(!emulated, Exception::invalid_opcode())?;
        step.require_cr4(cr4::OSFXSR)?;
    }
    let available = step.cpu.cr0()? & cr0::TS == 0;
    step.require(available, Exception::device_not_available())
}

fn load_mxcsr(step: &mut Step<'_>) -> Result<(), Stop> {
    check_mxcsr_access(step)?;
    let value = step.value(0)? as u32;
    let reserved = value & !legacy::mxcsr_mask(step.cpu.fpu()?) != 0;
    step.require(!reserved, Exception::general_protection())?;
    legacy::set_mxcsr(step.cpu.fpu_mut()?, value);
    Ok(())
}

fn store_mxcsr(step: &mut Step<'_>) -> Result<(), Stop> {
    check_mxcsr_access(step)?;
    let value = legacy::mxcsr(step.cpu.fpu()?);
    step.set_value(0, u64::from(value))
}
