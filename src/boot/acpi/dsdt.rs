//! The DSDT: the devices that a kernel cannot find by itself.

use acpi_tables::aml::{
    And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO,
    If, Interrupt, Memory32Fixed, Method, Name, Notify, ONE, OpRegion, OpRegionSpace, Package,
    Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::{
    EventDevice, MmioDevice, OEM_ID, OEM_REVISION, OEM_TABLE_ID, Platform, PortDevice, bytes_of,
};

/// From revision 2 on integers have 64 bits (ACPI 6.5 §5.2.11.1).
const REVISION: u8 = 2;
/// The header that all tables share (ACPI 6.5 §5.2.6).
const HEADER_BYTES: u32 = 36;
/// A notification of a button: it was pressed (ACPI 6.5 table 5.6.6).
const BUTTON_PRESSED: u8 = 0x80;

/// The table for `platform`.
pub fn table(platform: &Platform<'_>) -> Sdt {
    let mut devices = vec![
        com1(&platform.com1),
        pvpanic(platform.pvpanic_port),
        power_button(),
        event_device(&platform.events),
    ];
    devices.extend((0..).zip(platform.virtio_mmio).map(|(index, d)| virtio_mmio(index, d)));
    let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&soft_off(platform.power.sleep_type_s5));
    table.append_slice(&Scope::raw(Path::new("_SB_"), devices.concat()));
    table
}

/// `\_S5`, whose SLP_TYP tells how to power off (ACPI 6.5 §7.4.2).
fn soft_off(sleep_type: u8) -> Vec<u8> {
    bytes_of(&Name::new("_S5_".into(), &Package::new(vec![&sleep_type])))
}

fn com1(device: &PortDevice) -> Vec<u8> {
    let ports = IO::new(device.base, device.base, 1, device.length);
    let interrupt = edge(device.gsi);
    let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    bytes_of(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ONE),
            &Name::new("_CRS".into(), &resources),
        ],
    ))
}

fn pvpanic(port: u16) -> Vec<u8> {
    let ports = IO::new(port, port, 1, 1);
    bytes_of(&Device::new(
        "PVPN".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports])),
        ],
    ))
}

fn power_button() -> Vec<u8> {
    let id = Name::new("_HID".into(), &EISAName::new("PNP0C0C"));
    bytes_of(&Device::new("PWRB".into(), vec![&id]))
}

/// The generic event device: its interrupt runs _EVT, which notifies whom the register names.
fn event_device(device: &EventDevice) -> Vec<u8> {
    let interrupt = edge(device.gsi);
    let register = Field::new(
        "REGS".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"STAT", 8)],
    );
    let (status, button) = (Path::new("STAT"), Path::new("PWRB"));
    let is_pressed = And::new(&ZERO, &status, &device.power_button);
    let notify = Notify::new(&button, &BUTTON_PRESSED);
    let handle = If::new(&is_pressed, vec![&notify]);
    bytes_of(&Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
            &OpRegion::new("REGS".into(), OpRegionSpace::SystemIO, &device.port, &ONE),
            &register,
            &Method::new("_EVT".into(), 1, true, vec![&handle]),
        ],
    ))
}

fn virtio_mmio(index: u32, device: &MmioDevice) -> Vec<u8> {
    let registers = Memory32Fixed::new(true, device.base, device.size_bytes);
    let interrupt = edge(device.gsi);
    let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
    // Three hexadecimal digits number more devices than there are interrupts or tables take.
    let name = format!("V{:03X}", index % 0x1000);
    bytes_of(&Device::new(
        name.as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &index),
            // DMA is coherent (ACPI 6.5 §6.2.17).
            &Name::new("_CCA".into(), &ONE),
            &Name::new("_CRS".into(), &resources),
        ],
    ))
}

/// An interrupt that the device alone uses: edge-triggered, active high.
fn edge(gsi: u32) -> Interrupt {
    let (consumer, edge_triggered, active_low, shared) = (true, true, false, false);
    Interrupt::new(consumer, edge_triggered, active_low, shared, gsi)
}
