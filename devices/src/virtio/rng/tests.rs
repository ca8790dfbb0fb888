use std::num::NonZeroU64;
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::rate_limit::Rate;
use crate::virtio::conformance::{Bench, Cut, Request, Subject, conformance_tests};

fn rng_with(config: &RngConfig, writable: u32) -> Subject {
    let device = VirtioRng::new(config).unwrap();
    let written = writable.min(MAX_REQUEST_BYTES as u32);
    Subject {
        subscribers: vec![device.subscriber()],
        device: Box::new(device),
        request: Request { queue: 0, readable: Vec::new(), writable, written },
        _keep: Box::new(()),
    }
}

fn rng() -> Subject {
    let bandwidth = Rate::new(NonZeroU64::new(1 << 40).unwrap());
    rng_with(&RngConfig { enabled: true, bandwidth }, 64)
}

conformance_tests!(rng);

#[test]
fn the_bytes_differ_from_one_request_to_the_next() {
    let mut bench = Bench::running(rng, 0);
    let buffers = bench.buffers(Cut::Whole);
    let mut seen = vec![[0u8; 64]];
    for _ in 0..10 {
        bench.chain(0, &buffers);
        bench.send(0);
        bench.wait(1);
        let mut data = [0; 64];
        bench.driver.memory.read_slice(&mut data, GuestAddress(buffers[0].addr)).unwrap();
        assert!(!seen.contains(&data));
        seen.push(data);
    }
}

#[test]
fn a_large_request_gets_its_limit() {
    let mut bench = Bench::running(|| rng_with(&RngConfig::default(), 10_000), 0);

    bench.check_alive();
}

#[test]
fn the_rate_is_kept_without_a_kick() {
    // 64 bytes at once, then 640 a second: the third request waits for what the second has cost.
    let slow = || {
        let bandwidth = "640:64".parse().unwrap();
        rng_with(&RngConfig { enabled: true, bandwidth }, 64)
    };
    let mut bench = Bench::running(slow, 0);
    bench.check_alive();
    let start = Instant::now();

    bench.check_alive();
    bench.check_alive();

    assert!(start.elapsed().as_millis() >= 80, "{:?}", start.elapsed());
}
