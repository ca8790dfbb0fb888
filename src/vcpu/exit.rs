//! What KVM_RUN returned with, read out of the shared kvm_run page.
#![expect(unsafe_code, reason = "kvm_run is a C union, tagged by exit_reason")]

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR,
    KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_X86_WRMSR,
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, kvm_run,
};
use kvm_ioctls::VcpuFd;

/// The longest x86 instruction, in bytes (Intel SDM vol. 2A, 2.3.11).
pub const MAX_INSTRUCTION_BYTES: usize = 15;

/// An exit from the guest (Documentation/virt/kvm/api.rst, 5. "The kvm_run structure").
#[derive(Debug)]
pub enum Exit<'a> {
    /// The guest reads a port: every element of `width` bytes in `data` is to be filled.
    PortRead {
        /// The port.
        port: u16,
        /// Bytes an element.
        width: usize,
        /// As many elements as the instruction repeats.
        data: &'a mut [u8],
    },
    /// The guest writes a port.
    PortWrite {
        /// The port.
        port: u16,
        /// Bytes an element.
        width: usize,
        /// As many elements as the instruction repeats.
        data: &'a [u8],
    },
    /// The guest reads memory that no slot backs.
    MmioRead {
        /// Guest physical address.
        address: u64,
        /// To be filled.
        data: &'a mut [u8],
    },
    /// The guest writes memory that no slot backs.
    MmioWrite {
        /// Guest physical address.
        address: u64,
        /// What it wrote.
        data: &'a [u8],
    },
    /// The instruction emulator refused an instruction; `bytes` starts with it where KVM knew it.
    EmulationFailure {
        /// Up to 15 bytes from RIP on.
        bytes: Instruction,
    },
    /// KVM gave up for another reason (`KVM_INTERNAL_ERROR_*`).
    InternalError {
        /// Which reason.
        suberror: u32,
    },
    /// #DB while KVM_SET_GUEST_DEBUG is in force.
    Debug {
        /// Its causes, as in DR6.
        dr6: u64,
    },
    /// The guest wrote an MSR that the filter holds back.
    MsrWrite {
        /// The MSR.
        index: u32,
        /// The value.
        data: u64,
    },
    /// A triple fault.
    Shutdown,
    /// The processor refused to enter the guest.
    FailEntry {
        /// Its reason.
        reason: u64,
    },
    /// The guest halted where the kernel does not wait for it.
    Halt,
    /// A signal came in.
    Interrupted,
    /// Any other exit reason.
    Unknown(u32),
}

/// Instruction bytes as KVM reports them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Instruction {
    bytes: [u8; MAX_INSTRUCTION_BYTES],
    len: usize,
}

impl Instruction {
    /// The first 15 of `bytes`.
    pub fn new(bytes: &[u8]) -> Self {
        let mut instruction =
            Self { len: bytes.len().min(MAX_INSTRUCTION_BYTES), ..Self::default() };
        instruction.bytes[..instruction.len].copy_from_slice(&bytes[..instruction.len]);
        instruction
    }

    /// The bytes, possibly none.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// Decodes the exit that `vcpu` has just returned with.
pub fn decode(vcpu: &mut VcpuFd) -> Exit<'_> {
    let run = vcpu.get_kvm_run();
    match run.exit_reason {
        KVM_EXIT_IO => port_access(run),
        KVM_EXIT_MMIO => mmio_access(run),
        KVM_EXIT_INTERNAL_ERROR => internal_error(run),
        KVM_EXIT_DEBUG => {
            // SAFETY: exit_reason says that `debug` is the field in use.
            let debug = unsafe { run.__bindgen_anon_1.debug };
            Exit::Debug { dr6: debug.arch.dr6 }
        }
        KVM_EXIT_X86_WRMSR => {
            // SAFETY: exit_reason says that `msr` is the field in use.
            let msr = unsafe { run.__bindgen_anon_1.msr };
            Exit::MsrWrite { index: msr.index, data: msr.data }
        }
        KVM_EXIT_SHUTDOWN => Exit::Shutdown,
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: exit_reason says that `fail_entry` is the field in use.
            let entry = unsafe { run.__bindgen_anon_1.fail_entry };
            Exit::FailEntry { reason: entry.hardware_entry_failure_reason }
        }
        KVM_EXIT_HLT => Exit::Halt,
        KVM_EXIT_INTR => Exit::Interrupted,
        reason => Exit::Unknown(reason),
    }
}

/// Answers a held-back MSR write: done, or #GP in the guest.
pub fn answer_msr_write(vcpu: &mut VcpuFd, done: bool) {
    let run = vcpu.get_kvm_run();
    if run.exit_reason == KVM_EXIT_X86_WRMSR {
        run.__bindgen_anon_1.msr.error = (!done).into();
    }
}

fn port_access(run: &mut kvm_run) -> Exit<'_> {
    // SAFETY: exit_reason says that `io` is the field in use.
    let io = unsafe { run.__bindgen_anon_1.io };
    let width = usize::from(io.size).max(1);
    let length = width * io.count as usize;
    let base = std::ptr::from_mut(run).cast::<u8>();
    // SAFETY: KVM places the data within the vCPU's mapping, data_offset bytes from its start.
    let start = unsafe { base.add(io.data_offset as usize) };
    // SAFETY: KVM put count elements of size bytes there, and the slice borrows the vCPU, so that
    // neither the mapping nor the data changes while it lives.
    let data = unsafe { std::slice::from_raw_parts_mut(start, length) };
    if u32::from(io.direction) == KVM_EXIT_IO_OUT {
        Exit::PortWrite { port: io.port, width, data }
    } else {
        Exit::PortRead { port: io.port, width, data }
    }
}

fn mmio_access(run: &mut kvm_run) -> Exit<'_> {
    // SAFETY: exit_reason says that `mmio` is the field in use.
    let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
    let length = (mmio.len as usize).min(mmio.data.len());
    let data = &mut mmio.data[..length];
    if mmio.is_write != 0 {
        Exit::MmioWrite { address: mmio.phys_addr, data }
    } else {
        Exit::MmioRead { address: mmio.phys_addr, data }
    }
}

fn internal_error(run: &kvm_run) -> Exit<'_> {
    // SAFETY: exit_reason says that `emulation_failure` or `internal` is in use; both start with
    // the suberror, and the former's other fields are plain integers.
    let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
    if failure.suberror != KVM_INTERNAL_ERROR_EMULATION {
        return Exit::InternalError { suberror: failure.suberror };
    }
    let told = failure.ndata > 0
        && failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
    if !told {
        return Exit::EmulationFailure { bytes: Instruction::default() };
    }
    // SAFETY: the flag says that the instruction's bytes are there.
    let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
    let len = usize::from(instruction.insn_size).min(instruction.insn_bytes.len());
    Exit::EmulationFailure { bytes: Instruction::new(&instruction.insn_bytes[..len]) }
}
