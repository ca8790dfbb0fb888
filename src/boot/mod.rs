//! Puts into guest RAM what a Linux kernel needs to start: the kernel, its initrd, its command line
//! and the tables of the boot protocol.
//!
//! The order is [`kernel::load`], [`initrd::load`], [`cmdline::build`], [`acpi::write`], then
//! [`params::write`], which says how the first vCPU enters. All input files are taken as hostile: sizes and addresses
//! in them are checked before a byte of guest RAM is written, and nothing is allocated by them
//! beyond the size of the file.
//!
//! Guest RAM must be fresh: what a kernel expects to be zero (.bss) is not written.

pub mod acpi;
pub mod cmdline;
mod image;
pub mod initrd;
pub mod kernel;
pub mod long_mode;
pub mod params;
#[cfg(test)]
mod testing;

pub use image::ImageError;
