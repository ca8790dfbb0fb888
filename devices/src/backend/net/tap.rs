//! Tap interfaces of Linux (Documentation/networking/tuntap.rst).

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::{c_int, c_uint, c_ulong, ifreq, iovec};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::{Failure, HEADER_BYTES, NetPort, Network, Offloads};

/// Where tap interfaces are had.
const DEVICE: &str = "/dev/net/tun";
/// Why a tap interface cannot be used. Each names the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TapError {
    /// There are no tap interfaces here.
    #[error("/dev/net/tun is not there; run modprobe tun, or use --net user")]
    Missing(#[source] io::Error),
    /// They are not for this user.
    #[error(
        "no permission to open /dev/net/tun; as root, run: chmod 666 /dev/net/tun, or use --net user"
    )]
    Permission(#[source] io::Error),
    /// The name cannot be one.
    #[error(
        "\"{0}\" is no name of an interface; give 1 to 15 characters without spaces or slashes"
    )]
    Name(String),
    /// The interface is not there, and may not be made.
    #[error(
        "there is no interface {name}, and making one takes CAP_NET_ADMIN; as root, run: ip tuntap add {name} mode tap{flag} user $USER && ip link set {name} up; or use --net user"
    )]
    MayNotMake {
        /// The interface.
        name: String,
        /// What makes it with as many queues.
        flag: &'static str,
    },
    /// The interface belongs to someone else.
    #[error(
        "no permission to use {name}: it belongs to another user; as root, run: ip tuntap del {name} mode tap && ip tuntap add {name} mode tap{flag} user $USER; or use --net user"
    )]
    MayNotUse {
        /// The interface.
        name: String,
        /// What makes it with as many queues.
        flag: &'static str,
    },
    /// The interface is no tap, or with another number of queues.
    #[error(
        "{name} is no tap interface with {queues}; give another name or, if it was one, as root, run: ip tuntap del {name} mode tap; ip tuntap add {name} mode tap{flag} user $USER"
    )]
    Kind {
        /// The interface.
        name: String,
        /// What was asked for.
        queues: &'static str,
        /// What makes it.
        flag: &'static str,
    },
    /// Another program has it.
    #[error("{0} is in use by another program; give each guest an interface of its own")]
    Busy(String),
    /// An inherited descriptor is neither a tap interface nor a socket.
    #[error(
        "descriptor {0} is not open, or neither a tap interface nor a connected stream socket; have whoever starts alcove pass one that is"
    )]
    Descriptor(u32),
    /// The host refused something else.
    #[error("the host refused to {call}")]
    Host {
        /// What was asked of it.
        call: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

/// One queue of a tap interface.
#[derive(Debug)]
pub struct Tap {
    file: File,
    /// The kernel takes and gives headers.
    has_header: bool,
}

impl Tap {
    /// The interface `name` with `queues` queues (1 or more), made if it is not there. One that was
    /// made is up, has `mtu` if one is given, and goes away with its last port.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open(name: &str, queues: u16, mtu: Option<u16>) -> Result<Network, TapError> {
        let c_name = interface_name(name)?;
        let existed = interface_exists(&c_name);
        let mut ports = Vec::new();
        for index in 0..queues {
            let mut tap = Self::attach(&c_name, queues > 1)
                .map_err(|error| explain(name, queues > 1, existed, error))?;
            if index > 0 {
                tap.set_attached(false).map_err(host("detach a queue"))?;
            }
            ports.push(tap);
        }
        if !existed {
            bring_up(&c_name, mtu).map_err(host("bring the interface up"))?;
        }
        Self::network(ports)
    }

    /// The interface behind an inherited descriptor; `None` if it is no tap interface.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn inherited(fd: OwnedFd) -> Result<Option<Network>, TapError> {
        let file = File::from(fd);
        let mut request = empty_request();
        // SAFETY: the kernel fills the request, which is of the size that it expects.
        let got = unsafe { ioctl_with(&file, libc::TUNGETIFF as c_ulong, &raw mut request) };
        if got.is_err() {
            return Ok(None);
        }
        // SAFETY: TUNGETIFF has filled the flags.
        let flags = c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & libc::IFF_TAP == 0 || flags & libc::IFF_NO_PI == 0 {
            return Err(TapError::Descriptor(file.as_raw_fd().unsigned_abs()));
        }
        set_nonblocking(&file).map_err(host("change the descriptor"))?;
        let has_header = flags & libc::IFF_VNET_HDR != 0;
        let tap = Self { file, has_header };
        tap.set_header_size().map_err(host("set the header's size"))?;
        Self::network(vec![tap]).map(Some)
    }

    fn network(mut ports: Vec<Self>) -> Result<Network, TapError> {
        let mtu = ports.first().and_then(|tap| tap.mtu());
        let offloads = ports.first_mut().map_or(Offloads::NONE, Self::probe_offloads);
        let ports = ports.into_iter().map(|tap| Box::new(tap) as Box<dyn NetPort>).collect();
        Ok(Network { ports, offloads, mtu })
    }

    /// A new queue of the interface.
    fn attach(name: &CString, many: bool) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
        let file = options.open(DEVICE)?;
        let mut request = request_for(name);
        let many = if many { libc::IFF_MULTI_QUEUE } else { 0 };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | many;
        // All of them lie in 16 bits.
        request.ifr_ifru.ifru_flags = flags as i16;
        // SAFETY: the kernel reads and fills the request, which is of the size that it expects.
        unsafe { ioctl_with(&file, libc::TUNSETIFF as c_ulong, &raw mut request) }?;
        let tap = Self { file, has_header: true };
        tap.set_header_size()?;
        Ok(tap)
    }

    fn set_header_size(&self) -> io::Result<()> {
        if !self.has_header {
            return Ok(());
        }
        let bytes = HEADER_BYTES as c_int;
        // SAFETY: the kernel reads an int.
        unsafe { ioctl_with(&self.file, libc::TUNSETVNETHDRSZ as c_ulong, &raw const bytes) }
    }

    /// What the kernel can do; nothing is switched on.
    fn probe_offloads(&mut self) -> Offloads {
        let all = Offloads { checksum: true, tso4: true, tso6: true, ecn: true, uso: true };
        // UDP segments: since Linux 6.2.
        let tries = [all, Offloads { uso: false, ..all }];
        let found = tries.into_iter().find(|offloads| self.set_offloads(*offloads).is_ok());
        let _ = self.set_offloads(Offloads::NONE);
        found.filter(|_| self.has_header).unwrap_or(Offloads::NONE)
    }

    /// The interface's, if it can be told.
    fn mtu(&self) -> Option<u16> {
        let mut request = empty_request();
        // SAFETY: the kernel fills the request, which is of the size that it expects.
        unsafe { ioctl_with(&self.file, libc::TUNGETIFF as c_ulong, &raw mut request) }.ok()?;
        let socket = control_socket().ok()?;
        // SAFETY: as above; the name in it is the interface's.
        unsafe { ioctl_with(&socket, libc::SIOCGIFMTU, &raw mut request) }.ok()?;
        // SAFETY: SIOCGIFMTU has filled the MTU.
        u16::try_from(unsafe { request.ifr_ifru.ifru_mtu }).ok()
    }
}

