use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::super::testing::{Case, Random, State, TESTED, TestCpu, host_component};
use super::super::{CodeSize, Exception, Outcome};
use super::component::{COMPACTED, XCOMP_BV, XSTATE_BV};

const ROUNDS: u32 = 400;
/// Where in the window the area begins; a multiple of 64.
const AREA: usize = 1024;
const RAX: usize = 0;
const RDX: usize = 2;
const RSI: usize = 6;

type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;

const SAVES: [(Emit, &str); 8] = [
    (|asm| asm.xsave(ptr(rsi)), "xsave"),
    (|asm| asm.xsave64(ptr(rsi)), "xsave64"),
    (|asm| asm.xsaveopt(ptr(rsi)), "xsaveopt"),
    (|asm| asm.xsaveopt64(ptr(rsi)), "xsaveopt64"),
    (|asm| asm.xsavec(ptr(rsi)), "xsavec"),
    (|asm| asm.xsavec64(ptr(rsi)), "xsavec64"),
    (|asm| asm.fxsave(ptr(rsi)), "fxsave"),
    (|asm| asm.fxsave64(ptr(rsi)), "fxsave64"),
];

fn case(emit: Emit) -> Case {
    Case::new(|asm, _| emit(asm))
}

fn state(random: &mut Random, case: &Case) -> State {
    let mut state = State::random(random, case.xcr0);
    state.registers.gpr[RSI] = case.native.window() + AREA as u64;
    for register in [RAX, RDX] {
        let value = if random.chance(4) { u64::MAX } else { random.next() };
        // Not what the host has beyond the components that are tested.
        state.registers.gpr[register] = value & !(case.xcr0 & !TESTED);
    }
    state
}

fn set(state: &mut State, offset: usize, bytes: &[u8]) {
    state.window[AREA + offset..AREA + offset + bytes.len()].copy_from_slice(bytes);
}

fn set_u64(state: &mut State, offset: usize, value: u64) {
    set(state, offset, &value.to_le_bytes());
}

/// A random area in the standard or, with `places`, the compacted format.
fn place_area(random: &mut Random, state: &mut State, xcr0: u64, places: Option<u64>) {
    let image = random.fpu(xcr0);
    let mut area = image.clone();
    let in_use = xcr0 & TESTED & random.next();
    area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&in_use.to_le_bytes());
    if let Some(places) = places {
        let in_use = in_use & places;
        area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&in_use.to_le_bytes());
        area[XCOMP_BV..XCOMP_BV + 8].copy_from_slice(&(places | COMPACTED).to_le_bytes());
    }
    set(state, 0, &area);
}

#[test]
fn every_save_leaves_the_image_that_the_processor_leaves() {
    let mut random = Random::seeded();
    for (emit, _) in SAVES {
        let mut case = case(emit);
        if !case.is_known() {
            continue;
        }
        for _ in 0..ROUNDS {
            let mut state = state(&mut random, &case);
            if random.chance(2) {
                random.fill(&mut state.window);
            }
            case.check(&state).unwrap();
        }
    }
}

#[test]
fn xrstor_loads_the_standard_format() {
    let mut random = Random::seeded();
    let forms: [Emit; 2] = [|asm| asm.xrstor(ptr(rsi)), |asm| asm.xrstor64(ptr(rsi))];
    for emit in forms {
        let mut case = case(emit);
        for _ in 0..ROUNDS {
            let mut state = state(&mut random, &case);
            place_area(&mut random, &mut state, case.xcr0, None);
            // Bytes 63:24 of the header do not matter in this format.
            set_u64(&mut state, XCOMP_BV + 16, random.next());
            case.check(&state).unwrap();
        }
    }
}

#[test]
fn xrstor_loads_the_compacted_format() {
    let mut random = Random::seeded();
    let forms: [Emit; 2] = [|asm| asm.xrstor(ptr(rsi)), |asm| asm.xrstor64(ptr(rsi))];
    for emit in forms {
        let mut case = case(emit);
        for _ in 0..ROUNDS {
            let mut state = state(&mut random, &case);
            let places = case.xcr0 & TESTED & random.next();
            place_area(&mut random, &mut state, case.xcr0, Some(places));
            case.check(&state).unwrap();
        }
    }
}

