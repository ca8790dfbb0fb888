use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;

use super::*;
use crate::arch::x86_64::topology::Topology;
use crate::boot::testing::{ram, read_bytes};
use crate::memory::layout::{IO_APIC, VIRTIO_MMIO_START};

fn platform<'a>(cpus: u32, topology: &'a Topology, virtio: &'a [MmioDevice]) -> Platform<'a> {
    Platform {
        cpus,
        topology,
        com1: PortDevice { base: 0x3f8, length: 8, gsi: 4 },
        pvpanic_port: 0x505,
        power: PowerRegisters {
            sleep_control_port: 0x600,
            sleep_status_port: 0x601,
            sleep_type_s5: 5,
            reset_port: 0x602,
            reset_value: 1,
        },
        events: EventDevice { port: 0x604, power_button: 1, gsi: 23 },
        virtio_mmio: virtio,
    }
}

fn virtio(count: u32) -> Vec<MmioDevice> {
    let device = |index: u32| MmioDevice {
        base: VIRTIO_MMIO_START as u32 + index * 0x1000,
        size_bytes: 0x1000,
        gsi: 5 + index,
    };
    (0..count).map(device).collect()
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The table at `address`, its signature, length and checksum checked.
fn table_at(ram: &GuestRam, address: u64, signature: &[u8; 4]) -> Vec<u8> {
    let header = read_bytes(ram, address, 36);
    assert_eq!(&header[..4], signature);
    assert_eq!(address % ALIGNMENT_BYTES, 0);
    let bytes = read_bytes(ram, address, u32_at(&header, 4) as usize);
    assert_eq!(sum(&bytes), 0, "checksum of {signature:?}");
    bytes
}

/// FADT, MADT and DSDT, found as a kernel finds them.
fn find(ram: &GuestRam, rsdp: u64) -> [Vec<u8>; 3] {
    let root = read_bytes(ram, rsdp, 36);
    assert_eq!((&root[..8], root[15]), (&b"RSD PTR "[..], 2));
    assert_eq!((sum(&root[..20]), sum(&root)), (0, 0));
    let xsdt = table_at(ram, u64_at(&root, 24), b"XSDT");
    assert_eq!(xsdt.len(), 36 + 2 * 8);
    let fadt = table_at(ram, u64_at(&xsdt, 36), b"FACP");
    let madt = table_at(ram, u64_at(&xsdt, 44), b"APIC");
    let dsdt = table_at(ram, u64_at(&fadt, 140), b"DSDT");
    [fadt, madt, dsdt]
}

fn written(cpus: u32, topology: &Topology, virtio: &[MmioDevice]) -> [Vec<u8>; 3] {
    let ram = ram(16);
    let rsdp = write(&ram, &platform(cpus, topology, virtio)).unwrap();
    assert_eq!(rsdp, RSDP_AREA);
    find(&ram, rsdp)
}

/// The MADT's structures: type and the whole structure.
fn structures(madt: &[u8]) -> Vec<(u8, &[u8])> {
    let mut rest = &madt[44..];
    let mut found = Vec::new();
    while !rest.is_empty() {
        let (structure, behind) = rest.split_at(rest[1].into());
        found.push((structure[0], structure));
        rest = behind;
    }
    found
}

/// UID and APIC id of every processor in the MADT.
fn processors(madt: &[u8]) -> Vec<(u32, u32)> {
    let processor = |(kind, bytes): (u8, &[u8])| match kind {
        0 => {
            assert_eq!((bytes.len(), u32_at(bytes, 4)), (8, 1));
            Some((bytes[2].into(), bytes[3].into()))
        }
        9 => {
            assert_eq!((bytes.len(), u32_at(bytes, 8)), (16, 1));
            Some((u32_at(bytes, 12), u32_at(bytes, 4)))
        }
        _ => None,
    };
    structures(madt).into_iter().filter_map(processor).collect()
}

#[test]
fn every_processor_is_in_the_madt_by_the_apic_id_of_its_topology() {
    for cpus in 1..=64 {
        let topology = Topology::flat(cpus);
        let [_, madt, _] = written(cpus, &topology, &[]);

        let expected: Vec<_> = (0..cpus).map(|cpu| (cpu, topology.apic_id(cpu))).collect();
        assert_eq!(processors(&madt), expected);
    }
}

#[test]
fn apic_ids_from_255_on_have_x2apic_structures() {
    let topology = Topology { threads_per_core: 3, cores_per_socket: 5, sockets: 20 };
    let [_, madt, _] = written(300, &topology, &[]);

    let expected: Vec<_> = (0..300).map(|cpu| (cpu, topology.apic_id(cpu))).collect();
    assert_eq!(processors(&madt), expected);
    let kinds: Vec<u8> = structures(&madt).into_iter().map(|(kind, _)| kind).collect();
    let local = kinds.iter().filter(|kind| **kind == 0).count();
    assert_eq!(local, expected.iter().filter(|(_, id)| *id < 255).count());
    assert_eq!(kinds[300..], [1, 4, 10]);
}

#[test]
fn the_io_apic_starts_at_gsi_0_and_nothing_is_overridden() {
    let [_, madt, _] = written(1, &Topology::flat(1), &[]);

    let found = structures(&madt);
    let kinds: Vec<u8> = found.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, [0, 1, 4]);
    let io_apic = found[1].1;
    assert_eq!((u64::from(u32_at(io_apic, 4)), u32_at(io_apic, 8)), (IO_APIC, 0));
    assert_eq!(found[2].1, [4, 6, 0xff, 0, 0, 1]);
    assert_eq!(u32_at(&madt, 40), 0, "PCAT_COMPAT");
}

