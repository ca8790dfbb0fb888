//! Descriptor chains (virtio 1.2 §2.7.4, §2.7.5).

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use vm_memory::{Bytes, GuestAddress};

use super::{Bench, Cut, EVENT_IDX, INDIRECT, INDIRECT_DESC, SIZE, Subject, linked};
use crate::virtio::testing::{
    Desc, DriverQueue, FakeDriver, HIGH_RAM, HOLE, LOW_RAM_BYTES, NEXT, WRITE,
};
use crate::virtio::transport::core::DEVICE_NEEDS_RESET;

/// The size of a descriptor, bytes.
const DESC_BYTES: u32 = 16;

pub(crate) fn requests_may_be_cut_anywhere(make: fn() -> Subject) {
    let mut bench = Bench::running(make, 0);
    let bytes = bench.request.readable.len() + bench.request.writable as usize;
    let least = bytes.div_ceil(usize::from(SIZE) - 2).max(1);
    for piece in [least, least + 1, least + 3, bytes] {
        let buffers = bench.buffers(Cut::Pieces(piece));
        bench.chain(0, &buffers);
        bench.send(0);
        assert_eq!(bench.wait(1), [(0, bench.request.written)], "pieces of {piece} bytes");
    }
}

/// Writes `table` to memory and returns a descriptor that refers to it.
fn indirect(driver: &mut FakeDriver, table: impl Iterator<Item = Desc>) -> Desc {
    let bytes: Vec<u8> = table.flat_map(Desc::to_bytes).collect();
    let addr = driver.allocate(bytes.len() as u64);
    driver.memory.write_slice(&bytes, GuestAddress(addr)).unwrap();
    Desc { addr, len: bytes.len() as u32, flags: INDIRECT, next: 0 }
}

pub(crate) fn requests_may_lie_in_an_indirect_table(make: fn() -> Subject) {
    let mut bench = Bench::running(make, INDIRECT_DESC);
    let buffers = bench.buffers(Cut::Whole);
    // All in the table; all but the first; the WRITE flag on the table has no meaning (§2.7.5.3.2).
    for (direct, flags) in [(0, 0), (buffers.len() - 1, 0), (0, WRITE)] {
        let table = indirect(&mut bench.driver, linked(0, &buffers[direct..]));
        let mut chain = buffers[..direct].to_vec();
        chain.push(Desc { flags: table.flags | flags, ..table });
        bench.chain(3, &chain);
        bench.send(3);
        assert_eq!(bench.wait(1), [(3, bench.request.written)]);
    }
}

pub(crate) fn requests_may_cross_adjoining_ranges_of_memory(make: fn() -> Subject) {
    let mut bench = Bench::running(make, 0);
    let mut buffers = bench.buffers(Cut::Whole);
    for desc in &mut buffers {
        let mut data = vec![0; desc.len as usize];
        bench.driver.memory.read_slice(&mut data, GuestAddress(desc.addr)).unwrap();
        desc.addr = LOW_RAM_BYTES - u64::from(desc.len / 2);
        bench.driver.memory.write_slice(&data, GuestAddress(desc.addr)).unwrap();
        // One at a time: two would overlap.
        if desc.len > 1 {
            break;
        }
    }
    bench.chain(0, &buffers);
    bench.send(0);
    assert_eq!(bench.wait(1), [(0, bench.request.written)]);
}

