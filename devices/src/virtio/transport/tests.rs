use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_INT_CONFIG,
    VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS,
};

use super::core::{ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FEATURES_OK};
use super::mmio::{MMIO_BYTES, MmioTransport, QUEUE_NOTIFY_OFFSET, RegisterPages};
use crate::bus::BusDevice;
use crate::testing::FakeInterrupt;
use crate::virtio::conformance::{EVENT_IDX, VERSION_1};
use crate::virtio::testing::{FakeDriver, Held, HeldDevice, memory};

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
    driver.add_status(ACKNOWLEDGE);
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
fn a_change_by_the_device_is_shown_and_told() {
    let (mut driver, held) = bench();
    driver.bring_up(VERSION_1, 4);
    let generation = driver.read(VIRTIO_MMIO_CONFIG_GENERATION);
    let signals = held.lock().unwrap().signals.clone().unwrap();

    held.lock().unwrap().config[6..8].copy_from_slice(&[7, 8]);
    assert_eq!(driver.read(VIRTIO_MMIO_CONFIG + 4), 0, "not told yet");
    signals.config_changed(6, &[7, 8]);

    assert_eq!(driver.read(VIRTIO_MMIO_CONFIG + 4).to_le_bytes(), [0, 0, 7, 8]);
    assert_ne!(driver.read(VIRTIO_MMIO_CONFIG_GENERATION), generation);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    signals.config_changed(usize::MAX, &[1; 8]);
    signals.config_changed(MMIO_BYTES as usize - 0x102, &[1; 8]);
}

#[test]
fn a_change_before_the_driver_is_ready_is_shown_at_its_next_step() {
    let (driver, held) = bench();
    let generation = driver.read(VIRTIO_MMIO_CONFIG_GENERATION);
    held.lock().unwrap().config[0] = 5;

    driver.add_status(ACKNOWLEDGE);

    assert_eq!(driver.read(VIRTIO_MMIO_CONFIG), 5);
    let changed = driver.read(VIRTIO_MMIO_CONFIG_GENERATION);
    assert_ne!(changed, generation);
    driver.add_status(DRIVER);
    assert_eq!(driver.read(VIRTIO_MMIO_CONFIG_GENERATION), changed, "nothing changed");
}

/// A device changes a field while its driver writes another: no value is lost, and none comes back.
#[test]
fn device_and_driver_change_the_configuration_side_by_side() {
    const ROUNDS: u16 = 2000;
    let (mut driver, held) = bench();
    driver.bring_up(VERSION_1, 4);
    let signals = held.lock().unwrap().signals.clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=ROUNDS {
                let field = round.to_le_bytes();
                held.lock().unwrap().config[8..10].copy_from_slice(&field);
                signals.config_changed(8, &field);
            }
        });
        let mut seen = 0;
        for round in 1..=u32::from(ROUNDS) {
            driver.write(VIRTIO_MMIO_CONFIG, round);
            assert_eq!(driver.read(VIRTIO_MMIO_CONFIG), round);
            let field = driver.read(VIRTIO_MMIO_CONFIG + 8);
            assert!(field >= seen, "{field} after {seen}");
            seen = field;
        }
    });
    assert_eq!(driver.read(VIRTIO_MMIO_CONFIG + 8), u32::from(ROUNDS));
}

#[test]
fn a_cause_is_an_edge_until_it_is_acknowledged() {
    let (mut driver, held) = bench();
    driver.bring_up(VERSION_1, 4);
    let signals = held.lock().unwrap().signals.clone().unwrap();

    signals.queue_used(0);
    signals.queue_used(1);
    assert_eq!(driver.line.count(), 1);
    signals.config_changed(0, &[1]);
    assert_eq!(driver.line.count(), 2, "another cause is another edge");

    let both = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), both);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), both, "reading has no effect");
    driver.write(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    signals.queue_used(0);
    assert_eq!(driver.line.count(), 3);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), both);
    driver.write(VIRTIO_MMIO_INTERRUPT_ACK, u32::MAX);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    signals.queue_used(0);
    driver.reset();
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

/// A driver that looks at what was done after it has acknowledged misses nothing.
#[test]
fn no_interrupt_is_lost_between_a_cause_and_an_acknowledgement() {
    const REQUESTS: u32 = 20_000;
    let (mut driver, held) = bench();
    driver.bring_up(VERSION_1, 4);
    let signals = held.lock().unwrap().signals.clone().unwrap();
    let done = AtomicU32::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..REQUESTS {
                done.fetch_add(1, Ordering::Release);
                signals.queue_used(0);
            }
        });
        let (mut seen, mut edges) = (0, 0);
        while seen < REQUESTS {
            let before = edges;
            edges = driver.line.wait_past(before, Duration::from_secs(10));
            assert!(edges > before, "{seen} of {REQUESTS} were seen");
            driver.write(VIRTIO_MMIO_INTERRUPT_ACK, driver.read(VIRTIO_MMIO_INTERRUPT_STATUS));
            seen = done.load(Ordering::Acquire);
        }
    });
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
    assert_eq!(listed, [(QUEUE_NOTIFY_OFFSET, 0), (QUEUE_NOTIFY_OFFSET, 1)]);
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
fn control_registers_are_read_anyhow_and_written_by_aligned_words() {
    let (driver, _held) = bench();
    let start = *b"virt\x02\0\0\0\x2a\0\0\0ALCV";
    for width in 0..=8 {
        for offset in 0..8 {
            let mut data = vec![0; width];
            driver.transport.read(offset as u64, &mut data);
            assert_eq!(data, start[offset..offset + width]);
        }
    }
    let mut data = [0; 4];
    driver.transport.read(MMIO_BYTES - 2, &mut data);
    assert_eq!(data, [0, 0, 0xff, 0xff], "nothing after the end");
    driver.transport.write(VIRTIO_MMIO_STATUS.into(), &[ACKNOWLEDGE]);
    driver.transport.write(VIRTIO_MMIO_STATUS.into(), &[ACKNOWLEDGE; 8]);
    driver.transport.write(u64::from(VIRTIO_MMIO_STATUS) - 1, &[ACKNOWLEDGE; 4]);
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

/// What the guest reads where KVM shows it the pages.
#[test]
fn pages_are_shown_side_by_side() {
    let pages = RegisterPages::new(3).unwrap();
    assert_eq!((pages.size_bytes(), pages.host_address() % MMIO_BYTES), (3 * MMIO_BYTES, 0));
    assert_eq!(pages.iter().count(), 3);
    let transports: Vec<_> = pages
        .iter()
        .map(|page| {
            let (device, held) = HeldDevice::new();
            held.lock().unwrap().config[0] = 9;
            let line = Arc::new(FakeInterrupt::default());
            MmioTransport::new(Box::new(device), memory(), line, page)
        })
        .collect();

    transports[1].write(VIRTIO_MMIO_STATUS.into(), &u32::from(ACKNOWLEDGE).to_le_bytes());

    let shown = pages.iter().map(|page| {
        let mut bytes = [0; MMIO_BYTES as usize];
        page.read(0, &mut bytes);
        (bytes[VIRTIO_MMIO_STATUS as usize], bytes[VIRTIO_MMIO_CONFIG as usize])
    });
    assert_eq!(shown.collect::<Vec<_>>(), [(0, 9), (ACKNOWLEDGE, 9), (0, 9)]);
}
