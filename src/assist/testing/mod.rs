//! A vCPU made of plain memory, and the real processor to compare it with.

#![cfg(test)]

mod native;

use std::sync::OnceLock;

use super::cpu::{cr0, cr4, msr};
use super::*;
pub(super) use native::{Case, host_xcr0};

/// The state components that the tests work on: x87, SSE, AVX and AVX-512.
pub(super) const TESTED: u64 = 0xE7;

/// Bytes of the window that operands lie in.
pub(super) const WINDOW_BYTES: usize = 8192;

/// A component of XSAVE areas, as the host's processor lays them out.
pub(super) fn host_component(index: u32) -> Option<Component> {
    // CPUID is slow in a virtual machine.
    static COMPONENTS: OnceLock<Vec<Option<Component>>> = OnceLock::new();
    let components = COMPONENTS.get_or_init(|| {
        let leaves = (0..63).map(|index| std::arch::x86_64::__cpuid_count(0xD, index));
        leaves.map(|leaf| Component::from_cpuid(leaf.eax, leaf.ebx, leaf.ecx)).collect()
    });
    components[index as usize]
}

/// Bytes of an FPU image with the components of [`TESTED`] that the host has.
pub(super) fn fpu_bytes() -> usize {
    let end = |found: Component| (found.offset + found.size) as usize;
    let ends = (2..8).filter(|index| TESTED & host_xcr0() & (1 << index) != 0);
    ends.filter_map(host_component).map(end).max().unwrap_or(576)
}

/// Registers, FPU image and the operand window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub(super) registers: Registers,
    pub(super) fpu: Vec<u8>,
    pub(super) window: Vec<u8>,
}

impl State {
    /// Random registers, flags, FPU state and memory.
    pub(super) fn random(random: &mut Random, xcr0: u64) -> Self {
        use super::cpu::rflags::{AF, CF, OF, PF, SF, ZF};
        let mut registers = Registers::default();
        for register in &mut registers.gpr {
            *register = random.operand();
        }
        registers.rflags = random.next() & (CF | PF | AF | ZF | SF | OF);
        let mut window = vec![0; WINDOW_BYTES];
        for chunk in window.chunks_mut(8) {
            chunk.copy_from_slice(&random.operand().to_le_bytes());
        }
        Self { registers, fpu: random.fpu(xcr0), window }
    }
}

/// A [`Cpu`] whose memory is one window; elsewhere accesses fault.
pub(super) struct TestCpu {
    pub(super) state: State,
    /// Linear address of the window.
    pub(super) base: u64,
    pub(super) code: Vec<u8>,
    pub(super) code_size: CodeSize,
    pub(super) cpl: u8,
    pub(super) cr0: u64,
    pub(super) cr4: u64,
    pub(super) xcr0: u64,
    pub(super) xss: u64,
    pub(super) tsc_aux: u64,
    pub(super) kernel_gs_base: u64,
    pub(super) fs_base: u64,
    pub(super) gs_base: u64,
    pub(super) flat_base: u64,
    pub(super) invalidated: Vec<Invalidation>,
    pub(super) gdt: Vec<u8>,
}

/// Where the test's descriptor table is.
pub(super) const GDT_BASE: u64 = 0xFFFF_FE00_0000_1000;

impl TestCpu {
    /// A vCPU at ring 0 in 64-bit mode with everything enabled.
    pub(super) fn new(code: &[u8]) -> Self {
        let mut fpu = vec![0; fpu_bytes()];
        fpu[24..28].copy_from_slice(&0x1F80u32.to_le_bytes());
        fpu[28..32].copy_from_slice(&0x2FFFFu32.to_le_bytes());
        let registers = Registers { rip: 0x40_0000, rflags: 2, ..Registers::default() };
        Self {
            state: State { registers, fpu, window: vec![0; WINDOW_BYTES] },
            base: 0x50_0000,
            code: code.to_vec(),
            code_size: CodeSize::Bits64,
            cpl: 0,
            cr0: cr0::PE | cr0::MP | cr0::NE | cr0::PG | cr0::WP,
            cr4: cr4::PAE | cr4::OSFXSR | cr4::OSXSAVE | cr4::FSGSBASE | cr4::PCIDE,
            xcr0: TESTED & host_xcr0(),
            xss: 0,
            tsc_aux: 0x1234_5678,
            kernel_gs_base: 0x7777_0000,
            fs_base: 0x100,
            gs_base: 0x200,
            flat_base: 0,
            invalidated: Vec::new(),
            gdt: Vec::new(),
        }
    }

