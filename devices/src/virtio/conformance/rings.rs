//! The available and the used ring, and interrupts (virtio 1.2 §2.7.6 to §2.7.10).

use std::time::Duration;

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INTERRUPT_ACK,
    VIRTIO_MMIO_INTERRUPT_STATUS,
};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;

use super::{Bench, Cut, EVENT_IDX, SIZE, Subject};
use crate::virtio::testing::wait_until;
use crate::virtio::transport::core::DEVICE_NEEDS_RESET;

/// What the driver may say in the available ring's flags.
const NO_INTERRUPT: u16 = VRING_AVAIL_F_NO_INTERRUPT as u16;

pub(crate) fn the_used_ring_wraps(make: fn() -> Subject) {
    for features in [0, EVENT_IDX] {
        let mut bench = Bench::running(make, features);
        let buffers = bench.buffers(Cut::Whole);
        let each = buffers.len() as u16;
        let heads: Vec<u16> = (0..SIZE / each).map(|count| count * each).collect();
        for head in &heads {
            bench.chain(*head, &buffers);
        }
        let written = bench.request.written;
        let rounds = (usize::from(u16::MAX) + 2 * usize::from(SIZE)) / heads.len();
        for _ in 0..rounds {
            let mut queue = *bench.queue();
            for head in &heads {
                bench.driver.offer(&mut queue, *head);
            }
            bench.driver.kick(&queue);
            let mut used = bench.driver.wait_used(&mut queue, heads.len() as u16);
            *bench.queue() = queue;
            used.sort_unstable();
            let expected: Vec<_> = heads.iter().map(|head| (u32::from(*head), written)).collect();
            assert_eq!(used, expected);
        }
    }
}

/// Has the device serve one more request; whether it interrupts for it within a while. What it
/// interrupted for before is acknowledged.
fn interrupts(bench: &mut Bench, patience: Duration) -> bool {
    bench.driver.write(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
    let before = bench.driver.line.count();
    bench.check_alive();
    bench.driver.line.wait_past(before, patience) > before
}

/// Until the device surely has signalled what it would signal.
const SOON: Duration = Duration::from_secs(5);
/// Until the device most likely has.
const QUIET: Duration = Duration::from_millis(20);

pub(crate) fn a_driver_that_wants_no_interrupts_gets_none(make: fn() -> Subject) {
    let mut bench = Bench::running(make, 0);
    let queue = *bench.queue();
    assert!(interrupts(&mut bench, SOON));
    assert_eq!(bench.driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
    bench.driver.write(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
    assert_eq!(bench.driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);

    bench.driver.set_avail_flags(&queue, NO_INTERRUPT);
    assert!(!interrupts(&mut bench, QUIET));
    assert_eq!(bench.driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);

    bench.driver.set_avail_flags(&queue, 0);
    assert!(interrupts(&mut bench, SOON));
}

pub(crate) fn the_event_index_decides_on_interrupts(make: fn() -> Subject) {
    let mut bench = Bench::running(make, EVENT_IDX);
    let queue = *bench.queue();
    // The flags are without meaning now.
    bench.driver.set_avail_flags(&queue, NO_INTERRUPT);
    // Interrupt when entry 2 is used, that is with the third.
    bench.driver.set_used_event(&queue, 2);
    assert!(!interrupts(&mut bench, QUIET));
    assert!(!interrupts(&mut bench, QUIET));
    assert!(interrupts(&mut bench, SOON));
    assert!(!interrupts(&mut bench, QUIET), "the event is past");
    bench.driver.set_used_event(&queue, 4);
    assert!(interrupts(&mut bench, SOON));
}

/// The device asks for a reset, does nothing any more, and works after it.
fn needs_reset(bench: &mut Bench) {
    let driver = &bench.driver;
    wait_until("the device needs a reset", || driver.status() & DEVICE_NEEDS_RESET != 0);
    wait_until("the device says so", || {
        driver.read(VIRTIO_MMIO_INTERRUPT_STATUS) & VIRTIO_MMIO_INT_CONFIG != 0
    });
    let queue = *bench.queue();
    let used = bench.driver.used_index(&queue);
    bench.driver.kick(&queue);
    std::thread::sleep(QUIET);
    assert_eq!(bench.driver.used_index(&queue), used);

    bench.driver.reset();
    assert_eq!(bench.driver.status(), 0);
    assert_eq!(bench.driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    bench.bring_up(0);
    bench.check_alive();
}

pub(crate) fn an_available_index_that_jumps_needs_a_reset(make: fn() -> Subject) {
    for jump in [SIZE + 1, u16::MAX] {
        let mut bench = Bench::running(make, EVENT_IDX);
        let mut queue = *bench.queue();
        queue.next_avail = jump.wrapping_sub(1);
        bench.driver.offer(&mut queue, 0);
        bench.driver.kick(&queue);
        needs_reset(&mut bench);
    }
}

pub(crate) fn a_head_outside_the_table_needs_a_reset(make: fn() -> Subject) {
    for head in [SIZE, u16::MAX] {
        let mut bench = Bench::running(make, 0);
        bench.check_alive();
        bench.send(head);
        needs_reset(&mut bench);
    }
}