#[test]
fn xrstor_refuses_what_the_processor_refuses() {
    let mut random = Random::seeded();
    let mut case = case(|asm| asm.xrstor64(ptr(rsi)));
    let mut refused = 0;
    for _ in 0..4 * ROUNDS {
        let mut state = state(&mut random, &case);
        let places = random.chance(2).then(|| case.xcr0 & TESTED & random.next());
        place_area(&mut random, &mut state, case.xcr0, places);
        let bit = 1u64 << random.below(64);
        match random.below(6) {
            0 => set_u64(&mut state, XSTATE_BV, bit),
            1 => set_u64(&mut state, XCOMP_BV, bit),
            2 => set_u64(&mut state, XCOMP_BV, bit | COMPACTED),
            3 => set_u64(&mut state, XCOMP_BV + 8 * (1 + random.below(6) as usize), bit),
            4 => set(&mut state, 24, &(1u32 << random.below(32)).to_le_bytes()),
            _ => state.registers.gpr[RSI] += random.below(64),
        }
        refused += u32::from(case.check(&state).is_err());
    }
    assert!(refused > ROUNDS, "{refused}");
}

#[test]
fn fxrstor_loads_the_legacy_region() {
    let mut random = Random::seeded();
    let forms: [Emit; 2] = [|asm| asm.fxrstor(ptr(rsi)), |asm| asm.fxrstor64(ptr(rsi))];
    for emit in forms {
        let mut case = case(emit);
        for round in 0..ROUNDS {
            let mut state = state(&mut random, &case);
            let image = random.fpu(case.xcr0);
            set(&mut state, 0, &image[..512]);
            match round % 8 {
                0 => state.registers.gpr[RSI] += random.below(16),
                1 => set(&mut state, 24, &random.next().to_le_bytes()[..4]),
                _ => {}
            }
            let _ = case.check(&state);
        }
    }
}

#[test]
fn saves_refuse_an_area_that_is_not_aligned() {
    let mut random = Random::seeded();
    for (emit, name) in SAVES {
        let mut case = case(emit);
        if !case.is_known() {
            continue;
        }
        let mut state = state(&mut random, &case);
        state.registers.gpr[RSI] += 8;
        assert_eq!(case.check(&state).unwrap_err(), 13, "{name}");
    }
}

#[test]
fn xgetbv_reads_xcr0() {
    const RCX: usize = 1;
    let mut case = case(|asm| asm.xgetbv());
    let mut state = state(&mut Random::seeded(), &case);
    state.registers.gpr[RCX] = 0xFFFF_FFFF_0000_0000;
    let result = case.check(&state).unwrap();
    assert_eq!(result.registers.gpr[RAX], case.xcr0);
    state.registers.gpr[RCX] = 7;
    assert_eq!(case.check(&state).unwrap_err(), 13);
}

/// A vCPU with a random FPU image and its operand at [`AREA`].
fn cpu(random: &mut Random, code: &[u8]) -> TestCpu {
    let mut cpu = TestCpu::new(code);
    cpu.state.fpu = random.fpu(cpu.xcr0);
    cpu.state.registers.gpr[RSI] = cpu.base + AREA as u64;
    cpu.state.registers.gpr[RAX] = u64::MAX;
    cpu.state.registers.gpr[RDX] = u64::MAX;
    cpu
}

const XSAVES: &[u8] = &[0x48, 0x0F, 0xC7, 0x2E];
const XSAVEC: &[u8] = &[0x48, 0x0F, 0xC7, 0x26];
const XRSTORS: &[u8] = &[0x48, 0x0F, 0xC7, 0x1E];
const XRSTOR: &[u8] = &[0x48, 0x0F, 0xAE, 0x2E];
const XSAVE: &[u8] = &[0x48, 0x0F, 0xAE, 0x26];
const XSAVE_32: &[u8] = &[0x0F, 0xAE, 0x26];
const XRSTOR_32: &[u8] = &[0x0F, 0xAE, 0x2E];

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

#[test]
fn xsaves_without_supervisor_components_is_xsavec() {
    let mut random = Random::seeded();
    for _ in 0..ROUNDS {
        let mut one = cpu(&mut random, XSAVES);
        let mut other = TestCpu::new(XSAVEC);
        other.state = one.state.clone();
        completes(&mut one);
        completes(&mut other);
        assert_eq!(one.state, other.state);
    }
}

#[test]
fn xrstors_brings_back_what_xsaves_saved() {
    let mut random = Random::seeded();
    for _ in 0..ROUNDS {
        let mut cpu = cpu(&mut random, XSAVES);
        completes(&mut cpu);
        let mut other = TestCpu::new(XRSTORS);
        other.state = cpu.state.clone();
        other.state.fpu = random.fpu(cpu.xcr0);
        completes(&mut other);
        let before = reference_save(cpu.state);
        let after = reference_save(other.state);
        assert!(before == after, "{:x?}", differences(&before, &after));
    }
}

