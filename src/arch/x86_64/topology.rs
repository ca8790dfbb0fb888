//! How the guest's logical processors are arranged.

/// Threads, cores and sockets; every count is at least 1.
///
/// An APIC id is the fields socket, core and thread side by side, each as wide as its count needs
/// (Intel SDM vol. 3, 10.9.1 "Hierarchical Mapping of Shared Resources").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Hardware threads in a core.
    pub threads_per_core: u32,
    /// Cores in a socket.
    pub cores_per_socket: u32,
    /// Sockets in the machine.
    pub sockets: u32,
}

impl Topology {
    /// One socket of `cpus` cores with a single thread each.
    pub fn flat(cpus: u32) -> Self {
        Self { threads_per_core: 1, cores_per_socket: cpus.max(1), sockets: 1 }
    }

    /// Logical processors in a socket.
    pub fn cpus_per_socket(&self) -> u32 {
        self.threads_per_core * self.cores_per_socket
    }

    /// Bits of the APIC id that number a thread within its core.
    pub fn thread_bits(&self) -> u32 {
        bits_for(self.threads_per_core)
    }

    /// Bits of the APIC id below the socket's number.
    pub fn socket_shift(&self) -> u32 {
        self.thread_bits() + bits_for(self.cores_per_socket)
    }

    /// The APIC id of the logical processor with index `cpu`, threads counted first.
    pub fn apic_id(&self, cpu: u32) -> u32 {
        let thread = cpu % self.threads_per_core;
        let core = cpu / self.threads_per_core % self.cores_per_socket;
        let socket = cpu / self.cpus_per_socket();
        socket << self.socket_shift() | core << self.thread_bits() | thread
    }
}

/// The width of a field that holds `0..count`.
fn bits_for(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_topology_numbers_processors_in_order() {
        let flat = Topology::flat(64);

        let ids: Vec<u32> = (0..64).map(|cpu| flat.apic_id(cpu)).collect();

        assert_eq!(ids, (0..64).collect::<Vec<_>>());
    }

    #[test]
    fn fields_are_padded_to_powers_of_two() {
        let odd = Topology { threads_per_core: 2, cores_per_socket: 3, sockets: 2 };

        let ids: Vec<u32> = (0..12).map(|cpu| odd.apic_id(cpu)).collect();

        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
        assert_eq!((odd.thread_bits(), odd.socket_shift()), (1, 3));
    }
}
