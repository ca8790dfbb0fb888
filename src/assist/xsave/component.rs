//! State components and where they stand in an XSAVE area (SDM vol. 1 §13.1 to §13.4).

use std::ops::Range;

use super::legacy;
use crate::assist::operands::Step;
use crate::assist::{CodeSize, Stop};

/// x87 state.
pub(in crate::assist) const X87: u32 = 0;
/// XMM registers and MXCSR.
pub(in crate::assist) const SSE: u32 = 1;
/// Upper halves of YMM0 to YMM15.
pub(in crate::assist) const AVX: u32 = 2;
/// k0 to k7.
pub(in crate::assist) const OPMASK: u32 = 5;
/// Upper halves of ZMM0 to ZMM15.
pub(in crate::assist) const ZMM_HI256: u32 = 6;
/// ZMM16 to ZMM31.
pub(in crate::assist) const HI16_ZMM: u32 = 7;
/// The components outside the legacy region.
pub(in crate::assist) const EXTENDED: Range<u32> = 2..63;

/// Bounds registers and their configuration: set in XCR0 together or not at all.
const MPX: u64 = 1 << 3 | 1 << 4;
/// Tile configuration and data: set in XCR0 together or not at all.
const AMX: u64 = 1 << 17 | 1 << 18;

/// Where the header begins.
pub(super) const HEADER: usize = 512;
/// Where the extended region begins.
pub(super) const EXTENDED_REGION: usize = 576;
/// Offset of XSTATE_BV: the components in use.
pub(super) const XSTATE_BV: usize = HEADER;
/// Offset of XCOMP_BV: the format and the components that have a place.
pub(super) const XCOMP_BV: usize = HEADER + 8;
/// XCOMP_BV: the area is in the compacted format.
pub(super) const COMPACTED: u64 = 1 << 63;

/// The bit of component `index`, 0 to 63.
pub(in crate::assist) fn mask(index: u32) -> u64 {
    1u64.checked_shl(index).unwrap_or_default()
}

/// Whether XCR0 may hold `value` as far as its bits depend on one another (SDM vol. 1 §13.3).
pub(in crate::assist) fn is_consistent(value: u64) -> bool {
    let (sse, avx) = (mask(SSE), mask(AVX));
    let avx512 = mask(OPMASK) | mask(ZMM_HI256) | mask(HI16_ZMM);
    let together = |group: u64| value & group == 0 || value & group == group;
    value & mask(X87) != 0
        && value >> 63 == 0
        && (value & avx == 0 || value & sse != 0)
        && (value & avx512 == 0 || value & avx != 0)
        && together(avx512)
        && together(MPX)
        && together(AMX)
}

/// The components of an image that are in use (XINUSE). SSE counts whenever MXCSR is not at its
/// initial value.
pub(in crate::assist) fn in_use(image: &[u8]) -> u64 {
    let sse = if legacy::mxcsr(image) == legacy::MXCSR_INITIAL { 0 } else { mask(SSE) };
    field(image, XSTATE_BV) | sse
}

/// Whether XSTATE_BV of an image has component `index`.
pub(in crate::assist) fn is_in_use(image: &[u8], index: u32) -> bool {
    field(image, XSTATE_BV) & mask(index) != 0
}

/// A field of the header.
pub(super) fn field(area: &[u8], offset: usize) -> u64 {
    match area.get(offset..).and_then(<[u8]>::first_chunk) {
        Some(bytes) => u64::from_le_bytes(*bytes),
        None => 0,
    }
}

/// Sets a field of the header.
pub(super) fn set_field(area: &mut [u8], offset: usize, value: u64) {
    if let Some(bytes) = area.get_mut(offset..).and_then(<[u8]>::first_chunk_mut) {
        *bytes = value.to_le_bytes();
    }
}

