use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

/// Tables as a map from address to 8 bytes; everything below 1 MiB is RAM, the rest is not.
#[derive(Default)]
struct Tables {
    quads: HashMap<u64, u64>,
    /// Changes this entry once, behind the walker's back.
    racing: Option<(u64, u64)>,
}

const RAM_END: u64 = 1 << 20;
const PML5: u64 = 0x1000;
const PML4: u64 = 0x2000;
const PDPT: u64 = 0x3000;
const PD: u64 = 0x4000;
const PT: u64 = 0x5000;
const FRAME: u64 = 0x6000;

const P: u64 = entry::PRESENT;
const RW: u64 = entry::WRITABLE;
const US: u64 = entry::USER;
const PS: u64 = entry::PAGE_SIZE;
const NX: u64 = entry::EXECUTE_DISABLE;
const A: u64 = entry::ACCESSED;
const D: u64 = entry::DIRTY;

/// Indices 1, 2, 3, 4 from PML4 to PT; offset 0x123.
const LINEAR: u64 = 1 << 39 | 2 << 30 | 3 << 21 | 4 << 12 | 0x123;

impl PhysicalMemory for Tables {
    fn read_u32(&mut self, physical: u64) -> Option<u32> {
        let quad = self.read_u64(physical & !7)?;
        Some((quad >> (8 * (physical & 4))) as u32)
    }

    fn read_u64(&mut self, physical: u64) -> Option<u64> {
        assert!(physical.is_multiple_of(8));
        (physical < RAM_END).then(|| self.quads.get(&physical).copied().unwrap_or_default())
    }

    fn compare_exchange_u32(&mut self, physical: u64, expected: u32, new: u32) -> Option<bool> {
        let shift = 8 * (physical & 4);
        let old = self.read_u64(physical & !7)?;
        if (old >> shift) as u32 != expected {
            return Some(false);
        }
        let mask = u64::from(u32::MAX) << shift;
        self.quads.insert(physical & !7, old & !mask | u64::from(new) << shift);
        Some(true)
    }

    fn compare_exchange_u64(&mut self, physical: u64, expected: u64, new: u64) -> Option<bool> {
        if let Some((address, value)) = self.racing.take() {
            self.quads.insert(address, value);
        }
        if self.read_u64(physical)? != expected {
            return Some(false);
        }
        self.quads.insert(physical, new);
        Some(true)
    }
}

impl Tables {
    /// Maps LINEAR to FRAME with these bits in all levels.
    fn four_levels(bits: u64) -> Self {
        let mut tables = Self::default();
        tables.set(PML4, 1, PDPT | bits);
        tables.set(PDPT, 2, PD | bits);
        tables.set(PD, 3, PT | bits);
        tables.set(PT, 4, FRAME | bits);
        tables
    }

    fn set(&mut self, table: u64, index: u64, value: u64) {
        self.quads.insert(table + 8 * index, value);
    }

    fn get(&self, table: u64, index: u64) -> u64 {
        self.quads.get(&(table + 8 * index)).copied().unwrap_or_default()
    }

    /// For 32-bit paging.
    fn set_u32(&mut self, table: u64, index: u64, value: u32) {
        let (address, shift) = ((table + 4 * index) & !7, 32 * (index & 1));
        let quad = self.quads.entry(address).or_default();
        *quad = *quad & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
    }
}

fn long() -> Paging {
    Paging {
        cr0: cr0::PE | cr0::PG | cr0::WP,
        cr3: PML4,
        cr4: cr4::PAE,
        efer: efer::LMA | efer::NXE,
        physical_bits: 40,
    }
}

fn supervisor(kind: AccessKind) -> Access {
    Access::explicit(kind, 0, 0)
}

fn user(kind: AccessKind) -> Access {
    Access::explicit(kind, 3, 0)
}

fn physical(tables: &mut Tables, paging: &Paging, linear: u64, access: Access) -> u64 {
    match translate(tables, paging, linear, access) {
        Ok(translation) => translation.physical,
        Err(stop) => panic!("{stop:?}"),
    }
}

