//! The PC's keyboard controller (Intel 8042), without a keyboard: what is left is the reset line.
//!
//! Operating systems reset a PC by command 0xfe. Linux also probes the controller for a keyboard
//! and a mouse, which costs thousands of exits and seconds of time-outs where none answers. It
//! begins by emptying the output buffer and gives up, with "No controller found", once it has read
//! 16 bytes and there are still more. So this controller powers up with more stale bytes than
//! that: Linux leaves after 33 accesses, a driver that drains without a limit ends too, and one
//! that sends the self-test finds a working controller with nothing attached.

use std::sync::{Arc, Mutex, PoisonError};

use crate::bus::BusDevice;
use crate::event::{MachineEvent, MachineEvents};

/// The data port.
pub const I8042_DATA_PORT: u64 = 0x60;
/// The status (read) and command (write) port.
pub const I8042_COMMAND_PORT: u64 = 0x64;
/// Ports taken at each of the two.
pub const I8042_PORT_LEN: u64 = 1;

/// Bytes in the output buffer at power-up; Linux's driver gives up past 16.
const STALE_BYTES: u8 = 32;

/// Bits of the status register.
mod status {
    /// Output buffer full: the data port holds a byte for the host.
    pub const OUTPUT_BUFFER_FULL: u8 = 1 << 0;
    /// System flag: the self-test passed.
    pub const SYSTEM: u8 = 1 << 2;
    /// The last write went to the command port.
    pub const COMMAND: u8 = 1 << 3;
    /// The keyboard is not locked.
    pub const UNLOCKED: u8 = 1 << 4;
}

/// Commands, written to the command port.
mod command {
    pub const READ_COMMAND_BYTE: u8 = 0x20;
    pub const WRITE_COMMAND_BYTE: u8 = 0x60;
    pub const DISABLE_AUX: u8 = 0xa7;
    pub const ENABLE_AUX: u8 = 0xa8;
    pub const TEST_AUX: u8 = 0xa9;
    pub const SELF_TEST: u8 = 0xaa;
    pub const TEST_KEYBOARD: u8 = 0xab;
    pub const DISABLE_KEYBOARD: u8 = 0xad;
    pub const ENABLE_KEYBOARD: u8 = 0xae;
    pub const READ_OUTPUT_PORT: u8 = 0xd0;
    pub const WRITE_OUTPUT_PORT: u8 = 0xd1;
    pub const WRITE_KEYBOARD_BUFFER: u8 = 0xd2;
    pub const WRITE_AUX_BUFFER: u8 = 0xd3;
    pub const WRITE_AUX: u8 = 0xd4;
    /// Pulses low, for 6 µs, those of output port lines 0 to 3 whose bit in the command is 0.
    pub const PULSE_FIRST: u8 = 0xf0;
    pub const PULSE_LAST: u8 = 0xff;
}

/// Bits of the command byte.
mod command_byte {
    /// System flag, mirrored into the status register.
    pub const SYSTEM: u8 = 1 << 2;
    pub const KEYBOARD_DISABLED: u8 = 1 << 4;
    pub const AUX_DISABLED: u8 = 1 << 5;
    /// Scan codes are translated to set 1.
    pub const TRANSLATE: u8 = 1 << 6;
}

/// Line 0 of the output port: low resets the CPU.
const OUTPUT_PORT_NOT_RESET: u8 = 1 << 0;
/// Line 1 of the output port: high opens address line 20.
const OUTPUT_PORT_A20: u8 = 1 << 1;
/// The self-test's answer when all is well.
const SELF_TEST_PASSED: u8 = 0x55;
/// An interface test's answer when the lines are well.
const INTERFACE_TEST_PASSED: u8 = 0x00;

/// Where the next byte written to the data port goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DataTarget {
    /// The keyboard or mouse, of which there is none.
    Device,
    CommandByte,
    OutputPort,
    /// Back to the host, as if a device had sent it.
    OutputBuffer,
}

/// The controller's logic, without a bus.
#[derive(Debug)]
struct Controller {
    stale_bytes: u8,
    output_buffer: Option<u8>,
    /// What the data port gives while the output buffer is empty: the last byte again.
    last_output: u8,
    command_byte: u8,
    target: DataTarget,
    last_write_was_command: bool,
}

/// What an access asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    None,
    Reset,
}

impl Effect {
    fn of_reset_line(lines: u8) -> Self {
        if lines & OUTPUT_PORT_NOT_RESET == 0 { Self::Reset } else { Self::None }
    }
}

impl Controller {
    fn new() -> Self {
        Self {
            stale_bytes: STALE_BYTES,
            output_buffer: None,
            last_output: 0,
            command_byte: command_byte::SYSTEM
                | command_byte::KEYBOARD_DISABLED
                | command_byte::AUX_DISABLED
                | command_byte::TRANSLATE,
            target: DataTarget::Device,
            last_write_was_command: false,
        }
    }

