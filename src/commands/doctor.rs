//! `alcove doctor`.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use kvm_ioctls::{Cap, Kvm};

use super::{FAILED, Failure};
use crate::host;
use crate::sandbox;

/// What a check found.
enum Finding {
    /// It works; what there is.
    Good(String),
    /// Guests run without it; what is missing and the remedy.
    Lacking(String, &'static str),
    /// No guest runs without it.
    Broken(String, &'static str),
}

/// Checks this host, and fails with 125 when no guest could run on it.
pub fn run() -> Result<ExitCode, Failure> {
    let checks = [
        ("kvm", kvm()),
        ("virtualisation", virtualisation()),
        ("vcpus", vcpus()),
        ("tun", tun()),
        ("passt", passt()),
        ("seccomp", seccomp()),
        ("landlock", landlock()),
        ("jail", jail()),
        ("control groups", control_groups()),
        ("io_uring", io_uring()),
        ("huge pages", huge_pages()),
    ];
    let mut out = io::stdout();
    let mut broken = false;
    for (name, finding) in checks {
        let (mark, text, remedy) = match finding {
            Finding::Good(text) => ("ok", text, None),
            Finding::Lacking(text, remedy) => ("--", text, Some(remedy)),
            Finding::Broken(text, remedy) => {
                broken = true;
                ("NO", text, Some(remedy))
            }
        };
        writeln!(out, "{mark}  {name:15} {text}")?;
        if let Some(remedy) = remedy {
            writeln!(out, "    {:15} remedy: {remedy}", "")?;
        }
    }
    Ok(if broken { ExitCode::from(FAILED) } else { ExitCode::SUCCESS })
}

const LOAD_KVM: &str =
    "modprobe kvm_amd or kvm_intel, or enable virtualisation in the firmware or hypervisor";
const JOIN_GROUP: &str = "add yourself to the group that owns it and log in again";

fn kvm() -> Finding {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Finding::Good("/dev/kvm opens for reading and writing".to_owned()),
        Err(e) if e.kind() == ErrorKind::PermissionDenied => {
            Finding::Broken("/dev/kvm is there but may not be opened".to_owned(), JOIN_GROUP)
        }
        Err(e) => Finding::Broken(format!("/dev/kvm does not open: {e}"), LOAD_KVM),
    }
}

fn virtualisation() -> Finding {
    if host::has_hardware_virtualisation() && host::is_translated() {
        Finding::Lacking(
            "hardware (VT-x or AMD-V), itself emulated by QEMU's TCG: guests run slowly, and see \
             neither XSAVE, AVX nor fast string instructions, which it does badly"
                .to_owned(),
            "none needed; on a real processor guests are fast and see all of it",
        )
    } else if host::has_hardware_virtualisation() {
        Finding::Good("hardware (VT-x or AMD-V)".to_owned())
    } else {
        Finding::Lacking(
            "software: guest kernels are interpreted, their programs run at full speed; \
             --assist completes what KVM's emulator refuses"
                .to_owned(),
            "none needed; with VT-x or AMD-V guest kernels run on the processor",
        )
    }
}

fn vcpus() -> Finding {
    match Kvm::new() {
        Ok(kvm) => {
            let (advised, most) = (kvm.get_nr_vcpus(), kvm.get_max_vcpus());
            let slots = kvm.check_extension_int(Cap::NrMemslots);
            Finding::Good(format!("{advised} advised, {most} at most; {slots} memory slots"))
        }
        Err(e) => Finding::Broken(format!("unknown, /dev/kvm does not open: {e}"), LOAD_KVM),
    }
}

fn tun() -> Finding {
    match OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) if host::may_administer_networks() => {
            Finding::Good("--net tap=NAME works, and makes interfaces".to_owned())
        }
        Ok(_) => Finding::Lacking(
            "--net tap=NAME works with interfaces of yours; making them takes CAP_NET_ADMIN"
                .to_owned(),
            "as root, run: ip tuntap add NAME mode tap user $USER; or use --net user",
        ),
        Err(e) => Finding::Lacking(format!("/dev/net/tun does not open: {e}"), "modprobe tun"),
    }
}

fn passt() -> Finding {
    if host::has_program("passt") {
        Finding::Good("--net user works".to_owned())
    } else {
        Finding::Lacking(
            "not installed, so --net user does not work".to_owned(),
            "apt install passt",
        )
    }
}

fn seccomp() -> Finding {
    match sandbox::seccomp::is_available() {
        Ok(()) => Finding::Good("system calls can be filtered".to_owned()),
        Err(e) => Finding::Lacking(
            format!("system calls cannot be filtered: {e}; guests run with --sandbox off only"),
            "a host kernel with CONFIG_SECCOMP_FILTER (Linux 4.14 or newer)",
        ),
    }
}

fn landlock() -> Finding {
    match host::landlock_abi() {
        Some(abi) => {
            let what = sandbox::landlock::reach(abi);
            Finding::Good(format!("ABI {abi}: takes away {what}"))
        }
        None => Finding::Lacking(
            "not available".to_owned(),
            "boot the host with landlock in its lsm= list (Linux 5.13 or newer)",
        ),
    }
}

fn jail() -> Finding {
    match sandbox::jail::probe() {
        Ok(()) => Finding::Good("--jail works for this user".to_owned()),
        Err(refused) => Finding::Lacking(
            format!("--jail does not work: {refused}: {}", refused.source),
            "sysctl user.max_user_namespaces=N above 0, kernel.unprivileged_userns_clone=1, \
             kernel.apparmor_restrict_unprivileged_userns=0, whichever there is; or run as root",
        ),
    }
}

fn control_groups() -> Finding {
    const REMEDY: &str = "boot the host with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 \
                          none /sys/fs/cgroup; only --cpu-quota and --memory-max need them";
    let there = sandbox::cgroup::controllers();
    let has = |name: &str| there.iter().any(|all| all.split(' ').any(|one| one == name));
    match (has("cpu"), has("memory")) {
        (true, true) => Finding::Good("version 2 with cpu and memory".to_owned()),
        _ if there.is_some() => {
            Finding::Lacking("version 2, without cpu or memory".to_owned(), REMEDY)
        }
        _ => Finding::Lacking("none of version 2 in /sys/fs/cgroup".to_owned(), REMEDY),
    }
}

fn io_uring() -> Finding {
    match host::io_uring_works() {
        Ok(()) => Finding::Good("available".to_owned()),
        Err(e) => {
            Finding::Lacking(format!("not available: {e}"), "sysctl kernel.io_uring_disabled=0")
        }
    }
}

fn huge_pages() -> Finding {
    let total = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("HugePages_Total:"))?;
        line.trim().parse::<u64>().ok()
    });
    let transparent = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
        .ok()
        .and_then(|text| Some(text.split_once('[')?.1.split_once(']')?.0.to_owned()))
        .unwrap_or_else(|| "not built in".to_owned());
    match total {
        Some(pages) if pages > 0 => {
            Finding::Good(format!("{pages} reserved; transparent: {transparent}"))
        }
        _ => Finding::Lacking(
            format!("none reserved; transparent: {transparent}"),
            "sysctl vm.nr_hugepages=N, if a guest with much memory is to run faster",
        ),
    }
}
