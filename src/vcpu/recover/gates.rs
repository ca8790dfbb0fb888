//! System calls, `int 0x80` and hypercalls on a KVM that delivers them as exceptions.
//!
//! Breakpoints stand on the guest's handlers of #PF and #UD. When one hits, the exception's frame
//! tells whether it was a true one; if not, the vCPU is put where the instruction leads.

use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug,
    kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::VcpuFd;

use super::Unrecoverable;
use super::cpu::Traits;
use super::memory::GuestView;
use crate::arch::x86_64::msrs;
use crate::assist::paging::{Access, AccessKind};
use crate::memory::GuestRam;

/// Exception vectors (Intel SDM vol. 3, table 6-1).
const INVALID_OPCODE: u64 = 6;
const PAGE_FAULT: u64 = 14;
/// The vector of Linux's 32-bit system calls.
const INT80: u64 = 0x80;

/// #PF error code bit 4: an instruction fetch (Intel SDM vol. 3, 4.7).
const FETCH: u64 = 1 << 4;
/// The requested privilege level of a selector.
const RPL: u64 = 3;

/// RFLAGS bit 1, always set, and RF, which SYSCALL clears.
const RFLAGS_ONE: u64 = 1 << 1;
const RFLAGS_RF: u64 = 1 << 16;

const INT_80: [u8; 2] = [0xcd, 0x80];
const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];
const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];

/// What a hypercall that does not exist returns (KVM_ENOSYS in linux/kvm_para.h).
const KVM_ENOSYS: i64 = 1000;

/// How the guest's code is read: with the rights of whoever was running it.
const BY_USER: Access = Access { kind: AccessKind::Read, user: true, alignment_check: false };
const BY_KERNEL: Access = Access { kind: AccessKind::Read, user: false, alignment_check: false };

/// Offset of RFLAGS in an exception's frame without an error code.
const FRAME_FLAGS: u64 = 16;

/// Bytes of a 64-bit gate (Intel SDM vol. 3, 6.14.1).
const GATE_BYTES: u64 = 16;

/// What the guest has set up for entering its kernel, and the breakpoints on it.
#[derive(Debug, Default)]
pub struct Gates {
    star: u64,
    lstar: u64,
    cstar: u64,
    sfmask: u64,
    /// Handlers of #PF and #UD with a breakpoint each; 0: none.
    handlers: [u64; 2],
    stepping: bool,
}

/// Where a debug exit left the vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// It can go on.
    Recovered,
    /// Before the first instruction of the handler of a true exception.
    BeforeHandler,
    /// At no breakpoint of alcove's: the guest's own single step or breakpoint.
    Elsewhere,
}

/// What an exception pushed (Intel SDM vol. 3, 6.14.2), less the error code.
#[derive(Clone, Copy)]
struct Frame {
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
}

impl Gates {
    /// Takes note of a write to one of the MSRs of SYSCALL.
    pub fn note_msr(&mut self, index: u32, data: u64) {
        match index {
            msrs::STAR => self.star = data,
            msrs::LSTAR => self.lstar = data,
            msrs::CSTAR => self.cstar = data,
            msrs::SFMASK => self.sfmask = data,
            _ => {}
        }
    }

    /// Puts the breakpoints where the guest's handlers are now.
    pub fn follow(
        &mut self,
        vcpu: &VcpuFd,
        ram: &GuestRam,
        traits: &Traits,
    ) -> Result<(), Unrecoverable> {
        if self.stepping {
            return Ok(());
        }
        let sregs = get_sregs(vcpu)?;
        let view = GuestView::new(ram, &sregs, traits.physical_bits);
        let handlers = [PAGE_FAULT, INVALID_OPCODE].map(|vector| handler(&view, &sregs, vector));
        let handlers = handlers.map(Option::unwrap_or_default);
        if handlers != self.handlers {
            self.handlers = handlers;
            self.arm(vcpu)?;
        }
        Ok(())
    }