    /// Completes the instruction in `code`.
    pub(super) fn complete(&mut self) -> Outcome {
        let code = self.code.clone();
        complete(self, &code)
    }

    fn find(&self, linear: u64, length: usize, write: bool) -> Result<usize, Stop> {
        let fault = Exception::page_fault(linear, if write { 6 } else { 4 });
        let start = usize::try_from(linear.wrapping_sub(self.base)).map_err(|_| fault)?;
        match start.checked_add(length) {
            Some(end) if end <= self.state.window.len() => Ok(start),
            _ => Err(fault.into()),
        }
    }
}

impl Cpu for TestCpu {
    fn registers(&mut self) -> Result<&mut Registers, Stop> {
        Ok(&mut self.state.registers)
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
        self.xcr0 = value;
        Ok(())
    }

    fn segment_base(&mut self, segment: Segment) -> Result<u64, Stop> {
        Ok(match segment {
            Segment::Fs => self.fs_base,
            Segment::Gs => self.gs_base,
            _ => self.flat_base,
        })
    }

    fn set_segment_base(&mut self, segment: Segment, base: u64) -> Result<(), Stop> {
        match segment {
            Segment::Fs => self.fs_base = base,
            _ => self.gs_base = base,
        }
        Ok(())
    }

    fn global_descriptor_table(&mut self) -> Result<(u64, u16), Stop> {
        Ok((GDT_BASE, self.gdt.len().saturating_sub(1) as u16))
    }

    fn local_descriptor_table(&mut self) -> Result<Option<(u64, u32)>, Stop> {
        Ok(None)
    }

    fn read_msr(&mut self, index: u32) -> Result<u64, Stop> {
        match index {
            msr::IA32_XSS => Ok(self.xss),
            msr::IA32_TSC_AUX => Ok(self.tsc_aux),
            msr::IA32_KERNEL_GS_BASE => Ok(self.kernel_gs_base),
            _ => Err(Exception::general_protection().into()),
        }
    }

    fn write_msr(&mut self, index: u32, value: u64) -> Result<(), Stop> {
        match index {
            msr::IA32_KERNEL_GS_BASE => self.kernel_gs_base = value,
            _ => return Err(Exception::general_protection().into()),
        }
        Ok(())
    }

    fn read(&mut self, linear: u64, bytes: &mut [u8]) -> Result<(), Stop> {
        let start = self.find(linear, bytes.len(), false)?;
        bytes.copy_from_slice(&self.state.window[start..start + bytes.len()]);
        Ok(())
    }

    fn read_as_system(&mut self, linear: u64, bytes: &mut [u8]) -> Result<(), Stop> {
        let start = linear.wrapping_sub(GDT_BASE) as usize;
        match self.gdt.get(start..start.saturating_add(bytes.len())) {
            Some(found) => bytes.copy_from_slice(found),
            None => return Err(Exception::page_fault(linear, 0).into()),
        }
        Ok(())
    }

    fn fetch(&mut self, linear: u64, bytes: &mut [u8]) -> Result<(), Stop> {
        let start = linear.wrapping_sub(self.state.registers.rip.wrapping_add(self.flat_base));
        for (place, byte) in bytes.iter_mut().enumerate() {
            *byte = self.code.get(start as usize + place).copied().unwrap_or(0x90);
        }
        Ok(())
    }

