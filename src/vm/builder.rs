//! The order in which a machine is put together, and nothing else.
#![expect(unsafe_code, reason = "hands guest RAM to KVM")]

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use devices::bus::Bus;
use devices::virtio::blk::DiskConfig;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::confine::Intent;
use super::control::{self, Control};
use super::open::Opened;
use super::{Machine, Mailbox, Outcome, VmError, legacy, virtio};
use crate::arch::x86_64::cpuid::{self, Shortcomings};
use crate::arch::x86_64::regs::LongModeTables;
use crate::arch::x86_64::topology::Topology;
use crate::arch::x86_64::{msrs, regs};
use crate::boot::acpi::MmioDevice;
use crate::boot::cmdline::{self, CmdlineParts};
use crate::boot::params::{self, BootEntry, BootSources};
use crate::boot::{acpi, initrd, kernel, long_mode};
use crate::config::{DEFAULT_SHUTDOWN_TIMEOUT, VmConfig};
use crate::event_loop::EventLoop;
use crate::host;
use crate::irq;
use crate::memory::GuestRam;
use crate::memory::layout;
use crate::sandbox::seccomp::Kind;
use crate::vcpu::recover::{self, Recovery};
use crate::vcpu::run_loop::Vcpu;
use crate::vcpu::{self, VcpuHandle};

/// Builds the machine that `config` describes.
pub fn build(config: &VmConfig) -> Result<Machine, VmError> {
    config.validate()?;
    let topology = config.cpus.topology()?;
    let intent = Intent::new(config)?;
    // A terminal that is changed from now on is put back before they end alcove.
    control::block_signals().map_err(host("block signals"))?;
    let Opened { kvm, kernel, initrd, disks, nets, mut serial } = Opened::open(config)?;
    check_cpus(&kvm, config.cpus.count, &topology)?;
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|source| VmError::Kvm { call: "tell what CPUID it supports", source })?;
    let assisted = recover::is_needed(config.assist);
    let mut confinement = intent.enter(&mut serial)?;
    let ram = map_memory(config, cpuid::physical_address_bits(&supported))?;
    let places = virtio::places(config)?;
    let entry = load_guest(config, (kernel, initrd), &topology, &places, &ram, assisted)?;

    let mailbox = Arc::new(Mailbox::new().map_err(host("create an eventfd"))?);
    let timeout = config.timeout.map(|span| span.0);
    let signals = confinement.take_passed_signals();
    let mut control =
        Control::new(Arc::clone(&mailbox), timeout, signals).map_err(host("route signals"))?;
    vcpu::prepare_signal().map_err(host("install a signal handler"))?;

    let vm = Arc::new(create_vm(&kvm, &ram, config, assisted)?);
    let mut event_loop = EventLoop::new().map_err(VmError::EventLoop)?;
    let legacy = legacy::attach(config, serial, &vm, &mailbox, &mut event_loop)?;
    let shutdown_timeout = config.shutdown_timeout.unwrap_or(DEFAULT_SHUTDOWN_TIMEOUT);
    control.press_on_terminate(legacy.events, shutdown_timeout.0);
    event_loop.add(Arc::new(Mutex::new(control)));
    let mut mmio = Bus::new();
    let (disk_start, net_start) =
        (confinement.thread_start(Kind::Disk), confinement.thread_start(Kind::Net));
    let opened = virtio::OpenDevices { disks, disk_start, nets, net_start };
    let virtio = virtio::attach(config, opened, &places, &vm, &ram, &mut mmio, &mut event_loop)?;
    let (ports, mmio) = (Arc::new(legacy.ports), Arc::new(mmio));

    let shortcomings = Shortcomings { no_hypercalls: assisted, translated: host::is_translated() };
    let start_vcpu = confinement.thread_start(Kind::Vcpu);
    let mut vcpus = Vec::new();
    for index in 0..config.cpus.count {
        let apic_id = topology.apic_id(index);
        let fd = vm
            .create_vcpu(apic_id.into())
            .map_err(|source| VmError::Kvm { call: "create a vCPU", source })?;
        let cpuid = cpuid::for_cpu(&supported, index, &topology, shortcomings);
        let prepared = match index {
            0 => prepare_boot_vcpu(&fd, &cpuid, &entry),
            _ => prepare_vcpu(&fd, &cpuid),
        };
        prepared.map_err(|source| VmError::Kvm { call: "set up a vCPU", source })?;
        let recovery = assisted.then(|| Recovery::new(ram.clone(), &supported));
        let end = Arc::clone(&mailbox);
        let on_crash = Box::new(move |report| end.end(Outcome::Crashed(Box::new(report))));
        let (ports, mmio) = (Arc::clone(&ports), Arc::clone(&mmio));
        let vcpu = Vcpu::new(index, fd, ports, mmio, recovery, on_crash);
        vcpus.push(VcpuHandle::spawn(vcpu, start_vcpu()).map_err(host("start a vCPU thread"))?);
    }
    let (console, console_path) = (legacy.console, legacy.console_path);
    Ok(Machine {
        vcpus,
        virtio,
        event_loop,
        console,
        console_path,
        confinement,
        mailbox,
        _ram: ram,
        _vm: vm,
    })
}

