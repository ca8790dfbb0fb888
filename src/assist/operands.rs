//! Operands of the instruction at hand: register numbers, effective addresses, reads and writes.

use iced_x86::{Instruction, OpKind, Register};

use super::cpu::cr4;
use super::{CodeSize, Cpu, Exception, Segment, Stop, linear_mask};

/// The instruction at hand and the vCPU it runs on.
pub(super) struct Step<'a> {
    pub(super) cpu: &'a mut dyn Cpu,
    pub(super) instruction: &'a Instruction,
    pub(super) code_size: CodeSize,
}

impl<'a> Step<'a> {
    pub(super) fn new(
        cpu: &'a mut dyn Cpu,
        instruction: &'a Instruction,
        code_size: CodeSize,
    ) -> Self {
        Self { cpu, instruction, code_size }
    }

    /// Stops with `exception` unless `condition` holds.
    pub(super) fn require(&self, condition: bool, exception: Exception) -> Result<(), Stop> {
        if condition { Ok(()) } else { Err(exception.into()) }
    }

    /// Stops with #GP at a privilege level other than 0.
    pub(super) fn require_ring_0(&mut self) -> Result<(), Stop> {
        let ring_0 = self.cpu.cpl()? == 0;
        self.require(ring_0, Exception::general_protection())
    }

    /// Stops with #UD unless all of `bits` are set in CR4.
    pub(super) fn require_cr4(&mut self, bits: u64) -> Result<(), Stop> {
        let set = self.cpu.cr4()? & bits == bits;
        self.require(set, Exception::invalid_opcode())
    }

    /// Bytes that operand `index` takes: the register's size or the memory operand's.
    pub(super) fn operand_bytes(&self, index: u32) -> usize {
        match self.instruction.op_kind(index) {
            OpKind::Register => self.instruction.op_register(index).size(),
            _ => self.instruction.memory_size().size(),
        }
    }

    /// Whether operand `index` is in memory.
    pub(super) fn is_memory(&self, index: u32) -> bool {
        matches!(
            self.instruction.op_kind(index),
            OpKind::Memory
                | OpKind::MemorySegSI
                | OpKind::MemorySegESI
                | OpKind::MemorySegRSI
                | OpKind::MemorySegDI
                | OpKind::MemorySegEDI
                | OpKind::MemorySegRDI
                | OpKind::MemoryESDI
                | OpKind::MemoryESEDI
                | OpKind::MemoryESRDI
        )
    }

    /// The value of a general register, zero-extended.
    pub(super) fn register(&mut self, register: Register) -> Result<u64, Stop> {
        let (number, shift) = general_register(register)?;
        let value = self.cpu.registers()?.gpr.get(number).copied().unwrap_or_default();
        Ok((value >> shift) & size_mask(register.size()))
    }

    /// Sets a general register: a 32-bit one clears the upper half, a smaller one keeps the rest.
    pub(super) fn set_register(&mut self, register: Register, value: u64) -> Result<(), Stop> {
        let (number, shift) = general_register(register)?;
        let mask = match register.size() {
            4 | 8 => u64::MAX,
            size => size_mask(size) << shift,
        };
        let value = (value & size_mask(register.size())) << shift;
        if let Some(slot) = self.cpu.registers()?.gpr.get_mut(number) {
            *slot = (*slot & !mask) | value;
        }
        Ok(())
    }

    /// Operand `index`, at most 8 bytes, zero-extended; immediates as encoded.
    pub(super) fn value(&mut self, index: u32) -> Result<u64, Stop> {
        match self.instruction.op_kind(index) {
            OpKind::Register => self.register(self.instruction.op_register(index)),
            OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => Ok(self.instruction.immediate(index)),
            _ => {
                let mut bytes = [0; 8];
                let size = self.operand_bytes(index).min(bytes.len());
                self.read_memory(index, &mut bytes[..size])?;
                Ok(u64::from_le_bytes(bytes))
            }
        }
    }

    /// Sets operand `index`, at most 8 bytes, to the low bytes of `value`.
    pub(super) fn set_value(&mut self, index: u32, value: u64) -> Result<(), Stop> {
        match self.instruction.op_kind(index) {
            OpKind::Register => self.set_register(self.instruction.op_register(index), value),
            _ => {
                let bytes = value.to_le_bytes();
                let size = self.operand_bytes(index).min(bytes.len());
                self.write_memory(index, &bytes[..size])
            }
        }
    }

