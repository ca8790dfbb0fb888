//! Linux comes up, does as it is told, and ends with the right status.

use crate::alcove::{Finished, WHOLE_PROCESSOR, finish, guest_command, run_script};
use crate::host::guest_file;

/// Boots `kernel` with `memory`, which must report and power off; its MemTotal in KiB.
#[track_caller]
fn report(kernel: &str, memory: &str) -> u64 {
    let command = guest_command(kernel, &["--memory", memory]);

    let Finished { stdout, .. } = finish(command).expect(0);

    let field = |name: &str| {
        let mark = format!("alcove-guest: {name} ");
        let line = stdout.lines().find_map(|line| line.strip_prefix(&mark));
        line.unwrap_or_else(|| panic!("no {name} in {stdout}")).to_owned()
    };
    assert!(field("kernel").starts_with("6.12."), "{stdout}");
    assert_eq!(field("cpus"), "1");
    assert!(field("uptime").ends_with(" s"), "{stdout}");
    field("memory").strip_suffix(" KiB").unwrap().parse().unwrap()
}

pub fn vmlinux_reports_and_ends() {
    let memory_kib = report("vmlinux", "256M");

    assert!((200_000..262_144).contains(&memory_kib), "{memory_kib} KiB");
}

pub fn bzimage_reports_and_ends() {
    let memory_kib = report("bzImage", "256M");

    assert!((200_000..262_144).contains(&memory_kib), "{memory_kib} KiB");
}

pub fn vmlinux_runs_in_64_mib() {
    let memory_kib = report("vmlinux", "64M");

    assert!((30_000..65_536).contains(&memory_kib), "{memory_kib} KiB");
}

pub fn bzimage_runs_in_64_mib() {
    let memory_kib = report("bzImage", "64M");

    assert!((30_000..65_536).contains(&memory_kib), "{memory_kib} KiB");
}

pub fn vmlinux_runs_in_8_gib() {
    let memory_kib = report("vmlinux", "8G");

    assert!((7_500_000..8_388_608).contains(&memory_kib), "{memory_kib} KiB");
}

pub fn bzimage_runs_in_8_gib() {
    let memory_kib = report("bzImage", "8G");

    assert!((7_500_000..8_388_608).contains(&memory_kib), "{memory_kib} KiB");
}

pub fn debian_6_1_reaches_user_space() {
    debian("6.1");
}

pub fn debian_6_12_reaches_user_space() {
    debian("6.12");
}

/// Boots Debian's cloud kernel as it is packaged.
#[track_caller]
fn debian(series: &str) {
    let command = guest_command(&format!("debian-{series}"), &["--memory", "512M"]);

    let Finished { stdout, .. } = finish(command).expect(0);

    assert!(stdout.contains(&format!("alcove-guest: kernel {series}.")), "{stdout}");
    assert!(stdout.contains("alcove-guest: cpus 1"), "{stdout}");
    assert!(stdout.contains("reboot: Power down"), "{stdout}");
}

pub fn a_script_gives_its_status() {
    run_script("echo about to end; exit 7", &[], &WHOLE_PROCESSOR).expect(7);
}

pub fn a_kernel_panic_gives_126() {
    let ended = run_script("echo c >/proc/sysrq-trigger", &[], &WHOLE_PROCESSOR).expect(126);

    assert!(ended.stderr.contains("the guest's kernel panicked"), "{}", ended.stderr);
}

/// System calls of both kinds, faults and single steps of a program, with the recovery of them on
/// whether or not this KVM needs it.
pub fn system_calls_and_traps_arrive_as_what_they_are() {
    let program = std::fs::read(guest_file("programs/traps")).unwrap();
    let symbols = std::fs::read_to_string(guest_file("System.map")).unwrap();
    let entry = symbols.lines().find_map(|line| line.strip_suffix(" T entry_SYSCALL_64")).unwrap();
    let script = format!("bin/traps {entry} && exit 42");

    let arguments = [["--assist", "on"], WHOLE_PROCESSOR].concat();
    let ended = run_script(&script, &[("bin/traps", program)], &arguments).expect(42);

    assert!(ended.stdout.contains("traps: right"), "{}", ended.stdout);
}

/// Several glibc programs run the same AVX computation at once and must agree with the result that
/// each computes without vectors; every one of them checks itself.
pub fn avx_programs_side_by_side_compute_right() {
    let program = std::fs::read(guest_file("programs/avx")).unwrap();
    let script = "\
        pids=
        for seed in 1 2 3 4; do bin/avx $seed & pids=\"$pids $!\"; done
        for pid in $pids; do wait $pid || exit 1; done
        exit 42";

    let ended = run_script(script, &[("bin/avx", program)], &WHOLE_PROCESSOR).expect(42);

    assert_eq!(ended.stdout.matches("avx: equal").count(), 4, "{}", ended.stdout);
}
