//! A network that is the benchmark's own, with one tap interface; no right on the host is needed where
//! plain users may make namespaces.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use rustix::process::{getegid, geteuid};

/// The interface.
pub const TAP: &str = "tap0";
/// The host's address on it.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
/// The guest's.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

/// Why there is no such network.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NamespaceError {
    /// The host has no namespaces for this user.
    #[error("the host gives this user no namespaces: {0}; alcove doctor tells more (jail)")]
    Refused(io::Error),
    /// `ip` of the package iproute2.
    #[error("ip {arguments}: {said}; it takes iproute2 and the module tun")]
    Ip {
        /// What it was asked.
        arguments: String,
        /// What it answered.
        said: String,
    },
}

/// Moves the calling process, which must have one thread only, to a network of its own if it needs one,
/// and a user who is not root to a namespace in which it is, and may look into what it starts.
///
/// # Errors
/// [`NamespaceError`]. The process may go on; a network it has none.
pub fn enter(needs_network: bool) -> Result<(), NamespaceError> {
    let network = if needs_network { CloneFlags::CLONE_NEWNET } else { CloneFlags::empty() };
    if geteuid().is_root() {
        unshare(network).map_err(|error| NamespaceError::Refused(error.into()))?;
    } else {
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        unshare(CloneFlags::CLONE_NEWUSER | network)
            .map_err(|error| NamespaceError::Refused(error.into()))?;
        let write = |file: &str, text: &str| fs::write(format!("/proc/self/{file}"), text);
        // Else the kernel lets a plain user map no group.
        write("setgroups", "deny")
            .and_then(|()| write("uid_map", &format!("0 {uid} 1")))
            .and_then(|()| write("gid_map", &format!("0 {gid} 1")))
            .map_err(NamespaceError::Refused)?;
    }
    if needs_network {
        let address = format!("{HOST}/24");
        ip(&["link", "set", "lo", "up"])?;
        ip(&["tuntap", "add", TAP, "mode", "tap"])?;
        ip(&["addr", "add", &address, "dev", TAP])?;
        ip(&["link", "set", TAP, "up"])?;
    }
    Ok(())
}

fn ip(arguments: &[&str]) -> Result<(), NamespaceError> {
    let failed = |said: String| NamespaceError::Ip { arguments: arguments.join(" "), said };
    let ended = Command::new("ip").args(arguments).output().map_err(|e| failed(e.to_string()))?;
    match ended.status.success() {
        true => Ok(()),
        false => Err(failed(String::from_utf8_lossy(&ended.stderr).trim().to_owned())),
    }
}