fn error_code(tables: &mut Tables, paging: &Paging, linear: u64, access: Access) -> u32 {
    match translate(tables, paging, linear, access) {
        Err(Stop::Exception(exception)) => {
            assert_eq!((exception.vector, exception.payload), (14, Some(linear)));
            exception.error_code.unwrap()
        }
        other => panic!("{other:?}"),
    }
}

use AccessKind::{Execute, Read, Write};

#[test]
fn without_paging_the_low_32_bits_are_physical() {
    let paging = Paging { cr0: cr0::PE, ..long() };
    let mut tables = Tables::default();
    assert_eq!(physical(&mut tables, &paging, 0x1_2345_6789, user(Write)), 0x2345_6789);
}

#[test]
fn four_levels_lead_to_the_frame() {
    let mut tables = Tables::four_levels(P | RW);
    let found = translate(&mut tables, &long(), LINEAR, supervisor(Read)).unwrap();
    assert_eq!(found, Translation { physical: FRAME + 0x123, page_bytes: 4096 });
}

#[test]
fn the_upper_half_leads_through_the_upper_entries() {
    let mut tables = Tables::default();
    tables.set(PML4, 511, PDPT | P);
    tables.set(PDPT, 511, 0x4000_0000 | P | PS);
    let linear = 0xFFFF_FFFF_C000_0777;
    assert_eq!(physical(&mut tables, &long(), linear, supervisor(Read)), 0x4000_0777);
}

#[test]
fn five_levels_when_la57_is_set() {
    let mut tables = Tables::four_levels(P);
    tables.set(PML5, 5, PML4 | P);
    let paging = Paging { cr3: PML5, cr4: cr4::PAE | cr4::LA57, ..long() };
    let linear = 5 << 48 | LINEAR;
    assert_eq!(physical(&mut tables, &paging, linear, supervisor(Read)), FRAME + 0x123);
}

#[test]
fn large_pages_keep_the_offset() {
    let mut tables = Tables::four_levels(P);
    tables.set(PD, 3, 0x1260_0000 | P | PS | 1 << 12);
    let found = translate(&mut tables, &long(), LINEAR, supervisor(Read)).unwrap();
    let expected = Translation { physical: 0x1260_0000 | LINEAR & 0x1F_FFFF, page_bytes: 2 << 20 };
    assert_eq!(found, expected);
    tables.set(PDPT, 2, 0x4000_0000 | P | PS);
    let found = translate(&mut tables, &long(), LINEAR, supervisor(Read)).unwrap();
    let expected =
        Translation { physical: 0x4000_0000 | LINEAR & 0x3FFF_FFFF, page_bytes: 1 << 30 };
    assert_eq!(found, expected);
}

#[test]
fn an_absent_entry_at_any_level_faults_as_not_present() {
    for (table, index) in [(PML4, 1), (PDPT, 2), (PD, 3), (PT, 4)] {
        let mut tables = Tables::four_levels(P | RW | US);
        tables.set(table, index, 0);
        assert_eq!(error_code(&mut tables, &long(), LINEAR, supervisor(Read)), 0);
        assert_eq!(
            error_code(&mut tables, &long(), LINEAR, user(Write)),
            fault::USER | fault::WRITE
        );
        let fetch = fault::USER | fault::FETCH;
        assert_eq!(error_code(&mut tables, &long(), LINEAR, user(Execute)), fetch);
    }
}

#[test]
fn every_level_must_grant_user_access() {
    for (table, index) in [(PML4, 1), (PDPT, 2), (PD, 3), (PT, 4)] {
        let mut tables = Tables::four_levels(P | RW | US);
        let value = tables.get(table, index);
        tables.set(table, index, value & !US);
        let code = fault::PRESENT | fault::USER;
        assert_eq!(error_code(&mut tables, &long(), LINEAR, user(Read)), code);
        assert_eq!(physical(&mut tables, &long(), LINEAR, supervisor(Read)), FRAME + 0x123);
    }
}

