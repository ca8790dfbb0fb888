//! What a driver and a network see of each other.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use virtio_bindings::virtio_config::VIRTIO_F_RING_RESET;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_SEL;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_MRG_RXBUF,
};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::conformance::{EVENT_IDX, INDIRECT_DESC, VERSION_1};
use crate::virtio::testing::{Desc, DriverQueue, FakeDriver, NEXT, WRITE, wait_until};

const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
/// Long enough for a device to do what it must not.
const A_WHILE: Duration = Duration::from_millis(30);

/// A driver of a fake network.
pub(super) struct Guest {
    pub driver: FakeDriver,
    pub queues: Vec<DriverQueue>,
    pub metrics: Metrics,
    pub seen: Vec<Arc<Mutex<Seen>>>,
    /// The next descriptor of each queue.
    next: Vec<u16>,
}

impl Guest {
    pub fn new(pairs: usize, features: u64, change: impl FnOnce(&mut NetConfig)) -> Self {
        let (network, seen) = fake_network(pairs, None);
        Self::on(network, seen, features, change)
    }

    pub fn on(
        network: Network,
        seen: Vec<Arc<Mutex<Seen>>>,
        features: u64,
        change: impl FnOnce(&mut NetConfig),
    ) -> Self {
        let mut config = config();
        change(&mut config);
        let device = device_with(network, &config);
        let metrics = device.metrics();
        let mut driver = FakeDriver::new(Box::new(device), Vec::new());
        let queues = driver.bring_up(features | VERSION_1, 64);
        let next = vec![0; queues.len()];
        Self { driver, queues, metrics, seen, next }
    }

    /// Another driver with `features` takes the device over.
    fn restart(&mut self, features: u64) {
        self.driver.reset();
        self.queues = self.driver.bring_up(features | VERSION_1, 64);
        self.next.fill(0);
    }

    /// Makes a chain of `pieces`, each with its bytes to read or its room to write, available in
    /// queue `index`; returns the pieces' addresses.
    pub fn offer(&mut self, index: u16, pieces: &[(&[u8], u32)]) -> Vec<u64> {
        let mut queue = self.queues[usize::from(index)];
        let first = self.next[usize::from(index)];
        let mut addresses = Vec::new();
        for (at, (data, room)) in pieces.iter().enumerate() {
            let len = data.len() as u32 + room;
            let addr = self.driver.allocate(len.into());
            self.driver.memory.write_slice(data, GuestAddress(addr)).unwrap();
            let more = if at + 1 < pieces.len() { NEXT } else { 0 };
            let flags = more | if data.is_empty() { WRITE } else { 0 };
            let number = |at| (first + at as u16) % queue.setup.size;
            let desc = Desc { addr, len, flags, next: number(at + 1) };
            self.driver.describe(&queue, number(at), desc);
            addresses.push(addr);
        }
        let head = first % queue.setup.size;
        self.driver.offer(&mut queue, head);
        self.next[usize::from(index)] = first + pieces.len() as u16;
        self.queues[usize::from(index)] = queue;
        addresses
    }

    pub fn kick(&self, index: u16) {
        self.driver.kick(&self.queues[usize::from(index)]);
    }

    /// Waits for `count` used chains of queue `index`; their lengths.
    pub fn wait(&mut self, index: u16, count: u16) -> Vec<u32> {
        let queue = &mut self.queues[usize::from(index)];
        self.driver.wait_used(queue, count).into_iter().map(|(_, len)| len).collect()
    }

    /// Sends `frame` with `header`.
    pub fn send(&mut self, header: [u8; HEADER_BYTES], frame: &[u8]) {
        self.offer(TRANSMIT, &[(&header, 0), (frame, 0)]);
        self.kick(TRANSMIT);
    }

    /// Has `frame` come in from the network, with an empty header.
    pub fn deliver(&self, frame: &[u8]) {
        let frame = [&[0; HEADER_BYTES][..], frame].concat();
        self.seen[0].lock().unwrap().waiting.push_back(frame);
        self.wake_port();
    }

    /// Tells the device that the network is ready.
    pub fn wake_port(&self) {
        self.seen[0].lock().unwrap().wake();
    }

    pub fn read(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.driver.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    fn sent(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.seen[0].lock().unwrap().sent)
    }

