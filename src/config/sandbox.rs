//! How alcove itself is confined.

use serde::{Deserialize, Serialize};

use super::{ByteSize, ConfigError};

/// What a guest that has taken over alcove could still do.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct SandboxConfig {
    /// Whether alcove confines itself at all.
    pub mode: SandboxMode,
    /// Whether it goes on in namespaces of its own, with an empty root.
    pub jail: bool,
    /// Who it becomes in the jail.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Its group there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    /// The processor time that it gets there, in hundredths of one processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_quota: Option<u32>,
    /// The memory that it gets there, the guest's included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_max: Option<ByteSize>,
}

/// Whether alcove confines itself.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum SandboxMode {
    /// System calls, files, privileges and resources are cut down to what the machine needs.
    #[default]
    On,
    /// A guest that takes over alcove can do what its user can.
    Off,
}

/// What alcove needs besides the guest's memory, bytes; a group with less kills it.
const OWN_BYTES: u64 = 16 << 20;

impl SandboxConfig {
    /// The first flag that only root may use, if one is given.
    pub fn root_only_flag(&self) -> Option<&'static str> {
        let flags = [
            ("--uid", self.uid.is_some()),
            ("--gid", self.gid.is_some()),
            ("--cpu-quota", self.cpu_quota.is_some()),
            ("--memory-max", self.memory_max.is_some()),
        ];
        flags.iter().find(|(_, given)| *given).map(|(flag, _)| *flag)
    }

    /// Checks what no single field can tell, for a guest with `memory`.
    pub(super) fn validate(&self, memory: ByteSize) -> Result<(), ConfigError> {
        if self.jail && self.mode == SandboxMode::Off {
            return Err(ConfigError::JailWithoutSandbox);
        }
        if let (false, Some(flag)) = (self.jail, self.root_only_flag()) {
            return Err(ConfigError::NeedsJail { flag });
        }
        if self.cpu_quota == Some(0) {
            return Err(ConfigError::NoProcessorTime);
        }
        let least = ByteSize(memory.0.saturating_add(OWN_BYTES));
        match self.memory_max {
            Some(asked) if asked.0 < least.0 => {
                Err(ConfigError::MemoryMax { asked, memory, least })
            }
            _ => Ok(()),
        }
    }
}
