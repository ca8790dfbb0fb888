//! Guests of a few instructions, which show what a machine does without Linux in the way.

use std::io::Read;
use std::process::Command;

use alcove::bench::guest;
pub use alcove::bench::guest::LOAD_ADDRESS;
use iced_x86::code_asm::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::NamedTempFile;

use crate::alcove::{Finished, alcove, finish, wait};

/// A page of RAM that a guest may use as it likes.
const SCRATCH: u64 = 0x30_0000;

const COM1: u32 = 0x3f8;
const DEBUG_EXIT: u32 = 0xf4;
const I8042_COMMAND: u32 = 0x64;
const PVPANIC: u32 = 0x505;

/// An ELF kernel that starts, in 64-bit mode, with `code`.
pub fn kernel(code: &mut CodeAssembler) -> NamedTempFile {
    let code = code.assemble(LOAD_ADDRESS).unwrap();
    elf(&code)
}

fn elf(code: &[u8]) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(file.path(), guest::elf(code)).unwrap();
    file
}

fn assembler() -> CodeAssembler {
    CodeAssembler::new(64).unwrap()
}

/// `alcove run` of `kernel` in little memory with `arguments`.
pub fn command(kernel: &NamedTempFile, arguments: &[&str]) -> Command {
    let mut command = alcove(["run", "--memory", "16M"]);
    command.arg("--kernel").arg(kernel.path()).args(arguments);
    command
}

fn run(code: &mut CodeAssembler) -> Finished {
    let kernel = kernel(code);
    finish(command(&kernel, &[]))
}

/// Ends the guest with the status in `al`.
fn exit(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dx, DEBUG_EXIT)?;
    a.out(dx, al)
}

/// Never returns, without an exit from the guest.
pub fn spin(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut forever = a.create_label();
    a.set_label(&mut forever)?;
    a.pause()?;
    a.jmp(forever)
}

pub fn the_debug_exit_port_gives_the_status() {
    for status in [0, 7, 255] {
        let mut a = assembler();
        a.mov(al, status).unwrap();
        exit(&mut a).unwrap();
        spin(&mut a).unwrap();

        run(&mut a).expect(status);
    }
}

pub fn a_reset_by_the_i8042_ends_the_guest() {
    const PULSE_RESET: i32 = 0xfe;
    let mut a = assembler();
    a.mov(al, PULSE_RESET).unwrap();
    a.mov(dx, I8042_COMMAND).unwrap();
    a.out(dx, al).unwrap();
    spin(&mut a).unwrap();

    run(&mut a).expect(0);
}

pub fn pvpanic_is_a_panic() {
    const PANICKED: i32 = 1;
    let mut a = assembler();
    a.mov(al, PANICKED).unwrap();
    a.mov(dx, PVPANIC).unwrap();
    a.out(dx, al).unwrap();
    spin(&mut a).unwrap();

    let ended = run(&mut a).expect(126);

    assert!(ended.stderr.contains("the guest's kernel panicked"), "{}", ended.stderr);
}

pub fn a_triple_fault_is_a_crash_with_registers() {
    let mut a = assembler();
    a.mov(rbx, 0x1122_3344_5566_7788u64).unwrap();
    a.ud2().unwrap();

    let ended = run(&mut a).expect(127);

    assert!(ended.stderr.contains("the guest crashed: triple fault"), "{}", ended.stderr);
    let kept = ended.stderr.contains("rbx 1122334455667788");
    assert!(kept || ended.stderr.contains("AMD-V resets the registers"), "{}", ended.stderr);
}

/// The interpreter of guest kernels refuses FSIN, and the assist leaves it be.
pub fn an_instruction_that_nobody_completes_is_named() {
    const CR4_OSFXSR: i32 = 1 << 9;
    let mut a = assembler();
    a.mov(rax, cr4).unwrap();
    a.or(rax, CR4_OSFXSR).unwrap();
    a.mov(cr4, rax).unwrap();
    a.fsin().unwrap();

    let ended = run(&mut a).expect(127);

    assert!(ended.stderr.contains("d9 fe"), "{}", ended.stderr);
    assert!(ended.stderr.contains("fsin"), "{}", ended.stderr);
    assert!(ended.stderr.contains("  rip 0000000000200"), "{}", ended.stderr);
}

/// Counts bits by an instruction that the interpreter of guest kernels refuses.
fn counts_bits() -> NamedTempFile {
    let mut a = assembler();
    a.mov(ecx, 0b1011_0111).unwrap();
    a.popcnt(eax, ecx).unwrap();
    exit(&mut a).unwrap();
    spin(&mut a).unwrap();
    kernel(&mut a)
}

pub fn the_assist_can_be_left_out() {
    let kernel = counts_bits();

    let ended = finish(command(&kernel, &["--assist", "off"])).expect(127);

    assert!(ended.stderr.contains("--assist on"), "{}", ended.stderr);
    assert!(ended.stderr.contains("popcnt"), "{}", ended.stderr);
    finish(command(&kernel, &[])).expect(6);
}

pub fn the_assist_does_not_harm_where_it_is_not_needed() {
    finish(command(&counts_bits(), &["--assist", "on"])).expect(6);
}

pub fn a_guest_that_spins_is_ended_by_the_time_limit() {
    let mut a = assembler();
    spin(&mut a).unwrap();
    let kernel = kernel(&mut a);

    let ended = finish(command(&kernel, &["--timeout", "2s"])).expect(124);

    assert!(ended.stderr.contains("--timeout"), "{}", ended.stderr);
}

