//! The pvpanic ISA device (QEMU docs/specs/pvpanic): a guest tells of its kernel's panic.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::event::{MachineEvent, MachineEvents};

/// The device's port, the specification's default.
pub const PVPANIC_BASE: u64 = 0x505;
/// Ports taken.
pub const PVPANIC_LEN: u64 = 1;

/// The kernel panicked; the host acts on it.
const PANICKED: u8 = 1 << 0;
/// The kernel panicked and the guest deals with it; the host only records it.
const CRASH_LOADED: u8 = 1 << 1;
/// The guest shut down in order.
const SHUTDOWN: u8 = 1 << 2;

/// The pvpanic port. A read gives the events it knows; a write posts the gravest event among the
/// bits set and ignores the bits it does not know.
pub struct Pvpanic {
    events: Arc<dyn MachineEvents>,
}

impl Pvpanic {
    /// A port that posts [`MachineEvent::Panicked`], [`MachineEvent::CrashLoaded`] and
    /// [`MachineEvent::PowerOff`] to `events`.
    pub fn new(events: Arc<dyn MachineEvents>) -> Self {
        Self { events }
    }
}

/// What the bits that a guest wrote mean.
fn event_of(bits: u8) -> Option<MachineEvent> {
    [
        (PANICKED, MachineEvent::Panicked),
        (CRASH_LOADED, MachineEvent::CrashLoaded),
        (SHUTDOWN, MachineEvent::PowerOff),
    ]
    .into_iter()
    .find_map(|(bit, event)| (bits & bit != 0).then_some(event))
}

impl BusDevice for Pvpanic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (0, Some(first)) = (offset, data.first_mut()) {
            *first = PANICKED | CRASH_LOADED | SHUTDOWN;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Some(&bits)) = (offset, data.first())
            && let Some(event) = event_of(bits)
        {
            self.events.post(event);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::EventRecorder;

    #[test]
    fn read_gives_the_supported_events_at_every_width() {
        let port = Pvpanic::new(Arc::new(EventRecorder::default()));
        for width in [1, 2, 4] {
            let mut data = vec![0; width];
            port.read(0, &mut data);
            assert_eq!(data[0], 0b111);
            assert!(data[1..].iter().all(|byte| *byte == 0xff));
        }
    }

    #[test]
    fn every_value_posts_the_gravest_event_it_holds() {
        let events = Arc::new(EventRecorder::default());
        let port = Pvpanic::new(events.clone());
        for value in 0..=u8::MAX {
            port.write(0, &[value]);
            let expected = match value {
                v if v & 1 != 0 => vec![MachineEvent::Panicked],
                v if v & 2 != 0 => vec![MachineEvent::CrashLoaded],
                v if v & 4 != 0 => vec![MachineEvent::PowerOff],
                _ => vec![],
            };
            assert_eq!(events.take(), expected, "value {value:#x}");
        }
    }

    #[test]
    fn accesses_elsewhere_and_empty_ones_do_nothing() {
        let events = Arc::new(EventRecorder::default());
        let port = Pvpanic::new(events.clone());
        port.write(1, &[PANICKED]);
        port.write(0, &[]);
        let mut data = [0];
        port.read(1, &mut data);
        assert_eq!((events.take(), data), (vec![], [0xff]));
    }
}
