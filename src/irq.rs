//! Interrupt lines into the guest.
//!
//! Global system interrupts are dealt out by hand, see [`gsi`].

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use devices::interrupt::Interrupt;
use kvm_bindings::{
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_irqchip__bindgen_ty_1,
    kvm_pic_state,
};
use kvm_ioctls::VmFd;

/// Who has which global system interrupt.
///
/// KVM's default routing leads GSI 0 to 15 to the inputs of the same number of both the I/O APIC
/// and the 8259 pair, 16 to 23 to those of the I/O APIC alone. A kernel without ACPI tables finds
/// no I/O APIC, so legacy devices have GSIs below 16; a virtio device is found by the tables only. As on every PC, 0 is the 8254, 1
/// the keyboard, 2 the second 8259, 3 COM2, 8 the real-time clock, 13 the coprocessor.
pub mod gsi {
    /// The first serial port, as everywhere.
    pub const COM1: u32 = devices::legacy::serial::COM1_IRQ;
    /// ACPI's generic event device, which only kernels with ACPI tables know.
    pub const GENERIC_EVENT: u32 = 23;
    /// Free for devices: first those of the I/O APIC alone, which cost KVM half the work of those
    /// that reach the 8259s too, last those that belong to devices of a PC that this machine does
    /// not have (COM2, the real-time clock, the coprocessor).
    pub const DEVICES: [u32; 19] =
        [16, 17, 18, 19, 20, 21, 22, 5, 6, 7, 9, 10, 11, 12, 14, 15, 3, 8, 13];
}

/// Masks all inputs of the 8259 pair, as firmware leaves them.
///
/// An interrupt below GSI 16 reaches the 8259s as well as the I/O APIC. A kernel that takes it from
/// the latter and never sets up the former would otherwise get it as vector 0 to 7, an exception,
/// while LINT0 of its boot CPU passes the 8259's interrupts on.
pub fn mask_8259s(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    const ALL_MASKED: u8 = 0xff;
    /// Inputs whose trigger mode the ELCR may set; 0, 1, 2, 8 and 13 are edge-triggered always
    /// (82371AB §4.2.9 "ELCR1", "ELCR2").
    const ELCR_MASKS: [(u32, u8); 2] =
        [(KVM_IRQCHIP_PIC_MASTER, 0xf8), (KVM_IRQCHIP_PIC_SLAVE, 0xde)];
    for (chip_id, elcr_mask) in ELCR_MASKS {
        let pic = kvm_pic_state { imr: ALL_MASKED, elcr_mask, ..Default::default() };
        let chip = kvm_irqchip__bindgen_ty_1 { pic };
        vm.set_irqchip(&kvm_irqchip { chip_id, pad: 0, chip })?;
    }
    Ok(())
}

/// An edge-triggered line of the in-kernel interrupt controllers, raised by an ioctl.
///
/// It beats an irqfd: KVM raises an I/O APIC's line for an irqfd in a thread of its own, to which
/// the host must switch and from there to the vCPU, a quarter of a small disk request's time; and
/// the registration of an irqfd waits for a grace period of the host kernel. An irqfd is faster
/// for message-signalled interrupts only.
pub struct IrqLine {
    vm: Arc<VmFd>,
    gsi: u32,
    /// Held from one side of an edge to the other: were two threads' edges to run into one
    /// another, the guest could see but the first, before what the second stands for is there.
    edge: Mutex<()>,
}

impl IrqLine {
    /// The line that `gsi` is routed to.
    pub fn new(vm: Arc<VmFd>, gsi: u32) -> Self {
        Self { vm, gsi, edge: Mutex::new(()) }
    }
}

impl Interrupt for IrqLine {
    fn trigger(&self) -> io::Result<()> {
        let _edge = self.edge.lock().unwrap_or_else(PoisonError::into_inner);
        for level in [true, false] {
            self.vm
                .set_irq_line(self.gsi, level)
                .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        }
        Ok(())
    }
}
