//! The block device (virtio 1.2 §5.2): a disk for the guest.
//!
//! Each queue has a thread (`worker`) that parses requests (`request`) and moves their data
//! straight between the guest's memory and the image. This module
//! is what the transport sees: features, configuration, life cycle.

mod config;
mod metrics;
mod request;
mod worker;

use std::io;
use std::mem::offset_of;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES, virtio_blk_config,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vmm_sys_util::eventfd::EventFd;

pub use config::{DiskConfig, DiskConfigError, MAX_QUEUES};
pub use metrics::DiskMetrics;

use super::desk::{Desk, Server};
use super::device::{ActivateError, Activation, QueueSlot, VirtioDevice};
use super::queue::Queue;
use crate::backend::disk::{Disk, Geometry, OpenError, RawDisk, SECTOR_BYTES};
use crate::rate_limit::Throttle;
use crate::thread_start::{ThreadStart, nothing_first};
use request::{MAX_DISCARD_SECTORS, MAX_RANGES, MAX_ZEROES_SECTORS, Offers};
use worker::{Shared, Worker};

/// Descriptors of a request beside its data: the header and the status.
const OVERHEAD_DESCRIPTORS: u16 = 2;
/// The part of `struct virtio_blk_config` that this device has.
const CONFIG_BYTES: usize = offset_of!(virtio_blk_config, max_secure_erase_sectors);
/// Where a driver that negotiated CONFIG_WCE switches the cache's mode.
const WRITEBACK: usize = offset_of!(virtio_blk_config, wce);

