//! The port devices that every machine has: on the bus, and in the ACPI tables.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::backend::console::Backend;
use devices::bus::{Bus, BusDevice, BusError};
use devices::event::MachineEvents;
use devices::legacy::debug_exit::{self, DebugExit};
use devices::legacy::generic_event::{self, GenericEvents};
use devices::legacy::i8042::{self, I8042};
use devices::legacy::power::{self, PowerControl};
use devices::legacy::pvpanic::{self, Pvpanic};
use devices::legacy::serial::{self, Console, SerialPort};
use kvm_ioctls::VmFd;

use super::{Mailbox, VmError};
use crate::arch::x86_64::topology::Topology;
use crate::boot::acpi::{EventDevice, MmioDevice, Platform, PortDevice, PowerRegisters};
use crate::config::VmConfig;
use crate::event_loop::EventLoop;
use crate::irq::{IrqLine, gsi};

/// The devices that something else needs to reach.
pub struct Legacy {
    /// All of them by their ports.
    pub ports: Bus,
    /// The serial port's other end.
    pub console: Console,
    /// The pseudo-terminal that it leads to, if it does.
    pub console_path: Option<PathBuf>,
    /// Holds the power button.
    pub events: Arc<GenericEvents>,
}

/// Creates the devices, the serial port in front of `backend`.
pub fn attach(
    config: &VmConfig,
    backend: Backend,
    vm: &Arc<VmFd>,
    mailbox: &Arc<Mailbox>,
    event_loop: &mut EventLoop,
) -> Result<Legacy, VmError> {
    let failed = |source| VmError::Serial { given: config.serial.to_string(), source };
    let owner = || Arc::clone(mailbox) as Arc<dyn MachineEvents>;
    let line = |gsi| Arc::new(IrqLine::new(Arc::clone(vm), gsi));
    let console_path = backend.pty_path().map(Path::to_owned);
    let com1 = SerialPort::create(backend, line(gsi::COM1), owner()).map_err(failed)?;
    event_loop.add(com1.pump);

    let (data, command) = I8042::ports(owner());
    let mut ports = Bus::new();
    ports.insert(serial::COM1_BASE, serial::COM1_LEN, com1.port)?;
    ports.insert(i8042::I8042_DATA_PORT, i8042::I8042_PORT_LEN, data)?;
    ports.insert(i8042::I8042_COMMAND_PORT, i8042::I8042_PORT_LEN, command)?;
    let debug_exit = Arc::new(DebugExit::new(owner()));
    ports.insert(debug_exit::DEBUG_EXIT_BASE, debug_exit::DEBUG_EXIT_LEN, debug_exit)?;
    let pvpanic = Arc::new(Pvpanic::new(owner()));
    ports.insert(pvpanic::PVPANIC_BASE, pvpanic::PVPANIC_LEN, pvpanic)?;
    let power = Arc::new(PowerControl::new(owner()));
    insert(&mut ports, power::POWER_BASE, power::POWER_LEN, power)?;
    let events = Arc::new(GenericEvents::new(line(gsi::GENERIC_EVENT)));
    let (base, len) = (generic_event::GENERIC_EVENT_BASE, generic_event::GENERIC_EVENT_LEN);
    insert(&mut ports, base, len, Arc::clone(&events) as Arc<dyn BusDevice>)?;
    Ok(Legacy { ports, console: com1.console, console_path, events })
}

fn insert(
    ports: &mut Bus,
    base: u16,
    len: u16,
    device: Arc<dyn BusDevice>,
) -> Result<(), BusError> {
    ports.insert(base.into(), len.into(), device)
}

/// The machine as the ACPI tables tell it: `cpus` processors, the devices of [`attach`] and those
/// of `virtio_mmio`.
pub fn platform<'a>(
    cpus: u32,
    topology: &'a Topology,
    virtio_mmio: &'a [MmioDevice],
) -> Platform<'a> {
    Platform {
        cpus,
        topology,
        com1: PortDevice {
            base: serial::COM1_BASE as u16,
            length: serial::COM1_LEN as u8,
            gsi: gsi::COM1,
        },
        pvpanic_port: pvpanic::PVPANIC_BASE as u16,
        power: PowerRegisters {
            sleep_control_port: power::POWER_BASE + power::SLEEP_CONTROL,
            sleep_status_port: power::POWER_BASE + power::SLEEP_STATUS,
            sleep_type_s5: power::SLEEP_TYPE_S5,
            reset_port: power::POWER_BASE + power::RESET,
            reset_value: power::RESET_VALUE,
        },
        events: EventDevice {
            port: generic_event::GENERIC_EVENT_BASE,
            power_button: generic_event::POWER_BUTTON,
            gsi: gsi::GENERIC_EVENT,
        },
        virtio_mmio,
    }
}