    fn read_status(&self) -> u8 {
        let mut bits = status::UNLOCKED;
        if self.output_buffer.is_some() || self.stale_bytes > 0 {
            bits |= status::OUTPUT_BUFFER_FULL;
        }
        if self.command_byte & command_byte::SYSTEM != 0 {
            bits |= status::SYSTEM;
        }
        if self.last_write_was_command {
            bits |= status::COMMAND;
        }
        bits
    }

    fn read_data(&mut self) -> u8 {
        if let Some(byte) = self.output_buffer.take() {
            self.last_output = byte;
        } else {
            self.stale_bytes = self.stale_bytes.saturating_sub(1);
        }
        self.last_output
    }

    fn write_command(&mut self, value: u8) -> Effect {
        self.last_write_was_command = true;
        self.target = DataTarget::Device;
        match value {
            command::READ_COMMAND_BYTE => self.answer(self.command_byte),
            command::WRITE_COMMAND_BYTE => self.target = DataTarget::CommandByte,
            command::DISABLE_AUX => self.command_byte |= command_byte::AUX_DISABLED,
            command::ENABLE_AUX => self.command_byte &= !command_byte::AUX_DISABLED,
            command::TEST_AUX | command::TEST_KEYBOARD => self.answer(INTERFACE_TEST_PASSED),
            command::SELF_TEST => {
                self.command_byte |= command_byte::SYSTEM;
                self.answer(SELF_TEST_PASSED);
            }
            command::DISABLE_KEYBOARD => self.command_byte |= command_byte::KEYBOARD_DISABLED,
            command::ENABLE_KEYBOARD => self.command_byte &= !command_byte::KEYBOARD_DISABLED,
            command::READ_OUTPUT_PORT => self.answer(OUTPUT_PORT_NOT_RESET | OUTPUT_PORT_A20),
            command::WRITE_OUTPUT_PORT => self.target = DataTarget::OutputPort,
            command::WRITE_KEYBOARD_BUFFER | command::WRITE_AUX_BUFFER => {
                self.target = DataTarget::OutputBuffer;
            }
            command::WRITE_AUX => self.target = DataTarget::Device,
            command::PULSE_FIRST..=command::PULSE_LAST => return Effect::of_reset_line(value),
            _ => {}
        }
        Effect::None
    }

    fn write_data(&mut self, value: u8) -> Effect {
        self.last_write_was_command = false;
        match std::mem::replace(&mut self.target, DataTarget::Device) {
            DataTarget::Device => {}
            DataTarget::CommandByte => self.command_byte = value,
            DataTarget::OutputBuffer => self.answer(value),
            DataTarget::OutputPort => return Effect::of_reset_line(value),
        }
        Effect::None
    }

    /// Puts `byte` where the data port is read, in place of whatever was there.
    fn answer(&mut self, byte: u8) {
        self.stale_bytes = 0;
        self.output_buffer = Some(byte);
    }
}

/// The controller; its two ports go on the bus separately.
pub struct I8042 {
    controller: Mutex<Controller>,
    events: Arc<dyn MachineEvents>,
}

impl I8042 {
    /// A controller that posts [`MachineEvent::Reset`] to `events`: the device for
    /// [`I8042_DATA_PORT`] and the one for [`I8042_COMMAND_PORT`].
    pub fn ports(events: Arc<dyn MachineEvents>) -> (Arc<dyn BusDevice>, Arc<dyn BusDevice>) {
        let chip = Arc::new(Self { controller: Mutex::new(Controller::new()), events });
        (Arc::new(DataPort(chip.clone())), Arc::new(CommandPort(chip)))
    }

    fn with<T>(&self, access: impl FnOnce(&mut Controller) -> T) -> T {
        access(&mut self.controller.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn apply(&self, effect: Effect) {
        if effect == Effect::Reset {
            self.events.post(MachineEvent::Reset);
        }
    }
}

struct DataPort(Arc<I8042>);
struct CommandPort(Arc<I8042>);

impl BusDevice for DataPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_first(offset, data, || self.0.with(Controller::read_data));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Some(&value)) = (offset, data.first()) {
            let effect = self.0.with(|controller| controller.write_data(value));
            self.0.apply(effect);
        }
    }
}

impl BusDevice for CommandPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_first(offset, data, || self.0.with(|controller| controller.read_status()));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Some(&value)) = (offset, data.first()) {
            let effect = self.0.with(|controller| controller.write_command(value));
            self.0.apply(effect);
        }
    }
}

/// Reads an 8-bit register at offset 0; bytes past it are all ones.
fn read_first(offset: u64, data: &mut [u8], register: impl FnOnce() -> u8) {
    data.fill(0xff);
    if let (0, Some(first)) = (offset, data.first_mut()) {
        *first = register();
    }
}

#[cfg(test)]
mod tests;
