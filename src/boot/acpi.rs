//! The ACPI 6.5 tables of a hardware-reduced machine (§4.1): RSDP, XSDT, FADT, MADT and DSDT.
//!
//! Hardware-reduced means that there is no PM1 block, no SCI and no 8259 to look after: a kernel
//! takes every interrupt from the I/O APIC, sleeps and resets by the registers that the FADT names,
//! and hears of the power button through the generic event device. The interrupt of COM1 stands in
//! the DSDT only, so that a kernel needs a driver that reads it there (CONFIG_SERIAL_8250_PNP in
//! Linux). Processors are in the MADT and, having no objects of their own to offer, not in the
//! DSDT: on a KVM that interprets guest kernels every object costs.

mod dsdt;
mod madt;
#[cfg(test)]
mod tests;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::arch::x86_64::topology::Topology;
use crate::memory::GuestRam;
use crate::memory::layout::{HIGH_MEMORY_START, RSDP_AREA};

const OEM_ID: [u8; 6] = *b"ALCOVE";
const OEM_TABLE_ID: [u8; 8] = *b"ALCOVEVM";
const OEM_REVISION: u32 = 1;

/// Tables begin at multiples of this; the RSDP must (ACPI 6.5 §5.2.5.1).
const ALIGNMENT_BYTES: u64 = 16;

/// Why the tables are not there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AcpiError {
    /// They need more room than the ROM area has.
    #[error(
        "the ACPI tables take {size_bytes} bytes, there is room for {room_bytes}; give it fewer \
         --cpus or devices"
    )]
    TooLarge {
        /// The size of all tables.
        size_bytes: u64,
        /// The size of the area.
        room_bytes: u64,
    },
    /// Guest memory refused a write.
    #[error("the ACPI tables cannot be written")]
    Memory(#[from] GuestMemoryError),
}

/// The machine that the tables describe.
#[derive(Debug, Clone, Copy)]
pub struct Platform<'a> {
    /// Logical processors, numbered from 0; at least 1.
    pub cpus: u32,
    /// Their arrangement, which gives each its APIC id.
    pub topology: &'a Topology,
    /// A 16550A.
    pub com1: PortDevice,
    /// A pvpanic device: one port.
    pub pvpanic_port: u16,
    /// The registers for sleep and reset.
    pub power: PowerRegisters,
    /// The generic event device.
    pub events: EventDevice,
    /// virtio-mmio register blocks, each below 4 GiB.
    pub virtio_mmio: &'a [MmioDevice],
}

/// A device with ports and an edge-triggered interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortDevice {
    /// Its first port.
    pub base: u16,
    /// How many ports.
    pub length: u8,
    /// Its global system interrupt.
    pub gsi: u32,
}

/// A device with a register block in memory and an edge-triggered interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioDevice {
    /// Guest physical address of the block.
    pub base: u32,
    /// Length of the block in bytes.
    pub size_bytes: u32,
    /// Its global system interrupt.
    pub gsi: u32,
}

/// Ports of the sleep and reset registers, 8 bits each (ACPI 6.5 §4.8.3.6 and §4.8.3.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PowerRegisters {
    /// SLEEP_CONTROL_REG.
    pub sleep_control_port: u16,
    /// SLEEP_STATUS_REG.
    pub sleep_status_port: u16,
    /// SLP_TYP of S5, soft off.
    pub sleep_type_s5: u8,
    /// RESET_REG.
    pub reset_port: u16,
    /// RESET_VALUE.
    pub reset_value: u8,
}

/// The generic event device (ACPI 6.5 §5.6.9): one register of 8 bits, cleared by reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventDevice {
    /// The register's port.
    pub port: u16,
    /// The bit that says that the power button was pressed, as a mask.
    pub power_button: u8,
    /// Its global system interrupt, edge-triggered.
    pub gsi: u32,
}

/// Writes the tables for `platform` into [`RSDP_AREA`] and returns the RSDP's address, which
/// [`BootSources`](super::params::BootSources) takes.
pub fn write(ram: &GuestRam, platform: &Platform<'_>) -> Result<u64, AcpiError> {
    let tables = tables(platform);
    let room_bytes = HIGH_MEMORY_START - RSDP_AREA;
    let size_bytes = tables.last().map_or(0, |last| last.address - RSDP_AREA + last.size_bytes());
    if size_bytes > room_bytes {
        return Err(AcpiError::TooLarge { size_bytes, room_bytes });
    }
    for table in &tables {
        ram.memory().write_slice(&table.bytes, GuestAddress(table.address))?;
    }
    Ok(RSDP_AREA)
}

/// A table and where it goes.
#[derive(Debug)]
struct Table {
    address: u64,
    bytes: Vec<u8>,
}

impl Table {
    /// Places `content` behind `previous`.
    fn after(previous: &Table, content: &dyn Aml) -> Self {
        let end = previous.address + previous.size_bytes();
        Self { address: end.next_multiple_of(ALIGNMENT_BYTES), bytes: bytes_of(content) }
    }

    fn size_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }
}

/// All tables by ascending address, the RSDP first. Each is placed before those that point to it
/// are made, so room for the RSDP and the XSDT is left ahead.
fn tables(platform: &Platform<'_>) -> [Table; 5] {
    let rsdp_place = Table { address: RSDP_AREA, bytes: vec![0; Rsdp::len()] };
    let xsdt_place = Table::after(&rsdp_place, &xsdt([0, 0]));
    let dsdt = Table::after(&xsdt_place, &dsdt::table(platform));
    let fadt = Table::after(&dsdt, &fadt(&platform.power, dsdt.address));
    let madt = Table::after(&fadt, &madt::table(platform.cpus, platform.topology));
    let xsdt =
        Table { address: xsdt_place.address, bytes: bytes_of(&xsdt([fadt.address, madt.address])) };
    let rsdp =
        Table { address: rsdp_place.address, bytes: bytes_of(&Rsdp::new(OEM_ID, xsdt.address)) };
    [rsdp, xsdt, dsdt, fadt, madt]
}

fn bytes_of(content: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    content.to_aml_bytes(&mut bytes);
    bytes
}

fn xsdt(entries: [u64; 2]) -> XSDT {
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    entries.into_iter().for_each(|entry| xsdt.add_entry(entry));
    xsdt
}

fn fadt(power: &PowerRegisters, dsdt: u64) -> impl Aml {
    /// IA-PC boot architecture flags (ACPI 6.5 table 5.11). Bit 1 (8042) is clear: there is no
    /// keyboard, and the reset line works without a driver.
    const NO_VGA: u16 = 1 << 2;
    const NO_CMOS_RTC: u16 = 1 << 5;
    let flags = [
        Flags::Wbinvd,
        // Neither button is a fixed one.
        Flags::PwrButton,
        Flags::SlpButton,
        Flags::ResetRegSup,
        Flags::HwReducedAcpi,
    ];
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION).dsdt_64(dsdt);
    fadt = flags.into_iter().fold(fadt, FADTBuilder::flag);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.reset_reg = byte_port(power.reset_port);
    fadt.reset_value = power.reset_value;
    fadt.sleep_control_reg = byte_port(power.sleep_control_port);
    fadt.sleep_status_reg = byte_port(power.sleep_status_port);
    fadt.finalize()
}

/// A register of 8 bits in I/O space.
fn byte_port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}
