//! What a machine is made of: one aggregate, filled from flags and files alike.

pub mod file;
pub mod kernel;
pub mod keyvalue;
pub mod nearest;
pub mod units;

use std::path::PathBuf;
use std::time::Duration;

use devices::legacy::serial::SerialConfig;
use devices::virtio::blk::{DiskConfig, DiskConfigError};
use devices::virtio::rng::RngConfig;
use serde::{Deserialize, Serialize};

pub use units::{ByteSize, Span};

use crate::arch::x86_64::topology::{Shape, Topology, TopologyError};

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
    /// How long a guest may take to power off once SIGTERM has pressed its power button; none:
    /// [`DEFAULT_SHUTDOWN_TIMEOUT`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shutdown_timeout: Option<Span>,
    /// Where the first serial port leads.
    pub serial: SerialConfig,
    /// Whether to complete what KVM's instruction emulator refuses.
    pub assist: AssistMode,
    /// The processors.
    pub cpus: CpuConfig,
    /// The memory.
    pub memory: MemoryConfig,
    /// The entropy device.
    pub rng: RngConfig,
    /// The disks, vda first.
    #[serde(rename = "disk", skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
}

/// How long a guest may take to power off when nothing else is said.
pub const DEFAULT_SHUTDOWN_TIMEOUT: Span = Span(Duration::from_secs(10));

/// The guest's processors.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// How many.
    pub count: u32,
    /// Hardware threads in a core; see [`Topology::new`] for what is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
    /// Cores in a socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cores: Option<u32>,
    /// Sockets in the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sockets: Option<u32>,
}

impl Default for CpuConfig {
    fn default() -> Self {
        Self { count: 1, threads: None, cores: None, sockets: None }
    }
}

impl CpuConfig {
    /// How the processors are arranged.
    pub fn topology(&self) -> Result<Topology, ConfigError> {
        let Self { count, threads, cores, sockets } = *self;
        if count == 0 {
            return Err(ConfigError::NoCpus);
        }
        Topology::new(count, &Shape { threads, cores, sockets }).map_err(ConfigError::Topology)
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
    /// A disk that cannot be.
    #[error("--disk {}", path.display())]
    Disk {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        source: DiskConfigError,
    },
    /// Two disks would write one image.
    #[error("--disk {} is given twice; give each disk an image of its own, or all of them ,readonly", path.display())]
    DiskTwice {
        /// The image.
        path: PathBuf,
    },
    /// Two root file systems.
    #[error("--disk: two disks have ,root; leave it with one")]
    TwoRoots,
    /// Processors that cannot be arranged as asked.
    #[error("--cpus")]
    Topology(#[source] TopologyError),
}

impl VmConfig {
    /// Checks what no single field can tell; what depends on the host is checked when it is used.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.append.is_some() && self.cmdline.is_some() {
            return Err(ConfigError::AppendAndCmdline);
        }
        self.cpus.topology()?;
        self.validate_disks()
    }

    fn validate_disks(&self) -> Result<(), ConfigError> {
        for (index, disk) in self.disks.iter().enumerate() {
            let path = disk.path.clone();
            disk.validate().map_err(|source| ConfigError::Disk { path: path.clone(), source })?;
            let is_same = |other: &&DiskConfig| other.path == path;
            let shared = self.disks[..index].iter().find(is_same);
            if shared.is_some_and(|other| !(disk.readonly && other.readonly)) {
                return Err(ConfigError::DiskTwice { path });
            }
        }
        if self.disks.iter().filter(|disk| disk.root).count() > 1 {
            return Err(ConfigError::TwoRoots);
        }
        Ok(())
    }

    /// The flag to blame when the kernel's command line is no good.
    pub fn cmdline_flag(&self) -> &'static str {
        if self.cmdline.is_some() { "--cmdline" } else { "--append" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(cpus: &str) -> String {
        let cpus = keyvalue::parse(cpus, "count").unwrap();
        VmConfig { cpus, ..VmConfig::default() }.validate().unwrap_err().to_string()
    }

    #[test]
    fn cpus_are_given_with_their_arrangement() {
        let cpus: CpuConfig = keyvalue::parse("8,threads=2,sockets=2", "count").unwrap();

        let expected = Topology { threads_per_core: 2, cores_per_socket: 2, sockets: 2 };
        assert_eq!(cpus.topology(), Ok(expected));
    }

    #[test]
    fn cpus_that_cannot_be_are_refused_by_their_flag() {
        for text in ["0", "0,threads=2", "6,threads=4", "8,threads=0", "8,cores=2,sockets=3"] {
            assert!(refusal(text).starts_with("--cpus"), "{text}");
        }
    }
}
