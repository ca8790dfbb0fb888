//! The features of a network device (virtio 1.2 §5.1.3).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
};

use crate::backend::net::Offloads;

/// What a driver may do itself of the frames that it receives, and may switch while it runs.
pub(super) const RECEIVE_OFFLOADS: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_GUEST_USO4
    | 1 << VIRTIO_NET_F_GUEST_USO6;

/// Features that depend on others: each on one of those beside it at least (§5.1.3.1).
const DEPENDENCIES: [(u32, &[u32]); 12] = [
    (VIRTIO_NET_F_GUEST_TSO4, &[VIRTIO_NET_F_GUEST_CSUM]),
    (VIRTIO_NET_F_GUEST_TSO6, &[VIRTIO_NET_F_GUEST_CSUM]),
    (VIRTIO_NET_F_GUEST_ECN, &[VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6]),
    (VIRTIO_NET_F_GUEST_USO4, &[VIRTIO_NET_F_GUEST_CSUM]),
    (VIRTIO_NET_F_GUEST_USO6, &[VIRTIO_NET_F_GUEST_CSUM]),
    (VIRTIO_NET_F_HOST_TSO4, &[VIRTIO_NET_F_CSUM]),
    (VIRTIO_NET_F_HOST_TSO6, &[VIRTIO_NET_F_CSUM]),
    (VIRTIO_NET_F_HOST_ECN, &[VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6]),
    (VIRTIO_NET_F_HOST_USO, &[VIRTIO_NET_F_CSUM]),
    (VIRTIO_NET_F_MQ, &[VIRTIO_NET_F_CTRL_VQ]),
    (VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, &[VIRTIO_NET_F_CTRL_VQ]),
    // USO is offered for both versions of IP or none, and hosts switch them together.
    (VIRTIO_NET_F_GUEST_USO4, &[VIRTIO_NET_F_GUEST_USO6]),
];

/// Whether `features` have bit `number`.
pub(super) fn has(features: u64, number: u32) -> bool {
    features >> number & 1 != 0
}

/// What a device offers on a network that can do `offloads`, with so many queue pairs.
pub(super) fn offered(offloads: Offloads, max_pairs: u16, has_mtu: bool) -> u64 {
    let Offloads { checksum, tso4, tso6, ecn, uso } = offloads;
    let bits = [
        (VIRTIO_NET_F_MAC, true),
        (VIRTIO_NET_F_STATUS, true),
        (VIRTIO_NET_F_MRG_RXBUF, true),
        (VIRTIO_NET_F_MTU, has_mtu),
        (VIRTIO_NET_F_CTRL_VQ, max_pairs > 1 || checksum),
        (VIRTIO_NET_F_MQ, max_pairs > 1),
        (VIRTIO_NET_F_CSUM, checksum),
        (VIRTIO_NET_F_HOST_TSO4, tso4),
        (VIRTIO_NET_F_HOST_TSO6, tso6),
        (VIRTIO_NET_F_HOST_ECN, ecn),
        (VIRTIO_NET_F_HOST_USO, uso),
        (VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, checksum),
        (VIRTIO_NET_F_GUEST_CSUM, checksum),
        (VIRTIO_NET_F_GUEST_TSO4, tso4),
        (VIRTIO_NET_F_GUEST_TSO6, tso6),
        (VIRTIO_NET_F_GUEST_ECN, ecn),
        (VIRTIO_NET_F_GUEST_USO4, uso),
        (VIRTIO_NET_F_GUEST_USO6, uso),
    ];
    bits.iter().filter(|(_, offered)| *offered).fold(0, |sum, (bit, _)| sum | 1 << bit)
}

/// Whether no feature lacks one that it depends on.
pub(super) fn go_together(features: u64) -> bool {
    DEPENDENCIES.iter().all(|(feature, needed)| {
        !has(features, *feature) || needed.iter().any(|other| has(features, *other))
    })
}
