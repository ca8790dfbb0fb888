//! A vCPU's state as the assist asks for it, fetched at most once and stored when changed.
#![expect(unsafe_code, reason = "KVM_SET_XSAVE, and an XSAVE area as bytes")]

use std::io;

use kvm_bindings::{
    CpuId, KVM_VCPUEVENT_VALID_SHADOW, kvm_regs, kvm_segment, kvm_sregs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use rustix::rand::GetRandomFlags;

use super::Instruction;
use super::memory::GuestView;
use crate::arch::x86_64::{cpuid, msrs};
use crate::assist::paging::{Access, AccessKind};
use crate::assist::{CodeSize, Component, Cpu, Exception, Invalidation, Registers, Segment, Stop};
use crate::memory::GuestRam;
use crate::vcpu::crash::code_size;
use crate::vcpu::exit::MAX_INSTRUCTION_BYTES;

/// CR4.PGE: changing it drops every cached translation (Intel SDM vol. 3, 4.10.4.1).
const CR4_PGE: u64 = 1 << 7;
/// The vector of #DB, whose payload goes to DR6.
const DEBUG: u8 = 1;
/// The vector of #PF, whose payload goes to CR2.
const PAGE_FAULT: u8 = 14;

/// What does not change while a vCPU lives.
#[derive(Debug)]
pub struct Traits {
    /// Indexed by component number (CPUID leaf 0Dh).
    components: [Option<Component>; 63],
    /// Width of physical addresses.
    pub physical_bits: u8,
}

impl Traits {
    /// Those of a vCPU on a KVM that supports `supported`.
    pub fn new(supported: &CpuId) -> Self {
        const XSTATE: u32 = 0xd;
        let mut components = [None; 63];
        for entry in supported.as_slice().iter().filter(|e| e.function == XSTATE && e.index >= 2) {
            if let Some(slot) = components.get_mut(entry.index as usize) {
                *slot = Component::from_cpuid(entry.eax, entry.ebx, entry.ecx);
            }
        }
        Self { components, physical_bits: cpuid::physical_address_bits(supported) }
    }
}

/// One vCPU that stands at a refused instruction.
pub struct StateCache<'a> {
    vcpu: &'a VcpuFd,
    ram: &'a GuestRam,
    traits: &'a Traits,
    registers: Option<Registers>,
    sregs: Option<kvm_sregs>,
    xsave: Option<Box<kvm_xsave>>,
    sregs_changed: bool,
    xsave_changed: bool,
}

impl<'a> StateCache<'a> {
    /// Nothing is fetched yet.
    pub fn new(vcpu: &'a VcpuFd, ram: &'a GuestRam, traits: &'a Traits) -> Self {
        Self {
            vcpu,
            ram,
            traits,
            registers: None,
            sregs: None,
            xsave: None,
            sregs_changed: false,
            xsave_changed: false,
        }
    }

    /// Gives the vCPU what was changed.
    ///
    /// Setting the general registers also drops an exception that KVM holds pending for the
    /// instruction it refused.
    pub fn store(&mut self) -> Result<(), kvm_ioctls::Error> {
        self.end_interrupt_shadow()?;
        if self.xsave_changed
            && let Some(xsave) = &self.xsave
        {
            // SAFETY: without dynamically enabled features, which alcove never asks for, the area
            // that KVM reads is no larger than kvm_xsave.
            unsafe { self.vcpu.set_xsave(xsave) }?;
        }
        if self.sregs_changed
            && let Some(sregs) = &self.sregs
        {
            self.vcpu.set_sregs(sregs)?;
        }
        if let Some(registers) = &self.registers {
            self.vcpu.set_regs(&to_kvm(registers))?;
        }
        Ok(())
    }

    /// A completed instruction ends the shadow of an STI or MOV SS before it.
    fn end_interrupt_shadow(&self) -> Result<(), kvm_ioctls::Error> {
        let mut events = self.vcpu.get_vcpu_events()?;
        if events.interrupt.shadow != 0 {
            events.interrupt.shadow = 0;
            events.flags |= KVM_VCPUEVENT_VALID_SHADOW;
            self.vcpu.set_vcpu_events(&events)?;
        }
        Ok(())
    }

