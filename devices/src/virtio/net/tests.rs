use std::sync::{Arc, Mutex};

use super::*;
use crate::backend::net::{HEADER_BYTES, NetPort, Offloads};
use crate::thread_start::nothing_first;
use crate::virtio::conformance::{Request, Subject};
use fake::{FakePort, Seen};

mod behaviour;
mod fake;
mod stream;

/// All offloads.
const EVERY_OFFLOAD: Offloads =
    Offloads { checksum: true, tso4: true, tso6: true, ecn: true, uso: true };
/// The queues of the first pair.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

fn config() -> NetConfig {
    NetConfig::user()
}

/// A fake network with `pairs` ports, and one record of what happens for each.
fn fake_network(pairs: usize, endless: Option<usize>) -> (Network, Vec<Arc<Mutex<Seen>>>) {
    let seen: Vec<_> = (0..pairs)
        .map(|_| Arc::new(Mutex::new(Seen { room: usize::MAX, ..Seen::default() })))
        .collect();
    let port = |seen: &Arc<Mutex<Seen>>| {
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        seen.lock().unwrap().event = Some(event.try_clone().unwrap());
        Box::new(FakePort { seen: seen.clone(), event, endless }) as Box<dyn NetPort>
    };
    let ports = seen.iter().map(port).collect();
    (Network { ports, offloads: EVERY_OFFLOAD, mtu: Some(1400) }, seen)
}

fn device(network: Network) -> VirtioNet {
    device_with(network, &config())
}

fn device_with(network: Network, config: &NetConfig) -> VirtioNet {
    let opened = OpenNetwork { mac: Mac::from_id("net0"), network, passt: None };
    VirtioNet::new("net0", config, opened, &nothing_first()).unwrap()
}

fn subject(endless: Option<usize>, request: Request) -> Subject {
    let (network, seen) = fake_network(2, endless);
    Subject {
        device: Box::new(device(network)),
        subscribers: Vec::new(),
        request,
        _keep: Box::new(seen),
    }
}

mod sending {
    use super::*;

    fn net() -> Subject {
        let mut readable = vec![0; HEADER_BYTES];
        readable.extend((0..100).map(|at: u8| at));
        subject(None, Request { queue: TRANSMIT, readable, writable: 0, written: 0 })
    }

    crate::virtio::conformance::conformance_tests!(net);
}

mod receiving {
    use super::*;

    fn net() -> Subject {
        let written = HEADER_BYTES as u32 + 60;
        let request = Request { queue: RECEIVE, readable: Vec::new(), writable: 120, written };
        subject(Some(60), request)
    }

    crate::virtio::conformance::conformance_tests!(net);
}
