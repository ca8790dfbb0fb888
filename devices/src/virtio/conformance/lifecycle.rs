//! Status, features, set-up of queues, resets (virtio 1.2 §2.1, §2.2, §2.6, §3.1, §4.2.2).

use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL,
    VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_STATUS,
    VIRTIO_MMIO_VERSION,
};

use super::{Bench, Cut, EVENT_IDX, INDIRECT_DESC, RING_RESET, SIZE, Subject, VERSION_1};
use crate::bus::BusDevice;
use crate::virtio::queue::QueueSetup;
use crate::virtio::testing::{DriverQueue, HIGH_RAM, HOLE, LOW_RAM_BYTES};
use crate::virtio::transport::core::{
    ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FAILED, FEATURES_OK,
};
use crate::virtio::transport::mmio::MMIO_BYTES;

/// QueueReset, virtio 1.2 §4.2.2.
const QUEUE_RESET: u32 = 0xc0;
/// All steps of the initialization.
const RUNNING: u8 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
/// Long enough for a device to do what it must not.
const A_WHILE: Duration = Duration::from_millis(20);

pub(crate) fn a_device_introduces_itself(make: fn() -> Subject) {
    let bench = Bench::idle(make);
    let driver = &bench.driver;

    assert_eq!(driver.read(VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(driver.read(VIRTIO_MMIO_VERSION), 2);
    assert_ne!(driver.read(VIRTIO_MMIO_DEVICE_ID), 0);
    assert_eq!(driver.status(), 0);
    let expected = VERSION_1 | EVENT_IDX | INDIRECT_DESC | RING_RESET;
    assert_eq!(driver.offered() & expected, expected);
    assert_eq!(driver.max_size(u16::MAX), 0, "there is no such queue");
}

pub(crate) fn a_driver_that_keeps_to_the_steps_gets_its_requests_done(make: fn() -> Subject) {
    let everything = Bench::idle(make).driver.offered();
    for features in [0, EVENT_IDX, INDIRECT_DESC, EVENT_IDX | INDIRECT_DESC, everything] {
        let mut bench = Bench::running(make, features);
        for _ in 0..3 {
            bench.check_alive();
        }
        assert!(bench.driver.line.wait_past(0, Duration::from_secs(5)) > 0);
        assert_eq!(bench.driver.status(), RUNNING);
    }
}

pub(crate) fn features_that_were_not_offered_are_refused(make: fn() -> Subject) {
    let mut bench = Bench::idle(make);
    let offered = bench.driver.offered();
    for bit in (0..u64::BITS).filter(|bit| offered >> bit & 1 == 0) {
        assert!(!bench.driver.negotiate(VERSION_1 | 1 << bit), "bit {bit} was accepted");
        assert_eq!(bench.driver.add_status(DRIVER_OK), ACKNOWLEDGE | DRIVER);
        bench.driver.reset();
    }
    // Past the first 64.
    bench.driver.add_status(ACKNOWLEDGE);
    bench.driver.add_status(DRIVER);
    bench.driver.take_features(VERSION_1);
    bench.driver.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 2);
    bench.driver.write(VIRTIO_MMIO_DRIVER_FEATURES, 1);
    assert_eq!(bench.driver.add_status(FEATURES_OK), ACKNOWLEDGE | DRIVER);

    bench.driver.reset();
    bench.bring_up(0);
    bench.check_alive();
}

pub(crate) fn a_driver_without_version_1_is_refused(make: fn() -> Subject) {
    let bench = Bench::idle(make);

    assert!(!bench.driver.negotiate(EVENT_IDX));
    assert!(!bench.driver.negotiate(0));
    assert!(bench.driver.negotiate(VERSION_1), "the driver may think again");
}

pub(crate) fn features_are_fixed_from_features_ok_on(make: fn() -> Subject) {
    let bench = Bench::idle(make);
    assert!(bench.driver.negotiate(VERSION_1));

    bench.driver.take_features(u64::MAX);

    assert_eq!(bench.driver.add_status(DRIVER_OK), RUNNING);
}

pub(crate) fn steps_out_of_order_are_not_taken(make: fn() -> Subject) {
    let mut bench = Bench::idle(make);
    let driver = &mut bench.driver;
    for bits in [DRIVER, FEATURES_OK, DRIVER_OK, DRIVER | DRIVER_OK, DEVICE_NEEDS_RESET] {
        assert_eq!(driver.add_status(bits), 0);
    }
    assert_eq!(driver.add_status(ACKNOWLEDGE | FEATURES_OK | DRIVER_OK), ACKNOWLEDGE);
    assert_eq!(driver.add_status(DRIVER | DRIVER_OK), ACKNOWLEDGE | DRIVER);
    // Bits cannot be taken back one by one.
    driver.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE.into());
    assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER);
    driver.reset();
    assert_eq!(driver.status(), 0);
}

