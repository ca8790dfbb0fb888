//! What a disk has done, in numbers.

use crate::metrics::Counter;

/// The counters of one disk, over all its queues. They outlive resets.
#[derive(Debug, Default)]
pub struct DiskMetrics {
    /// Reads that succeeded.
    pub reads: Counter,
    /// Bytes that these read.
    pub read_bytes: Counter,
    /// Writes that succeeded.
    pub writes: Counter,
    /// Bytes that these wrote.
    pub write_bytes: Counter,
    /// Flushes that succeeded.
    pub flushes: Counter,
    /// Discards that succeeded.
    pub discards: Counter,
    /// Zeroings that succeeded.
    pub write_zeroes: Counter,
    /// Requests that the host failed: no space, an unreadable sector, a file cut off.
    pub host_errors: Counter,
    /// Requests that made no sense or that the disk does not offer.
    pub refused: Counter,
    /// How often a queue had to wait for its rate.
    pub throttled: Counter,
}
