//! Logic and integer arithmetic, lane by lane.

use iced_x86::Mnemonic;

use super::{
    Vector, immediate, map8, map16, map32, map64, read, read_sources, vector_bytes, write,
};
use crate::assist::cpu::rflags::{AF, CF, OF, PF, SF, ZF};
use crate::assist::operands::Step;
use crate::assist::{Progress, Stop};

type Operation = fn(&Vector, &Vector) -> Vector;

pub(super) fn complete(step: &mut Step<'_>) -> Result<Progress, Stop> {
    use Mnemonic::*;
    let mnemonic = step.instruction.mnemonic();
    match mnemonic {
        Ptest | Vptest => return test(step),
        Pabsb | Vpabsb | Pabsw | Vpabsw | Pabsd | Vpabsd => return absolute(step),
        Vpternlogd | Vpternlogq => return ternary_logic(step),
        _ => {}
    }
    let operation = logic(mnemonic)
        .or_else(|| addition(mnemonic))
        .or_else(|| comparison(mnemonic))
        .or_else(|| extremum(mnemonic))
        .or_else(|| multiplication(mnemonic));
    let Some(operation) = operation else {
        return Ok(Progress::NotMine);
    };
    let (one, other) = read_sources(step)?;
    write(step, &operation(&one, &other), vector_bytes(step))
}

fn logic(mnemonic: Mnemonic) -> Option<Operation> {
    use Mnemonic::*;
    Some(match mnemonic {
        Pxor | Xorps | Xorpd | Vpxor | Vxorps | Vxorpd | Vpxord | Vpxorq => {
            |a, b| map64(a, b, |a, b| a ^ b)
        }
        Pand | Andps | Andpd | Vpand | Vandps | Vandpd | Vpandd | Vpandq => {
            |a, b| map64(a, b, |a, b| a & b)
        }
        Pandn | Andnps | Andnpd | Vpandn | Vandnps | Vandnpd | Vpandnd | Vpandnq => {
            |a, b| map64(a, b, |a, b| !a & b)
        }
        Por | Orps | Orpd | Vpor | Vorps | Vorpd | Vpord | Vporq => {
            |a, b| map64(a, b, |a, b| a | b)
        }
        _ => return None,
    })
}

fn addition(mnemonic: Mnemonic) -> Option<Operation> {
    use Mnemonic::*;
    Some(match mnemonic {
        Paddb | Vpaddb => |a, b| map8(a, b, u8::wrapping_add),
        Paddw | Vpaddw => |a, b| map16(a, b, u16::wrapping_add),
        Paddd | Vpaddd => |a, b| map32(a, b, u32::wrapping_add),
        Paddq | Vpaddq => |a, b| map64(a, b, u64::wrapping_add),
        Psubb | Vpsubb => |a, b| map8(a, b, u8::wrapping_sub),
        Psubw | Vpsubw => |a, b| map16(a, b, u16::wrapping_sub),
        Psubd | Vpsubd => |a, b| map32(a, b, u32::wrapping_sub),
        Psubq | Vpsubq => |a, b| map64(a, b, u64::wrapping_sub),
        Paddusb | Vpaddusb => |a, b| map8(a, b, u8::saturating_add),
        Paddusw | Vpaddusw => |a, b| map16(a, b, u16::saturating_add),
        Psubusb | Vpsubusb => |a, b| map8(a, b, u8::saturating_sub),
        Psubusw | Vpsubusw => |a, b| map16(a, b, u16::saturating_sub),
        Paddsb | Vpaddsb => |a, b| map8(a, b, |a, b| (a as i8).saturating_add(b as i8) as u8),
        Paddsw | Vpaddsw => |a, b| map16(a, b, |a, b| (a as i16).saturating_add(b as i16) as u16),
        Psubsb | Vpsubsb => |a, b| map8(a, b, |a, b| (a as i8).saturating_sub(b as i8) as u8),
        Psubsw | Vpsubsw => |a, b| map16(a, b, |a, b| (a as i16).saturating_sub(b as i16) as u16),
        Pavgb | Vpavgb => |a, b| map8(a, b, |a, b| (u16::from(a) + u16::from(b)).div_ceil(2) as u8),
        Pavgw | Vpavgw => {
            |a, b| map16(a, b, |a, b| (u32::from(a) + u32::from(b)).div_ceil(2) as u16)
        }
        _ => return None,
    })
}

fn comparison(mnemonic: Mnemonic) -> Option<Operation> {
    use Mnemonic::*;
    Some(match mnemonic {
        Pcmpeqb | Vpcmpeqb => |a, b| map8(a, b, |a, b| if a == b { u8::MAX } else { 0 }),
        Pcmpeqw | Vpcmpeqw => |a, b| map16(a, b, |a, b| if a == b { u16::MAX } else { 0 }),
        Pcmpeqd | Vpcmpeqd => |a, b| map32(a, b, |a, b| if a == b { u32::MAX } else { 0 }),
        Pcmpeqq | Vpcmpeqq => |a, b| map64(a, b, |a, b| if a == b { u64::MAX } else { 0 }),
        Pcmpgtb | Vpcmpgtb => |a, b| map8(a, b, |a, b| if a as i8 > b as i8 { u8::MAX } else { 0 }),
        Pcmpgtw | Vpcmpgtw => {
            |a, b| map16(a, b, |a, b| if a as i16 > b as i16 { u16::MAX } else { 0 })
        }
        Pcmpgtd | Vpcmpgtd => {
            |a, b| map32(a, b, |a, b| if a as i32 > b as i32 { u32::MAX } else { 0 })
        }
        Pcmpgtq | Vpcmpgtq => {
            |a, b| map64(a, b, |a, b| if a as i64 > b as i64 { u64::MAX } else { 0 })
        }
        _ => return None,
    })
}

