//! A pseudo-terminal that console clients open.

use std::ffi::OsString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::stream::Stream;

/// The master side of a pseudo-terminal, and the means to learn that a client opens the slave.
///
/// A master whose slave no one has open hangs up, which epoll reports without end; so it is
/// watched only while someone is there, and inotify on the slave's name tells when that is.
#[derive(Debug)]
pub(super) struct Pty {
    master: Arc<Stream>,
    arrivals: OwnedFd,
    path: PathBuf,
}

impl Pty {
    /// A new pseudo-terminal. Its slave is in raw mode and stays so while the master is open.
    pub fn open() -> io::Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        rustix::io::ioctl_fionbio(&master, true)?;

        let slave_flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let slave = open(&name, slave_flags, Mode::empty())?;
        let mut settings = tcgetattr(&slave)?;
        settings.make_raw();
        tcsetattr(&slave, OptionalActions::Now, &settings)?;
        drop(slave);

        let arrivals = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        inotify::add_watch(&arrivals, &name, WatchFlags::OPEN)?;
        Ok(Self {
            master: Arc::new(Stream::non_blocking(master)),
            arrivals,
            path: OsString::from_vec(name.into_bytes()).into(),
        })
    }

    /// The slave's name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The master side.
    pub fn master(&self) -> &Arc<Stream> {
        &self.master
    }

    /// The master side alone.
    #[cfg(test)]
    pub fn into_master(self) -> Arc<Stream> {
        self.master
    }

    /// Takes note of the arrivals so far.
    pub fn clear_arrivals(&self) {
        let mut buffer = [MaybeUninit::uninit(); 256];
        let mut reader = Reader::new(&self.arrivals, &mut buffer);
        while reader.next().is_ok() {}
    }

    /// Whether a client has the slave open.
    pub fn has_client(&self) -> bool {
        !self.master.is_hung_up()
    }
}

impl AsRawFd for Pty {
    /// The descriptor that becomes readable when a client opens the slave.
    fn as_raw_fd(&self) -> RawFd {
        self.arrivals.as_raw_fd()
    }
}
