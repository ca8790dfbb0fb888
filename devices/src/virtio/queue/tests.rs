use std::sync::Mutex;

use vm_memory::Bytes;

use super::*;
use crate::virtio::conformance::{EVENT_IDX, VERSION_1};
use crate::virtio::testing::{Desc, DriverQueue, FakeDriver, HOLE, Held, HeldDevice, NEXT, WRITE};

const SIZE: u16 = 8;
/// Where buffers lie.
const BUFFERS: u64 = 0x2_0000;

/// A driver, and a queue that the test serves itself.
struct Bench {
    driver: FakeDriver,
    there: DriverQueue,
    here: Queue,
    _held: Arc<Mutex<Held>>,
}

fn bench(features: u64) -> Bench {
    let (device, held) = HeldDevice::new();
    let mut driver = FakeDriver::new(Box::new(device), Vec::new());
    let there = driver.bring_up(features | VERSION_1, SIZE)[0];
    let here = held.lock().unwrap().queues.remove(0);
    Bench { driver, there, here, _held: held }
}

impl Bench {
    /// A chain of one writable buffer of 16 bytes at `head`, made available.
    fn offer(&mut self, head: u16) {
        let addr = BUFFERS + 16 * u64::from(head);
        self.driver.describe(&self.there, head, Desc { addr, len: 16, flags: WRITE, next: 0 });
        self.driver.offer(&mut self.there, head);
    }

    fn byte(&self, address: u64) -> u8 {
        self.driver.memory.read_obj(GuestAddress(address)).unwrap()
    }
}

#[test]
fn requests_come_in_the_order_they_were_offered() {
    let mut bench = bench(0);
    let mut chain = Chain::new();
    assert!(!bench.here.pop(&mut chain));
    for head in [5, 2, 7] {
        bench.offer(head);
    }
    for head in [5, 2, 7] {
        assert!(bench.here.pop(&mut chain));
        assert_eq!(chain.head(), Some(head));
        assert_eq!(chain.writable_bytes(), 16);
        bench.here.push(&mut chain, head.into());
        assert_eq!(chain.head(), None);
    }
    assert!(!bench.here.pop(&mut chain));
    let used = bench.driver.wait_used(&mut bench.there, 3);
    assert_eq!(used, [(5, 5), (2, 2), (7, 7)]);
}

#[test]
fn several_requests_may_be_out_and_go_back_in_any_order() {
    let mut bench = bench(0);
    let mut chains = [Chain::new(), Chain::new(), Chain::new()];
    for (head, chain) in (0..).zip(&mut chains) {
        bench.offer(head);
        assert!(bench.here.pop(chain));
    }
    assert_eq!(bench.here.in_flight(), 3);
    for chain in chains.iter_mut().rev() {
        bench.here.push(chain, 1);
    }
    assert_eq!(bench.here.in_flight(), 0);
    let used = bench.driver.wait_used(&mut bench.there, 3);
    assert_eq!(used, [(2, 1), (1, 1), (0, 1)]);
}

#[test]
fn a_request_that_was_put_back_comes_again() {
    let mut bench = bench(0);
    let mut chain = Chain::new();
    bench.offer(3);
    bench.offer(4);
    assert!(bench.here.pop(&mut chain));

    bench.here.put_back(&mut chain);

    assert_eq!(bench.here.in_flight(), 0);
    for head in [3, 4] {
        assert!(bench.here.pop(&mut chain));
        assert_eq!(chain.head(), Some(head));
        bench.here.push(&mut chain, 0);
    }
    assert_eq!(bench.driver.wait_used(&mut bench.there, 2), [(3, 0), (4, 0)]);
}

#[test]
fn a_driver_cannot_have_more_in_flight_than_there_are_entries() {
    let mut bench = bench(0);
    let mut chains: Vec<Chain> = (0..SIZE).map(|_| Chain::new()).collect();
    for chain in &mut chains {
        bench.offer(0);
        assert!(bench.here.pop(chain));
    }
    bench.offer(0);

    assert!(!bench.here.pop(&mut Chain::new()));

    assert!(bench.here.is_broken());
    assert!(bench.here.signals.needs_reset());
    // What was in flight still comes back, without effect.
    for chain in &mut chains {
        bench.here.push(chain, 1);
        assert_eq!(chain.head(), None);
    }
    bench.here.signal();
    assert_eq!(bench.driver.used_index(&bench.there), 0);
    assert!(!bench.here.enable_kicks());
}

