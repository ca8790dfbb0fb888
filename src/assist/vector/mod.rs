//! Moves, logic, integer arithmetic and shuffles on XMM, YMM and ZMM registers: what a kernel
//! uses between kernel_fpu_begin and kernel_fpu_end.
//!
//! EVEX forms are completed without masking, broadcast and mask-register operands only; MMX
//! registers and floating-point arithmetic not at all.

mod arithmetic;
mod cipher;
mod moves;
mod register;
mod shift;
mod shuffle;

#[cfg(test)]
mod tests;

use iced_x86::{EncodingKind, Mnemonic, OpKind, Register};

use super::cpu::{cr0, cr4};
use super::operands::Step;
use super::xsave::component;
use super::{Exception, Progress, Stop};

/// A vector register or as much of one as an operation needs, the rest 0.
type Vector = [u8; 64];

/// Bytes of an XMM register, and of the lanes that most shuffles keep to.
const LANE: usize = 16;

type Part = fn(&mut Step<'_>) -> Result<Progress, Stop>;

const PARTS: [Part; 5] =
    [moves::complete, arithmetic::complete, shift::complete, shuffle::complete, cipher::complete];

pub(super) fn complete(step: &mut Step<'_>) -> Result<Progress, Stop> {
    let instruction = step.instruction;
    match instruction.mnemonic() {
        // The general registers' moves, and one that touches no vector register.
        Mnemonic::Movnti => {
            let value = step.value(1)?;
            step.set_value(0, value)?;
            return Ok(Progress::Done);
        }
        Mnemonic::Vzeroupper | Mnemonic::Vzeroall => {}
        _ if !has_vector_operand(step) => return Ok(Progress::NotMine),
        _ => {}
    }
    let special = instruction.op_mask() != Register::None || instruction.is_broadcast();
    if special {
        return Err(Stop::Unsupported("an EVEX instruction with masking or broadcast"));
    }
    check_available(step)?;
    for part in PARTS {
        match part(step)? {
            Progress::NotMine => {}
            progress => return Ok(progress),
        }
    }
    Ok(Progress::NotMine)
}

/// Whether there is a vector register among the operands, and neither MMX nor mask registers.
fn has_vector_operand(step: &Step<'_>) -> bool {
    let mut found = false;
    for index in 0..step.instruction.op_count() {
        if step.instruction.op_kind(index) == OpKind::Register {
            let register = step.instruction.op_register(index);
            if register.is_mm() || register.is_k() {
                return false;
            }
            found |= register.is_vector_register();
        }
    }
    found
}

fn is_legacy(step: &Step<'_>) -> bool {
    step.instruction.encoding() == EncodingKind::Legacy
}

fn check_available(step: &mut Step<'_>) -> Result<(), Stop> {
    let sse = component::mask(component::SSE);
    let avx = sse | component::mask(component::AVX);
    let avx512 = avx
        | component::mask(component::OPMASK)
        | component::mask(component::ZMM_HI256)
        | component::mask(component::HI16_ZMM);
    let needed = match step.instruction.encoding() {
        EncodingKind::Legacy => 0,
        EncodingKind::VEX => avx,
        EncodingKind::EVEX => avx512,
        _ => return Err(Stop::Unsupported("an XOP, 3DNow! or MVEX instruction")),
    };
    if needed == 0 {
        let emulated = step.cpu.cr0()? & cr0::EM != 0;
        step.require(!emulated, Exception::invalid_opcode())?;
        step.require_cr4(cr4::OSFXSR)?;
    } else {
        step.require_cr4(cr4::OSXSAVE)?;
        let enabled = step.cpu.xcr0()? & needed == needed;
        step.require(enabled, Exception::invalid_opcode())?;
    }
    let available = step.cpu.cr0()? & cr0::TS == 0;
    step.require(available, Exception::device_not_available())
}

/// Bytes of the vectors that the instruction works on: those of its destination.
fn vector_bytes(step: &Step<'_>) -> usize {
    step.operand_bytes(0).min(size_of::<Vector>())
}

/// Operand `index`: a vector register, or `size` bytes of memory. Legacy instructions want a
/// 16-byte memory operand aligned.
fn read(step: &mut Step<'_>, index: u32, size: usize) -> Result<Vector, Stop> {
    if !step.is_memory(index) {
        return register::read(step, step.instruction.op_register(index));
    }
    let alignment = if is_legacy(step) && size == LANE { LANE } else { 1 };
    read_memory(step, index, size, alignment)
}

/// `size` bytes of memory operand `index`; stops with #GP unless they are aligned.
fn read_memory(
    step: &mut Step<'_>,
    index: u32,
    size: usize,
    alignment: usize,
) -> Result<Vector, Stop> {
    let mut vector = [0; 64];
    let size = size.min(vector.len());
    let linear = aligned_address(step, index, size, alignment)?;
    step.cpu.read(linear, &mut vector[..size])?;
    Ok(vector)
}

fn aligned_address(
    step: &mut Step<'_>,
    index: u32,
    size: usize,
    alignment: usize,
) -> Result<u64, Stop> {
    let linear = step.address(index, size)?;
    let aligned = linear.is_multiple_of(alignment as u64);
    step.require(aligned, Exception::general_protection())?;
    Ok(linear)
}

/// Sets the register in operand 0 to the low `size` bytes of `value`.
fn write(step: &mut Step<'_>, value: &Vector, size: usize) -> Result<Progress, Stop> {
    let keep_upper = is_legacy(step);
    register::write(step, step.instruction.op_register(0), value, size, keep_upper)?;
    Ok(Progress::Done)
}

/// The two sources of an operation: the destination is the first for legacy instructions.
fn sources(step: &Step<'_>) -> (u32, u32) {
    if is_legacy(step) { (0, 1) } else { (1, 2) }
}

/// Both sources, whole vectors.
fn read_sources(step: &mut Step<'_>) -> Result<(Vector, Vector), Stop> {
    let (first, second) = sources(step);
    let size = vector_bytes(step);
    let second = read(step, second, size)?;
    Ok((read(step, first, size)?, second))
}

/// The last operand, an immediate byte.
fn immediate(step: &Step<'_>) -> u8 {
    step.instruction.immediate8()
}

macro_rules! lanes {
    ($($name:ident: $type:ty;)+) => {$(
        /// Applies `operation` to each pair of lanes.
        fn $name(
            one: &Vector,
            other: &Vector,
            operation: impl Fn($type, $type) -> $type,
        ) -> Vector {
            const BYTES: usize = size_of::<$type>();
            let mut result = [0; 64];
            let pairs = one.as_chunks::<BYTES>().0.iter().zip(other.as_chunks::<BYTES>().0);
            for (slot, (one, other)) in result.as_chunks_mut::<BYTES>().0.iter_mut().zip(pairs) {
                let (one, other) = (<$type>::from_le_bytes(*one), <$type>::from_le_bytes(*other));
                *slot = operation(one, other).to_le_bytes();
            }
            result
        }
    )+};
}

lanes! {
    map8: u8;
    map16: u16;
    map32: u32;
    map64: u64;
}

/// Applies `operation` to each pair of 128-bit lanes.
fn map128(
    one: &Vector,
    other: &Vector,
    operation: impl Fn(&[u8; LANE], &[u8; LANE]) -> [u8; LANE],
) -> Vector {
    let mut result = [0; 64];
    let pairs = one.as_chunks::<LANE>().0.iter().zip(other.as_chunks::<LANE>().0);
    for (slot, (one, other)) in result.as_chunks_mut::<LANE>().0.iter_mut().zip(pairs) {
        *slot = operation(one, other);
    }
    result
}
