//! The PC's own chips.

pub mod debug_exit;
pub mod generic_event;
pub mod i8042;
pub mod power;
pub mod pvpanic;
pub mod serial;
