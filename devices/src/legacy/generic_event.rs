//! The generic event device's register (ACPI 6.5 §5.6.9): it says which events an interrupt stands
//! for. The guest's AML reads it and notifies the devices concerned.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::bus::BusDevice;
use crate::interrupt::Interrupt;

/// The register's port.
pub const GENERIC_EVENT_BASE: u16 = 0x604;
/// Ports taken.
pub const GENERIC_EVENT_LEN: u16 = 1;

/// The power button was pressed.
pub const POWER_BUTTON: u8 = 1 << 0;

/// Events that wait for the guest. Reading the register gives them and clears them; writes do
/// nothing.
pub struct GenericEvents {
    pending: AtomicU8,
    interrupt: Arc<dyn Interrupt>,
}

impl GenericEvents {
    /// A register without events that announces them by `interrupt`.
    pub fn new(interrupt: Arc<dyn Interrupt>) -> Self {
        Self { pending: AtomicU8::new(0), interrupt }
    }

    /// Presses the power button. A guest that has not read the last press yet sees one.
    ///
    /// # Errors
    /// The interrupt could not be raised.
    pub fn press_power_button(&self) -> io::Result<()> {
        self.pending.fetch_or(POWER_BUTTON, Ordering::SeqCst);
        self.interrupt.trigger()
    }

    /// Whether an event waits that the guest has not read: it has no driver for the device, or has
    /// not come to it yet.
    pub fn is_pending(&self) -> bool {
        self.pending.load(Ordering::SeqCst) != 0
    }
}

impl BusDevice for GenericEvents {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (0, Some(first)) = (offset, data.first_mut()) {
            *first = self.pending.swap(0, Ordering::SeqCst);
        }
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeInterrupt;

    fn device() -> (GenericEvents, Arc<FakeInterrupt>) {
        let line = Arc::new(FakeInterrupt::default());
        (GenericEvents::new(line.clone()), line)
    }

    fn read(events: &GenericEvents) -> u8 {
        let mut data = [0xaa];
        events.read(0, &mut data);
        data[0]
    }

    #[test]
    fn a_press_interrupts_and_is_read_once() {
        let (events, line) = device();

        events.press_power_button().unwrap();

        assert_eq!((line.count(), events.is_pending()), (1, true));
        assert_eq!((read(&events), read(&events)), (POWER_BUTTON, 0));
        assert!(!events.is_pending());
    }

    #[test]
    fn presses_that_nobody_reads_become_one_event_but_interrupt_each() {
        let (events, line) = device();

        events.press_power_button().unwrap();
        events.press_power_button().unwrap();

        assert_eq!((line.count(), read(&events), read(&events)), (2, POWER_BUTTON, 0));
    }

    #[test]
    fn other_accesses_change_nothing() {
        let (events, _) = device();
        events.press_power_button().unwrap();

        let mut data = [0; 2];
        events.read(1, &mut data);
        events.read(0, &mut []);
        events.write(0, &[0xff]);

        assert_eq!((data, read(&events)), ([0xff; 2], POWER_BUTTON));
    }
}
