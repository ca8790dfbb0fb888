//! Shifts and rotations.

use iced_x86::{Mnemonic, OpKind};

use super::{
    LANE, Vector, immediate, map16, map32, map64, map128, read, sources, vector_bytes, write,
};
use crate::assist::operands::Step;
use crate::assist::{Progress, Stop};

type ByCount = fn(&Vector, u32) -> Vector;
type ByLane = fn(&Vector, &Vector) -> Vector;

pub(super) fn complete(step: &mut Step<'_>) -> Result<Progress, Stop> {
    let mnemonic = step.instruction.mnemonic();
    let (first, second) = sources(step);
    let size = vector_bytes(step);
    if let Some(operation) = by_count(mnemonic) {
        let count = match step.instruction.op_kind(second) {
            OpKind::Immediate8 => u64::from(immediate(step)),
            _ => {
                let vector = read(step, second, LANE)?;
                u64::from_le_bytes(*vector.first_chunk().unwrap_or(&[0; 8]))
            }
        };
        let value = read(step, first, size)?;
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        return write(step, &operation(&value, count), size);
    }
    if let Some(operation) = by_lane(mnemonic) {
        let counts = read(step, second, size)?;
        let value = read(step, first, size)?;
        return write(step, &operation(&value, &counts), size);
    }
    Ok(Progress::NotMine)
}

/// One count for all lanes; a count beyond the lane clears it or, for arithmetic shifts, leaves
/// its sign.
fn by_count(mnemonic: Mnemonic) -> Option<ByCount> {
    use Mnemonic::*;
    Some(match mnemonic {
        Psllw | Vpsllw => |v, n| map16(v, v, |a, _| a.checked_shl(n).unwrap_or(0)),
        Pslld | Vpslld => |v, n| map32(v, v, |a, _| a.checked_shl(n).unwrap_or(0)),
        Psllq | Vpsllq => |v, n| map64(v, v, |a, _| a.checked_shl(n).unwrap_or(0)),
        Psrlw | Vpsrlw => |v, n| map16(v, v, |a, _| a.checked_shr(n).unwrap_or(0)),
        Psrld | Vpsrld => |v, n| map32(v, v, |a, _| a.checked_shr(n).unwrap_or(0)),
        Psrlq | Vpsrlq => |v, n| map64(v, v, |a, _| a.checked_shr(n).unwrap_or(0)),
        Psraw | Vpsraw => |v, n| map16(v, v, |a, _| (a as i16 >> n.min(15)) as u16),
        Psrad | Vpsrad => |v, n| map32(v, v, |a, _| (a as i32 >> n.min(31)) as u32),
        Vpsraq => |v, n| map64(v, v, |a, _| (a as i64 >> n.min(63)) as u64),
        Vprold => |v, n| map32(v, v, |a, _| a.rotate_left(n % 32)),
        Vprolq => |v, n| map64(v, v, |a, _| a.rotate_left(n % 64)),
        Vprord => |v, n| map32(v, v, |a, _| a.rotate_right(n % 32)),
        Vprorq => |v, n| map64(v, v, |a, _| a.rotate_right(n % 64)),
        Pslldq | Vpslldq => |v, n| bytes(v, n, u128::checked_shl),
        Psrldq | Vpsrldq => |v, n| bytes(v, n, u128::checked_shr),
        _ => return None,
    })
}

/// A count for each lane.
fn by_lane(mnemonic: Mnemonic) -> Option<ByLane> {
    use Mnemonic::*;
    Some(match mnemonic {
        Vpsllvd => |v, n| map32(v, n, |a, n| a.checked_shl(n).unwrap_or(0)),
        Vpsrlvd => |v, n| map32(v, n, |a, n| a.checked_shr(n).unwrap_or(0)),
        Vpsravd => |v, n| map32(v, n, |a, n| (a as i32 >> n.min(31)) as u32),
        Vpsllvq => |v, n| map64(v, n, |a, n| if n < 64 { a << n } else { 0 }),
        Vpsrlvq => |v, n| map64(v, n, |a, n| if n < 64 { a >> n } else { 0 }),
        Vprolvd => |v, n| map32(v, n, |a, n| a.rotate_left(n % 32)),
        Vprolvq => |v, n| map64(v, n, |a, n| a.rotate_left((n % 64) as u32)),
        Vprorvd => |v, n| map32(v, n, |a, n| a.rotate_right(n % 32)),
        Vprorvq => |v, n| map64(v, n, |a, n| a.rotate_right((n % 64) as u32)),
        _ => return None,
    })
}

/// Shifts 128-bit lanes by whole bytes.
fn bytes(value: &Vector, count: u32, shift: fn(u128, u32) -> Option<u128>) -> Vector {
    let bits = count.saturating_mul(8);
    map128(value, value, |lane, _| {
        shift(u128::from_le_bytes(*lane), bits).unwrap_or(0).to_le_bytes()
    })
}
