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

/// Why processors cannot be arranged as asked.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TopologyError {
    /// A count of zero.
    #[error("{level}=0 leaves nothing to run on; give at least 1")]
    Zero {
        /// Which count: `threads`, `cores` or `sockets`.
        level: &'static str,
    },
    /// The counts that are given have another product than the number of processors, or none of
    /// which that number is a multiple.
    #[error("{cpus} {} {product} ({given}); give counts whose product is {cpus}, or leave one out",
            if *complete { "is not" } else { "is not a multiple of" })]
    DoesNotDivide {
        /// Logical processors.
        cpus: u32,
        /// The counts that are given, as `threads=2 cores=3`.
        given: String,
        /// Their product.
        product: u64,
        /// Whether all counts are given.
        complete: bool,
    },
}

/// How many of each there are; what is not given is derived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Hardware threads in a core.
    pub threads: Option<u32>,
    /// Cores in a socket.
    pub cores: Option<u32>,
    /// Sockets in the machine.
    pub sockets: Option<u32>,
}

impl Topology {
    /// Arranges `cpus` processors, at least 1, in `shape`.
    ///
    /// Of the counts that are not given, the first of cores, sockets and threads takes what the
    /// others leave, which are 1: 8 processors alone make a socket of 8 cores.
    pub fn new(cpus: u32, shape: &Shape) -> Result<Self, TopologyError> {
        let counts =
            [("threads", shape.threads), ("cores", shape.cores), ("sockets", shape.sockets)];
        if let Some((level, _)) = counts.into_iter().find(|(_, count)| *count == Some(0)) {
            return Err(TopologyError::Zero { level });
        }
        let product = counts.iter().filter_map(|(_, count)| *count).map(u64::from);
        let product = product.fold(1, u64::saturating_mul);
        let complete = counts.iter().all(|(_, count)| count.is_some());
        let divides = u64::from(cpus).is_multiple_of(product);
        if !divides || complete && u64::from(cpus) != product {
            let given = counts
                .iter()
                .filter_map(|(name, count)| count.map(|count| format!("{name}={count}")));
            let given = given.collect::<Vec<_>>().join(" ");
            return Err(TopologyError::DoesNotDivide { cpus, given, product, complete });
        }
        // Not more than `cpus`, so that it fits.
        let mut rest = Some((u64::from(cpus) / product) as u32);
        let cores_per_socket = shape.cores.or_else(|| rest.take()).unwrap_or(1);
        let sockets = shape.sockets.or_else(|| rest.take()).unwrap_or(1);
        let threads_per_core = shape.threads.or_else(|| rest.take()).unwrap_or(1);
        Ok(Self { threads_per_core, cores_per_socket, sockets })
    }

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

    fn shape(counts: [u32; 3]) -> Shape {
        let [threads, cores, sockets] = counts.map(|count| (count > 0).then_some(count));
        Shape { threads, cores, sockets }
    }

    #[test]
    fn counts_that_are_not_given_are_derived() {
        // Processors, then threads, cores and sockets as given, 0 for not at all, and as derived.
        for (cpus, given, expected) in [
            (8, [0, 0, 0], [1, 8, 1]),
            (8, [2, 0, 0], [2, 4, 1]),
            (8, [0, 4, 0], [1, 4, 2]),
            (8, [0, 0, 4], [1, 2, 4]),
            (8, [2, 2, 0], [2, 2, 2]),
            (8, [2, 0, 2], [2, 2, 2]),
            (8, [0, 2, 2], [2, 2, 2]),
            (12, [2, 3, 2], [2, 3, 2]),
            (1, [1, 1, 1], [1, 1, 1]),
        ] {
            let topology = Topology::new(cpus, &shape(given)).unwrap();

            let derived = [topology.threads_per_core, topology.cores_per_socket, topology.sockets];
            assert_eq!(derived, expected, "{cpus} {given:?}");
        }
    }

    #[test]
    fn counts_that_do_not_divide_are_refused_with_the_numbers() {
        for (cpus, given, message) in [
            (6, [4, 0, 0], "6 is not a multiple of 4 (threads=4)"),
            (8, [2, 0, 3], "8 is not a multiple of 6 (threads=2 sockets=3)"),
            (8, [2, 2, 4], "8 is not 16 (threads=2 cores=2 sockets=4)"),
            (8, [1, 2, 2], "8 is not 4 (threads=1 cores=2 sockets=2)"),
            (2, [u32::MAX; 3], "2 is not 18446744073709551615 (threads=4294967295"),
        ] {
            let refused = Topology::new(cpus, &shape(given)).unwrap_err();

            assert!(refused.to_string().starts_with(message), "{refused}");
        }
        let zero = Shape { cores: Some(0), ..Default::default() };
        assert_eq!(Topology::new(1, &zero), Err(TopologyError::Zero { level: "cores" }));
    }

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
