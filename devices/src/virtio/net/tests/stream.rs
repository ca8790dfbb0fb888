//! Networks at the other end of a socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_INT_CONFIG,
    VIRTIO_MMIO_INTERRUPT_STATUS,
};

use super::behaviour::Guest;
use super::*;
use crate::backend::net::Stream;
use crate::bus::BusDevice;
use crate::virtio::testing::wait_until;

/// Where the status lies in the configuration space.
const STATUS: u64 = VIRTIO_MMIO_CONFIG as u64 + 6;

fn guest_on_a_socket() -> (Guest, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let network = Stream::new(ours.into()).into_network(Some(1500));
    (Guest::on(network, Vec::new(), 0, |_| {}), theirs)
}

fn frame(bytes: usize, seed: usize) -> Vec<u8> {
    (0..bytes).map(|at| ((at + seed) * 31 % 253) as u8).collect()
}

fn with_length(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
}

fn link_is_up(guest: &Guest) -> bool {
    let mut status = [0; 2];
    guest.driver.transport.read(STATUS, &mut status);
    status == [1, 0]
}

#[test]
fn frames_arrive_however_the_socket_cuts_them() {
    let (mut guest, mut peer) = guest_on_a_socket();
    let frames: Vec<Vec<u8>> = [14, 60, 1514, 700, 15].iter().map(|n| frame(*n, *n)).collect();
    let buffers: Vec<u64> =
        frames.iter().map(|_| guest.offer(RECEIVE, &[(&[], 1600)])[0]).collect();
    guest.kick(RECEIVE);
    let stream: Vec<u8> = frames.iter().flat_map(|frame| with_length(frame)).collect();
    for piece in stream.chunks(113) {
        peer.write_all(piece).unwrap();
        std::thread::sleep(Duration::from_micros(200));
    }
    let used = guest.wait(RECEIVE, frames.len() as u16);
    for ((frame, at), len) in frames.iter().zip(buffers).zip(used) {
        assert_eq!(len as usize, HEADER_BYTES + frame.len());
        let got = guest.read(at, len as usize);
        assert_eq!(got[..HEADER_BYTES], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(got[HEADER_BYTES..], frame[..]);
    }
}

#[test]
fn frames_leave_whole_through_a_socket_that_is_full() {
    let (mut guest, mut peer) = guest_on_a_socket();
    let frames: Vec<Vec<u8>> = (0..30).map(|n| frame(5000 + n, n)).collect();
    for frame in &frames {
        guest.send([0; HEADER_BYTES], frame);
    }
    // Far more than the socket takes at once.
    std::thread::sleep(Duration::from_millis(20));
    for frame in &frames {
        let mut got = vec![0; 4 + frame.len()];
        peer.read_exact(&mut got).unwrap();
        assert!(got == with_length(frame));
    }
    guest.wait(TRANSMIT, 30);
    assert_eq!(guest.metrics.sent.dropped(), 0);
}

#[test]
fn a_socket_that_is_closed_is_a_link_that_is_down() {
    let (mut guest, peer) = guest_on_a_socket();
    guest.offer(RECEIVE, &[(&[], 1600)]);
    guest.kick(RECEIVE);
    assert!(link_is_up(&guest));
    let generation = guest.driver.read(VIRTIO_MMIO_CONFIG_GENERATION);

    drop(peer);

    wait_until("the link is down", || !link_is_up(&guest));
    wait_until("the driver is told", || {
        guest.driver.read(VIRTIO_MMIO_INTERRUPT_STATUS) & VIRTIO_MMIO_INT_CONFIG != 0
    });
    assert_ne!(guest.driver.read(VIRTIO_MMIO_CONFIG_GENERATION), generation);
    guest.send([0; HEADER_BYTES], &frame(60, 0));
    guest.wait(TRANSMIT, 1);
    assert_eq!(guest.metrics.sent.link_down.get(), 1);
    guest.driver.reset();
    assert!(!link_is_up(&guest));
}

#[test]
fn a_length_that_no_frame_has_ends_the_network() {
    for length in [0u32, 13, 70_000, u32::MAX] {
        let (mut guest, mut peer) = guest_on_a_socket();
        guest.offer(RECEIVE, &[(&[], 1600)]);
        guest.kick(RECEIVE);
        peer.write_all(&length.to_be_bytes()).unwrap();
        wait_until("the link is down", || !link_is_up(&guest));
    }
}
