use std::sync::Arc;

use super::Input;
use crate::backend::console::{Backend, Receiver};
use crate::bus::BusDevice;
use crate::legacy::serial::SerialPort;
use crate::testing::{EventRecorder, FakeInterrupt};

/// The most input that waits for the guest.
const QUEUE_BYTES: usize = 4096;

/// A guest at the serial port's registers while somebody types.
pub fn serial(data: &[u8]) {
    let (line, events) = (Arc::new(FakeInterrupt::default()), Arc::new(EventRecorder::default()));
    let created = SerialPort::create(Backend::null(), line, events.clone()).unwrap();
    let port = created.port;
    let mut input = Input(data);
    while let Some(step) = input.next() {
        let (offset, width) = (u64::from(input.u8() & 15), usize::from(step >> 4 & 7) + 1);
        match step & 7 {
            0..=2 => {
                let mut value = [0; 8];
                port.read(offset, &mut value[..width]);
            }
            3..=5 => port.write(offset, input.bytes(width)),
            6 => {
                let room = port.room();
                assert!(room <= QUEUE_BYTES);
                let typed = input.bytes(usize::from(step) * 8);
                let typed = &typed[..typed.len().min(room)];
                port.deliver(typed);
                // The chip may have taken some of it.
                assert!((room - typed.len()..=QUEUE_BYTES).contains(&port.room()));
            }
            _ => port.on_pace(),
        }
    }
    assert_eq!(events.take(), [], "a guest's console ends nothing");
}
