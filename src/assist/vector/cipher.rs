//! AES rounds and carry-less multiplication (SDM vol. 1 §12.13, FIPS 197).

use iced_x86::Mnemonic;

use super::{LANE, immediate, map128, read, read_sources, vector_bytes, write};
use crate::assist::operands::Step;
use crate::assist::{Progress, Stop};

type Block = [u8; LANE];

pub(super) fn complete(step: &mut Step<'_>) -> Result<Progress, Stop> {
    use Mnemonic::*;
    match step.instruction.mnemonic() {
        Aesenc | Vaesenc => round(step, |block| mix_columns(shift_rows(block, 1).map(substitute))),
        Aesenclast | Vaesenclast => round(step, |block| shift_rows(block, 1).map(substitute)),
        Aesdec | Vaesdec => {
            round(step, |block| unmix_columns(shift_rows(block, 3).map(inverse_substitute)))
        }
        Aesdeclast | Vaesdeclast => {
            round(step, |block| shift_rows(block, 3).map(inverse_substitute))
        }
        Aesimc | Vaesimc => {
            let value = read(step, 1, LANE)?;
            write(step, &map128(&value, &value, |block, _| unmix_columns(*block)), LANE)
        }
        Aeskeygenassist | Vaeskeygenassist => key_assist(step),
        Pclmulqdq | Vpclmulqdq => multiply(step),
        _ => Ok(Progress::NotMine),
    }
}

/// One round: `transform` of the state, then the round key added.
fn round(step: &mut Step<'_>, transform: fn(&Block) -> Block) -> Result<Progress, Stop> {
    let (state, key) = read_sources(step)?;
    let result = map128(&state, &key, |state, key| {
        let mut block = transform(state);
        for (byte, key) in block.iter_mut().zip(key) {
            *byte ^= key;
        }
        block
    });
    write(step, &result, vector_bytes(step))
}

/// Row r moves left by r times `by` columns. Columns are 4 bytes each.
fn shift_rows(block: &Block, by: usize) -> Block {
    let mut result = [0; LANE];
    for (place, slot) in result.iter_mut().enumerate() {
        let (column, row) = (place / 4, place % 4);
        let from = (column + by * row) % 4 * 4 + row;
        *slot = block.get(from).copied().unwrap_or_default();
    }
    result
}

/// Multiplication in GF(2^8) modulo x^8 + x^4 + x^3 + x + 1.
fn times(mut one: u8, mut other: u8) -> u8 {
    const REDUCTION: u8 = 0x1B;
    let mut product = 0;
    while other != 0 {
        if other & 1 != 0 {
            product ^= one;
        }
        one = one << 1 ^ if one & 0x80 != 0 { REDUCTION } else { 0 };
        other >>= 1;
    }
    product
}

/// The multiplicative inverse, the 254th power; 0 for 0.
fn inverse(value: u8) -> u8 {
    let square = times(value, value);
    let mut power = square;
    let mut result = square;
    for _ in 0..6 {
        power = times(power, power);
        result = times(result, power);
    }
    result
}

const AFFINE: u8 = 0x63;
const INVERSE_AFFINE: u8 = 0x05;

fn substitute(value: u8) -> u8 {
    let inverse = inverse(value);
    (1..5).fold(inverse ^ AFFINE, |sum, count| sum ^ inverse.rotate_left(count))
}

fn inverse_substitute(value: u8) -> u8 {
    let rotated = value.rotate_left(1) ^ value.rotate_left(3) ^ value.rotate_left(6);
    inverse(rotated ^ INVERSE_AFFINE)
}

fn mix_columns(block: Block) -> Block {
    mix(block, [2, 3, 1, 1])
}

fn unmix_columns(block: Block) -> Block {
    mix(block, [14, 11, 13, 9])
}

/// Multiplies each column by the circulant matrix whose first row is `row`.
fn mix(block: Block, row: [u8; 4]) -> Block {
    let mut result = [0; LANE];
    let columns = block.as_chunks::<4>().0.iter();
    for (slot, column) in result.as_chunks_mut::<4>().0.iter_mut().zip(columns) {
        for (at, byte) in slot.iter_mut().enumerate() {
            let rotated = column.iter().cycle().skip(at);
            *byte = row.iter().zip(rotated).fold(0, |sum, (a, b)| sum ^ times(*a, *b));
        }
    }
    result
}

/// AESKEYGENASSIST: doublewords 1 and 3 substituted, and the same rotated with the round constant.
fn key_assist(step: &mut Step<'_>) -> Result<Progress, Stop> {
    let value = read(step, 1, LANE)?;
    let constant = u32::from(immediate(step));
    let word = |at: usize| {
        let bytes = value.as_chunks::<4>().0.get(at).copied().unwrap_or_default();
        u32::from_le_bytes(bytes.map(substitute))
    };
    let mut result = [0; 64];
    let words =
        [word(1), word(1).rotate_right(8) ^ constant, word(3), word(3).rotate_right(8) ^ constant];
    for (slot, word) in result.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *slot = word.to_le_bytes();
    }
    write(step, &result, LANE)
}

/// PCLMULQDQ: a product without carries of one half of each source.
fn multiply(step: &mut Step<'_>) -> Result<Progress, Stop> {
    let (one, other) = read_sources(step)?;
    let control = immediate(step);
    let half = |lane: &Block, high: bool| {
        let bytes = if high { lane.last_chunk() } else { lane.first_chunk() };
        u64::from_le_bytes(*bytes.unwrap_or(&[0; 8]))
    };
    let result = map128(&one, &other, |one, other| {
        let one = u128::from(half(one, control & 1 != 0));
        let other = half(other, control & 0x10 != 0);
        let terms = (0..64).filter(|bit| other >> bit & 1 != 0);
        terms.fold(0, |sum, bit| sum ^ one << bit).to_le_bytes()
    });
    write(step, &result, vector_bytes(step))
}
