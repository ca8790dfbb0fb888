//! Shuffles: instructions that move lanes about.

use iced_x86::Mnemonic;

use super::{LANE, Vector, immediate, map128, read, read_sources, vector_bytes, write};
use crate::assist::operands::Step;
use crate::assist::{Progress, Stop};

type Lane = [u8; LANE];

pub(super) fn complete(step: &mut Step<'_>) -> Result<Progress, Stop> {
    use Mnemonic::*;
    let mnemonic = step.instruction.mnemonic();
    if let Some((high, bytes)) = interleaving(mnemonic) {
        return two_sources(step, |a, b, _| interleave(a, b, bytes, high));
    }
    match mnemonic {
        Pshufb | Vpshufb => two_sources(step, |a, b, _| shuffle_bytes(a, b)),
        Palignr | Vpalignr => two_sources(step, align),
        Shufps | Vshufps => two_sources(step, |a, b, control| {
            let select = |at: u8| (control >> (2 * at)) & 3;
            pick::<4>(a, [select(0), select(1), 0, 0], b, [0, 0, select(2), select(3)], 2)
        }),
        Packuswb | Vpackuswb => two_sources(step, |a, b, _| pack_words(a, b, 0, 255)),
        Packsswb | Vpacksswb => two_sources(step, |a, b, _| pack_words(a, b, -128, 127)),
        Pshufd | Vpshufd => one_source(step, |lane, control| {
            let select = |at: u8| (control >> (2 * at)) & 3;
            let order = [select(0), select(1), select(2), select(3)];
            pick::<4>(lane, order, lane, order, 4)
        }),
        Pshuflw | Vpshuflw => one_source(step, |lane, control| words(lane, control, 0)),
        Pshufhw | Vpshufhw => one_source(step, |lane, control| words(lane, control, 4)),
        Movddup | Vmovddup if vector_bytes(step) > LANE || !step.is_memory(1) => {
            one_source(step, |lane, _| pick::<8>(lane, [0, 0], lane, [0, 0], 2))
        }
        Movsldup | Vmovsldup => {
            one_source(step, |lane, _| pick::<4>(lane, [0, 0, 2, 2], lane, [0; 4], 4))
        }
        Movshdup | Vmovshdup => {
            one_source(step, |lane, _| pick::<4>(lane, [1, 1, 3, 3], lane, [0; 4], 4))
        }
        Pblendw | Vpblendw => two_sources(step, blend_words),
        Vpblendd => blend_doubles(step),
        Vpermq | Vpermpd if step.instruction.op_count() == 3 => permute_quads(step),
        Vperm2i128 | Vperm2f128 => permute_halves(step),
        Vpermd | Vpermps => permute::<4>(step, [1, 2, 2]),
        Vpermi2d | Vpermi2ps => permute::<4>(step, [0, 1, 2]),
        Vpermt2d | Vpermt2ps => permute::<4>(step, [1, 0, 2]),
        Vpermi2q | Vpermi2pd => permute::<8>(step, [0, 1, 2]),
        Vpermt2q | Vpermt2pd => permute::<8>(step, [1, 0, 2]),
        Vinserti128 | Vinsertf128 => insert_half(step),
        Vextracti128 | Vextractf128 => extract_half(step),
        Vpbroadcastb => broadcast(step, 1),
        Vpbroadcastw => broadcast(step, 2),
        Vpbroadcastd | Vbroadcastss => broadcast(step, 4),
        Vpbroadcastq | Vbroadcastsd => broadcast(step, 8),
        Vbroadcasti128 | Vbroadcastf128 => broadcast(step, LANE),
        Pinsrb | Vpinsrb => insert(step, 1),
        Pinsrw | Vpinsrw => insert(step, 2),
        Pinsrd | Vpinsrd => insert(step, 4),
        Pinsrq | Vpinsrq => insert(step, 8),
        Pextrb | Vpextrb => extract(step, 1),
        Pextrw | Vpextrw => extract(step, 2),
        Pextrd | Vpextrd => extract(step, 4),
        Pextrq | Vpextrq => extract(step, 8),
        Pmovmskb | Vpmovmskb => move_mask(step, 1),
        Movmskps | Vmovmskps => move_mask(step, 4),
        Movmskpd | Vmovmskpd => move_mask(step, 8),
        _ => Ok(Progress::NotMine),
    }
}

/// Applies `operation` to each pair of 128-bit lanes, with the immediate if there is one.
fn two_sources(
    step: &mut Step<'_>,
    operation: impl Fn(&Lane, &Lane, u8) -> Lane,
) -> Result<Progress, Stop> {
    let (one, other) = read_sources(step)?;
    let control = immediate(step);
    write(step, &map128(&one, &other, |a, b| operation(a, b, control)), vector_bytes(step))
}

fn one_source(
    step: &mut Step<'_>,
    operation: impl Fn(&Lane, u8) -> Lane,
) -> Result<Progress, Stop> {
    let size = vector_bytes(step);
    let value = read(step, 1, size)?;
    let control = immediate(step);
    write(step, &map128(&value, &value, |lane, _| operation(lane, control)), size)
}

