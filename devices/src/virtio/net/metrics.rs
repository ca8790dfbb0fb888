//! What a network has carried, in numbers.

use std::fmt;

use crate::metrics::Counter;

/// The counters of one direction, over all queues. They outlive resets.
#[derive(Debug, Default)]
pub struct DirectionMetrics {
    /// Frames that were carried.
    pub packets: Counter,
    /// Their bytes, without the header of virtio.
    pub bytes: Counter,
    /// Frames dropped since they made no sense: too short, too long, a header that contradicts
    /// them.
    pub malformed: Counter,
    /// Frames dropped since the guest had not made room for one so large.
    pub too_large: Counter,
    /// Frames that the network refused.
    pub refused: Counter,
    /// Frames dropped since the link was down.
    pub link_down: Counter,
    /// How often a queue had to wait for its rate.
    pub throttled: Counter,
    /// How often the network took no more frames, or the guest had no room for more.
    pub blocked: Counter,
}

impl DirectionMetrics {
    /// Frames dropped for any reason.
    pub fn dropped(&self) -> u64 {
        let reasons = [&self.malformed, &self.too_large, &self.refused, &self.link_down];
        reasons.iter().map(|counter| counter.get()).sum()
    }
}

impl fmt::Display for DirectionMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} packets, {} bytes", self.packets.get(), self.bytes.get())?;
        let reasons = [
            ("malformed", &self.malformed),
            ("too large", &self.too_large),
            ("refused", &self.refused),
            ("link down", &self.link_down),
        ];
        if self.dropped() > 0 {
            write!(f, ", dropped {}", self.dropped())?;
            let counts = reasons.iter().filter(|(_, counter)| counter.get() > 0);
            let texts: Vec<_> =
                counts.map(|(reason, counter)| format!("{} {reason}", counter.get())).collect();
            write!(f, " ({})", texts.join(", "))?;
        }
        for (what, counter) in [("throttled", &self.throttled), ("blocked", &self.blocked)] {
            if counter.get() > 0 {
                write!(f, ", {what} {} times", counter.get())?;
            }
        }
        Ok(())
    }
}

/// The counters of one network.
#[derive(Debug, Default)]
pub struct NetMetrics {
    /// Into the guest.
    pub received: DirectionMetrics,
    /// Out of the guest.
    pub sent: DirectionMetrics,
}
