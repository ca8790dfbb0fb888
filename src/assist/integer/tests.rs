use iced_x86::code_asm::*;
use iced_x86::{Code, Instruction, MemoryOperand, Register};

use super::super::testing::{Case, Random, State, WINDOW_BYTES};

const ROUNDS: u32 = 100;

/// Checks the instruction against the processor with random operands. Memory operands are given
/// relative to RSI, which points into the window.
fn check(random: &mut Random, mut case: Case) {
    if !case.is_known() {
        return;
    }
    for _ in 0..ROUNDS {
        let mut state = State::random(random, case.xcr0);
        state.registers.gpr[6] =
            case.native.window() + 64 + random.below(WINDOW_BYTES as u64 - 128);
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
    popcnt_counts_ones:
        popcnt(ax, bx), popcnt(r9d, ecx), popcnt(rdi, r15), popcnt(rax, rax),
        popcnt(dx, word_ptr(rsi)), popcnt(edx, dword_ptr(rsi + 5)), popcnt(r8, qword_ptr(rsi - 0));
    lzcnt_counts_leading_zeros:
        lzcnt(ax, bx), lzcnt(r9d, ecx), lzcnt(rdi, r15), lzcnt(r8, qword_ptr(rsi)),
        lzcnt(dx, word_ptr(rsi + 1));
    tzcnt_counts_trailing_zeros:
        tzcnt(ax, bx), tzcnt(r9d, ecx), tzcnt(rdi, r15), tzcnt(r8, qword_ptr(rsi)),
        tzcnt(dx, word_ptr(rsi + 1));
    andn_masks: andn(eax, ebx, ecx), andn(r8, r9, r10), andn(rax, rdx, qword_ptr(rsi));
    bextr_extracts_a_field:
        bextr(eax, ebx, ecx), bextr(r8, r9, r10), bextr(rax, qword_ptr(rsi), rdx);
    bzhi_clears_high_bits: bzhi(eax, ebx, ecx), bzhi(r8, r9, r10), bzhi(eax, dword_ptr(rsi), edx);
    blsi_isolates: blsi(eax, ebx), blsi(r8, r9), blsi(rax, qword_ptr(rsi));
    blsr_resets: blsr(eax, ebx), blsr(r8, r9), blsr(rax, qword_ptr(rsi));
    blsmsk_masks: blsmsk(eax, ebx), blsmsk(r8, r9), blsmsk(eax, dword_ptr(rsi));
    mulx_multiplies:
        mulx(eax, ebx, ecx), mulx(r8, r9, r10), mulx(r8, r8, r10), mulx(rax, rdx, qword_ptr(rsi));
    pdep_deposits: pdep(eax, ebx, ecx), pdep(r8, r9, r10), pdep(rax, rdx, qword_ptr(rsi));
    pext_extracts: pext(eax, ebx, ecx), pext(r8, r9, r10), pext(rax, rdx, qword_ptr(rsi));
    rorx_rotates:
        rorx(eax, ebx, 0), rorx(eax, ebx, 77), rorx(r8, r9, 63), rorx(rax, qword_ptr(rsi), 17);
    shlx_shifts: shlx(eax, ebx, ecx), shlx(r8, r9, r10), shlx(rax, qword_ptr(rsi), rdx);
    shrx_shifts: shrx(eax, ebx, ecx), shrx(r8, r9, r10), shrx(rax, qword_ptr(rsi), rdx);
    sarx_shifts: sarx(eax, ebx, ecx), sarx(r8, r9, r10), sarx(eax, dword_ptr(rsi), edx);
    adcx_adds_with_carry: adcx(eax, ebx), adcx(r8, r9), adcx(rax, qword_ptr(rsi));
    adox_adds_with_overflow: adox(eax, ebx), adox(r8, r9), adox(eax, dword_ptr(rsi));
    movbe_swaps_bytes:
        movbe(ax, word_ptr(rsi)), movbe(ebx, dword_ptr(rsi)), movbe(r9, qword_ptr(rsi)),
        movbe(word_ptr(rsi), cx), movbe(dword_ptr(rsi), edx), movbe(qword_ptr(rsi), r10);
    crc32_accumulates:
        crc32(eax, bl), crc32(eax, bh), crc32(r8d, cx), crc32(ecx, edx), crc32(rax, r9b),
        crc32(rbx, r10), crc32(rax, qword_ptr(rsi)), crc32(edi, byte_ptr(rsi));
    addresses_are_formed_alike:
        popcnt(rax, qword_ptr(rsi + 0x20)), popcnt(rax, qword_ptr(rsi - 0x7)),
        popcnt(rax, qword_ptr(esi + 3)), popcnt(eax, dword_ptr(rsi).ds()),
        popcnt(eax, dword_ptr(rsi + 0x1234));
}

#[test]
fn an_index_is_scaled() {
    let mut random = Random::seeded();
    let mut case = Case::new(|asm, window| {
        assert!(window < 1 << 31);
        asm.popcnt(rax, qword_ptr(rcx + rdx * 8 - 0x40))
    });
    for _ in 0..ROUNDS {
        let mut state = State::random(&mut random, case.xcr0);
        state.registers.gpr[1] = case.native.window() + 64 + random.below(128);
        state.registers.gpr[2] = random.below(512);
        let _ = case.check(&state);
    }
}

#[test]
fn an_address_relative_to_rip_counts_from_the_next_instruction() {
    let mut random = Random::seeded();
    let mut case = Case::new(|asm, window| {
        let target = MemoryOperand::with_base_displ(Register::RIP, (window + 77) as i64);
        let code = Code::VEX_Rorx_r32_rm32_imm8;
        asm.add_instruction(Instruction::with3(code, Register::EAX, target, 3)?)
    });
    for _ in 0..ROUNDS {
        let state = State::random(&mut random, case.xcr0);
        case.check(&state).unwrap();
    }
}

#[test]
fn an_operand_that_is_not_mapped_faults() {
    let mut case = Case::new(|asm, _| asm.popcnt(rax, qword_ptr(rsi)));
    let mut state = State::random(&mut Random::seeded(), case.xcr0);
    state.registers.gpr[6] = 0x10;
    assert_eq!(case.check(&state).unwrap_err(), 14);
}

#[test]
fn a_non_canonical_operand_is_a_general_protection_or_stack_fault() {
    let mut case = Case::new(|asm, _| asm.popcnt(rax, qword_ptr(rsi)));
    let mut state = State::random(&mut Random::seeded(), case.xcr0);
    for address in [1 << 62, 0x7FFF_FFFF_FFFC, 0xFFFF_7FFF_FFFF_FFF0] {
        state.registers.gpr[6] = address;
        // A value that straddles the edge faults on its first, unmapped byte or on the edge.
        let _ = case.native.run(&state).unwrap_err();
    }
    state.registers.gpr[6] = 1 << 62;
    assert_eq!(case.check(&state).unwrap_err(), 13);
    let mut case = Case::new(|asm, _| asm.popcnt(rax, qword_ptr(rbp)));
    state.registers.gpr[5] = 1 << 62;
    // Linux reports #SS as SIGBUS, trap 12.
    assert_eq!(case.check(&state).unwrap_err(), 12);
}

#[test]
fn cmpxchg16b_exchanges_when_equal() {
    let mut random = Random::seeded();
    for locked in [false, true] {
        let mut case = Case::new(|asm, _| {
            let asm = if locked { asm.lock() } else { asm };
            asm.cmpxchg16b(xmmword_ptr(rsi))
        });
        for _ in 0..ROUNDS {
            let mut state = State::random(&mut random, case.xcr0);
            let offset = random.below(64) * 16;
            state.registers.gpr[6] = case.native.window() + offset;
            if random.chance(2) {
                let found = &state.window[offset as usize..];
                state.registers.gpr[0] = u64::from_le_bytes(*found.first_chunk().unwrap());
                state.registers.gpr[2] = u64::from_le_bytes(*found[8..].first_chunk().unwrap());
            }
            case.check(&state).unwrap();
        }
    }
}

#[test]
fn cmpxchg16b_wants_16_byte_alignment() {
    let mut case = Case::new(|asm, _| asm.cmpxchg16b(xmmword_ptr(rsi)));
    let mut state = State::random(&mut Random::seeded(), case.xcr0);
    state.registers.gpr[6] = case.native.window() + 8;
    assert_eq!(case.check(&state).unwrap_err(), 13);
}
