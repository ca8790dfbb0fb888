//! passt, a program that gives a guest a network without any privilege: it turns the guest's frames
//! into sockets of the host's. See passt(1).

use std::fmt;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::pipe::{PipeFlags, pipe_with};

use super::{Failure, Forward, Mac, NetPort, Network, Protocol, Stream};

/// The program.
const PROGRAM: &str = "passt";
/// What the guest gets by DHCP.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The guest's gateway, which is also the host: its loopback interface.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// Bits of the guest's network.
const PREFIX_LENGTH: &str = "24";
/// The longest packets that passt takes (passt(1), --mtu).
const MTU: u16 = 65520;
/// How long passt may take to end.
const LAST_MOMENT: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// How long passt may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// A frame that asks who has the gateway's address: its length for the stream, then Ethernet, then
/// ARP (RFC 826).
const ARP_REQUEST_BYTES: usize = 4 + 42;
/// Where a frame's type lies.
const ETHERTYPE: usize = 12;
/// ARP's type.
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
/// What passt says where there is no system log.
const NO_SYSLOG: &str = "to syslog";

/// What passt is asked for.
#[derive(Clone, Debug)]
pub struct PasstOptions {
    /// The guest's.
    pub mac: Mac,
    /// The most bytes of a packet; 65520 if not given.
    pub mtu: Option<u16>,
    /// Ports of the host that lead into the guest.
    pub forwards: Vec<Forward>,
    /// The host's address that these are bound to.
    pub host: IpAddr,
}

/// Why there is no passt. Each names the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PasstError {
    /// The program is not installed.
    #[error(
        "passt is not installed; as root, run: apt install passt (or your distribution's package of that name), or use --net tap=NAME"
    )]
    Missing,
    /// It does not start.
    #[error("passt does not start")]
    Start(#[source] io::Error),
    /// It ended at once.
    #[error("passt ended with {status}: {message}")]
    Ended {
        /// How.
        status: ExitStatus,
        /// What it said.
        message: String,
    },
}

/// A running passt, for one guest. It ends when the guest's side of the socket is closed; dropping
/// this, after that, waits for a moment until it has.
pub struct Passt {
    child: Child,
    stderr: Option<ChildStderr>,
}

impl fmt::Debug for Passt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Passt").field("pid", &self.child.id()).finish_non_exhaustive()
    }
}

