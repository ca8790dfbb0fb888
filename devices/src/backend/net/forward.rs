//! Ports of the host that lead into a guest.

use std::fmt;
use std::num::NonZeroU16;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What a port belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A port of the host that leads to one of the guest, written `tcp:8080:80` or `udp:5353:53`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Forward {
    /// Of both ports.
    pub protocol: Protocol,
    /// The host's port.
    pub host_port: NonZeroU16,
    /// The guest's port.
    pub guest_port: NonZeroU16,
}

/// A text that is no [`Forward`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" is no forward; write tcp:HOSTPORT:GUESTPORT or udp:HOSTPORT:GUESTPORT, ports from 1 to 65535, such as tcp:8080:80"
)]
pub struct ParseForwardError(String);

impl FromStr for Forward {
    type Err = ParseForwardError;

    fn from_str(text: &str) -> Result<Self, ParseForwardError> {
        let parsed = || {
            let (protocol, ports) = text.split_once(':')?;
            let protocol = match protocol {
                "tcp" => Protocol::Tcp,
                "udp" => Protocol::Udp,
                _ => return None,
            };
            let (host_port, guest_port) = ports.split_once(':')?;
            let port = |text: &str| {
                let digits = text.bytes().all(|b| b.is_ascii_digit());
                digits.then(|| text.parse().ok()).flatten()
            };
            Some(Self { protocol, host_port: port(host_port)?, guest_port: port(guest_port)? })
        };
        parsed().ok_or_else(|| ParseForwardError(text.to_owned()))
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.protocol, self.host_port, self.guest_port)
    }
}

impl TryFrom<String> for Forward {
    type Error = ParseForwardError;

    fn try_from(text: String) -> Result<Self, ParseForwardError> {
        text.parse()
    }
}

impl From<Forward> for String {
    fn from(forward: Forward) -> Self {
        forward.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forward_is_read_and_written() {
        for text in ["tcp:8080:80", "udp:1:65535"] {
            assert_eq!(text.parse::<Forward>().unwrap().to_string(), text);
        }
        let wrong = [
            "",
            "tcp",
            "8080:80",
            "tcp:80",
            "tcp:0:80",
            "tcp:80:65536",
            "tcp:+1:2",
            "sctp:1:2",
            "tcp:1:2:3",
        ];
        for text in wrong {
            let error = text.parse::<Forward>().unwrap_err().to_string();
            assert!(error.contains("tcp:8080:80"), "{error}");
        }
    }
}
