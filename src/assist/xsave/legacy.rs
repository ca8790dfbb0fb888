//! The legacy region of an XSAVE area, the same as an FXSAVE area (SDM vol. 1 §10.5.1, §13.4.1).

use std::ops::Range;

use super::component;
use crate::assist::CodeSize;

/// Offset of FCW.
pub(in crate::assist) const CONTROL_WORD: usize = 0;
/// Offset of FSW.
pub(in crate::assist) const STATUS_WORD: usize = 2;
/// Offset of the abridged tag byte: a set bit is a register in use.
pub(in crate::assist) const TAG_WORD: usize = 4;
/// Offset of FOP.
pub(in crate::assist) const OPCODE: usize = 6;
/// Offset of FIP: 64 bits, or 32 bits and the selector FCS.
const INSTRUCTION_POINTER: usize = 8;
/// Offset of FDP, alike.
const DATA_POINTER: usize = 16;
/// Offset of MXCSR.
pub(in crate::assist) const MXCSR: usize = 24;
/// Offset of MXCSR_MASK.
const MXCSR_MASK: usize = 28;
/// Offset of the x87 registers, 16 bytes for each.
pub(super) const ST: usize = 32;
/// Offset of the XMM registers.
pub(in crate::assist) const XMM: usize = 160;
/// Offset behind XMM15.
pub(in crate::assist) const XMM_END: usize = 416;

/// MXCSR after reset.
pub(in crate::assist) const MXCSR_INITIAL: u32 = 0x1F80;
/// The valid bits of MXCSR where MXCSR_MASK is 0 (SDM vol. 1 §11.6.6).
const MXCSR_MASK_DEFAULT: u32 = 0xFFBF;
const CONTROL_WORD_INITIAL: u16 = 0x037F;
/// Bytes of an x87 register.
const ST_BYTES: usize = 10;
const SLOT_BYTES: usize = 16;

/// The 16-bit field at `offset`, 0 beyond the end.
pub(in crate::assist) fn word(area: &[u8], offset: usize) -> u16 {
    match area.get(offset..).and_then(<[u8]>::first_chunk) {
        Some(bytes) => u16::from_le_bytes(*bytes),
        None => 0,
    }
}

/// Sets the 16-bit field at `offset`.
pub(in crate::assist) fn set_word(area: &mut [u8], offset: usize, value: u16) {
    if let Some(bytes) = area.get_mut(offset..).and_then(<[u8]>::first_chunk_mut) {
        *bytes = value.to_le_bytes();
    }
}

fn double_word(area: &[u8], offset: usize) -> u32 {
    match area.get(offset..).and_then(<[u8]>::first_chunk) {
        Some(bytes) => u32::from_le_bytes(*bytes),
        None => 0,
    }
}

fn set_double_word(area: &mut [u8], offset: usize, value: u32) {
    if let Some(bytes) = area.get_mut(offset..).and_then(<[u8]>::first_chunk_mut) {
        *bytes = value.to_le_bytes();
    }
}

/// Clears the bytes of `range` that the area has.
pub(in crate::assist) fn clear(area: &mut [u8], range: Range<usize>) {
    if let Some(bytes) = area.get_mut(range) {
        bytes.fill(0);
    }
}

/// MXCSR of an area.
pub(in crate::assist) fn mxcsr(area: &[u8]) -> u32 {
    double_word(area, MXCSR)
}

/// Sets MXCSR of the vCPU's image. With any but the initial value SSE counts as in use: else KVM
/// would drop the value.
pub(in crate::assist) fn set_mxcsr(image: &mut [u8], value: u32) {
    set_double_word(image, MXCSR, value);
    if value != MXCSR_INITIAL {
        component::materialize(image, component::SSE);
    }
}

/// The bits of MXCSR that the vCPU has.
pub(in crate::assist) fn mxcsr_mask(image: &[u8]) -> u32 {
    match double_word(image, MXCSR_MASK) {
        0 => MXCSR_MASK_DEFAULT,
        mask => mask,
    }
}

/// Sets MXCSR_MASK of an area.
pub(super) fn set_mxcsr_mask(area: &mut [u8], mask: u32) {
    set_double_word(area, MXCSR_MASK, mask);
}

/// The x87 state as FNINIT leaves it, the registers cleared.
pub(super) fn initialize_x87(area: &mut [u8]) {
    clear(area, CONTROL_WORD..MXCSR);
    clear(area, ST..XMM);
    set_word(area, CONTROL_WORD, CONTROL_WORD_INITIAL);
}

/// Makes register 0 the top of the x87 stack. An area has the registers from the top on, so they
/// change places.
pub(in crate::assist) fn reset_top(image: &mut [u8]) {
    const TOP_SHIFT: u32 = 11;
    const TOP: u16 = 7 << TOP_SHIFT;
    let status = word(image, STATUS_WORD);
    let top = usize::from((status & TOP) >> TOP_SHIFT);
    if let Some(registers) = image.get_mut(ST..XMM) {
        registers.rotate_right(top * SLOT_BYTES);
    }
    set_word(image, STATUS_WORD, status & !TOP);
}

/// Where the XMM registers end that the code size gives access to.
pub(super) fn xmm_end(code_size: CodeSize) -> usize {
    match code_size {
        CodeSize::Bits64 => XMM_END,
        _ => XMM + 8 * SLOT_BYTES,
    }
}

/// Clears what has no meaning in the x87 part and, for the forms without REX.W, the upper halves
/// of the pointers, where the selectors stand.
pub(super) fn normalize_x87(area: &mut [u8], wide: bool) {
    clear(area, TAG_WORD + 1..OPCODE);
    if !wide {
        clear(area, INSTRUCTION_POINTER + 4..DATA_POINTER);
        clear(area, DATA_POINTER + 4..MXCSR);
    }
    for slot in (ST..XMM).step_by(SLOT_BYTES) {
        clear(area, slot + ST_BYTES..slot + SLOT_BYTES);
    }
}

/// Copies `range` of one area to another.
pub(super) fn copy(to: &mut [u8], from: &[u8], range: Range<usize>) {
    if let (Some(to), Some(from)) = (to.get_mut(range.clone()), from.get(range)) {
        to.copy_from_slice(from);
    }
}