#[test]
fn a_batch_has_one_interrupt() {
    let mut bench = bench(0);
    let mut chain = Chain::new();
    bench.here.signal();
    assert_eq!(bench.driver.line.count(), 0, "nothing was pushed");
    for head in 0..4 {
        bench.offer(head);
        assert!(bench.here.pop(&mut chain));
        bench.here.push(&mut chain, 0);
    }
    assert_eq!(bench.driver.line.count(), 0);

    bench.here.signal();
    bench.here.signal();

    assert_eq!(bench.driver.line.count(), 1);
}

#[test]
fn kicks_are_turned_off_and_on_by_flag() {
    let mut bench = bench(0);
    let mut chain = Chain::new();
    bench.here.disable_kicks();
    assert_eq!(bench.driver.used_flags(&bench.there), 1);
    bench.offer(0);
    assert!(bench.here.enable_kicks(), "a request came without a kick");
    assert_eq!(bench.driver.used_flags(&bench.there), 0);
    assert!(bench.here.pop(&mut chain));
    assert!(!bench.here.enable_kicks());
}

#[test]
fn kicks_are_asked_for_by_event_index() {
    let mut bench = bench(EVENT_IDX);
    let mut chain = Chain::new();
    for head in 0..3 {
        bench.offer(head);
    }
    bench.here.disable_kicks();
    while bench.here.pop(&mut chain) {
        bench.here.push(&mut chain, 0);
    }
    assert_eq!(bench.driver.avail_event(&bench.there), 0, "not before it is asked for");

    assert!(!bench.here.enable_kicks());

    assert_eq!(bench.driver.avail_event(&bench.there), 3);
    assert_eq!(bench.driver.used_flags(&bench.there), 0);
}

#[test]
fn the_error_status_goes_to_the_last_byte_of_a_bad_chain_that_ends() {
    const IO_ERROR: u8 = 9;
    let good = Desc { addr: BUFFERS, len: 16, flags: WRITE, next: 0 };
    let hole = Desc { addr: HOLE, ..good };
    let status = Desc { addr: BUFFERS + 0x100, len: 3, ..good };
    let cases = [
        (vec![good, hole, status], Some(BUFFERS + 0x102)),
        (vec![Desc { len: 0, ..good }, status], Some(BUFFERS + 0x102)),
        (vec![hole], None),
        (vec![status, hole], None),
        (vec![hole, Desc { flags: 0, ..status }], None),
        (vec![hole, Desc { flags: WRITE | NEXT, next: 1, ..status }], None),
    ];
    for (descs, written) in cases {
        let mut bench = bench(0);
        bench.here.set_error_status(IO_ERROR);
        let last = descs.len() - 1;
        for (index, desc) in (0..).zip(descs) {
            let flags = if usize::from(index) == last { desc.flags } else { desc.flags | NEXT };
            let next = if desc.next == 0 { index + 1 } else { desc.next };
            bench.driver.describe(&bench.there, index, Desc { flags, next, ..desc });
        }
        bench.driver.offer(&mut bench.there, 0);

        assert!(!bench.here.pop(&mut Chain::new()));

        assert_eq!(bench.driver.wait_used(&mut bench.there, 1), [(0, 0)]);
        assert_eq!(bench.here.bad_chains(), 1);
        let around = BUFFERS..BUFFERS + 0x110;
        let found: Vec<u64> = around.filter(|at| bench.byte(*at) == IO_ERROR).collect();
        assert_eq!(found, written.into_iter().collect::<Vec<_>>());
    }
}

#[test]
fn pop_is_not_held_up_by_bad_chains_without_end() {
    let mut bench = bench(0);
    bench.driver.describe(&bench.there, 0, Desc::default());
    for _ in 0..SIZE {
        bench.driver.offer(&mut bench.there, 0);
    }
    assert!(!bench.here.pop(&mut Chain::new()));
    assert_eq!(bench.here.bad_chains(), u64::from(SIZE));
    assert!(!bench.here.is_broken());
    assert!(!bench.here.enable_kicks());
}
