//! The PC's own chips.

pub mod debug_exit;
pub mod i8042;
pub mod pvpanic;
pub mod serial;