    /// The same, and the guest takes `exception` next.
    pub fn inject(&mut self, exception: Exception) -> Result<(), kvm_ioctls::Error> {
        self.store()?;
        match (exception.vector, exception.payload) {
            (PAGE_FAULT, Some(address)) => {
                let mut sregs = self.vcpu.get_sregs()?;
                sregs.cr2 = address;
                self.vcpu.set_sregs(&sregs)?;
            }
            (DEBUG, Some(causes)) => {
                let mut debug = self.vcpu.get_debug_regs()?;
                debug.dr6 |= causes;
                self.vcpu.set_debug_regs(&debug)?;
            }
            _ => {}
        }
        let mut events = self.vcpu.get_vcpu_events()?;
        events.exception.injected = 1;
        events.exception.nr = exception.vector;
        events.exception.has_error_code = exception.error_code.is_some().into();
        events.exception.error_code = exception.error_code.unwrap_or_default();
        self.vcpu.set_vcpu_events(&events)
    }

    /// The instruction at RIP: `told`, or what guest memory holds when that is empty.
    pub fn instruction(&mut self, told: Instruction) -> Instruction {
        if !told.as_slice().is_empty() {
            return told;
        }
        let Ok(rip) = self.registers().map(|registers| registers.rip) else { return told };
        let mut bytes = [0; MAX_INSTRUCTION_BYTES];
        let read = (1..=MAX_INSTRUCTION_BYTES)
            .rev()
            .find(|&count| self.fetch(rip, &mut bytes[..count]).is_ok());
        Instruction::new(&bytes[..read.unwrap_or(0)])
    }

    fn sregs(&mut self) -> Result<&mut kvm_sregs, Stop> {
        let sregs = match self.sregs.take() {
            Some(sregs) => sregs,
            None => self.vcpu.get_sregs().map_err(host)?,
        };
        Ok(self.sregs.insert(sregs))
    }

    fn segment(&mut self, segment: Segment) -> Result<&mut kvm_segment, Stop> {
        let sregs = self.sregs()?;
        Ok(match segment {
            Segment::Es => &mut sregs.es,
            Segment::Cs => &mut sregs.cs,
            Segment::Ss => &mut sregs.ss,
            Segment::Ds => &mut sregs.ds,
            Segment::Fs => &mut sregs.fs,
            Segment::Gs => &mut sregs.gs,
        })
    }

    fn view(&mut self) -> Result<GuestView<'a>, Stop> {
        let (ram, bits) = (self.ram, self.traits.physical_bits);
        Ok(GuestView::new(ram, self.sregs()?, bits))
    }

    fn explicit(&mut self, kind: AccessKind) -> Result<Access, Stop> {
        let flags = self.registers()?.rflags;
        Ok(Access::explicit(kind, self.cpl()?, flags))
    }

    fn xsave(&mut self) -> Result<&mut kvm_xsave, Stop> {
        let xsave = match self.xsave.take() {
            Some(xsave) => xsave,
            None => Box::new(self.vcpu.get_xsave().map_err(host)?),
        };
        Ok(self.xsave.insert(xsave))
    }
}

