//! Interrupt lines into the guest.

use std::io;
use std::sync::Arc;

use devices::interrupt::Interrupt;
use kvm_ioctls::VmFd;

/// An edge-triggered line of the in-kernel interrupt controllers, raised by an ioctl.
///
/// For the few interrupts of legacy devices this beats an irqfd, whose registration waits for a
/// grace period of the host kernel.
pub struct LegacyLine {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl LegacyLine {
    /// The line that `gsi` is routed to.
    pub fn new(vm: Arc<VmFd>, gsi: u32) -> Self {
        Self { vm, gsi }
    }
}

impl Interrupt for LegacyLine {
    fn trigger(&self) -> io::Result<()> {
        for level in [true, false] {
            self.vm
                .set_irq_line(self.gsi, level)
                .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        }
        Ok(())
    }
}
