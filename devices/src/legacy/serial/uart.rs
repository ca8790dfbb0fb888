//! The chip: vm-superio's 16550A, and when to give it input.
//!
//! What is typed waits in a queue in front of the chip's FIFO until the guest's driver is ready.
//! While it looks for the chip and sets it up, Linux reads the receive buffer several times and
//! throws away what it gets, and clears the FIFO; a real line loses input typed before that, this
//! one must not (a script is often piped in before the guest is up).
//!
//! The line is faster than a real one and yet must not starve the guest: a handler that always
//! finds another byte never returns, and the thread that takes the bytes from it never runs. So a
//! guest that is driven by interrupts gets one FIFO at a time, and a pause after it that is as long
//! as it took to empty it.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, SerialState};

use crate::backend::console::MIN_ROOM_BYTES;
use crate::interrupt::Interrupt;
use crate::timer::Timer;

/// Registers of the 16550A (data sheet PC16550D, table II), as offsets.
mod register {
    /// Receiver buffer (read), transmitter holding register (write), divisor latch (DLAB).
    pub const DATA: u8 = 0;
    /// Interrupt enable.
    pub const IER: u8 = 1;
    /// Interrupt identification (read), FIFO control (write).
    pub const IIR: u8 = 2;
    /// Line control.
    pub const LCR: u8 = 3;
    /// Modem control.
    pub const MCR: u8 = 4;
    /// Line status.
    pub const LSR: u8 = 5;
    /// Scratch, the last one.
    pub const SCR: u8 = 7;
}

/// IER: interrupt on received data.
const IER_RECEIVED_DATA: u8 = 1 << 0;
/// IER: interrupt on an empty transmitter.
const IER_TRANSMITTER_EMPTY: u8 = 1 << 1;
/// IIR: no interrupt is pending.
const IIR_NONE: u8 = 0b0001;
/// IIR: the transmitter is empty.
const IIR_TRANSMITTER_EMPTY: u8 = 0b0010;
/// IIR: data was received; goes before an empty transmitter.
const IIR_RECEIVED_DATA: u8 = 0b0100;
/// IIR: what is pending.
const IIR_ID: u8 = 0b1111;
/// LSR: there is data to read.
const LSR_DATA_READY: u8 = 1 << 0;
/// LCR: the first two registers are the divisor latch.
const LCR_DLAB: u8 = 1 << 7;
/// MCR: data terminal ready.
const MCR_DTR: u8 = 1 << 0;
/// MCR: request to send.
const MCR_RTS: u8 = 1 << 1;
/// MCR: on the PC, connects the chip to its interrupt line.
const MCR_OUT2: u8 = 1 << 3;
/// MCR: loopback.
const MCR_LOOP: u8 = 1 << 4;

/// Input that waits for the guest; the host's end is not read while this is full.
const QUEUE_BYTES: usize = 4096;
/// The host's end is read again once the queue is down to this.
const QUEUE_LOW_BYTES: usize = QUEUE_BYTES / 2;
/// vm-superio's receive FIFO.
const FIFO_BYTES: usize = 64;
/// The pause between two fillings of the FIFO, whatever the guest needed for the first.
const PAUSES: (Duration, Duration) = (Duration::from_micros(50), Duration::from_millis(100));
/// This many reads of the line status in a row, and no other access, are a guest that waits for
/// input without interrupts. Linux reads it up to three times in a row when it prints.
const WAITING_POLLS: u8 = 16;

type Chip = vm_superio::Serial<Line, NoEvents, Shift>;

/// The chip with the queue in front of it.
pub(super) struct Uart {
    chip: Chip,
    queue: VecDeque<u8>,
    /// The host's end waits for room in the queue.
    host_waits: bool,
    interrupt_enable: u8,
    /// The guest has not been told yet that the transmitter is empty.
    transmitter_empty: bool,
    line_status_polls: u8,
    filled_at: Instant,
    /// A guest driven by interrupts gets more when this timer fires.
    pace: Arc<Timer>,
    paused: bool,
}

impl Uart {
    /// The chip after a reset.
    pub fn new(interrupt: Arc<dyn Interrupt>, pace: Arc<Timer>) -> Self {
        // After a reset all modem control outputs are inactive, OUT2 too.
        let reset = SerialState { modem_control: 0, ..SerialState::default() };
        let line = || Line { interrupt: interrupt.clone(), failed: AtomicBool::new(false) };
        let chip = Chip::from_state(&reset, line(), NoEvents, Shift::default())
            .unwrap_or_else(|_| Chip::with_events(line(), NoEvents, Shift::default()));
        Self {
            chip,
            queue: VecDeque::new(),
            host_waits: false,
            interrupt_enable: reset.interrupt_enable,
            transmitter_empty: false,
            line_status_polls: 0,
            filled_at: Instant::now(),
            pace,
            paused: false,
        }
    }

    /// Reads a register; all ones where there is none.
    pub fn read(&mut self, port: u64) -> u8 {
        let Some(offset) = decode(port) else { return u8::MAX };
        self.line_status_polls = match offset {
            register::LSR => self.line_status_polls.saturating_add(1),
            _ => 0,
        };
        match offset {
            register::IIR => self.identify_interrupt(),
            register::LSR => {
                self.refill();
                self.chip.read(offset)
            }
            register::DATA => {
                let value = self.chip.read(offset);
                self.pause();
                self.refill();
                value
            }
            _ => self.chip.read(offset),
        }
    }

