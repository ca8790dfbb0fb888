//! Virtio 1.2 devices.
//!
//! A device ([`device::VirtioDevice`]) knows its backend, its queues and how to signal the driver.
//! A transport ([`transport`]) shows it to the guest and knows nothing but the trait.

pub mod blk;
pub mod chain;
#[cfg(test)]
mod conformance;
mod desk;
pub mod device;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
pub mod net;
mod pace;
pub mod queue;
mod ram;
mod rings;
pub mod rng;
pub mod served;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod transport;
