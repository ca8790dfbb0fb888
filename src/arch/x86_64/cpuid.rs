//! What CPUID tells the guest: what KVM supports, with the guest's own topology and its hypervisor.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::topology::Topology;

/// CPUID leaves that alcove fills in (Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E).
mod leaf {
    pub const FEATURES: u32 = 0x1;
    pub const CACHES: u32 = 0x4;
    pub const STRUCTURED_FEATURES: u32 = 0x7;
    pub const TOPOLOGY: u32 = 0xb;
    pub const EXTENDED_STATE: [u32; 4] = [0xd, 0x1d, 0x1e, 0x24];
    pub const TOPOLOGY_V2: u32 = 0x1f;
    pub const KVM_SIGNATURE: u32 = 0x4000_0000;
    pub const KVM_FEATURES: u32 = 0x4000_0001;
    pub const AMD_FEATURES: u32 = 0x8000_0001;
    pub const BRAND_STRING: std::ops::RangeInclusive<u32> = 0x8000_0002..=0x8000_0004;
    pub const AMD_SIZES: u32 = 0x8000_0008;
    pub const AMD_CACHES: u32 = 0x8000_001d;
    pub const AMD_TOPOLOGY: u32 = 0x8000_001e;
    pub const AMD_TOPOLOGY_V2: u32 = 0x8000_0026;
}

/// Leaf 1 EBX: CLFLUSH line size in quadwords, bits 15:8.
const CLFLUSH_LINE_SHIFT: u32 = 8;
/// Leaf 1 ECX bit 24: the local APIC timer has a TSC-deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX bit 31: a hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX bit 28: the package may hold more than one logical processor.
const HTT: u32 = 1 << 28;
/// Leaf 8000_0001h ECX bit 1 (CmpLegacy): a multi-core package without SMT.
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 8000_0001h ECX bit 22: leaves 8000_001Dh and 8000_001Eh exist.
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;

/// KVM_FEATURE bits whose use needs a hypercall: PV_UNHALT (7), PV_SEND_IPI (11),
/// PV_SCHED_YIELD (13), HC_MAP_GPA_RANGE (16); Documentation/virt/kvm/x86/cpuid.rst.
const FEATURES_BY_HYPERCALL: u32 = 1 << 7 | 1 << 11 | 1 << 13 | 1 << 16;

/// What needs XSAVE, besides leaves of its own (Dh, 1Dh, 1Eh, 24h): a leaf, its sub-leaf, and bits of EAX,
/// EBX, ECX and EDX.
const EXTENDED_STATE: [(u32, u32, [u32; 4]); 4] = [
    // FMA (12), XSAVE (26), OSXSAVE (27), AVX (28), F16C (29).
    (leaf::FEATURES, 0, [0, 0, 1 << 12 | 0b1111 << 26, 0]),
    // AVX2 (5), MPX (14), AVX-512 (16, 17, 21, 26 to 28, 30, 31); AVX-512 (1, 6, 11, 12, 14), PKU (3, 4),
    // CET (7), VAES (9), VPCLMULQDQ (10); AVX-512 (2, 3, 8, 23), CET (20), AMX (22, 24, 25).
    (leaf::STRUCTURED_FEATURES, 0, [0, 0xdc23_4020, 0x5eda, 0x03d0_010c]),
    // AVX-VNNI (4), AVX-512 (5), AMX (21), AVX-IFMA (23); AVX (4, 5, 10), AMX (8), AVX10 (19).
    (leaf::STRUCTURED_FEATURES, 1, [0x00a0_0030, 0, 0, 0x0008_0530]),
    // XOP (11), LWP (15), FMA4 (16).
    (leaf::AMD_FEATURES, 0, [0, 0, 1 << 11 | 0b11 << 15, 0]),
];
/// What says that string instructions of bytes are fast, likewise.
const FAST_STRINGS: [(u32, u32, [u32; 4]); 2] = [
    // ERMS (9); FSRM (4).
    (leaf::STRUCTURED_FEATURES, 0, [0, 1 << 9, 0, 1 << 4]),
    // FZRM, FSRS, FSRC (10 to 12).
    (leaf::STRUCTURED_FEATURES, 1, [0b111 << 10, 0, 0, 0]),
];

/// What a host does not do although its KVM and its processor say so.
#[derive(Debug, Clone, Copy, Default)]
pub struct Shortcomings {
    /// A hypercall does not work.
    pub no_hypercalls: bool,
    /// The processor is a program that translates instructions, QEMU's TCG. It repeats a string
    /// instruction element by element, so that one of bytes takes eight times as long as one of
    /// quadwords, and it lets a guest change XCR0 behind KVM's back, so that guest and host spoil each
    /// other's extended state.
    pub translated: bool,
}