    /// Writes a register; returns the byte that the guest transmits by it.
    pub fn write(&mut self, port: u64, value: u8) -> Option<u8> {
        let offset = decode(port)?;
        self.line_status_polls = 0;
        if offset == register::IER && self.chip.read(register::LCR) & LCR_DLAB == 0 {
            self.interrupt_enable = value;
            // The chip raises the line only for what it has not marked as pending.
            self.take_pending();
        }
        // Nothing can fail: the line reports its errors itself, the shift register has none.
        let _ = self.chip.write(offset, value);
        if offset == register::IER || offset == register::MCR {
            self.refill();
        }
        self.chip.writer_mut().0.take()
    }

    /// How much more input the queue takes; notes that the host's end waits if that is too
    /// little for it.
    pub fn room(&mut self) -> usize {
        let room = QUEUE_BYTES.saturating_sub(self.queue.len());
        self.host_waits = room < MIN_ROOM_BYTES;
        room
    }

    /// Queues input. What does not fit is dropped; the caller asked for [`Uart::room`].
    pub fn deliver(&mut self, bytes: &[u8]) {
        let room = QUEUE_BYTES.saturating_sub(self.queue.len());
        self.queue.extend(bytes.get(..room).unwrap_or(bytes));
        self.refill();
    }

    /// True once after the host's end had to wait and there is room again.
    pub fn takes_input_again(&mut self) -> bool {
        let again = self.host_waits && self.queue.len() <= QUEUE_LOW_BYTES;
        self.host_waits &= !again;
        again
    }

    /// The pause is over.
    pub fn resume(&mut self) {
        self.paused = false;
        self.refill();
    }

    /// Takes over what the chip has marked as pending; returns the rest of the register.
    fn take_pending(&mut self) -> u8 {
        let register = self.chip.read(register::IIR);
        let pending = register & IIR_ID;
        self.transmitter_empty |= pending & IIR_NONE == 0 && pending & IIR_TRANSMITTER_EMPTY != 0;
        register & !IIR_ID
    }

    /// The interrupt identification register. vm-superio forgets received data as soon as this is
    /// read or one byte is taken; on a 16550A it stays pending as long as there is some (data sheet
    /// §8.6), and a driver may leave its handler by it.
    fn identify_interrupt(&mut self) -> u8 {
        let fifo_enabled = self.take_pending();
        let has_data = self.chip.read(register::LSR) & LSR_DATA_READY != 0;
        let pending = if has_data && self.interrupt_enable & IER_RECEIVED_DATA != 0 {
            IIR_RECEIVED_DATA
        } else if std::mem::take(&mut self.transmitter_empty)
            && self.interrupt_enable & IER_TRANSMITTER_EMPTY != 0
        {
            IIR_TRANSMITTER_EMPTY
        } else {
            IIR_NONE
        };
        fifo_enabled | pending
    }

    /// Lets a guest driven by interrupts leave its handler before it gets more.
    fn pause(&mut self) {
        let due = !self.paused
            && !self.queue.is_empty()
            && self.fifo_is_empty()
            && self.is_driven_by_interrupts();
        if due {
            let (shortest, longest) = PAUSES;
            let pause = self.filled_at.elapsed().clamp(shortest, longest);
            match self.pace.arm(pause) {
                Ok(()) => self.paused = true,
                Err(error) => tracing::warn!(%error, "the serial port's timer cannot be set"),
            }
        }
    }

    /// Moves input from the queue to the FIFO when the guest is ready for it.
    fn refill(&mut self) {
        if self.queue.is_empty() || !self.fifo_is_empty() || !self.guest_takes_input() {
            return;
        }
        self.filled_at = Instant::now();
        let mut chunk = [0; FIFO_BYTES];
        let count = self.queue.len().min(FIFO_BYTES);
        for (slot, byte) in chunk.iter_mut().zip(self.queue.drain(..count)) {
            *slot = byte;
        }
        let _ = self.chip.enqueue_raw_bytes(chunk.get(..count).unwrap_or_default());
    }

    /// Whether the guest's driver is set up and willing: it takes interrupts for received data
    /// through a connected line, or polls for it; and it does not hold off the other side by
    /// RTS/CTS flow control.
    fn guest_takes_input(&mut self) -> bool {
        let modem = self.chip.read(register::MCR);
        let takes_interrupt = !self.paused && self.is_driven_by_interrupts();
        let holds_off = modem & (MCR_DTR | MCR_RTS) == MCR_DTR;
        let polls = self.line_status_polls >= WAITING_POLLS;
        modem & MCR_LOOP == 0 && !holds_off && (takes_interrupt || polls)
    }

    fn fifo_is_empty(&self) -> bool {
        self.chip.fifo_capacity() == FIFO_BYTES
    }

    fn is_driven_by_interrupts(&mut self) -> bool {
        let connected = self.chip.read(register::MCR) & MCR_OUT2 != 0;
        self.interrupt_enable & IER_RECEIVED_DATA != 0 && connected
    }
}

/// The register's offset that a port decodes to.
fn decode(port: u64) -> Option<u8> {
    u8::try_from(port).ok().filter(|offset| *offset <= register::SCR)
}

/// The chip's interrupt line.
struct Line {
    interrupt: Arc<dyn Interrupt>,
    failed: AtomicBool,
}

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        if let Err(error) = self.interrupt.trigger()
            && !self.failed.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(%error, "the serial port's interrupt cannot be raised");
        }
        Ok(())
    }
}

/// The transmitter's shift register: holds the byte until the chip's lock is released.
#[derive(Debug, Default)]
struct Shift(Option<u8>);

impl io::Write for Shift {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 = bytes.last().copied();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
