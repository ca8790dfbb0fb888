//! Instructions on general registers: bit counting and BMI, carry chains, byte order, CRC, and the
//! 16-byte compare and exchange.
//!
//! A flag that the SDM leaves undefined keeps its value.

#[cfg(test)]
mod tests;

use iced_x86::{Mnemonic, Register};

use super::cpu::rflags::{AF, CF, OF, PF, SF, ZF};
use super::operands::Step;
use super::{Exception, Progress, Stop};

pub(super) fn complete(step: &mut Step<'_>) -> Result<Progress, Stop> {
    match step.instruction.mnemonic() {
        Mnemonic::Popcnt => count_ones(step)?,
        Mnemonic::Lzcnt => count_zeros(step, leading_zeros)?,
        Mnemonic::Tzcnt => count_zeros(step, trailing_zeros)?,
        Mnemonic::Andn => and_not(step)?,
        Mnemonic::Bextr => extract_bits(step)?,
        Mnemonic::Bzhi => zero_high_bits(step)?,
        Mnemonic::Blsi | Mnemonic::Blsr | Mnemonic::Blsmsk => lowest_set_bit(step)?,
        Mnemonic::Mulx => multiply(step)?,
        Mnemonic::Pdep => three_operands(step, |source, mask, _| deposit(source, mask))?,
        Mnemonic::Pext => three_operands(step, |source, mask, _| extract(source, mask))?,
        Mnemonic::Rorx => three_operands(step, rotate_right)?,
        Mnemonic::Shlx => three_operands(step, |value, count, bits| value << (count % bits))?,
        Mnemonic::Shrx => three_operands(step, |value, count, bits| value >> (count % bits))?,
        Mnemonic::Sarx => three_operands(step, shift_arithmetic)?,
        Mnemonic::Adcx => add_with(step, CF)?,
        Mnemonic::Adox => add_with(step, OF)?,
        Mnemonic::Movbe => move_big_endian(step)?,
        Mnemonic::Crc32 => crc32(step)?,
        Mnemonic::Cmpxchg16b => compare_exchange_16(step)?,
        _ => return Ok(Progress::NotMine),
    }
    Ok(Progress::Done)
}

/// `flag` if `condition` holds, else nothing.
fn when(condition: bool, flag: u64) -> u64 {
    if condition { flag } else { 0 }
}

/// ZF and SF as a result of `bits` bits sets them.
fn zero_and_sign(result: u64, bits: u64) -> u64 {
    when(result == 0, ZF) | when(result >> (bits - 1) & 1 != 0, SF)
}

/// Bits of operand 0: 8 to 64 for the general registers that these instructions take.
fn width(step: &Step<'_>) -> u64 {
    8 * (step.operand_bytes(0) as u64).clamp(1, 8)
}

fn count_ones(step: &mut Step<'_>) -> Result<(), Stop> {
    let value = step.value(1)?;
    step.set_value(0, u64::from(value.count_ones()))?;
    step.set_flags(OF | SF | ZF | AF | CF | PF, when(value == 0, ZF))
}

fn leading_zeros(value: u64, bits: u64) -> u64 {
    u64::from(value.leading_zeros()) - (64 - bits)
}

fn trailing_zeros(value: u64, bits: u64) -> u64 {
    u64::from(value.trailing_zeros()).min(bits)
}

fn count_zeros(step: &mut Step<'_>, count: fn(u64, u64) -> u64) -> Result<(), Stop> {
    let value = step.value(1)?;
    let result = count(value, width(step));
    step.set_value(0, result)?;
    step.set_flags(CF | ZF, when(value == 0, CF) | when(result == 0, ZF))
}

fn and_not(step: &mut Step<'_>) -> Result<(), Stop> {
    let result = !step.value(1)? & step.value(2)?;
    let bits = width(step);
    step.set_value(0, result)?;
    step.set_flags(SF | ZF | OF | CF, zero_and_sign(result, bits))
}

fn extract_bits(step: &mut Step<'_>) -> Result<(), Stop> {
    let (value, control) = (step.value(1)?, step.value(2)?);
    let (start, length) = (control as u8, (control >> 8) as u8);
    let shifted = value.checked_shr(u32::from(start)).unwrap_or_default();
    let mask = !u64::MAX.checked_shl(u32::from(length)).unwrap_or_default();
    let result = shifted & mask;
    step.set_value(0, result)?;
    step.set_flags(ZF | CF | OF, when(result == 0, ZF))
}

fn zero_high_bits(step: &mut Step<'_>) -> Result<(), Stop> {
    let (value, index) = (step.value(1)?, step.value(2)? & 0xFF);
    let bits = width(step);
    let result = if index < bits { value & !(u64::MAX << index) } else { value };
    step.set_value(0, result)?;
    step.set_flags(ZF | SF | CF | OF, zero_and_sign(result, bits) | when(index >= bits, CF))
}

