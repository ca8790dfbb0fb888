//! Networks: where a guest's Ethernet frames go to and come from.
//!
//! A [`NetPort`] carries frames for one thread. The ports of a network:
//!
//! - [`Tap`]: a queue of a tap interface of the host's kernel, straight between the kernel and the
//!   memory of the frame, with checksums and segmentation left to whoever can do them best;
//! - [`Stream`]: a socket to a program that takes frames one after another, such as [`Passt`], which
//!   needs no privilege.
//!
//! Each frame goes with a header of [`HEADER_BYTES`] that says what of it is left to be done, the
//! `virtio_net_hdr_v1` of Linux (`linux/virtio_net.h`), little-endian, which tap interfaces take.
#![expect(unsafe_code, reason = "frames lie in memory that others may change meanwhile")]

mod forward;
mod mac;
mod passt;
mod stream;
mod tap;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

use libc::iovec;

pub use forward::{Forward, ParseForwardError, Protocol};
pub use mac::{Mac, ParseMacError};
pub use passt::{GATEWAY, GUEST_ADDRESS, Passt, PasstError, PasstOptions};
pub use stream::{Stream, inherited};
pub use tap::{Tap, TapError};

/// Bytes of the header before each frame.
pub const HEADER_BYTES: usize = 12;
/// Where the number of buffers lies that the frame takes, two bytes. Ports leave it alone.
pub const HEADER_NUM_BUFFERS: usize = 10;
/// The least bytes of a frame, those of an Ethernet header.
pub const MIN_FRAME_BYTES: usize = 14;
/// The most bytes of a frame without its header: the longest IP packet, an Ethernet header, and a
/// VLAN tag.
pub const MAX_FRAME_BYTES: usize = 65535 + 14 + 4;

/// What a receiver of frames does itself, so that the sender need not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums of TCP and UDP may be missing. The others need it.
    pub checksum: bool,
    /// TCP over IPv4 may come in segments that are longer than a frame on a wire.
    pub tso4: bool,
    /// TCP over IPv6 likewise.
    pub tso6: bool,
    /// Such segments may carry congestion marks.
    pub ecn: bool,
    /// UDP may come so.
    pub uso: bool,
}

impl Offloads {
    /// Nothing: each frame is as on a wire.
    pub const NONE: Self =
        Self { checksum: false, tso4: false, tso6: false, ecn: false, uso: false };

    /// Whether a frame may be longer than the network's MTU.
    pub fn has_segments(self) -> bool {
        self.tso4 || self.tso6 || self.uso
    }
}

/// Why a frame was not carried.
#[derive(Debug)]
pub enum Failure {
    /// Not now: the port's descriptor becomes ready when it is worth another try.
    WouldBlock,
    /// This frame cannot be carried; others may.
    Refused(io::Error),
    /// The interface is down and may come up again; the descriptor becomes ready then.
    Down,
    /// The network is gone for good.
    Gone(Option<io::Error>),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WouldBlock => f.write_str("the network is busy"),
            Self::Refused(error) => write!(f, "the network refuses a frame: {error}"),
            Self::Down => f.write_str("the interface is down"),
            Self::Gone(None) => f.write_str("the other end was closed"),
            Self::Gone(Some(error)) => write!(f, "the network is gone: {error}"),
        }
    }
}

/// One way into a network, for one thread. Nothing here waits.
pub trait NetPort: Send + fmt::Debug {
    /// Becomes readable when frames come in and writable when they can go out, edge by edge.
    fn descriptor(&self) -> BorrowedFd<'_>;

    /// Fills `buffers` with a header and the next frame, and returns the bytes of both. A frame that
    /// does not fit is cut off.
    ///
    /// # Errors
    /// [`Failure`]; the buffers' content is undefined.
    ///
    /// # Safety
    /// The buffers' memory is mapped and writable. Others may access it meanwhile.
    unsafe fn receive(&mut self, buffers: &[iovec]) -> Result<usize, Failure>;

    /// Sends a frame whole: the first of `buffers` is its header, the others the frame.
    ///
    /// # Errors
    /// [`Failure`]; the frame was not sent.
    ///
    /// # Safety
    /// The buffers' memory is mapped and readable. Others may access it meanwhile.
    unsafe fn send(&mut self, buffers: &[iovec]) -> Result<(), Failure>;

    /// The descriptor has become writable: sends what may be left of an earlier frame.
    ///
    /// # Errors
    /// [`Failure`].
    fn flush(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    /// Has frames come in as one with these `offloads` wants them, for all ports of the network.
    ///
    /// # Errors
    /// The host refuses; frames come in as before.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let _ = offloads;
        Ok(())
    }

    /// Lets frames come in through this port, or leaves them to the network's other ports.
    ///
    /// # Errors
    /// The host refuses.
    fn set_attached(&mut self, attached: bool) -> io::Result<()> {
        let _ = attached;
        Ok(())
    }
}

/// A network as a device gets it.
#[derive(Debug)]
pub struct Network {
    /// One way in for each thread, at least one.
    pub ports: Vec<Box<dyn NetPort>>,
    /// What may be asked of it by [`NetPort::set_offloads`], and what of a frame that is sent may be
    /// left to it.
    pub offloads: Offloads,
    /// The most bytes of a packet, Ethernet header not counted, if the network says.
    pub mtu: Option<u16>,
}
