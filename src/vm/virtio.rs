//! The virtio devices of a machine: where they stand, and their ways into KVM.
#![expect(unsafe_code, reason = "hands the pages of registers to KVM")]

use std::io;
use std::sync::Arc;

use devices::backend::disk::RawDisk;
use devices::bus::Bus;
use devices::thread_start::ThreadStart;
use devices::virtio::blk::VirtioBlk;
use devices::virtio::device::{Memory, VirtioDevice};
use devices::virtio::net::{OpenNetwork, VirtioNet};
use devices::virtio::rng::VirtioRng;
use devices::virtio::transport::mmio::{MMIO_BYTES, MmioTransport, RegisterPages};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, VmFd};
use tracing::info;

use super::VmError;
use crate::boot::acpi::MmioDevice;
use crate::config::VmConfig;
use crate::event_loop::EventLoop;
use crate::irq::{IrqLine, gsi};
use crate::memory::GuestRam;
use crate::memory::layout::VIRTIO_MMIO_START;

/// The devices behind their transports.
pub struct Virtio {
    transports: Vec<Arc<MmioTransport>>,
}

impl Virtio {
    /// Returns when no I/O is in flight; none starts before [`Virtio::resume`].
    pub fn pause(&self) {
        self.transports.iter().for_each(|transport| transport.pause());
    }

    /// Goes on after [`Virtio::pause`].
    pub fn resume(&self) {
        self.transports.iter().for_each(|transport| transport.resume());
    }
}

/// What was opened for the devices, in the order of the flags, and what their threads begin with.
pub struct OpenDevices {
    /// The disks' images.
    pub disks: Vec<RawDisk>,
    /// What threads of disks begin with.
    pub disk_start: ThreadStart,
    /// The networks, with their names.
    pub nets: Vec<(String, OpenNetwork)>,
    /// What threads of networks begin with.
    pub net_start: ThreadStart,
}

/// Where the devices of `config` stand, in the order of [`attach`].
///
/// # Errors
/// [`VmError::TooManyDevices`].
pub fn places(config: &VmConfig) -> Result<Vec<MmioDevice>, VmError> {
    let asked = config.disks.len() + config.named_nets().count() + usize::from(config.rng.enabled);
    let most = gsi::DEVICES.len();
    if asked > most {
        return Err(VmError::TooManyDevices { asked, most });
    }
    let size_bytes = MMIO_BYTES as u32;
    let base = |index: u32| VIRTIO_MMIO_START as u32 + index * size_bytes;
    let place = |(index, gsi): (u32, &u32)| MmioDevice { base: base(index), size_bytes, gsi: *gsi };
    Ok((0..).zip(&gsi::DEVICES).take(asked).map(place).collect())
}

