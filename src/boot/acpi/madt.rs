//! The MADT: interrupt controllers and, by their local APICs, processors (ACPI 6.5 §5.2.12).

use acpi_tables::Aml;
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::sdt::Sdt;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::arch::x86_64::topology::Topology;
use crate::memory::layout::{IO_APIC, LOCAL_APIC};

/// The MADT's revision in ACPI 6.5.
const REVISION: u8 = 6;
/// The header that all tables share (ACPI 6.5 §5.2.6).
const HEADER_BYTES: u32 = 36;

/// From this APIC id on a processor has an x2APIC structure; 255 is the broadcast of an xAPIC.
const FIRST_X2APIC_ID: u32 = 255;
/// The I/O APIC's id. It is on a bus of its own, so that it may be one of a processor's.
const IO_APIC_ID: u8 = 0;

/// Structure types (ACPI 6.5 table 5.21).
const LOCAL_APIC_NMI: u8 = 4;
const PROCESSOR_LOCAL_X2APIC: u8 = 9;
const LOCAL_X2APIC_NMI: u8 = 10;

/// Local APIC flags: the processor is ready for use.
const ENABLED: u32 = 1;
/// MPS INTI flags: polarity and trigger mode conform to the bus, for an NMI edge, active high.
const CONFORMS: u16 = 0;
/// The local interrupt input for NMIs, as `regs::wire_lapic` wires it.
const LINT1: u8 = 1;
/// UIDs that stand for all processors.
const ALL_PROCESSORS: u8 = 0xff;
const ALL_X2APIC_PROCESSORS: u32 = u32::MAX;

/// The table for `cpus` processors arranged as `topology`; their UIDs are their numbers.
///
/// There is no interrupt source override: KVM's default routing leads GSI n to input n of the I/O
/// APIC, GSI 0 with the 8254's interrupt among them, so that ISA interrupts are the GSIs of the
/// same number. PCAT_COMPAT is clear: a kernel that reads this table has no use for the 8259.
pub fn table(cpus: u32, topology: &Topology) -> Sdt {
    let mut body = Vec::new();
    // Intel SDM vol. 3, 11.4.1: the address is below 4 GiB.
    body.extend((LOCAL_APIC as u32).to_le_bytes());
    let flags: u32 = 0;
    body.extend(flags.to_le_bytes());
    let mut has_x2apic = false;
    for cpu in 0..cpus {
        let apic_id = topology.apic_id(cpu);
        match (u8::try_from(cpu), u8::try_from(apic_id)) {
            (Ok(uid), Ok(id)) if apic_id < FIRST_X2APIC_ID => {
                let enabled = EnabledStatus::Enabled;
                ProcessorLocalApic::new(uid, id, enabled).to_aml_bytes(&mut body);
            }
            _ => {
                has_x2apic = true;
                body.extend(local_x2apic(cpu, apic_id));
            }
        }
    }
    IoApic::new(IO_APIC_ID, IO_APIC as u32, 0).to_aml_bytes(&mut body);
    body.extend(local_apic_nmi());
    if has_x2apic {
        body.extend(local_x2apic_nmi());
    }
    let mut table = Sdt::new(*b"APIC", HEADER_BYTES, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&body);
    table
}

/// ACPI 6.5 §5.2.12.12.
fn local_x2apic(uid: u32, apic_id: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0] = PROCESSOR_LOCAL_X2APIC;
    bytes[1] = bytes.len() as u8;
    bytes[4..8].copy_from_slice(&apic_id.to_le_bytes());
    bytes[8..12].copy_from_slice(&ENABLED.to_le_bytes());
    bytes[12..].copy_from_slice(&uid.to_le_bytes());
    bytes
}

/// ACPI 6.5 §5.2.12.7: LINT1 of every processor is an NMI.
fn local_apic_nmi() -> [u8; 6] {
    let [flags_low, flags_high] = CONFORMS.to_le_bytes();
    [LOCAL_APIC_NMI, 6, ALL_PROCESSORS, flags_low, flags_high, LINT1]
}

/// ACPI 6.5 §5.2.12.13: the same for those with an x2APIC structure.
fn local_x2apic_nmi() -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[0] = LOCAL_X2APIC_NMI;
    bytes[1] = bytes.len() as u8;
    bytes[2..4].copy_from_slice(&CONFORMS.to_le_bytes());
    bytes[4..8].copy_from_slice(&ALL_X2APIC_PROCESSORS.to_le_bytes());
    bytes[8] = LINT1;
    bytes
}
