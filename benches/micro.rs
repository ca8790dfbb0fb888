//! What a request, an access and an instruction cost in alcove alone.

use std::hint::black_box;
use std::sync::Arc;

use alcove::fuzzing::Repeated;
use criterion::{Criterion, criterion_group, criterion_main};
use devices::bus::{Bus, BusDevice};
use devices::virtio::chain::Chain;
use devices::virtio::testing::{Desc, FakeDriver, HeldDevice};

const VERSION_1: u64 = 1 << 32;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// A request of a disk's form, offered by a driver, taken out, checked, and given back.
fn queue(criterion: &mut Criterion) {
    const SIZE: u16 = 256;
    const BUFFERS: u64 = 0x2_0000;
    let (device, held) = HeldDevice::new();
    let mut driver = FakeDriver::new(Box::new(device), Vec::new());
    let mut there = driver.bring_up(VERSION_1, SIZE)[0];
    let mut here = held.lock().unwrap().queues.remove(0);
    for (index, len, flags) in [(0, 16, NEXT), (1, 4096, NEXT | WRITE), (2, 1, WRITE)] {
        let addr = BUFFERS + u64::from(index) * 4096;
        driver.describe(&there, index, Desc { addr, len, flags, next: index + 1 });
    }
    let mut chain = Chain::new();

    criterion.bench_function("queue: pop and push a chain of three", |bencher| {
        bencher.iter(|| {
            driver.offer(&mut there, 0);
            assert!(here.pop(&mut chain));
            here.push(black_box(&mut chain), 1);
        });
    });
}

struct Register;

impl BusDevice for Register {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(1);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

/// As many devices as a machine has at the most.
fn bus(criterion: &mut Criterion) {
    const DEVICES: u64 = 24;
    const DEVICE_BYTES: u64 = 0x1000;
    let mut bus = Bus::new();
    for index in 0..DEVICES {
        bus.insert(index * DEVICE_BYTES, DEVICE_BYTES, Arc::new(Register)).unwrap();
    }
    let mut data = [0; 4];

    criterion.bench_function("bus: read a register of one of 24 devices", |bencher| {
        bencher.iter(|| assert!(bus.read(black_box(17 * DEVICE_BYTES + 8), &mut data)));
    });
}

/// Instructions that a software KVM often refuses.
fn assist(criterion: &mut Criterion) {
    for (name, code) in [
        ("assist: STAC", &[0x0f, 0x01, 0xcb][..]),
        ("assist: LOCK CMPXCHG16B [RDI]", &[0xf0, 0x48, 0x0f, 0xc7, 0x0f]),
        ("assist: FXSAVE [RDI]", &[0x0f, 0xae, 0x07]),
    ] {
        let mut repeated = Repeated::new(code);
        criterion.bench_function(name, |bencher| bencher.iter(|| repeated.complete()));
    }
}

criterion_group!(micro, queue, bus, assist);
criterion_main!(micro);