pub fn signals_end_alcove_with_their_number() {
    for signal in [Signal::SIGINT, Signal::SIGHUP] {
        let mut a = assembler();
        a.mov(al, u32::from(b'!')).unwrap();
        a.mov(dx, COM1).unwrap();
        a.out(dx, al).unwrap();
        spin(&mut a).unwrap();
        let kernel = kernel(&mut a);
        let mut child = command(&kernel, &[]).spawn().unwrap();
        let id = Pid::from_raw(child.id() as i32);
        let mut said = [0];
        child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();

        kill(id, signal).unwrap();

        wait(child).expect(128 + signal as i32);
        assert_eq!(said, *b"!");
    }
}

/// Reads of ports and memory where nothing is give ones, and their log is cut short.
pub fn unknown_addresses_read_as_ones() {
    const UNKNOWN_PORT: u32 = 0x1234;
    /// In the hole below 4 GiB, which the boot page tables map for a guest that asks high enough.
    const ACCESSES: u32 = 1000;
    let mut a = assembler();
    let (mut again, mut wrong) = (a.create_label(), a.create_label());
    a.mov(ecx, ACCESSES).unwrap();
    a.mov(rbx, 0x3000_0000u64).unwrap(); // past 16 MiB of RAM, within the first GiB
    a.set_label(&mut again).unwrap();
    a.mov(dx, UNKNOWN_PORT).unwrap();
    a.in_(eax, dx).unwrap();
    a.cmp(eax, -1).unwrap();
    a.jne(wrong).unwrap();
    a.mov(rax, qword_ptr(rbx)).unwrap();
    a.cmp(rax, -1).unwrap();
    a.jne(wrong).unwrap();
    a.mov(qword_ptr(rbx), rcx).unwrap();
    a.dec(ecx).unwrap();
    a.jnz(again).unwrap();
    a.mov(al, 42).unwrap();
    exit(&mut a).unwrap();
    a.set_label(&mut wrong).unwrap();
    a.mov(al, 1).unwrap();
    exit(&mut a).unwrap();
    spin(&mut a).unwrap();

    let kernel = kernel(&mut a);
    let mut command = command(&kernel, &[]);
    command.args(["--log", "info"]);

    let ended = finish(command).expect(42);

    let lines = ended.stderr.lines().count();
    assert!((1..200).contains(&lines), "{lines} lines for {ACCESSES} accesses");
    assert!(ended.stderr.contains("0x1234"), "{}", ended.stderr);
    assert!(ended.stderr.contains("0x30000000"), "{}", ended.stderr);
}

pub fn string_output_reaches_the_port_element_by_element() {
    let text = b"all of it, in order\n";
    let mut a = assembler();
    let mut data = a.create_label();
    a.lea(rsi, ptr(data)).unwrap();
    a.mov(ecx, text.len() as u32).unwrap();
    a.mov(dx, COM1).unwrap();
    a.cld().unwrap();
    a.rep().outsb().unwrap();
    a.mov(al, 3).unwrap();
    exit(&mut a).unwrap();
    spin(&mut a).unwrap();
    a.set_label(&mut data).unwrap();
    a.db(text).unwrap();

    let ended = run(&mut a).expect(3);

    assert_eq!(ended.stdout.as_bytes(), text);
}

/// With an interrupt table in place, a hypercall returns that it does not exist, whether KVM serves
/// it or the assist does.
pub fn a_hypercall_does_not_hang_the_guest() {
    const HYPERCALL: u64 = 0x7fff_0000;
    const KVM_ENOSYS: i32 = 1000;
    const BOOT_CS: u64 = 0x10;
    const GATE_PRESENT_INTERRUPT: u64 = 0x8e00;
    const INVALID_OPCODE: u64 = 6;
    const STACK_TOP: u64 = SCRATCH + 0x2000;
    for intel in [false, true] {
        let mut a = assembler();
        let (mut handler, mut wrong) = (a.create_label(), a.create_label());
        a.mov(rsp, STACK_TOP).unwrap();
        // A gate for #UD, so that one that reaches the guest shows as a wrong result.
        a.lea(rax, ptr(handler)).unwrap();
        a.mov(rbx, SCRATCH + INVALID_OPCODE * 16).unwrap();
        a.mov(word_ptr(rbx), ax).unwrap();
        a.mov(word_ptr(rbx + 2), BOOT_CS as i32).unwrap();
        a.mov(word_ptr(rbx + 4), GATE_PRESENT_INTERRUPT as i32).unwrap();
        a.shr(rax, 16).unwrap();
        a.mov(word_ptr(rbx + 6), ax).unwrap();
        a.mov(qword_ptr(rbx + 8), 0).unwrap();
        a.sub(rsp, 16).unwrap();
        a.mov(word_ptr(rsp), 0xfff).unwrap();
        a.mov(rax, SCRATCH).unwrap();
        a.mov(qword_ptr(rsp + 2), rax).unwrap();
        a.lidt(ptr(rsp)).unwrap();
        a.add(rsp, 16).unwrap();
        // An exit after LIDT, at which alcove sees the table.
        a.mov(dx, 0x80).unwrap();
        a.out(dx, al).unwrap();
        a.mov(rax, HYPERCALL).unwrap();
        if intel { a.vmcall() } else { a.vmmcall() }.unwrap();
        a.cmp(rax, -KVM_ENOSYS).unwrap();
        a.jne(wrong).unwrap();
        a.mov(al, 42).unwrap();
        exit(&mut a).unwrap();
        a.set_label(&mut wrong).unwrap();
        a.mov(al, 1).unwrap();
        exit(&mut a).unwrap();
        a.set_label(&mut handler).unwrap();
        a.mov(al, 2).unwrap();
        exit(&mut a).unwrap();
        spin(&mut a).unwrap();
        let kernel = kernel(&mut a);

        finish(command(&kernel, &["--timeout", "60s"])).expect(42);
    }
}
