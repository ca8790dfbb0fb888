//! How the guest sees a virtio device.

pub mod core;
pub mod mmio;

#[cfg(test)]
mod tests;
