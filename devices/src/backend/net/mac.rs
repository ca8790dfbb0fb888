//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Bytes of an address.
const BYTES: usize = 6;
/// In the first byte: the address is a group's.
const GROUP: u8 = 0x01;
/// In the first byte: the address was not bought from the IEEE.
const LOCAL: u8 = 0x02;

/// The address of one station, written `52:54:00:12:34:56`. Neither a group's nor all zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; BYTES]);

/// A text that is no [`Mac`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" is no station's address; write six bytes such as 02:00:00:00:00:01, the first one even, not all zero"
)]
pub struct ParseMacError(String);

impl Mac {
    /// The address that belongs to `id`: the same on every run and host, locally administered.
    pub fn from_id(id: &str) -> Self {
        // FNV-1a with 64 bits, whose low bytes are mixed well.
        const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
        const PRIME: u64 = 0x0100_0000_01b3;
        let hash =
            id.bytes().fold(BASIS, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME));
        let [first, others @ .., _, _] = hash.to_le_bytes();
        let [a, b, c, d, e] = others;
        Self([first & !GROUP | LOCAL, a, b, c, d, e])
    }

    /// As it stands in a frame.
    pub const fn bytes(self) -> [u8; BYTES] {
        self.0
    }
}

impl FromStr for Mac {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, ParseMacError> {
        let parsed = || {
            let mut bytes = [0; BYTES];
            let mut parts = text.split(':');
            for byte in &mut bytes {
                let part = parts.next()?;
                let digits = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
                *byte = digits.then(|| u8::from_str_radix(part, 16).ok()).flatten()?;
            }
            let is_station = bytes.first()? & GROUP == 0 && bytes != [0; BYTES];
            (is_station && parts.next().is_none()).then_some(Self(bytes))
        };
        parsed().ok_or_else(|| ParseMacError(text.to_owned()))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, last] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{last:02x}")
    }
}

impl TryFrom<String> for Mac {
    type Error = ParseMacError;

    fn try_from(text: String) -> Result<Self, ParseMacError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_and_written() {
        assert_eq!("52:54:00:12:AB:cd".parse::<Mac>().unwrap().to_string(), "52:54:00:12:ab:cd");
        let wrong = [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52-54-00-12-34-56",
            "5:54:00:12:34:56",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
            "+1:00:00:00:00:01",
        ];
        for text in wrong {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_id_has_one_address_of_its_own() {
        // Part of the interface: leases and firewalls go by it.
        assert_eq!(Mac::from_id("tap0").to_string(), Mac::from_id("tap0").to_string());
        assert_ne!(Mac::from_id("tap0"), Mac::from_id("tap1"));
        for id in ["", "a", "tap0", "net17", "a very long name indeed"] {
            let mac = Mac::from_id(id);
            assert_eq!(mac.bytes()[0] & (GROUP | LOCAL), LOCAL, "{id}");
            assert_eq!(mac.to_string().parse(), Ok(mac));
        }
    }
}
