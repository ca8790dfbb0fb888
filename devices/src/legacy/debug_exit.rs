//! A port that ends the machine with a status of the guest's choosing.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::event::{MachineEvent, MachineEvents};

/// The first port, where the guests of other monitors look for it.
pub const DEBUG_EXIT_BASE: u64 = 0xf4;
/// Ports taken: a status may be written as one, two or four bytes.
pub const DEBUG_EXIT_LEN: u64 = 4;

/// The offset of the status register, the only one.
const STATUS: u64 = 0;

/// The debug-exit port: a write posts [`MachineEvent::Exit`] with the low 8 bits of the value.
///
/// Only accesses that begin at the first port count. Reads give all ones.
pub struct DebugExit {
    events: Arc<dyn MachineEvents>,
}

impl DebugExit {
    /// A port that posts to `events`.
    pub fn new(events: Arc<dyn MachineEvents>) -> Self {
        Self { events }
    }
}

impl BusDevice for DebugExit {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // x86 is little-endian: the first byte is the value's low 8 bits.
        if let (STATUS, Some(&status)) = (offset, data.first()) {
            self.events.post(MachineEvent::Exit(status));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::EventRecorder;

    fn device() -> (DebugExit, Arc<EventRecorder>) {
        let events = Arc::new(EventRecorder::default());
        (DebugExit::new(events.clone()), events)
    }

    #[test]
    fn every_status_is_posted_at_every_width() {
        let (port, events) = device();
        for status in 0..=u8::MAX {
            for data in [&[status][..], &[status, 0xaa], &[status, 1, 2, 3]] {
                port.write(0, data);
                assert_eq!(events.take(), [MachineEvent::Exit(status)]);
            }
        }
    }

    #[test]
    fn writes_past_the_status_register_and_empty_ones_do_nothing() {
        let (port, events) = device();
        for offset in 1..DEBUG_EXIT_LEN {
            port.write(offset, &[7]);
        }
        port.write(u64::MAX, &[7]);
        port.write(0, &[]);
        assert_eq!(events.take(), []);
    }

    #[test]
    fn reads_give_all_ones() {
        let (port, _) = device();
        for width in [1, 2, 4, 8] {
            let mut data = vec![0; width];
            port.read(0, &mut data);
            assert_eq!(data, vec![0xff; width]);
        }
    }
}