    /// Steps over the instruction at a breakpoint.
    pub fn step(&mut self, vcpu: &VcpuFd) -> Result<(), Unrecoverable> {
        self.stepping = true;
        set_debug(
            vcpu,
            &kvm_guest_debug {
                control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
                ..Default::default()
            },
        )
    }

    fn arm(&self, vcpu: &VcpuFd) -> Result<(), Unrecoverable> {
        /// DR7: bit 10 is always set; bits 1, 3 enable breakpoints 0 and 1 (Intel SDM vol. 3,
        /// 17.2.4), of type execute where their other fields are zero.
        const DR7_RESERVED: u64 = 1 << 10;
        const DR7_G0: u64 = 1 << 1;
        const DR7_G1: u64 = 1 << 3;
        const DR7: usize = 7;
        let mut debug = kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP,
            ..Default::default()
        };
        debug.arch.debugreg[DR7] = DR7_RESERVED;
        for (index, (handler, enable)) in
            self.handlers.into_iter().zip([DR7_G0, DR7_G1]).enumerate()
        {
            if handler != 0 {
                debug.arch.debugreg[index] = handler;
                debug.arch.debugreg[DR7] |= enable;
            }
        }
        set_debug(vcpu, &debug)
    }

    /// Handles a debug exit.
    pub fn breakpoint(
        &mut self,
        vcpu: &VcpuFd,
        ram: &GuestRam,
        traits: &Traits,
    ) -> Result<Stopped, Unrecoverable> {
        if self.stepping {
            self.stepping = false;
            self.arm(vcpu)?;
            return Ok(Stopped::Recovered);
        }
        let mut regs = vcpu.get_regs().map_err(|e| Unrecoverable::kvm("tell registers", e))?;
        let mut sregs = get_sregs(vcpu)?;
        let view = GuestView::new(ram, &sregs, traits.physical_bits);
        // Whoever gets there without an exception, as ring 3 may by a jump, brings no frame that
        // may be trusted.
        if sregs.ss.dpl & RPL as u8 != 0 {
            return Ok(Stopped::Elsewhere);
        }
        let [page_fault, invalid_opcode] = self.handlers;
        let entered = if regs.rip == page_fault {
            self.system_call(&view, &mut regs, &mut sregs)
        } else if regs.rip == invalid_opcode {
            software_interrupt(&view, &mut regs, &sregs)
        } else {
            return Ok(Stopped::Elsewhere);
        };
        if entered.is_some() {
            vcpu.set_sregs(&sregs).map_err(|e| Unrecoverable::kvm("set segments", e))?;
            vcpu.set_regs(&regs).map_err(|e| Unrecoverable::kvm("set registers", e))?;
            return Ok(Stopped::Recovered);
        }
        Ok(Stopped::BeforeHandler)
    }

    /// SYSCALL faults at its target, still in ring 3. The registers then go where SYSCALL would
    /// have taken them (Intel SDM vol. 2B, SYSCALL).
    ///
    /// A jump of ring 3 to that address faults alike, but its frame then holds the flags of ring 3,
    /// with IF set; after SYSCALL it holds R11 less SFMASK, which with any sane kernel clears IF.
    fn system_call(
        &self,
        view: &GuestView<'_>,
        regs: &mut kvm_regs,
        sregs: &mut kvm_sregs,
    ) -> Option<()> {
        let error_code = view.read_u64(regs.rsp).ok()?;
        let frame = Frame::read(view, regs.rsp.wrapping_add(8))?;
        let target = [self.lstar, self.cstar].contains(&frame.rip) && frame.rip != 0;
        if !target || frame.cs & RPL != RPL || error_code & FETCH == 0 {
            return None;
        }
        let flags = regs.r11 & !(self.sfmask | RFLAGS_RF) | RFLAGS_ONE;
        if frame.rflags & !RFLAGS_RF != flags {
            return None;
        }
        regs.rip = frame.rip;
        regs.rsp = frame.rsp;
        regs.rflags = flags;
        let code = (self.star >> 32) as u16 & !(RPL as u16);
        (sregs.cs, sregs.ss) = kernel_segments(code, code.wrapping_add(8));
        Some(())
    }
}

