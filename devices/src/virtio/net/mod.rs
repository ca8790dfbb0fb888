//! The network device (virtio 1.2 §5.1): an Ethernet interface for the guest.
//!
//! Each pair of queues has a thread (`worker`) that moves frames straight between the guest's memory
//! and a network ([`NetPort`](crate::backend::net::NetPort)): `receive` into the guest, `transmit`
//! out of it, past the check of their `header`. This module is what the transport sees: features,
//! configuration, life cycle.

mod config;
mod control;
mod features;
mod header;
mod metrics;
mod receive;
mod shared;
mod transmit;
mod worker;

use std::io;
use std::mem::offset_of;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MQ, virtio_net_config};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use config::{MAX_QUEUES, Mode, NetConfig, NetConfigError};
pub use metrics::{DirectionMetrics, NetMetrics};

use self::features::{RECEIVE_OFFLOADS, go_together, has, offered};
use self::receive::ReceiveQueue;
use self::shared::Shared;
use self::worker::{Pair, Worker};
use super::desk::{Desk, Server};
use super::device::{ActivateError, Activation, QueueSlot, VirtioDevice};
use super::queue::Queue;
use crate::backend::net::{self, Mac, Network, Passt, PasstError, Tap, TapError};
use crate::rate_limit::Throttle;
use crate::thread_start::ThreadStart;

/// Entries of a queue.
const QUEUE_SIZE: u16 = 256;
/// Entries of the control queue.
const CONTROL_QUEUE_SIZE: u16 = 64;
/// The part of `struct virtio_net_config` that this device has.
const CONFIG_BYTES: usize = offset_of!(virtio_net_config, speed);
/// Where the link's status lies in it.
const STATUS: usize = offset_of!(virtio_net_config, status);

