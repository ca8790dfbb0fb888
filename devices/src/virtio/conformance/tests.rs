//! The suite against a device that gives back what it reads.

use super::*;
use crate::virtio::chain::Chain;
use crate::virtio::device::{ActivateError, Activation, QueueSlot};
use crate::virtio::queue::Queue;
use crate::virtio::served::{Answer, LoopDevice, QueueHandler};

/// Copies what it reads to what it writes.
struct Echo;

impl QueueHandler for Echo {
    fn handle(&mut self, _index: u16, chain: &mut Chain) -> Answer {
        let mut written = 0;
        let mut bytes = [0; 7];
        while chain.readable_bytes() > 0 {
            let count = bytes.len().min(chain.readable_bytes() as usize);
            chain.read(&mut bytes[..count]).unwrap();
            written += chain.write(&bytes[..count]);
        }
        Answer::Done(written as u32)
    }
}

struct EchoDevice(LoopDevice<Echo>);

impl VirtioDevice for EchoDevice {
    fn device_id(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        1
    }
    fn queues(&self) -> &[QueueSlot] {
        self.0.queues()
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.0.activate(activation)
    }
    fn reset(&mut self) {
        self.0.reset();
    }
    fn reset_queue(&mut self, index: u16) {
        self.0.reset_queue(index);
    }
    fn enable_queue(&mut self, queue: Queue) -> Result<(), ActivateError> {
        self.0.enable_queue(queue)
    }
    fn pause(&mut self) {
        self.0.pause();
    }
    fn resume(&mut self) {
        self.0.resume();
    }
}

fn echo() -> Subject {
    let device = LoopDevice::new(Echo, &[8, 32]).unwrap();
    Subject {
        subscribers: vec![device.subscriber()],
        device: Box::new(EchoDevice(device)),
        request: Request { queue: 1, readable: (0..100).collect(), writable: 120, written: 100 },
        _keep: Box::new(()),
    }
}

conformance_tests!(echo);

#[test]
fn data_arrives_however_it_is_cut() {
    let mut bench = Bench::running(echo, INDIRECT_DESC);
    for piece in [1, 2, 3, 7, 8, 99, 100] {
        let buffers = bench.buffers(Cut::Pieces(piece));
        let (readable, writable): (Vec<_>, Vec<_>) =
            buffers.into_iter().partition(|desc| desc.flags & WRITE == 0);
        let target = writable[0].addr;
        let room = Desc { addr: target, len: 120, flags: WRITE, next: 0 };
        let chain: Vec<Desc> = readable.into_iter().chain([room]).collect();
        if chain.len() > usize::from(SIZE) {
            continue;
        }
        bench.chain(0, &chain);
        bench.send(0);
        assert_eq!(bench.wait(1), [(0, 100)]);
        let mut data = [0; 100];
        bench.driver.memory.read_slice(&mut data, GuestAddress(target)).unwrap();
        assert_eq!(data.to_vec(), bench.request.readable);
    }
}
