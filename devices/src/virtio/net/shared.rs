//! What all threads of a network and the device's side share.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_S_LINK_UP,
};
use vmm_sys_util::eventfd::EventFd;

use super::metrics::NetMetrics;
use crate::backend::net::Offloads;
use crate::rate_limit::LogLimit;
use crate::virtio::device::Signals;

/// What a driver or the network does wrong is logged this often at the most.
const LOG_EVERY: Duration = Duration::from_secs(5);

/// A network's state beside its queues.
#[derive(Debug)]
pub(super) struct Shared {
    /// The network's name in the log.
    pub name: String,
    /// How many queue pairs there are.
    pub max_pairs: u16,
    /// How many of them the driver uses.
    pub active_pairs: AtomicU16,
    /// What was negotiated.
    pub features: AtomicU64,
    /// What the driver does itself of the frames that it receives, as feature bits.
    pub receive_offloads: AtomicU64,
    /// The same as far as the network knows it; at first it knows nothing.
    applied_offloads: AtomicU64,
    pub metrics: NetMetrics,
    /// Wakes each thread.
    pub kicks: Vec<Arc<EventFd>>,
    link_is_up: AtomicBool,
    /// The way to the driver, since it first started the device. Held for moments only.
    signals: Mutex<Option<Arc<Signals>>>,
    log: LogLimit,
}

impl Shared {
    /// A network whose link is up.
    pub fn new(name: &str, kicks: Vec<Arc<EventFd>>) -> Self {
        Self {
            name: name.to_owned(),
            max_pairs: u16::try_from(kicks.len()).unwrap_or(u16::MAX),
            active_pairs: AtomicU16::new(1),
            features: AtomicU64::new(0),
            receive_offloads: AtomicU64::new(0),
            applied_offloads: AtomicU64::new(u64::MAX),
            metrics: NetMetrics::default(),
            kicks,
            link_is_up: AtomicBool::new(true),
            signals: Mutex::new(None),
            log: LogLimit::new(LOG_EVERY),
        }
    }

    /// Whether to log now what may happen all the time: if so, how many times it was not logged.
    pub fn may_complain(&self) -> Option<u64> {
        self.log.pass(Instant::now())
    }

    /// The driver starts the device.
    pub fn set_signals(&self, signals: Arc<Signals>) {
        *self.signals.lock().unwrap_or_else(PoisonError::into_inner) = Some(signals);
    }

    /// The status field of the configuration: whether frames can be carried at all.
    pub fn link_status(&self) -> [u8; 2] {
        let up = self.link_is_up.load(Ordering::Acquire);
        (if up { VIRTIO_NET_S_LINK_UP as u16 } else { 0 }).to_le_bytes()
    }

    /// The link has come up or gone down; whether it was otherwise before. Then the driver is told.
    pub fn set_link(&self, up: bool) -> bool {
        if self.link_is_up.load(Ordering::Acquire) == up {
            return false;
        }
        // Held until the driver is told, so that it is told of changes in their order.
        let signals = self.signals.lock().unwrap_or_else(PoisonError::into_inner);
        if self.link_is_up.swap(up, Ordering::AcqRel) == up {
            return false;
        }
        if let Some(signals) = signals.as_ref() {
            signals.config_changed(super::STATUS, &self.link_status());
        }
        true
    }

    /// The driver uses so many pairs from now on; each thread takes note.
    pub fn set_active_pairs(&self, pairs: u16) {
        self.active_pairs.store(pairs, Ordering::Release);
        self.wake_all();
    }

    /// The driver does so much itself from now on.
    pub fn set_receive_offloads(&self, bits: u64) {
        self.receive_offloads.store(bits, Ordering::Release);
        self.wake_all();
    }

    /// The network leaves so much to the driver from now on.
    pub fn set_applied_offloads(&self, bits: u64) {
        self.applied_offloads.store(bits, Ordering::Release);
        self.wake_all();
    }

    /// Whether the network leaves to the driver what the driver does itself, and no more.
    pub fn offloads_are_applied(&self) -> bool {
        self.applied_offloads.load(Ordering::Acquire)
            == self.receive_offloads.load(Ordering::Acquire)
    }

    fn wake_all(&self) {
        for kick in &self.kicks {
            // It fails when the counter is full, and then the thread is awake anyway.
            let _ = kick.write(1);
        }
    }
}

/// What `bits`, feature bits, mean for the network.
pub(super) fn offloads_of(bits: u64) -> Offloads {
    let has = |feature: u32| bits >> feature & 1 != 0;
    let checksum = has(VIRTIO_NET_F_GUEST_CSUM);
    Offloads {
        checksum,
        tso4: checksum && has(VIRTIO_NET_F_GUEST_TSO4),
        tso6: checksum && has(VIRTIO_NET_F_GUEST_TSO6),
        ecn: checksum && has(VIRTIO_NET_F_GUEST_ECN),
        uso: checksum && has(VIRTIO_NET_F_GUEST_USO4) && has(VIRTIO_NET_F_GUEST_USO6),
    }
}