pub(crate) fn a_failed_driver_must_reset(make: fn() -> Subject) {
    let mut bench = Bench::idle(make);
    bench.driver.add_status(ACKNOWLEDGE);
    bench.driver.add_status(FAILED);
    assert_eq!(bench.driver.add_status(DRIVER), ACKNOWLEDGE | FAILED);

    bench.driver.reset();
    bench.bring_up(0);
    bench.check_alive();
}

pub(crate) fn queue_sizes_that_cannot_be_are_refused(make: fn() -> Subject) {
    let mut bench = Bench::idle(make);
    let index = bench.request.queue;
    let max = bench.driver.max_size(index);
    assert!(bench.driver.negotiate(VERSION_1));
    let place = bench.driver.place_queue(max);
    for size in [0, 3, max - 1, max.wrapping_mul(2), max + 1, u16::MAX] {
        bench.driver.write_setup(index, QueueSetup { size, ..place });
        assert!(!bench.driver.is_ready(index), "a queue of {size} entries");
    }
    for size in [1, max] {
        bench.driver.write_setup(index, QueueSetup { size, ..place });
        assert!(bench.driver.is_ready(index), "a queue of {size} entries");
        bench.driver.write(VIRTIO_MMIO_QUEUE_READY, 0);
        assert!(!bench.driver.is_ready(index), "it may be taken back before DRIVER_OK");
    }
}

pub(crate) fn queues_outside_memory_or_alignment_are_refused(make: fn() -> Subject) {
    let mut bench = Bench::idle(make);
    let index = bench.request.queue;
    assert!(bench.driver.negotiate(VERSION_1));
    let good = bench.driver.place_queue(SIZE);
    let high = HIGH_RAM + LOW_RAM_BYTES;
    let addresses = [0, HOLE - 16, HOLE, high - 16, high, u64::MAX - 15, 1 << 63];
    let mut bad = Vec::new();
    for address in addresses {
        bad.push(QueueSetup { desc_table: address, ..good });
        bad.push(QueueSetup { avail_ring: address, ..good });
        bad.push(QueueSetup { used_ring: address, ..good });
    }
    bad.push(QueueSetup { desc_table: good.desc_table + 8, ..good });
    bad.push(QueueSetup { avail_ring: good.avail_ring + 1, ..good });
    bad.push(QueueSetup { used_ring: good.used_ring + 2, ..good });
    for setup in bad {
        bench.driver.write_setup(index, setup);
        assert!(!bench.driver.is_ready(index), "{setup:x?}");
    }
    bench.driver.write_setup(index, good);
    assert!(bench.driver.is_ready(index));
}

pub(crate) fn queue_registers_are_frozen_while_the_driver_runs(make: fn() -> Subject) {
    let mut bench = Bench::running(make, 0);
    let index = bench.request.queue;
    bench.check_alive();

    let elsewhere = bench.driver.place_queue(1);
    bench.driver.write_setup(index, elsewhere);

    assert!(bench.driver.is_ready(index));
    bench.check_alive();
}

pub(crate) fn a_queue_that_is_not_ready_is_left_alone(make: fn() -> Subject) {
    let mut bench = Bench::running(make, 0);
    let index = bench.request.queue;
    bench.check_alive();
    bench.driver.write(VIRTIO_MMIO_QUEUE_SEL, index.into());
    bench.driver.write(VIRTIO_MMIO_QUEUE_READY, 0);
    assert!(!bench.driver.is_ready(index));
    let before = bench.driver.snapshot();

    let queue = *bench.queue();
    bench.driver.kick(&queue);
    bench.driver.write_setup(index, queue.setup);
    thread::sleep(A_WHILE);

    assert!(bench.driver.snapshot() == before, "memory changed");
    assert!(!bench.driver.is_ready(index), "not before a reset");
    bench.driver.reset();
    bench.bring_up(0);
    bench.check_alive();
}