#[test]
fn every_level_must_grant_writes_unless_the_supervisor_ignores_write_protection() {
    for (table, index) in [(PML4, 1), (PDPT, 2), (PD, 3), (PT, 4)] {
        let mut tables = Tables::four_levels(P | RW | US);
        let value = tables.get(table, index);
        tables.set(table, index, value & !RW);
        let code = fault::PRESENT | fault::WRITE;
        assert_eq!(error_code(&mut tables, &long(), LINEAR, supervisor(Write)), code);
        let without_wp = Paging { cr0: cr0::PE | cr0::PG, ..long() };
        physical(&mut tables, &without_wp, LINEAR, supervisor(Write));
        let code = code | fault::USER;
        assert_eq!(error_code(&mut tables, &without_wp, LINEAR, user(Write)), code);
    }
}

#[test]
fn any_level_may_forbid_execution() {
    for (table, index) in [(PML4, 1), (PDPT, 2), (PD, 3), (PT, 4)] {
        let mut tables = Tables::four_levels(P | RW | US);
        let value = tables.get(table, index);
        tables.set(table, index, value | NX);
        let code = fault::PRESENT | fault::FETCH;
        assert_eq!(error_code(&mut tables, &long(), LINEAR, supervisor(Execute)), code);
        physical(&mut tables, &long(), LINEAR, supervisor(Write));
    }
}

#[test]
fn the_execute_disable_bit_is_reserved_while_nxe_is_clear() {
    let mut tables = Tables::four_levels(P | NX);
    let paging = Paging { efer: efer::LMA, ..long() };
    let code = fault::PRESENT | fault::RESERVED;
    assert_eq!(error_code(&mut tables, &paging, LINEAR, supervisor(Read)), code);
    // Neither NX nor SMEP: a fetch is not told apart.
    assert_eq!(error_code(&mut tables, &paging, LINEAR, supervisor(Execute)), code);
}

#[test]
fn smep_keeps_the_supervisor_from_executing_user_pages() {
    let mut tables = Tables::four_levels(P | RW | US);
    physical(&mut tables, &long(), LINEAR, supervisor(Execute));
    let paging = Paging { cr4: cr4::PAE | cr4::SMEP, ..long() };
    let code = fault::PRESENT | fault::FETCH;
    assert_eq!(error_code(&mut tables, &paging, LINEAR, supervisor(Execute)), code);
    physical(&mut tables, &paging, LINEAR, supervisor(Read));
    physical(&mut tables, &paging, LINEAR, user(Execute));
}

#[test]
fn smap_keeps_the_supervisor_from_user_data_unless_ac_is_set() {
    let mut tables = Tables::four_levels(P | RW | US);
    let paging = Paging { cr4: cr4::PAE | cr4::SMAP, ..long() };
    assert_eq!(error_code(&mut tables, &paging, LINEAR, supervisor(Read)), fault::PRESENT);
    let code = fault::PRESENT | fault::WRITE;
    assert_eq!(error_code(&mut tables, &paging, LINEAR, supervisor(Write)), code);
    physical(&mut tables, &paging, LINEAR, Access::explicit(Write, 0, rflags::AC));
    let implicit = Access::implicit(Read);
    assert_eq!(error_code(&mut tables, &paging, LINEAR, implicit), fault::PRESENT);
    physical(&mut tables, &paging, LINEAR, user(Write));
    physical(&mut tables, &paging, LINEAR, supervisor(Execute));
}

#[test]
fn smap_holds_without_write_protection_too() {
    let mut tables = Tables::four_levels(P | US);
    let paging = Paging { cr0: cr0::PE | cr0::PG, cr4: cr4::PAE | cr4::SMAP, ..long() };
    let code = fault::PRESENT | fault::WRITE;
    assert_eq!(error_code(&mut tables, &paging, LINEAR, supervisor(Write)), code);
    physical(&mut tables, &paging, LINEAR, Access::explicit(Write, 0, rflags::AC));
}