impl Cpu for StateCache<'_> {
    fn registers(&mut self) -> Result<&mut Registers, Stop> {
        let registers = match self.registers.take() {
            Some(registers) => registers,
            None => from_kvm(&self.vcpu.get_regs().map_err(host)?),
        };
        Ok(self.registers.insert(registers))
    }

    fn code_size(&mut self) -> Result<CodeSize, Stop> {
        Ok(code_size(&self.sregs()?.cs))
    }

    fn cpl(&mut self) -> Result<u8, Stop> {
        Ok(self.sregs()?.ss.dpl & 3)
    }

    fn cr0(&mut self) -> Result<u64, Stop> {
        Ok(self.sregs()?.cr0)
    }

    fn cr4(&mut self) -> Result<u64, Stop> {
        Ok(self.sregs()?.cr4)
    }

    fn xcr0(&mut self) -> Result<u64, Stop> {
        let xcrs = self.vcpu.get_xcrs().map_err(host)?;
        let set = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|x| x.xcr == 0);
        set.map(|x| x.value).ok_or(Stop::Unsupported("KVM tells no XCR0"))
    }

    fn set_xcr0(&mut self, value: u64) -> Result<(), Stop> {
        let mut xcrs = self.vcpu.get_xcrs().map_err(host)?;
        xcrs.nr_xcrs = 1;
        xcrs.xcrs[0].xcr = 0;
        xcrs.xcrs[0].value = value;
        self.vcpu.set_xcrs(&xcrs).map_err(|_| Exception::general_protection().into())
    }

    fn segment_base(&mut self, segment: Segment) -> Result<u64, Stop> {
        Ok(self.segment(segment)?.base)
    }

    fn set_segment_base(&mut self, segment: Segment, base: u64) -> Result<(), Stop> {
        self.segment(segment)?.base = base;
        self.sregs_changed = true;
        Ok(())
    }

    fn global_descriptor_table(&mut self) -> Result<(u64, u16), Stop> {
        let gdt = self.sregs()?.gdt;
        Ok((gdt.base, gdt.limit))
    }

    fn local_descriptor_table(&mut self) -> Result<Option<(u64, u32)>, Stop> {
        let ldt = self.sregs()?.ldt;
        Ok((ldt.unusable == 0 && ldt.selector & !3 != 0).then_some((ldt.base, ldt.limit)))
    }

    fn read_msr(&mut self, index: u32) -> Result<u64, Stop> {
        get_msr(self.vcpu, index)?.ok_or_else(|| Exception::general_protection().into())
    }

    fn write_msr(&mut self, index: u32, value: u64) -> Result<(), Stop> {
        match set_msr(self.vcpu, index, value).map_err(host)? {
            true => Ok(()),
            false => Err(Exception::general_protection().into()),
        }
    }

    fn read(&mut self, linear: u64, bytes: &mut [u8]) -> Result<(), Stop> {
        let access = self.explicit(AccessKind::Read)?;
        self.view()?.read(linear, bytes, access)
    }

    fn read_as_system(&mut self, linear: u64, bytes: &mut [u8]) -> Result<(), Stop> {
        self.view()?.read(linear, bytes, Access::implicit(AccessKind::Read))
    }

    fn fetch(&mut self, linear: u64, bytes: &mut [u8]) -> Result<(), Stop> {
        let access = self.explicit(AccessKind::Execute)?;
        self.view()?.read(linear, bytes, access)
    }

    fn write(&mut self, linear: u64, bytes: &[u8]) -> Result<(), Stop> {
        let access = self.explicit(AccessKind::Write)?;
        self.view()?.write(linear, bytes, access)
    }

    fn compare_exchange_16(
        &mut self,
        linear: u64,
        expected: u128,
        new: u128,
    ) -> Result<u128, Stop> {
        let access = self.explicit(AccessKind::Write)?;
        self.view()?.compare_exchange_16(linear, expected, new, access)
    }

    fn entropy(&mut self, bytes: &mut [u8]) -> Result<(), Stop> {
        // So few bytes come all at once (getrandom(2)).
        rustix::rand::getrandom(bytes, GetRandomFlags::empty())
            .map(drop)
            .map_err(|e| Stop::Host(e.into()))
    }

    /// Drops all translations, whatever was asked for: nothing finer can be had from outside.
    fn invalidate(&mut self, _what: Invalidation) -> Result<(), Stop> {
        let vcpu = self.vcpu;
        let mut toggled = *self.sregs()?;
        toggled.cr4 ^= CR4_PGE;
        vcpu.set_sregs(&toggled).map_err(host)?;
        self.sregs_changed = true;
        Ok(())
    }

    fn xstate_component(&mut self, index: u32) -> Result<Option<Component>, Stop> {
        Ok(self.traits.components.get(index as usize).copied().flatten())
    }

    fn fpu(&mut self) -> Result<&[u8], Stop> {
        self.xsave().map(|xsave| &*bytes_of(xsave))
    }

    fn fpu_mut(&mut self) -> Result<&mut [u8], Stop> {
        self.xsave_changed = true;
        self.xsave().map(bytes_of)
    }
}

/// The area's 4 KiB.
fn bytes_of(xsave: &mut kvm_xsave) -> &mut [u8] {
    let region = &mut xsave.region;
    let length = size_of_val(region);
    // SAFETY: the region is an array of integers, any bytes of which are valid, borrowed for as
    // long as the slice.
    unsafe { std::slice::from_raw_parts_mut(region.as_mut_ptr().cast(), length) }
}

fn get_msr(vcpu: &VcpuFd, index: u32) -> Result<Option<u64>, Stop> {
    let mut msrs = msrs::table(&[(index, 0)]);
    let count = vcpu.get_msrs(&mut msrs).map_err(host)?;
    Ok(msrs.as_slice().first().filter(|_| count == 1).map(|msr| msr.data))
}

/// Writes an MSR; false if the vCPU has none such or does not take the value.
pub fn set_msr(vcpu: &VcpuFd, index: u32, data: u64) -> Result<bool, kvm_ioctls::Error> {
    vcpu.set_msrs(&msrs::table(&[(index, data)])).map(|count| count == 1)
}

fn host(error: kvm_ioctls::Error) -> Stop {
    Stop::Host(io::Error::from_raw_os_error(error.errno()))
}

fn from_kvm(r: &kvm_regs) -> Registers {
    Registers {
        gpr: [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15,
        ],
        rip: r.rip,
        rflags: r.rflags,
    }
}

fn to_kvm(registers: &Registers) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] =
        registers.gpr;
    let Registers { rip, rflags, .. } = *registers;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    }
}
