//! The 16550A on COM1: the guest's console.
//!
//! The chip is vm-superio's; `uart` adds when the guest is ready for input, this module the bus
//! and the way to the host, `config` what the user chooses.

mod config;
mod uart;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use config::{ParseSerialError, SerialConfig};
use uart::Uart;

use crate::backend::console::{Backend, ConsolePump, OpenError, Output, Receiver, Waker};
use crate::bus::BusDevice;
use crate::event::MachineEvents;
use crate::interrupt::Interrupt;
use crate::timer::Timer;

/// The first port of COM1.
pub const COM1_BASE: u64 = 0x3f8;
/// Ports taken.
pub const COM1_LEN: u64 = 8;
/// COM1's interrupt line on the PC.
pub const COM1_IRQ: u32 = 4;

/// A serial port as the owner of a machine gets it: three ends of one device.
pub struct Serial {
    /// Goes on the port bus at [`COM1_BASE`].
    pub port: Arc<SerialPort>,
    /// Goes on the event loop.
    pub pump: Arc<Mutex<ConsolePump>>,
    /// Stays with the owner.
    pub console: Console,
}

/// The port's registers on the bus.
///
/// The chip has an 8-bit bus, so a wider access is split, as chipsets do, into one byte access a
/// port, the lowest port first.
pub struct SerialPort {
    /// Taken first and never while the output's lock is held: a byte that the guest transmits
    /// leaves under this lock and enters [`Output`], where its thread may wait, after.
    uart: Mutex<Uart>,
    output: Arc<Output>,
    waker: Waker,
    pace: Arc<Timer>,
}

/// The owner's handle on what the guest printed.
#[derive(Clone)]
pub struct Console(Arc<Output>);

impl SerialPort {
    /// A serial port between the guest and `backend`. `interrupt` is its line; what the user asks
    /// for with the escape key is posted to `events`.
    ///
    /// # Errors
    /// [`OpenError::Events`].
    pub fn create(
        mut backend: Backend,
        interrupt: Arc<dyn Interrupt>,
        events: Arc<dyn MachineEvents>,
    ) -> Result<Serial, OpenError> {
        let waker = Waker::new().map_err(OpenError::Events)?;
        let output = backend.output(waker.clone())?;
        let pace = Arc::new(Timer::new().map_err(OpenError::Events)?);
        let port = Arc::new(Self {
            uart: Mutex::new(Uart::new(interrupt, pace.clone())),
            output: output.clone(),
            waker: waker.clone(),
            pace,
        });
        let pump = ConsolePump::new(backend, output.clone(), port.clone(), events, waker);
        Ok(Serial { port, pump: Arc::new(Mutex::new(pump)), console: Console(output) })
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut uart = self.uart();
        for (index, slot) in (0..).zip(data) {
            *slot = uart.read(offset.saturating_add(index));
        }
        if uart.takes_input_again() {
            self.waker.wake();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (index, value) in (0..).zip(data) {
            let port = offset.saturating_add(index);
            let (transmitted, wake) = {
                let mut uart = self.uart();
                (uart.write(port, *value), uart.takes_input_again())
            };
            if wake {
                self.waker.wake();
            }
            if let Some(byte) = transmitted {
                self.output.push(byte);
            }
        }
    }
}

impl Receiver for SerialPort {
    fn room(&self) -> usize {
        self.uart().room()
    }

    fn deliver(&self, bytes: &[u8]) {
        self.uart().deliver(bytes);
    }

    fn pace(&self) -> &Timer {
        &self.pace
    }

    fn on_pace(&self) {
        let mut uart = self.uart();
        self.pace.clear();
        uart.resume();
        if uart.takes_input_again() {
            self.waker.wake();
        }
    }
}

impl Console {
    /// The last 4 KiB that the guest printed, wherever the output went.
    pub fn tail(&self) -> Vec<u8> {
        self.0.tail()
    }

    /// The machine stops: a vCPU thread that waits for a slow host returns, and none waits from
    /// now on; what then does not fit in the buffer is dropped.
    pub fn close(&self) {
        self.0.close();
    }

    /// Gives the guest's last words to the host, waiting for it `timeout` at the longest. To be
    /// called once the vCPU threads have ended. True when the host took everything.
    pub fn flush_at_end(&self, timeout: Duration) -> bool {
        let now = Instant::now();
        self.0.flush_at_end(now.checked_add(timeout).unwrap_or(now))
    }
}

#[cfg(test)]
mod tests;
