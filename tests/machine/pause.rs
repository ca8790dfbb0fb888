//! A vCPU that is paused in the middle of its accesses loses none and repeats none.
//!
//! The guest counts: it writes the count to a port and to memory-mapped registers, reads counts
//! back that the device counts up by itself, and passes bytes through `rep insb` and `rep outsb`.
//! Device and guest each check that what they get is the next count.

use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use alcove::arch::x86_64::regs;
use alcove::config::AssistMode;
use alcove::memory::{GuestRam, layout};
use alcove::vcpu::recover::{self, Recovery};
use alcove::vcpu::run_loop::Vcpu;
use alcove::vcpu::{VcpuHandle, VcpuState, prepare_signal};
use devices::bus::{Bus, BusDevice};
use devices::thread_start::nothing_first;
use iced_x86::code_asm::*;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{Bytes, GuestAddress};

const RAM_BYTES: u64 = 16 << 20;
const CODE: u64 = 0x20_0000;
const BUFFER: u32 = 0x30_0000;

const COUNT_PORT: u32 = 0x1000;
const STRING_PORT: u32 = 0x1010;
const WRONG_PORT: u32 = 0x1020;
const COUNT_ADDRESS: u32 = 0xd000_0000;
const ADD_ADDRESS: u32 = 0xd000_1000;
const ADDRESS_BYTES: u64 = 4;

/// Bytes that one `rep insb` or `rep outsb` moves.
const STRING_BYTES: u32 = 40;

/// What the devices have seen, and the first thing that was not as it should be.
#[derive(Default)]
struct Seen {
    port_writes: u32,
    port_reads: u32,
    mmio_writes: u32,
    mmio_reads: u32,
    /// The register that the guest adds 1 to by one instruction.
    sum: u32,
    bytes_in: u8,
    bytes_out: u8,
    accesses: u64,
    wrong: Option<String>,
}

impl Seen {
    fn check(&mut self, what: &str, got: u32, expected: u32) {
        if got != expected && self.wrong.is_none() {
            self.wrong = Some(format!("{what}: {got} in place of {expected}"));
        }
    }
}

/// One of the devices, all of which share what they have seen.
struct Device {
    base: u64,
    seen: Arc<Mutex<Seen>>,
}

impl Device {
    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }
}

fn number(data: &[u8]) -> u32 {
    let mut bytes = [0; 4];
    bytes[..data.len()].copy_from_slice(data);
    u32::from_le_bytes(bytes)
}

/// The count before it goes up.
fn next(count: &mut u32) -> u32 {
    let now = *count;
    *count = count.wrapping_add(1);
    now
}

impl BusDevice for Device {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        let mut seen = self.lock();
        seen.accesses += 1;
        let value = match self.base as u32 {
            COUNT_PORT => next(&mut seen.port_reads),
            COUNT_ADDRESS => next(&mut seen.mmio_reads),
            ADD_ADDRESS => seen.sum,
            _ => {
                seen.bytes_in = seen.bytes_in.wrapping_add(1);
                seen.bytes_in.into()
            }
        };
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let mut seen = self.lock();
        seen.accesses += 1;
        let value = number(data);
        match self.base as u32 {
            COUNT_PORT => {
                let expected = next(&mut seen.port_writes);
                seen.check("port write", value, expected);
            }
            COUNT_ADDRESS => {
                let expected = next(&mut seen.mmio_writes);
                seen.check("MMIO write", value, expected);
            }
            ADD_ADDRESS => {
                let expected = seen.sum.wrapping_add(1);
                seen.check("MMIO addition", value, expected);
                seen.sum = value;
            }
            STRING_PORT => {
                seen.bytes_out = seen.bytes_out.wrapping_add(1);
                let expected = seen.bytes_out.into();
                seen.check("string output", value, expected);
            }
            _ => seen.check("read in the guest", value, 0),
        }
    }
}

/// The guest, in 32-bit protected mode: never returns. It writes what it got to [`WRONG_PORT`]
/// when that was not what it should get.
fn program() -> Vec<u8> {
    fn assemble(a: &mut CodeAssembler) -> Result<(), IcedError> {
        let (mut again, mut wrong) = (a.create_label(), a.create_label());
        a.cld()?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut again)?;
        a.mov(edx, COUNT_PORT)?;
        a.mov(eax, ebx)?;
        a.out(dx, eax)?;
        a.in_(eax, dx)?;
        a.cmp(eax, ebx)?;
        a.jne(wrong)?;
        a.mov(esi, COUNT_ADDRESS)?;
        a.mov(dword_ptr(esi), ebx)?;
        a.mov(eax, dword_ptr(esi))?;
        a.cmp(eax, ebx)?;
        a.jne(wrong)?;
        a.mov(esi, ADD_ADDRESS)?;
        a.add(dword_ptr(esi), 1)?;
        a.mov(edx, STRING_PORT)?;
        a.mov(edi, BUFFER)?;
        a.mov(ecx, STRING_BYTES)?;
        a.rep().insb()?;
        a.mov(esi, BUFFER)?;
        a.mov(ecx, STRING_BYTES)?;
        a.rep().outsb()?;
        a.inc(ebx)?;
        a.jmp(again)?;
        a.set_label(&mut wrong)?;
        a.or(eax, 0x4000_0000)?;
        a.mov(edx, WRONG_PORT)?;
        a.out(dx, eax)?;
        a.jmp(wrong)
    }
    let mut a = CodeAssembler::new(32).unwrap();
    assemble(&mut a).unwrap();
    a.assemble(CODE).unwrap()
}

