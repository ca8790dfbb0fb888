//! Runs one instruction on the real processor, with chosen registers, flags, FPU state and memory.

#![expect(unsafe_code, reason = "runs assembled code natively")]

use std::io;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, Decoder, DecoderOptions, IcedError, Instruction, RflagsBits};

use super::super::cpu::rflags;
use super::super::{CodeSize, Outcome, Registers, describe};
use super::{Random, State, TESTED, TestCpu, WINDOW_BYTES, fpu_bytes, report};

/// Which components are in use is not compared in the FPU image: the contents are.
const XSTATE_BV: std::ops::Range<usize> = 512..520;
const CODE_BYTES: usize = 4096;
const DATA_BYTES: usize = 3 * 4096;
/// Behind the window nothing may be accessed, so that overruns show.
const GUARD_BYTES: usize = 8192;
const MAPPING_BYTES: usize = CODE_BYTES + DATA_BYTES + WINDOW_BYTES + GUARD_BYTES;

/// Offsets in the data pages.
const GPR_IN: u64 = 0;
const GPR_OUT: u64 = 128;
const FLAGS_IN: u64 = 256;
const FLAGS_OUT: u64 = 264;
const SAVED_STACK: u64 = 272;
const MXCSR_DEFAULT: u64 = 280;
const FPU_IN: u64 = 0x400;
const FPU_OUT: u64 = 0x1400;

/// One instruction, assembled, with the code around it that sets the processor up.
pub(in crate::assist) struct Native {
    mapping: *mut u8,
    /// The instruction alone.
    pub(in crate::assist) bytes: Vec<u8>,
    pub(in crate::assist) instruction: Instruction,
}

/// Where the running instruction is, and where to go when it faults.
static FAULTING: AtomicU64 = AtomicU64::new(0);
static RECOVERY: AtomicU64 = AtomicU64::new(0);
static TRAP: AtomicU64 = AtomicU64::new(0);
/// The native runs of one process take turns: they share the three cells above.
static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());

const NO_TRAP: u64 = u64::MAX;