impl NetPort for Tap {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    unsafe fn receive(&mut self, buffers: &[iovec]) -> Result<usize, Failure> {
        if !self.has_header {
            // SAFETY: the caller vouches for the buffers.
            let read = |frame: &[iovec]| unsafe { readv(&self.file, frame) };
            // SAFETY: as above.
            return unsafe { super::stream::receive_behind_header(buffers, read) };
        }
        // SAFETY: as above.
        unsafe { readv(&self.file, buffers) }
    }

    unsafe fn send(&mut self, buffers: &[iovec]) -> Result<(), Failure> {
        let buffers = match buffers {
            [_header, frame @ ..] if !self.has_header => frame,
            all => all,
        };
        let count = c_int::try_from(buffers.len()).unwrap_or(c_int::MAX);
        loop {
            // SAFETY: the caller vouches for the buffers, and their number is right.
            let sent = unsafe { libc::writev(self.file.as_raw_fd(), buffers.as_ptr(), count) };
            let error = io::Error::last_os_error();
            match error.kind() {
                _ if sent >= 0 => return Ok(()),
                io::ErrorKind::Interrupted => {}
                _ => return Err(failure(error)),
            }
        }
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let Offloads { checksum, tso4, tso6, ecn, uso } = offloads;
        let flags = [
            (checksum, libc::TUN_F_CSUM),
            (tso4, libc::TUN_F_TSO4),
            (tso6, libc::TUN_F_TSO6),
            (ecn && (tso4 || tso6), libc::TUN_F_TSO_ECN),
            (uso, libc::TUN_F_USO4 | libc::TUN_F_USO6),
        ];
        let flags =
            flags.iter().filter(|(wanted, _)| *wanted).fold(0, |sum: c_uint, (_, f)| sum | f);
        // SAFETY: the argument is a number.
        let result = unsafe {
            libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD as c_ulong, c_ulong::from(flags))
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn set_attached(&mut self, attached: bool) -> io::Result<()> {
        let flag = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        let mut request = empty_request();
        request.ifr_ifru.ifru_flags = flag as i16;
        // SAFETY: the kernel reads the request, which is of the size that it expects.
        match unsafe { ioctl_with(&self.file, libc::TUNSETQUEUE as c_ulong, &raw mut request) } {
            // It is so already, or the interface has but one queue.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            result => result,
        }
    }
}

/// Reads one frame.
///
/// # Safety
/// The buffers' memory is mapped and writable.
unsafe fn readv(file: &File, buffers: &[iovec]) -> Result<usize, Failure> {
    let count = c_int::try_from(buffers.len()).unwrap_or(c_int::MAX);
    loop {
        // SAFETY: the caller vouches for the buffers, and their number is right.
        let got = unsafe { libc::readv(file.as_raw_fd(), buffers.as_ptr(), count) };
        let error = io::Error::last_os_error();
        match (usize::try_from(got), error.kind()) {
            (Ok(bytes), _) => return Ok(bytes),
            (Err(_), io::ErrorKind::Interrupted) => {}
            (Err(_), _) => return Err(failure(error)),
        }
    }
}

/// What an error of the kernel's means.
fn failure(error: io::Error) -> Failure {
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Failure::WouldBlock,
        // The interface is down.
        Some(libc::EIO | libc::ENETDOWN) => Failure::Down,
        // It was deleted.
        Some(libc::EBADFD) => Failure::Gone(Some(error)),
        _ => Failure::Refused(error),
    }
}