    /// Sends a command; its acknowledgement.
    fn command(&mut self, queue: u16, kind: [u8; 2], data: &[u8]) -> u8 {
        let addresses = self.offer(queue, &[(&kind, 0), (data, 0), (&[], 1)]);
        self.kick(queue);
        assert_eq!(self.wait(queue, 1), [1]);
        self.read(addresses[2], 1)[0]
    }
}

fn frame(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * 7 % 251) as u8).collect()
}

#[test]
fn a_frame_goes_out_as_it_lies_in_memory() {
    let mut guest = Guest::new(1, INDIRECT_DESC | EVENT_IDX, |_| {});
    for bytes in [14, 60, 1514, 9000] {
        let frame = frame(bytes);
        guest.send([0; HEADER_BYTES], &frame);
        assert_eq!(guest.wait(TRANSMIT, 1), [0]);
        assert_eq!(guest.sent(), [[&[0; HEADER_BYTES][..], &frame].concat()]);
    }
    assert_eq!(guest.metrics.sent.packets.get(), 4);
    assert_eq!(guest.metrics.sent.bytes.get(), 14 + 60 + 1514 + 9000);
}

#[test]
fn frames_that_make_no_sense_are_dropped_and_the_next_ones_pass() {
    let mut guest = Guest::new(1, 1 << VIRTIO_NET_F_CSUM, |_| {});
    let csum_past_the_end = [1, 0, 0, 0, 0, 0, 99, 0, 0, 0, 0, 0];
    let segments_not_negotiated = [1, 1, 54, 0, 168, 5, 34, 0, 16, 0, 0, 0];
    guest.send(csum_past_the_end, &frame(100));
    guest.send(segments_not_negotiated, &frame(100));
    guest.send([0; HEADER_BYTES], &frame(13));
    guest.offer(TRANSMIT, &[(&[0; 5], 0)]);
    guest.kick(TRANSMIT);
    assert_eq!(guest.wait(TRANSMIT, 4), [0; 4]);
    assert_eq!(guest.sent(), Vec::<Vec<u8>>::new());
    assert_eq!(guest.metrics.sent.malformed.get(), 4);

    let good = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
    guest.send(good, &frame(100));
    guest.wait(TRANSMIT, 1);
    assert_eq!(guest.sent().len(), 1);
}

#[test]
fn a_busy_network_is_waited_for() {
    let mut guest = Guest::new(1, 0, |_| {});
    guest.seen[0].lock().unwrap().room = 2;
    for _ in 0..5 {
        guest.send([0; HEADER_BYTES], &frame(60));
    }
    guest.wait(TRANSMIT, 2);
    std::thread::sleep(A_WHILE);
    assert_eq!(guest.sent().len(), 2);

    guest.seen[0].lock().unwrap().room = usize::MAX;
    guest.wake_port();

    guest.wait(TRANSMIT, 3);
    assert_eq!(guest.sent().len(), 3);
    assert!(guest.metrics.sent.blocked.get() > 0);
    assert_eq!(guest.metrics.sent.dropped(), 0);
}

#[test]
fn a_frame_may_take_several_buffers() {
    let mut guest = Guest::new(1, MERGEABLE, |_| {});
    let buffers: Vec<u64> = (0..4).map(|_| guest.offer(RECEIVE, &[(&[], 100)])[0]).collect();
    guest.kick(RECEIVE);
    guest.deliver(&frame(250));

    assert_eq!(guest.wait(RECEIVE, 3), [100, 100, 62]);
    let bytes = buffers[..3].iter().flat_map(|at| guest.read(*at, 100)).collect::<Vec<u8>>();
    assert_eq!(bytes[10..12], [3, 0], "num_buffers");
    assert_eq!(bytes[HEADER_BYTES..262], frame(250));
    guest.deliver(&frame(60));
    assert_eq!(guest.wait(RECEIVE, 1), [72]);
    assert_eq!(guest.read(buffers[3], 12)[10..], [1, 0]);
}

