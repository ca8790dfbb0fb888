//! ACPI's sleep and reset registers of a hardware-reduced machine (ACPI 6.5 §4.8.3.6 and §4.8.3.7):
//! what is left of power management when there is no PM1 block.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::event::{MachineEvent, MachineEvents};

/// The first port.
pub const POWER_BASE: u16 = 0x600;
/// Ports taken: one for each of the registers.
pub const POWER_LEN: u16 = 3;

/// Offset of SLEEP_CONTROL_REG, 8 bits.
pub const SLEEP_CONTROL: u16 = 0;
/// Offset of SLEEP_STATUS_REG, 8 bits.
pub const SLEEP_STATUS: u16 = 1;
/// Offset of RESET_REG, 8 bits.
pub const RESET: u16 = 2;

/// RESET_VALUE: what resets the machine when it is written to RESET_REG.
pub const RESET_VALUE: u8 = 1;
/// The SLP_TYP of S5, soft off: the only sleep state.
pub const SLEEP_TYPE_S5: u8 = 5;

/// Fields of SLEEP_CONTROL_REG (ACPI 6.5 table 4.22).
mod sleep_control {
    pub const SLP_TYP_SHIFT: u32 = 2;
    pub const SLP_TYP_MASK: u8 = 0b111;
    pub const SLP_EN: u8 = 1 << 5;
}

/// The registers. Writing SLP_EN with [`SLEEP_TYPE_S5`] posts [`MachineEvent::PowerOff`], writing
/// [`RESET_VALUE`] posts [`MachineEvent::Reset`]; any other write does nothing.
///
/// All registers read as zero: SLP_EN does by definition, WAK_STS since the machine never wakes.
pub struct PowerControl {
    events: Arc<dyn MachineEvents>,
}

impl PowerControl {
    /// Registers that post to `events`.
    pub fn new(events: Arc<dyn MachineEvents>) -> Self {
        Self { events }
    }
}

/// What writing `value` to the register at `offset` asks for.
fn event_of(offset: u16, value: u8) -> Option<MachineEvent> {
    match offset {
        SLEEP_CONTROL => {
            let sleep_type = value >> sleep_control::SLP_TYP_SHIFT & sleep_control::SLP_TYP_MASK;
            let enabled = value & sleep_control::SLP_EN != 0;
            (enabled && sleep_type == SLEEP_TYPE_S5).then_some(MachineEvent::PowerOff)
        }
        RESET => (value == RESET_VALUE).then_some(MachineEvent::Reset),
        _ => None,
    }
}

impl BusDevice for PowerControl {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let behind = u64::from(POWER_LEN).saturating_sub(offset);
        for (byte, register) in data.iter_mut().zip(0u64..) {
            *byte = if register < behind { 0 } else { 0xff };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // A wide access reaches the registers that it covers.
        let Ok(first) = u16::try_from(offset) else { return };
        for (&value, index) in data.iter().zip(0u16..) {
            let event = first.checked_add(index).and_then(|offset| event_of(offset, value));
            if let Some(event) = event {
                self.events.post(event);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::EventRecorder;

    fn device() -> (PowerControl, Arc<EventRecorder>) {
        let events = Arc::new(EventRecorder::default());
        (PowerControl::new(events.clone()), events)
    }

    #[test]
    fn only_soft_off_with_sleep_enable_powers_off() {
        let (power, events) = device();
        for value in 0..=u8::MAX {
            power.write(SLEEP_CONTROL.into(), &[value]);
            let soft_off = value >> 5 & 1 == 1 && value >> 2 & 7 == 5;
            let expected = if soft_off { vec![MachineEvent::PowerOff] } else { vec![] };
            assert_eq!(events.take(), expected, "value {value:#x}");
        }
    }

    #[test]
    fn only_the_reset_value_resets() {
        let (power, events) = device();
        for value in 0..=u8::MAX {
            power.write(RESET.into(), &[value]);
            let expected = if value == RESET_VALUE { vec![MachineEvent::Reset] } else { vec![] };
            assert_eq!(events.take(), expected, "value {value:#x}");
        }
    }

    #[test]
    fn clearing_the_wake_status_and_writes_elsewhere_do_nothing() {
        let (power, events) = device();
        power.write(SLEEP_STATUS.into(), &[0x80]);
        power.write(POWER_LEN.into(), &[RESET_VALUE]);
        power.write(u64::MAX, &[RESET_VALUE; 8]);
        power.write(u16::MAX.into(), &[RESET_VALUE; 8]);
        power.write(SLEEP_CONTROL.into(), &[]);
        assert_eq!(events.take(), []);
    }

    #[test]
    fn a_wide_write_reaches_each_register_that_it_covers() {
        let (power, events) = device();
        power.write(SLEEP_STATUS.into(), &[0x80, RESET_VALUE]);
        assert_eq!(events.take(), [MachineEvent::Reset]);
    }

    #[test]
    fn registers_read_as_zero_and_what_is_behind_them_as_ones() {
        let (power, _) = device();
        for (offset, expected) in [(0, [0, 0, 0, 0xff]), (2, [0, 0xff, 0xff, 0xff])] {
            let mut data = [0xaa; 4];
            power.read(offset, &mut data);
            assert_eq!(data, expected);
        }
        let mut data = [0];
        power.read(u64::MAX, &mut data);
        assert_eq!(data, [0xff]);
    }
}
