//! Keeps a guest going on a software KVM: the one place where KVM's state meets the assist.
//!
//! Three things differ there from VT-x and AMD-V. Instructions that KVM's emulator refuses in ring 0
//! are completed by [`crate::assist`]. A system call in ring 3 arrives as a page fault, and
//! `int 0x80` and hypercalls as an undefined opcode; `gates` turns them into what they were.

mod cpu;
mod gates;
mod memory;

use kvm_bindings::{
    CpuId, KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_X86_USER_SPACE_MSR,
    KVM_MSR_EXIT_REASON_FILTER, KVM_X86_QUIRK_FIX_HYPERCALL_INSN, kvm_enable_cap,
};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd};

use self::cpu::{StateCache, Traits};
use self::gates::{Gates, Stopped};
use super::exit::{self, Instruction};
use crate::arch::x86_64::msrs;
use crate::assist::{self, Exception, Outcome};
use crate::config::AssistMode;
use crate::host;
use crate::memory::GuestRam;

/// Why a vCPU cannot go on.
#[derive(Debug)]
pub struct Unrecoverable {
    /// What happened, without a full stop.
    pub cause: String,
    /// The instruction it happened at, where it is known.
    pub instruction: Instruction,
}

impl Unrecoverable {
    /// Something that is not about one instruction.
    pub fn new(cause: impl Into<String>) -> Self {
        Self::at(cause, Instruction::default())
    }

    /// Something that `instruction` caused.
    pub fn at(cause: impl Into<String>, instruction: Instruction) -> Self {
        Self { cause: cause.into(), instruction }
    }

    fn kvm(call: &str, error: kvm_ioctls::Error) -> Self {
        Self::new(format!("KVM refused to {call}: {error}"))
    }
}

/// Whether guests on this host need the assist.
pub fn is_needed(mode: AssistMode) -> bool {
    match mode {
        AssistMode::Auto => !host::has_hardware_virtualisation(),
        AssistMode::On => true,
        AssistMode::Off => false,
    }
}

/// Makes `vm` report what the assist needs to hear of.
///
/// To be called before its first vCPU is created.
pub fn prepare(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    let enable = |cap: u32, argument: u64| {
        let mut enable = kvm_enable_cap { cap, ..Default::default() };
        enable.args[0] = argument;
        vm.enable_cap(&enable)
    };
    enable(KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)?;
    // KVM would patch a hypercall into the host vendor's form and run it again, for ever.
    enable(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_FIX_HYPERCALL_INSN.into())?;
    enable(KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER.into())?;
    // A zero bit denies the access to the guest, which then exits.
    let held_back = MsrFilterRange {
        flags: MsrFilterRangeFlags::WRITE,
        base: msrs::STAR,
        msr_count: msrs::SFMASK - msrs::STAR + 1,
        bitmap: &[0],
    };
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[held_back])
}

/// The assist of one vCPU.
pub struct Recovery {
    ram: GuestRam,
    traits: Traits,
    gates: Gates,
}

impl Recovery {
    /// The assist for a vCPU over `ram` whose KVM supports `supported`.
    pub fn new(ram: GuestRam, supported: &CpuId) -> Self {
        Self { ram, traits: Traits::new(supported), gates: Gates::default() }
    }

    /// Completes the instruction that KVM's emulator refused; `bytes` starts with it.
    pub fn emulation_failure(
        &mut self,
        vcpu: &mut VcpuFd,
        bytes: Instruction,
    ) -> Result<(), Unrecoverable> {
        self.complete(vcpu, bytes)?;
        self.gates.follow(vcpu, &self.ram, &self.traits)
    }

    /// Looks after the breakpoints once a port or MMIO access has been served.
    pub fn after_access(&mut self, vcpu: &mut VcpuFd) -> Result<(), Unrecoverable> {
        self.gates.follow(vcpu, &self.ram, &self.traits)
    }

    /// Carries out a held-back write to an MSR.
    pub fn msr_write(
        &mut self,
        vcpu: &mut VcpuFd,
        index: u32,
        data: u64,
    ) -> Result<(), Unrecoverable> {
        let done = cpu::set_msr(vcpu, index, data)
            .map_err(|e| Unrecoverable::kvm("write a model-specific register", e))?;
        if done {
            self.gates.note_msr(index, data);
        }
        exit::answer_msr_write(vcpu, done);
        self.gates.follow(vcpu, &self.ram, &self.traits)
    }

    /// Serves a breakpoint at one of the guest's exception handlers; any other #DB, whose causes are
    /// in `dr6`, is the guest's own.
    pub fn breakpoint(&mut self, vcpu: &mut VcpuFd, dr6: u64) -> Result<(), Unrecoverable> {
        match self.gates.breakpoint(vcpu, &self.ram, &self.traits)? {
            Stopped::Recovered => return Ok(()),
            Stopped::BeforeHandler => {}
            Stopped::Elsewhere => return self.give_debug_exception(vcpu, dr6),
        }
        // A true exception: the handler's first instruction, which is past the breakpoint, is
        // usually one that the assist completes; single-step any other.
        let mut state = StateCache::new(vcpu, &self.ram, &self.traits);
        match assist::complete(&mut state, &[]) {
            Outcome::Completed => state.store().map_err(|e| Unrecoverable::kvm("set registers", e)),
            _ => self.gates.step(vcpu),
        }
    }

    /// Lets the guest's handler of #DB have an exception that KVM gave to alcove.
    fn give_debug_exception(&self, vcpu: &VcpuFd, dr6: u64) -> Result<(), Unrecoverable> {
        let mut state = StateCache::new(vcpu, &self.ram, &self.traits);
        let exception = Exception { vector: 1, error_code: None, payload: Some(dr6) };
        state.inject(exception).map_err(|e| Unrecoverable::kvm("inject an exception", e))
    }

    fn complete(&mut self, vcpu: &mut VcpuFd, bytes: Instruction) -> Result<(), Unrecoverable> {
        let mut state = StateCache::new(vcpu, &self.ram, &self.traits);
        match assist::complete(&mut state, bytes.as_slice()) {
            Outcome::Completed => state.store(),
            Outcome::Inject(exception) => state.inject(exception),
            Outcome::Unsupported(why) => {
                let bytes = state.instruction(bytes);
                return Err(Unrecoverable::at(why, bytes));
            }
            Outcome::Failed(error) => {
                return Err(Unrecoverable::at(format!("the host failed it: {error}"), bytes));
            }
        }
        .map_err(|e| Unrecoverable::kvm("set registers", e))
    }
}
