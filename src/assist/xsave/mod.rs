//! The XSAVE and FXSAVE families (SDM vol. 1 §10.5 and chapter 13).
//!
//! The vCPU's state is an image in the standard format, as KVM keeps it. Differences from a
//! processor that the architecture allows: no modified optimisation in XSAVEOPT and XSAVES, and
//! the segment selectors of the last x87 instruction (FCS, FDS) read as 0, as on processors that
//! deprecate them. Supervisor state components are not supported: KVM's image has no place for
//! them, so IA32_XSS must select none.

pub(super) mod component;
pub(super) mod legacy;
mod restore;
mod save;

#[cfg(test)]
mod tests;

use iced_x86::{Mnemonic, Register};

use super::cpu::{cr0, cr4, msr};
use super::operands::Step;
use super::{Exception, Progress, Stop};

pub(super) use component::in_use;

/// The members of the XSAVE family, apart from REX.W.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// XSAVE and XRSTOR; the latter takes the compacted format as well.
    Standard,
    /// XSAVEOPT.
    Optimized,
    /// XSAVEC.
    Compacted,
    /// XSAVES and XRSTORS.
    Supervisor,
}

pub(super) fn complete(step: &mut Step<'_>) -> Result<Progress, Stop> {
    match step.instruction.mnemonic() {
        Mnemonic::Fxsave => save::fxsave(step, false)?,
        Mnemonic::Fxsave64 => save::fxsave(step, true)?,
        Mnemonic::Fxrstor => restore::fxrstor(step, false)?,
        Mnemonic::Fxrstor64 => restore::fxrstor(step, true)?,
        Mnemonic::Xsave => save::xsave(step, Form::Standard, false)?,
        Mnemonic::Xsave64 => save::xsave(step, Form::Standard, true)?,
        Mnemonic::Xsaveopt => save::xsave(step, Form::Optimized, false)?,
        Mnemonic::Xsaveopt64 => save::xsave(step, Form::Optimized, true)?,
        Mnemonic::Xsavec => save::xsave(step, Form::Compacted, false)?,
        Mnemonic::Xsavec64 => save::xsave(step, Form::Compacted, true)?,
        Mnemonic::Xsaves => save::xsave(step, Form::Supervisor, false)?,
        Mnemonic::Xsaves64 => save::xsave(step, Form::Supervisor, true)?,
        Mnemonic::Xrstor => restore::xrstor(step, Form::Standard, false)?,
        Mnemonic::Xrstor64 => restore::xrstor(step, Form::Standard, true)?,
        Mnemonic::Xrstors => restore::xrstor(step, Form::Supervisor, false)?,
        Mnemonic::Xrstors64 => restore::xrstor(step, Form::Supervisor, true)?,
        _ => return Ok(Progress::NotMine),
    }
    Ok(Progress::Done)
}

/// EDX:EAX.
pub(super) fn requested(step: &mut Step<'_>) -> Result<u64, Stop> {
    Ok(step.register(Register::EDX)? << 32 | step.register(Register::EAX)?)
}

/// The checks of FXSAVE and FXRSTOR.
fn check_fxsave(step: &mut Step<'_>) -> Result<(), Stop> {
    let available = step.cpu.cr0()? & (cr0::EM | cr0::TS) == 0;
    step.require(available, Exception::device_not_available())
}

/// The checks of the XSAVE family; then the components that the instruction works on (RFBM) and
/// those it could (XCR0).
fn check_xsave(step: &mut Step<'_>, form: Form) -> Result<(u64, u64), Stop> {
    step.require_cr4(cr4::OSXSAVE)?;
    let available = step.cpu.cr0()? & cr0::TS == 0;
    step.require(available, Exception::device_not_available())?;
    let enabled = step.cpu.xcr0()?;
    if form == Form::Supervisor {
        step.require_ring_0()?;
        if step.cpu.read_msr(msr::IA32_XSS)? != 0 {
            return Err(Stop::Unsupported("XSAVES or XRSTORS with supervisor state components"));
        }
    }
    Ok((requested(step)? & enabled, enabled))
}

/// The linear address of the area; stops with #GP unless it is a multiple of `alignment`.
fn area(step: &mut Step<'_>, alignment: u64, size_bytes: usize) -> Result<u64, Stop> {
    let linear = step.address(0, size_bytes)?;
    step.require(linear.is_multiple_of(alignment), Exception::general_protection())?;
    Ok(linear)
}
