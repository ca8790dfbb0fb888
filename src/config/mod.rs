//! What a machine is made of: one aggregate, filled from flags and files alike.

pub mod file;
pub mod kernel;
pub mod keyvalue;
pub mod nearest;
pub mod sandbox;
pub mod units;

use std::path::PathBuf;
use std::time::Duration;

use devices::legacy::serial::SerialConfig;
use devices::virtio::blk::{DiskConfig, DiskConfigError};
use devices::virtio::net::{NetConfig, NetConfigError};
use devices::virtio::rng::RngConfig;
use serde::{Deserialize, Serialize};

pub use sandbox::{SandboxConfig, SandboxMode};
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
    /// How alcove itself is confined.
    pub sandbox: SandboxConfig,
    /// The entropy device.
    pub rng: RngConfig,
    /// The disks, vda first.
    #[serde(rename = "disk", skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// The networks, eth0 first.
    #[serde(rename = "net", skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<NetConfig>,
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
    /// A network that cannot be.
    #[error("--net {given}")]
    Net {
        /// Which.
        given: String,
        /// What is wrong.
        source: NetConfigError,
    },
    /// Two networks that are to be one.
    #[error("--net {given}: another network of this guest has {what}; give each its own")]
    NetTwice {
        /// The second.
        given: String,
        /// What they share.
        what: &'static str,
    },
    /// A jail and no sandbox.
    #[error("--jail and --sandbox off exclude each other; leave one out")]
    JailWithoutSandbox,
    /// Something that is a jail's without a jail.
    #[error("{flag} needs a jail; add --jail")]
    NeedsJail {
        /// The flag.
        flag: &'static str,
    },
    /// No processor time.
    #[error("--cpu-quota 0 leaves no time to run in; give hundredths of a processor, such as 50")]
    NoProcessorTime,
    /// Less than the guest's memory.
    #[error(
        "--memory-max {asked} is too little for --memory {memory} and alcove; give {least} or more"
    )]
    MemoryMax {
        /// What was asked for.
        asked: ByteSize,
        /// The guest's.
        memory: ByteSize,
        /// What there must be.
        least: ByteSize,
    },
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
        self.sandbox.validate(self.memory.size)?;
        self.validate_disks()?;
        self.validate_nets()
    }

    /// The networks that there are, with their names.
    pub fn named_nets(&self) -> impl Iterator<Item = (String, &NetConfig)> {
        let nets = self.nets.iter().filter(|net| !net.is_none());
        nets.enumerate().map(|(index, net)| (net.name(index), net))
    }

    fn validate_nets(&self) -> Result<(), ConfigError> {
        let failed = |net: &NetConfig, source| ConfigError::Net { given: net.to_string(), source };
        self.nets.iter().try_for_each(|net| net.validate().map_err(|e| failed(net, e)))?;
        let nets: Vec<_> = self.named_nets().collect();
        for (index, (name, net)) in nets.iter().enumerate() {
            let earlier = || nets[..index].iter();
            let shared = [
                ("this interface", net.tap.is_some() && earlier().any(|(_, o)| o.tap == net.tap)),
                ("this descriptor", net.fd.is_some() && earlier().any(|(_, o)| o.fd == net.fd)),
                ("this id", earlier().any(|(other, _)| other == name)),
                ("this mac", earlier().any(|(n, o)| o.mac_for(n) == net.mac_for(name))),
            ];
            if let Some((what, _)) = shared.into_iter().find(|(_, shared)| *shared) {
                return Err(ConfigError::NetTwice { given: net.to_string(), what });
            }
        }
        Ok(())
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
    fn networks_that_cannot_be_are_refused_by_their_flag() {
        let refusal = |texts: &[&str]| {
            let nets =
                texts.iter().map(|text| keyvalue::parse(text, NetConfig::FIRST_KEY).unwrap());
            let config = VmConfig { nets: nets.collect(), ..VmConfig::default() };
            let error = config.validate().unwrap_err();
            let source = std::error::Error::source(&error).map(ToString::to_string);
            format!("{error}: {}", source.unwrap_or_default())
        };
        for (nets, parts) in [
            (&["user,tap=tap0"][..], ["--net user", "tap=NAME"]),
            (&["tap=tap0,queues=0"], ["--net tap=tap0", "1 to 64"]),
            (&["user,queues=2"], ["--net user", "tap=NAME only"]),
            (&["user,mtu=67"], ["--net user", "68 to 65535"]),
            (&["user,id="], ["--net user", "32 printable"]),
            (&["tap=a,forward=tcp:1:2"], ["--net tap=a", "user networks"]),
            (&["fd=5,host=127.0.0.2"], ["--net fd=5", "user networks"]),
            (&["user,forward=tcp:1:2,forward=tcp:1:3"], ["--net user", "tcp:1:3"]),
            (&["tap=a", "tap=a"], ["--net tap=a", "this interface"]),
            (&["fd=3", "fd=3"], ["--net fd=3", "this descriptor"]),
            (&["user,id=x", "tap=x"], ["--net tap=x", "this id"]),
            (
                &["user,mac=02:00:00:00:00:01", "tap=x,mac=02:00:00:00:00:01"],
                ["--net tap=x", "mac"],
            ),
        ] {
            let text = refusal(nets);
            assert!(parts.iter().all(|part| text.contains(part)), "{nets:?}: {text}");
        }
    }

    #[test]
    fn cpus_that_cannot_be_are_refused_by_their_flag() {
        for text in ["0", "0,threads=2", "6,threads=4", "8,threads=0", "8,cores=2,sockets=3"] {
            assert!(refusal(text).starts_with("--cpus"), "{text}");
        }
    }
}
