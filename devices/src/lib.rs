//! Device models of alcove.
//!
//! Three layers, each knowing only the one below it: a bus wrapper answers the guest's accesses
//! ([`bus::BusDevice`]), a chip holds pure logic, a backend talks to the host. Nothing here knows
//! KVM: a device reaches the guest through [`interrupt::Interrupt`] and its owner through
//! [`event::MachineEvents`].

pub mod backend;
pub mod bus;
pub mod event;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod interrupt;
pub mod legacy;
pub mod metrics;
pub mod rate_limit;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod thread_start;
pub mod timer;
pub mod virtio;
