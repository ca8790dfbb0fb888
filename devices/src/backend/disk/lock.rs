//! Keeps two writers, or a writer and a reader, from one image.
//!
//! Open file description locks: they end with the descriptor, also when the process is killed,
//! and hold between two descriptors of one process.

use std::fmt;
use std::fs;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::fstat;
use rustix::io::Errno;

use super::host;

/// Who holds a lock that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockOwner {
    /// This process: it has the file open twice.
    SelfSame,
    /// The process with this id.
    Process(u32),
    /// A process that this one may not look into (a confined one of a plain user), or of another
    /// machine.
    Unknown,
}

impl fmt::Display for LockOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SelfSame => f.write_str("another disk of this machine"),
            Self::Process(id) => write!(f, "process {id}"),
            Self::Unknown => f.write_str("another process"),
        }
    }
}

/// Locks `file` until its last descriptor is closed: against everyone, or against writers.
///
/// A file system without locks is none of the user's faults: a warning is logged, and the result
/// is success.
///
/// # Errors
/// Who holds it.
pub(super) fn lock(file: BorrowedFd<'_>, path: &Path, exclusive: bool) -> Result<(), LockOwner> {
    match host::try_lock(file, exclusive) {
        Ok(()) => Ok(()),
        Err(Errno::AGAIN | Errno::ACCESS) => Err(find_owner(file)),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the image cannot be locked");
            Ok(())
        }
    }
}

/// Looks for the lock among all processes' descriptors. The kernel does not tell the owner of an
/// open file description lock otherwise: several processes may share it.
fn find_owner(file: BorrowedFd<'_>) -> LockOwner {
    let Ok(image) = fstat(file) else { return LockOwner::Unknown };
    let Ok(processes) = fs::read_dir("/proc") else { return LockOwner::Unknown };
    let ids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let holds = |id: &u32| holds_lock(*id, (image.st_dev, image.st_ino));
    match ids.into_iter().find(holds) {
        Some(id) if id == std::process::id() => LockOwner::SelfSame,
        Some(id) => LockOwner::Process(id),
        None => LockOwner::Unknown,
    }
}

/// Whether a descriptor of the process `id` holds an open file description lock on the file
/// with this device and inode number.
fn holds_lock(id: u32, file: (u64, u64)) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{id}/fdinfo")) else { return false };
    descriptors.filter_map(Result::ok).any(|entry| {
        let info = fs::read_to_string(entry.path()).unwrap_or_default();
        let target = || {
            fs::metadata(Path::new("/proc").join(id.to_string()).join("fd").join(entry.file_name()))
        };
        info.lines().any(is_lock) && target().is_ok_and(|found| (found.dev(), found.ino()) == file)
    })
}

/// Recognises a line such as `lock: 1: OFDLCK ADVISORY WRITE -1 08:01:1234 0 EOF` (proc(5)).
fn is_lock(line: &str) -> bool {
    let mut words = line.split_ascii_whitespace();
    words.next() == Some("lock:") && words.any(|word| word == "OFDLCK")
}
