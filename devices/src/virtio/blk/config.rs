//! What the user chooses about a disk.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

use crate::backend::disk::{DiskOptions, Engine, MAX_DEPTH};
use crate::rate_limit::Rate;

/// The most queues of a disk.
pub const MAX_QUEUES: u16 = 64;
/// A request takes up to three kinds of descriptors, in a table of a power of two.
const MIN_QUEUE_SIZE: u16 = 4;
const DEFAULT_QUEUE_SIZE: u16 = 256;

/// A disk: `PATH[,readonly][,root][,direct][,queues=N][,queue-size=N][,engine=io_uring|sync]
/// [,id=S][,iops=RATE][,bandwidth=RATE][,discard=on|off][,sync=on|off]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskConfig {
    /// The image file or block device.
    pub path: PathBuf,
    /// The guest cannot write.
    #[serde(default, skip_serializing_if = "is_off")]
    pub readonly: bool,
    /// The guest's root file system.
    #[serde(default, skip_serializing_if = "is_off")]
    pub root: bool,
    /// Pass the host's page cache by.
    #[serde(default, skip_serializing_if = "is_off")]
    pub direct: bool,
    /// Queues, each with a thread: 1 to [`MAX_QUEUES`].
    #[serde(default = "one")]
    pub queues: u16,
    /// Entries of a queue: a power of two from 4 to [`MAX_DEPTH`]. A request takes an entry for
    /// each piece of memory and two more.
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
    /// How I/O is done; none: what suits the file and the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<Engine>,
    /// What the guest gets as the disk's serial number: up to 20 printable ASCII characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Requests a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<Rate>,
    /// Bytes read and written a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Rate>,
    /// Offer the guest to give space back, and to write zeroes without sending them.
    #[serde(default = "on")]
    pub discard: bool,
    /// Let the guest's flushes reach the medium. Off, they are not offered, and what the guest
    /// wrote last is lost when the host fails (not when only alcove does): for guests that are
    /// thrown away.
    #[serde(default = "on")]
    pub sync: bool,
}

/// A [`DiskConfig`] that makes no disk. Each names the key and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DiskConfigError {
    /// No queue, or too many.
    #[error("queues={0} is not possible; give 1 to {MAX_QUEUES}")]
    Queues(u16),
    /// Not a power of two, or out of range.
    #[error(
        "queue-size={0} is not possible; give a power of two from {MIN_QUEUE_SIZE} to {MAX_DEPTH}"
    )]
    QueueSize(u16),
    /// Too long, or with characters that are not printable ASCII.
    #[error(
        "id={0:?} is not possible; give up to {VIRTIO_BLK_ID_BYTES} printable ASCII characters"
    )]
    Id(String),
}

impl DiskConfig {
    /// The keys' order in `key=value` text: the one that may be left out.
    pub const FIRST_KEY: &str = "path";

    /// The disk in `path`, with defaults for all else.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            readonly: false,
            root: false,
            direct: false,
            queues: one(),
            queue_size: default_queue_size(),
            engine: None,
            id: None,
            iops: None,
            bandwidth: None,
            discard: true,
            sync: true,
        }
    }

    /// Checks what does not depend on the host.
    ///
    /// # Errors
    /// The first key whose value is not possible.
    pub fn validate(&self) -> Result<(), DiskConfigError> {
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return Err(DiskConfigError::Queues(self.queues));
        }
        let sizes = MIN_QUEUE_SIZE..=MAX_DEPTH;
        if !self.queue_size.is_power_of_two() || !sizes.contains(&self.queue_size) {
            return Err(DiskConfigError::QueueSize(self.queue_size));
        }
        match &self.id {
            Some(id) if !is_id(id) => Err(DiskConfigError::Id(id.clone())),
            _ => Ok(()),
        }
    }

    /// How to open the image.
    pub fn options(&self) -> DiskOptions {
        DiskOptions {
            path: self.path.clone(),
            read_only: self.readonly,
            direct: self.direct,
            engine: self.engine,
        }
    }
}

fn is_id(id: &str) -> bool {
    id.len() <= VIRTIO_BLK_ID_BYTES as usize && id.bytes().all(|b| b.is_ascii_graphic())
}

const fn one() -> u16 {
    1
}

const fn default_queue_size() -> u16 {
    DEFAULT_QUEUE_SIZE
}

const fn on() -> bool {
    true
}

/// Serde asks by reference.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
const fn is_off(value: &bool) -> bool {
    !*value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_disk_is_named_with_its_remedy() {
        let with = |change: fn(&mut DiskConfig)| {
            let mut config = DiskConfig::new("a.img");
            change(&mut config);
            config.validate()
        };

        assert_eq!(with(|_| {}), Ok(()));
        assert_eq!(with(|c| c.queues = 0), Err(DiskConfigError::Queues(0)));
        assert_eq!(with(|c| c.queues = 65), Err(DiskConfigError::Queues(65)));
        for size in [0, 1, 2, 3, 100, 2048, u16::MAX] {
            let mut config = DiskConfig::new("a.img");
            config.queue_size = size;
            assert_eq!(config.validate(), Err(DiskConfigError::QueueSize(size)));
        }
        assert!(with(|c| c.id = Some("123456789012345678901".into())).is_err());
        assert!(with(|c| c.id = Some("a b".into())).is_err());
        assert_eq!(with(|c| c.id = Some("12345678901234567890".into())), Ok(()));
        let message = DiskConfigError::QueueSize(3).to_string();
        assert_eq!(message, "queue-size=3 is not possible; give a power of two from 4 to 1024");
    }
}