    /// Reads `bytes.len()` bytes at memory operand `index`.
    pub(super) fn read_memory(&mut self, index: u32, bytes: &mut [u8]) -> Result<(), Stop> {
        let linear = self.address(index, bytes.len())?;
        self.cpu.read(linear, bytes)
    }

    /// Writes `bytes` at memory operand `index`.
    pub(super) fn write_memory(&mut self, index: u32, bytes: &[u8]) -> Result<(), Stop> {
        let linear = self.address(index, bytes.len())?;
        self.cpu.write(linear, bytes)
    }

    /// The linear address of memory operand `index`, all `size_bytes` of which are canonical;
    /// stops with #GP, or #SS in the stack segment, when they are not.
    pub(super) fn address(&mut self, index: u32, size_bytes: usize) -> Result<u64, Stop> {
        let instruction = self.instruction;
        let code_size = self.code_size;
        let cpu = &mut *self.cpu;
        let mut stop = None;
        let linear = instruction.virtual_address(index, 0, |register, _, _| {
            address_part(cpu, code_size, register).map_err(|error| stop = Some(error)).ok()
        });
        if let Some(stop) = stop {
            return Err(stop);
        }
        let linear = linear.ok_or(Stop::Unsupported("an operand that is not in memory"))?;
        self.check_span(linear, size_bytes)
    }

    /// Checks that `size_bytes` from `linear` on are canonical, as [`Step::address`] does.
    pub(super) fn check_span(&mut self, linear: u64, size_bytes: usize) -> Result<u64, Stop> {
        let linear = linear & linear_mask(self.code_size);
        let last = linear.checked_add((size_bytes as u64).saturating_sub(1));
        if self.code_size != CodeSize::Bits64 {
            return match last {
                Some(last) if last <= u64::from(u32::MAX) => Ok(linear),
                _ => Err(Stop::Unsupported("an operand that wraps at 4 GiB")),
            };
        }
        let canonical = match last {
            Some(last) => self.is_canonical(linear)? && self.is_canonical(last)?,
            None => false,
        };
        let fault = match self.instruction.memory_segment() {
            Register::SS => Exception::stack_fault(),
            _ => Exception::general_protection(),
        };
        self.require(canonical, fault)?;
        Ok(linear)
    }

    /// Whether `linear` is canonical with 48 bits or, when CR4.LA57 is set, with 57.
    pub(super) fn is_canonical(&mut self, linear: u64) -> Result<bool, Stop> {
        Ok(fits(linear, 48) || (fits(linear, 57) && self.cpu.cr4()? & cr4::LA57 != 0))
    }

    /// Sets the flags in `mask` as `values` has them.
    pub(super) fn set_flags(&mut self, mask: u64, values: u64) -> Result<(), Stop> {
        let registers = self.cpu.registers()?;
        registers.rflags = (registers.rflags & !mask) | (values & mask);
        Ok(())
    }
}

/// All ones in the low `size_bytes` bytes, 0 to 8.
pub(super) fn size_mask(size_bytes: usize) -> u64 {
    match size_bytes {
        0 => 0,
        1..8 => (1 << (8 * size_bytes)) - 1,
        _ => u64::MAX,
    }
}

/// Whether `linear` is the sign extension of its low `bits` bits.
fn fits(linear: u64, bits: u32) -> bool {
    let shift = 64 - bits;
    ((linear << shift) as i64 >> shift) as u64 == linear
}

/// Number of a general register, and where in it a partial register begins.
fn general_register(register: Register) -> Result<(usize, u32), Stop> {
    if !register.is_gpr() {
        return Err(Stop::Unsupported("an operand in a register of another kind"));
    }
    let shift = match register {
        Register::AH | Register::CH | Register::DH | Register::BH => 8,
        _ => 0,
    };
    Ok((register.full_register().number(), shift))
}

fn address_part(cpu: &mut dyn Cpu, code_size: CodeSize, register: Register) -> Result<u64, Stop> {
    let segment = match register {
        Register::ES => Segment::Es,
        Register::CS => Segment::Cs,
        Register::SS => Segment::Ss,
        Register::DS => Segment::Ds,
        Register::FS => Segment::Fs,
        Register::GS => Segment::Gs,
        _ => {
            let (number, _) = general_register(register)?;
            let value = cpu.registers()?.gpr.get(number).copied().unwrap_or_default();
            return Ok(value & size_mask(register.size()));
        }
    };
    match (code_size, segment) {
        (CodeSize::Bits64, Segment::Es | Segment::Cs | Segment::Ss | Segment::Ds) => Ok(0),
        _ => cpu.segment_base(segment),
    }
}