impl Passt {
    /// Starts passt and waits until it carries frames; its network, and what ends it.
    ///
    /// # Errors
    /// [`PasstError`].
    pub fn start(options: &PasstOptions) -> Result<(Self, Network), PasstError> {
        let (ours, theirs) = stream_pair().map_err(PasstError::Start)?;
        let (said, stderr) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
            .map_err(|error| PasstError::Start(error.into()))?;
        let mut command = Command::new(PROGRAM);
        command.args(arguments(options, theirs.as_raw_fd()));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        // A Ctrl-C on the terminal is not for it.
        command.process_group(0);
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())
            .map_err(|error| PasstError::Start(error.into()))?;
        let child = command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => PasstError::Missing,
            _ => PasstError::Start(error),
        })?;
        drop((theirs, command));
        let mut passt = Self { child, stderr: Some(ChildStderr::from(said)) };
        let mut stream = Stream::new(ours);
        match passt.wait_ready(&mut stream, options.mac) {
            Ok(()) => Ok((passt, stream.into_network(Some(options.mtu.unwrap_or(MTU))))),
            Err(error) => {
                drop(stream);
                Err(error)
            }
        }
    }

    /// Asks for the gateway's Ethernet address and waits for an answer: by then passt has opened all
    /// sockets that it was asked for. Other frames that come before are dropped.
    fn wait_ready(&mut self, stream: &mut Stream, mac: Mac) -> Result<(), PasstError> {
        let end = Instant::now() + PATIENCE;
        let failed = |error: rustix::io::Errno| PasstError::Start(error.into());
        let send = || rustix::io::write(stream.descriptor(), &arp_request(mac));
        match rustix::io::retry_on_intr(send) {
            Ok(_) => {}
            Err(rustix::io::Errno::PIPE) => return Err(self.why_ended()),
            Err(error) => return Err(failed(error)),
        }
        loop {
            match stream.take_frame() {
                Ok(frame)
                    if frame.get(ETHERTYPE..).is_some_and(|f| f.starts_with(&ETHERTYPE_ARP)) =>
                {
                    return Ok(());
                }
                Ok(_) => continue,
                Err(Failure::WouldBlock) => {}
                Err(_) => return Err(self.why_ended()),
            }
            let left = end.saturating_duration_since(Instant::now());
            let timeout =
                Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let socket = stream.descriptor();
            let mut ready = [PollFd::new(&socket, PollFlags::IN)];
            match poll(&mut ready, Some(&timeout)) {
                Ok(0) => {
                    // A host without IPv4 has no one to answer.
                    tracing::debug!("passt does not say whether it is ready");
                    return Ok(());
                }
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(failed(error)),
            }
        }
    }

    /// It has closed the socket, so that it has ended or is about to.
    fn why_ended(&mut self) -> PasstError {
        self.wait_a_moment();
        // Where it has ended this does nothing.
        let _ = self.child.kill();
        match self.child.wait() {
            Ok(status) => PasstError::Ended { status, message: self.last_words() },
            Err(error) => PasstError::Start(error),
        }
    }

    /// Waits until the program has ended, for a moment only: one that hangs is not waited for.
    fn wait_a_moment(&self) {
        if let Some(stderr) = &self.stderr {
            // Its end is the program's, whose number may mean nothing to a process in a jail.
            let mut ended = [PollFd::new(stderr, PollFlags::HUP)];
            let _ = poll(&mut ended, Some(&LAST_MOMENT));
        }
    }

    /// What passt said, in one line, the first time that it is asked for.
    fn last_words(&mut self) -> String {
        let mut bytes = Vec::new();
        if let Some(mut stderr) = self.stderr.take() {
            // It ends with an error where nothing more was said.
            let _ = stderr.read_to_end(&mut bytes);
        }
        let text = String::from_utf8_lossy(&bytes);
        let lines = text.lines().map(str::trim);
        let lines: Vec<&str> =
            lines.filter(|line| !line.is_empty() && !line.ends_with(NO_SYSLOG)).collect();
        lines.join("; ")
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        self.wait_a_moment();
        // A jail's process is not its parent any more.
        if let Ok(Some(status)) = self.child.try_wait()
            && !status.success()
            && self.stderr.is_some()
        {
            tracing::warn!("passt ended with {status}: {}", self.last_words());
        }
    }
}

fn stream_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

fn arguments(options: &PasstOptions, fd: i32) -> Vec<String> {
    let PasstOptions { mtu, forwards, host, .. } = options;
    let mut arguments = vec!["--foreground".to_owned(), "--quiet".to_owned()];
    let mut add = |flag: &str, value: String| arguments.extend([flag.to_owned(), value]);
    add("--fd", fd.to_string());
    add("--address", GUEST_ADDRESS.to_string());
    add("--netmask", PREFIX_LENGTH.to_owned());
    add("--gateway", GATEWAY.to_string());
    add("--mtu", mtu.unwrap_or(MTU).to_string());
    for Forward { protocol, host_port, guest_port } in forwards {
        let flag = match protocol {
            Protocol::Tcp => "--tcp-ports",
            Protocol::Udp => "--udp-ports",
        };
        add(flag, format!("{host}/{host_port}:{guest_port}"));
    }
    arguments
}

fn arp_request(mac: Mac) -> [u8; ARP_REQUEST_BYTES] {
    let frame_bytes = (ARP_REQUEST_BYTES as u32 - 4).to_be_bytes();
    let (mac, guest, gateway) = (mac.bytes(), GUEST_ADDRESS.octets(), GATEWAY.octets());
    // Ethernet, IPv4, their addresses' lengths, a request.
    let kind = [0, 1, 0x08, 0, 6, 4, 0, 1];
    let parts: [&[u8]; 9] =
        [&frame_bytes, &[0xff; 6], &mac, &ETHERTYPE_ARP, &kind, &mac, &guest, &[0; 6], &gateway];
    let mut request = [0; ARP_REQUEST_BYTES];
    for (to, from) in request.iter_mut().zip(parts.into_iter().flatten()) {
        *to = *from;
    }
    request
}
