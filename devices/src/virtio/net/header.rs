//! The header before each frame (virtio 1.2 §5.1.6, `struct virtio_net_hdr`), checked before the
//! host's kernel sees it.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP_L4,
};

use crate::backend::net::{HEADER_BYTES, MAX_FRAME_BYTES, MIN_FRAME_BYTES};

/// The checksum is to be filled in.
const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const GSO_NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
const GSO_TCPV4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const GSO_TCPV6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;
const GSO_UDP_L4: u8 = VIRTIO_NET_HDR_GSO_UDP_L4 as u8;
const GSO_ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;
/// Bytes of a checksum.
const CHECKSUM_BYTES: u64 = 2;

/// A header that may go to the host: it was negotiated, and it fits its frame.
///
/// Of the driver's bytes only those count that were looked at; all others are zero.
///
/// # Errors
/// [`Malformed`].
pub(super) fn check(
    raw: [u8; HEADER_BYTES],
    frame_bytes: u64,
    features: u64,
) -> Result<[u8; HEADER_BYTES], Malformed> {
    if !(MIN_FRAME_BYTES as u64..=MAX_FRAME_BYTES as u64).contains(&frame_bytes) {
        return Err(Malformed);
    }
    let [flags, gso_type, hdr_len, hdr_len_high, gso_size, gso_size_high, rest @ ..] = raw;
    let [start, start_high, offset, offset_high, _num_buffers, _] = rest;
    let mut checked = [0; HEADER_BYTES];
    let has = |feature: u32| features >> feature & 1 != 0;
    // Other flags are for frames that a device receives (§5.1.6.2.1).
    if flags & NEEDS_CSUM != 0 {
        let start_at = u64::from(u16::from_le_bytes([start, start_high]));
        let field = start_at + u64::from(u16::from_le_bytes([offset, offset_high]));
        if !has(VIRTIO_NET_F_CSUM) || field + CHECKSUM_BYTES > frame_bytes {
            return Err(Malformed);
        }
        [checked[0], checked[6], checked[7]] = [NEEDS_CSUM, start, start_high];
        [checked[8], checked[9]] = [offset, offset_high];
    }
    if gso_type != GSO_NONE {
        let (kind, ecn) = (gso_type & !GSO_ECN, gso_type & GSO_ECN != 0);
        let negotiated = match kind {
            GSO_TCPV4 => has(VIRTIO_NET_F_HOST_TSO4) && (!ecn || has(VIRTIO_NET_F_HOST_ECN)),
            GSO_TCPV6 => has(VIRTIO_NET_F_HOST_TSO6) && (!ecn || has(VIRTIO_NET_F_HOST_ECN)),
            GSO_UDP_L4 => has(VIRTIO_NET_F_HOST_USO) && !ecn,
            _ => false,
        };
        let size = u16::from_le_bytes([gso_size, gso_size_high]);
        let headers = u64::from(u16::from_le_bytes([hdr_len, hdr_len_high]));
        // Segments have checksums, which someone must fill in (§5.1.6.2).
        if !negotiated || size == 0 || headers > frame_bytes || flags & NEEDS_CSUM == 0 {
            return Err(Malformed);
        }
        [checked[1], checked[2], checked[3]] = [gso_type, hdr_len, hdr_len_high];
        [checked[4], checked[5]] = [gso_size, gso_size_high];
    }
    Ok(checked)
}

