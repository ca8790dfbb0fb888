//! How a device interrupts the guest.

use std::io;

/// One interrupt line of one device.
pub trait Interrupt: Send + Sync {
    /// Signals the line once (an edge). May be called from any thread.
    fn trigger(&self) -> io::Result<()>;
}
