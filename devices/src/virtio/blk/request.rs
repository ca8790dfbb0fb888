//! Requests as a driver writes them (virtio 1.2 §5.2.6).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::backend::disk::SECTOR_BYTES;
use crate::virtio::chain::{Chain, TooShort};

/// The most sectors of one discard: 2 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// The most sectors of one zeroing: 64 MiB, which a host may have to write.
pub(super) const MAX_ZEROES_SECTORS: u32 = 1 << 17;
/// The most ranges of one discard or zeroing.
pub(super) const MAX_RANGES: u32 = 1;

/// The most data of one read or write, more than any driver puts into one. It bounds how long a
/// reset waits for the host.
pub(super) const MAX_REQUEST_BYTES: u64 = 256 << 20;

/// Bytes of `struct virtio_blk_req` before the data.
const HEADER_BYTES: usize = 16;
/// Bytes of `struct virtio_blk_discard_write_zeroes`.
const RANGE_BYTES: usize = 16;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    WriteZeroes { may_unmap: bool },
}

/// A request that makes sense by itself. Whether the disk reaches that far is not checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Command {
    pub kind: Kind,
    /// In bytes from the disk's start.
    pub offset: u64,
    /// In bytes.
    pub len: u64,
}

impl Command {
    /// Bytes that are read or written. Zeroes are written, too, as far as the guest can tell.
    pub fn bytes(&self) -> u64 {
        match self.kind {
            Kind::Read | Kind::Write | Kind::WriteZeroes { .. } => self.len,
            _ => 0,
        }
    }
}

/// Why a request is answered at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It has no status byte, so there is no way to answer.
    NoStatus,
    /// It makes no sense: VIRTIO_BLK_S_IOERR.
    Malformed,
    /// It makes sense, but not to this device: VIRTIO_BLK_S_UNSUPP.
    Unsupported,
}

impl From<TooShort> for Refusal {
    fn from(_: TooShort) -> Self {
        Self::Malformed
    }
}

/// What a device offers beside reading and writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offers {
    /// Flushing.
    pub flush: bool,
    /// Discarding and zeroing.
    pub ranges: bool,
}

/// Reads the request in `chain` up to its data and sets its status byte aside. Of a read, `chain`
/// then has exactly the data left to write, and of a write to read.
///
/// # Errors
/// How to answer what cannot be carried out.
pub(super) fn parse(chain: &mut Chain, offers: Offers) -> Result<Command, Refusal> {
    chain.take_status().map_err(|TooShort| Refusal::NoStatus)?;
    let mut header = [0; HEADER_BYTES];
    chain.read(&mut header)?;
    // type, reserved, sector; little-endian.
    let request_type = u32_at(&header, 0);
    let sector = u64_at(&header, 8);
    let (readable, writable) = (chain.readable_bytes(), chain.writable_bytes());
    match request_type {
        VIRTIO_BLK_T_IN if readable == 0 => data(Kind::Read, sector, writable),
        VIRTIO_BLK_T_OUT if writable == 0 => data(Kind::Write, sector, readable),
        VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => Err(Refusal::Malformed),
        VIRTIO_BLK_T_FLUSH if offers.flush => Ok(Command { kind: Kind::Flush, offset: 0, len: 0 }),
        VIRTIO_BLK_T_GET_ID => Ok(Command { kind: Kind::GetId, offset: 0, len: 0 }),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if offers.ranges => {
            range(chain, request_type)
        }
        _ => Err(Refusal::Unsupported),
    }
}

fn data(kind: Kind, sector: u64, len: u64) -> Result<Command, Refusal> {
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Refusal::Malformed)?;
    if len.is_multiple_of(SECTOR_BYTES) && len <= MAX_REQUEST_BYTES {
        Ok(Command { kind, offset, len })
    } else {
        Err(Refusal::Malformed)
    }
}

/// Reads the one range that a discard or zeroing may have.
fn range(chain: &mut Chain, request_type: u32) -> Result<Command, Refusal> {
    if chain.readable_bytes() != RANGE_BYTES as u64 {
        return Err(Refusal::Malformed);
    }
    let mut range = [0; RANGE_BYTES];
    chain.read(&mut range)?;
    // sector, num_sectors, flags; little-endian.
    let (sector, count, flags) = (u64_at(&range, 0), u32_at(&range, 8), u32_at(&range, 12));
    let kind = match (request_type, flags) {
        (VIRTIO_BLK_T_DISCARD, 0) => Kind::Discard,
        (VIRTIO_BLK_T_WRITE_ZEROES, 0) => Kind::WriteZeroes { may_unmap: false },
        (VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) => {
            Kind::WriteZeroes { may_unmap: true }
        }
        // §5.2.6.2: unknown flags, and unmap where it has no meaning.
        _ => return Err(Refusal::Unsupported),
    };
    let most = if kind == Kind::Discard { MAX_DISCARD_SECTORS } else { MAX_ZEROES_SECTORS };
    if count > most {
        return Err(Refusal::Malformed);
    }
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Refusal::Malformed)?;
    Ok(Command { kind, offset, len: u64::from(count) * SECTOR_BYTES })
}

fn u32_at(bytes: &[u8; 16], at: usize) -> u32 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.copied().map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8; 16], at: usize) -> u64 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.copied().map_or(0, u64::from_le_bytes)
}