#[test]
fn a_frame_that_finds_too_little_room_waits_and_is_whole() {
    let mut guest = Guest::new(1, MERGEABLE | EVENT_IDX, |_| {});
    let mut buffers = vec![guest.offer(RECEIVE, &[(&[], 1000)])[0]];
    guest.kick(RECEIVE);
    guest.deliver(&frame(40_000));
    guest.deliver(&frame(60));
    wait_until("the frame is read", || guest.seen[0].lock().unwrap().waiting.len() == 1);
    std::thread::sleep(A_WHILE);
    assert_eq!(guest.driver.used_index(&guest.queues[0]), 0);

    for _ in 0..45 {
        buffers.push(guest.offer(RECEIVE, &[(&[], 1000)])[0]);
    }
    guest.kick(RECEIVE);

    let used = guest.wait(RECEIVE, 42);
    assert_eq!(used[40..], [12, 72]);
    let bytes = buffers[..41].iter().flat_map(|at| guest.read(*at, 1000)).collect::<Vec<u8>>();
    assert_eq!(bytes[HEADER_BYTES..][..40_000], frame(40_000));
    assert_eq!(guest.metrics.received.dropped(), 0);
}

#[test]
fn without_merging_a_frame_that_is_too_large_is_dropped() {
    let mut guest = Guest::new(1, 0, |_| {});
    let buffer = guest.offer(RECEIVE, &[(&[], 12), (&[], 100)]);
    guest.kick(RECEIVE);
    guest.deliver(&frame(101));
    guest.deliver(&frame(100));

    assert_eq!(guest.wait(RECEIVE, 1), [112]);
    assert_eq!(guest.read(buffer[1], 100), frame(100));
    assert_eq!(guest.metrics.received.too_large.get(), 1);
}

#[test]
fn a_guest_without_buffers_leaves_frames_to_the_network() {
    let mut guest = Guest::new(1, EVENT_IDX, |_| {});
    for _ in 0..100 {
        guest.deliver(&frame(60));
    }
    std::thread::sleep(A_WHILE);
    assert_eq!(guest.seen[0].lock().unwrap().waiting.len(), 100);

    for _ in 0..3 {
        guest.offer(RECEIVE, &[(&[], 100)]);
        guest.kick(RECEIVE);
        assert_eq!(guest.wait(RECEIVE, 1), [72]);
    }
    assert_eq!(guest.metrics.received.packets.get(), 3);
    assert_eq!(guest.metrics.received.dropped(), 0);
}

#[test]
fn rates_hold_both_ways() {
    // 3 at once, then 50 a second.
    let mut guest = Guest::new(1, 0, |config| config.packets = Some("50:3".parse().unwrap()));
    let start = Instant::now();
    for _ in 0..8 {
        guest.send([0; HEADER_BYTES], &frame(60));
        guest.offer(RECEIVE, &[(&[], 100)]);
        guest.deliver(&frame(60));
    }
    guest.kick(RECEIVE);
    guest.wait(TRANSMIT, 8);
    guest.wait(RECEIVE, 8);
    assert!(start.elapsed() >= Duration::from_millis(80), "{:?}", start.elapsed());
    assert!(guest.metrics.sent.throttled.get() > 0);
    assert!(guest.metrics.received.throttled.get() > 0);
}

#[test]
fn a_frame_that_no_buffers_could_hold_is_dropped() {
    // All that the driver can offer is less than the frame.
    let one: &[(&[u8], u32)] = &[(&[], 100)];
    let two: &[(&[u8], u32)] = &[(&[], 50), (&[], 50)];
    for (features, chain) in [(0, one), (0, two), (INDIRECT_DESC, one), (INDIRECT_DESC, two)] {
        let mut guest = Guest::new(1, MERGEABLE | features, |_| {});
        for _ in 0..64 / chain.len() {
            guest.offer(RECEIVE, chain);
        }
        guest.kick(RECEIVE);
        guest.deliver(&frame(9000));
        guest.deliver(&frame(60));

        assert_eq!(guest.wait(RECEIVE, 1), [72]);
        assert_eq!(guest.metrics.received.too_large.get(), 1);
    }
}

#[test]
fn pairs_out_of_use_neither_spin_nor_keep_their_queue() {
    let mut guest = Guest::new(2, CONTROL | MQ | EVENT_IDX, |_| {});
    let attached = |guest: &Guest| guest.seen[1].lock().unwrap().attached.last().copied();
    assert_eq!(guest.command(4, PAIRS_SET, &2u16.to_le_bytes()), 0);
    wait_until("the second queue is attached", || attached(&guest) == Some(true));
    // It finds no room, and is detached; room that comes then is not its concern.
    guest.offer(2, &[(&[], 100)]);
    guest.kick(2);
    assert_eq!(guest.command(4, PAIRS_SET, &1u16.to_le_bytes()), 0);
    wait_until("the second queue is detached", || attached(&guest) == Some(false));
    guest.offer(2, &[(&[], 100)]);
    guest.kick(2);
    std::thread::sleep(A_WHILE);
    let before = cpu_time();
    std::thread::sleep(4 * A_WHILE);
    assert!(cpu_time() - before < A_WHILE, "a thread spins");

    assert_eq!(guest.command(4, PAIRS_SET, &2u16.to_le_bytes()), 0);
    wait_until("the second queue is attached", || attached(&guest) == Some(true));
    guest.driver.reset();
    wait_until("a reset detaches it", || attached(&guest) == Some(false));
}

