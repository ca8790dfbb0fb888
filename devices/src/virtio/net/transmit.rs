//! The way of frames out of the guest: transmitq (virtio 1.2 §5.1.6.2).
#![expect(unsafe_code, reason = "hands the guest's memory to the network")]

use libc::iovec;

use super::header::{self, Malformed};
use crate::backend::net::{Failure, HEADER_BYTES, NetPort};
use crate::virtio::chain::Chain;

/// Reads frames from chains and sends them. The header is read once: what was checked is what the
/// network gets. The frame goes as it lies in the guest's memory.
#[derive(Debug, Default)]
pub(super) struct Sender {
    pieces: Vec<iovec>,
}

// SAFETY: the list is empty but while a frame is sent.
unsafe impl Send for Sender {}

impl Sender {
    /// The frame of `chain` with the header that goes before it, ready for [`Sender::send`].
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn parse(chain: &mut Chain, features: u64) -> Result<([u8; HEADER_BYTES], u64), Malformed> {
        let mut raw = [0; HEADER_BYTES];
        chain.read(&mut raw).map_err(|_| Malformed)?;
        let bytes = chain.readable_bytes();
        header::check(raw, bytes, features).map(|header| (header, bytes))
    }

    /// Sends what [`Sender::parse`] has found.
    ///
    /// # Errors
    /// [`Failure`].
    pub fn send(
        &mut self,
        port: &mut dyn NetPort,
        header: &[u8; HEADER_BYTES],
        chain: &Chain,
    ) -> Result<(), Failure> {
        let header = iovec { iov_base: header.as_ptr().cast_mut().cast(), iov_len: HEADER_BYTES };
        self.pieces.push(header);
        self.pieces.extend_from_slice(chain.readable());
        // SAFETY: the header outlives the call, and the chain keeps the guest's memory mapped.
        let result = unsafe { port.send(&self.pieces) };
        self.pieces.clear();
        result
    }
}
