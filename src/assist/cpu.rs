//! What the assist asks of a vCPU: registers, memory as the guest sees it, and the FPU state.

use std::io;

/// RFLAGS bits (SDM vol. 1 §3.4.3, vol. 3 §2.3).
pub mod rflags {
    /// Carry.
    pub const CF: u64 = 1 << 0;
    /// Parity.
    pub const PF: u64 = 1 << 2;
    /// Auxiliary carry.
    pub const AF: u64 = 1 << 4;
    /// Zero.
    pub const ZF: u64 = 1 << 6;
    /// Sign.
    pub const SF: u64 = 1 << 7;
    /// Trap: single step.
    pub const TF: u64 = 1 << 8;
    /// Overflow.
    pub const OF: u64 = 1 << 11;
    /// Resume: instruction breakpoints are ignored for one instruction.
    pub const RF: u64 = 1 << 16;
    /// Virtual-8086 mode.
    pub const VM: u64 = 1 << 17;
    /// Alignment check; with CR4.SMAP, access to user pages.
    pub const AC: u64 = 1 << 18;
}

/// CR0 bits (SDM vol. 3 §2.5).
pub mod cr0 {
    /// Protection enable.
    pub const PE: u64 = 1 << 0;
    /// Monitor coprocessor: WAIT heeds TS.
    pub const MP: u64 = 1 << 1;
    /// Emulation: no x87.
    pub const EM: u64 = 1 << 2;
    /// Task switched.
    pub const TS: u64 = 1 << 3;
    /// Numeric error: x87 errors raise #MF.
    pub const NE: u64 = 1 << 5;
    /// Write protect: ring 0 heeds read-only pages.
    pub const WP: u64 = 1 << 16;
    /// Paging.
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits (SDM vol. 3 §2.5).
pub mod cr4 {
    /// Page size extension: 4 MiB pages in 32-bit paging.
    pub const PSE: u64 = 1 << 4;
    /// Physical address extension.
    pub const PAE: u64 = 1 << 5;
    /// FXSAVE, FXRSTOR and SSE are enabled.
    pub const OSFXSR: u64 = 1 << 9;
    /// Five-level paging.
    pub const LA57: u64 = 1 << 12;
    /// RDFSBASE and its family are enabled.
    pub const FSGSBASE: u64 = 1 << 16;
    /// Process-context identifiers.
    pub const PCIDE: u64 = 1 << 17;
    /// XSAVE and its family are enabled.
    pub const OSXSAVE: u64 = 1 << 18;
    /// Supervisor-mode execution prevention.
    pub const SMEP: u64 = 1 << 20;
    /// Supervisor-mode access prevention.
    pub const SMAP: u64 = 1 << 21;
}

/// Model-specific registers that the assist reads or writes (SDM vol. 4).
pub mod msr {
    /// Supervisor state components that XSAVES handles.
    pub const IA32_XSS: u32 = 0xDA0;
    /// The base that SWAPGS puts into GS.
    pub const IA32_KERNEL_GS_BASE: u32 = 0xC000_0102;
    /// What RDPID returns.
    pub const IA32_TSC_AUX: u32 = 0xC000_0103;
}

/// The registers that nearly every instruction needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// General registers in encoding order: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// Offset in the code segment of the instruction to execute.
    pub rip: u64,
    /// The flags.
    pub rflags: u64,
}

/// Segment registers, in encoding order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    /// ES.
    Es,
    /// CS.
    Cs,
    /// SS.
    Ss,
    /// DS.
    Ds,
    /// FS.
    Fs,
    /// GS.
    Gs,
}

/// The code size that the processor is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeSize {
    /// Real mode, virtual-8086 mode, or CS.D = 0.
    Bits16,
    /// CS.D = 1, CS.L = 0.
    Bits32,
    /// EFER.LMA = 1 and CS.L = 1.
    Bits64,
}

impl CodeSize {
    /// 16, 32 or 64.
    pub fn bits(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }

    /// The bits of an instruction pointer that count.
    pub fn mask(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }
}