#[test]
fn reserved_bits_fault_at_every_level() {
    let too_wide = 1 << 40;
    for (table, index) in [(PML4, 1), (PDPT, 2), (PD, 3), (PT, 4)] {
        let mut tables = Tables::four_levels(P | RW | US);
        let value = tables.get(table, index);
        tables.set(table, index, value | too_wide);
        let code = fault::PRESENT | fault::RESERVED | fault::USER;
        assert_eq!(error_code(&mut tables, &long(), LINEAR, user(Read)), code);
    }
    for (table, index, value) in [
        (PML4, 1, PDPT | P | PS),
        (PDPT, 2, 1 << 30 | 1 << 29 | P | PS),
        (PD, 3, 1 << 21 | 1 << 13 | P | PS),
    ] {
        let mut tables = Tables::four_levels(P);
        tables.set(table, index, value);
        let code = fault::PRESENT | fault::RESERVED;
        assert_eq!(error_code(&mut tables, &long(), LINEAR, supervisor(Read)), code);
    }
}

#[test]
fn bit_7_of_a_4_kib_entry_is_not_a_size() {
    let mut tables = Tables::four_levels(P);
    tables.set(PT, 4, FRAME | P | PS);
    assert_eq!(physical(&mut tables, &long(), LINEAR, supervisor(Read)), FRAME + 0x123);
}

#[test]
fn reads_set_accessed_bits_and_writes_the_dirty_bit_of_the_leaf() {
    let mut tables = Tables::four_levels(P | RW);
    physical(&mut tables, &long(), LINEAR, supervisor(Read));
    let bits = |tables: &Tables| {
        [(PML4, 1), (PDPT, 2), (PD, 3), (PT, 4)]
            .map(|(table, index)| tables.get(table, index) & (A | D))
    };
    assert_eq!(bits(&tables), [A, A, A, A]);
    physical(&mut tables, &long(), LINEAR, supervisor(Write));
    assert_eq!(bits(&tables), [A, A, A, A | D]);
}

#[test]
fn a_fault_leaves_the_dirty_bit_alone() {
    let mut tables = Tables::four_levels(P | US);
    error_code(&mut tables, &long(), LINEAR, user(Write));
    assert_eq!(tables.get(PT, 4) & D, 0);
}

#[test]
fn an_entry_that_changes_during_the_walk_is_read_again() {
    let mut tables = Tables::four_levels(P | RW);
    tables.racing = Some((PT + 8 * 4, 0));
    assert_eq!(error_code(&mut tables, &long(), LINEAR, supervisor(Write)), fault::WRITE);
    assert_eq!(tables.get(PT, 4), 0);
}

#[test]
fn tables_outside_ram_are_unsupported() {
    let mut tables = Tables::four_levels(P);
    tables.set(PDPT, 2, 0xF_FFFF_F000 | P);
    let found = translate(&mut tables, &long(), LINEAR, supervisor(Read));
    assert!(matches!(found, Err(Stop::Unsupported(_))), "{found:?}");
}

fn pae() -> Paging {
    Paging { cr3: PDPT | 0x20, efer: efer::NXE, ..long() }
}

#[test]
fn pae_starts_at_one_of_four_pointers() {
    let mut tables = Tables::default();
    tables.quads.insert(PDPT + 0x20 + 8 * 3, PD | P);
    tables.set(PD, 3, PT | P | RW | US);
    tables.set(PT, 4, 0x12_3456_7000 | P | RW | US);
    let linear = 3 << 30 | 3 << 21 | 4 << 12 | 0x89A;
    assert_eq!(physical(&mut tables, &pae(), linear, user(Write)), 0x12_3456_789A);
    assert_eq!(tables.quads[&(PDPT + 0x38)], PD | P, "a pointer has no accessed bit");
    for reserved in [RW, US, 1 << 5, 1 << 8, NX, 1 << 52, 1 << 40] {
        tables.quads.insert(PDPT + 0x38, PD | P | reserved);
        let code = fault::PRESENT | fault::RESERVED;
        assert_eq!(error_code(&mut tables, &pae(), linear, supervisor(Read)), code);
    }
}