fn map_memory(config: &VmConfig, address_bits: u8) -> Result<GuestRam, VmError> {
    let size = config.memory.size;
    GuestRam::new(size.0, address_bits)
        .map_err(|source| VmError::Memory { asked: size.to_string(), source })
}

/// Puts kernel, initrd, command line, ACPI and boot tables into guest RAM.
fn load_guest(
    config: &VmConfig,
    (kernel, initrd): ((PathBuf, File), Option<(PathBuf, File)>),
    topology: &Topology,
    places: &[MmioDevice],
    ram: &GuestRam,
    assisted: bool,
) -> Result<BootEntry, VmError> {
    let (path, file) = kernel;
    let load = if assisted { kernel::load_unpacked } else { kernel::load };
    let kernel = load(ram, &file).map_err(|source| VmError::Kernel { path, source })?;
    let initrd = match initrd {
        Some((path, file)) => {
            let loaded = initrd::load(ram, &file, &kernel);
            Some(loaded.map_err(|source| VmError::Initrd { path, source })?)
        }
        None => None,
    };
    let parts = CmdlineParts {
        devices: &root_parameter(config),
        append: config.append.as_deref(),
        replacement: config.cmdline.as_deref(),
    };
    let cmdline = cmdline::build(&parts, kernel.cmdline_limit_bytes())
        .map_err(|source| VmError::Cmdline { flag: config.cmdline_flag(), source })?;
    let platform = legacy::platform(config.cpus.count, topology, places);
    let acpi_rsdp = Some(acpi::write(ram, &platform).map_err(VmError::Acpi)?);
    let sources = BootSources { kernel: &kernel, cmdline: &cmdline, initrd, acpi_rsdp };
    params::write(ram, &sources).map_err(VmError::Params)
}

/// Tells the kernel which disk is its root, if one is.
fn root_parameter(config: &VmConfig) -> Vec<String> {
    let root = config.disks.iter().enumerate().find(|(_, disk)| disk.root);
    let parameter = |(index, disk): (usize, &DiskConfig)| {
        let mode = if disk.readonly { "ro" } else { "rw" };
        format!("root=/dev/{} {mode}", virtio::disk_name(index))
    };
    root.map(parameter).into_iter().collect()
}

/// Creates the VM with its memory, interrupt controllers and timer.
fn create_vm(
    kvm: &Kvm,
    ram: &GuestRam,
    config: &VmConfig,
    assisted: bool,
) -> Result<VmFd, VmError> {
    let failed = |call| move |source| VmError::Kvm { call, source };
    let vm = kvm.create_vm().map_err(failed("create a virtual machine"))?;
    vm.set_tss_address(layout::KVM_TSS as usize).map_err(failed("place its TSS"))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(failed("place its identity map"))?;
    vm.create_irq_chip().map_err(failed("create interrupt controllers"))?;
    irq::mask_8259s(&vm).map_err(failed("mask interrupts"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(failed("create a timer"))?;
    // SAFETY: the machine keeps its RAM until after the last vCPU has stopped.
    unsafe { ram.give_to(&vm) }
        .map_err(|source| VmError::MemorySlot { asked: config.memory.size.to_string(), source })?;
    if assisted {
        recover::prepare(&vm).map_err(failed("report what it cannot emulate"))?;
    }
    Ok(vm)
}

fn check_cpus(kvm: &Kvm, asked: u32, topology: &Topology) -> Result<(), VmError> {
    let most = kvm.get_max_vcpus();
    if asked as usize > most {
        return Err(VmError::TooManyCpus { asked, most });
    }
    let (highest, limit) = (topology.apic_id(asked - 1), kvm.get_max_vcpu_id());
    if highest as usize >= limit {
        return Err(VmError::ApicIds { asked, highest, limit });
    }
    Ok(())
}

/// Sets up a vCPU that waits for the guest to start it (INIT, then SIPI), which also resets its
/// registers and its local APIC.
fn prepare_vcpu(fd: &VcpuFd, cpuid: &CpuId) -> Result<(), kvm_ioctls::Error> {
    fd.set_cpuid2(cpuid)?;
    fd.set_msrs(&msrs::boot()).map(drop)
}

/// Sets up the vCPU that enters the kernel at `entry`.
fn prepare_boot_vcpu(
    fd: &VcpuFd,
    cpuid: &CpuId,
    entry: &BootEntry,
) -> Result<(), kvm_ioctls::Error> {
    prepare_vcpu(fd, cpuid)?;
    fd.set_fpu(&regs::fpu())?;
    let mut lapic = fd.get_lapic()?;
    regs::wire_lapic(&mut lapic);
    fd.set_lapic(&lapic)?;
    let mut sregs = fd.get_sregs()?;
    let regs = match *entry {
        BootEntry::Pvh { rip, start_info } => regs::pvh(&mut sregs, rip, start_info),
        BootEntry::Linux64 { rip, zero_page } => {
            let tables = LongModeTables {
                gdt_base: layout::BOOT_GDT,
                gdt_limit: long_mode::BOOT_GDT_LIMIT,
                cr3: layout::BOOT_PML4,
            };
            regs::linux64(&mut sregs, rip, zero_page, tables)
        }
    };
    fd.set_sregs(&sregs)?;
    fd.set_regs(&regs)
}

fn host(call: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Host { call, source }
}
