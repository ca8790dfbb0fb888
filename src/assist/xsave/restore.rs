//! FXRSTOR, XRSTOR and XRSTORS.

use super::component::{self, COMPACTED, EXTENDED_REGION, Places, XCOMP_BV, XSTATE_BV};
use super::{Form, area, check_fxsave, check_xsave, legacy};
use crate::assist::operands::Step;
use crate::assist::{Exception, Stop};

/// The legacy region and the header of an area.
type Head = [u8; EXTENDED_REGION];

/// FXRSTOR (SDM vol. 1 §10.5).
pub(super) fn fxrstor(step: &mut Step<'_>, wide: bool) -> Result<(), Stop> {
    check_fxsave(step)?;
    let linear = area(step, 16, component::HEADER)?;
    let mut head = [0; component::HEADER];
    step.cpu.read(linear, &mut head)?;
    let mut image = step.cpu.fpu()?.to_vec();
    check_mxcsr(step, &image, &head)?;
    load_x87(&mut image, &mut head, wide);
    load_xmm(step, &mut image, &head);
    legacy::set_mxcsr(&mut image, legacy::mxcsr(&head));
    store_image(step, &image)
}

/// XRSTOR and XRSTORS (SDM vol. 1 §13.8, §13.12).
pub(super) fn xrstor(step: &mut Step<'_>, form: Form, wide: bool) -> Result<(), Stop> {
    let (selected, enabled) = check_xsave(step, form)?;
    let linear = area(step, 64, EXTENDED_REGION)?;
    let mut head: Head = [0; EXTENDED_REGION];
    step.cpu.read(linear, &mut head)?;
    let compacted = check_header(step, form, &head, enabled)?;
    let used = component::field(&head, XSTATE_BV);
    let mut image = step.cpu.fpu()?.to_vec();
    let mxcsr = new_mxcsr(step, &image, &head, selected, compacted != 0)?;
    let kept = load_extended(step, &mut image, linear, selected, used, compacted)?;

    let (x87, sse) = (component::mask(component::X87), component::mask(component::SSE));
    let mut in_use = component::field(&image, XSTATE_BV) & !selected | selected & used | kept;
    if selected & used & x87 != 0 {
        load_x87(&mut image, &mut head, wide);
    } else if selected & x87 != 0 {
        legacy::initialize_x87(&mut image);
    }
    if selected & used & sse != 0 {
        load_xmm(step, &mut image, &head);
    } else if selected & sse != 0 {
        let end = legacy::xmm_end(step.code_size);
        if end < legacy::XMM_END && component::is_in_use(&image, component::SSE) {
            in_use |= sse;
        }
        legacy::clear(&mut image, legacy::XMM..end);
    }
    component::set_field(&mut image, XSTATE_BV, in_use);
    let mxcsr = mxcsr.unwrap_or_else(|| legacy::mxcsr(&image));
    legacy::set_mxcsr(&mut image, mxcsr);
    store_image(step, &image)
}

/// Checks the header; returns XCOMP_BV for the compacted format, 0 for the standard one.
fn check_header(step: &Step<'_>, form: Form, head: &Head, enabled: u64) -> Result<u64, Stop> {
    let used = component::field(head, XSTATE_BV);
    let format = component::field(head, XCOMP_BV);
    let zero_until = |end: usize| {
        head.get(XCOMP_BV + 8..end).is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0))
    };
    let valid = if format & COMPACTED != 0 {
        let places = format & !COMPACTED;
        places & !enabled == 0 && used & !places == 0 && zero_until(EXTENDED_REGION)
    } else {
        form == Form::Standard && format == 0 && used & !enabled == 0 && zero_until(XCOMP_BV + 16)
    };
    step.require(valid, Exception::general_protection())?;
    Ok(format)
}

/// MXCSR after the instruction; `None` when it stays.
fn new_mxcsr(
    step: &Step<'_>,
    image: &[u8],
    head: &Head,
    selected: u64,
    compacted: bool,
) -> Result<Option<u32>, Stop> {
    let (sse, avx) = (component::mask(component::SSE), component::mask(component::AVX));
    let loaded = match compacted {
        true if selected & sse == 0 => return Ok(None),
        true => component::field(head, XSTATE_BV) & sse != 0,
        false if selected & (sse | avx) == 0 => return Ok(None),
        false => true,
    };
    if !loaded {
        return Ok(Some(legacy::MXCSR_INITIAL));
    }
    check_mxcsr(step, image, head)?;
    Ok(Some(legacy::mxcsr(head)))
}

fn check_mxcsr(step: &Step<'_>, image: &[u8], head: &[u8]) -> Result<(), Stop> {
    let valid = legacy::mxcsr(head) & !legacy::mxcsr_mask(image) == 0;
    step.require(valid, Exception::general_protection())
}

/// Loads or initialises the selected extended components of `image`. Returns those that stay in
/// use though the area has none of them, for the sake of registers out of reach.
fn load_extended(
    step: &mut Step<'_>,
    image: &mut [u8],
    linear: u64,
    selected: u64,
    used: u64,
    compacted: u64,
) -> Result<u64, Stop> {
    let before = component::field(image, XSTATE_BV);
    let mut kept = 0;
    let mut places = Places::new(selected, compacted);
    while let Some(place) = places.next(step)? {
        let bit = component::mask(place.index);
        let whole = image.get_mut(place.image).unwrap_or_default();
        if before & bit == 0 {
            whole.fill(0);
        } else if place.bytes < whole.len() {
            kept |= bit;
        }
        let accessible = whole.get_mut(..place.bytes).unwrap_or_default();
        if used & bit == 0 {
            accessible.fill(0);
        } else if !accessible.is_empty() {
            let start = linear.wrapping_add(place.area as u64);
            let start = step.check_span(start, accessible.len())?;
            step.cpu.read(start, accessible)?;
        }
    }
    Ok(kept)
}

fn load_x87(image: &mut [u8], head: &mut [u8], wide: bool) {
    legacy::normalize_x87(head, wide);
    component::materialize(image, component::X87);
    legacy::copy(image, head, 0..legacy::MXCSR);
    legacy::copy(image, head, legacy::ST..legacy::XMM);
}

fn load_xmm(step: &Step<'_>, image: &mut [u8], head: &[u8]) {
    component::materialize(image, component::SSE);
    legacy::copy(image, head, legacy::XMM..legacy::xmm_end(step.code_size));
}

fn store_image(step: &mut Step<'_>, image: &[u8]) -> Result<(), Stop> {
    for (to, from) in step.cpu.fpu_mut()?.iter_mut().zip(image) {
        *to = *from;
    }
    Ok(())
}
