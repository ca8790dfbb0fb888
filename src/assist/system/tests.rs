use super::super::cpu::rflags;
use super::super::testing::{Case, Random, State, TestCpu};
use super::super::{Exception, Outcome};
use super::*;
use iced_x86::code_asm::*;

fn completes(cpu: &mut TestCpu) {
    let outcome = cpu.complete();
    assert!(matches!(outcome, Outcome::Completed), "{outcome:?}");
}

fn injects(cpu: &mut TestCpu, exception: Exception) {
    match cpu.complete() {
        Outcome::Inject(found) => assert_eq!(found, exception),
        outcome => panic!("{outcome:?}"),
    }
}

const CLAC: &[u8] = &[0x0F, 0x01, 0xCA];
const STAC: &[u8] = &[0x0F, 0x01, 0xCB];
const SWAPGS: &[u8] = &[0x0F, 0x01, 0xF8];
const XSETBV: &[u8] = &[0x0F, 0x01, 0xD1];
/// invpcid rax, [rsi]
const INVPCID: &[u8] = &[0x66, 0x0F, 0x38, 0x82, 0x06];

#[test]
fn stac_sets_ac_and_clac_clears_it() {
    let mut cpu = TestCpu::new(STAC);
    completes(&mut cpu);
    assert_eq!(cpu.state.registers.rflags, rflags::AC | 2);
    cpu.code = CLAC.to_vec();
    completes(&mut cpu);
    assert_eq!(cpu.state.registers.rflags, 2);
}

#[test]
fn stac_and_clac_are_invalid_outside_ring_0() {
    let mut random = Random::seeded();
    for mut case in [Case::new(|asm, _| asm.stac()), Case::new(|asm, _| asm.clac())] {
        let state = State::random(&mut random, case.xcr0);
        assert_eq!(case.check(&state).unwrap_err(), 6);
    }
}

#[test]
fn int3_and_int1_trap_behind_themselves() {
    for (code, exception) in [(0xCC, Exception::breakpoint()), (0xF1, Exception::debug())] {
        let mut cpu = TestCpu::new(&[code]);
        injects(&mut cpu, exception);
        assert_eq!(cpu.state.registers.rip, 0x40_0001);
    }
}

#[test]
fn int3_traps_as_on_the_processor() {
    let mut case = Case::new(|asm, _| asm.int3());
    let state = State::random(&mut Random::seeded(), case.xcr0);
    assert_eq!(case.check(&state).unwrap_err(), 3);
}

#[test]
fn swapgs_swaps_and_is_privileged() {
    let mut cpu = TestCpu::new(SWAPGS);
    completes(&mut cpu);
    assert_eq!((cpu.gs_base, cpu.kernel_gs_base), (0x7777_0000, 0x200));
    cpu.cpl = 3;
    injects(&mut cpu, Exception::general_protection());
}

#[test]
fn segment_bases_are_read_and_written() {
    // rdgsbase rcx, wrfsbase ecx, wrgsbase rcx
    let mut cpu = TestCpu::new(&[0xF3, 0x48, 0x0F, 0xAE, 0xC9]);
    completes(&mut cpu);
    assert_eq!(cpu.state.registers.gpr[1], 0x200);
    cpu.state.registers.gpr[1] = 0xFFFF_8000_1234_5678;
    cpu.code = vec![0xF3, 0x0F, 0xAE, 0xD1];
    completes(&mut cpu);
    assert_eq!(cpu.fs_base, 0x1234_5678);
    cpu.code = vec![0xF3, 0x48, 0x0F, 0xAE, 0xD9];
    completes(&mut cpu);
    assert_eq!(cpu.gs_base, 0xFFFF_8000_1234_5678);
    cpu.state.registers.gpr[1] = 1 << 63;
    injects(&mut cpu, Exception::general_protection());
    cpu.cr4 &= !cr4::FSGSBASE;
    injects(&mut cpu, Exception::invalid_opcode());
}

#[test]
fn rdpid_reads_tsc_aux() {
    let mut cpu = TestCpu::new(&[0xF3, 0x0F, 0xC7, 0xF8]);
    cpu.state.registers.gpr[0] = u64::MAX;
    completes(&mut cpu);
    assert_eq!(cpu.state.registers.gpr[0], 0x1234_5678);
}

#[test]
fn rdrand_fills_its_operand_and_sets_carry_alone() {
    let mut random = Random::seeded();
    for mut case in [
        Case::new(|asm, _| asm.rdrand(r9)),
        Case::new(|asm, _| asm.rdseed(ecx)),
        Case::new(|asm, _| asm.rdrand(dx)),
    ] {
        if !case.is_known() {
            continue;
        }
        let native = &mut case.native;
        let state = State::random(&mut random, case.xcr0);
        let expected = native.run(&state).unwrap().registers;
        let mut cpu = TestCpu::new(&native.bytes);
        cpu.state = state;
        completes(&mut cpu);
        let flags = rflags::CF | rflags::PF | rflags::AF | rflags::ZF | rflags::SF | rflags::OF;
        if expected.rflags & rflags::CF != 0 {
            assert_eq!(cpu.state.registers.rflags & flags, expected.rflags & flags);
        }
    }
    let mut cpu = TestCpu::new(&[0x0F, 0xC7, 0xF0]);
    cpu.state.registers.gpr[0] = u64::MAX;
    completes(&mut cpu);
    assert_eq!(cpu.state.registers.gpr[0], 0xA5A5_A5A5);
}

