//! What the user chooses about the entropy device.

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

use crate::rate_limit::Rate;

/// A mebibyte a second: a hundred times what a booting kernel asks for.
const DEFAULT_BYTES_PER_SECOND: NonZeroU64 = NonZeroU64::new(1 << 20).unwrap();

/// The entropy device.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct RngConfig {
    /// Whether there is one.
    pub enabled: bool,
    /// How many bytes it gives.
    pub bandwidth: Rate,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self { enabled: true, bandwidth: Rate::new(DEFAULT_BYTES_PER_SECOND) }
    }
}
