//! Guest physical memory: where things lie in it and the host mappings behind it.

mod guest_ram;
pub mod layout;

pub use guest_ram::{GuestRam, MemoryError, RamRegion};