#[test]
fn pae_reserves_bits_62_to_52() {
    let mut tables = Tables::default();
    tables.quads.insert(PDPT + 0x20, PD | P);
    tables.set(PD, 3, 1 << 52 | 2 << 21 | P | PS);
    let linear = 3 << 21;
    let code = fault::PRESENT | fault::RESERVED;
    assert_eq!(error_code(&mut tables, &pae(), linear, supervisor(Read)), code);
    tables.set(PD, 3, NX | 2 << 21 | P | PS);
    assert_eq!(physical(&mut tables, &pae(), linear, supervisor(Read)), 2 << 21);
}

fn legacy() -> Paging {
    Paging { cr3: PD, cr4: cr4::PSE, efer: 0, ..long() }
}

#[test]
fn legacy_paging_has_two_levels_of_4_byte_entries() {
    let mut tables = Tables::default();
    tables.set_u32(PD, 5, (PT | P | RW) as u32);
    tables.set_u32(PT, 7, 0xABCD_E003);
    let linear = 5 << 22 | 7 << 12 | 0x321;
    assert_eq!(physical(&mut tables, &legacy(), linear, supervisor(Write)), 0xABCD_E321);
    assert_eq!(tables.read_u32(PT + 28), Some(0xABCD_E063));
    assert_eq!(error_code(&mut tables, &legacy(), linear, user(Execute)), 0x5);
}

#[test]
fn legacy_4_mib_pages_reach_40_bits() {
    let mut tables = Tables::default();
    let high = 0xA5 << 13;
    tables.set_u32(PD, 5, 0x0340_0083 | high);
    let linear = 5 << 22 | 0x3F_1234;
    let found = translate(&mut tables, &legacy(), linear, supervisor(Write)).unwrap();
    assert_eq!(found, Translation { physical: 0xA5_037F_1234, page_bytes: 4 << 20 });
    let narrow = Paging { physical_bits: 36, ..legacy() };
    assert_eq!(error_code(&mut tables, &narrow, linear, supervisor(Read)), 0x9);
    tables.set_u32(PD, 5, 0x0360_0083);
    assert_eq!(error_code(&mut tables, &legacy(), linear, supervisor(Read)), 0x9);
}

#[test]
fn without_pse_the_size_bit_is_ignored() {
    let mut tables = Tables::default();
    tables.set_u32(PD, 5, (PT | P | PS) as u32);
    tables.set_u32(PT, 7, 0xABCD_E001);
    let paging = Paging { cr4: 0, ..legacy() };
    assert_eq!(physical(&mut tables, &paging, 5 << 22 | 7 << 12, supervisor(Read)), 0xABCD_E000);
}

proptest! {
    #[test]
    fn arbitrary_tables_never_panic(
        registers in any::<[u64; 4]>(),
        physical_bits in any::<u8>(),
        entries in proptest::collection::vec((0u64..4096, any::<u64>()), 64),
        linear in any::<u64>(),
        user in any::<bool>(),
        write in any::<bool>(),
    ) {
        let [cr0, cr3, cr4, efer] = registers;
        let paging =
            Paging { cr0: cr0 | cr0::PG, cr3: cr3 & 0xF_FFFF, cr4, efer, physical_bits };
        let mut tables = Tables::default();
        for (place, value) in entries {
            tables.set(cr3 & 0xF_F000, place % 512, value & !(0xF_FFFF << 32) | P);
            tables.set(value & 0xF_F000, place % 512, value | P);
        }
        let kind = if write { Write } else { Read };
        let access = Access { kind, user, alignment_check: false };
        let _ = translate(&mut tables, &paging, linear, access);
    }
}