/// An exception for the guest (SDM vol. 3 §6.15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// 0 to 31.
    pub vector: u8,
    /// The error code that is pushed, where the vector has one and the processor is not in real
    /// mode.
    pub error_code: Option<u32>,
    /// For #PF the linear address that goes to CR2, for #DB the DR6 bits to set. The same as
    /// the exception payload of KVM_CAP_EXCEPTION_PAYLOAD.
    pub payload: Option<u64>,
}

impl Exception {
    /// DR6.BS: single step.
    const DR6_BS: u64 = 1 << 14;

    const fn plain(vector: u8) -> Self {
        Self { vector, error_code: None, payload: None }
    }

    const fn with_code(vector: u8, error_code: u32) -> Self {
        Self { vector, error_code: Some(error_code), payload: None }
    }

    /// #DB after an instruction that ran with RFLAGS.TF set.
    pub const fn single_step() -> Self {
        Self { vector: 1, error_code: None, payload: Some(Self::DR6_BS) }
    }

    /// #DB by INT1.
    pub const fn debug() -> Self {
        Self { vector: 1, error_code: None, payload: Some(0) }
    }

    /// #BP.
    pub const fn breakpoint() -> Self {
        Self::plain(3)
    }

    /// #UD.
    pub const fn invalid_opcode() -> Self {
        Self::plain(6)
    }

    /// #NM.
    pub const fn device_not_available() -> Self {
        Self::plain(7)
    }

    /// #SS with error code 0.
    pub const fn stack_fault() -> Self {
        Self::with_code(12, 0)
    }

    /// #GP with error code 0.
    pub const fn general_protection() -> Self {
        Self::with_code(13, 0)
    }

    /// #PF at the linear address `address`.
    pub const fn page_fault(address: u64, error_code: u32) -> Self {
        Self { vector: 14, error_code: Some(error_code), payload: Some(address) }
    }

    /// #MF.
    pub const fn x87_error() -> Self {
        Self::plain(16)
    }
}

/// Why an instruction cannot be completed.
#[derive(Debug)]
pub enum Stop {
    /// The guest takes an exception instead.
    Exception(Exception),
    /// The assist, or its owner, does not know how; the text says what.
    Unsupported(&'static str),
    /// A call to the host failed.
    Host(io::Error),
}

impl From<Exception> for Stop {
    fn from(exception: Exception) -> Self {
        Self::Exception(exception)
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

/// One extended state component, as CPUID leaf 0DH, sub-leaf `i` describes it (SDM vol. 1 §13.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Component {
    /// Bytes the component takes (EAX).
    pub size: u32,
    /// Offset in the standard format (EBX); 0 for supervisor components.
    pub offset: u32,
    /// The component belongs to IA32_XSS, not XCR0 (ECX bit 0).
    pub supervisor: bool,
    /// In the compacted format the component starts at a multiple of 64 (ECX bit 1).
    pub aligned: bool,
}

impl Component {
    /// The component that a sub-leaf of CPUID leaf 0DH describes; `None` when there is none.
    pub fn from_cpuid(eax: u32, ebx: u32, ecx: u32) -> Option<Self> {
        (eax != 0).then_some(Self {
            size: eax,
            offset: ebx,
            supervisor: ecx & 1 != 0,
            aligned: ecx & 2 != 0,
        })
    }
}

/// What INVPCID invalidates (SDM vol. 2, INVPCID).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalidation {
    /// Type 0: the translations of one linear address in one PCID.
    Address {
        /// The address.
        linear: u64,
        /// The process context, 0 to 4095.
        pcid: u16,
    },
    /// Type 1: the translations of one PCID, global ones excepted.
    Context {
        /// The process context, 0 to 4095.
        pcid: u16,
    },
    /// Type 2: all translations, global ones included.
    AllWithGlobals,
    /// Type 3: all translations but global ones.
    All,
}

/// A vCPU that has stopped at an instruction which KVM refused.
///
/// Every getter may cost an ioctl, so the assist asks only for what the instruction needs; the
/// owner is expected to cache within one instruction, and [`Cpu::xstate_component`] for good (it
/// is asked a dozen times by one XSAVE). Each method may stop the completion with [`Stop::Host`] when a call
/// to the host fails. The assist changes nothing before the last check that can raise an
/// exception, with one exception: the XSAVE and FXSAVE families may have written part of their
/// area when a later page faults, as on real processors.
pub trait Cpu {
    /// The general registers. What the assist changes must be in force when the guest goes on.
    fn registers(&mut self) -> Result<&mut Registers, Stop>;

