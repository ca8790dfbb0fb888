//! The host's side of a serial console: where the guest's output goes and its input comes from.
//!
//! [`Backend`] is what was opened, [`Output`] the buffer that vCPU threads print into, and
//! [`ConsolePump`] the event loop's part: it reads what is typed, hands it to the device that is
//! its [`Receiver`], and drains output that the host was slow to take.

mod output;
mod pty;
mod pump;
mod socket;
mod stream;
mod waker;

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::termios::isatty;

pub use output::{BUFFER_BYTES, Output, TAIL_BYTES, Unattended};
pub use pump::ConsolePump;
pub use stream::{Direction, Stream};
pub use waker::Waker;

use super::terminal::{RawMode, in_foreground};
use crate::timer::Timer;
use pty::Pty;
use socket::Listener;

/// The device that takes what is typed. Called from the event loop only.
pub trait Receiver: Send + Sync {
    /// How many bytes [`Receiver::deliver`] takes now. Once this was less than
    /// [`MIN_ROOM_BYTES`], the device calls [`Waker::wake`] when it has more.
    fn room(&self) -> usize;
    /// Takes `bytes`, no more than [`Receiver::room`] has just said.
    fn deliver(&self, bytes: &[u8]);
    /// The timer by which the device paces its input; the event loop watches it.
    fn pace(&self) -> &Timer;
    /// The timer has fired.
    fn on_pace(&self);
}

/// The least room that is worth a read: the escape key can make two bytes out of one.
pub const MIN_ROOM_BYTES: usize = 2;

/// Why a console could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file could not be created or truncated.
    #[error("cannot write the serial file {}", path.display())]
    File {
        /// The file as it was named.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// The socket could not be made or listened on.
    #[error("cannot listen on the serial socket {}", path.display())]
    Socket {
        /// The socket as it was named.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// Another process listens on the socket.
    #[error("the serial socket {} is in use by another process; choose another path", path.display())]
    SocketInUse {
        /// The socket as it was named.
        path: PathBuf,
    },
    /// Something that is not a socket has the socket's name.
    #[error("{} exists and is not a socket; remove it or choose another path", path.display())]
    NotASocket {
        /// The socket as it was named.
        path: PathBuf,
    },
    /// No pseudo-terminal could be had.
    #[error("cannot open a pseudo-terminal for the serial console")]
    Pty(#[source] io::Error),
    /// The terminal on stdin could not be put into raw mode.
    #[error("cannot put the terminal into raw mode for the serial console")]
    Terminal(#[source] io::Error),
    /// The event loop's descriptors for the console could not be had.
    #[error("cannot set up the serial console's events")]
    Events(#[source] io::Error),
}

/// How clients come and go.
#[derive(Debug)]
enum Door {
    /// They do not: what was opened is all there will be.
    Closed,
    /// One client at a time connects to a socket.
    Socket(Listener),
    /// Processes open the slave side of a pseudo-terminal.
    Pty(Pty),
}

/// An opened console, ready to be given to a serial port.
#[derive(Debug)]
pub struct Backend {
    source: Option<Stream>,
    sink: Option<Stream>,
    door: Door,
    /// Ctrl-a is the escape key in what is read.
    escapes: bool,
    raw_mode: Option<RawMode>,
}

impl Backend {
    /// The process's stdin and stdout.
    ///
    /// When stdin is a terminal it is put into raw mode until the backend, or the pump made of it,
    /// is dropped or [`super::terminal::restore`] is called, and Ctrl-a is the escape key. In its
    /// terminal's background the process leaves the terminal alone and there is no input. A stdin
    /// or stdout that is closed is as good as /dev/null.
    ///
    /// # Errors
    /// [`OpenError::Terminal`].
    pub fn stdio() -> Result<Self, OpenError> {
        let (stdin, stdout) = (io::stdin(), io::stdout());
        let sink = Stream::shared(stdout.as_fd(), Direction::Output).ok();
        let escapes = isatty(&stdin);
        let usable = !escapes || in_foreground(stdin.as_fd());
        let source = usable.then(|| Stream::shared(stdin.as_fd(), Direction::Input).ok()).flatten();
        let raw_mode = RawMode::enter(stdin.as_fd()).map_err(OpenError::Terminal)?;
        Ok(Self { source, sink, door: Door::Closed, escapes, raw_mode })
    }

    /// No input, and output is dropped.
    pub fn null() -> Self {
        Self { source: None, sink: None, door: Door::Closed, escapes: false, raw_mode: None }
    }

    /// Output to the file at `path`, truncated, or created with mode 0644 less the umask. A FIFO
    /// or device will do as well; a FIFO must have a reader. No input.
    ///
    /// # Errors
    /// [`OpenError::File`].
    pub fn file(path: &Path) -> Result<Self, OpenError> {
        let open = || {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o644)
                .custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed())
                .open(path)?;
            Stream::opened(file)
        };
        let sink = open().map_err(|source| OpenError::File { path: path.into(), source })?;
        Ok(Self { sink: Some(sink), ..Self::null() })
    }

    /// Input and output through `source` and `sink` as they are, bytes unchanged.
    pub fn streams(source: Option<Stream>, sink: Option<Stream>) -> Self {
        Self { source, sink, ..Self::null() }
    }

    /// A socket at `path`, mode 0600, removed when the console is dropped. One client at a time;
    /// the next one waits until it has gone. Without a client the latest [`BUFFER_BYTES`] of
    /// output are kept for the next one and older ones dropped; a client that does not read
    /// stalls the guest once the buffer is full.
    ///
    /// A socket that a dead process left behind is replaced.
    ///
    /// # Errors
    /// [`OpenError::NotASocket`], [`OpenError::SocketInUse`], [`OpenError::Socket`].
    pub fn unix(path: &Path) -> Result<Self, OpenError> {
        Ok(Self { door: Door::Socket(Listener::bind(path)?), ..Self::null() })
    }

    /// A pseudo-terminal in raw mode, see [`Backend::pty_path`]. While no process has it open,
    /// output is kept as for [`Backend::unix`].
    ///
    /// # Errors
    /// [`OpenError::Pty`].
    pub fn pty() -> Result<Self, OpenError> {
        Ok(Self { door: Door::Pty(Pty::open().map_err(OpenError::Pty)?), ..Self::null() })
    }

    /// The path of the pseudo-terminal that clients open, if this is one.
    pub fn pty_path(&self) -> Option<&Path> {
        match &self.door {
            Door::Pty(pty) => Some(pty.path()),
            Door::Closed | Door::Socket(_) => None,
        }
    }

    /// The name of the socket that clients connect to, if this is one. The caller removes it in
    /// the end, which the console then leaves to it.
    pub fn take_socket_name(&mut self) -> Option<PathBuf> {
        match &mut self.door {
            Door::Socket(listener) => listener.take_name(),
            Door::Closed | Door::Pty(_) => None,
        }
    }

    /// The buffer to print into.
    ///
    /// # Errors
    /// [`OpenError::Events`].
    pub(crate) fn output(&mut self, waker: Waker) -> Result<Arc<Output>, OpenError> {
        let unattended = match self.door {
            Door::Closed => Unattended::Dropped,
            Door::Socket(_) | Door::Pty(_) => Unattended::Kept,
        };
        let sink = self.sink.take().map(Arc::new);
        Output::new(sink, unattended, waker).map(Arc::new).map_err(OpenError::Events)
    }
}

#[cfg(test)]
mod tests;