/// Puts legacy component `index`, [`X87`] or [`SSE`], of an image in use; if it was not, with its
/// initial values. MXCSR stays.
pub(in crate::assist) fn materialize(image: &mut [u8], index: u32) {
    if is_in_use(image, index) {
        return;
    }
    match index {
        X87 => legacy::initialize_x87(image),
        _ => legacy::clear(image, legacy::XMM..legacy::XMM_END),
    }
    set_field(image, XSTATE_BV, field(image, XSTATE_BV) | mask(index));
}

/// Puts component `index` of an image, which stands at `place`, in use with all its bytes clear.
/// Not for x87, whose initial values are others.
pub(in crate::assist) fn materialize_at(image: &mut [u8], index: u32, place: Range<usize>) {
    legacy::clear(image, place);
    set_field(image, XSTATE_BV, field(image, XSTATE_BV) | mask(index));
}

/// One extended component that an instruction moves.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) index: u32,
    /// Where it stands in the vCPU's image.
    pub(super) image: Range<usize>,
    /// Offset in the guest's area.
    pub(super) area: usize,
    /// The bytes of it that the code size gives access to.
    pub(super) bytes: usize,
}

/// Walks the extended components of `selected` in order. `compacted` has the components that have a
/// place in a compacted area, 0 for the standard format.
pub(super) struct Places {
    index: u32,
    selected: u64,
    compacted: u64,
    next_offset: usize,
}

impl Places {
    pub(super) fn new(selected: u64, compacted: u64) -> Self {
        Self { index: EXTENDED.start, selected, compacted, next_offset: EXTENDED_REGION }
    }

    /// The next component, or `None` behind the last.
    pub(super) fn next(&mut self, step: &mut Step<'_>) -> Result<Option<Place>, Stop> {
        while self.index < EXTENDED.end {
            let index = self.index;
            self.index += 1;
            let bit = mask(index);
            if (self.selected | self.compacted) & bit == 0 {
                continue;
            }
            let image = locate(step, index)?;
            let size = image.len();
            let mut area = image.start;
            if self.compacted != 0 {
                area = self.take(step, index, size)?;
            }
            if self.selected & bit != 0 {
                let bytes = accessible(index, size, step.code_size);
                return Ok(Some(Place { index, image, area, bytes }));
            }
        }
        Ok(None)
    }

    /// The offset of a component that is next in the compacted area.
    fn take(&mut self, step: &mut Step<'_>, index: u32, size: usize) -> Result<usize, Stop> {
        const ALIGNMENT: usize = 64;
        let aligned = step.cpu.xstate_component(index)?.is_some_and(|found| found.aligned);
        let offset = match aligned {
            true => self.next_offset.next_multiple_of(ALIGNMENT),
            false => self.next_offset,
        };
        if self.compacted & mask(index) != 0 {
            self.next_offset = offset + size;
        }
        Ok(offset)
    }
}

/// Where extended component `index` stands in the vCPU's image.
pub(in crate::assist) fn locate(step: &mut Step<'_>, index: u32) -> Result<Range<usize>, Stop> {
    const UNKNOWN: Stop = Stop::Unsupported("a state component that the vCPU's FPU image lacks");
    let found = step.cpu.xstate_component(index)?.filter(|found| !found.supervisor);
    let found = found.ok_or(UNKNOWN)?;
    let start = found.offset as usize;
    let end = start.checked_add(found.size as usize).ok_or(UNKNOWN)?;
    let length = step.cpu.fpu()?.len();
    if start < EXTENDED_REGION || end > length {
        return Err(UNKNOWN);
    }
    Ok(start..end)
}

/// Outside 64-bit mode registers 8 and up are neither saved nor changed.
fn accessible(index: u32, size: usize, code_size: CodeSize) -> usize {
    match (code_size, index) {
        (CodeSize::Bits64, _) => size,
        (_, AVX | ZMM_HI256) => size / 2,
        (_, HI16_ZMM) => 0,
        _ => size,
    }
}
