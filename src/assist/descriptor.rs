//! Instructions that look at a segment descriptor without loading it: LAR, LSL, VERR, VERW
//! (SDM vol. 3 §3.4.5 and §5.10).

use iced_x86::Mnemonic;

use super::cpu::{cr0, rflags};
use super::operands::Step;
use super::{CodeSize, Exception, Progress, Stop};

pub(super) fn complete(step: &mut Step<'_>) -> Result<Progress, Stop> {
    match step.instruction.mnemonic() {
        Mnemonic::Lar => load(step, has_rights, access_rights)?,
        Mnemonic::Lsl => load(step, has_limit, limit)?,
        Mnemonic::Verr => verify(step, Descriptor::is_readable)?,
        Mnemonic::Verw => verify(step, Descriptor::is_writable)?,
        _ => return Ok(Progress::NotMine),
    }
    Ok(Progress::Done)
}

/// A segment descriptor as it stands in memory.
#[derive(Clone, Copy)]
struct Descriptor(u64);

impl Descriptor {
    const TYPE_SHIFT: u32 = 40;
    /// Type bit 1: writable data, readable code.
    const TYPE_WRITABLE: u64 = 1 << 41;
    /// Type bit 2 of a code segment: conforming.
    const TYPE_CONFORMING: u64 = 1 << 42;
    /// Type bit 3: code.
    const TYPE_CODE: u64 = 1 << 43;
    /// S: code or data, not system.
    const NOT_SYSTEM: u64 = 1 << 44;
    const DPL_SHIFT: u32 = 45;
    /// G: the limit counts in pages.
    const GRANULARITY: u64 = 1 << 55;

    fn has(self, bit: u64) -> bool {
        self.0 & bit != 0
    }

    fn is_system(self) -> bool {
        !self.has(Self::NOT_SYSTEM)
    }

    fn is_conforming(self) -> bool {
        !self.is_system() && self.has(Self::TYPE_CODE) && self.has(Self::TYPE_CONFORMING)
    }

    fn is_readable(self) -> bool {
        !self.is_system() && (!self.has(Self::TYPE_CODE) || self.has(Self::TYPE_WRITABLE))
    }

    fn is_writable(self) -> bool {
        !self.is_system() && !self.has(Self::TYPE_CODE) && self.has(Self::TYPE_WRITABLE)
    }

    /// The type of a system descriptor.
    fn system_type(self) -> u8 {
        (self.0 >> Self::TYPE_SHIFT) as u8 & 0xF
    }

    fn privilege_level(self) -> u8 {
        (self.0 >> Self::DPL_SHIFT) as u8 & 3
    }
}

/// System descriptor types (SDM vol. 3 table 3-2).
mod system {
    pub(super) const TSS_16: u8 = 0x1;
    pub(super) const LDT: u8 = 0x2;
    pub(super) const BUSY_TSS_16: u8 = 0x3;
    pub(super) const CALL_GATE_16: u8 = 0x4;
    pub(super) const TASK_GATE: u8 = 0x5;
    pub(super) const TSS: u8 = 0x9;
    pub(super) const BUSY_TSS: u8 = 0xB;
    pub(super) const CALL_GATE: u8 = 0xC;
}

fn has_limit(descriptor: Descriptor, code_size: CodeSize) -> bool {
    use system::{BUSY_TSS, BUSY_TSS_16, LDT, TSS, TSS_16};
    match descriptor.system_type() {
        _ if !descriptor.is_system() => true,
        LDT | TSS | BUSY_TSS => true,
        TSS_16 | BUSY_TSS_16 => code_size != CodeSize::Bits64,
        _ => false,
    }
}

fn has_rights(descriptor: Descriptor, code_size: CodeSize) -> bool {
    use system::{CALL_GATE, CALL_GATE_16, TASK_GATE};
    match descriptor.system_type() {
        _ if has_limit(descriptor, code_size) => true,
        CALL_GATE => true,
        CALL_GATE_16 | TASK_GATE => code_size != CodeSize::Bits64,
        _ => false,
    }
}

/// The second doubleword without the base. Bits 19:16 are undefined; AMD leaves the limit there.
fn access_rights(descriptor: Descriptor) -> u64 {
    const RIGHTS: u64 = 0x00FF_FF00;
    descriptor.0 >> 32 & RIGHTS
}

/// The last offset in the segment.
fn limit(descriptor: Descriptor) -> u64 {
    let limit = descriptor.0 & 0xFFFF | descriptor.0 >> 32 & 0xF_0000;
    match descriptor.has(Descriptor::GRANULARITY) {
        true => limit << 12 | 0xFFF,
        false => limit,
    }
}

