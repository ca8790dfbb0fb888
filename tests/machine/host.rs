//! What tests need of a host.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

/// Something that a host may lack.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// A /dev/kvm that opens.
    Kvm,
    /// A KVM that interprets guest kernels.
    SoftwareKvm,
    /// A KVM that runs guest kernels on the processor, since the guest is a large one.
    HardwareKvm,
    /// mke2fs, e2fsck and debugfs, of Debian's package e2fsprogs.
    FileSystemTools,
    /// ip, of Debian's package iproute2, passt, and /dev/net/tun.
    NetworkTools,
    /// Debian's kernels, which `make lab` fetches.
    DebianKernels,
    /// Port accesses that take microseconds; emulated hardware takes tens.
    FastPorts,
    /// A processor that gives the guest an XCR0 of its own, and with it AVX.
    GuestXcr0,
    /// The guest that `make guest` builds.
    Guest,
    /// To be root.
    Root,
    /// An alcove that can be asked to do what it must not.
    DebugBuild,
    /// A kernel with Landlock that knows TCP.
    Landlock,
    /// Control groups of version 2 that limit processors and memory.
    ControlGroups,
}

impl Need {
    /// What is missing of it, if anything.
    pub fn missing(self) -> Option<&'static str> {
        let (there, reason) = match self {
            Self::Kvm => (has_kvm(), "/dev/kvm does not open"),
            Self::SoftwareKvm => {
                (has_kvm() && !has_hardware_kvm(), "this KVM interprets no guest kernels")
            }
            Self::HardwareKvm => (has_hardware_kvm(), "this KVM would take hours"),
            Self::FileSystemTools => {
                (alcove::host::has_program("debugfs"), "e2fsprogs is not installed")
            }
            Self::NetworkTools => (
                alcove::host::has_program("ip")
                    && alcove::host::has_program("passt")
                    && Path::new("/dev/net/tun").exists(),
                "iproute2 or passt is not installed, or there is no /dev/net/tun",
            ),
            Self::DebianKernels => {
                (guest_file("debian-6.12").exists(), "no kernels of Debian's; run make lab")
            }
            Self::FastPorts => (!crate::lab::is_inside(), "the lab's ports are slow"),
            Self::GuestXcr0 => {
                (!alcove::host::is_translated(), "a translated processor does not switch XCR0")
            }
            Self::Guest => (guest_file("vmlinux").exists(), "no guest; run make guest"),
            Self::Root => (is_root(), "only root may do it"),
            Self::DebugBuild => {
                let is_ours = std::env::var_os("ALCOVE").is_none();
                (cfg!(debug_assertions) && is_ours, "a release build attempts nothing")
            }
            Self::Landlock => (
                alcove::host::landlock_abi().is_some_and(|abi| abi >= 4),
                "this kernel has no Landlock of ABI 4",
            ),
            Self::ControlGroups => (
                crate::lab::is_inside() || has_control_groups(),
                "no control groups of version 2 with cpu and memory in /sys/fs/cgroup",
            ),
        };
        (!there).then_some(reason)
    }

    /// Whether the lab has it.
    pub fn is_in_lab(self) -> bool {
        match self {
            Self::Kvm
            | Self::HardwareKvm
            | Self::Guest
            | Self::FileSystemTools
            | Self::NetworkTools
            | Self::DebianKernels
            | Self::ControlGroups
            | Self::Root => true,
            // The lab's alcove is the one that is released.
            Self::DebugBuild | Self::Landlock => false,
            Self::SoftwareKvm | Self::FastPorts | Self::GuestXcr0 => false,
        }
    }
}

fn has_kvm() -> bool {
    OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
}

/// Whether /dev/kvm runs guest kernels on the processor itself.
pub fn has_hardware_kvm() -> bool {
    alcove::host::has_hardware_virtualisation()
}

fn has_control_groups() -> bool {
    let there = alcove::sandbox::cgroup::controllers().unwrap_or_default();
    ["cpu", "memory"].iter().all(|wanted| there.split(' ').any(|name| name == *wanted))
}

fn is_root() -> bool {
    // SAFETY: the call has no preconditions.
    #[expect(unsafe_code, reason = "geteuid")]
    let uid = unsafe { libc::geteuid() };
    uid == 0
}

/// A file of the guest for tests: ALCOVE_GUEST names its folder, else it is target/guest.
pub fn guest_file(name: &str) -> PathBuf {
    match std::env::var_os("ALCOVE_GUEST") {
        Some(folder) => Path::new(&folder).join(name),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest").join(name),
    }
}