#[test]
fn a_pair_without_queues_is_detached_by_a_reset_too() {
    /// QueueReset, virtio 1.2 §4.2.2.
    const QUEUE_RESET: u32 = 0xc0;
    let mut guest = Guest::new(2, CONTROL | MQ | RING_RESET, |_| {});
    let attached = |guest: &Guest| guest.seen[1].lock().unwrap().attached.last().copied();
    assert_eq!(guest.command(4, PAIRS_SET, &2u16.to_le_bytes()), 0);
    wait_until("the second queue is attached", || attached(&guest) == Some(true));
    for queue in [2, 3] {
        guest.driver.write(VIRTIO_MMIO_QUEUE_SEL, queue);
        guest.driver.write(QUEUE_RESET, 1);
    }

    guest.driver.reset();

    wait_until("a reset detaches it", || attached(&guest) == Some(false));
}

/// What this process has spent so far.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[test]
fn commands_are_carried_out_at_a_rate() {
    let mut guest = Guest::new(2, CONTROL | MQ, |_| {});
    let start = Instant::now();
    for count in 0..72u16 {
        assert_eq!(guest.command(4, PAIRS_SET, &(count % 2 + 1).to_le_bytes()), 0);
    }
    assert!(start.elapsed() > Duration::from_millis(300), "{:?}", start.elapsed());
}

/// Each start may ask the host's kernel for other offloads, and so does each reset.
#[test]
fn drivers_that_start_change_offloads_at_a_rate() {
    let checksum = 1 << VIRTIO_NET_F_GUEST_CSUM;
    let mut guest = Guest::new(1, checksum, |_| {});
    let start = Instant::now();
    for _ in 0..200 {
        guest.restart(checksum);
        // Time enough to be asked for.
        std::thread::sleep(Duration::from_micros(200));
    }
    let asked = guest.seen[0].lock().unwrap().offloads.len();
    let most = 64 + 16 * (start.elapsed().as_secs() as usize + 1);
    assert!((3..=most).contains(&asked), "asked {asked} times");

    // No frame comes as the driver before wanted it.
    guest.restart(0);
    guest.offer(RECEIVE, &[(&[], 100)]);
    guest.kick(RECEIVE);
    guest.deliver(&frame(60));
    assert_eq!(guest.wait(RECEIVE, 1), [72]);
    assert_eq!(guest.seen[0].lock().unwrap().offloads.last(), Some(&Offloads::NONE));
}

const CONTROL: u64 = 1 << VIRTIO_NET_F_CTRL_VQ;
const RING_RESET: u64 = 1 << VIRTIO_F_RING_RESET;
const MQ: u64 = 1 << VIRTIO_NET_F_MQ;
const PAIRS_SET: [u8; 2] = [4, 0];
const OFFLOADS_SET: [u8; 2] = [5, 0];

#[test]
fn the_driver_chooses_how_many_pairs_it_uses() {
    let mut guest = Guest::new(3, CONTROL | MQ, |_| {});
    let control = 6;
    let attached = |guest: &Guest, index: usize| {
        guest.seen[index].lock().unwrap().attached.last().copied().unwrap_or(index == 0)
    };
    assert_eq!(guest.command(control, PAIRS_SET, &2u16.to_le_bytes()), 0);
    wait_until("the second queue is attached", || attached(&guest, 1));
    assert!(!attached(&guest, 2));
    assert_eq!(guest.command(control, PAIRS_SET, &1u16.to_le_bytes()), 0);
    wait_until("the second queue is detached", || !attached(&guest, 1));
    for pairs in [0u16, 4, u16::MAX] {
        assert_eq!(guest.command(control, PAIRS_SET, &pairs.to_le_bytes()), 1, "{pairs}");
    }
    assert_eq!(guest.command(control, PAIRS_SET, &[1]), 1);
    assert_eq!(guest.command(control, [4, 1], &1u16.to_le_bytes()), 1);
    assert_eq!(guest.command(control, [9, 0], &[0; 4]), 1);
}