/// Makes the devices of `config`, disks first, so that Linux names them in their order from vda on,
/// then networks, all from what was `opened` for them, and puts them at `places`.
pub fn attach(
    config: &VmConfig,
    opened: OpenDevices,
    places: &[MmioDevice],
    vm: &Arc<VmFd>,
    ram: &GuestRam,
    mmio: &mut Bus,
    event_loop: &mut EventLoop,
) -> Result<Virtio, VmError> {
    let memory: Memory = Arc::new(ram.memory().clone());
    // With whether KVM shall take over its notifiers, and with any of them the reads of registers.
    // Each registration waits for a grace period of the host's kernel, which a device that is asked
    // a few times only is not worth.
    let mut devices: Vec<(Box<dyn VirtioDevice>, bool)> = Vec::new();
    for (index, (disk, image)) in config.disks.iter().zip(&opened.disks).enumerate() {
        let device = VirtioBlk::with_start(&disk_name(index), disk, image, &opened.disk_start)
            .map_err(|source| VmError::Disk { path: disk.path.clone(), source })?;
        devices.push((Box::new(device), true));
    }
    for ((name, network), (_, net)) in opened.nets.into_iter().zip(config.named_nets()) {
        let device = VirtioNet::new(&name, net, network, &opened.net_start)
            .map_err(|source| VmError::Net { given: net.to_string(), source })?;
        devices.push((Box::new(device), true));
    }
    if config.rng.enabled {
        let device = VirtioRng::new(&config.rng).map_err(host("create the entropy device"))?;
        event_loop.add(device.subscriber());
        devices.push((Box::new(device), false));
    }
    if devices.is_empty() {
        return Ok(Virtio { transports: Vec::new() });
    }
    let pages = RegisterPages::new(devices.len()).map_err(host("map memory for registers"))?;
    if devices.iter().any(|(_, is_busy)| *is_busy) {
        show_pages(vm, ram.regions().count() as u32, &pages);
    }
    let mut transports = Vec::new();
    for (((device, is_busy), place), page) in devices.into_iter().zip(places).zip(pages.iter()) {
        let line = Arc::new(IrqLine::new(Arc::clone(vm), place.gsi));
        let transport = MmioTransport::new(device, Arc::clone(&memory), line, page);
        let base = u64::from(place.base);
        for notifier in transport.notifiers().iter().filter(|_| is_busy) {
            let address = IoEventAddress::Mmio(base + notifier.offset);
            vm.register_ioevent(&notifier.event, &address, notifier.datamatch)
                .map_err(|source| VmError::Kvm { call: "watch a device's register", source })?;
        }
        mmio.insert(base, place.size_bytes.into(), Arc::clone(&transport) as _)?;
        transports.push(transport);
    }
    Ok(Virtio { transports })
}

/// Lets the guest read the devices' registers without a way through this process, which spares an
/// exit for each interrupt; it cannot write there. One slot serves all, which stand side by side from
/// [`VIRTIO_MMIO_START`] on. A KVM that refuses it passes the reads on as it passes on the writes.
fn show_pages(vm: &VmFd, slot: u32, pages: &RegisterPages) {
    let region = kvm_userspace_memory_region {
        slot,
        guest_phys_addr: VIRTIO_MMIO_START,
        memory_size: pages.size_bytes(),
        userspace_addr: pages.host_address(),
        flags: KVM_MEM_READONLY,
    };
    // SAFETY: the range is a mapping of our own, nothing in this process but atomic accesses reaches
    // it, and the MMIO bus, which every running vCPU holds, keeps it.
    if let Err(error) = unsafe { vm.set_user_memory_region(region) } {
        info!(%error, "KVM takes no read-only memory; the guest reads registers the slow way");
    }
}

/// What Linux calls disk number `index`: vda to vdz, then vdaa.
pub fn disk_name(index: usize) -> String {
    const LETTERS: usize = 26;
    let letter = |at: usize| char::from(b'a' + (at % LETTERS) as u8);
    match index.checked_sub(LETTERS) {
        None => format!("vd{}", letter(index)),
        Some(rest) => format!("vd{}{}", letter(rest / LETTERS), letter(rest)),
    }
}

fn host(call: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Host { call, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::keyvalue;

    #[test]
    fn disks_are_named_as_linux_names_them() {
        let names = [(0, "vda"), (25, "vdz"), (26, "vdaa"), (52, "vdba")];
        assert!(names.iter().all(|(index, name)| disk_name(*index) == *name));
    }

    #[test]
    fn every_device_has_a_place_and_an_interrupt_of_its_own() {
        let disk = keyvalue::parse("a.img", "path").unwrap();
        let mut config = VmConfig { disks: vec![disk; 16], ..VmConfig::default() };
        let found = places(&config).unwrap();
        assert_eq!(found.len(), 17);
        for (index, place) in found.iter().enumerate() {
            let apart = |other: &MmioDevice| other.base != place.base && other.gsi != place.gsi;
            assert!(found[..index].iter().all(apart));
        }
        config.disks.resize(100, config.disks[0].clone());
        assert!(matches!(places(&config), Err(VmError::TooManyDevices { asked: 101, .. })));
    }
}