/// A #UD that is none: `int 0x80` in ring 3 goes through its gate, a hypercall in ring 0 returns
/// that it does not exist.
fn software_interrupt(view: &GuestView<'_>, regs: &mut kvm_regs, sregs: &kvm_sregs) -> Option<()> {
    let frame = Frame::read(view, regs.rsp)?;
    if frame.cs & RPL == 0 {
        let code: [u8; 3] = view.read_array(frame.rip, BY_KERNEL).ok()?;
        if code != VMCALL && code != VMMCALL {
            return None;
        }
        regs.rax = -KVM_ENOSYS as u64;
        regs.rip = frame.rip.wrapping_add(code.len() as u64);
        regs.rsp = frame.rsp;
        regs.rflags = frame.rflags & !RFLAGS_RF;
        return Some(());
    }
    if view.read_array(frame.rip, BY_USER).ok()? != INT_80 {
        return None;
    }
    let entry = gate(view, sregs, INT80)?;
    let (handler, callable) = (entry.offset(), entry.dpl() == RPL);
    if !callable {
        return None;
    }
    let behind = frame.rip.wrapping_add(INT_80.len() as u64).to_le_bytes();
    let flags = (frame.rflags & !RFLAGS_RF).to_le_bytes();
    view.write(regs.rsp, &behind, Access::implicit(AccessKind::Write)).ok()?;
    let flags_at = regs.rsp.wrapping_add(FRAME_FLAGS);
    view.write(flags_at, &flags, Access::implicit(AccessKind::Write)).ok()?;
    regs.rip = handler;
    Some(())
}

impl Frame {
    fn read(view: &GuestView<'_>, at: u64) -> Option<Self> {
        let word = |index: u64| view.read_u64(at.wrapping_add(8 * index)).ok();
        Some(Self { rip: word(0)?, cs: word(1)?, rflags: word(2)?, rsp: word(3)? })
    }
}

/// A 64-bit interrupt gate.
struct Gate {
    low: u64,
    high: u64,
}

impl Gate {
    fn offset(&self) -> u64 {
        self.low & 0xffff | self.low >> 32 & 0xffff_0000 | self.high << 32
    }

    fn dpl(&self) -> u64 {
        self.low >> 45 & 3
    }

    fn is_present(&self) -> bool {
        self.low >> 47 & 1 != 0
    }
}

fn gate(view: &GuestView<'_>, sregs: &kvm_sregs, vector: u64) -> Option<Gate> {
    let offset = vector * GATE_BYTES;
    if u64::from(sregs.idt.limit) < offset + GATE_BYTES - 1 {
        return None;
    }
    let at = sregs.idt.base.wrapping_add(offset);
    let gate = Gate { low: view.read_u64(at).ok()?, high: view.read_u64(at.wrapping_add(8)).ok()? };
    gate.is_present().then_some(gate)
}

fn handler(view: &GuestView<'_>, sregs: &kvm_sregs, vector: u64) -> Option<u64> {
    gate(view, sregs, vector).map(|gate| gate.offset())
}

/// The flat 64-bit segments that SYSCALL loads, whatever the descriptor table says.
fn kernel_segments(code: u16, stack: u16) -> (kvm_segment, kvm_segment) {
    const CODE_EXECUTE_READ_ACCESSED: u8 = 11;
    const DATA_READ_WRITE_ACCESSED: u8 = 3;
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() };
    let cs = kvm_segment { selector: code, type_: CODE_EXECUTE_READ_ACCESSED, l: 1, ..flat };
    let ss = kvm_segment { selector: stack, type_: DATA_READ_WRITE_ACCESSED, db: 1, ..flat };
    (cs, ss)
}

fn get_sregs(vcpu: &VcpuFd) -> Result<kvm_sregs, Unrecoverable> {
    vcpu.get_sregs().map_err(|e| Unrecoverable::kvm("tell segments", e))
}

fn set_debug(vcpu: &VcpuFd, debug: &kvm_guest_debug) -> Result<(), Unrecoverable> {
    vcpu.set_guest_debug(debug).map_err(|e| Unrecoverable::kvm("set breakpoints", e))
}
