//! A socket that console clients connect to.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
};

use super::OpenError;

/// Clients that may wait for their turn.
const BACKLOG: i32 = 4;

/// A listening Unix socket in the file system; its name is removed on drop.
#[derive(Debug)]
pub(super) struct Listener {
    fd: OwnedFd,
    path: PathBuf,
    /// Device and inode of the name, so that another's is not removed.
    identity: Option<(u64, u64)>,
}

impl Listener {
    /// Listens at `path`, whose owner alone may connect. Replaces a socket that no one listens
    /// on.
    pub fn bind(path: &Path) -> Result<Self, OpenError> {
        make_way(path)?;
        let open = || -> io::Result<OwnedFd> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            // Before bind: the name takes the socket's mode, so it is never open to others.
            fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
            bind(&fd, &SocketAddrUnix::new(path)?)?;
            listen(&fd, BACKLOG)?;
            Ok(fd)
        };
        let fd = open().map_err(|source| OpenError::Socket { path: path.into(), source })?;
        Ok(Self { fd, path: path.into(), identity: identity(path) })
    }

    /// The name, to be removed by someone else from now on.
    pub fn take_name(&mut self) -> Option<PathBuf> {
        self.identity.take().map(|_| self.path.clone())
    }

    /// The next client, if one waits.
    pub fn accept(&self) -> Option<OwnedFd> {
        match accept_with(&self.fd, SocketFlags::CLOEXEC) {
            Ok(client) => Some(client),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => None,
            Err(error) => {
                tracing::warn!(%error, "a console client could not connect");
                None
            }
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // If it cannot be removed, the next start replaces it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

/// Removes a socket at `path` that no one listens on any more.
fn make_way(path: &Path) -> Result<(), OpenError> {
    let failed = |source| OpenError::Socket { path: path.into(), source };
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if !found.file_type().is_socket() {
        return Err(OpenError::NotASocket { path: path.into() });
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(OpenError::SocketInUse { path: path.into() }),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}