/// Carries out `request`, whose argument is a pointer.
///
/// # Safety
/// The pointer is what the request takes.
unsafe fn ioctl_with<T>(fd: &impl AsRawFd, request: c_ulong, argument: *const T) -> io::Result<()> {
    // SAFETY: the caller vouches for the argument.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn empty_request() -> ifreq {
    // SAFETY: an ifreq is plain numbers, for which zeroes are a value.
    unsafe { std::mem::zeroed() }
}

fn request_for(name: &CString) -> ifreq {
    let mut request = empty_request();
    // The last byte stays zero: a name is checked to be shorter.
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
        *to = *from as libc::c_char;
    }
    request
}

fn interface_name(name: &str) -> Result<CString, TapError> {
    let fits = (1..libc::IFNAMSIZ).contains(&name.len()) && name != "." && name != "..";
    // A % would have the kernel number the interface.
    let valid = name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':' && b != b'%');
    match CString::new(name) {
        Ok(c_name) if fits && valid => Ok(c_name),
        _ => Err(TapError::Name(name.to_owned())),
    }
}

fn interface_exists(name: &CString) -> bool {
    // SAFETY: the name ends with a zero byte.
    unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
}

fn control_socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?)
}

fn bring_up(name: &CString, mtu: Option<u16>) -> io::Result<()> {
    let socket = control_socket()?;
    let mut request = request_for(name);
    if let Some(mtu) = mtu {
        request.ifr_ifru.ifru_mtu = mtu.into();
        // SAFETY: the kernel reads the request, which is of the size that it expects.
        unsafe { ioctl_with(&socket, libc::SIOCSIFMTU, &raw mut request) }?;
    }
    // SAFETY: as above, and fills the flags.
    unsafe { ioctl_with(&socket, libc::SIOCGIFFLAGS, &raw mut request) }?;
    // SAFETY: SIOCGIFFLAGS has filled them.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as i16;
    // SAFETY: the kernel reads the request, which is of the size that it expects.
    unsafe { ioctl_with(&socket, libc::SIOCSIFFLAGS, &raw mut request) }
}

fn set_nonblocking(file: &File) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(rustix::fs::fcntl_setfl(file, flags | rustix::fs::OFlags::NONBLOCK)?)
}

/// Takes over descriptor `number`, which this process was started with.
///
/// # Errors
/// It is not open, or is one of the first three.
pub(super) fn take_over(number: u32) -> Result<OwnedFd, TapError> {
    const STDERR: RawFd = 2;
    let fd = RawFd::try_from(number).unwrap_or(-1);
    // SAFETY: the call takes no pointer.
    if fd <= STDERR || unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(TapError::Descriptor(number));
    }
    // SAFETY: it is open, and the user says that it is for this.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn host(call: &'static str) -> impl Fn(io::Error) -> TapError {
    move |source| TapError::Host { call, source }
}

/// Why the kernel refuses the interface.
fn explain(name: &str, many: bool, existed: bool, error: io::Error) -> TapError {
    let name = name.to_owned();
    let flag = if many { " multi_queue" } else { "" };
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::Missing(error),
        Some(libc::EACCES) => TapError::Permission(error),
        Some(libc::EPERM) if existed => TapError::MayNotUse { name, flag },
        Some(libc::EPERM) => TapError::MayNotMake { name, flag },
        Some(libc::EBUSY) => TapError::Busy(name),
        Some(libc::EINVAL | libc::E2BIG) => {
            let queues = if many { "several queues" } else { "one queue" };
            TapError::Kind { name, queues, flag }
        }
        _ => TapError::Host { call: "attach to the interface", source: error },
    }
}
