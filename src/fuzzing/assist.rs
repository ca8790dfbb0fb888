use std::io;

use devices::fuzzing::Input;

use crate::assist::{
    CodeSize, Component, Cpu, Exception, Invalidation, Outcome, Registers, Segment, Stop, complete,
    describe,
};

/// The memory that the vCPU has: from [`BASE`] on, elsewhere accesses fault.
const MEMORY_BYTES: usize = 0x2000;
const BASE: u64 = 0x50_0000;
/// An FPU image with x87, SSE and AVX.
const FPU_BYTES: usize = 576 + 256;
const XCR0: u64 = 7;

/// An instruction, registers and modes, all as they come.
pub fn assist(data: &[u8]) {
    let mut input = Input(data);
    let mode = input.u8();
    let code_size = match mode & 3 {
        0 => CodeSize::Bits16,
        1 => CodeSize::Bits32,
        _ => CodeSize::Bits64,
    };
    let known = input.bytes(usize::from(mode >> 2 & 15)).to_vec();
    let mut vcpu = Vcpu::new(&mut input, code_size, &known);
    let _ = describe(&known, vcpu.registers.rip, code_size);
    let before = vcpu.clone();
    let outcome = complete(&mut vcpu, &known);
    match outcome {
        Outcome::Completed => {
            let moved = vcpu.registers.rip.wrapping_sub(before.registers.rip) & code_size.mask();
            assert!((1..=15).contains(&moved), "RIP moved by {moved}");
        }
        Outcome::Inject(exception) => assert!(exception.vector < 32, "{exception:?}"),
        Outcome::Unsupported(why) => {
            assert!(!why.is_empty());
            assert_eq!(vcpu, before, "{why}");
        }
        Outcome::Failed(_) => {}
    }
    assert_eq!(vcpu.fpu.len(), FPU_BYTES);
}

/// An instruction to be completed over and over, for benchmarks.
#[derive(Debug)]
pub struct Repeated {
    vcpu: Vcpu,
    code: Vec<u8>,
}

impl Repeated {
    /// The instruction `code`, in 64-bit mode and ring 0, every register pointing to memory.
    pub fn new(code: &[u8]) -> Self {
        let mut vcpu = Vcpu::new(&mut Input(&[0; 128]), CodeSize::Bits64, code);
        vcpu.registers.gpr.fill(BASE + MEMORY_BYTES as u64 / 2);
        Self { vcpu, code: code.to_vec() }
    }

    /// Completes it once.
    ///
    /// # Panics
    /// The assist does not know it.
    pub fn complete(&mut self) {
        self.vcpu.registers.rip = BASE;
        let outcome = complete(&mut self.vcpu, &self.code);
        assert!(matches!(outcome, Outcome::Completed), "{outcome:?}");
    }
}

/// A vCPU of plain memory.
#[derive(Clone, Debug, PartialEq)]
struct Vcpu {
    registers: Registers,
    code_size: CodeSize,
    cpl: u8,
    cr0: u64,
    cr4: u64,
    xcr0: u64,
    bases: [u64; 2],
    memory: Vec<u8>,
    fpu: Vec<u8>,
}

impl Vcpu {
    /// Registers that point into memory, mostly; the instruction's further bytes follow in memory.
    fn new(input: &mut Input<'_>, code_size: CodeSize, code: &[u8]) -> Self {
        const CR0_PE_PG: u64 = 1 << 31 | 1;
        let kind = input.u8();
        let mut registers =
            Registers { rflags: u64::from(input.u32()) | 2, ..Registers::default() };
        for register in &mut registers.gpr {
            *register = match input.u8() {
                byte @ 0..64 => BASE + u64::from(byte) * 8,
                64..128 => BASE + MEMORY_BYTES as u64 - u64::from(input.u8()),
                byte @ 128..192 => u64::from(byte - 128),
                _ => input.u64(),
            };
        }
        registers.rip = BASE & code_size.mask();
        let mut memory = vec![0; MEMORY_BYTES];
        memory[..code.len()].copy_from_slice(code);
        let mut fpu = vec![0; FPU_BYTES];
        fpu[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        fpu[512] = XCR0 as u8;
        let (cr0, cr4) = match kind & 4 {
            0 => (CR0_PE_PG, 1 << 5 | 1 << 9 | 1 << 16 | 1 << 17 | 1 << 18),
            _ => (u64::from(input.u32()) | 1, u64::from(input.u32())),
        };
        let xcr0 = if kind & 8 == 0 { XCR0 } else { u64::from(input.u8()) & XCR0 | 1 };
        let bases = [u64::from(input.u8()), u64::from(input.u8())];
        let rest = input.0;
        for (at, byte) in memory.iter_mut().skip(code.len()).zip(rest) {
            *at = *byte;
        }
        for (at, byte) in fpu.iter_mut().skip(32).zip(rest).filter(|_| kind & 16 != 0).take(480) {
            *at = *byte;
        }
        Self { registers, code_size, cpl: kind & 3, cr0, cr4, xcr0, bases, memory, fpu }
    }

    fn find(&self, linear: u64, length: usize, write: bool) -> Result<usize, Stop> {
        let fault = Exception::page_fault(linear, if write { 6 } else { 4 });
        let start = usize::try_from(linear.wrapping_sub(BASE)).map_err(|_| fault)?;
        match start.checked_add(length) {
            Some(end) if end <= self.memory.len() => Ok(start),
            _ => Err(fault.into()),
        }
    }
}

impl Cpu for Vcpu {
    fn registers(&mut self) -> Result<&mut Registers, Stop> {
        Ok(&mut self.registers)
    }

