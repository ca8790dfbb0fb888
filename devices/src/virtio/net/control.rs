//! The control queue (virtio 1.2 §5.1.6.5): how many queue pairs are in use, and what the guest does
//! itself of the frames that it receives.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};

use crate::virtio::chain::{Chain, TooShort};

/// What the driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Use the first so many queue pairs, 1 to what there are.
    Pairs(u16),
    /// Use these offloads, feature bits that were negotiated.
    Offloads(u64),
}

/// Reads the command in `chain`; `None` if it makes no sense or was not negotiated.
pub(super) fn parse(
    chain: &mut Chain,
    features: u64,
    max_pairs: u16,
    offload_features: u64,
) -> Option<Command> {
    let has = |feature: u32| features >> feature & 1 != 0;
    let mut kind = [0; 2];
    chain.read(&mut kind).ok()?;
    match kind.map(u32::from) {
        [VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET] if has(VIRTIO_NET_F_MQ) => {
            let pairs = u16::from_le_bytes(read(chain).ok()?);
            (1..=max_pairs).contains(&pairs).then_some(Command::Pairs(pairs))
        }
        [VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET]
            if has(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) =>
        {
            let offloads = u64::from_le_bytes(read(chain).ok()?);
            let allowed = features & offload_features;
            (offloads & !allowed == 0).then_some(Command::Offloads(offloads))
        }
        _ => None,
    }
}

/// Writes the answer; how many bytes of the chain are written then.
pub(super) fn answer(chain: &mut Chain, done: bool) -> u32 {
    let ack = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR } as u8;
    let written = chain.write(&[ack]);
    u32::try_from(written).unwrap_or(0)
}

fn read<const N: usize>(chain: &mut Chain) -> Result<[u8; N], TooShort> {
    let mut bytes = [0; N];
    chain.read(&mut bytes).map(|()| bytes)
}