/// The frame is too short or too long, or its header asks for what was not negotiated or does not
/// lie in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: u64 = u64::MAX;
    const FRAME: u64 = 100;

    /// flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers.
    fn header(fields: (u8, u8, u16, u16, u16, u16, u16)) -> [u8; HEADER_BYTES] {
        let (flags, gso_type, hdr_len, gso_size, start, offset, buffers) = fields;
        let mut raw = [0; HEADER_BYTES];
        [raw[0], raw[1]] = [flags, gso_type];
        for (at, field) in [(2, hdr_len), (4, gso_size), (6, start), (8, offset), (10, buffers)] {
            raw[at..at + 2].copy_from_slice(&field.to_le_bytes());
        }
        raw
    }

    #[test]
    fn what_fits_passes_as_it_is() {
        for fields in [
            (0, 0, 0, 0, 0, 0, 0),
            (NEEDS_CSUM, 0, 0, 0, 34, 16, 0),
            (NEEDS_CSUM, 0, 0, 0, 98, 0, 0),
            (NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16, 0),
            (NEEDS_CSUM, GSO_TCPV6 | GSO_ECN, 100, 1, 54, 16, 0),
            (NEEDS_CSUM, GSO_UDP_L4, 42, 1472, 34, 6, 0),
        ] {
            assert_eq!(check(header(fields), FRAME, ALL), Ok(header(fields)), "{fields:?}");
        }
    }

    #[test]
    fn what_does_not_fit_or_was_not_negotiated_is_refused() {
        let csum_only = 1 << VIRTIO_NET_F_CSUM;
        for (fields, features) in [
            ((NEEDS_CSUM, 0, 0, 0, 34, 16, 0), 0),
            ((NEEDS_CSUM, 0, 0, 0, 99, 0, 0), ALL),
            ((NEEDS_CSUM, 0, 0, 0, 34, 65, 0), ALL),
            ((NEEDS_CSUM, 0, 0, 0, u16::MAX, u16::MAX, 0), ALL),
            ((NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16, 0), csum_only),
            ((NEEDS_CSUM, GSO_TCPV4, 54, 0, 34, 16, 0), ALL),
            ((NEEDS_CSUM, GSO_TCPV4, 101, 1448, 34, 16, 0), ALL),
            ((0, GSO_TCPV4, 54, 1448, 34, 16, 0), ALL),
            ((NEEDS_CSUM, GSO_UDP_L4 | GSO_ECN, 42, 1472, 34, 6, 0), ALL),
            ((NEEDS_CSUM, 2, 42, 1472, 34, 6, 0), ALL),
            ((NEEDS_CSUM, 3, 42, 1472, 34, 6, 0), ALL),
            ((NEEDS_CSUM, GSO_ECN, 42, 1472, 34, 6, 0), ALL),
        ] {
            assert_eq!(check(header(fields), FRAME, features), Err(Malformed), "{fields:?}");
        }
        for bytes in [0, 13, MAX_FRAME_BYTES as u64 + 1, 1 << 32] {
            assert_eq!(check(header((0, 0, 0, 0, 0, 0, 0)), bytes, ALL), Err(Malformed));
        }
    }

    #[test]
    fn what_is_not_for_the_host_is_zeroed() {
        // DATA_VALID, fields without meaning, a number of buffers.
        let raw = header((2, 0, 1, 2, 3, 4, 5));
        assert_eq!(check(raw, FRAME, ALL), Ok([0; HEADER_BYTES]));
    }

    proptest! {
        /// Whatever passes keeps to the frame and to what was negotiated.
        #[test]
        fn nothing_else_reaches_the_host(
            raw: [u8; HEADER_BYTES], frame in 0u64..200, features: u64,
        ) {
            let Ok(checked) = check(raw, frame, features) else { return Ok(()) };
            let field = |at: usize| u64::from(u16::from_le_bytes([checked[at], checked[at + 1]]));
            prop_assert_eq!(checked[0] & !NEEDS_CSUM, 0);
            prop_assert!(checked[0] == 0 || features >> VIRTIO_NET_F_CSUM & 1 != 0);
            prop_assert!(checked[0] == 0 || field(6) + field(8) + 2 <= frame);
            prop_assert!(checked[1] == 0 || (field(4) > 0 && checked[0] == NEEDS_CSUM));
            prop_assert!(field(2) <= frame);
            prop_assert_eq!(field(10), 0);
        }
    }
}
