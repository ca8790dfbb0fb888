//! What a machine is made of: one aggregate, filled from flags and files alike.

pub mod file;
pub mod kernel;
pub mod keyvalue;
pub mod nearest;
pub mod units;

use std::path::PathBuf;

use devices::legacy::serial::SerialConfig;
use serde::{Deserialize, Serialize};

pub use units::{ByteSize, Span};

/// Everything that `alcove run` needs to know.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// An ELF vmlinux or a bzImage; none: searched for, see [`kernel::find`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// An initial RAM disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Added to the command line that alcove writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub append: Option<String>,
    /// Replaces the command line that alcove writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Ends the guest after this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Span>,
    /// Where the first serial port leads.
    pub serial: SerialConfig,
    /// Whether to complete what KVM's instruction emulator refuses.
    pub assist: AssistMode,
    /// The processors.
    pub cpus: CpuConfig,
    /// The memory.
    pub memory: MemoryConfig,
}

/// The guest's processors.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// How many.
    pub count: u32,
}

impl Default for CpuConfig {
    fn default() -> Self {
        Self { count: 1 }
    }
}

/// The guest's memory.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Bytes of RAM.
    pub size: ByteSize,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self { size: ByteSize(256 << 20) }
    }
}

/// When to complete instructions that KVM's emulator refuses.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum AssistMode {
    /// On a host without hardware virtualisation.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

/// A combination of settings that makes no machine.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// `--append` and `--cmdline` together.
    #[error("--append and --cmdline exclude each other; put it all into --cmdline")]
    AppendAndCmdline,
    /// No processor.
    #[error("--cpus 0 leaves nothing to run on; give at least 1")]
    NoCpus,
}

impl VmConfig {
    /// Checks what no single field can tell; what depends on the host is checked when it is used.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.append.is_some() && self.cmdline.is_some() {
            return Err(ConfigError::AppendAndCmdline);
        }
        if self.cpus.count == 0 {
            return Err(ConfigError::NoCpus);
        }
        Ok(())
    }

    /// The flag to blame when the kernel's command line is no good.
    pub fn cmdline_flag(&self) -> &'static str {
        if self.cmdline.is_some() { "--cmdline" } else { "--append" }
    }
}
