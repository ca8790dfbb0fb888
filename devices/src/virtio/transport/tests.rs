use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_INT_CONFIG,
    VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS,
};

use super::core::{ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FEATURES_OK};
use super::mmio::QUEUE_NOTIFY_OFFSET;
use crate::bus::BusDevice;
use crate::virtio::conformance::{EVENT_IDX, VERSION_1};
use crate::virtio::testing::{FakeDriver, Held, HeldDevice};

const RUNNING: u8 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

fn bench() -> (FakeDriver, Arc<Mutex<Held>>) {
    let (device, held) = HeldDevice::new();
    (FakeDriver::new(Box::new(device), Vec::new()), held)
}

#[test]
fn a_device_gets_what_was_negotiated_and_set_up() {
    let (mut driver, held) = bench();
    assert!(driver.negotiate(VERSION_1 | EVENT_IDX | 0b10));
    let queue = driver.set_up_queue(1, 4);

    driver.add_status(DRIVER_OK);

    let held = held.lock().unwrap();
    assert_eq!(held.features, VERSION_1 | EVENT_IDX | 0b10);
    let got: Vec<_> = held.queues.iter().map(|queue| (queue.index(), queue.size())).collect();
    assert_eq!(got, [(queue.index, 4)], "the driver left out queue 0");
    assert_eq!(held.calls, ["activate"]);
}

#[test]
fn a_device_that_cannot_start_needs_a_reset() {
    let (mut driver, held) = bench();
    held.lock().unwrap().is_out_of_order = true;
    assert!(driver.negotiate(VERSION_1));

    assert_eq!(driver.add_status(DRIVER_OK), RUNNING | DEVICE_NEEDS_RESET);

    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(driver.line.count(), 1);
    held.lock().unwrap().is_out_of_order = false;
    driver.reset();
    driver.bring_up(VERSION_1, 4);
}

#[test]
fn a_device_may_refuse_features_that_do_not_go_together() {
    let (mut driver, held) = bench();
    held.lock().unwrap().unloved_features = 0b100;

    assert!(!driver.negotiate(VERSION_1 | 0b101));

    driver.reset();
    assert!(driver.negotiate(VERSION_1 | 0b001));
}

#[test]
fn configuration_is_read_and_written_at_every_width_and_offset() {
    let (driver, held) = bench();
    let config: [u8; 12] = std::array::from_fn(|index| index as u8 + 1);
    held.lock().unwrap().config = config;
    let at = |offset: usize| u64::from(VIRTIO_MMIO_CONFIG) + offset as u64;
    for width in 1..=8 {
        for offset in 0..16 {
            let mut data = vec![0xee; width];
            driver.transport.read(at(offset), &mut data);
            let expected = (offset..).take(width).map(|at| config.get(at).copied().unwrap_or(0));
            assert_eq!(data, expected.collect::<Vec<u8>>());
        }
    }
    driver.transport.write(at(0), &[0xff; 12]);
    assert_eq!(held.lock().unwrap().config, config, "not before FEATURES_OK");
    assert!(driver.negotiate(VERSION_1));
    driver.transport.write(at(10), &[9; 4]);
    assert_eq!(held.lock().unwrap().config[9..], [10, 9, 9]);
    driver.transport.read(u64::MAX, &mut [0; 8]);
    driver.transport.write(u64::MAX, &[0; 8]);
}

#[test]
fn the_generation_tells_of_changes() {
    let (mut driver, held) = bench();
    driver.bring_up(VERSION_1, 4);
    assert_eq!(driver.read(VIRTIO_MMIO_CONFIG_GENERATION), 0);

    held.lock().unwrap().generation = 1;
    let signals = held.lock().unwrap().signals.clone().unwrap();
    signals.config_changed();

    assert_eq!(driver.read(VIRTIO_MMIO_CONFIG_GENERATION), 1);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
}

