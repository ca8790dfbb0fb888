//! What is said of a guest that crashed.

use std::fmt;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::exit::Instruction;
use crate::assist::{self, CodeSize};

/// Why and where a vCPU could not go on.
#[derive(Debug)]
pub struct CrashReport {
    /// Index of the vCPU.
    pub vcpu: u32,
    /// What happened, without a full stop.
    pub cause: String,
    /// The instruction at RIP, as far as it could be read.
    pub instruction: Instruction,
    /// General registers, where KVM still gives them.
    pub regs: Option<kvm_regs>,
    /// Segments and control registers, where KVM still gives them.
    pub sregs: Option<kvm_sregs>,
}

impl fmt::Display for CrashReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the guest crashed: {} (vCPU {})", self.cause, self.vcpu)?;
        let bytes = self.instruction.as_slice();
        if !bytes.is_empty() {
            let code_size = self.sregs.as_ref().map_or(CodeSize::Bits64, |s| code_size(&s.cs));
            let rip = self.regs.map_or(0, |r| r.rip);
            write!(f, "\n  instruction: {}", assist::describe(bytes, rip, code_size))?;
        }
        if let Some(r) = &self.regs {
            write!(
                f,
                "\n  rip {:016x}  rflags {:016x}\
                 \n  rax {:016x}  rbx {:016x}  rcx {:016x}  rdx {:016x}\
                 \n  rsi {:016x}  rdi {:016x}  rbp {:016x}  rsp {:016x}\
                 \n  r8  {:016x}  r9  {:016x}  r10 {:016x}  r11 {:016x}\
                 \n  r12 {:016x}  r13 {:016x}  r14 {:016x}  r15 {:016x}",
                r.rip,
                r.rflags,
                r.rax,
                r.rbx,
                r.rcx,
                r.rdx,
                r.rsi,
                r.rdi,
                r.rbp,
                r.rsp,
                r.r8,
                r.r9,
                r.r10,
                r.r11,
                r.r12,
                r.r13,
                r.r14,
                r.r15,
            )?;
        }
        if let Some(s) = &self.sregs {
            write!(
                f,
                "\n  cr0 {:016x}  cr2 {:016x}  cr3 {:016x}  cr4 {:016x}  efer {:016x}\
                 \n  cs {:04x} ({}-bit, CPL {})  ss {:04x}  gs base {:016x}  fs base {:016x}\
                 \n  gdt {:016x}+{:x}  idt {:016x}+{:x}",
                s.cr0,
                s.cr2,
                s.cr3,
                s.cr4,
                s.efer,
                s.cs.selector,
                code_size(&s.cs).bits(),
                s.ss.dpl,
                s.ss.selector,
                s.gs.base,
                s.fs.base,
                s.gdt.base,
                s.gdt.limit,
                s.idt.base,
                s.idt.limit,
            )?;
        }
        Ok(())
    }
}

/// The mode that code in the segment `cs` runs in.
pub fn code_size(cs: &kvm_segment) -> CodeSize {
    match (cs.l, cs.db) {
        (0, 0) => CodeSize::Bits16,
        (0, _) => CodeSize::Bits32,
        _ => CodeSize::Bits64,
    }
}