    /// The code size of the current code segment.
    fn code_size(&mut self) -> Result<CodeSize, Stop>;

    /// The current privilege level, 0 to 3.
    fn cpl(&mut self) -> Result<u8, Stop>;

    /// CR0.
    fn cr0(&mut self) -> Result<u64, Stop>;

    /// CR4.
    fn cr4(&mut self) -> Result<u64, Stop>;

    /// XCR0.
    fn xcr0(&mut self) -> Result<u64, Stop>;

    /// Sets XCR0 to a value that [`Cpu::xstate_component`] says the vCPU has and that keeps the
    /// rules of SDM vol. 1 §13.3.
    fn set_xcr0(&mut self, value: u64) -> Result<(), Stop>;

    /// Base of a segment. Not asked for ES, CS, SS and DS in 64-bit code, where it is 0.
    fn segment_base(&mut self, segment: Segment) -> Result<u64, Stop>;

    /// Sets the base of FS or GS to a canonical address.
    fn set_segment_base(&mut self, segment: Segment, base: u64) -> Result<(), Stop>;

    /// Base and limit (inclusive, in bytes) of the global descriptor table.
    fn global_descriptor_table(&mut self) -> Result<(u64, u16), Stop>;

    /// Base and limit (inclusive, in bytes) of the local descriptor table; `None` when LDTR holds
    /// a null selector.
    fn local_descriptor_table(&mut self) -> Result<Option<(u64, u32)>, Stop>;

    /// A model-specific register, one of [`msr`]. A vCPU that lacks it stops with #GP.
    fn read_msr(&mut self, index: u32) -> Result<u64, Stop>;

    /// Sets a model-specific register, one of [`msr`].
    fn write_msr(&mut self, index: u32, value: u64) -> Result<(), Stop>;

    /// Reads the guest's memory at a linear address with the rights of the current privilege
    /// level and RFLAGS.AC, across pages if need be. Stops with #PF where the guest's tables say so.
    fn read(&mut self, linear: u64, bytes: &mut [u8]) -> Result<(), Stop>;

    /// Like [`Cpu::read`], with supervisor rights whatever the privilege level is and without
    /// SMAP: for descriptor tables.
    fn read_as_system(&mut self, linear: u64, bytes: &mut [u8]) -> Result<(), Stop>;

    /// Like [`Cpu::read`], with the rights of an instruction fetch.
    fn fetch(&mut self, linear: u64, bytes: &mut [u8]) -> Result<(), Stop>;

    /// Writes the guest's memory at a linear address: all of it, or none when a page faults.
    fn write(&mut self, linear: u64, bytes: &[u8]) -> Result<(), Stop>;

    /// Compares the 16 bytes at `linear`, a multiple of 16, with `expected` and, when they are
    /// equal, replaces them with `new`, in one atomic step. Returns what was there. The page must
    /// be writable even when they are not equal.
    fn compare_exchange_16(&mut self, linear: u64, expected: u128, new: u128)
    -> Result<u128, Stop>;

    /// Fills `bytes` with random numbers fit for keys.
    fn entropy(&mut self, bytes: &mut [u8]) -> Result<(), Stop>;

    /// Invalidates cached translations.
    fn invalidate(&mut self, what: Invalidation) -> Result<(), Stop>;

    /// How component `index`, 2 to 62, is laid out in the vCPU's XSAVE areas; `None` when the
    /// vCPU has no such component.
    fn xstate_component(&mut self, index: u32) -> Result<Option<Component>, Stop>;

    /// The vCPU's FPU state: an XSAVE area in the standard format as KVM_GET_XSAVE2 fills it, at
    /// least 576 bytes.
    fn fpu(&mut self) -> Result<&[u8], Stop>;

    /// The same for change; KVM_SET_XSAVE must load it before the guest goes on. No component
    /// is set in XSTATE_BV that was not a valid component before.
    fn fpu_mut(&mut self) -> Result<&mut [u8], Stop>;
}