#[test]
fn xsetbv_takes_only_consistent_values() {
    let valid = [0x1, 0x3, 0x7, 0xE7];
    let invalid = [0x0, 0x2, 0x5, 0x27, 0xE3, 0x67, 0x1 | 1 << 9, 1 << 63 | 1, 0x1 | 1 << 11];
    for (values, accepted) in [(&valid[..], true), (&invalid[..], false)] {
        for value in values {
            let value: u64 = *value;
            let mut cpu = TestCpu::new(XSETBV);
            cpu.xcr0 = 1;
            cpu.state.registers.gpr[0] = value & 0xFFFF_FFFF;
            cpu.state.registers.gpr[2] = value >> 32;
            if accepted {
                completes(&mut cpu);
                assert_eq!(cpu.xcr0, value);
            } else {
                injects(&mut cpu, Exception::general_protection());
            }
        }
    }
    let mut cpu = TestCpu::new(XSETBV);
    cpu.state.registers.gpr[0] = 1;
    cpu.state.registers.gpr[1] = 1;
    injects(&mut cpu, Exception::general_protection());
    cpu.state.registers.gpr[1] = 0;
    cpu.cpl = 3;
    injects(&mut cpu, Exception::general_protection());
}

fn invpcid(kind: u64, low: u64, linear: u64) -> TestCpu {
    let mut cpu = TestCpu::new(INVPCID);
    cpu.state.registers.gpr[0] = kind;
    cpu.state.registers.gpr[6] = cpu.base;
    cpu.state.window[..8].copy_from_slice(&low.to_le_bytes());
    cpu.state.window[8..16].copy_from_slice(&linear.to_le_bytes());
    cpu
}

#[test]
fn invpcid_invalidates_by_type() {
    let linear = 0xFFFF_8000_0000_1000;
    for (kind, what) in [
        (0, Invalidation::Address { linear, pcid: 5 }),
        (1, Invalidation::Context { pcid: 5 }),
        (2, Invalidation::AllWithGlobals),
        (3, Invalidation::All),
    ] {
        let mut cpu = invpcid(kind, 5, linear);
        completes(&mut cpu);
        assert_eq!(cpu.invalidated, [what]);
    }
}

#[test]
fn invpcid_refuses_bad_descriptors() {
    for mut cpu in
        [invpcid(4, 0, 0), invpcid(2, 1 << 12, 0), invpcid(0, 0, 1 << 63), invpcid(1, 1 << 63, 0)]
    {
        injects(&mut cpu, Exception::general_protection());
        assert_eq!(cpu.invalidated, []);
    }
    let mut without_pcids = invpcid(1, 1, 0);
    without_pcids.cr4 &= !cr4::PCIDE;
    injects(&mut without_pcids, Exception::general_protection());
}

#[test]
fn cache_and_fence_instructions_change_nothing() {
    let mut random = Random::seeded();
    let cases = [
        Case::new(|asm, _| asm.clflush(byte_ptr(rsi))),
        Case::new(|asm, _| asm.clflushopt(byte_ptr(rsi))),
        Case::new(|asm, _| asm.clwb(byte_ptr(rsi))),
        Case::new(|asm, _| asm.prefetchw(byte_ptr(rsi))),
        Case::new(|asm, _| asm.prefetcht0(byte_ptr(rsi))),
        Case::new(|asm, _| asm.prefetchnta(byte_ptr(rsi))),
        Case::new(|asm, _| asm.endbr64()),
        Case::new(|asm, _| asm.pause()),
        Case::new(|asm, _| asm.lfence()),
        Case::new(|asm, _| asm.mfence()),
        Case::new(|asm, _| asm.sfence()),
    ];
    for mut case in cases {
        if !case.is_known() {
            continue;
        }
        let mut state = State::random(&mut random, case.xcr0);
        state.registers.gpr[6] = case.native.window();
        case.check(&state).unwrap();
        // An address that is not mapped: only the flushes mind.
        state.registers.gpr[6] = 0x10;
        let _ = case.check(&state);
    }
}

#[test]
fn rdpid_is_the_processors() {
    let mut case = Case::new(|asm, _| asm.rdpid(rax));
    if !case.is_known() {
        return;
    }
    let state = State::random(&mut Random::seeded(), case.xcr0);
    let expected = case.native.run(&state).unwrap();
    let mut cpu = TestCpu::new(&case.native.bytes);
    cpu.tsc_aux = expected.registers.gpr[0];
    cpu.state = state;
    completes(&mut cpu);
    assert_eq!(cpu.state.registers.gpr, expected.registers.gpr);
}
