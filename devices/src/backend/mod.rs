//! The host's side of devices: files, terminals, sockets. No word of virtio.

pub mod console;
pub mod disk;
pub mod net;
pub mod terminal;