/// Turns what KVM supports into what the logical processor `cpu` of a machine arranged as
/// `topology` shows on a host with `shortcomings`.
pub fn for_cpu(
    supported: &CpuId,
    cpu: u32,
    topology: &Topology,
    shortcomings: Shortcomings,
) -> CpuId {
    let mut cpuid = supported.clone();
    let apic_id = topology.apic_id(cpu);
    // The host's levels; leaf Bh has the guest's.
    cpuid.retain(|entry| entry.function != leaf::AMD_TOPOLOGY_V2);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            leaf::FEATURES => features(entry, apic_id, topology),
            leaf::CACHES => caches(entry, topology),
            leaf::KVM_SIGNATURE => entry.eax = entry.eax.max(leaf::KVM_FEATURES),
            leaf::KVM_FEATURES if shortcomings.no_hypercalls => entry.eax &= !FEATURES_BY_HYPERCALL,
            leaf::AMD_FEATURES => amd_features(entry, topology),
            leaf::AMD_SIZES => amd_sizes(entry, topology),
            leaf::AMD_CACHES => amd_caches(entry, topology),
            leaf::AMD_TOPOLOGY => amd_topology(entry, apic_id, topology),
            _ => {}
        }
    }
    if shortcomings.translated {
        hide_what_translators_do_badly(&mut cpuid);
    }
    extended_topology(&mut cpuid, apic_id, topology);
    brand_string(&mut cpuid);
    cpuid
}

/// Leaves the guest with moves of quadwords and the state that FXSAVE saves.
fn hide_what_translators_do_badly(cpuid: &mut CpuId) {
    cpuid.retain(|entry| !leaf::EXTENDED_STATE.contains(&entry.function));
    for entry in cpuid.as_mut_slice() {
        for (leaf, index, [eax, ebx, ecx, edx]) in EXTENDED_STATE.iter().chain(&FAST_STRINGS) {
            if (entry.function, entry.index) == (*leaf, *index) {
                entry.eax &= !eax;
                entry.ebx &= !ebx;
                entry.ecx &= !ecx;
                entry.edx &= !edx;
            }
        }
    }
}

/// Leaves 8000_0002h to 8000_0004h, which KVM leaves empty: the host processor's name.
fn brand_string(cpuid: &mut CpuId) {
    for function in leaf::BRAND_STRING {
        let host = std::arch::x86_64::__cpuid(function);
        if let Some(entry) = cpuid.as_mut_slice().iter_mut().find(|e| e.function == function) {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (host.eax, host.ebx, host.ecx, host.edx);
        }
    }
}

/// Width of the guest's physical addresses: leaf 8000_0008h EAX bits 7:0, or 36 without that leaf.
pub fn physical_address_bits(cpuid: &CpuId) -> u8 {
    const WITHOUT_LEAF: u8 = 36;
    let entry = cpuid.as_slice().iter().find(|e| e.function == leaf::AMD_SIZES);
    entry.map_or(WITHOUT_LEAF, |e| e.eax as u8)
}

fn features(entry: &mut kvm_cpuid_entry2, apic_id: u32, topology: &Topology) {
    /// EBX: initial APIC id in bits 31:24, addressable ids in bits 23:16.
    const APIC_ID_SHIFT: u32 = 24;
    const LOGICAL_COUNT_SHIFT: u32 = 16;
    let addressable = (1u32 << topology.socket_shift()).min(255);
    let line = entry.ebx & (0xff << CLFLUSH_LINE_SHIFT);
    entry.ebx = (apic_id & 0xff) << APIC_ID_SHIFT | addressable << LOGICAL_COUNT_SHIFT | line;
    entry.ecx |= HYPERVISOR | TSC_DEADLINE;
    set(&mut entry.edx, HTT, topology.cpus_per_socket() > 1);
}

/// Leaf 4, Intel's cache parameters: EAX bits 25:14 threads sharing, bits 31:26 cores in package.
fn caches(entry: &mut kvm_cpuid_entry2, topology: &Topology) {
    const TYPE: u32 = 0x1f;
    if entry.eax & TYPE == 0 {
        return;
    }
    let level = entry.eax >> 5 & 0x7;
    let sharing_bits = if level < 3 { topology.thread_bits() } else { topology.socket_shift() };
    let cores = 1u32 << (topology.socket_shift() - topology.thread_bits());
    entry.eax = entry.eax & 0x3fff
        | (((1u32 << sharing_bits) - 1) & 0xfff) << 14
        | ((cores - 1) & 0x3f) << 26;
}

fn amd_features(entry: &mut kvm_cpuid_entry2, topology: &Topology) {
    let cores_only = topology.threads_per_core == 1 && topology.cores_per_socket > 1;
    set(&mut entry.ecx, CMP_LEGACY, cores_only);
    // Without the extended leaves their topology cannot contradict this one.
    if topology.cpus_per_socket() == 1 {
        set(&mut entry.ecx, TOPOLOGY_EXTENSIONS, false);
    }
}