    fn code_size(&mut self) -> Result<CodeSize, Stop> {
        Ok(self.code_size)
    }

    fn cpl(&mut self) -> Result<u8, Stop> {
        Ok(self.cpl)
    }

    fn cr0(&mut self) -> Result<u64, Stop> {
        Ok(self.cr0)
    }

    fn cr4(&mut self) -> Result<u64, Stop> {
        Ok(self.cr4)
    }

    fn xcr0(&mut self) -> Result<u64, Stop> {
        Ok(self.xcr0)
    }

    fn set_xcr0(&mut self, value: u64) -> Result<(), Stop> {
        assert!(value & 1 != 0 && value & !XCR0 == 0, "XCR0 {value:#x}");
        assert!(value & 4 == 0 || value & 2 != 0, "XCR0 {value:#x}");
        self.xcr0 = value;
        Ok(())
    }

    fn segment_base(&mut self, segment: Segment) -> Result<u64, Stop> {
        Ok(match segment {
            Segment::Fs => self.bases[0],
            Segment::Gs => self.bases[1],
            _ if self.code_size == CodeSize::Bits16 => BASE,
            _ => 0,
        })
    }

    fn set_segment_base(&mut self, segment: Segment, base: u64) -> Result<(), Stop> {
        // With CR4.LA57 addresses are wider (Intel SDM vol. 1 §3.3.7.1).
        let unused = if self.cr4 >> 12 & 1 == 0 { 64 - 48 } else { 64 - 57 };
        let extended = (base.cast_signed() << unused) >> unused;
        assert_eq!(base.cast_signed(), extended, "a base that is not canonical");
        match segment {
            Segment::Fs => self.bases[0] = base,
            _ => self.bases[1] = base,
        }
        Ok(())
    }

    fn global_descriptor_table(&mut self) -> Result<(u64, u16), Stop> {
        Ok((BASE + 0x1000, 0x7f))
    }

    fn local_descriptor_table(&mut self) -> Result<Option<(u64, u32)>, Stop> {
        Ok((self.cpl & 1 != 0).then_some((BASE + 0x1800, 0xffff)))
    }

    fn read_msr(&mut self, _index: u32) -> Result<u64, Stop> {
        Ok(0)
    }

    fn write_msr(&mut self, _index: u32, _value: u64) -> Result<(), Stop> {
        Ok(())
    }

    fn read(&mut self, linear: u64, bytes: &mut [u8]) -> Result<(), Stop> {
        let start = self.find(linear, bytes.len(), false)?;
        bytes.copy_from_slice(&self.memory[start..start + bytes.len()]);
        Ok(())
    }

    fn read_as_system(&mut self, linear: u64, bytes: &mut [u8]) -> Result<(), Stop> {
        self.read(linear, bytes)
    }

    fn fetch(&mut self, linear: u64, bytes: &mut [u8]) -> Result<(), Stop> {
        self.read(linear, bytes)
    }

    fn write(&mut self, linear: u64, bytes: &[u8]) -> Result<(), Stop> {
        let start = self.find(linear, bytes.len(), true)?;
        self.memory[start..start + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn compare_exchange_16(
        &mut self,
        linear: u64,
        expected: u128,
        new: u128,
    ) -> Result<u128, Stop> {
        assert_eq!(linear % 16, 0);
        let mut found = [0; 16];
        self.read(linear, &mut found)?;
        let found = u128::from_le_bytes(found);
        if found == expected {
            self.write(linear, &new.to_le_bytes())?;
        }
        Ok(found)
    }

    fn entropy(&mut self, bytes: &mut [u8]) -> Result<(), Stop> {
        bytes.fill(0xa5);
        Ok(())
    }

    fn invalidate(&mut self, what: Invalidation) -> Result<(), Stop> {
        match what {
            Invalidation::Address { pcid, .. } | Invalidation::Context { pcid } => {
                assert!(pcid < 4096, "{what:?}");
            }
            Invalidation::AllWithGlobals | Invalidation::All => {}
        }
        Err(io::Error::other("one that fails").into())
    }

    fn xstate_component(&mut self, index: u32) -> Result<Option<Component>, Stop> {
        let avx = Component { size: 256, offset: 576, supervisor: false, aligned: false };
        Ok((index == 2).then_some(avx))
    }

    fn fpu(&mut self) -> Result<&[u8], Stop> {
        Ok(&self.fpu)
    }

    fn fpu_mut(&mut self) -> Result<&mut [u8], Stop> {
        Ok(&mut self.fpu)
    }
}