/// Takes each element of `BYTES` from anywhere in a table of two vectors, as the low bits of the same
/// element of the indices say. `operands` are the indices and the table's first and second half.
fn permute<const BYTES: usize>(step: &mut Step<'_>, operands: [u32; 3]) -> Result<Progress, Stop> {
    let size = vector_bytes(step);
    let [indices, first, second] = operands;
    let one_table = first == second;
    let (indices, first) = (read(step, indices, size)?, read(step, first, size)?);
    let second = if one_table { first } else { read(step, second, size)? };
    let elements = size / BYTES;
    let mut result = [0; size_of::<Vector>()];
    for at in 0..elements {
        // 16 elements of two vectors are the most, so that the low byte tells all.
        let index = usize::from(indices[at * BYTES]) % (2 * elements);
        let table = if index < elements || one_table { &first } else { &second };
        let from = index % elements * BYTES;
        result[at * BYTES..][..BYTES].copy_from_slice(&table[from..from + BYTES]);
    }
    write(step, &result, size)
}

/// Whether an unpack takes the high halves, and the bytes of its elements.
fn interleaving(mnemonic: Mnemonic) -> Option<(bool, usize)> {
    use Mnemonic::*;
    Some(match mnemonic {
        Punpcklbw | Vpunpcklbw => (false, 1),
        Punpcklwd | Vpunpcklwd => (false, 2),
        Punpckldq | Vpunpckldq | Unpcklps | Vunpcklps => (false, 4),
        Punpcklqdq | Vpunpcklqdq | Unpcklpd | Vunpcklpd => (false, 8),
        Punpckhbw | Vpunpckhbw => (true, 1),
        Punpckhwd | Vpunpckhwd => (true, 2),
        Punpckhdq | Vpunpckhdq | Unpckhps | Vunpckhps => (true, 4),
        Punpckhqdq | Vpunpckhqdq | Unpckhpd | Vunpckhpd => (true, 8),
        _ => return None,
    })
}

fn interleave(one: &Lane, other: &Lane, bytes: usize, high: bool) -> Lane {
    let half = if high { LANE / 2 } else { 0 };
    let mut result = [0; LANE];
    for (place, slot) in result.iter_mut().enumerate() {
        let element = place / bytes;
        let source = if element.is_multiple_of(2) { one } else { other };
        *slot = byte(source, half + element / 2 * bytes + place % bytes);
    }
    result
}

fn byte(lane: &[u8], place: usize) -> u8 {
    lane.get(place).copied().unwrap_or_default()
}

fn shuffle_bytes(lane: &Lane, control: &Lane) -> Lane {
    control.map(|place| if place & 0x80 != 0 { 0 } else { byte(lane, usize::from(place & 0xF)) })
}

/// PALIGNR: the first operand above the second, shifted right by bytes.
fn align(high: &Lane, low: &Lane, count: u8) -> Lane {
    let mut result = [0; LANE];
    for (place, slot) in result.iter_mut().enumerate() {
        let from = place + usize::from(count);
        *slot = if from < LANE { byte(low, from) } else { byte(high, from - LANE) };
    }
    result
}

/// Elements of `SIZE` bytes: the first `split` by `first` out of `one`, the rest by `second` out
/// of `other`.
fn pick<const SIZE: usize>(
    one: &Lane,
    first: impl AsRef<[u8]>,
    other: &Lane,
    second: impl AsRef<[u8]>,
    split: usize,
) -> Lane {
    let mut result = [0; LANE];
    for (place, slot) in result.iter_mut().enumerate() {
        let element = place / SIZE;
        let (source, order) =
            if element < split { (one, first.as_ref()) } else { (other, second.as_ref()) };
        let from = usize::from(byte(order, element));
        *slot = byte(source, from * SIZE + place % SIZE);
    }
    result
}

/// PSHUFLW and PSHUFHW: four words from `base` on change places.
fn words(lane: &Lane, control: u8, base: usize) -> Lane {
    let mut order = [0, 1, 2, 3, 4, 5, 6, 7];
    for (at, slot) in order.iter_mut().skip(base).take(4).enumerate() {
        *slot = base as u8 + (control >> (2 * at) & 3);
    }
    pick::<2>(lane, order, lane, order, 8)
}

fn blend_words(one: &Lane, other: &Lane, control: u8) -> Lane {
    let mut result = *one;
    for (place, slot) in result.iter_mut().enumerate() {
        if control >> (place / 2) & 1 != 0 {
            *slot = byte(other, place);
        }
    }
    result
}

/// Signed words to bytes, saturated to `low..=high`.
fn pack_words(one: &Lane, other: &Lane, low: i16, high: i16) -> Lane {
    let mut result = [0; LANE];
    let words = one.as_chunks::<2>().0.iter().chain(other.as_chunks::<2>().0);
    for (slot, word) in result.iter_mut().zip(words) {
        *slot = i16::from_le_bytes(*word).clamp(low, high) as u8;
    }
    result
}

