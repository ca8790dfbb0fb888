//! Moves between vector registers, general registers and memory.

use iced_x86::Mnemonic;

use super::{LANE, Vector, aligned_address, read, read_memory, register, write};
use crate::assist::operands::Step;
use crate::assist::{Progress, Stop};

pub(super) fn complete(step: &mut Step<'_>) -> Result<Progress, Stop> {
    use Mnemonic::*;
    match step.instruction.mnemonic() {
        Movups | Movupd | Movdqu | Lddqu | Vmovups | Vmovupd | Vmovdqu | Vlddqu | Vmovdqu8
        | Vmovdqu16 | Vmovdqu32 | Vmovdqu64 => whole(step, false),
        Movaps | Movapd | Movdqa | Movntps | Movntpd | Movntdq | Movntdqa | Vmovaps | Vmovapd
        | Vmovdqa | Vmovdqa32 | Vmovdqa64 | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa => {
            whole(step, true)
        }
        Movd | Movq | Vmovd | Vmovq => low(step),
        Movss | Vmovss => scalar(step, 4),
        Movsd | Vmovsd => scalar(step, 8),
        Movlps | Movlpd | Vmovlps | Vmovlpd => half(step, 0, 0),
        Movhps | Movhpd | Vmovhps | Vmovhpd => half(step, 8, 0),
        Movlhps | Vmovlhps => half(step, 8, 0),
        Movhlps | Vmovhlps => half(step, 0, 8),
        Vzeroupper => clear(step, LANE),
        Vzeroall => clear(step, 0),
        _ => Ok(Progress::NotMine),
    }
}

fn whole(step: &mut Step<'_>, aligned: bool) -> Result<Progress, Stop> {
    let size = step.operand_bytes(0).max(step.operand_bytes(1)).min(size_of::<Vector>());
    let alignment = if aligned { size } else { 1 };
    if step.is_memory(0) {
        let value = read(step, 1, size)?;
        let linear = aligned_address(step, 0, size, alignment)?;
        step.cpu.write(linear, &value[..size])?;
        return Ok(Progress::Done);
    }
    let value = match step.is_memory(1) {
        true => read_memory(step, 1, size, alignment)?,
        false => read(step, 1, size)?,
    };
    write(step, &value, size)
}

/// The low 4 or 8 bytes, zero-extended into a vector register.
fn low(step: &mut Step<'_>) -> Result<Progress, Stop> {
    let to_vector = !step.is_memory(0) && step.instruction.op0_register().is_vector_register();
    let from_vector = !step.is_memory(1) && step.instruction.op1_register().is_vector_register();
    let value = match from_vector {
        true => quad(&read(step, 1, LANE)?, 0),
        false => step.value(1)?,
    };
    if to_vector {
        let mut vector = [0; 64];
        set_quad(&mut vector, 0, value);
        return write(step, &vector, LANE);
    }
    step.set_value(0, value)?;
    Ok(Progress::Done)
}

/// MOVSS and MOVSD: from memory zero-extended, between registers merged.
fn scalar(step: &mut Step<'_>, size: usize) -> Result<Progress, Stop> {
    if step.is_memory(0) {
        let value = read(step, 1, LANE)?;
        step.write_memory(0, &value[..size])?;
        return Ok(Progress::Done);
    }
    if step.is_memory(1) {
        let value = read_memory(step, 1, size, 1)?;
        return write(step, &value, LANE);
    }
    let last = step.instruction.op_count().saturating_sub(1);
    let source = read(step, last, LANE)?;
    let mut value = read(step, last.saturating_sub(1), LANE)?;
    value[..size].copy_from_slice(&source[..size]);
    write(step, &value, LANE)
}

/// Moves 8 bytes to offset `to` of a register, from offset `from` of another or memory; or from
/// offset `to` of a register to memory.
fn half(step: &mut Step<'_>, to: usize, from: usize) -> Result<Progress, Stop> {
    if step.is_memory(0) {
        let value = quad(&read(step, 1, LANE)?, to);
        step.write_memory(0, &value.to_le_bytes())?;
        return Ok(Progress::Done);
    }
    let last = step.instruction.op_count().saturating_sub(1);
    let moved = match step.is_memory(last) {
        true => quad(&read_memory(step, last, 8, 1)?, 0),
        false => quad(&read(step, last, LANE)?, from),
    };
    let mut value = read(step, last.saturating_sub(1), LANE)?;
    set_quad(&mut value, to, moved);
    write(step, &value, LANE)
}

fn clear(step: &mut Step<'_>, from: usize) -> Result<Progress, Stop> {
    register::clear_from(step, from)?;
    Ok(Progress::Done)
}

/// The 8 bytes at `offset`.
fn quad(vector: &Vector, offset: usize) -> u64 {
    match vector.get(offset..).and_then(<[u8]>::first_chunk) {
        Some(bytes) => u64::from_le_bytes(*bytes),
        None => 0,
    }
}

fn set_quad(vector: &mut Vector, offset: usize, value: u64) {
    if let Some(bytes) = vector.get_mut(offset..).and_then(<[u8]>::first_chunk_mut) {
        *bytes = value.to_le_bytes();
    }
}