    fn write(&mut self, linear: u64, bytes: &[u8]) -> Result<(), Stop> {
        let start = self.find(linear, bytes.len(), true)?;
        self.state.window[start..start + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn compare_exchange_16(
        &mut self,
        linear: u64,
        expected: u128,
        new: u128,
    ) -> Result<u128, Stop> {
        let start = self.find(linear, 16, true)?;
        let slot: &mut [u8; 16] = self.state.window[start..].first_chunk_mut().unwrap();
        let found = u128::from_le_bytes(*slot);
        if found == expected {
            *slot = new.to_le_bytes();
        }
        Ok(found)
    }

    fn entropy(&mut self, bytes: &mut [u8]) -> Result<(), Stop> {
        bytes.fill(0xA5);
        Ok(())
    }

    fn invalidate(&mut self, what: Invalidation) -> Result<(), Stop> {
        self.invalidated.push(what);
        Ok(())
    }

    fn xstate_component(&mut self, index: u32) -> Result<Option<Component>, Stop> {
        Ok(host_component(index))
    }

    fn fpu(&mut self) -> Result<&[u8], Stop> {
        Ok(&self.state.fpu)
    }

    fn fpu_mut(&mut self) -> Result<&mut [u8], Stop> {
        Ok(&mut self.state.fpu)
    }
}

/// Small and good enough for operands (xorshift64*).
pub(super) struct Random(u64);

impl Random {
    /// With a seed that differs each time and is printed.
    pub(super) fn seeded() -> Self {
        use std::hash::{BuildHasher, Hasher, RandomState};
        let seed = RandomState::new().build_hasher().finish() | 1;
        report(&format!("seed {seed:#018x}"));
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub(super) fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }

    pub(super) fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }

    /// Random bits, or one of the values where arithmetic has its corners.
    pub(super) fn operand(&mut self) -> u64 {
        const CORNERS: [u64; 8] = [
            0,
            1,
            u64::MAX,
            1 << 63,
            1 << 31,
            u32::MAX as u64,
            0x7FFF_FFFF_FFFF_FFFF,
            0x8000_0000_8000_8080,
        ];
        match self.below(4) {
            0 => CORNERS[self.below(8) as usize],
            1 => self.next() & self.next() & self.next(),
            _ => self.next(),
        }
    }

    pub(super) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let value = self.next().to_le_bytes();
            chunk.copy_from_slice(&value[..chunk.len()]);
        }
    }

    /// A valid FPU image with random contents, some components out of use.
    pub(super) fn fpu(&mut self, xcr0: u64) -> Vec<u8> {
        let xcr0 = xcr0 & TESTED;
        let mut image = vec![0; fpu_bytes()];
        self.fill(&mut image);
        // Mostly with all exceptions masked, so that none is pending.
        let masks = if self.chance(4) { 0x40 } else { 0x7F };
        image[0..2].copy_from_slice(&(self.next() as u16 & 0x0F3F | masks).to_le_bytes());
        image[2..4].copy_from_slice(&(self.next() as u16 & 0x7F7F).to_le_bytes());
        image[5] = 0;
        image[7] &= 7;
        for pointer in [14, 15, 22, 23] {
            image[pointer] = 0;
        }
        // Canonical pointers.
        image[13] &= 0x7F;
        image[21] &= 0x7F;
        let mxcsr = if self.chance(3) { 0x1F80 } else { self.next() as u32 & 0xFFFF };
        image[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        image[28..32].copy_from_slice(&0x2FFFFu32.to_le_bytes());
        image[512..576].fill(0);
        let in_use = if self.chance(2) { xcr0 } else { xcr0 & self.next() };
        image[512..520].copy_from_slice(&in_use.to_le_bytes());
        image
    }
}

/// Says something in a test's output.
#[expect(clippy::print_stderr, reason = "a skipped test must say so")]
pub(super) fn report(text: &str) {
    eprintln!("{text}");
}