/// Why a disk could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlkError {
    /// The configuration makes no disk.
    #[error(transparent)]
    Config(#[from] DiskConfigError),
    /// The image cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The host refused something that each disk needs.
    #[error("the host cannot {call}")]
    Host {
        /// What was asked of it.
        call: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

/// A disk for the guest. Dropping it finishes what is in flight and joins its threads.
#[derive(Debug)]
pub struct VirtioBlk {
    slots: Vec<QueueSlot>,
    servers: Vec<Server<Option<Queue>>>,
    shared: Arc<Shared>,
    features: u64,
    config: [u8; CONFIG_BYTES],
    /// The driver did not negotiate the cache's switch, and is past the time to do so.
    switch_fixed: bool,
}

impl VirtioBlk {
    /// Opens the image of `config` and makes the disk, see [`VirtioBlk::new`].
    ///
    /// # Errors
    /// [`BlkError`].
    pub fn open(name: &str, config: &DiskConfig) -> Result<Self, BlkError> {
        Self::new(name, config, &Self::open_image(config)?)
    }

    /// Opens the image of `config` alone: all of the disk that needs a path.
    ///
    /// # Errors
    /// [`BlkError`].
    pub fn open_image(config: &DiskConfig) -> Result<RawDisk, BlkError> {
        config.validate()?;
        Ok(RawDisk::open(&config.options())?)
    }

    /// A disk on `disk`. `name` is for the log and, cut off after 8 bytes, for the threads; the
    /// guest does not see it.
    ///
    /// The threads start at once and wait for the driver, so that what they may do can be
    /// restricted before the guest runs: later the device opens nothing and starts nothing.
    ///
    /// # Errors
    /// [`BlkError`], but not that the image cannot be used.
    pub fn new(name: &str, config: &DiskConfig, disk: &dyn Disk) -> Result<Self, BlkError> {
        Self::with_start(name, config, disk, &nothing_first())
    }

    /// As [`VirtioBlk::new`]; each thread begins with what `start` gives for it.
    ///
    /// # Errors
    /// As for [`VirtioBlk::new`].
    pub fn with_start(
        name: &str,
        config: &DiskConfig,
        disk: &dyn Disk,
        start: &ThreadStart,
    ) -> Result<Self, BlkError> {
        config.validate()?;
        let geometry = disk.geometry();
        let writable = !geometry.read_only;
        let offers = Offers { flush: config.sync && writable, ranges: config.discard && writable };
        let id = config.id.as_deref().unwrap_or_default();
        let mut device = Self {
            slots: Vec::new(),
            servers: Vec::new(),
            shared: Arc::new(Shared::new(name, id, offers)),
            features: features(config, &geometry, offers),
            config: config_space(config, &geometry, offers),
            switch_fixed: false,
        };
        let throttle = match (config.iops, config.bandwidth) {
            (None, None) => None,
            (iops, bandwidth) => {
                Some(Throttle::new(iops, bandwidth).map_err(host("make a timer"))?)
            }
        };
        for index in 0..config.queues {
            device.add_queue(index, config.queue_size, disk, throttle.as_ref(), start)?;
        }
        Ok(device)
    }

    /// What the disk has done so far.
    pub fn metrics(&self) -> Metrics {
        Metrics(self.shared.clone())
    }

    fn add_queue(
        &mut self,
        index: u16,
        max_size: u16,
        disk: &dyn Disk,
        throttle: Option<&Throttle>,
        start: &ThreadStart,
    ) -> Result<(), BlkError> {
        // Its reader waits for it.
        let kick = Arc::new(EventFd::new(libc::EFD_CLOEXEC).map_err(host("make an eventfd"))?);
        let queue = disk.open_queue(max_size, borrow(&kick)).map_err(host("set up I/O"))?;
        let throttle = throttle.map(Throttle::try_clone).transpose();
        let throttle = throttle.map_err(host("make a timer"))?;
        let worker = Worker::new(queue, max_size, throttle, self.shared.clone());
        let name = &self.shared.name;
        let serve = move |desk: &Desk<_>| worker.run(desk);
        let server = Server::spawn(name, index, kick.clone(), start, serve)
            .map_err(host("start a thread"))?;
        self.servers.push(server);
        self.slots.push(QueueSlot { max_size, kick });
        Ok(())
    }

    fn desk(&self, index: u16) -> Option<&Desk<Option<Queue>>> {
        self.servers.get(usize::from(index)).map(Deref::deref)
    }

    fn set_write_back(&mut self, on: bool) {
        self.shared.write_back.store(on, Ordering::Relaxed);
        if let Some(field) = self.config.get_mut(WRITEBACK) {
            *field = on.into();
        }
    }
}

/// The counters of a disk, also after the disk is gone.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Shared>);

impl std::ops::Deref for Metrics {
    type Target = DiskMetrics;

    fn deref(&self) -> &DiskMetrics {
        &self.0.metrics
    }
}

impl VirtioDevice for VirtioBlk {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queues(&self) -> &[QueueSlot] {
        &self.slots
    }

    fn config(&self) -> Vec<u8> {
        self.config.to_vec()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if self.switch_fixed || !self.shared.offers.flush {
            return;
        }
        let at = (WRITEBACK as u64).checked_sub(offset).and_then(|at| usize::try_from(at).ok());
        match at.and_then(|at| data.get(at)) {
            Some(0) => self.set_write_back(false),
            Some(1) => self.set_write_back(true),
            _ => {}
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let negotiated = |bit: u32| activation.features >> bit & 1 != 0;
        self.switch_fixed = !negotiated(VIRTIO_BLK_F_CONFIG_WCE);
        if self.switch_fixed || !negotiated(VIRTIO_BLK_F_FLUSH) {
            // Without a flush, a write that completes must last (§5.2.6.2).
            self.set_write_back(negotiated(VIRTIO_BLK_F_FLUSH));
        }
        for queue in activation.queues {
            self.enable_queue(queue)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        for server in &self.servers {
            server.change(|queue| *queue = None);
        }
        self.switch_fixed = false;
        self.set_write_back(self.shared.offers.flush);
    }

    fn reset_queue(&mut self, index: u16) {
        if let Some(desk) = self.desk(index) {
            desk.change(|queue| *queue = None);
        }
    }

    fn enable_queue(&mut self, queue: Queue) -> Result<(), ActivateError> {
        if let Some(desk) = self.desk(queue.index()) {
            desk.change(|place| *place = Some(queue));
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

fn host(call: &'static str) -> impl Fn(io::Error) -> BlkError {
    move |source| BlkError::Host { call, source }
}

#[expect(unsafe_code, reason = "EventFd lends its descriptor by number only")]
fn borrow(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as the EventFd is borrowed.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

fn features(config: &DiskConfig, geometry: &Geometry, offers: Offers) -> u64 {
    let bits = [
        (VIRTIO_BLK_F_SEG_MAX, true),
        (VIRTIO_BLK_F_RO, geometry.read_only),
        (VIRTIO_BLK_F_BLK_SIZE, true),
        (VIRTIO_BLK_F_FLUSH, offers.flush),
        (VIRTIO_BLK_F_TOPOLOGY, true),
        (VIRTIO_BLK_F_CONFIG_WCE, offers.flush),
        (VIRTIO_BLK_F_MQ, config.queues > 1),
        (VIRTIO_BLK_F_DISCARD, offers.ranges),
        (VIRTIO_BLK_F_WRITE_ZEROES, offers.ranges),
    ];
    bits.iter().filter(|(_, offered)| *offered).fold(0, |sum, (bit, _)| sum | 1 << bit)
}

/// The configuration as a driver reads it at first (§5.2.4).
fn config_space(config: &DiskConfig, geometry: &Geometry, offers: Offers) -> [u8; CONFIG_BYTES] {
    let mut space = [0; CONFIG_BYTES];
    let mut set = |offset: usize, bytes: &[u8]| {
        for (to, from) in space.iter_mut().skip(offset).zip(bytes) {
            *to = *from;
        }
    };
    macro_rules! fields {
        ($($field:ident = $value:expr;)*) => {
            $(set(offset_of!(virtio_blk_config, $field), &$value.to_le_bytes());)*
        };
    }
    let logical = geometry.logical_block.max(1);
    let blocks = |bytes: u32| bytes / logical;
    fields! {
        capacity = geometry.capacity / SECTOR_BYTES;
        seg_max = u32::from(config.queue_size.saturating_sub(OVERHEAD_DESCRIPTORS).max(1));
        blk_size = logical;
        physical_block_exp = blocks(geometry.physical_block).max(1).ilog2() as u8;
        min_io_size = u16::try_from(blocks(geometry.physical_block)).unwrap_or(1);
        opt_io_size = blocks(geometry.optimal_io);
        wce = u8::from(offers.flush);
        num_queues = config.queues;
    }
    if offers.ranges {
        fields! {
            max_discard_sectors = MAX_DISCARD_SECTORS;
            max_discard_seg = MAX_RANGES;
            discard_sector_alignment = geometry.physical_block / SECTOR_BYTES as u32;
            max_write_zeroes_sectors = MAX_ZEROES_SECTORS;
            max_write_zeroes_seg = MAX_RANGES;
            write_zeroes_may_unmap = 1u8;
        }
    }
    space
}

/// What holds of a request that is carried out, whatever is in `chain`.
///
/// # Panics
/// It does not hold.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn check_request(chain: &mut super::chain::Chain, flush: bool, ranges: bool) {
    use request::{Kind, MAX_REQUEST_BYTES};
    let Ok(command) = request::parse(chain, Offers { flush, ranges }) else { return };
    assert_eq!(command.offset % SECTOR_BYTES, 0, "{command:?}");
    assert_eq!(command.len % SECTOR_BYTES, 0, "{command:?}");
    let (readable, writable) = (chain.readable_bytes(), chain.writable_bytes());
    match command.kind {
        Kind::Read => assert_eq!((readable, writable), (0, command.len)),
        Kind::Write => assert_eq!((readable, writable), (command.len, 0)),
        Kind::Flush => assert!(flush),
        Kind::GetId => {}
        Kind::Discard | Kind::WriteZeroes { .. } => assert!(ranges && readable == 0),
    }
    let most = match command.kind {
        Kind::Discard => u64::from(MAX_DISCARD_SECTORS) * SECTOR_BYTES,
        _ => MAX_REQUEST_BYTES,
    };
    assert!(command.len <= most, "{command:?}");
}

#[cfg(test)]
mod tests;
