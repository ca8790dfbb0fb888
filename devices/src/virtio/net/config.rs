//! What the user chooses about a network.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

use crate::backend::net::{Forward, Mac, PasstOptions};
use crate::rate_limit::Rate;

/// The most queue pairs of a network.
pub const MAX_QUEUES: u16 = 64;
/// The least MTU that virtio allows (virtio 1.2 §5.1.4.2), which is also IPv4's.
const MIN_MTU: u16 = 68;
/// The longest name of a network.
const MAX_ID_BYTES: usize = 32;

/// A network that needs no name of the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", try_from = "String")]
pub enum Mode {
    /// By passt, with what any user may do.
    User,
    /// None at all.
    None,
}

/// A text that is no [`Mode`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no network; write user, none, tap=NAME or fd=N")]
pub struct ParseModeError(String);

impl TryFrom<String> for Mode {
    type Error = ParseModeError;

    fn try_from(text: String) -> Result<Self, ParseModeError> {
        match text.as_str() {
            "user" => Ok(Self::User),
            "none" => Ok(Self::None),
            _ => Err(ParseModeError(text)),
        }
    }
}

/// A network: `user|none|tap=NAME|fd=N[,mac=…][,mtu=…][,queues=N][,id=S][,bandwidth=RATE]
/// [,packets=RATE][,forward=tcp:HOSTPORT:GUESTPORT…][,host=ADDRESS]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NetConfig {
    /// A network that needs no name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// A tap interface of the host's, made if it is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// A descriptor that alcove was started with: a tap interface or a stream socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd: Option<u32>,
    /// The guest's Ethernet address; none: made from the network's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// The longest packets, bytes, 68 to 65535; none: what the network says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Pairs of queues, each with a thread: 1 to [`MAX_QUEUES`]. More than 1 for taps only.
    #[serde(default = "one")]
    pub queues: u16,
    /// The network's name: in the log, and for its address. None: the tap's, else net0, net1 and so
    /// on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Bytes a second, each way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Rate>,
    /// Frames a second, each way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packets: Option<Rate>,
    /// Ports of the host that lead into the guest, of a `user` network.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forward: Vec<Forward>,
    /// The host's address that these are bound to; none: 127.0.0.1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<IpAddr>,
}

/// A [`NetConfig`] that makes no network. Each names the key and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NetConfigError {
    /// Neither kind of network, or several.
    #[error("give one of user, none, tap=NAME and fd=N")]
    Kind,
    /// No queue, or too many.
    #[error("queues={0} is not possible; give 1 to {MAX_QUEUES}")]
    Queues(u16),
    /// Several queues where there is but one way in.
    #[error("queues={0} is for tap=NAME only; leave it out")]
    QueuesWithoutTap(u16),
    /// Too small.
    #[error("mtu={0} is not possible; give {MIN_MTU} to 65535 bytes")]
    Mtu(u16),
    /// Too long, empty, or with characters that are not printable ASCII.
    #[error("id={0:?} is not possible; give 1 to {MAX_ID_BYTES} printable ASCII characters")]
    Id(String),
    /// A key of `user` networks.
    #[error("{0}= is for user networks only; leave it out")]
    UserOnly(&'static str),
    /// One port cannot lead to two places.
    #[error("forward={0}: this port of the host is forwarded already; give another one")]
    ForwardTwice(Forward),
}

impl NetConfig {
    /// The keys' order in `key=value` text: the one that may be left out.
    pub const FIRST_KEY: &str = "mode";

    /// A `user` network with defaults for all else.
    pub fn user() -> Self {
        Self {
            mode: Some(Mode::User),
            tap: None,
            fd: None,
            mac: None,
            mtu: None,
            queues: one(),
            id: None,
            bandwidth: None,
            packets: None,
            forward: Vec::new(),
            host: None,
        }
    }

    /// Whether this stands for no network at all.
    pub fn is_none(&self) -> bool {
        self.mode == Some(Mode::None)
    }

    /// Checks what does not depend on the host.
    ///
    /// # Errors
    /// The first key whose value is not possible.
    pub fn validate(&self) -> Result<(), NetConfigError> {
        let kinds = [self.mode.is_some(), self.tap.is_some(), self.fd.is_some()].map(usize::from);
        if kinds.iter().sum::<usize>() != 1 {
            return Err(NetConfigError::Kind);
        }
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return Err(NetConfigError::Queues(self.queues));
        }
        if self.queues > 1 && self.tap.is_none() {
            return Err(NetConfigError::QueuesWithoutTap(self.queues));
        }
        match &self.id {
            Some(id) if !is_id(id) => return Err(NetConfigError::Id(id.clone())),
            _ => {}
        }
        match self.mtu {
            Some(mtu) if mtu < MIN_MTU => return Err(NetConfigError::Mtu(mtu)),
            _ => {}
        }
        self.validate_forwards()
    }

    fn validate_forwards(&self) -> Result<(), NetConfigError> {
        if self.mode != Some(Mode::User) {
            let given = [(!self.forward.is_empty(), "forward"), (self.host.is_some(), "host")];
            if let Some((_, key)) = given.into_iter().find(|(given, _)| *given) {
                return Err(NetConfigError::UserOnly(key));
            }
        }
        for (index, forward) in self.forward.iter().enumerate() {
            let same = |other: &Forward| {
                (other.protocol, other.host_port) == (forward.protocol, forward.host_port)
            };
            if self.forward.iter().take(index).any(same) {
                return Err(NetConfigError::ForwardTwice(*forward));
            }
        }
        Ok(())
    }

    /// The network's name, the machine's network number `index` being this one.
    pub fn name(&self, index: usize) -> String {
        let given = self.id.as_ref().or(self.tap.as_ref());
        given.cloned().unwrap_or_else(|| format!("net{index}"))
    }

    /// The guest's address in the network called `name`.
    pub fn mac_for(&self, name: &str) -> Mac {
        self.mac.unwrap_or_else(|| Mac::from_id(name))
    }

    /// What passt is asked for.
    pub fn passt_options(&self, mac: Mac) -> PasstOptions {
        let host = self.host.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        PasstOptions { mac, mtu: self.mtu, forwards: self.forward.clone(), host }
    }
}

impl fmt::Display for NetConfig {
    /// The kind of network, as on the command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.mode, &self.tap, self.fd) {
            (Some(Mode::User), ..) => f.write_str("user"),
            (Some(Mode::None), ..) => f.write_str("none"),
            (None, Some(tap), _) => write!(f, "tap={tap}"),
            (None, None, Some(fd)) => write!(f, "fd={fd}"),
            (None, None, None) => f.write_str("of no kind"),
        }
    }
}

fn is_id(id: &str) -> bool {
    (1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
}

const fn one() -> u16 {
    1
}
