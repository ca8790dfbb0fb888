//! FXSAVE, XSAVE, XSAVEOPT, XSAVEC and XSAVES.

use std::ops::Range;

use super::component::{self, COMPACTED, EXTENDED_REGION, Place, Places, XCOMP_BV, XSTATE_BV};
use super::{Form, area, check_fxsave, check_xsave, legacy};
use crate::assist::Stop;
use crate::assist::operands::Step;

/// FXSAVE (SDM vol. 1 §10.5).
pub(super) fn fxsave(step: &mut Step<'_>, wide: bool) -> Result<(), Stop> {
    check_fxsave(step)?;
    let linear = area(step, 16, component::HEADER)?;
    let image = snapshot(step, wide)?;
    let end = legacy::xmm_end(step.code_size);
    write(step, linear, &image, 0..end)
}

/// The others (SDM vol. 1 §13.7, §13.9 to §13.11).
pub(super) fn xsave(step: &mut Step<'_>, form: Form, wide: bool) -> Result<(), Stop> {
    let (selected, _) = check_xsave(step, form)?;
    let compacted = match form {
        Form::Standard | Form::Optimized => 0,
        Form::Compacted | Form::Supervisor => selected | COMPACTED,
    };
    let size_bytes = area_bytes(step, selected, compacted)?;
    let linear = area(step, 64, size_bytes)?;
    let image = snapshot(step, wide)?;
    let fpu = step.cpu.fpu()?;
    let in_use = match compacted {
        0 => component::field(fpu, XSTATE_BV),
        _ => component::in_use(fpu),
    };
    let saved = if form == Form::Standard { selected } else { selected & in_use };
    // Before the first write, so that the old value is the one before the instruction.
    let mut header = [0; 16];
    if compacted == 0 {
        step.cpu.read(linear.wrapping_add(XSTATE_BV as u64), &mut header[..8])?;
    }
    let old = u64::from_le_bytes(*header.first_chunk().unwrap_or(&[0; 8]));

    let mut places = Places::new(saved, compacted);
    while let Some(place) = places.next(step)? {
        write_extended(step, linear, &image, &place)?;
    }
    write_legacy(step, linear, &image, saved, selected, compacted != 0)?;
    let offset = linear.wrapping_add(XSTATE_BV as u64);
    if compacted == 0 {
        let value = old & !selected | in_use & selected;
        return step.cpu.write(offset, &value.to_le_bytes());
    }
    component::set_field(&mut header, 0, in_use & selected);
    component::set_field(&mut header, XCOMP_BV - XSTATE_BV, compacted);
    step.cpu.write(offset, &header)
}

/// The vCPU's image as FXSAVE and XSAVE present it: components that are not in use have their
/// initial values, and what has no meaning is clear.
fn snapshot(step: &mut Step<'_>, wide: bool) -> Result<Vec<u8>, Stop> {
    let mut image = step.cpu.fpu()?.to_vec();
    let mask = legacy::mxcsr_mask(&image);
    legacy::set_mxcsr_mask(&mut image, mask);
    let used = component::field(&image, XSTATE_BV);
    component::materialize(&mut image, component::X87);
    component::materialize(&mut image, component::SSE);
    let enabled = step.cpu.xcr0()?;
    for index in component::EXTENDED {
        if enabled & !used & component::mask(index) != 0 {
            let place = component::locate(step, index)?;
            legacy::clear(&mut image, place);
        }
    }
    legacy::normalize_x87(&mut image, wide);
    Ok(image)
}

/// Bytes from the area's start to the end of the last component that has a place.
fn area_bytes(step: &mut Step<'_>, selected: u64, compacted: u64) -> Result<usize, Stop> {
    let mut end = EXTENDED_REGION;
    let mut places = Places::new(selected, compacted);
    while let Some(place) = places.next(step)? {
        end = end.max(place.area + place.image.len());
    }
    Ok(end)
}

fn write_extended(
    step: &mut Step<'_>,
    linear: u64,
    image: &[u8],
    place: &Place,
) -> Result<(), Stop> {
    let bytes = image.get(place.image.clone()).and_then(|bytes| bytes.get(..place.bytes));
    match bytes {
        Some(bytes) if !bytes.is_empty() => {
            step.cpu.write(linear.wrapping_add(place.area as u64), bytes)
        }
        _ => Ok(()),
    }
}

/// Writes what the legacy region has of `saved`. MXCSR belongs to SSE in the compacted format; in
/// the standard one it is written whenever SSE or AVX is selected.
fn write_legacy(
    step: &mut Step<'_>,
    linear: u64,
    image: &[u8],
    saved: u64,
    selected: u64,
    compacted: bool,
) -> Result<(), Stop> {
    let (x87, sse) = (component::mask(component::X87), component::mask(component::SSE));
    let mxcsr = match compacted {
        true => saved & sse != 0,
        false => selected & (sse | component::mask(component::AVX)) != 0,
    };
    let parts = [
        (saved & x87 != 0, 0..legacy::MXCSR),
        (mxcsr, legacy::MXCSR..legacy::ST),
        (saved & x87 != 0, legacy::ST..legacy::XMM),
        (saved & sse != 0, legacy::XMM..legacy::xmm_end(step.code_size)),
    ];
    let mut pending: Option<Range<usize>> = None;
    for (_, part) in parts.into_iter().filter(|(wanted, _)| *wanted) {
        pending = match pending {
            Some(range) if range.end == part.start => Some(range.start..part.end),
            Some(range) => {
                write(step, linear, image, range)?;
                Some(part)
            }
            None => Some(part),
        };
    }
    match pending {
        Some(range) => write(step, linear, image, range),
        None => Ok(()),
    }
}

fn write(step: &mut Step<'_>, linear: u64, image: &[u8], range: Range<usize>) -> Result<(), Stop> {
    let start = linear.wrapping_add(range.start as u64);
    match image.get(range) {
        Some(bytes) => step.cpu.write(start, bytes),
        None => Err(Stop::Unsupported("an FPU image of less than 576 bytes")),
    }
}