#[test]
fn the_fadt_is_hardware_reduced_with_its_three_registers() {
    let [fadt, _, _] = written(1, &Topology::flat(1), &[]);

    assert_eq!((fadt.len(), fadt[8], fadt[131]), (276, 6, 5));
    // WBINVD, PWR_BUTTON, SLP_BUTTON, RESET_REG_SUP, HW_REDUCED_ACPI.
    assert_eq!(u32_at(&fadt, 112), 1 | 1 << 4 | 1 << 5 | 1 << 10 | 1 << 20);
    let register = |at: usize| (fadt[at..at + 4].to_vec(), u64_at(&fadt, at + 4));
    assert_eq!(register(116), (vec![1, 8, 0, 1], 0x602));
    assert_eq!(fadt[128], 1);
    assert_eq!(register(244), (vec![1, 8, 0, 1], 0x600));
    assert_eq!(register(256), (vec![1, 8, 0, 1], 0x601));
}

#[test]
fn tables_beyond_their_area_are_refused() {
    let topology = Topology::flat(1);
    let devices = virtio(4000);

    let refused = write(&ram(16), &platform(1, &topology, &devices)).unwrap_err();

    assert!(matches!(refused, AcpiError::TooLarge { .. }), "{refused}");
}

/// Runs iasl in `folder`; its output when it succeeded.
fn iasl(folder: &Path, arguments: &[&str]) -> String {
    let output = match Command::new("iasl").args(arguments).current_dir(folder).output() {
        Ok(output) => output,
        Err(e) if e.kind() == ErrorKind::NotFound => {
            panic!("iasl is missing; install the package acpica-tools")
        }
        Err(e) => panic!("iasl: {e}"),
    };
    let text = [output.stdout, output.stderr].map(|t| String::from_utf8_lossy(&t).into_owned());
    let text = text.concat();
    assert!(output.status.success(), "iasl {arguments:?}: {text}");
    text
}

#[test]
fn iasl_disassembles_and_recompiles_every_table() {
    let topology = Topology { threads_per_core: 3, cores_per_socket: 5, sockets: 20 };
    let devices = virtio(17);
    let folder = tempfile::tempdir().unwrap();
    let tables = tables(&platform(300, &topology, &devices));
    // iasl reads no RSDP, which has another header than tables have.
    for (name, table) in ["xsdt", "dsdt", "facp", "apic"].into_iter().zip(&tables[1..]) {
        std::fs::write(folder.path().join(name), &table.bytes).unwrap();

        iasl(folder.path(), &["-d", name]);
        let source = format!("{name}.dsl");
        let said = iasl(folder.path(), &["-vs", &source]);

        assert!(said.contains(" 0 Errors"), "{name}: {said}");
        let again = std::fs::read(folder.path().join(format!("{name}.aml"))).unwrap();
        assert_eq!(again.len(), table.bytes.len(), "{name}");
    }
    let text = std::fs::read_to_string(folder.path().join("dsdt.dsl")).unwrap();
    for id in ["PNP0501", "PNP0C0C", "ACPI0013", "QEMU0001", "LNRO0005"] {
        assert!(text.contains(id), "no {id} in {text}");
    }
}