fn buses(seen: &Arc<Mutex<Seen>>) -> (Arc<Bus>, Arc<Bus>) {
    let device = |base| Arc::new(Device { base, seen: Arc::clone(seen) });
    let (mut ports, mut mmio) = (Bus::new(), Bus::new());
    for port in [COUNT_PORT, STRING_PORT, WRONG_PORT].map(u64::from) {
        ports.insert(port, ADDRESS_BYTES, device(port)).unwrap();
    }
    for address in [COUNT_ADDRESS, ADD_ADDRESS].map(u64::from) {
        mmio.insert(address, ADDRESS_BYTES, device(address)).unwrap();
    }
    (Arc::new(ports), Arc::new(mmio))
}

/// A VM over `ram` with interrupt controllers.
#[expect(unsafe_code, reason = "hands guest RAM to KVM")]
fn create_vm(kvm: &Kvm, ram: &GuestRam, assisted: bool) -> VmFd {
    let vm = kvm.create_vm().unwrap();
    vm.set_tss_address(layout::KVM_TSS as usize).unwrap();
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).unwrap();
    vm.create_irq_chip().unwrap();
    // SAFETY: the caller keeps the RAM until after the vCPU has stopped.
    unsafe { ram.give_to(&vm) }.unwrap();
    if assisted {
        recover::prepare(&vm).unwrap();
    }
    vm
}

/// A vCPU about to run the program.
fn spawn(
    kvm: &Kvm,
    vm: &VmFd,
    ram: &GuestRam,
    assisted: bool,
    seen: &Arc<Mutex<Seen>>,
) -> VcpuHandle {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    let fd = vm.create_vcpu(0).unwrap();
    fd.set_cpuid2(&supported).unwrap();
    let mut sregs = fd.get_sregs().unwrap();
    let registers = regs::pvh(&mut sregs, CODE, 0);
    fd.set_sregs(&sregs).unwrap();
    fd.set_regs(&registers).unwrap();
    let recovery = assisted.then(|| Recovery::new(ram.clone(), &supported));
    let (ports, mmio) = buses(seen);
    let crashed = Arc::clone(seen);
    let on_crash = Box::new(move |report| {
        crashed.lock().unwrap().wrong = Some(format!("the guest crashed: {report}"));
    });
    VcpuHandle::spawn(Vcpu::new(0, fd, ports, mmio, recovery, on_crash), nothing_first()()).unwrap()
}

pub fn pausing_loses_no_access_and_repeats_none() {
    const ROUNDS: u64 = 1000;
    let kvm = Kvm::new().unwrap();
    let ram = GuestRam::new(RAM_BYTES, 36).unwrap();
    ram.memory().write_slice(&program(), GuestAddress(CODE)).unwrap();
    let assisted = recover::is_needed(AssistMode::Auto);
    prepare_signal().unwrap();
    let vm = create_vm(&kvm, &ram, assisted);
    let seen = Arc::new(Mutex::new(Seen::default()));
    let accesses = || {
        let seen = seen.lock().unwrap();
        assert_eq!(seen.wrong, None);
        seen.accesses
    };
    let vcpu = spawn(&kvm, &vm, &ram, assisted, &seen);

    for round in 0..ROUNDS {
        // Every so often right after the start, else at a point that moves through the loop.
        let target = accesses() + round % 97;
        let patience = Instant::now() + Duration::from_secs(20);
        vcpu.resume();
        while accesses() < target {
            assert!(Instant::now() < patience, "the guest stands still in round {round}");
            thread::yield_now();
        }
        vcpu.pause();
        vcpu.wait_paused();

        let then = accesses();
        let state = vcpu.state();
        assert!([VcpuState::Paused, VcpuState::Created].contains(&state), "{state:?}");
        if round % 100 == 0 {
            thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(accesses(), then, "a paused vCPU went on");
    }
    drop(vcpu);

    let seen = seen.lock().unwrap();
    assert_eq!(seen.wrong, None);
    assert!(seen.port_writes > 100, "{} loops", seen.port_writes);
}
