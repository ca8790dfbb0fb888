//! Vector registers in the vCPU's FPU image (SDM vol. 1 §13.4 and §13.5).

use std::ops::Range;

use iced_x86::Register;

use super::{LANE, Vector};
use crate::assist::Stop;
use crate::assist::operands::Step;
use crate::assist::xsave::{component, legacy};

/// A part of a vector register: where it is in the image, and where in the register.
struct Piece {
    component: u32,
    /// Where the whole component is in the image.
    whole: Range<usize>,
    image: usize,
    register: Range<usize>,
}

/// The register's value, the upper bytes 0.
pub(super) fn read(step: &mut Step<'_>, register: Register) -> Result<Vector, Stop> {
    let mut value = [0; 64];
    let (number, size) = identify(register)?;
    for piece in pieces(step, number, size)?.into_iter().flatten() {
        let image = step.cpu.fpu()?;
        if !component::is_in_use(image, piece.component) {
            continue;
        }
        let length = piece.register.len();
        let source = image.get(piece.image..piece.image.saturating_add(length));
        if let (Some(source), Some(target)) = (source, value.get_mut(piece.register)) {
            target.copy_from_slice(source);
        }
    }
    Ok(value)
}

/// Sets the low `size` bytes of the register. The rest, up to the longest vector that is enabled,
/// stays or is cleared.
pub(super) fn write(
    step: &mut Step<'_>,
    register: Register,
    value: &Vector,
    size: usize,
    keep_upper: bool,
) -> Result<(), Stop> {
    let (number, _) = identify(register)?;
    let mut new = [0; 64];
    let size = size.min(new.len());
    new[..size].copy_from_slice(&value[..size]);
    let reach = if keep_upper { size } else { new.len() };
    for piece in pieces(step, number, reach)?.into_iter().flatten() {
        let bytes = new.get(piece.register.clone()).unwrap_or_default();
        store(step, &piece, bytes)?;
    }
    Ok(())
}

/// Clears registers 0 to 15 from byte `from`, 0 or 16, on.
pub(super) fn clear_from(step: &mut Step<'_>, from: usize) -> Result<(), Stop> {
    const LAST: usize = 15;
    for number in 0..=LAST {
        for piece in pieces(step, number, size_of::<Vector>())?.into_iter().flatten() {
            if piece.register.start >= from {
                let zeros = [0; 64];
                store(step, &piece, &zeros[..piece.register.len()])?;
            }
        }
    }
    Ok(())
}

fn store(step: &mut Step<'_>, piece: &Piece, bytes: &[u8]) -> Result<(), Stop> {
    let image = step.cpu.fpu_mut()?;
    if !component::is_in_use(image, piece.component) {
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        component::materialize_at(image, piece.component, piece.whole.clone());
    }
    let end = piece.image.saturating_add(bytes.len());
    if let Some(target) = image.get_mut(piece.image..end) {
        target.copy_from_slice(bytes);
    }
    Ok(())
}

/// Number, 0 to 31, and bytes of a vector register.
fn identify(register: Register) -> Result<(usize, usize), Stop> {
    if !register.is_vector_register() {
        return Err(Stop::Unsupported("a vector instruction with another register"));
    }
    Ok((register.number(), register.size()))
}

/// The enabled parts of register `number` that its low `size` bytes touch.
fn pieces(step: &mut Step<'_>, number: usize, size: usize) -> Result<[Option<Piece>; 3], Stop> {
    const UPPER: usize = 16;
    const ZMM: usize = 64;
    if number >= UPPER {
        let whole = component::locate(step, component::HI16_ZMM)?;
        let image = whole.start.saturating_add((number - UPPER) * ZMM);
        let piece = Piece { component: component::HI16_ZMM, whole, image, register: 0..ZMM };
        return Ok([Some(piece), None, None]);
    }
    let legacy = legacy::XMM..legacy::XMM_END;
    let image = legacy.start + number * LANE;
    let low = Piece { component: component::SSE, whole: legacy, image, register: 0..LANE };
    let mut found = [Some(low), None, None];
    let enabled = step.cpu.xcr0()?;
    let upper = [(component::AVX, LANE..2 * LANE), (component::ZMM_HI256, 2 * LANE..ZMM)];
    for (slot, (component, register)) in found.iter_mut().skip(1).zip(upper) {
        if size > register.start && enabled & component::mask(component) != 0 {
            let whole = component::locate(step, component)?;
            let image = whole.start.saturating_add(number * register.len());
            *slot = Some(Piece { component, whole, image, register });
        }
    }
    Ok(found)
}