/// Why a network could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// The configuration makes no network.
    #[error(transparent)]
    Config(#[from] NetConfigError),
    /// The tap interface or inherited descriptor cannot be used.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// There is no passt.
    #[error(transparent)]
    Passt(#[from] PasstError),
    /// The host refused something that each network needs.
    #[error("the host cannot {call}")]
    Host {
        /// What was asked of it.
        call: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

/// An Ethernet interface for the guest. Dropping it joins its threads and ends passt.
#[derive(Debug)]
pub struct VirtioNet {
    slots: Vec<QueueSlot>,
    servers: Vec<Server<Pair>>,
    shared: Arc<Shared>,
    features: u64,
    /// With the link's status left out.
    config: [u8; CONFIG_BYTES],
    /// Which queue is the control queue, as negotiated.
    control: u16,
    /// After `servers`, whose threads use its socket.
    _passt: Option<Passt>,
}

/// The counters of a network, also after the network is gone.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Shared>);

impl Metrics {
    /// The network's name.
    pub fn name(&self) -> &str {
        &self.0.name
    }
}

impl std::ops::Deref for Metrics {
    type Target = NetMetrics;

    fn deref(&self) -> &NetMetrics {
        &self.0.metrics
    }
}

/// A network that was opened for a guest.
#[derive(Debug)]
pub struct OpenNetwork {
    /// The guest's address in it.
    pub mac: Mac,
    /// The ways in.
    pub network: Network,
    /// The program that serves it, if one was started.
    pub passt: Option<Passt>,
}

impl OpenNetwork {
    /// Opens the network of `config`, which is not `none`; `name` is [`NetConfig::name`].
    ///
    /// # Errors
    /// [`NetError`].
    pub fn open(name: &str, config: &NetConfig) -> Result<Self, NetError> {
        config.validate()?;
        let mac = config.mac_for(name);
        let (passt, network) = match (&config.tap, config.fd) {
            (Some(tap), _) => (None, Tap::open(tap, config.queues, config.mtu)?),
            (None, Some(fd)) => (None, net::inherited(fd)?),
            (None, None) => {
                let (passt, network) = Passt::start(&config.passt_options(mac))?;
                (Some(passt), network)
            }
        };
        Ok(Self { mac, network, passt })
    }
}

impl VirtioNet {
    /// A device on `opened`. `name` is for the log and, cut off after 8 bytes, for the threads; the
    /// guest does not see it.
    ///
    /// The threads start at once, each with what `start` gives, and wait for the driver, so that what
    /// they may do can be restricted before the guest runs: later the device opens nothing and starts
    /// nothing.
    ///
    /// # Errors
    /// [`NetError`], but not that the network cannot be used.
    pub fn new(
        name: &str,
        config: &NetConfig,
        opened: OpenNetwork,
        start: &ThreadStart,
    ) -> Result<Self, NetError> {
        let OpenNetwork { mac, network: Network { ports, offloads, mtu }, passt } = opened;
        let mtu = config.mtu.or(mtu);
        let kick = |_: &_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new);
        let kicks: Vec<_> =
            ports.iter().map(kick).collect::<io::Result<_>>().map_err(host("make an eventfd"))?;
        let shared = Arc::new(Shared::new(name, kicks));
        let mut device = Self {
            slots: Vec::new(),
            servers: Vec::new(),
            features: offered(offloads, shared.max_pairs, mtu.is_some()),
            config: config_space(mac, shared.max_pairs, mtu.unwrap_or(0)),
            control: 2 * shared.max_pairs,
            shared,
            _passt: passt,
        };
        let throttle = || match (config.packets, config.bandwidth) {
            (None, None) => Ok(None),
            (packets, bandwidth) => Throttle::new(packets, bandwidth).map(Some),
        };
        let receive = throttle().map_err(host("make a timer"))?;
        let send = throttle().map_err(host("make a timer"))?;
        for (index, port) in (0..).zip(ports) {
            device.add_pair(index, port, [receive.as_ref(), send.as_ref()], start)?;
        }
        if let Some(kick) = device.shared.kicks.first() {
            device.slots.push(QueueSlot { max_size: CONTROL_QUEUE_SIZE, kick: kick.clone() });
        }
        Ok(device)
    }

    /// What the network has carried so far.
    pub fn metrics(&self) -> Metrics {
        Metrics(self.shared.clone())
    }

    fn add_pair(
        &mut self,
        index: u16,
        port: Box<dyn net::NetPort>,
        throttles: [Option<&Throttle>; 2],
        start: &ThreadStart,
    ) -> Result<(), NetError> {
        let Some(kick) = self.shared.kicks.get(usize::from(index)).cloned() else { return Ok(()) };
        let clone = |throttle: Option<&Throttle>| throttle.map(Throttle::try_clone).transpose();
        let [receive, send] = throttles.map(clone);
        let throttles =
            [receive.map_err(host("make a timer"))?, send.map_err(host("make a timer"))?];
        let worker = Worker::new(index, port, borrow(&kick), throttles, self.shared.clone())
            .map_err(host("watch the network"))?;
        let name = &self.shared.name;
        let serve = move |desk: &Desk<_>| worker.run(desk);
        let server = Server::spawn(name, index, kick.clone(), start, serve)
            .map_err(host("start a thread"))?;
        self.servers.push(server);
        let slot = QueueSlot { max_size: QUEUE_SIZE, kick };
        self.slots.extend([slot.clone(), slot]);
        Ok(())
    }

    /// The desk of the thread that the kick of queue `index` wakes; none for queues that the device
    /// offers but does not have as negotiated.
    fn desk(&self, index: u16) -> Option<&Desk<Pair>> {
        if index > self.control {
            return None;
        }
        let last = 2 * self.shared.max_pairs;
        let server = if index == last { 0 } else { index / 2 };
        self.servers.get(usize::from(server)).map(Deref::deref)
    }
}

impl VirtioDevice for VirtioNet {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn accepts_features(&self, features: u64) -> bool {
        go_together(features)
    }

    fn queues(&self) -> &[QueueSlot] {
        &self.slots
    }

    fn config(&self) -> Vec<u8> {
        let mut config = self.config.to_vec();
        if let Some(field) = config.get_mut(STATUS..STATUS + size_of::<u16>()) {
            field.copy_from_slice(&self.shared.link_status());
        }
        config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let features = activation.features;
        // Without more pairs, the control queue is the third (§5.1.2).
        let pairs = if has(features, VIRTIO_NET_F_MQ) { self.shared.max_pairs } else { 1 };
        self.control = 2 * pairs;
        self.shared.features.store(features, Ordering::Relaxed);
        self.shared.set_signals(activation.signals);
        self.shared.set_receive_offloads(features & RECEIVE_OFFLOADS);
        for queue in activation.queues {
            self.enable_queue(queue)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.shared.set_active_pairs(1);
        self.shared.set_receive_offloads(0);
        for server in &self.servers {
            server.change(|pair| *pair = Pair { was_reset: true, ..Pair::default() });
        }
    }

    fn reset_queue(&mut self, index: u16) {
        let is_control = index == self.control;
        if let Some(desk) = self.desk(index) {
            desk.change(|pair| match index % 2 {
                _ if is_control => pair.control = None,
                0 => pair.receive = None,
                _ => pair.transmit = None,
            });
        }
    }

    fn enable_queue(&mut self, queue: Queue) -> Result<(), ActivateError> {
        let index = queue.index();
        let is_control = index == self.control;
        let features = self.shared.features.load(Ordering::Relaxed);
        if let Some(desk) = self.desk(index) {
            desk.change(|pair| match index % 2 {
                _ if is_control => pair.control = Some(queue),
                0 => pair.receive = Some(ReceiveQueue::new(queue, features)),
                _ => pair.transmit = Some(queue),
            });
        }
        Ok(())
    }

    fn pause(&mut self) {
        for server in &self.servers {
            server.hold();
        }
    }

    fn resume(&mut self) {
        for server in &self.servers {
            server.release();
        }
    }
}

impl Drop for VirtioNet {
    fn drop(&mut self) {
        // All that its threads counted.
        self.servers.clear();
        let NetMetrics { received, sent } = &self.shared.metrics;
        tracing::info!(net = self.shared.name, "received {received}; sent {sent}");
    }
}

fn host(call: &'static str) -> impl Fn(io::Error) -> NetError {
    move |source| NetError::Host { call, source }
}

#[expect(unsafe_code, reason = "EventFd lends its descriptor by number only")]
fn borrow(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as the EventFd is borrowed.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

/// The configuration as a driver reads it (§5.1.4), but for the link's status.
fn config_space(mac: Mac, max_pairs: u16, mtu: u16) -> [u8; CONFIG_BYTES] {
    let mut space = [0; CONFIG_BYTES];
    let fields: [(usize, &[u8]); 3] = [
        (offset_of!(virtio_net_config, mac), &mac.bytes()),
        (offset_of!(virtio_net_config, max_virtqueue_pairs), &max_pairs.to_le_bytes()),
        (offset_of!(virtio_net_config, mtu), &mtu.to_le_bytes()),
    ];
    for (offset, bytes) in fields {
        for (to, from) in space.iter_mut().skip(offset).zip(bytes) {
            *to = *from;
        }
    }
    space
}

#[cfg(test)]
mod tests;
