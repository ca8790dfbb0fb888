//! Virtual CPUs: a thread each, its life cycle, and what to do with every exit from the guest.

pub mod crash;
pub mod exit;
pub mod handle;
mod kick;
pub mod recover;
pub mod run_loop;

pub use crash::CrashReport;
pub use handle::{VcpuHandle, VcpuState};
pub use kick::prepare_signal;
