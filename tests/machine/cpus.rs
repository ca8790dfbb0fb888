//! Several vCPUs in Linux.

use crate::alcove::{WHOLE_PROCESSOR, run_script};
use crate::host::{guest_file, has_hardware_kvm};

/// Numbers of vCPUs and how they are arranged: what is said on the command line, how many there are,
/// and what Linux says of the first one's threads and sockets.
const SMALL: [(&str, u32, &str, &str); 1] = [("2", 2, "0", "0-1")];
const LARGE: [(&str, u32, &str, &str); 2] =
    [("4,threads=2", 4, "0-1", "0-3"), ("8,threads=2,sockets=2", 8, "0-1", "0-3")];

pub fn linux_finds_its_cpus() {
    let large: &[_] = if has_hardware_kvm() { &LARGE } else { &[] };
    for (given, count, core, socket) in SMALL.iter().chain(large) {
        let script = format!(
            "cd /sys/devices/system/cpu/cpu0/topology
             [ $(nproc) = {count} ] || exit 1
             [ $(cat core_cpus_list) = {core} ] || exit 2
             [ $(cat package_cpus_list) = {socket} ] || exit 3
             grep -m 1 flags /proc/cpuinfo
             exit 42"
        );

        let arguments = [["--cpus", given], WHOLE_PROCESSOR].concat();
        let ended = run_script(&script, &[], &arguments).expect(42);

        assert!(!ended.stderr.contains("vCPUs"), "{}", ended.stderr);
        for feature in ["erms", "fsrm", "xsave", "avx2"] {
            let expected = host_has(feature) && !alcove::host::is_translated();
            let found = ended.stdout.split_whitespace().any(|word| word == feature);
            assert_eq!(found, expected, "{feature}: {}", ended.stdout);
        }
    }
}

/// Whether the host's Linux lists a processor's `feature`.
fn host_has(feature: &str) -> bool {
    let processors = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    processors.split_whitespace().any(|word| word == feature)
}

pub fn a_storm_of_interrupts_leaves_two_cpus_consistent() {
    storm(2, A_WHILE);
}

pub fn a_storm_of_interrupts_leaves_three_cpus_consistent() {
    storm(3, A_WHILE);
}

pub fn a_storm_of_interrupts_leaves_four_cpus_consistent() {
    storm(4, A_MINUTE);
}

/// Seconds of a storm.
const A_WHILE: u32 = 10;
const A_MINUTE: u32 = 60;

/// Raises a storm between `cpus` vCPUs.
#[track_caller]
fn storm(cpus: u32, seconds: u32) {
    let program = std::fs::read(guest_file("programs/storm")).unwrap();
    let files = [("bin/storm", program)];
    let script = format!("bin/storm {seconds} && exit 42");

    let cpus = cpus.to_string();
    let arguments = [["--cpus", &cpus], WHOLE_PROCESSOR].concat();
    let ended = run_script(&script, &files, &arguments).expect(42);

    assert!(ended.stdout.contains("storm: consistent"), "{}", ended.stdout);
}
