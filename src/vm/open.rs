//! Everything that a machine opens by a name, before it gives up to open anything.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use devices::backend::console::Backend;
use devices::backend::disk::RawDisk;
use devices::backend::net::TapError;
use devices::virtio::blk::{DiskConfig, VirtioBlk};
use devices::virtio::net::{NetConfig, OpenNetwork};
use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::Kvm;

use super::VmError;
use crate::config::{VmConfig, kernel as kernel_search};
use crate::sandbox::process;

/// What the flags name, opened.
pub struct Opened {
    /// /dev/kvm.
    pub kvm: Kvm,
    /// The kernel, with its path.
    pub kernel: (PathBuf, File),
    /// The initial RAM disk, with its path.
    pub initrd: Option<(PathBuf, File)>,
    /// The disks' images, in the order of the flags.
    pub disks: Vec<RawDisk>,
    /// The networks, in the order of the flags, with their names.
    pub nets: Vec<(String, OpenNetwork)>,
    /// Where the serial port leads.
    pub serial: Backend,
}

impl Opened {
    /// Opens what `config` names.
    pub fn open(config: &VmConfig) -> Result<Self, VmError> {
        // What is opened below may get a number that a flag names.
        let inherited = process::open_descriptors();
        for net in &config.nets {
            if let Some(fd) = net.fd
                && !inherited.iter().any(|known| u32::try_from(*known) == Ok(fd))
            {
                let source = TapError::Descriptor(fd).into();
                return Err(VmError::Net { given: net.to_string(), source });
            }
        }
        let kvm = open_kvm()?;
        let path = match &config.kernel {
            Some(path) => path.clone(),
            None => kernel_search::find()?,
        };
        let file =
            open(&path).map_err(|source| VmError::KernelFile { path: path.clone(), source })?;
        let kernel = (path, file);
        let initrd = config.initrd.as_ref().map(|path| {
            let failed = |source| VmError::InitrdFile { path: path.clone(), source };
            Ok::<_, VmError>((path.clone(), open(path).map_err(failed)?))
        });
        let disk = |disk: &DiskConfig| {
            let failed = |source| VmError::Disk { path: disk.path.clone(), source };
            VirtioBlk::open_image(disk).map_err(failed)
        };
        let disks = config.disks.iter().map(disk).collect::<Result<_, _>>()?;
        let net = |(name, net): (String, &NetConfig)| {
            let failed = |source| VmError::Net { given: net.to_string(), source };
            let opened = OpenNetwork::open(&name, net).map_err(failed)?;
            Ok::<_, VmError>((name, opened))
        };
        let nets = config.named_nets().map(net).collect::<Result<_, _>>()?;
        let given = config.serial.to_string();
        let serial = config.serial.open().map_err(|source| VmError::Serial { given, source })?;
        Ok(Self { kvm, kernel, initrd: initrd.transpose()?, disks, nets, serial })
    }
}

fn open_kvm() -> Result<Kvm, VmError> {
    let kvm = Kvm::new().map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => VmError::NoKvm,
        libc::EACCES | libc::EPERM => VmError::KvmPermission,
        errno => VmError::KvmOpen(io::Error::from_raw_os_error(errno)),
    })?;
    match kvm.get_api_version() {
        version if version == KVM_API_VERSION as i32 => Ok(kvm),
        version => Err(VmError::KvmVersion(version)),
    }
}

/// Opens an image for reading, without waiting for a writer if it is a FIFO.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}
