//! Bodies of fuzz targets: what a device must bear, given as bytes.
//!
//! Each takes any bytes for what a guest, or who is at the other end, does to a device, and panics
//! if the device does not keep what it promises. A fuzzer (`scripts/fuzz.sh`) and the tests, which
//! replay `fuzz/seeds`, call the same functions.

mod serial;

pub use crate::virtio::fuzzing::{blk, disk_request, mmio, net, rng};
pub use serial::serial;

/// The name and body of a target.
pub type Target = (&'static str, fn(&[u8]));

/// The targets of this crate.
pub const TARGETS: [Target; 6] = [
    ("blk", blk),
    ("disk_request", disk_request),
    ("mmio", mmio),
    ("net", net),
    ("rng", rng),
    ("serial", serial),
];

/// Takes values off the front of a fuzzer's bytes.
#[derive(Debug)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// The next byte; none at the end.
    #[expect(clippy::should_implement_trait, reason = "it is read piece by piece, not walked")]
    pub fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// Up to `most` bytes.
    pub fn bytes(&mut self, most: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(self.0.len().min(most));
        self.0 = rest;
        taken
    }

    /// A number of 8 bits; past the end there are zeroes.
    pub fn u8(&mut self) -> u8 {
        self.next().unwrap_or(0)
    }

    /// A number of 16 bits, little-endian.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    /// A number of 32 bits.
    pub fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }

    /// A number of 64 bits.
    pub fn u64(&mut self) -> u64 {
        u64::from(self.u32()) | u64::from(self.u32()) << 32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_bear_all_seeds() {
        for (name, body) in TARGETS {
            let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
            let folder = folder.join("../fuzz/seeds").join(name);
            let seeds: Vec<_> = std::fs::read_dir(&folder).unwrap().flatten().collect();
            assert!(!seeds.is_empty(), "no seeds for {name}");
            for seed in seeds {
                let bytes = std::fs::read(seed.path()).unwrap();
                let borne = std::panic::catch_unwind(|| body(&bytes));
                assert!(borne.is_ok(), "{}", seed.path().display());
            }
            body(&[]);
            body(&[0xff; 300]);
        }
    }
}
