//! Finds a kernel when none is named.

use std::fs;
use std::path::PathBuf;

/// No kernel was named and none was found.
#[derive(Debug, thiserror::Error)]
#[error(
    "no --kernel was given and none is at {tried}; name a vmlinux or bzImage with --kernel FILE"
)]
pub struct NoKernel {
    tried: String,
}

/// The first of `./vmlinux`, `./bzImage` and the running kernel's `/boot/vmlinuz-<release>`.
pub fn find() -> Result<PathBuf, NoKernel> {
    let mut places = vec![PathBuf::from("./vmlinux"), PathBuf::from("./bzImage")];
    if let Ok(release) = fs::read_to_string("/proc/sys/kernel/osrelease") {
        places.push(format!("/boot/vmlinuz-{}", release.trim()).into());
    }
    if let Some(found) = places.iter().find(|place| place.is_file()) {
        return Ok(found.clone());
    }
    let tried: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
    Err(NoKernel { tried: tried.join(", ") })
}
