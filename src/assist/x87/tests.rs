use iced_x86::code_asm::*;

use super::super::testing::{Case, Random, State, TestCpu};
use super::super::{Exception, Outcome};
use super::*;

const RSI: usize = 6;

fn check(random: &mut Random, mut case: Case) {
    if !case.is_known() {
        return;
    }
    for round in 0..100 {
        let mut state = State::random(random, case.xcr0);
        state.registers.gpr[RSI] = case.native.window() + 64;
        if round % 2 == 0 {
            // A valid MXCSR.
            state.window[66..68].fill(0);
        }
        let _ = case.check(&state);
    }
}

macro_rules! instructions {
    ($($name:ident: $($asm:ident($($operand:expr),*)),+;)+) => {
        $(#[test]
        fn $name() {
            let mut random = Random::seeded();
            $(check(&mut random, Case::new(|asm, _| asm.$asm($($operand),*)));)+
        })+
    };
}

instructions! {
    fwait_raises_what_is_pending: wait();
    fnop_raises_what_is_pending: fnop();
    fninit_initialises: fninit();
    fnclex_clears_exceptions: fnclex();
    fnstcw_stores_the_control_word: fnstcw(word_ptr(rsi));
    fnstsw_stores_the_status_word: fnstsw(word_ptr(rsi)), fnstsw(ax);
    fldcw_loads_the_control_word: fldcw(word_ptr(rsi));
    emms_empties_the_tags: emms();
    ldmxcsr_loads: ldmxcsr(dword_ptr(rsi)), vldmxcsr(dword_ptr(rsi));
    stmxcsr_stores: stmxcsr(dword_ptr(rsi)), vstmxcsr(dword_ptr(rsi));
}

fn outcome(code: &[u8], change: impl FnOnce(&mut TestCpu)) -> Option<Exception> {
    let mut cpu = TestCpu::new(code);
    change(&mut cpu);
    match cpu.complete() {
        Outcome::Completed => None,
        Outcome::Inject(exception) => Some(exception),
        outcome => panic!("{outcome:?}"),
    }
}

#[test]
fn fwait_heeds_ts_only_together_with_mp() {
    let not_available = Some(Exception::device_not_available());
    let wait = &[0x9B];
    assert_eq!(outcome(wait, |cpu| cpu.cr0 |= cr0::TS | cr0::MP), not_available);
    assert_eq!(outcome(wait, |cpu| cpu.cr0 = (cpu.cr0 | cr0::TS) & !cr0::MP), None);
    assert_eq!(outcome(wait, |cpu| cpu.cr0 |= cr0::EM), None);
}

#[test]
fn fninit_heeds_ts_and_em() {
    let not_available = Some(Exception::device_not_available());
    let fninit = &[0xDB, 0xE3];
    assert_eq!(outcome(fninit, |cpu| cpu.cr0 |= cr0::TS), not_available);
    assert_eq!(outcome(fninit, |cpu| cpu.cr0 |= cr0::EM), not_available);
}

#[test]
fn ldmxcsr_needs_sse() {
    let ldmxcsr = &[0x0F, 0xAE, 0x16];
    let invalid = Some(Exception::invalid_opcode());
    assert_eq!(outcome(ldmxcsr, |cpu| cpu.cr4 &= !cr4::OSFXSR), invalid);
    assert_eq!(outcome(ldmxcsr, |cpu| cpu.cr0 |= cr0::EM), invalid);
    let not_available = Some(Exception::device_not_available());
    assert_eq!(outcome(ldmxcsr, |cpu| cpu.cr0 |= cr0::TS), not_available);
}

#[test]
fn a_pending_error_without_ne_is_unsupported() {
    let mut cpu = TestCpu::new(&[0x9B]);
    cpu.cr0 &= !cr0::NE;
    cpu.state.fpu[3] = 0x80;
    cpu.state.fpu[2] = 0x80;
    assert!(matches!(cpu.complete(), Outcome::Unsupported(_)));
}