pub(crate) fn a_reset_with_requests_in_flight_ends_all_access_to_memory(make: fn() -> Subject) {
    for _ in 0..20 {
        let mut bench = Bench::running(make, EVENT_IDX);
        let buffers = bench.buffers(Cut::Whole);
        let each = buffers.len() as u16;
        for count in 0..SIZE / each {
            bench.chain(count * each, &buffers);
            bench.send(count * each);
        }
        bench.driver.reset();
        let after_reset = bench.driver.snapshot();
        assert_eq!(bench.driver.status(), 0);
        let edges = bench.driver.line.count();
        thread::sleep(Duration::from_millis(2));
        assert!(bench.driver.snapshot() == after_reset, "memory changed after a reset");
        assert_eq!(bench.driver.line.count(), edges);

        bench.bring_up(0);
        bench.check_alive();
    }
}

pub(crate) fn a_queue_is_reset_alone(make: fn() -> Subject) {
    let mut bench = Bench::running(make, RING_RESET);
    bench.check_alive();
    let index = bench.request.queue;

    bench.driver.write(VIRTIO_MMIO_QUEUE_SEL, index.into());
    bench.driver.write(QUEUE_RESET, 1);
    assert_eq!(bench.driver.read(QUEUE_RESET), 0, "the reset is over");
    assert!(!bench.driver.is_ready(index));
    let after_reset = bench.driver.snapshot();
    let old = *bench.queue();
    bench.driver.kick(&old);
    thread::sleep(Duration::from_millis(2));
    assert!(bench.driver.snapshot() == after_reset);

    let setup = bench.driver.place_queue(2);
    bench.driver.write_setup(index, setup);
    assert!(bench.driver.is_ready(index));
    *bench.queue() = DriverQueue { index, setup, next_avail: 0, next_used: 0 };
    bench.check_alive();
    assert_eq!(bench.driver.status(), RUNNING);
}

pub(crate) fn a_queue_is_not_reset_without_the_feature(make: fn() -> Subject) {
    let mut bench = Bench::running(make, 0);
    let index = bench.request.queue;

    bench.driver.write(VIRTIO_MMIO_QUEUE_SEL, index.into());
    bench.driver.write(QUEUE_RESET, 1);

    assert!(bench.driver.is_ready(index));
    bench.check_alive();
}

pub(crate) fn a_paused_device_does_nothing(make: fn() -> Subject) {
    let mut bench = Bench::running(make, 0);
    bench.check_alive();
    bench.driver.transport.pause();
    let buffers = bench.buffers(Cut::Whole);
    bench.chain(0, &buffers);
    bench.send(0);
    let before = bench.driver.snapshot();
    thread::sleep(A_WHILE);
    assert!(bench.driver.snapshot() == before, "a paused device touches memory");

    bench.driver.transport.resume();
    assert_eq!(bench.wait(1), [(0, bench.request.written)]);

    // Also when it is reset and started meanwhile.
    bench.driver.transport.pause();
    bench.driver.reset();
    bench.bring_up(0);
    let buffers = bench.buffers(Cut::Whole);
    bench.chain(0, &buffers);
    bench.send(0);
    thread::sleep(A_WHILE);
    let queue = *bench.queue();
    assert_eq!(bench.driver.used_index(&queue), 0);
    bench.driver.transport.resume();
    assert_eq!(bench.wait(1), [(0, bench.request.written)]);
}

pub(crate) fn any_register_access_is_survived(make: fn() -> Subject) {
    let offset = prop_oneof![
        (0..0x40u64).prop_map(|register| register * 4),
        0..MMIO_BYTES,
        0x100..0x140u64,
    ];
    let width = prop_oneof![Just(4usize), 0..=8usize];
    let value = prop_oneof![any::<u64>(), 0..16u64, Just(0x1000), Just(0x2000)];
    let accesses = prop::collection::vec((any::<bool>(), offset, width, value), 0..200);
    let mut runner = TestRunner::new(Config { cases: 24, ..Config::default() });
    let result = runner.run(&accesses, |accesses| {
        let mut bench = Bench::idle(make);
        bench.driver.negotiate(VERSION_1);
        for (is_write, offset, width, value) in accesses {
            let mut data = value.to_le_bytes();
            if is_write {
                bench.driver.transport.write(offset, &data[..width]);
            } else {
                bench.driver.transport.read(offset, &mut data[..width]);
            }
        }
        bench.driver.reset();
        bench.bring_up(0);
        bench.check_alive();
        Ok(())
    });
    result.unwrap();
}