fn load(
    step: &mut Step<'_>,
    is_valid: fn(Descriptor, CodeSize) -> bool,
    result: fn(Descriptor) -> u64,
) -> Result<(), Stop> {
    let found = find(step, 1)?.filter(|found| is_valid(*found, step.code_size));
    if let Some(descriptor) = found {
        step.set_value(0, result(descriptor))?;
    }
    set_zero_flag(step, found.is_some())
}

fn verify(step: &mut Step<'_>, allows: fn(Descriptor) -> bool) -> Result<(), Stop> {
    let found = find(step, 0)?;
    set_zero_flag(step, found.is_some_and(allows))
}

fn set_zero_flag(step: &mut Step<'_>, set: bool) -> Result<(), Stop> {
    step.set_flags(rflags::ZF, if set { rflags::ZF } else { 0 })
}

/// The descriptor that the selector in operand `index` selects; `None` for a null selector, one
/// beyond its table, or one that privilege levels forbid.
fn find(step: &mut Step<'_>, index: u32) -> Result<Option<Descriptor>, Stop> {
    const TABLE_INDICATOR: u16 = 1 << 2;
    const DESCRIPTOR_BYTES: u64 = 8;
    let real = step.cpu.cr0()? & cr0::PE == 0;
    let virtual_8086 = step.cpu.registers()?.rflags & rflags::VM != 0;
    step.require(!real && !virtual_8086, Exception::invalid_opcode())?;
    let selector = step.value(index)? as u16;
    let requested_level = (selector & 3) as u8;
    let offset = u64::from(selector & !7);
    let table = match selector & TABLE_INDICATOR {
        0 if offset == 0 => None,
        0 => Some(step.cpu.global_descriptor_table()?).map(|(base, limit)| (base, limit.into())),
        _ => step.cpu.local_descriptor_table()?,
    };
    let Some((base, _)) = table.filter(|(_, last)| offset + DESCRIPTOR_BYTES - 1 <= (*last).into())
    else {
        return Ok(None);
    };
    let mut bytes = [0; DESCRIPTOR_BYTES as usize];
    step.cpu.read_as_system(base.wrapping_add(offset), &mut bytes)?;
    let descriptor = Descriptor(u64::from_le_bytes(bytes));
    let level = step.cpu.cpl()?.max(requested_level);
    let reachable = descriptor.is_conforming() || level <= descriptor.privilege_level();
    Ok(reachable.then_some(descriptor))
}

#[cfg(test)]
mod tests {
    use iced_x86::code_asm::*;

    use super::super::testing::{Case, Random, State};

    /// What Linux has in its GDT: 32-bit code, data and 64-bit code for user mode.
    const USER_SELECTORS: [(u64, u64); 3] = [
        (0x23, 0x00CF_FB00_0000_FFFF),
        (0x2B, 0x00CF_F300_0000_FFFF),
        (0x33, 0x00AF_FB00_0000_FFFF),
    ];

    fn check(mut case: Case) {
        let mut random = Random::seeded();
        for (selector, descriptor) in USER_SELECTORS {
            case.gdt.resize(0x38, 0);
            let start = selector as usize & !7;
            case.gdt[start..start + 8].copy_from_slice(&u64::to_le_bytes(descriptor));
        }
        // Null selectors, the kernel's segments, beyond the table, an LDT that is not there.
        let others = [0, 3, 0x10, 0x18, 0xFFF8, 0x0F];
        for selector in USER_SELECTORS.map(|(selector, _)| selector).into_iter().chain(others) {
            let mut state = State::random(&mut random, case.xcr0);
            state.registers.gpr[3] = selector | random.next() << 32;
            state.registers.gpr[6] = case.native.window() + 64;
            state.window[64..66].copy_from_slice(&(selector as u16).to_le_bytes());
            case.check(&state).unwrap();
        }
    }

    #[test]
    fn verr_and_verw_verify() {
        check(Case::new(|asm, _| asm.verr(bx)));
        check(Case::new(|asm, _| asm.verw(bx)));
        check(Case::new(|asm, _| asm.verw(word_ptr(rsi))));
    }

    #[test]
    fn lsl_loads_limits() {
        check(Case::new(|asm, _| asm.lsl(eax, ebx)));
        check(Case::new(|asm, _| asm.lsl(ax, bx)));
        check(Case::new(|asm, _| asm.lsl(r8, rbx)));
    }

    #[test]
    fn lar_loads_access_rights() {
        check(Case::new(|asm, _| asm.lar(eax, ebx)));
        check(Case::new(|asm, _| asm.lar(ax, bx)));
        check(Case::new(|asm, _| asm.lar(eax, dword_ptr(rsi))));
    }
}