/// Each kind of bad chain, by name; the head is descriptor 0.
fn bad_chains(bench: &mut Bench) -> Vec<(&'static str, Vec<Desc>)> {
    let scratch = bench.driver.allocate(u64::from(DESC_BYTES) * 64);
    let read = Desc { addr: scratch, len: 16, flags: 0, next: 0 };
    let write = Desc { flags: WRITE, ..read };
    let high_end = HIGH_RAM + LOW_RAM_BYTES;
    let table = indirect(&mut bench.driver, [write].into_iter());
    let nested = indirect(&mut bench.driver, [table].into_iter());
    let runs_out = Desc { flags: WRITE | NEXT, next: 1, ..read };
    let runs_out = indirect(&mut bench.driver, [runs_out].into_iter());
    let loops = Desc { flags: WRITE | NEXT, next: 0, ..read };
    let loops = indirect(&mut bench.driver, [loops].into_iter());
    let max = usize::from(bench.driver.max_size(bench.request.queue));
    let piece =
        |index: usize| Desc { addr: scratch, len: 1, flags: WRITE | NEXT, next: index as u16 + 1 };
    let overlong = indirect(&mut bench.driver, (0..max + 1).map(piece));
    vec![
        ("loops onto itself", vec![Desc { flags: NEXT, next: 0, ..read }]),
        (
            "loops",
            vec![Desc { flags: NEXT, next: 1, ..read }, Desc { flags: NEXT, next: 0, ..read }],
        ),
        ("leads outside the table", vec![Desc { flags: NEXT, next: SIZE, ..read }]),
        ("leads far outside the table", vec![Desc { flags: NEXT, next: u16::MAX, ..read }]),
        ("in the hole", vec![Desc { addr: HOLE, ..write }]),
        ("into the hole", vec![Desc { addr: HOLE - 8, ..write }]),
        ("past the end", vec![Desc { addr: high_end - 8, ..write }]),
        ("around the address space", vec![Desc { addr: u64::MAX - 7, ..write }]),
        ("readable, in the hole", vec![Desc { addr: HOLE, ..read }, write]),
        ("all of the address space", vec![Desc { addr: 0, len: u32::MAX, ..write }]),
        ("empty", vec![Desc { len: 0, ..write }]),
        ("readable and empty", vec![Desc { len: 0, ..read }, write]),
        ("readable after writable", vec![write, read]),
        ("readable between writable", vec![write, read, write]),
        ("indirect in indirect", vec![nested]),
        ("indirect and next", vec![Desc { flags: INDIRECT | NEXT, next: 1, ..table }, write]),
        ("indirect table of no size", vec![Desc { len: 0, ..table }]),
        ("indirect table of odd size", vec![Desc { len: DESC_BYTES + 1, ..table }]),
        ("indirect table in the hole", vec![Desc { addr: HOLE, ..table }]),
        ("indirect table into the hole", vec![Desc { addr: HOLE - 8, ..table }]),
        ("indirect table left", vec![runs_out]),
        ("indirect table loops", vec![loops]),
        ("indirect table overlong", vec![overlong]),
    ]
}

pub(crate) fn bad_chains_lose_their_own_request_only(make: fn() -> Subject) {
    let mut bench = Bench::running(make, INDIRECT_DESC);
    for (name, chain) in bad_chains(&mut bench) {
        let queue = *bench.queue();
        let closed = linked(0, &chain).zip(0..).map(|(linked, index): (Desc, usize)| {
            // What the list says itself comes first.
            let own = chain[index];
            if own.flags & NEXT != 0 { own } else { linked }
        });
        for (index, desc) in (0..).zip(closed.collect::<Vec<_>>()) {
            bench.driver.describe(&queue, index, desc);
        }
        bench.send(0);
        assert_eq!(bench.wait(1), [(0, 0)], "a chain that is {name}");
        assert_eq!(bench.driver.status() & DEVICE_NEEDS_RESET, 0, "{name}");
        bench.check_alive();
    }
    // An indirect table is bad when the feature was not negotiated.
    let mut bench = Bench::running(make, 0);
    let buffers = bench.buffers(Cut::Whole);
    let table = indirect(&mut bench.driver, linked(0, &buffers));
    bench.chain(0, &[table]);
    bench.send(0);
    assert_eq!(bench.wait(1), [(0, 0)]);
    bench.check_alive();
}

/// Where the buffers of random chains lie.
const SCRATCH: u64 = 0x2_0000;
/// Where their indirect tables lie, which no buffer overwrites.
const TABLES: u64 = 0x3_0000;

fn any_desc() -> impl Strategy<Value = Desc> {
    let addr = prop_oneof![
        6 => (0..64u64).prop_map(|slot| SCRATCH + slot * 256),
        1 => Just(LOW_RAM_BYTES - 8),
        1 => Just(HOLE - 8),
        1 => any::<u64>(),
    ];
    let len =
        prop_oneof![6 => 1..64u32, 2 => Just(DESC_BYTES * 4), 1 => Just(0), 1 => any::<u32>()];
    let flags = prop_oneof![8 => 0..4u16, 1 => Just(INDIRECT), 1 => any::<u16>()];
    let next = prop_oneof![9 => 0..SIZE, 1 => any::<u16>()];
    (addr, len, flags, next).prop_map(|(addr, len, flags, next)| {
        let in_scratch = (SCRATCH..TABLES).contains(&addr);
        let is_table = flags & INDIRECT != 0 && in_scratch;
        let addr = if is_table { addr - SCRATCH + TABLES } else { addr };
        Desc { addr, len, flags, next }
    })
}

/// Which bytes of RAM the device may change: those that some descriptor in reach declares writable.
fn may_change(descs: &[Desc], setup_used: std::ops::Range<u64>) -> impl Fn(u64) -> bool {
    let writable: Vec<_> = descs
        .iter()
        .filter(|desc| desc.flags & WRITE != 0)
        .map(|desc| desc.addr..desc.addr.saturating_add(desc.len.into()))
        .collect();
    move |address| setup_used.contains(&address) || writable.iter().any(|r| r.contains(&address))
}