fn extremum(mnemonic: Mnemonic) -> Option<Operation> {
    use Mnemonic::*;
    Some(match mnemonic {
        Pminub | Vpminub => |a, b| map8(a, b, Ord::min),
        Pmaxub | Vpmaxub => |a, b| map8(a, b, Ord::max),
        Pminuw | Vpminuw => |a, b| map16(a, b, Ord::min),
        Pmaxuw | Vpmaxuw => |a, b| map16(a, b, Ord::max),
        Pminud | Vpminud => |a, b| map32(a, b, Ord::min),
        Pmaxud | Vpmaxud => |a, b| map32(a, b, Ord::max),
        Pminsb | Vpminsb => |a, b| map8(a, b, |a, b| (a as i8).min(b as i8) as u8),
        Pmaxsb | Vpmaxsb => |a, b| map8(a, b, |a, b| (a as i8).max(b as i8) as u8),
        Pminsw | Vpminsw => |a, b| map16(a, b, |a, b| (a as i16).min(b as i16) as u16),
        Pmaxsw | Vpmaxsw => |a, b| map16(a, b, |a, b| (a as i16).max(b as i16) as u16),
        Pminsd | Vpminsd => |a, b| map32(a, b, |a, b| (a as i32).min(b as i32) as u32),
        Pmaxsd | Vpmaxsd => |a, b| map32(a, b, |a, b| (a as i32).max(b as i32) as u32),
        _ => return None,
    })
}

fn multiplication(mnemonic: Mnemonic) -> Option<Operation> {
    use Mnemonic::*;
    Some(match mnemonic {
        Pmullw | Vpmullw => |a, b| map16(a, b, u16::wrapping_mul),
        Pmulld | Vpmulld => |a, b| map32(a, b, u32::wrapping_mul),
        Pmulhw | Vpmulhw => {
            |a, b| map16(a, b, |a, b| ((i32::from(a as i16) * i32::from(b as i16)) >> 16) as u16)
        }
        Pmulhuw | Vpmulhuw => {
            |a, b| map16(a, b, |a, b| ((u32::from(a) * u32::from(b)) >> 16) as u16)
        }
        Pmuludq | Vpmuludq => |a, b| map64(a, b, |a, b| u64::from(a as u32) * u64::from(b as u32)),
        Pmuldq | Vpmuldq => {
            |a, b| map64(a, b, |a, b| i64::from(a as i32).wrapping_mul(i64::from(b as i32)) as u64)
        }
        Pmaddwd | Vpmaddwd => |a, b| map32(a, b, multiply_add),
        _ => return None,
    })
}

/// The sum of the products of both halves, signed.
fn multiply_add(one: u32, other: u32) -> u32 {
    let low = i32::from(one as i16) * i32::from(other as i16);
    let high = i32::from((one >> 16) as i16) * i32::from((other >> 16) as i16);
    low.wrapping_add(high) as u32
}

fn absolute(step: &mut Step<'_>) -> Result<Progress, Stop> {
    use Mnemonic::*;
    let size = vector_bytes(step);
    let value = read(step, 1, size)?;
    let result = match step.instruction.mnemonic() {
        Pabsb | Vpabsb => map8(&value, &value, |a, _| (a as i8).unsigned_abs()),
        Pabsw | Vpabsw => map16(&value, &value, |a, _| (a as i16).unsigned_abs()),
        _ => map32(&value, &value, |a, _| (a as i32).unsigned_abs()),
    };
    write(step, &result, size)
}

/// VPTERNLOG: the immediate is the truth table, indexed by a bit of each operand.
fn ternary_logic(step: &mut Step<'_>) -> Result<Progress, Stop> {
    let size = vector_bytes(step);
    let third = read(step, 2, size)?;
    let (first, second) = (read(step, 0, size)?, read(step, 1, size)?);
    let table = immediate(step);
    let mut result = [0; 64];
    for index in 0..8u8 {
        if table >> index & 1 == 0 {
            continue;
        }
        let select = |vector: &Vector, bit: u8| {
            let flip = if index >> bit & 1 == 1 { 0 } else { u64::MAX };
            map64(vector, vector, |a, _| a ^ flip)
        };
        let both = map64(&select(&first, 2), &select(&second, 1), |a, b| a & b);
        let term = map64(&both, &select(&third, 0), |a, b| a & b);
        result = map64(&result, &term, |a, b| a | b);
    }
    write(step, &result, size)
}

/// PTEST: ZF if no bit is common, CF if the second operand has none beyond the first.
fn test(step: &mut Step<'_>) -> Result<Progress, Stop> {
    let size = vector_bytes(step);
    let second = read(step, 1, size)?;
    let first = read(step, 0, size)?;
    let is_zero = |vector: Vector| vector.iter().all(|byte| *byte == 0);
    let zero = is_zero(map64(&first, &second, |a, b| a & b));
    let carry = is_zero(map64(&first, &second, |a, b| !a & b));
    let flags = if zero { ZF } else { 0 } | if carry { CF } else { 0 };
    step.set_flags(ZF | CF | OF | AF | PF | SF, flags)?;
    Ok(Progress::Done)
}