/// Leaf 8000_0008h ECX: bits 7:0 logical processors less one, bits 15:12 width of their id.
fn amd_sizes(entry: &mut kvm_cpuid_entry2, topology: &Topology) {
    entry.ecx = entry.ecx & !0xf0ff
        | ((topology.cpus_per_socket() - 1) & 0xff)
        | (topology.socket_shift() & 0xf) << 12;
}

/// Leaf 8000_001Dh, AMD's cache properties: EAX bits 25:14 threads sharing.
fn amd_caches(entry: &mut kvm_cpuid_entry2, topology: &Topology) {
    if entry.eax & 0x1f == 0 {
        return;
    }
    let level = entry.eax >> 5 & 0x7;
    let sharing = if level < 3 { topology.threads_per_core } else { topology.cpus_per_socket() };
    entry.eax = entry.eax & !(0xfff << 14) | ((sharing - 1) & 0xfff) << 14;
}

/// Leaf 8000_001Eh: EAX the APIC id, EBX core id and threads a core, ECX node id.
fn amd_topology(entry: &mut kvm_cpuid_entry2, apic_id: u32, topology: &Topology) {
    let core = (apic_id & ((1 << topology.socket_shift()) - 1)) >> topology.thread_bits();
    entry.eax = apic_id;
    entry.ebx = (core & 0xff) | ((topology.threads_per_core - 1) & 0xff) << 8;
    entry.ecx = apic_id >> topology.socket_shift() & 0xff;
    entry.edx = 0;
}