#[test]
fn every_cause_is_an_edge_also_before_the_last_one_is_acknowledged() {
    let (mut driver, held) = bench();
    driver.bring_up(VERSION_1, 4);
    let signals = held.lock().unwrap().signals.clone().unwrap();

    signals.queue_used(0);
    signals.queue_used(1);
    signals.config_changed();

    assert_eq!(driver.line.count(), 3);
    let both = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), both);
    driver.write(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    driver.reset();
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn acknowledgements_that_kvm_takes_count_too() {
    let (mut driver, held) = bench();
    driver.bring_up(VERSION_1, 4);
    let signals = held.lock().unwrap().signals.clone().unwrap();
    let kvm = driver.transport.notifiers().last().unwrap().event.clone();
    let status = |driver: &FakeDriver| driver.read(VIRTIO_MMIO_INTERRUPT_STATUS);

    signals.queue_used(0);
    assert_eq!((status(&driver), status(&driver)), (VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INT_VRING));
    kvm.write(1).unwrap();
    assert_eq!((status(&driver), status(&driver)), (0, 0));

    signals.queue_used(0);
    assert_eq!(status(&driver), VIRTIO_MMIO_INT_VRING);
    signals.queue_used(0);
    kvm.write(1).unwrap();
    assert_eq!(status(&driver), VIRTIO_MMIO_INT_VRING, "the second one was not seen before");

    kvm.write(1).unwrap();
    signals.config_changed();
    assert_eq!(status(&driver), VIRTIO_MMIO_INT_CONFIG);
    signals.queue_used(0);
    driver.write(VIRTIO_MMIO_INTERRUPT_ACK, u32::MAX);
    assert_eq!(status(&driver), VIRTIO_MMIO_INT_VRING, "nor was this one");
    driver.write(VIRTIO_MMIO_INTERRUPT_ACK, u32::MAX);
    assert_eq!(status(&driver), 0);
    kvm.write(1).unwrap();
    driver.reset();
    driver.bring_up(VERSION_1, 4);
    signals.queue_used(0);
    assert_eq!((status(&driver), status(&driver)), (VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INT_VRING));
}

#[test]
fn a_reset_is_asked_for_once() {
    let (mut driver, held) = bench();
    driver.bring_up(VERSION_1, 4);
    let signals = held.lock().unwrap().signals.clone().unwrap();

    signals.request_reset();
    signals.request_reset();

    assert_eq!(driver.line.count(), 1);
    assert_eq!(driver.status(), RUNNING | DEVICE_NEEDS_RESET);
}

#[test]
fn queues_are_kicked_by_register_and_listed_for_kvm() {
    let (mut driver, held) = bench();
    let notifiers = driver.transport.notifiers().to_vec();
    let listed: Vec<_> = notifiers.iter().map(|n| (n.offset, n.datamatch)).collect();
    let acknowledge = (VIRTIO_MMIO_INTERRUPT_ACK.into(), VIRTIO_MMIO_INT_VRING);
    assert_eq!(listed, [(QUEUE_NOTIFY_OFFSET, 0), (QUEUE_NOTIFY_OFFSET, 1), acknowledge]);
    let queue = driver.set_up_queue(1, 4);
    driver.kick(&queue);
    notifiers[1].event.read().expect_err("the driver is not ready");

    driver.bring_up(VERSION_1, 4);
    driver.kick(&queue);
    driver.transport.write(QUEUE_NOTIFY_OFFSET, &2u32.to_le_bytes());
    driver.transport.write(QUEUE_NOTIFY_OFFSET, &u32::MAX.to_le_bytes());

    assert_eq!(notifiers[1].event.read().unwrap(), 1);
    notifiers[0].event.read().unwrap_err();
    assert!(Arc::ptr_eq(held.lock().unwrap().queues[1].kick(), &notifiers[1].event));
}

#[test]
fn control_registers_take_aligned_words_only() {
    let (driver, _held) = bench();
    for width in [1, 2, 3, 5, 8] {
        let mut data = vec![0; width];
        driver.transport.read(0, &mut data);
        assert_eq!(data, vec![0xff; width]);
    }
    for offset in [1, 2, 3] {
        let mut data = [0; 4];
        driver.transport.read(offset, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
    driver.transport.write(VIRTIO_MMIO_STATUS.into(), &[ACKNOWLEDGE]);
    assert_eq!(driver.status(), 0);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_NUM), u32::MAX, "a write-only register");
    assert_eq!(driver.read(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX, "there is no shared memory");
}

#[test]
fn only_the_low_byte_of_the_status_counts() {
    let (mut driver, held) = bench();
    driver.bring_up(VERSION_1, 4);
    driver.write(VIRTIO_MMIO_QUEUE_SEL, 1);

    driver.write(VIRTIO_MMIO_STATUS, 0x100);

    assert_eq!(driver.status(), 0);
    assert_eq!(held.lock().unwrap().calls, ["activate", "reset"]);
    assert!(held.lock().unwrap().queues.is_empty());
}

#[test]
fn pause_and_resume_reach_the_device() {
    let (driver, held) = bench();

    driver.transport.pause();
    driver.transport.resume();

    assert_eq!(held.lock().unwrap().calls, ["pause", "resume"]);
}
