//! Why a machine could not be built or run.

use std::io;
use std::path::PathBuf;

use devices::backend::console::OpenError;
use devices::virtio::blk::BlkError;
use devices::virtio::net::NetError;

use crate::boot::initrd::InitrdError;
use crate::config::ConfigError;

/// A failure of alcove itself. A user's mistake names the flag and the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// The settings contradict each other.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// /dev/kvm does not exist.
    #[error(
        "/dev/kvm is missing: modprobe kvm_amd or kvm_intel, or enable virtualisation in the firmware or hypervisor; `alcove doctor` tells more"
    )]
    NoKvm,
    /// /dev/kvm may not be opened.
    #[error(
        "no permission to open /dev/kvm: join the group that owns it (usermod -aG kvm $USER, then log in again)"
    )]
    KvmPermission,
    /// /dev/kvm could not be opened for another reason.
    #[error("cannot open /dev/kvm")]
    KvmOpen(#[source] io::Error),
    /// The KVM there speaks another interface.
    #[error("/dev/kvm speaks API version {0}, alcove needs 12: run a newer host kernel")]
    KvmVersion(i32),
    /// A KVM call failed.
    #[error("KVM refused to {call}")]
    Kvm {
        /// What was asked for.
        call: &'static str,
        /// Why not.
        source: kvm_ioctls::Error,
    },
    /// A host call failed.
    #[error("the host refused to {call}")]
    Host {
        /// What was asked for.
        call: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// More vCPUs than KVM offers.
    #[error("--cpus {asked} is more than the {most} that KVM offers here; give less")]
    TooManyCpus {
        /// What was asked for.
        asked: u32,
        /// What there is.
        most: usize,
    },
    /// An arrangement of the vCPUs whose APIC ids KVM does not offer.
    #[error(
        "--cpus {asked} so arranged needs APIC ids up to {highest}, KVM has them below {limit} \
         here; give powers of two for threads and cores"
    )]
    ApicIds {
        /// How many vCPUs.
        asked: u32,
        /// The highest APIC id.
        highest: u32,
        /// KVM's limit, itself out of bounds.
        limit: usize,
    },
    /// A guest that was to do nothing but exit did something else.
    #[error("the guest left by {0}")]
    BareLoop(String),
    /// Guest memory cannot be had.
    #[error("--memory {asked}")]
    Memory {
        /// The size as given.
        asked: String,
        /// Why not.
        source: crate::memory::MemoryError,
    },
    /// KVM does not take the guest's memory.
    #[error("--memory {asked} is not taken by KVM here; give less")]
    MemorySlot {
        /// The size as given.
        asked: String,
        /// Why not.
        source: kvm_ioctls::Error,
    },
    /// No kernel was named, none was found.
    #[error(transparent)]
    NoKernel(#[from] crate::config::kernel::NoKernel),
    /// The kernel cannot be read.
    #[error("--kernel {}", path.display())]
    KernelFile {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The kernel cannot be loaded.
    #[error("--kernel {}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: crate::boot::kernel::KernelError,
    },
    /// The initrd cannot be read.
    #[error("--initrd {}", path.display())]
    InitrdFile {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The initrd cannot be loaded.
    #[error("--initrd {}", path.display())]
    Initrd {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: InitrdError,
    },
    /// The command line does not fit.
    #[error("{flag}")]
    Cmdline {
        /// Where it came from.
        flag: &'static str,
        /// What is wrong.
        source: crate::boot::cmdline::CmdlineError,
    },
    /// The tables for the kernel's entry cannot be written.
    #[error("the guest cannot be set up")]
    Params(#[source] crate::boot::params::ParamsError),
    /// The ACPI tables cannot be written.
    #[error("the machine cannot be described")]
    Acpi(#[source] crate::boot::acpi::AcpiError),
    /// The serial port's other end cannot be opened.
    #[error("--serial {given}")]
    Serial {
        /// As given.
        given: String,
        /// Why not.
        source: OpenError,
    },
    /// A disk cannot be had.
    #[error("--disk {}", path.display())]
    Disk {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: BlkError,
    },
    /// A network cannot be had.
    #[error("--net {given}")]
    Net {
        /// The kind of network, as given.
        given: String,
        /// Why not.
        source: NetError,
    },
    /// More virtio devices than there are interrupts.
    #[error(
        "--disk, --net: {asked} devices are more than the {most} that there is room for; leave some out"
    )]
    TooManyDevices {
        /// Disks, networks and other virtio devices.
        asked: usize,
        /// What there is room for.
        most: usize,
    },
    /// A barrier cannot be put up.
    #[error("the host refused to let alcove {call}; --sandbox off runs without its protection")]
    Sandbox {
        /// What was asked for.
        call: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The jail cannot be entered.
    #[error("--jail")]
    Jail(#[source] crate::sandbox::jail::Refused),
    /// No control group can be made.
    #[error("--cpu-quota and --memory-max need control groups of version 2")]
    ControlGroup(#[source] crate::sandbox::cgroup::Refused),
    /// Something that only root may ask for.
    #[error("{flag} is for root only; run alcove as root, or leave it out")]
    RootOnly {
        /// The flag.
        flag: &'static str,
    },
    /// Two devices want one address range.
    #[error("a device finds its addresses taken")]
    Bus(#[from] devices::bus::BusError),
    /// The event loop failed.
    #[error("the event loop failed")]
    EventLoop(#[source] event_manager::Error),
}

impl VmError {
    /// What the user can do about it, where the messages do not say.
    pub fn remedy(&self) -> Option<&'static str> {
        const OTHER_KERNEL: &str = "name another vmlinux or bzImage, or build this one again";
        match self {
            Self::KernelFile { .. } => Some("name a vmlinux or bzImage that you may read"),
            Self::Kernel { source, .. } if !source.tells_remedy() => Some(OTHER_KERNEL),
            Self::InitrdFile { .. } => Some("name an initial RAM disk that you may read"),
            Self::Initrd { source: InitrdError::Image(_), .. } => {
                Some("name another initial RAM disk, or leave --initrd out")
            }
            Self::Jail(_) => Some("`alcove doctor` tells what is missing, or leave --jail out"),
            Self::ControlGroup(_) => Some("`alcove doctor` tells what is there"),
            Self::Serial { source: OpenError::File { .. } | OpenError::Socket { .. }, .. } => {
                Some("name a place in a folder where you may write")
            }
            _ => None,
        }
    }
}
