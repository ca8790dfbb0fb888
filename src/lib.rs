//! alcove, a virtual machine monitor for Linux guests on KVM.
//!
//! The map of the house: [`cli`] holds the flags, [`commands`] one file a subcommand, [`config`]
//! what a machine is made of. [`vm`] builds and owns the machine out of [`memory`], [`boot`],
//! [`arch`], [`vcpu`], [`irq`] and the `devices` crate, which run on the [`event_loop`].
//! [`sandbox`] is what keeps a guest that takes alcove over from taking over more;
//! [`assist`] completes the instructions that a software KVM refuses; [`mod@bench`] measures it all.

pub mod arch;
pub mod assist;
pub mod bench;
pub mod boot;
pub mod cli;
pub mod commands;
pub mod config;
pub mod event_loop;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod host;
pub mod irq;
pub mod log;
pub mod memory;
pub mod sandbox;
pub mod vcpu;
pub mod vm;