impl Native {
    /// Assembles what `emit` emits, which must be one instruction. It may use any register but RSP,
    /// and memory in the window, whose address it is given.
    pub(in crate::assist) fn new(
        emit: impl FnOnce(&mut CodeAssembler, u64) -> Result<(), IcedError>,
    ) -> Self {
        install_handlers();
        let mapping = map();
        let code = mapping as u64;
        let data = code + CODE_BYTES as u64;
        let window = data + DATA_BYTES as u64;
        let mut asm = CodeAssembler::new(64).unwrap();
        let cell = |offset: u64| qword_ptr(data + offset);
        let order = [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
        let loaded = || order.iter().enumerate().filter(|(number, _)| *number != 4);
        (|| {
            for register in [rbx, rbp, r12, r13, r14, r15] {
                asm.push(register)?;
            }
            asm.pushfq()?;
            asm.mov(cell(SAVED_STACK), rsp)?;
            asm.mov(eax, TESTED as u32)?;
            asm.xor(edx, edx)?;
            asm.xrstor64(ptr(data + FPU_IN))?;
            asm.push(cell(FLAGS_IN))?;
            asm.popfq()?;
            for (number, register) in loaded() {
                asm.mov(*register, cell(GPR_IN + 8 * number as u64))?;
            }
            Ok::<(), IcedError>(())
        })()
        .unwrap();
        let tested = asm.instructions().len();
        emit(&mut asm, window).unwrap();
        let after = asm.instructions().len();
        assert_eq!(after, tested + 1, "one instruction at a time");
        let mut recovery = 0;
        (|| {
            for (number, register) in loaded() {
                asm.mov(cell(GPR_OUT + 8 * number as u64), *register)?;
            }
            asm.pushfq()?;
            asm.pop(cell(FLAGS_OUT))?;
            recovery = asm.instructions().len();
            asm.mov(rsp, cell(SAVED_STACK))?;
            asm.mov(eax, TESTED as u32)?;
            asm.xor(edx, edx)?;
            asm.xsave64(ptr(data + FPU_OUT))?;
            asm.fninit()?;
            asm.ldmxcsr(dword_ptr(data + MXCSR_DEFAULT))?;
            asm.popfq()?;
            for register in [r15, r14, r13, r12, rbp, rbx] {
                asm.pop(register)?;
            }
            asm.ret()
        })()
        .unwrap();
        let result = asm
            .assemble_options(code, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)
            .unwrap();
        let bytes = result.inner.code_buffer;
        let offsets = result.inner.new_instruction_offsets;
        let start = offsets[tested] as usize;
        let end = offsets[after] as usize;
        let native = Self {
            mapping,
            bytes: bytes[start..end].to_vec(),
            instruction: Decoder::with_ip(
                64,
                &bytes[start..end],
                code + start as u64,
                DecoderOptions::NONE,
            )
            .decode(),
        };
        native.install(&bytes, offsets[recovery]);
        native
    }

    /// The address of the window.
    pub(in crate::assist) fn window(&self) -> u64 {
        self.mapping as u64 + (CODE_BYTES + DATA_BYTES) as u64
    }

    fn install(&self, bytes: &[u8], recovery: u32) {
        assert!(bytes.len() <= CODE_BYTES - 8);
        // SAFETY: the mapping is CODE_BYTES long and more, writable, and nobody else knows of it.
        unsafe { self.mapping.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        let last = u64::from(recovery).to_le_bytes();
        // SAFETY: the last 8 bytes of the code page, which the code does not reach.
        let end = unsafe { self.mapping.add(CODE_BYTES - 8) };
        // SAFETY: as above.
        unsafe { end.copy_from_nonoverlapping(last.as_ptr(), 8) };
        // SAFETY: the first page of our own mapping.
        let done = unsafe {
            libc::mprotect(self.mapping.cast(), CODE_BYTES, libc::PROT_READ | libc::PROT_EXEC)
        };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
    }

    fn recovery(&self) -> u64 {
        let mut bytes = [0; 8];
        // SAFETY: the last 8 bytes of the code page.
        let end = unsafe { self.mapping.add(CODE_BYTES - 8) };
        // SAFETY: as above; it is readable.
        unsafe { end.copy_to_nonoverlapping(bytes.as_mut_ptr(), 8) };
        self.mapping as u64 + u64::from_le_bytes(bytes)
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) {
        assert!(offset as usize + bytes.len() <= DATA_BYTES + WINDOW_BYTES);
        // SAFETY: the offset is within the mapping.
        let start = unsafe { self.mapping.add(CODE_BYTES + offset as usize) };
        // SAFETY: checked above; data and window are writable and used by no one else now.
        unsafe { start.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    fn get(&self, offset: u64, bytes: &mut [u8]) {
        assert!(offset as usize + bytes.len() <= DATA_BYTES + WINDOW_BYTES);
        // SAFETY: the offset is within the mapping.
        let start = unsafe { self.mapping.add(CODE_BYTES + offset as usize) };
        // SAFETY: checked above.
        unsafe { start.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Runs the instruction; the vector of the exception when it raises one. RSP and RIP of the
    /// result are those of `state`.
    pub(in crate::assist) fn run(&mut self, state: &State) -> Result<State, u8> {
        let turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for (number, value) in state.registers.gpr.iter().enumerate() {
            self.put(GPR_IN + 8 * number as u64, &value.to_le_bytes());
        }
        self.put(FLAGS_IN, &(state.registers.rflags | 0x202).to_le_bytes());
        self.put(MXCSR_DEFAULT, &0x1F80u32.to_le_bytes());
        self.put(FPU_IN, &state.fpu);
        self.put(FPU_OUT, &vec![0; fpu_bytes()]);
        self.put(DATA_BYTES as u64, &state.window);
        FAULTING.store(self.instruction.ip(), Ordering::SeqCst);
        RECOVERY.store(self.recovery(), Ordering::SeqCst);
        TRAP.store(NO_TRAP, Ordering::SeqCst);
        // SAFETY: the code page holds a function that keeps the C calling convention.
        let function: extern "sysv64" fn() = unsafe { std::mem::transmute(self.mapping) };
        function();
        let trap = TRAP.load(Ordering::SeqCst);
        drop(turn);
        if trap != NO_TRAP {
            return Err(trap as u8);
        }
        let mut result = state.clone();
        for (number, value) in result.registers.gpr.iter_mut().enumerate() {
            if number != 4 {
                *value = self.quad(GPR_OUT + 8 * number as u64);
            }
        }
        result.registers.rflags = self.quad(FLAGS_OUT);
        self.get(FPU_OUT, &mut result.fpu);
        self.get(DATA_BYTES as u64, &mut result.window);
        Ok(result)
    }

    fn quad(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.get(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nothing refers to any more.
        unsafe { libc::munmap(self.mapping.cast(), MAPPING_BYTES) };
    }
}

/// Maps code, data and window below 2 GiB, where absolute addresses fit 32 bits.
fn map() -> *mut u8 {
    // SAFETY: a new mapping wherever the kernel likes.
    let mapping = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            MAPPING_BYTES,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
            -1,
            0,
        )
    };
    assert_ne!(mapping, libc::MAP_FAILED, "{}", io::Error::last_os_error());
    let mapping: *mut u8 = mapping.cast();
    // SAFETY: the guard is the last part of the mapping.
    let guard = unsafe { mapping.add(MAPPING_BYTES - GUARD_BYTES) };
    // SAFETY: our own pages, not in use yet.
    let done = unsafe { libc::mprotect(guard.cast(), GUARD_BYTES, libc::PROT_NONE) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    mapping
}

fn install_handlers() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        for signal in [libc::SIGSEGV, libc::SIGILL, libc::SIGFPE, libc::SIGBUS, libc::SIGTRAP] {
            let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = recover;
            // SAFETY: zero is a valid sigaction.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO;
            // SAFETY: the action is complete and the handler lives for ever.
            let done = unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) };
            assert_eq!(done, 0, "{}", io::Error::last_os_error());
        }
    });
}

/// Skips an instruction that faulted; any other fault ends the process.
extern "C" fn recover(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let context: *mut libc::ucontext_t = context.cast();
    // SAFETY: the kernel passes a valid context, ours until we return.
    let registers = unsafe { &mut (*context).uc_mcontext.gregs };
    let rip = registers[libc::REG_RIP as usize] as u64;
    let trap = registers[libc::REG_TRAPNO as usize] as u64;
    // INT3 and INT1 report the address behind them.
    let start = FAULTING.load(Ordering::SeqCst);
    if rip == start || (signal == libc::SIGTRAP && rip == start + 1) {
        TRAP.store(trap, Ordering::SeqCst);
        registers[libc::REG_RIP as usize] = RECOVERY.load(Ordering::SeqCst) as i64;
        return;
    }
    // SAFETY: restoring the default action is always allowed.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

/// Compares an instruction here with the same on the real processor.
pub(in crate::assist) struct Case {
    pub(in crate::assist) native: Native,
    /// Loads an FPU image and saves it again, which KVM does on the way to a guest and back.
    reload: Native,
    /// Bits of RFLAGS that are compared.
    defined: u64,
    /// Bytes of the window and the FPU image that are not compared.
    pub(in crate::assist) ignored_window: Vec<std::ops::Range<usize>>,
    pub(in crate::assist) ignored_fpu: Vec<std::ops::Range<usize>>,
    pub(in crate::assist) xcr0: u64,
    /// The descriptor table that the assist is given.
    pub(in crate::assist) gdt: Vec<u8>,
}

impl Case {
    /// For the instruction that `emit` emits, see [`Native::new`].
    pub(in crate::assist) fn new(
        emit: impl FnOnce(&mut CodeAssembler, u64) -> Result<(), IcedError>,
    ) -> Self {
        let native = Native::new(emit);
        let undefined = native.instruction.rflags_undefined();
        let all = [
            (RflagsBits::CF, rflags::CF),
            (RflagsBits::PF, rflags::PF),
            (RflagsBits::AF, rflags::AF),
            (RflagsBits::ZF, rflags::ZF),
            (RflagsBits::SF, rflags::SF),
            (RflagsBits::OF, rflags::OF),
            (RflagsBits::AC, rflags::AC),
        ];
        let defined = all.iter().filter(|(bit, _)| undefined & bit == 0).map(|(_, flag)| flag);
        let defined = defined.fold(0, |mask, flag| mask | flag);
        let xcr0 = host_xcr0();
        let reload = Native::new(|asm, _| asm.nop());
        Self {
            native,
            reload,
            defined,
            ignored_window: Vec::new(),
            ignored_fpu: vec![XSTATE_BV],
            xcr0,
            gdt: Vec::new(),
        }
    }

    /// Whether the host's processor knows the instruction; says so if not.
    pub(in crate::assist) fn is_known(&mut self) -> bool {
        const INVALID_OPCODE: u8 = 6;
        let state = State::random(&mut Random::seeded(), self.xcr0);
        let known = !matches!(self.native.run(&state), Err(INVALID_OPCODE));
        if !known {
            report(&format!("not tested, the host lacks it: {}", self.name()));
        }
        known
    }

    fn name(&self) -> String {
        describe(&self.native.bytes, self.native.instruction.ip(), CodeSize::Bits64)
    }

    /// An FPU image as the processor presents it after loading it.
    fn reloaded(&mut self, state: &State) -> Vec<u8> {
        match self.reload.run(state) {
            Ok(result) => result.fpu,
            Err(vector) => panic!("an FPU image cannot be loaded: exception {vector}"),
        }
    }

    /// Runs both from `state` and panics where they differ. Returns the common result, or the
    /// vector of the common exception. Which components are in use may change at any time, when
    /// the thread loses the processor, so a difference counts only when it stays.
    pub(in crate::assist) fn check(&mut self, state: &State) -> Result<State, u8> {
        const ATTEMPTS: u32 = 4;
        let mut difference = String::new();
        for _ in 0..ATTEMPTS {
            match self.attempt(state) {
                Ok(result) => return result,
                Err(text) => difference = text,
            }
        }
        let name = self.name();
        panic!("{name}: {difference}\nfrom {:x?}", state.registers);
    }

    fn attempt(&mut self, state: &State) -> Result<Result<State, u8>, String> {
        let state = &State { fpu: self.reloaded(state), ..state.clone() };
        let expected = self.native.run(state);
        let mut cpu = TestCpu::new(&self.native.bytes);
        cpu.base = self.native.window();
        cpu.cpl = 3;
        cpu.xcr0 = self.xcr0;
        cpu.gdt = self.gdt.clone();
        cpu.state = state.clone();
        cpu.state.registers.rip = self.native.instruction.ip();
        cpu.state.registers.rflags |= 0x202;
        let outcome = cpu.complete();
        match (expected, outcome) {
            (Ok(mut expected), Outcome::Completed) => {
                expected.registers.rip = self.native.instruction.next_ip();
                cpu.state.fpu = self.reloaded(&cpu.state);
                self.compare(&expected, &cpu.state)?;
                Ok(Ok(expected))
            }
            (Err(vector), Outcome::Inject(exception)) if vector == exception.vector => {
                Ok(Err(vector))
            }
            (expected, outcome) => {
                let expected = expected.map(|_| "completes");
                Err(format!("the processor {expected:?}, the assist {outcome:?}"))
            }
        }
    }

    fn compare(&self, expected: &State, found: &State) -> Result<(), String> {
        let mask = |registers: &Registers| Registers {
            rflags: registers.rflags & self.defined,
            ..registers.clone()
        };
        let (expected_registers, found_registers) =
            (mask(&expected.registers), mask(&found.registers));
        if expected_registers != found_registers {
            return Err(format!("found {found_registers:x?}\nexpected {expected_registers:x?}"));
        }
        differ("memory", &expected.window, &found.window, &self.ignored_window)?;
        differ("FPU", &expected.fpu, &found.fpu, &self.ignored_fpu)
    }
}

/// The bytes that differ and are not ignored.
fn differ(
    what: &str,
    expected: &[u8],
    found: &[u8],
    ignored: &[std::ops::Range<usize>],
) -> Result<(), String> {
    let different: Vec<String> = expected
        .iter()
        .zip(found)
        .enumerate()
        .filter(|(place, (expected, found))| {
            expected != found && !ignored.iter().any(|range| range.contains(place))
        })
        .map(|(place, (expected, found))| format!("{place}: {found:02x} not {expected:02x}"))
        .collect();
    let shown = different.get(..24).unwrap_or(&different).join(", ");
    match different.len() {
        0 => Ok(()),
        count => Err(format!("{count} bytes of {what} differ: {shown}")),
    }
}

/// XCR0 of the host.
pub(in crate::assist) fn host_xcr0() -> u64 {
    assert!(is_x86_feature_detected!("xsave"), "the tests need a processor with XSAVE");
    // SAFETY: XSAVE is there and enabled, as asserted.
    unsafe { std::arch::x86_64::_xgetbv(0) }
}