#[test]
fn the_driver_switches_offloads_that_it_negotiated() {
    let negotiated = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
    let switch = 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
    // Without more pairs the control queue is the third, also on a device that has more.
    for pairs in [1, 2] {
        let mut guest = Guest::new(pairs, CONTROL | switch | negotiated, |_| {});
        let last = |guest: &Guest| guest.seen[0].lock().unwrap().offloads.last().copied();
        let both = Offloads { checksum: true, tso4: true, ..Offloads::NONE };
        wait_until("the network knows", || last(&guest) == Some(both));

        assert_eq!(guest.command(2, OFFLOADS_SET, &0u64.to_le_bytes()), 0);
        wait_until("the network knows", || last(&guest) == Some(Offloads::NONE));
        assert_eq!(guest.command(2, OFFLOADS_SET, &(1u64 << 8).to_le_bytes()), 1);
        assert_eq!(guest.command(2, PAIRS_SET, &1u16.to_le_bytes()), 1);
        assert_eq!(guest.command(2, OFFLOADS_SET, &negotiated.to_le_bytes()), 0);
        wait_until("the network knows", || last(&guest) == Some(both));
    }
}

#[test]
fn features_that_lack_what_they_depend_on_are_refused() {
    for features in [
        1 << VIRTIO_NET_F_GUEST_TSO4,
        1 << VIRTIO_NET_F_HOST_TSO4,
        MQ,
        1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    ] {
        let (network, _seen) = fake_network(2, None);
        let driver = FakeDriver::new(Box::new(device(network)), Vec::new());
        assert!(!driver.negotiate(VERSION_1 | features), "{features:#x}");
    }
}

#[test]
fn a_network_without_offloads_offers_none() {
    let (network, _seen) = fake_network(1, None);
    let network = Network { offloads: Offloads::NONE, mtu: None, ..network };
    let offered = device(network).features();
    let plain = [MERGEABLE, 1 << 5, 1 << 16];
    assert_eq!(offered, plain.iter().sum::<u64>());
}

/// The flags and the data of received frames, which the driver did not ask for, are not passed on.
#[test]
fn flags_are_for_drivers_that_take_them() {
    for (features, flags) in [(0, 0), (1 << VIRTIO_NET_F_GUEST_CSUM, 2)] {
        let mut guest = Guest::new(1, features, |_| {});
        let buffer = guest.offer(RECEIVE, &[(&[], 100)])[0];
        guest.kick(RECEIVE);
        let mut with_header = vec![0; HEADER_BYTES];
        with_header[0] = 2;
        with_header.extend(frame(60));
        guest.seen[0].lock().unwrap().waiting.push_back(with_header);
        guest.wake_port();
        guest.wait(RECEIVE, 1);
        assert_eq!(guest.read(buffer, 12), [flags, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// However the driver cuts its memory, frames arrive whole, in order, and nothing else is
    /// written.
    #[test]
    fn any_buffers_hold_any_frames(
        rooms in prop::collection::vec(12u32..700, 40),
        sizes in prop::collection::vec(14usize..1500, 1..6),
    ) {
        let total: u32 = rooms.iter().sum();
        let needed: usize = sizes.iter().map(|bytes| bytes + HEADER_BYTES).sum();
        // Each frame may leave the rest of its last buffer unused.
        prop_assume!(needed + sizes.len() * 700 <= total as usize);
        let mut guest = Guest::new(1, MERGEABLE | EVENT_IDX, |_| {});
        let buffers: Vec<u64> =
            rooms.iter().map(|room| guest.offer(RECEIVE, &[(&[], *room)])[0]).collect();
        guest.kick(RECEIVE);
        for bytes in &sizes {
            guest.deliver(&frame(*bytes));
        }
        let mut at = 0;
        for bytes in &sizes {
            let mut got = Vec::new();
            while got.len() < bytes + HEADER_BYTES {
                let len = guest.wait(RECEIVE, 1)[0];
                prop_assert!(len <= rooms[at]);
                got.extend(guest.read(buffers[at], len as usize));
                at += 1;
            }
            prop_assert_eq!(&got[HEADER_BYTES..], &frame(*bytes)[..]);
        }
    }
}
