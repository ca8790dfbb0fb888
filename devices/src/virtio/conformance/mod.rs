//! What every virtio device must do, tested through its registers and rings.
//!
//! A device's tests name a function that makes a [`Subject`] in [`conformance_tests!`]; each
//! behaviour below becomes a test of its own.

mod chains;
mod lifecycle;
mod rings;

pub(crate) use chains::*;
pub(crate) use lifecycle::*;
pub(crate) use rings::*;

use std::any::Any;

use virtio_bindings::virtio_config::{VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_INDIRECT,
};
use vm_memory::{Bytes, GuestAddress};

use super::device::VirtioDevice;
use super::testing::{Desc, DriverQueue, FakeDriver, NEXT, WRITE};
use crate::testing::Subscriber;

pub(crate) const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
pub(crate) const RING_RESET: u64 = 1 << VIRTIO_F_RING_RESET;
pub(crate) const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
pub(crate) const INDIRECT_DESC: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// The buffer is a table of descriptors.
pub(crate) const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
/// Entries of the queues in tests, where the device allows as many.
pub(crate) const SIZE: u16 = 16;

/// A device to be tested, new on each call of the test's maker.
pub(crate) struct Subject {
    pub(crate) device: Box<dyn VirtioDevice>,
    /// What serves it on event loops.
    pub(crate) subscribers: Vec<Subscriber>,
    /// A request that it can carry out any number of times.
    pub(crate) request: Request,
    /// What must outlive the test.
    pub(crate) _keep: Box<dyn Any>,
}

/// A request that always succeeds.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// The queue that takes it.
    pub(crate) queue: u16,
    /// What the device reads.
    pub(crate) readable: Vec<u8>,
    /// How many bytes the device may write.
    pub(crate) writable: u32,
    /// How many it does write.
    pub(crate) written: u32,
}

/// How a request is cut into descriptors.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cut {
    /// One buffer a direction.
    Whole,
    /// Buffers of at most so many bytes.
    Pieces(usize),
}

/// A driver with its device and queues up, and a request to try.
pub(crate) struct Bench {
    pub(crate) driver: FakeDriver,
    pub(crate) request: Request,
    pub(crate) queues: Vec<DriverQueue>,
    _keep: Box<dyn Any>,
}

impl Bench {
    /// The subject after reset.
    pub(crate) fn idle(make: fn() -> Subject) -> Self {
        let subject = make();
        let driver = FakeDriver::new(subject.device, subject.subscribers);
        Self { driver, request: subject.request, queues: Vec::new(), _keep: subject._keep }
    }

    /// The subject with `features`, VERSION_1 among them, and queues of [`SIZE`] entries.
    pub(crate) fn running(make: fn() -> Subject, features: u64) -> Self {
        let mut bench = Self::idle(make);
        bench.bring_up(features);
        bench
    }

    pub(crate) fn bring_up(&mut self, features: u64) {
        self.queues = self.driver.bring_up(features | VERSION_1, SIZE);
    }

    /// The queue that takes the request.
    pub(crate) fn queue(&mut self) -> &mut DriverQueue {
        self.queues.iter_mut().find(|queue| queue.index == self.request.queue).unwrap()
    }

    /// The buffers of the request, as descriptors that are not chained yet.
    pub(crate) fn buffers(&mut self, cut: Cut) -> Vec<Desc> {
        let Request { readable, writable, .. } = self.request.clone();
        let most = match cut {
            Cut::Whole => usize::MAX,
            Cut::Pieces(bytes) => bytes,
        };
        let mut buffers = Vec::new();
        for (len, flags) in [(readable.len(), 0), (writable as usize, WRITE)] {
            let start = self.driver.allocate(len as u64);
            if flags == 0 {
                self.driver.memory.write_slice(&readable, GuestAddress(start)).unwrap();
            }
            for offset in (0..len).step_by(most.min(len.max(1))) {
                let len = most.min(len - offset) as u32;
                buffers.push(Desc { addr: start + offset as u64, len, flags, next: 0 });
            }
        }
        buffers
    }

    /// Writes `buffers` as a chain from descriptor `first` on.
    pub(crate) fn chain(&mut self, first: u16, buffers: &[Desc]) {
        let queue = *self.queue();
        for (index, desc) in (first..).zip(linked(first, buffers)) {
            self.driver.describe(&queue, index, desc);
        }
    }

    /// Makes the chain at `head` available and kicks.
    pub(crate) fn send(&mut self, head: u16) {
        let mut queue = *self.queue();
        self.driver.offer(&mut queue, head);
        *self.queue() = queue;
        self.driver.kick(&queue);
    }

    /// Waits for `count` chains to be used.
    pub(crate) fn wait(&mut self, count: u16) -> Vec<(u32, u32)> {
        let mut queue = *self.queue();
        let used = self.driver.wait_used(&mut queue, count);
        *self.queue() = queue;
        used
    }

    /// Sends the request and checks that the device carries it out.
    pub(crate) fn check_alive(&mut self) {
        let buffers = self.buffers(Cut::Whole);
        self.chain(0, &buffers);
        self.send(0);
        let written = self.request.written;
        assert_eq!(self.wait(1), [(0, written)]);
    }
}

/// `buffers` as a chain in a table, where the first one is entry `first`.
pub(crate) fn linked(first: u16, buffers: &[Desc]) -> impl Iterator<Item = Desc> {
    let last = buffers.len() - 1;
    buffers.iter().enumerate().map(move |(index, desc)| {
        let flags = if index == last { desc.flags } else { desc.flags | NEXT };
        Desc { flags, next: first + 1 + index as u16, ..*desc }
    })
}

/// Makes a test of each behaviour, for the device that `$make` makes: a `fn() -> Subject`.
macro_rules! conformance_tests {
    ($make:path) => {
        $crate::virtio::conformance::conformance_tests! { $make:
            a_device_introduces_itself
            a_driver_that_keeps_to_the_steps_gets_its_requests_done
            features_that_were_not_offered_are_refused
            a_driver_without_version_1_is_refused
            features_are_fixed_from_features_ok_on
            steps_out_of_order_are_not_taken
            a_failed_driver_must_reset
            queue_sizes_that_cannot_be_are_refused
            queues_outside_memory_or_alignment_are_refused
            queue_registers_are_frozen_while_the_driver_runs
            a_queue_that_is_not_ready_is_left_alone
            a_reset_with_requests_in_flight_ends_all_access_to_memory
            a_queue_is_reset_alone
            a_queue_is_not_reset_without_the_feature
            a_paused_device_does_nothing
            any_register_access_is_survived
            the_used_ring_wraps
            a_driver_that_wants_no_interrupts_gets_none
            the_event_index_decides_on_interrupts
            an_available_index_that_jumps_needs_a_reset
            a_head_outside_the_table_needs_a_reset
            requests_may_be_cut_anywhere
            requests_may_lie_in_an_indirect_table
            requests_may_cross_adjoining_ranges_of_memory
            bad_chains_lose_their_own_request_only
            any_rings_are_survived
        }
    };
    ($make:path: $($behaviour:ident)*) => {$(
        #[test]
        fn $behaviour() {
            $crate::virtio::conformance::$behaviour($make);
        }
    )*};
}
pub(crate) use conformance_tests;

#[cfg(test)]
mod tests;
