use proptest::prelude::*;

use super::cpu::rflags;
use super::testing::{TestCpu, report};
use super::*;

/// A vCPU that stands at `code`, which the assist is expected to complete.
fn completed(code: &[u8]) -> TestCpu {
    let mut cpu = TestCpu::new(code);
    match cpu.complete() {
        Outcome::Completed => cpu,
        outcome => panic!("{outcome:?}"),
    }
}

fn injected(cpu: &mut TestCpu) -> Exception {
    match cpu.complete() {
        Outcome::Inject(exception) => exception,
        outcome => panic!("{outcome:?}"),
    }
}

const NOP: &[u8] = &[0x0F, 0x1F, 0x00];
const POPCNT_EAX_EBX: &[u8] = &[0xF3, 0x0F, 0xB8, 0xC3];

#[test]
fn rip_moves_behind_the_instruction() {
    let cpu = completed(POPCNT_EAX_EBX);
    assert_eq!(cpu.state.registers.rip, 0x40_0004);
}

#[test]
fn rip_wraps_at_the_end_of_a_32_bit_segment() {
    let mut cpu = TestCpu::new(NOP);
    cpu.code_size = CodeSize::Bits32;
    cpu.state.registers.rip = 0xFFFF_FFFE;
    assert!(matches!(cpu.complete(), Outcome::Completed));
    assert_eq!(cpu.state.registers.rip, 1);
}

#[test]
fn missing_bytes_are_fetched() {
    for known in 0..POPCNT_EAX_EBX.len() {
        let mut cpu = TestCpu::new(POPCNT_EAX_EBX);
        cpu.state.registers.gpr[3] = 0xFF;
        let outcome = complete(&mut cpu, &POPCNT_EAX_EBX[..known]);
        assert!(matches!(outcome, Outcome::Completed), "{known}: {outcome:?}");
        assert_eq!(cpu.state.registers.gpr[0], 8);
    }
}

#[test]
fn completion_clears_the_resume_flag() {
    let mut cpu = TestCpu::new(NOP);
    cpu.state.registers.rflags |= rflags::RF;
    assert!(matches!(cpu.complete(), Outcome::Completed));
    assert_eq!(cpu.state.registers.rflags & rflags::RF, 0);
}

#[test]
fn single_stepping_traps_behind_the_instruction() {
    let mut cpu = TestCpu::new(NOP);
    cpu.state.registers.rflags |= rflags::TF;
    assert_eq!(injected(&mut cpu), Exception::single_step());
    assert_eq!(cpu.state.registers.rip, 0x40_0003);
}

#[test]
fn an_undefined_opcode_is_invalid() {
    for code in [&[0x0F, 0x0B][..], &[0x0F, 0xFF, 0xC0], &[0xF0, 0x0F, 0x01, 0xCA]] {
        let mut cpu = TestCpu::new(code);
        assert_eq!(injected(&mut cpu), Exception::invalid_opcode(), "{code:02x?}");
        assert_eq!(cpu.state.registers.rip, 0x40_0000);
    }
}

#[test]
fn more_than_15_bytes_are_a_general_protection_fault() {
    let mut cpu = TestCpu::new(&[0x66; 32]);
    assert_eq!(injected(&mut cpu), Exception::general_protection());
}

#[test]
fn an_instruction_that_nobody_knows_changes_nothing() {
    // HLT: KVM's to do.
    let mut cpu = TestCpu::new(&[0xF4]);
    let before = cpu.state.clone();
    let outcome = cpu.complete();
    assert!(matches!(outcome, Outcome::Unsupported(_)), "{outcome:?}");
    assert_eq!(cpu.state, before);
}

#[test]
fn a_description_has_bytes_and_mnemonic() {
    let describe = |bytes: &[u8]| describe(bytes, 0x1000, CodeSize::Bits64);
    assert_eq!(describe(&[0x0F, 0x01, 0xCB, 0x90]), "0f 01 cb  stac");
    assert_eq!(describe(&[0xF3, 0x0F, 0xB8, 0xC3, 0x00]), "f3 0f b8 c3  popcnt eax,ebx");
    assert_eq!(describe(&[0x0F, 0xFF]), "0f ff  (bad)");
    assert_eq!(describe(&[]), " (bad)");
}

#[test]
fn a_memory_operand_takes_the_base_of_its_segment() {
    // popcnt rax, gs:[rsi]
    let mut cpu = TestCpu::new(&[0x65, 0xF3, 0x48, 0x0F, 0xB8, 0x06]);
    cpu.gs_base = cpu.base;
    cpu.state.registers.gpr[6] = 16;
    cpu.state.window[16..24].fill(0x11);
    assert!(matches!(cpu.complete(), Outcome::Completed));
    assert_eq!(cpu.state.registers.gpr[0], 16);
}

#[test]
fn outside_64_bit_mode_every_segment_has_a_base() {
    // popcnt eax, [esi]
    let mut cpu = TestCpu::new(&[0xF3, 0x0F, 0xB8, 0x06]);
    cpu.code_size = CodeSize::Bits32;
    cpu.flat_base = cpu.base;
    cpu.state.registers.gpr[6] = 0xABCD_0000_0000_0010;
    cpu.state.window[16..20].fill(0x11);
    assert!(matches!(cpu.complete(), Outcome::Completed));
    assert_eq!(cpu.state.registers.gpr[0], 8);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn arbitrary_bytes_never_panic(
        prefix in any::<bool>(),
        mut code in any::<[u8; 16]>(),
        gpr in any::<[u64; 16]>(),
        pointer in 0u64..0x2100,
        size in 0u8..3,
        registers in any::<[u64; 2]>(),
        fpu in any::<[u8; 32]>(),
    ) {
        if prefix {
            code[0] = 0x0F;
        }
        let mut cpu = TestCpu::new(&code);
        cpu.state.registers.gpr = gpr;
        cpu.state.registers.gpr[6] = cpu.base + pointer;
        cpu.state.registers.rflags = registers[0];
        cpu.code_size = [CodeSize::Bits16, CodeSize::Bits32, CodeSize::Bits64][usize::from(size)];
        cpu.cpl = (registers[1] & 3) as u8;
        cpu.cr0 ^= registers[1] & 0x2A;
        cpu.cr4 ^= registers[1] & 0x7_0000;
        cpu.state.fpu[..32].copy_from_slice(&fpu);
        let rip = cpu.state.registers.rip;
        match cpu.complete() {
            Outcome::Completed => {
                let length = cpu.state.registers.rip.wrapping_sub(rip);
                prop_assert!(size == 0 || (1..=15).contains(&length), "{length}");
            }
            Outcome::Inject(exception) => prop_assert!(exception.vector < 32),
            Outcome::Unsupported(reason) => prop_assert!(!reason.is_empty()),
            Outcome::Failed(error) => report(&error.to_string()),
        }
    }
}