fn lowest_set_bit(step: &mut Step<'_>) -> Result<(), Stop> {
    let value = step.value(1)?;
    let bits = width(step);
    let below = value.wrapping_sub(1);
    let (result, carry) = match step.instruction.mnemonic() {
        Mnemonic::Blsi => (value & value.wrapping_neg(), value != 0),
        Mnemonic::Blsr => (value & below, value == 0),
        _ => (value ^ below, value == 0),
    };
    let result = result & (u64::MAX >> (64 - bits));
    step.set_value(0, result)?;
    step.set_flags(ZF | SF | CF | OF, zero_and_sign(result, bits) | when(carry, CF))
}

/// MULX: the high half goes to operand 0, the low half to operand 1, which comes first: when they
/// are one register it holds the high half.
fn multiply(step: &mut Step<'_>) -> Result<(), Stop> {
    let bits = width(step);
    let implied = if bits == 64 { Register::RDX } else { Register::EDX };
    let product = u128::from(step.register(implied)?) * u128::from(step.value(2)?);
    step.set_value(1, product as u64)?;
    step.set_value(0, (product >> bits) as u64)
}

/// Operand 0 becomes `operation(operand 1, operand 2, bits)`; no flag changes.
fn three_operands(step: &mut Step<'_>, operation: fn(u64, u64, u64) -> u64) -> Result<(), Stop> {
    let bits = width(step);
    let result = operation(step.value(1)?, step.value(2)?, bits);
    step.set_value(0, result)
}

fn rotate_right(value: u64, count: u64, bits: u64) -> u64 {
    match bits {
        64 => value.rotate_right((count % 64) as u32),
        _ => u64::from((value as u32).rotate_right((count % 32) as u32)),
    }
}

fn shift_arithmetic(value: u64, count: u64, bits: u64) -> u64 {
    match bits {
        64 => (value as i64 >> (count % 64)) as u64,
        _ => (value as i32 >> (count % 32)) as u64,
    }
}

/// PDEP: the low bits of `source` go to the places of the set bits in `mask`.
fn deposit(mut source: u64, mut mask: u64) -> u64 {
    let mut result = 0;
    while mask != 0 {
        let lowest = mask & mask.wrapping_neg();
        if source & 1 != 0 {
            result |= lowest;
        }
        source >>= 1;
        mask ^= lowest;
    }
    result
}

/// PEXT: the bits of `source` at the set bits of `mask` come together at the bottom.
fn extract(source: u64, mut mask: u64) -> u64 {
    let mut result = 0;
    let mut place = 1u64;
    while mask != 0 {
        let lowest = mask & mask.wrapping_neg();
        if source & lowest != 0 {
            result |= place;
        }
        place = place.wrapping_shl(1);
        mask ^= lowest;
    }
    result
}

/// ADCX and ADOX: an addition that reads and writes `flag` alone.
fn add_with(step: &mut Step<'_>, flag: u64) -> Result<(), Stop> {
    let bits = width(step);
    let carry_in = step.cpu.registers()?.rflags & flag != 0;
    let sum = u128::from(step.value(0)?) + u128::from(step.value(1)?) + u128::from(carry_in);
    step.set_value(0, sum as u64)?;
    step.set_flags(flag, when(sum >> bits != 0, flag))
}

fn move_big_endian(step: &mut Step<'_>) -> Result<(), Stop> {
    let bits = if step.is_memory(0) { 8 * step.operand_bytes(1) as u64 } else { width(step) };
    let swapped = step.value(1)?.swap_bytes() >> (64 - bits.clamp(1, 64));
    step.set_value(0, swapped)
}

/// CRC32 with the Castagnoli polynomial 11EDC6F41H, its bits reversed.
fn crc32(step: &mut Step<'_>) -> Result<(), Stop> {
    const POLYNOMIAL_REVERSED: u32 = 0x82F6_3B78;
    let source_bytes = step.operand_bytes(1).min(8);
    let source = step.value(1)?.to_le_bytes();
    let mut crc = step.value(0)? as u32;
    for byte in source.iter().take(source_bytes) {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 != 0 { POLYNOMIAL_REVERSED } else { 0 };
        }
    }
    step.set_value(0, u64::from(crc))
}

fn compare_exchange_16(step: &mut Step<'_>) -> Result<(), Stop> {
    let linear = step.address(0, 16)?;
    step.require(linear.is_multiple_of(16), Exception::general_protection())?;
    let expected = pair(step, Register::RDX, Register::RAX)?;
    let new = pair(step, Register::RCX, Register::RBX)?;
    let found = step.cpu.compare_exchange_16(linear, expected, new)?;
    if found != expected {
        step.set_register(Register::RAX, found as u64)?;
        step.set_register(Register::RDX, (found >> 64) as u64)?;
    }
    step.set_flags(ZF, when(found == expected, ZF))
}

fn pair(step: &mut Step<'_>, high: Register, low: Register) -> Result<u128, Stop> {
    Ok(u128::from(step.register(high)?) << 64 | u128::from(step.register(low)?))
}
