//! One end of a console on the host: reads and writes that do not wait.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::termios::isatty;

/// What a pipe that is ready takes without waiting (PIPE_BUF, pipe(7)).
const PIPE_CHUNK_BYTES: usize = 4096;
/// What a terminal that is ready is trusted to take without waiting.
const TERMINAL_CHUNK_BYTES: usize = 64;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the host to the guest.
    Input,
    /// From the guest to the host.
    Output,
}

/// How reads and writes are kept from waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// A regular file: always ready, and epoll refuses it.
    File,
    /// An open file description of our own with `O_NONBLOCK`.
    NonBlocking,
    /// A socket: `MSG_DONTWAIT` on each call.
    Socket,
    /// A description shared with other processes, whose flags are not ours to change: asked by
    /// poll(2) first, then given no more than this many bytes.
    Polled { chunk_bytes: usize },
}

/// A host file, pipe, socket or terminal, read or written without waiting and without changing
/// what other processes see of it (`O_NONBLOCK` on stdin and stdout would be theirs too).
#[derive(Debug)]
pub struct Stream {
    fd: OwnedFd,
    access: Access,
}

impl Stream {
    /// A stream over `fd`, which other processes may share.
    ///
    /// Pipes and terminals are opened anew through /proc, which gives a description of our own.
    /// Where that is refused (another user's pipe, no /proc) poll(2) is asked before each call.
    ///
    /// # Errors
    /// `fd` is not open, or cannot be duplicated.
    pub fn shared(fd: BorrowedFd<'_>, direction: Direction) -> io::Result<Self> {
        let kind = FileType::from_raw_mode(fstat(fd)?.st_mode);
        let chunk_bytes = match kind {
            FileType::RegularFile | FileType::BlockDevice => {
                return Self::duplicate(fd, Access::File);
            }
            FileType::Socket => return Self::duplicate(fd, Access::Socket),
            FileType::Fifo => PIPE_CHUNK_BYTES,
            _ if isatty(fd) => TERMINAL_CHUNK_BYTES,
            _ => return Self::duplicate(fd, Access::Polled { chunk_bytes: PIPE_CHUNK_BYTES }),
        };
        match reopen(fd, direction) {
            Ok(own) => Ok(Self::non_blocking(own)),
            Err(_) => Self::duplicate(fd, Access::Polled { chunk_bytes }),
        }
    }

    /// A stream over a description of our own that has `O_NONBLOCK`.
    pub fn non_blocking(fd: OwnedFd) -> Self {
        Self { fd, access: Access::NonBlocking }
    }

    /// A stream over a connected socket.
    pub fn socket(fd: OwnedFd) -> Self {
        Self { fd, access: Access::Socket }
    }

    /// A stream over a file that was opened with `O_NONBLOCK`, which regular files ignore.
    ///
    /// # Errors
    /// The file's type cannot be read.
    pub fn opened(file: File) -> io::Result<Self> {
        let regular = file.metadata()?.file_type().is_file();
        let access = if regular { Access::File } else { Access::NonBlocking };
        Ok(Self { fd: file.into(), access })
    }

    /// The same end under a second descriptor, so that both can be in one epoll set.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Self::duplicate(self.fd.as_fd(), self.access)
    }

    /// Whether this is a file that is always ready and that epoll does not take.
    pub fn is_always_ready(&self) -> bool {
        self.access == Access::File
    }

    /// Reads what is there, at most `buffer.len()` bytes; 0 at the end.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there yet; else what read(2) says.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.access {
            Access::File | Access::NonBlocking => {}
            Access::Socket => return Ok(recv(&self.fd, buffer, RecvFlags::DONTWAIT)?.0),
            Access::Polled { .. } => self.require(PollFlags::IN)?,
        }
        Ok(rustix::io::read(&self.fd, buffer)?)
    }

    /// Writes as much of `bytes` as fits now, at least one byte.
    ///
    /// # Errors
    /// `WouldBlock` when nothing fits; else what write(2) says.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let bytes = match self.access {
            Access::File | Access::NonBlocking => bytes,
            Access::Socket => {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                return Ok(send(&self.fd, bytes, flags)?);
            }
            Access::Polled { chunk_bytes } => {
                self.require(PollFlags::OUT)?;
                bytes.get(..chunk_bytes).unwrap_or(bytes)
            }
        };
        Ok(rustix::io::write(&self.fd, bytes)?)
    }

    /// Waits until a write would do something (or fail), `timeout` at the longest.
    ///
    /// # Errors
    /// poll(2) failed.
    pub fn wait_writable(&self, timeout: Duration) -> io::Result<()> {
        self.poll(PollFlags::OUT, timeout).map(drop)
    }

    /// Whether the other end has gone away (POLLHUP).
    pub fn is_hung_up(&self) -> bool {
        self.poll(PollFlags::empty(), Duration::ZERO)
            .is_ok_and(|events| events.contains(PollFlags::HUP))
    }

    fn duplicate(fd: BorrowedFd<'_>, access: Access) -> io::Result<Self> {
        Ok(Self { fd: fd.try_clone_to_owned()?, access })
    }

    fn require(&self, wanted: PollFlags) -> io::Result<()> {
        if self.poll(wanted, Duration::ZERO)?.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(())
    }

    fn poll(&self, wanted: PollFlags, timeout: Duration) -> io::Result<PollFlags> {
        let timeout = Timespec::try_from(timeout).unwrap_or(Timespec { tv_sec: 60, tv_nsec: 0 });
        let mut fds = [PollFd::new(&self.fd, wanted)];
        poll(&mut fds, Some(&timeout))?;
        let [fd] = fds;
        Ok(fd.revents())
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Opens what `fd` refers to once more, for ourselves. A terminal that is read is opened for
/// writing too, since help is printed there.
fn reopen(fd: BorrowedFd<'_>, direction: Direction) -> rustix::io::Result<OwnedFd> {
    let access = match direction {
        Direction::Input if isatty(fd) => OFlags::RDWR,
        Direction::Input => OFlags::RDONLY,
        Direction::Output => OFlags::WRONLY,
    };
    let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    open(format!("/proc/self/fd/{}", fd.as_raw_fd()), flags, Mode::empty())
}
