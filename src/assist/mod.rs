//! Completes instructions that a software KVM refuses.
//!
//! On a KVM without hardware virtualisation, guest ring 0 runs in KVM's instruction emulator. What
//! that emulator does not know ends KVM_RUN with an emulation failure. [`complete`] then decodes
//! the instruction and does to the vCPU, by way of the [`Cpu`] trait, what the processor would have
//! done. It knows nothing of KVM: the owner of the vCPU implements [`Cpu`], calls [`complete`], and
//! acts on the [`Outcome`].
//!
//! References are to the Intel 64 and IA-32 Architectures Software Developer's Manual (SDM).
//!
//! Limits:
//! - Segment limits and types are not checked: code outside 64-bit mode is taken to use flat
//!   segments.
//! - Whether the guest's CPUID offers an instruction is not checked; what the emulator refuses is
//!   completed.
//! - #AC is not raised.
//! - VMCALL and VMMCALL never get here: KVM answers them with #UD, which the owner recovers.

#![cfg_attr(not(test), forbid(unsafe_code))]

pub mod cpu;
mod descriptor;
mod integer;
mod operands;
pub mod paging;
mod system;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod vector;
mod x87;
mod xsave;

use std::fmt::Write as _;

use iced_x86::{Decoder, DecoderError, DecoderOptions, Formatter, Instruction, IntelFormatter};

pub use cpu::{CodeSize, Component, Cpu, Exception, Invalidation, Registers, Segment, Stop};
use operands::Step;

/// The longest instruction, in bytes.
pub const MAX_INSTRUCTION_BYTES: usize = 15;

const PAGE_BYTES: u64 = 4096;

/// What became of an instruction.
#[derive(Debug)]
pub enum Outcome {
    /// The vCPU stands behind the instruction.
    Completed,
    /// The guest must take this exception; RIP already is what the exception frame shall hold.
    Inject(Exception),
    /// Nothing was changed, and nobody knows how to go on; the text says why.
    Unsupported(&'static str),
    /// A call to the host failed; the vCPU's state is not certain any more.
    Failed(std::io::Error),
}

/// What a family of instructions made of an instruction.
enum Progress {
    /// It is complete; RIP shall move on.
    Done,
    /// It is complete, and the guest takes an exception behind it.
    Trap(Exception),
    /// The family does not know it.
    NotMine,
}

type Family = fn(&mut Step<'_>) -> Result<Progress, Stop>;

const FAMILIES: [Family; 6] = [
    system::complete,
    integer::complete,
    x87::complete,
    xsave::complete,
    descriptor::complete,
    vector::complete,
];

/// Completes the instruction at the vCPU's RIP.
///
/// `bytes` are the instruction's first bytes as far as the owner knows them, none at worst; what
/// is missing is fetched. Completing an instruction clears RFLAGS.RF; the owner ends an interrupt
/// shadow of STI or MOV SS.
pub fn complete(cpu: &mut dyn Cpu, bytes: &[u8]) -> Outcome {
    match attempt(cpu, bytes) {
        Ok(None) => Outcome::Completed,
        Ok(Some(exception)) | Err(Stop::Exception(exception)) => Outcome::Inject(exception),
        Err(Stop::Unsupported(reason)) => Outcome::Unsupported(reason),
        Err(Stop::Host(error)) => Outcome::Failed(error),
    }
}

/// The bytes of the first instruction in `bytes` and its mnemonic with operands, for a report:
/// `0f 01 cb  stac`. All the bytes and `(bad)` if they are no instruction.
pub fn describe(bytes: &[u8], rip: u64, code_size: CodeSize) -> String {
    let bytes = bytes.get(..MAX_INSTRUCTION_BYTES).unwrap_or(bytes);
    let mut decoder = Decoder::with_ip(code_size.bits(), bytes, rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    let valid = !instruction.is_invalid();
    let shown = if valid { bytes.get(..instruction.len()).unwrap_or(bytes) } else { bytes };
    let mut text = String::new();
    for byte in shown {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x} ");
    }
    text.push(' ');
    if valid {
        IntelFormatter::new().format(&instruction, &mut text);
    } else {
        text.push_str("(bad)");
    }
    text
}

fn attempt(cpu: &mut dyn Cpu, bytes: &[u8]) -> Result<Option<Exception>, Stop> {
    let code_size = cpu.code_size()?;
    let instruction = decode(cpu, code_size, bytes)?;
    let single_step = cpu.registers()?.rflags & cpu::rflags::TF != 0;
    let mut step = Step::new(cpu, &instruction, code_size);
    for family in FAMILIES {
        let trap = match family(&mut step)? {
            Progress::NotMine => continue,
            Progress::Done => single_step.then(Exception::single_step),
            Progress::Trap(exception) => Some(exception),
        };
        let registers = step.cpu.registers()?;
        registers.rip = instruction.next_ip() & code_size.mask();
        registers.rflags &= !cpu::rflags::RF;
        return Ok(trap);
    }
    Err(Stop::Unsupported("the assist does not know this instruction"))
}

/// Decodes the instruction at RIP, fetching page by page what `bytes` lacks. Stops with #UD for an
/// undefined opcode and with #GP for one of more than 15 bytes.
fn decode(cpu: &mut dyn Cpu, code_size: CodeSize, bytes: &[u8]) -> Result<Instruction, Stop> {
    let rip = cpu.registers()?.rip;
    let mut buffer = [0; MAX_INSTRUCTION_BYTES];
    let mut known = bytes.len().min(MAX_INSTRUCTION_BYTES);
    for (slot, byte) in buffer.iter_mut().zip(bytes) {
        *slot = *byte;
    }
    loop {
        let (head, tail) = buffer.split_at_mut(known);
        let mut decoder = Decoder::with_ip(code_size.bits(), head, rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        match decoder.last_error() {
            DecoderError::None => return Ok(instruction),
            DecoderError::NoMoreBytes if !tail.is_empty() => {}
            _ if instruction.len() >= MAX_INSTRUCTION_BYTES => {
                return Err(Exception::general_protection().into());
            }
            _ => return Err(Exception::invalid_opcode().into()),
        }
        let code_base = match code_size {
            CodeSize::Bits64 => 0,
            _ => cpu.segment_base(Segment::Cs)?,
        };
        let offset = rip.wrapping_add(known as u64) & code_size.mask();
        let linear = code_base.wrapping_add(offset) & linear_mask(code_size);
        let in_page = PAGE_BYTES - linear % PAGE_BYTES;
        let count = in_page.min(tail.len() as u64) as usize;
        cpu.fetch(linear, &mut tail[..count])?;
        known += count;
    }
}

/// The bits of a linear address that count.
fn linear_mask(code_size: CodeSize) -> u64 {
    match code_size {
        CodeSize::Bits64 => u64::MAX,
        _ => u64::from(u32::MAX),
    }
}
