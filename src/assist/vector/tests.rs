use iced_x86::code_asm::*;

use super::super::testing::{Case, Random, State, TestCpu, WINDOW_BYTES};
use super::super::{Exception, Outcome};
use super::*;

const RSI: usize = 6;
const ROUNDS: u32 = 12;

fn check(random: &mut Random, mut case: Case) {
    if !case.is_known() {
        return;
    }
    for round in 0..ROUNDS {
        let mut state = State::random(random, case.xcr0);
        let mut offset = 64 + random.below(WINDOW_BYTES as u64 - 256);
        if round % 4 != 0 {
            offset &= !63;
        }
        state.registers.gpr[RSI] = case.native.window() + offset;
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
    unaligned_moves:
        movups(xmm1, xmmword_ptr(rsi)), movups(xmmword_ptr(rsi), xmm9), movupd(xmm3, xmm12),
        movdqu(xmm1, xmmword_ptr(rsi)), movdqu(xmmword_ptr(rsi), xmm2),
        lddqu(xmm4, xmmword_ptr(rsi)), vmovdqu(ymm3, ymmword_ptr(rsi)),
        vmovdqu(ymmword_ptr(rsi), ymm14), vmovups(xmm1, xmmword_ptr(rsi)), vmovups(ymm1, ymm2),
        vmovdqu64(zmm3, zmmword_ptr(rsi)), vmovdqu32(zmmword_ptr(rsi), zmm29),
        vmovdqu8(ymm20, ymmword_ptr(rsi)), vmovdqu16(zmm4, zmm30);
    aligned_moves:
        movaps(xmm1, xmmword_ptr(rsi)), movaps(xmmword_ptr(rsi), xmm9), movapd(xmm3, xmm12),
        movdqa(xmm1, xmmword_ptr(rsi)), movdqa(xmmword_ptr(rsi), xmm2),
        vmovdqa(ymm3, ymmword_ptr(rsi)), vmovaps(ymmword_ptr(rsi), ymm14), vmovapd(xmm5, xmm6),
        vmovdqa64(zmm3, zmmword_ptr(rsi)), vmovdqa32(zmmword_ptr(rsi), zmm29);
    streaming_moves:
        movntdq(xmmword_ptr(rsi), xmm3), movntps(xmmword_ptr(rsi), xmm3),
        vmovntdq(ymmword_ptr(rsi), ymm3), vmovntdq(zmmword_ptr(rsi), zmm3),
        movntdqa(xmm3, xmmword_ptr(rsi)), movnti(dword_ptr(rsi), ecx), movnti(qword_ptr(rsi), r9);
    moves_of_low_elements:
        movd(xmm1, ecx), movd(eax, xmm2), movd(xmm1, dword_ptr(rsi)), movd(dword_ptr(rsi), xmm8),
        movq(xmm1, rcx), movq(rax, xmm2), movq(xmm1, qword_ptr(rsi)), movq(qword_ptr(rsi), xmm8),
        movq(xmm1, xmm2), vmovd(xmm1, ecx), vmovq(xmm1, xmm2), vmovq(rax, xmm2),
        vmovq(xmm9, qword_ptr(rsi)), vmovq(xmm9, rcx), vmovd(dword_ptr(rsi), xmm1);
    scalar_moves:
        movss(xmm1, xmm2), movss(xmm1, dword_ptr(rsi)), movss(dword_ptr(rsi), xmm2),
        movsd_2(xmm1, xmm2), movsd_2(xmm1, qword_ptr(rsi)), movsd_2(qword_ptr(rsi), xmm2),
        vmovss_3(xmm1, xmm2, xmm3), vmovss(xmm1, dword_ptr(rsi)), vmovsd(qword_ptr(rsi), xmm2),
        vmovsd_3(xmm1, xmm2, xmm3);
    moves_of_halves:
        movlps(xmm1, qword_ptr(rsi)), movlps(qword_ptr(rsi), xmm1), movhps(xmm1, qword_ptr(rsi)),
        movhps(qword_ptr(rsi), xmm1), movhlps(xmm1, xmm2), movlhps(xmm1, xmm2),
        vmovlps_3(xmm1, xmm2, qword_ptr(rsi)), vmovhpd_3(xmm1, xmm2, qword_ptr(rsi)),
        vmovhlps(xmm1, xmm2, xmm3), vmovlhps(xmm1, xmm2, xmm3), movhpd(xmm5, qword_ptr(rsi)),
        vmovlpd(qword_ptr(rsi), xmm5);
    clearing_of_upper_halves: vzeroupper(), vzeroall();
    logic_operations:
        pxor(xmm1, xmm2), pxor(xmm1, xmm1), pxor(xmm1, xmmword_ptr(rsi)), pand(xmm1, xmm2),
        pandn(xmm1, xmm2), por(xmm1, xmm2), xorps(xmm1, xmm2), andnpd(xmm1, xmm2),
        orps(xmm8, xmmword_ptr(rsi)), vpxor(xmm1, xmm2, xmm3), vpxor(ymm1, ymm2, ymmword_ptr(rsi)),
        vpand(ymm1, ymm2, ymm3), vpandn(ymm1, ymm2, ymm3), vpor(ymm1, ymm2, ymm3),
        vxorps(ymm1, ymm2, ymm3), vpxorq(zmm1, zmm2, zmm3), vpxord(zmm17, zmm2, zmmword_ptr(rsi)),
        vpternlogq(zmm1, zmm2, zmm3, 0x96), vpternlogd(ymm1, ymm2, ymmword_ptr(rsi), 0xE8),
        vpternlogd(xmm1, xmm2, xmm3, 0x1B);
    additions:
        paddb(xmm1, xmm2), paddw(xmm1, xmm2), paddd(xmm1, xmm2), paddq(xmm1, xmm2),
        psubb(xmm1, xmm2), psubw(xmm1, xmm2), psubd(xmm1, xmm2), psubq(xmm1, xmm2),
        paddusb(xmm1, xmm2), paddusw(xmm1, xmm2), psubusb(xmm1, xmm2), psubusw(xmm1, xmm2),
        paddsb(xmm1, xmm2), paddsw(xmm1, xmm2), psubsb(xmm1, xmm2), psubsw(xmm1, xmm2),
        pavgb(xmm1, xmm2), pavgw(xmm1, xmm2), vpaddd(ymm1, ymm2, ymmword_ptr(rsi)),
        vpaddq(zmm1, zmm2, zmm3), vpaddb(xmm1, xmm2, xmm3), paddd(xmm1, xmmword_ptr(rsi));
    comparisons:
        pcmpeqb(xmm1, xmm2), pcmpeqw(xmm1, xmm2), pcmpeqd(xmm1, xmm1), pcmpeqq(xmm1, xmm2),
        pcmpgtb(xmm1, xmm2), pcmpgtw(xmm1, xmm2), pcmpgtd(xmm1, xmm2), pcmpgtq(xmm1, xmm2),
        vpcmpeqb(ymm1, ymm2, ymmword_ptr(rsi)), vpcmpgtb(ymm1, ymm2, ymm3);
    extrema:
        pminub(xmm1, xmm2), pmaxub(xmm1, xmm2), pminuw(xmm1, xmm2), pmaxuw(xmm1, xmm2),
        pminud(xmm1, xmm2), pmaxud(xmm1, xmm2), pminsb(xmm1, xmm2), pmaxsb(xmm1, xmm2),
        pminsw(xmm1, xmm2), pmaxsw(xmm1, xmm2), pminsd(xmm1, xmm2), pmaxsd(xmm1, xmm2),
        vpminub(ymm1, ymm2, ymm3), pabsb(xmm1, xmm2), pabsw(xmm1, xmm2), pabsd(xmm1, xmm2),
        vpabsd(ymm1, ymmword_ptr(rsi));
    multiplications:
        pmullw(xmm1, xmm2), pmulld(xmm1, xmm2), pmulhw(xmm1, xmm2), pmulhuw(xmm1, xmm2),
        pmuludq(xmm1, xmm2), pmuldq(xmm1, xmm2), pmaddwd(xmm1, xmm2), vpmuludq(ymm1, ymm2, ymm3),
        vpmuludq(zmm1, zmm2, zmm3);
    tests_of_bits: ptest(xmm1, xmm2), ptest(xmm1, xmmword_ptr(rsi)), vptest(ymm1, ymm2);
    shifts_by_a_count:
        psllw(xmm1, 3), pslld(xmm1, 31), psllq(xmm1, 64), psrlw(xmm1, 15), psrld(xmm1, 7),
        psrlq(xmm1, 1), psraw(xmm1, 77), psrad(xmm1, 4), pslldq(xmm1, 5), psrldq(xmm1, 15),
        psrldq(xmm1, 16), psllw(xmm1, xmm2), psrlq(xmm1, xmmword_ptr(rsi)), psrad(xmm1, xmm2),
        vpslld(ymm1, ymm2, 5), vpsrlq(ymm1, ymm2, 9), vpslldq(ymm1, ymm2, 3),
        vpsllq(ymm1, ymm2, xmm3), vpsrlq(zmm1, zmm2, 4), vpsraq(zmm1, zmm2, 9),
        vprold(zmm1, zmm2, 7), vprorq(ymm1, ymm2, 63), vprolq(xmm1, xmm2, 65),
        vprord(zmm1, zmm2, 33), vpsraw(ymm1, ymm2, 16);
    shifts_by_lanes:
        vpsllvd(ymm1, ymm2, ymm3), vpsrlvd(ymm1, ymm2, ymm3), vpsravd(ymm1, ymm2, ymm3),
        vpsllvq(ymm1, ymm2, ymmword_ptr(rsi)), vpsrlvq(ymm1, ymm2, ymm3),
        vprolvd(zmm1, zmm2, zmm3), vprolvq(zmm1, zmm2, zmm3), vprorvd(zmm1, zmm2, zmm3),
        vprorvq(zmm1, zmm2, zmm3);
    unpacking:
        punpcklbw(xmm1, xmm2), punpcklwd(xmm1, xmm2), punpckldq(xmm1, xmm2),
        punpcklqdq(xmm1, xmm2), punpckhbw(xmm1, xmm2), punpckhwd(xmm1, xmm2),
        punpckhdq(xmm1, xmmword_ptr(rsi)), punpckhqdq(xmm1, xmm2), unpcklps(xmm1, xmm2),
        unpckhpd(xmm1, xmm2), vpunpckldq(ymm1, ymm2, ymm3), vpunpckhqdq(ymm1, ymm2, ymm3),
        vpunpcklqdq(zmm1, zmm2, zmm3);
    shuffles:
        pshufb(xmm1, xmm2), pshufb(xmm1, xmmword_ptr(rsi)), vpshufb(ymm1, ymm2, ymm3),
        vpshufb(zmm1, zmm2, zmm3), pshufd(xmm1, xmm2, 0x1B), pshufd(xmm1, xmmword_ptr(rsi), 0x93),
        vpshufd(ymm1, ymm2, 0x4E), vpshufd(zmm1, zmm2, 0x4E), pshuflw(xmm1, xmm2, 0x1B),
        pshufhw(xmm1, xmm2, 0xB1), vpshufhw(ymm1, ymm2, 0x39), palignr(xmm1, xmm2, 4),
        palignr(xmm1, xmm2, 20), palignr(xmm1, xmm2, 40), vpalignr(ymm1, ymm2, ymm3, 12),
        shufps(xmm1, xmm2, 0x88), shufps(xmm1, xmm1, 0x1B), vshufps(ymm1, ymm2, ymm3, 0xDD),
        pblendw(xmm1, xmm2, 0xF0), vpblendd(ymm1, ymm2, ymm3, 0xA5),
        vpblendd(xmm1, xmm2, xmm3, 0x0A), packuswb(xmm1, xmm2), vpacksswb(ymm1, ymm2, ymm3),
        movddup(xmm1, xmm2), movsldup(xmm1, xmm2), vmovshdup(ymm1, ymm2),
        vmovddup(ymm1, ymmword_ptr(rsi));
    permutations:
        vpermq(ymm1, ymm2, 0x1B), vpermq(zmm1, zmm2, 0x93), vpermpd(ymm1, ymmword_ptr(rsi), 0x4E),
        vperm2i128(ymm1, ymm2, ymm3, 0x20), vperm2f128(ymm1, ymm2, ymmword_ptr(rsi), 0x31),
        vperm2i128(ymm1, ymm2, ymm3, 0x83), vperm2i128(ymm1, ymm2, ymm3, 0x28),
        vinserti128(ymm1, ymm2, xmm3, 1), vinserti128(ymm1, ymm2, xmmword_ptr(rsi), 0),
        vextracti128(xmm1, ymm2, 1), vextractf128(xmmword_ptr(rsi), ymm2, 1),
        vpermd(ymm1, ymm2, ymm3), vpermps(zmm1, zmm2, zmmword_ptr(rsi)),
        vpermi2d(ymm8, ymm6, ymm7), vpermi2d(xmm1, xmm2, xmmword_ptr(rsi)),
        vpermi2d(zmm1, zmm2, zmm3), vpermi2q(zmm1, zmm2, zmm3), vpermi2q(xmm1, xmm2, xmm3),
        vpermi2ps(ymm1, ymm2, ymm1), vpermi2pd(ymm1, ymm2, ymm3), vpermt2d(ymm1, ymm2, ymm3),
        vpermt2q(zmm1, zmm2, zmmword_ptr(rsi)), vpermt2ps(xmm1, xmm2, xmm3),
        vpermt2pd(zmm1, zmm1, zmm2);
    broadcasts:
        vpbroadcastb(ymm1, xmm2), vpbroadcastw(xmm1, word_ptr(rsi)),
        vpbroadcastd(ymm1, dword_ptr(rsi)), vpbroadcastq(ymm1, xmm2), vpbroadcastd(zmm1, ecx),
        vpbroadcastq(zmm1, rcx), vbroadcastss(ymm1, dword_ptr(rsi)), vbroadcastsd(ymm1, xmm2),
        vbroadcasti128(ymm1, xmmword_ptr(rsi)), vpbroadcastb(zmm20, byte_ptr(rsi));
    insertions_and_extractions:
        pinsrb(xmm1, ecx, 13), pinsrw(xmm1, ecx, 9), pinsrd(xmm1, ecx, 2), pinsrq(xmm1, rcx, 1),
        pinsrb(xmm1, byte_ptr(rsi), 0), vpinsrd(xmm1, xmm2, dword_ptr(rsi), 3),
        vpinsrq(xmm1, xmm2, rcx, 0), pextrb(ecx, xmm1, 7), pextrw(ecx, xmm1, 3),
        pextrd(ecx, xmm1, 2), pextrq(rcx, xmm1, 1), pextrb(byte_ptr(rsi), xmm1, 15),
        pextrw(word_ptr(rsi), xmm1, 6), vpextrd(dword_ptr(rsi), xmm1, 0),
        vpextrq(qword_ptr(rsi), xmm1, 1), pmovmskb(eax, xmm1), vpmovmskb(eax, ymm1),
        movmskps(eax, xmm1), vmovmskps(eax, ymm1), movmskpd(eax, xmm1);
    aes_rounds:
        aesenc(xmm1, xmm2), aesenclast(xmm1, xmm2), aesdec(xmm1, xmmword_ptr(rsi)),
        aesdeclast(xmm1, xmm2), aesimc(xmm1, xmm2), aeskeygenassist(xmm1, xmm2, 0x36),
        vaesenc(xmm1, xmm2, xmm3), vaesenclast(ymm1, ymm2, ymm3), vaesdec(zmm1, zmm2, zmm3),
        vaesimc(xmm1, xmm2);
    carryless_products:
        pclmulqdq(xmm1, xmm2, 0x00), pclmulqdq(xmm1, xmm2, 0x01), pclmulqdq(xmm1, xmm2, 0x10),
        pclmulqdq(xmm1, xmmword_ptr(rsi), 0x11), vpclmulqdq(xmm1, xmm2, xmm3, 0x11),
        vpclmulqdq(zmm1, zmm2, zmm3, 0x10);
}

fn outcome(code: &[u8], change: impl FnOnce(&mut TestCpu)) -> Outcome {
    let mut cpu = TestCpu::new(code);
    change(&mut cpu);
    cpu.complete()
}

fn injects(outcome: &Outcome, exception: Exception) {
    assert!(matches!(outcome, Outcome::Inject(found) if *found == exception), "{outcome:?}");
}

#[test]
fn vectors_need_their_extension_enabled_and_ts_clear() {
    let pxor = &[0x66, 0x0F, 0xEF, 0xCA];
    let vpxor = &[0xC5, 0xE9, 0xEF, 0xCB];
    let vpxorq = &[0x62, 0xF1, 0xED, 0x48, 0xEF, 0xCB];
    let invalid = Exception::invalid_opcode();
    injects(&outcome(pxor, |cpu| cpu.cr4 &= !cr4::OSFXSR), invalid);
    injects(&outcome(pxor, |cpu| cpu.cr0 |= cr0::EM), invalid);
    injects(&outcome(vpxor, |cpu| cpu.cr4 &= !cr4::OSXSAVE), invalid);
    injects(&outcome(vpxor, |cpu| cpu.xcr0 = 3), invalid);
    injects(&outcome(vpxorq, |cpu| cpu.xcr0 = 7), invalid);
    for code in [&pxor[..], vpxor, vpxorq] {
        injects(&outcome(code, |cpu| cpu.cr0 |= cr0::TS), Exception::device_not_available());
    }
}

#[test]
fn masking_and_mmx_are_unsupported() {
    // vpxorq zmm1{k1}, zmm2, zmm3; pxor mm1, mm2
    for code in [&[0x62, 0xF1, 0xED, 0x49, 0xEF, 0xCB][..], &[0x0F, 0xEF, 0xCA]] {
        let outcome = outcome(code, |_| {});
        assert!(matches!(outcome, Outcome::Unsupported(_)), "{outcome:?}");
    }
}