/// Leaves Bh and 1Fh: one sub-leaf for the thread level, one for the core level, one that ends.
fn extended_topology(cpuid: &mut CpuId, apic_id: u32, topology: &Topology) {
    const LEVEL_SMT: u32 = 1;
    const LEVEL_CORE: u32 = 2;
    let present: Vec<u32> = [leaf::TOPOLOGY, leaf::TOPOLOGY_V2]
        .into_iter()
        .filter(|&function| cpuid.as_slice().iter().any(|e| e.function == function))
        .collect();
    cpuid.retain(|entry| !present.contains(&entry.function));
    for function in present {
        let levels = [
            (topology.thread_bits(), topology.threads_per_core, LEVEL_SMT),
            (topology.socket_shift(), topology.cpus_per_socket(), LEVEL_CORE),
            (0, 0, 0),
        ];
        for (index, (shift, count, kind)) in (0..).zip(levels) {
            let entry = kvm_cpuid_entry2 {
                function,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: count,
                ecx: kind << 8 | index,
                edx: apic_id,
                ..Default::default()
            };
            // The table holds as many entries as KVM does; at worst the rest of the leaf stays out.
            if cpuid.push(entry).is_err() {
                return;
            }
        }
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported(functions: &[u32]) -> CpuId {
        let entries: Vec<kvm_cpuid_entry2> = functions
            .iter()
            .map(|&function| kvm_cpuid_entry2 { function, eax: 0x21, ..Default::default() })
            .collect();
        CpuId::from_entries(&entries).unwrap()
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn each_processor_shows_its_own_apic_id_in_every_leaf() {
        for (threads_per_core, cores_per_socket, sockets) in [(2, 2, 2), (1, 64, 1), (3, 5, 20)] {
            let topology = Topology { threads_per_core, cores_per_socket, sockets };
            let table = supported(&[0x1, 0xb, 0x1f, 0x8000_001e]);

            for cpu in 0..topology.cpus_per_socket() * sockets {
                let cpuid = for_cpu(&table, cpu, &topology, Shortcomings::default());

                let id = topology.apic_id(cpu);
                assert_eq!(find(&cpuid, 0x1, 0).ebx >> 24, id & 0xff);
                assert_eq!(find(&cpuid, 0xb, 0).edx, id);
                assert_eq!(find(&cpuid, 0x1f, 1).edx, id);
                assert_eq!(find(&cpuid, 0x8000_001e, 0).eax, id);
            }
        }
    }

    /// Every leaf by which a kernel splits an APIC id must split it alike.
    #[test]
    fn all_leaves_agree_on_the_width_of_the_fields() {
        let topology = Topology { threads_per_core: 2, cores_per_socket: 3, sockets: 2 };
        let table = supported(&[0x1, 0x4, 0xb, 0x8000_0001, 0x8000_0008, 0x8000_001e]);

        let cpuid = for_cpu(&table, 9, &topology, Shortcomings::default());

        let (thread_bits, socket_shift) = (1, 3);
        let logical = find(&cpuid, 0x1, 0);
        assert_eq!((logical.ebx >> 16 & 0xff, logical.edx & HTT), (1 << socket_shift, HTT));
        let cache = find(&cpuid, 0x4, 0).eax;
        assert_eq!((cache >> 14 & 0xfff, cache >> 26), ((1 << thread_bits) - 1, 3));
        assert_eq!(find(&cpuid, 0xb, 0).eax, thread_bits);
        assert_eq!(find(&cpuid, 0xb, 1).eax, socket_shift);
        let sizes = find(&cpuid, 0x8000_0008, 0).ecx;
        assert_eq!((sizes & 0xff, sizes >> 12 & 0xf), (5, socket_shift));
        // Processor 9 is thread 1 of core 1 of socket 1.
        let node = find(&cpuid, 0x8000_001e, 0);
        assert_eq!((node.eax, node.ebx, node.ecx), (0b1011, 1 << 8 | 1, 1));
    }

    #[test]
    fn the_topology_leaf_names_threads_then_cores_then_ends() {
        let topology = Topology { threads_per_core: 2, cores_per_socket: 4, sockets: 1 };

        let cpuid = for_cpu(&supported(&[0xb]), 0, &topology, Shortcomings::default());

        let rows: Vec<_> = (0..3)
            .map(|index| find(&cpuid, 0xb, index))
            .map(|e| (e.eax, e.ebx, e.ecx >> 8))
            .collect();
        assert_eq!(rows, [(1, 2, 1), (3, 8, 2), (0, 0, 0)]);
    }

    #[test]
    fn the_brand_string_is_that_of_the_host() {
        let table = supported(&[0x8000_0002, 0x8000_0003, 0x8000_0004]);

        let cpuid = for_cpu(&table, 0, &Topology::flat(1), Shortcomings::default());

        for function in 0x8000_0002..=0x8000_0004 {
            let (host, shown) = (std::arch::x86_64::__cpuid(function), find(&cpuid, function, 0));
            assert_eq!((shown.eax, shown.edx), (host.eax, host.edx));
        }
    }

    #[test]
    fn features_that_need_a_hypercall_are_hidden_where_hypercalls_do_not_work() {
        let mut table = supported(&[0x4000_0001]);
        table.as_mut_slice()[0].eax = u32::MAX;
        let topology = Topology::flat(1);

        let with = for_cpu(&table, 0, &topology, Shortcomings::default());
        let without = for_cpu(
            &table,
            0,
            &topology,
            Shortcomings { no_hypercalls: true, ..Default::default() },
        );

        assert_eq!(find(&with, 0x4000_0001, 0).eax, u32::MAX);
        assert_eq!(find(&without, 0x4000_0001, 0).eax, !FEATURES_BY_HYPERCALL);
    }

    #[test]
    fn a_translated_processor_shows_neither_fast_strings_nor_extended_state() {
        let mut table = supported(&[0x1, 0x7, 0x7, 0xd, 0x1d, 0x8000_0001]);
        for entry in table.as_mut_slice() {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (!0, !0, !0, !0);
        }
        table.as_mut_slice()[2].index = 1;
        let topology = Topology::flat(1);
        let translated = Shortcomings { translated: true, ..Default::default() };

        let hidden = for_cpu(&table, 0, &topology, translated);
        let shown = for_cpu(&table, 0, &topology, Shortcomings::default());

        let bits = |entry: kvm_cpuid_entry2| [entry.eax, entry.ebx, entry.ecx, entry.edx];
        assert_eq!(find(&hidden, 0x1, 0).ecx, !0x3c00_1000);
        assert_eq!(bits(find(&hidden, 0x7, 0)), [!0, !0xdc23_4220, !0x5eda, !0x03d0_011c]);
        assert_eq!(bits(find(&hidden, 0x7, 1)), [!0x00a0_1c30, !0, !0, !0x0008_0530]);
        assert_eq!(find(&hidden, 0x8000_0001, 0).ecx & 0x1_8800, 0);
        assert!(hidden.as_slice().iter().all(|entry| ![0xd, 0x1d].contains(&entry.function)));
        assert_eq!(find(&shown, 0x1, 0).ecx, !0);
        assert_eq!(find(&shown, 0x7, 0).ebx, !0);
        assert_eq!(find(&shown, 0xd, 0).eax, !0);
    }

    #[test]
    fn a_hypervisor_and_a_deadline_timer_are_always_announced() {
        let cpuid = for_cpu(&supported(&[0x1]), 0, &Topology::flat(1), Shortcomings::default());

        let ecx = find(&cpuid, 0x1, 0).ecx;
        assert_eq!(ecx & (HYPERVISOR | TSC_DEADLINE), HYPERVISOR | TSC_DEADLINE);
    }
}