fn differences(one: &[u8], other: &[u8]) -> Vec<usize> {
    (0..one.len()).filter(|place| one[*place] != other[*place]).collect()
}

/// What XSAVE makes of a state, XSTATE_BV aside: equal for images that mean the same.
fn reference_save(state: super::super::testing::State) -> Vec<u8> {
    let mut cpu = TestCpu::new(XSAVE);
    cpu.state = state;
    cpu.state.window.fill(0);
    completes(&mut cpu);
    set_u64(&mut cpu.state, XSTATE_BV, 0);
    cpu.state.window
}

#[test]
fn xrstors_refuses_the_standard_format() {
    let mut cpu = cpu(&mut Random::seeded(), XRSTORS);
    injects(&mut cpu, Exception::general_protection());
}

#[test]
fn the_supervisor_forms_need_ring_0() {
    for code in [XSAVES, XRSTORS] {
        let mut cpu = cpu(&mut Random::seeded(), code);
        cpu.cpl = 3;
        injects(&mut cpu, Exception::general_protection());
    }
}

#[test]
fn supervisor_components_are_unsupported() {
    let mut cpu = cpu(&mut Random::seeded(), XSAVES);
    cpu.xss = 1 << 11;
    assert!(matches!(cpu.complete(), Outcome::Unsupported(_)));
}

#[test]
fn the_family_needs_osxsave_and_heeds_ts() {
    use super::super::cpu::{cr0, cr4};
    for code in [XSAVES, XSAVEC, XRSTORS, XRSTOR, XSAVE] {
        let mut disabled = cpu(&mut Random::seeded(), code);
        disabled.cr4 &= !cr4::OSXSAVE;
        disabled.cr0 |= cr0::TS;
        injects(&mut disabled, Exception::invalid_opcode());
        let mut switched = cpu(&mut Random::seeded(), code);
        switched.cr0 |= cr0::TS;
        injects(&mut switched, Exception::device_not_available());
    }
}

#[test]
fn a_page_that_faults_during_a_restore_changes_no_register() {
    let mut cpu = cpu(&mut Random::seeded(), XRSTOR);
    // Header and legacy region are readable, the rest is not.
    cpu.state.registers.gpr[RSI] = cpu.base + cpu.state.window.len() as u64 - 576;
    let start = cpu.state.window.len() - 576 + XSTATE_BV;
    cpu.state.window[start] = 0xE7;
    let before = cpu.state.fpu.clone();
    let end = cpu.base + cpu.state.window.len() as u64;
    injects(&mut cpu, Exception::page_fault(end, 4));
    assert_eq!(cpu.state.fpu, before);
}

#[test]
fn outside_64_bit_mode_the_upper_registers_stay() {
    let mut random = Random::seeded();
    let mut cpu = cpu(&mut random, XRSTOR_32);
    let hi16 = host_component(7).map_or(0, |found| found.offset as usize);
    if cpu.xcr0 != TESTED {
        super::super::testing::report("not tested, the host lacks AVX-512");
        return;
    }
    cpu.code_size = CodeSize::Bits32;
    cpu.state.fpu[XSTATE_BV] = 0xE7;
    // Everything in its initial configuration.
    let before = cpu.state.fpu.clone();
    set(&mut cpu.state, 24, &0x1F80u32.to_le_bytes());
    completes(&mut cpu);
    let after = &cpu.state.fpu;
    assert!(after[160..288].iter().all(|byte| *byte == 0), "XMM0 to XMM7");
    assert_eq!(after[288..416], before[288..416], "XMM8 to XMM15");
    assert!(after[576..704].iter().all(|byte| *byte == 0), "YMM0 to YMM7");
    assert_eq!(after[704..832], before[704..832], "YMM8 to YMM15");
    assert_eq!(after[hi16..hi16 + 1024], before[hi16..hi16 + 1024], "ZMM16 to ZMM31");
    assert_eq!(after[XSTATE_BV], 0xC6, "x87 and the opmasks are as after reset");

    cpu.code = XSAVE_32.to_vec();
    cpu.state.registers.rip = 0x40_0000;
    cpu.state.window.fill(0xEE);
    completes(&mut cpu);
    let saved = &cpu.state.window[AREA..];
    assert_eq!(saved[160..288], cpu.state.fpu[160..288]);
    assert!(saved[288..416].iter().all(|byte| *byte == 0xEE));
    assert!(saved[hi16..hi16 + 1024].iter().all(|byte| *byte == 0xEE));
}
