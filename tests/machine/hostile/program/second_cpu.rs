//! How the second CPU comes to run the same blocks.

use iced_x86::code_asm::*;

use super::*;

impl Writer<'_> {
    /// Starts the second CPU at `other`.
    pub(super) fn start_other(&mut self, other: CodeLabel, trampoline: CodeLabel) -> Assembled {
        const ICR: i32 = 0x300;
        const INIT_ALL_BUT_SELF: i32 = 0xc_4500;
        const START_ALL_BUT_SELF: i32 = 0xc_4600;
        let a = &mut self.a;
        a.lea(rsi, ptr(trampoline))?;
        a.mov(edi, TRAMPOLINE)?;
        a.mov(ecx, real_mode_code().len() as u32)?;
        a.cld()?;
        a.rep().movsb()?;
        a.lea(rax, ptr(other))?;
        a.mov(dword_ptr(r10 + (TRAMPOLINE + JUMP_TARGET)), eax)?;
        a.mov(rsi, APIC as u64)?;
        a.mov(dword_ptr(rsi + ICR), INIT_ALL_BUT_SELF)?;
        a.mov(dword_ptr(rsi + ICR), START_ALL_BUT_SELF | TRAMPOLINE >> 12)
    }
}

/// Where in [`real_mode_code`] the address goes at which 64-bit code continues.
const JUMP_TARGET: i32 = 0x42;
/// Where its descriptor tables lie.
const TABLE_REGISTER: usize = 0x50;
const DESCRIPTORS: usize = 0x60;

/// From real mode to 64-bit mode (Intel SDM vol. 3, 10.8.5), for [`TRAMPOLINE`].
pub(super) fn real_mode_code() -> Vec<u8> {
    const CODE_64: u64 = 0x00af_9b00_0000_ffff;
    const DATA_64: u64 = 0x00cf_9300_0000_ffff;
    fn assemble(a: &mut CodeAssembler) -> Assembled {
        const EFER: u32 = 0xc000_0080;
        a.cli()?;
        a.mov(eax, cr4)?;
        a.or(eax, 1 << 5)?; // PAE
        a.mov(cr4, eax)?;
        a.mov(eax, TABLES)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, EFER)?;
        a.rdmsr()?;
        a.or(eax, 1 << 8)?; // LME
        a.wrmsr()?;
        // lgdt cs:[TABLE_REGISTER], with a base of 32 bits
        a.db(&[0x2e, 0x66, 0x0f, 0x01, 0x16, TABLE_REGISTER as u8, 0])?;
        a.mov(eax, cr0)?;
        a.or(eax, (1u32 << 31 | 1) as i32)?; // PG, PE
        a.mov(cr0, eax)
    }
    let mut a = CodeAssembler::new(16).unwrap();
    assemble(&mut a).unwrap();
    let mut code = a.assemble(0).unwrap();
    assert!(code.len() <= JUMP_TARGET as usize - 2, "{}", code.len());
    code.resize(JUMP_TARGET as usize - 2, 0x90);
    code.extend([0x66, 0xea, 0, 0, 0, 0, 0x10, 0]); // jmp 0x10:...
    code.resize(TABLE_REGISTER, 0);
    code.extend(31u16.to_le_bytes());
    code.extend((TRAMPOLINE as u32 + DESCRIPTORS as u32).to_le_bytes());
    code.resize(DESCRIPTORS, 0);
    code.extend([0, 0, CODE_64, DATA_64].iter().flat_map(|entry| entry.to_le_bytes()));
    code
}