fn blend_doubles(step: &mut Step<'_>) -> Result<Progress, Stop> {
    let (one, other) = read_sources(step)?;
    let control = immediate(step);
    let mut result = one;
    for (place, slot) in result.iter_mut().take(32).enumerate() {
        if control >> (place / 4) & 1 != 0 {
            *slot = byte(&other, place);
        }
    }
    write(step, &result, vector_bytes(step))
}

/// VPERMQ with an immediate: within each 256 bits.
fn permute_quads(step: &mut Step<'_>) -> Result<Progress, Stop> {
    let size = vector_bytes(step);
    if step.instruction.op2_kind() != iced_x86::OpKind::Immediate8 {
        return Ok(Progress::NotMine);
    }
    let value = read(step, 1, size)?;
    let control = immediate(step);
    let mut result = [0; 64];
    for (place, slot) in result.iter_mut().enumerate() {
        let select = usize::from(control >> (2 * (place / 8 % 4)) & 3);
        *slot = byte(&value, place / 32 * 32 + select * 8 + place % 8);
    }
    write(step, &result, size)
}

/// VPERM2I128: each half of the result is a half of either source, or 0.
fn permute_halves(step: &mut Step<'_>) -> Result<Progress, Stop> {
    let (one, other) = read_sources(step)?;
    let control = immediate(step);
    let mut result = [0; 64];
    for (half, slot) in result.as_chunks_mut::<LANE>().0.iter_mut().take(2).enumerate() {
        let select = control >> (4 * half);
        let source = if select & 2 == 0 { &one } else { &other };
        let from = usize::from(select & 1);
        if select & 8 == 0
            && let Some(lane) = source.as_chunks::<LANE>().0.get(from)
        {
            *slot = *lane;
        }
    }
    write(step, &result, vector_bytes(step))
}

fn insert_half(step: &mut Step<'_>) -> Result<Progress, Stop> {
    let inserted = read(step, 2, LANE)?;
    let mut result = read(step, 1, 32)?;
    let half = usize::from(immediate(step) & 1);
    let lanes = result.as_chunks_mut::<LANE>().0;
    if let (Some(slot), Some(lane)) = (lanes.get_mut(half), inserted.first_chunk()) {
        *slot = *lane;
    }
    write(step, &result, vector_bytes(step))
}

fn extract_half(step: &mut Step<'_>) -> Result<Progress, Stop> {
    let value = read(step, 1, 32)?;
    let half = usize::from(immediate(step) & 1);
    let lane = value.as_chunks::<LANE>().0.get(half).copied().unwrap_or_default();
    if step.is_memory(0) {
        step.write_memory(0, &lane)?;
        return Ok(Progress::Done);
    }
    let mut result = [0; 64];
    result[..LANE].copy_from_slice(&lane);
    write(step, &result, LANE)
}

/// Repeats the lowest element of `bytes` bytes.
fn broadcast(step: &mut Step<'_>, bytes: usize) -> Result<Progress, Stop> {
    let general = !step.is_memory(1) && step.instruction.op1_register().is_gpr();
    let mut element: Vector = [0; 64];
    if general {
        element[..8].copy_from_slice(&step.value(1)?.to_le_bytes());
    } else {
        element = read(step, 1, bytes)?;
    }
    let mut result = [0; 64];
    for (slot, value) in result.iter_mut().zip(element.iter().take(bytes).cycle()) {
        *slot = *value;
    }
    write(step, &result, vector_bytes(step))
}

/// PINSR: an element of `bytes` bytes from a general register or memory.
fn insert(step: &mut Step<'_>, bytes: usize) -> Result<Progress, Stop> {
    let (first, second) = super::sources(step);
    let value = step.value(second)?.to_le_bytes();
    let mut result = read(step, first, LANE)?;
    let place = usize::from(immediate(step)) % (LANE / bytes) * bytes;
    if let (Some(slot), Some(value)) = (result.get_mut(place..place + bytes), value.get(..bytes)) {
        slot.copy_from_slice(value);
    }
    write(step, &result, LANE)
}

fn extract(step: &mut Step<'_>, bytes: usize) -> Result<Progress, Stop> {
    let vector = read(step, 1, LANE)?;
    let place = usize::from(immediate(step)) % (LANE / bytes) * bytes;
    let mut value = [0; 8];
    for (slot, byte) in value.iter_mut().zip(vector.iter().skip(place).take(bytes)) {
        *slot = *byte;
    }
    step.set_value(0, u64::from_le_bytes(value))?;
    Ok(Progress::Done)
}

/// The sign bits of the elements, gathered in a general register.
fn move_mask(step: &mut Step<'_>, bytes: usize) -> Result<Progress, Stop> {
    let size = step.operand_bytes(1).min(size_of::<Vector>());
    let vector = read(step, 1, size)?;
    let mut mask = 0u64;
    for (element, chunk) in vector[..size].chunks_exact(bytes).enumerate() {
        let sign = chunk.last().is_some_and(|byte| byte & 0x80 != 0);
        mask |= u64::from(sign) << element;
    }
    step.set_value(0, mask)?;
    Ok(Progress::Done)
}