/// What a driver out of its mind writes.
#[derive(Clone, Debug)]
struct Nonsense {
    /// The descriptor table.
    table: Vec<Desc>,
    /// What stands wherever an indirect table may be looked for.
    inner: Vec<Desc>,
    heads: Vec<u16>,
    features: u64,
}

fn any_nonsense() -> impl Strategy<Value = Nonsense> {
    let table = prop::collection::vec(any_desc(), usize::from(SIZE));
    let inner = prop::collection::vec(any_desc(), 4);
    let head = prop_oneof![12 => 0..SIZE, 1 => any::<u16>()];
    let heads = prop::collection::vec(head, 1..usize::from(SIZE));
    let features = prop_oneof![Just(0), Just(EVENT_IDX), Just(EVENT_IDX | INDIRECT_DESC)];
    (table, inner, heads, features).prop_map(|(table, inner, heads, features)| Nonsense {
        table,
        inner,
        heads,
        features,
    })
}

pub(crate) fn any_rings_are_survived(make: fn() -> Subject) {
    let mut runner = TestRunner::new(Config { cases: 48, ..Config::default() });
    runner.run(&any_nonsense(), |nonsense| survives(make, &nonsense)).unwrap();
}

/// The device changes only what it may, keeps the used ring in order, and works after a reset.
fn survives(make: fn() -> Subject, nonsense: &Nonsense) -> Result<(), TestCaseError> {
    let Nonsense { table, inner, heads, features } = nonsense;
    let mut bench = Bench::running(make, *features);
    let mut queue = *bench.queue();
    for (index, desc) in (0..).zip(table) {
        bench.driver.describe(&queue, index, *desc);
    }
    let bytes: Vec<u8> = inner.iter().flat_map(|desc| desc.to_bytes()).collect();
    for slot in 0..64 {
        bench.driver.memory.write_slice(&bytes, GuestAddress(TABLES + slot * 256)).unwrap();
    }
    for head in heads {
        bench.driver.offer(&mut queue, *head);
    }
    let before = bench.driver.snapshot();

    bench.driver.kick(&queue);
    settle(&bench.driver, &queue);
    bench.driver.transport.pause();

    check_used(&bench.driver, &queue, heads)?;
    let used_ring = queue.setup.used_ring;
    let used = used_ring..used_ring + 6 + 8 * u64::from(SIZE);
    let all: Vec<Desc> = table.iter().chain(inner).copied().collect();
    let may_change = may_change(&all, used);
    // The device may have begun only now to look at the other queues, and ask for no kicks meanwhile.
    let is_flags = |address: u64| {
        let mut flags = bench.queues.iter().map(|q| q.setup.used_ring..q.setup.used_ring + 2);
        flags.any(|flags| flags.contains(&address))
    };
    for address in changes(&before, &bench.driver.snapshot()) {
        prop_assert!(may_change(address) || is_flags(address), "{address:#x} changed");
    }
    bench.driver.transport.resume();
    bench.driver.reset();
    bench.bring_up(0);
    bench.check_alive();
    Ok(())
}

/// The addresses of the bytes that differ from one snapshot to the other.
fn changes(before: &[u8], after: &[u8]) -> Vec<u64> {
    const PAGE: usize = 4096;
    let pages = before.chunks(PAGE).zip(after.chunks(PAGE)).zip((0u64..).step_by(PAGE));
    let changed = pages.filter(|((old, new), _)| old != new);
    let bytes = changed.flat_map(|((old, new), start)| {
        let bytes = old.iter().zip(new).zip(start..);
        bytes.filter(|((old, new), _)| old != new).map(|(_, offset)| offset)
    });
    bytes.map(|offset| if offset < HOLE { offset } else { offset - HOLE + HIGH_RAM }).collect()
}

/// Waits until all that was offered is used or the device needs a reset. A chain may also lead the
/// device to write to its own rings, so the wait has an end.
fn settle(driver: &FakeDriver, queue: &DriverQueue) {
    for _ in 0..100 {
        if driver.status() & DEVICE_NEEDS_RESET != 0 || driver.used_index(queue) == queue.next_avail
        {
            return;
        }
        std::thread::sleep(std::time::Duration::from_micros(100));
    }
}

/// The used ring holds heads that were offered, no more than those.
fn check_used(
    driver: &FakeDriver,
    queue: &DriverQueue,
    heads: &[u16],
) -> Result<(), TestCaseError> {
    let count = driver.used_index(queue);
    prop_assert!(usize::from(count) <= heads.len());
    for entry in 0..u64::from(count) {
        let address = queue.setup.used_ring + 4 + 8 * entry;
        let head: u32 = driver.memory.read_obj(GuestAddress(address)).unwrap();
        prop_assert!(heads.iter().any(|offered| u32::from(*offered) == head));
    }
    Ok(())
}
