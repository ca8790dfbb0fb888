//! How much processor time and memory a process gets: control groups, version 2.
#![expect(unsafe_code, reason = "rmdir without memory of the heap")]

use std::ffi::{CString, c_int};
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// Where the hierarchy is mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// The group of all machines' groups.
const PARENT: &str = "alcove";
/// The span over which a quota holds, microseconds: the kernel's default.
const PERIOD_US: u64 = 100_000;
/// A group can be removed a moment after its last process has ended.
const PATIENCE: Duration = Duration::from_millis(500);

/// What a group's processes get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Processor time, in hundredths of one processor.
    pub cpu_percent: Option<u32>,
    /// Memory, bytes.
    pub memory_bytes: Option<u64>,
}

/// What was asked of the hierarchy in vain.
#[derive(Debug)]
pub struct Refused {
    /// The file or folder.
    pub path: PathBuf,
    /// The host's answer.
    pub source: io::Error,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the host refused to make or change {}", self.path.display())
    }
}

impl std::error::Error for Refused {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// A group that was made for one process.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
    name: CString,
}

impl Group {
    /// Makes a group with `limits` for this process's successor.
    ///
    /// # Errors
    /// There is no version 2 hierarchy with these controllers, or the caller may not change it.
    pub fn create(limits: &Limits) -> Result<Self, Refused> {
        let mut controllers = Vec::new();
        controllers.extend(limits.cpu_percent.map(|_| "+cpu"));
        controllers.extend(limits.memory_bytes.map(|_| "+memory"));
        let (root, parent) = (Path::new(ROOT), Path::new(ROOT).join(PARENT));
        make_folder(&parent)?;
        for folder in [root, parent.as_path()] {
            write(&folder.join("cgroup.subtree_control"), &controllers.join(" "))?;
        }
        let path = parent.join(std::process::id().to_string());
        make_folder(&path)?;
        let name = CString::new(path.as_os_str().as_bytes())
            .unwrap_or_else(|_| unreachable!("the path has no zero byte"));
        let group = Self { path, name };
        group.limit(limits).inspect_err(|_| group.remove())?;
        Ok(group)
    }

    fn limit(&self, limits: &Limits) -> Result<(), Refused> {
        if let Some(percent) = limits.cpu_percent {
            let quota_us = u64::from(percent) * PERIOD_US / 100;
            write(&self.path.join("cpu.max"), &format!("{quota_us} {PERIOD_US}"))?;
        }
        if let Some(bytes) = limits.memory_bytes {
            write(&self.path.join("memory.max"), &bytes.to_string())?;
        }
        Ok(())
    }

    /// Moves `process` into the group.
    ///
    /// # Errors
    /// The host's answer.
    pub fn add(&self, process: c_int) -> io::Result<()> {
        fs::write(self.path.join("cgroup.procs"), process.to_string())
    }

    /// Removes the group, whose processes have ended.
    pub fn remove(&self) {
        const PAUSE: Duration = Duration::from_millis(5);
        for _ in 0..PATIENCE.as_millis() / PAUSE.as_millis() {
            // SAFETY: the name is a string.
            if unsafe { libc::rmdir(self.name.as_ptr()) } == 0 {
                return;
            }
            thread::sleep(PAUSE);
        }
    }
}

/// The controllers that the hierarchy offers, separated by spaces; none without a hierarchy of
/// version 2.
pub fn controllers() -> Option<String> {
    let text = fs::read_to_string(Path::new(ROOT).join("cgroup.controllers")).ok()?;
    Some(text.trim().to_owned())
}

fn make_folder(path: &Path) -> Result<(), Refused> {
    match fs::create_dir(path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            Err(Refused { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// Writes to a file that is there: the hierarchy lets no one make files.
fn write(path: &Path, text: &str) -> Result<(), Refused> {
    let write = || {
        io::Write::write_all(&mut fs::OpenOptions::new().write(true).open(path)?, text.as_bytes())
    };
    write().map_err(|source| Refused { path: path.to_owned(), source })
}
